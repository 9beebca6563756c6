"""A user's request, its responses so far, and the candidates for their next segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stars_fast.drafting.base import RowSampling
from stars_fast.engine.detokenize import ResponseText
from stars_fast.models.images import SeenPrompt
from stars_fast.outputs import (
    Attempt,
    CompletionOutput,
    FinishReason,
    PrefixCalibration,
    RequestOutput,
    Segment,
)
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt

if TYPE_CHECKING:
    from stars_fast.engine.streaming import PlainSamples


@dataclass(slots=True)
class Candidate:
    """A drafted segment and, once it is scored and tested, its results.

    Attributes
    ----------
    branch
        Its id at the scorer; -1 if it was not scored.
    adjusted_logprobs, top_logprobs, log_ratios
        See `Draft`; the first are `logprobs` where nothing changed them.
    attempt
        Number of the attempt within the segment.
    reward, threshold
        Both sides of the accept test; None if there is none.
    rewards, keeps
        What several rewards are, by name, and whether all constraints are kept.
    stopped
        Its last token ends the response.
    stop_text_at
        Where in the response's text the stop text that ends this candidate begins, None if none
        does.
    error
        Why it cannot be scored; None if it can.
    """

    branch: int
    attempt: int
    token_ids: list[int]
    logprobs: list[float]
    adjusted_logprobs: list[float]
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    log_ratios: list[float] = field(default_factory=list)
    reward: float | None = None
    threshold: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    keeps: bool = True
    stopped: bool = False
    stop_text_at: int | None = None
    error: str | None = None


@dataclass
class Response:
    """One response, known to the scheduler and the scorer by its handle.

    Attributes
    ----------
    text
        Of its committed tokens, a stop text and what follows it included.
    kept
        The best of the rejected candidates for the current segment, if any.
    rejected
        Tested attempts at the current segment, filled only with ``trace``.
    under_way
        Attempts at the current segment that wait for a further round, by number.
    known
        Effective reward and log-probabilities of its attempts at the current segment, by tokens;
        filled only where its method reads the latter.
    error
        Why it failed; None if it did not.
    prefixes
        Calibration of its rewards until it is finished; None: they are not calibrated.
    is_path
        Whether it is one of several paths that are compared where their segments end.
    chosen
        Whether it is the path that won the comparison.
    keeps
        Whether it keeps the constraints of its rewards, as far as it has come.
    drafted_tokens, rm_tokens
        Its cost, see `RequestOutput`.
    seen
        Its prompt with the pictures encoded; None: there are none.
    scored
        Whether its segments are scored and tested.
    reads_logprobs
        See `MethodKind`.
    cuts
        Whether candidates are cut at stop texts or ends of steps.
    token_ids
        Its committed tokens, as jobs of the scorer take them: those of `output`, once the last
        segment is recorded.
    plain_from
        See `StarsParams`.
    """

    handle: int
    params: StarsParams
    sampling: RowSampling
    output: CompletionOutput
    text: ResponseText
    kept: Candidate | None = None
    rejected: list[Attempt] = field(default_factory=list)
    under_way: dict[int, Candidate] = field(default_factory=dict)
    known: dict[tuple[int, ...], tuple[float, list[float]]] = field(default_factory=dict)
    error: str | None = None
    prefixes: PrefixCalibration | None = None
    is_path: bool = False
    chosen: bool = False
    keeps: bool = True
    drafted_tokens: int = 0
    rm_tokens: int = 0
    seen: SeenPrompt | None = None
    scored: bool = field(init=False)
    reads_logprobs: bool = field(init=False)
    cuts: bool = field(init=False)
    token_ids: npt.NDArray[np.int64] = field(init=False)
    plain_from: int = field(init=False)

    def __post_init__(self) -> None:
        self.scored = self.params.scored
        self.reads_logprobs = self.params.kind.reads_logprobs
        self.cuts = bool(self.params.stop_texts) or self.params.segment_end == "step"
        self.token_ids = np.array(self.output.token_ids, np.int64)
        self.plain_from = self.params.plain_from
        if self.sampling.bad_words:
            self.sampling = replace(self.sampling, drawn=self.output.token_ids)

    @property
    def judged(self) -> bool:
        """Whether the segment at hand is scored."""
        return self.scored and len(self.output.token_ids) < self.plain_from

    @property
    def finished(self) -> bool:
        """Whether nothing will be added."""
        return self.output.finish_reason is not None

    def advance(self, candidate: Candidate) -> None:
        """Append the tokens of a candidate that won; the next draft begins behind them."""
        self.output.token_ids.extend(candidate.token_ids)
        if self.sampling.grammar is not None:
            self.sampling.grammar.advance(candidate.token_ids)
        counts = self.sampling.counts
        if counts is not None:
            for token in candidate.token_ids:
                counts[token] = counts.get(token, 0) + 1

    def record(self, candidate: Candidate, segment: Segment, finish: FinishReason | None) -> None:
        """Note the segment that the candidate became, which `advance` has been told, and its text.

        `finish`: why it ends the response, None if it does not.
        """
        self.token_ids = np.concatenate((self.token_ids, candidate.token_ids), dtype=np.int64)
        self.output.logprobs.extend(candidate.logprobs)
        self.output.top_logprobs.extend(candidate.top_logprobs)
        self.output.reward, self.output.rewards = candidate.reward, candidate.rewards
        self.keeps = candidate.keeps
        self.text = candidate_text(self, candidate)
        self.output.text = self.text.text
        if finish is not None:
            self.output.text = self.text.whole[: candidate.stop_text_at]
        rejected = [a for a in self.rejected if a.number != candidate.attempt]
        rejected.sort(key=lambda attempt: attempt.number)  # those held came behind the others
        self.output.segments.append(
            replace(segment, rejected=tuple(rejected)) if rejected else segment
        )
        self.kept = None
        self.rejected.clear()
        self.known.clear()

    def copy_path(self, source: Response) -> None:
        """Go on as a copy of another path."""
        mine, theirs = self.output, source.output
        self.text = source.text
        self.keeps = source.keeps
        mine.text, mine.finish_reason = theirs.text, theirs.finish_reason
        mine.reward, mine.rewards = theirs.reward, theirs.rewards
        mine.token_ids[:] = theirs.token_ids  # the same list: `sampling` reads it
        self.token_ids = source.token_ids
        mine.logprobs = list(theirs.logprobs)
        mine.top_logprobs = list(theirs.top_logprobs)
        if self.sampling.grammar is not None:
            assert source.sampling.grammar is not None
            self.sampling.grammar.become(source.sampling.grammar)
        if self.sampling.counts is not None:
            assert source.sampling.counts is not None
            self.sampling.counts.clear()
            self.sampling.counts.update(source.sampling.counts)
        mine.segments = list(theirs.segments)


def candidate_text(response: Response, candidate: Candidate) -> ResponseText:
    """Return the text of the response with the candidate behind it, its stop token left out."""
    ends = candidate.stopped and candidate.stop_text_at is None
    ids = candidate.token_ids
    return response.text.extended(ids[:-1] if ends else ids)


@dataclass
class Request:
    """A request and its responses.

    Attributes
    ----------
    seed
        Key of its draws.
    prefixes
        Calibration of its rewards; None: they are not calibrated.
    groups
        For each of the `n` responses, the whole responses or paths there are to choose from.
    unchosen
        Whether it is still to be decided which of its responses are returned.
    calibrated
        Whether its target is, or was, to be found by the engine.
    samples
        The samples that it is one of, which nobody else gets to see; None: it is a caller's.
    """

    request_id: str
    prompt: Prompt
    params: StarsParams
    seed: int = 0
    prefixes: PrefixCalibration | None = None
    groups: list[list[Response]] = field(default_factory=list)
    error: str | None = None
    unchosen: bool = False
    calibrated: bool = False
    samples: PlainSamples | None = None

    @property
    def responses(self) -> list[Response]:
        """All that it runs or has run."""
        return [response for group in self.groups for response in group]

    @property
    def finished(self) -> bool:
        """Whether nothing will be added."""
        if self.error is not None or self.unchosen:
            return self.error is not None
        return all(response.finished for group in self.groups for response in group)

    @property
    def drafted_tokens(self) -> int:
        """See `RequestOutput`."""
        return sum([response.drafted_tokens for response in self.responses])

    def to_output(self) -> RequestOutput:
        """Return a copy of the state, which later rounds do not change."""
        target = self.params.target_reward if self.params.needs_target else None
        # Of responses that end before they have begun, waiting for a target.
        unbegun = CompletionOutput(0, finish_reason="abort" if self.error is None else "error")
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text or None,
            prompt_token_ids=list(self.prompt.token_ids),
            outputs=[
                _copy(_best(group).output if group else unbegun, i)
                for i, group in enumerate(self.groups)
            ],
            finished=self.finished,
            error=self.error,
            drafted_tokens=self.drafted_tokens,
            rm_tokens=sum([response.rm_tokens for response in self.responses]),
            target_reward=target if isinstance(target, int | float) else None,
        )


def _best(samples: Sequence[Response]) -> Response:
    """Return the chosen sample, else the best-scored one, the first of equals.

    Any that keeps its constraints is better than any that does not.
    """
    if len(samples) == 1:
        return samples[0]
    return max(
        samples,
        key=lambda r: (
            r.chosen,
            r.keeps,
            -math.inf if r.output.reward is None else r.output.reward,
        ),
    )


def _copy(output: CompletionOutput, index: int) -> CompletionOutput:
    return replace(
        output,
        index=index,
        token_ids=list(output.token_ids),
        logprobs=list(output.logprobs),
        top_logprobs=list(output.top_logprobs),
        segments=list(output.segments),
        rewards=dict(output.rewards),
    )
