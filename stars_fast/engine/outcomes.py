"""What committed rounds change: segments and texts, what ends, what the reward model keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stars_fast import _core
from stars_fast.engine.requests import Candidate, Response
from stars_fast.engine.round import Round
from stars_fast.outputs import Attempt, FinishReason, Segment
from stars_fast.rewards.base import Scorer

_FINISH: dict[int, FinishReason | None] = {
    _core.FINISH_NONE: None,
    _core.FINISH_STOP: "stop",
    _core.FINISH_LENGTH: "length",
}
_ACCEPTED: dict[int, Literal["test", "fallback", "choice"]] = {
    _core.EVENT_ACCEPTED: "test",
    _core.EVENT_FALLBACK: "fallback",
    _core.EVENT_CHOSEN: "choice",
}


@dataclass
class _Decided:
    """A round that is committed, and the winner of each of its events; None: it failed."""

    done: Round
    decision: _core.Decision
    winners: list[Candidate | None]


class Outcomes:
    """Writes down what was decided of the responses that run, in two steps.

    `take` is what their next drafts need, `write` the rest, at any time before these are scored.

    Parameters
    ----------
    responses
        Those that run, by handle; whoever ends leaves it.
    scorer
        The reward model; None: no response is scored.

    Attributes
    ----------
    changed
        Responses with a new segment and those that failed, since they were last taken.
    """

    def __init__(self, responses: dict[int, Response], scorer: Scorer | None) -> None:
        self._responses = responses
        self._scorer_or_none = scorer
        self._decided: _Decided | None = None
        self.changed: list[Response] = []

    @property
    def pending(self) -> bool:
        """Whether `write` has something to do."""
        return self._decided is not None

    @property
    def _scorer(self) -> Scorer:
        assert self._scorer_or_none is not None  # or nothing would have been scored
        return self._scorer_or_none

    def take_changed(self) -> list[Response]:
        """Return `changed`, and begin it again."""
        changed, self.changed = self.changed, []
        return changed

    def take(self, done: Round, decision: _core.Decision) -> None:
        """Bring the responses to where their next drafts begin."""
        for response in done.responses:
            response.under_way.clear()
        for row, decided in enumerate(done.decided):
            if not decided:
                candidate = done.candidates[row]
                done.responses[row].under_way[candidate.attempt] = candidate
        winners: list[Candidate | None] = []
        events = decision.request.tolist(), decision.kind.tolist(), decision.row.tolist()
        for handle, kind, row in zip(*events, strict=True):
            if kind == _core.EVENT_FAILED:
                winners.append(None)
                continue
            response = self._responses[handle]
            winner = response.kept if row < 0 else done.candidates[row]
            if winner is None:
                raise RuntimeError(f"request {handle} fell back to an attempt it does not have")
            response.advance(winner)
            winners.append(winner)
        self._decided = _Decided(done, decision, winners)

    def write(self) -> None:
        """Write down what was taken last, if that is still to be done."""
        decided, self._decided = self._decided, None
        if decided is None:
            return
        self._count(decided.done)
        self._settle_rows(decided)
        self._write_events(decided)
        self.prune(decided.done.plan)
        self._compare_paths(decided.decision)

    def prune(self, plan: _core.Plan) -> None:
        """Have the reward model forget the candidates of a plan, but the kept ones."""
        for handle in dict.fromkeys(rows_of(plan)):
            response = self._responses.get(handle)
            if response is not None and response.scored:
                self._scorer.prune(handle)

    def end(self, response: Response, reason: FinishReason | None) -> None:
        """Take a response out of those that run."""
        if reason in ("abort", "error") and response.output.finish_reason is None:
            response.output.text = response.text.whole
        response.output.finish_reason = reason
        response.kept = None
        self._responses.pop(response.handle, None)
        if response.scored:
            self._scorer.finish(response.handle)

    def _count(self, done: Round) -> None:
        """Count what was drafted for each response."""
        discarded = [] if done.draft.discarded is None else done.draft.discarded.tolist()
        rows = zip(done.responses, done.lengths.tolist(), done.drawn, strict=True)
        for response, length, drawn in rows:
            response.drafted_tokens += length - drawn if length > drawn else 0
        for response, tokens in zip(done.responses, discarded, strict=False):
            response.drafted_tokens += tokens

    def _settle_rows(self, decided: _Decided) -> None:
        """Remember the best of the rejected, and with ``trace`` every rejected attempt."""
        done = decided.done
        outcomes = decided.decision.outcome.tolist()
        thresholds: Sequence[float] = decided.decision.threshold.tolist()
        for row, response in enumerate(done.responses):
            traced = response.params.trace
            kept = outcomes[row] == _core.ROW_KEPT
            if not (traced or kept):
                continue
            looked_at = response.params.kind.decides == "choice" or not math.isnan(thresholds[row])
            looked_at = looked_at and done.decided[row]
            if done.candidates[row].reward is None or response.finished or not looked_at:
                continue  # no reward, or an attempt before it had passed or goes on
            candidate = done.tested(row, thresholds[row])
            assert candidate.reward is not None
            if traced:
                tokens = tuple(candidate.token_ids)
                response.rejected.append(
                    Attempt(candidate.attempt, tokens, candidate.reward, candidate.rewards)
                )
            if kept:
                response.kept = candidate
                self._scorer.keep(response.handle, candidate.branch)

    def _write_events(self, decided: _Decided) -> None:
        """Commit the winners as segments; end what is finished or has failed."""
        done, decision = decided.done, decided.decision
        thresholds = decision.threshold.tolist()
        events = zip(
            decision.request.tolist(),
            decision.kind.tolist(),
            decision.row.tolist(),
            decision.start.tolist(),
            decision.attempts.tolist(),
            decision.finish.tolist(),
            decided.winners,
            strict=True,
        )
        for handle, kind, row, start, attempts, finish, winner in events:
            response = self._responses[handle]
            self.changed.append(response)
            if winner is None:
                response.error = done.errors[row]
                self.end(response, "error")
                continue
            if row >= 0 and response.scored:
                done.tested(row, thresholds[row])
            segment = Segment(
                start=start,
                end=start + len(winner.token_ids),
                reward=winner.reward,
                threshold=winner.threshold,
                attempts=attempts,
                accepted=_ACCEPTED[kind],
                rewards=winner.rewards,
            )
            response.record(winner, segment, _FINISH[finish])
            if winner.reward is not None:
                self._scorer.accept(handle, winner.branch)
            if finish != _core.FINISH_NONE and response.is_path:
                response.output.finish_reason = _FINISH[finish]  # and others may yet beat it
            elif finish != _core.FINISH_NONE:
                self.end(response, _FINISH[finish])

    def _compare_paths(self, decision: _core.Decision) -> None:
        """Carry out what was decided over paths that have all come to a boundary."""
        copies = zip(decision.copy_target.tolist(), decision.copy_source.tolist(), strict=True)
        for target, source in copies:
            self._responses[target].copy_path(self._responses[source])
            self._scorer.fork(source, target)
        for handle in decision.dropped.tolist():
            self.end(self._responses[handle], "abort")
        for handle in decision.chosen.tolist():
            response = self._responses[handle]
            response.chosen = True
            self.end(response, response.output.finish_reason)


def rows_of(plan: _core.Plan) -> list[int]:
    """Return the response of each row, those held included."""
    return [*plan.request.tolist(), *plan.held.tolist()]
