"""Outputs as they travel: an output holds all that those before it do, its growth what is new."""

from __future__ import annotations

from typing import NamedTuple

from stars_fast.outputs import CompletionOutput, FinishReason, RequestOutput, Segment


class Part(NamedTuple):
    """What is new of one response.

    Attributes
    ----------
    number
        Of the response.
    kept
        How many characters of its text stay; `text` comes behind them.
    """

    number: int
    kept: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    segments: list[Segment]
    reward: float | None
    rewards: dict[str, float]
    finish_reason: FinishReason | None


class Growth(NamedTuple):
    """What an output has beyond the one before it.

    Attributes
    ----------
    parts
        Of the responses that have grown.
    drafted_tokens, rm_tokens, target_reward
        Of the output, whole.
    prompt
        Its text and its token ids, with the first output alone.
    """

    parts: list[Part]
    finished: bool
    error: str | None
    drafted_tokens: int
    rm_tokens: int
    target_reward: float | None
    prompt: tuple[str | None, list[int]] | None


class Cutter:
    """Cuts the outputs of one request, which only grow, into what is new with each."""

    def __init__(self) -> None:
        self._last: list[CompletionOutput] = []

    def cut(self, output: RequestOutput) -> Growth:
        """Return what is new with an output; it is kept, and must not change."""
        first = not self._last
        parts = []
        for number, new in enumerate(output.outputs):
            if number == len(self._last):
                self._last.append(CompletionOutput(new.index))
            old = self._last[number]
            if new != old or first:
                parts.append(_part(old, new))
                self._last[number] = new
        return Growth(
            parts,
            output.finished,
            output.error,
            output.drafted_tokens,
            output.rm_tokens,
            output.target_reward,
            (output.prompt, output.prompt_token_ids) if first else None,
        )


class Joiner:
    """Makes outputs of one request of their growths.

    Parameters
    ----------
    request_id
        Of the request.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._last: list[CompletionOutput] = []
        self._prompt: tuple[str | None, list[int]] = (None, [])

    def join(self, growth: Growth) -> RequestOutput:
        """Return the output; those before it stay as they are."""
        self._prompt = growth.prompt or self._prompt
        for part in growth.parts:
            if part.number == len(self._last):
                self._last.append(CompletionOutput(part.number))
            self._last[part.number] = _joined(self._last[part.number], part)
        return RequestOutput(
            self._request_id,
            *self._prompt,
            list(self._last),
            finished=growth.finished,
            error=growth.error,
            drafted_tokens=growth.drafted_tokens,
            rm_tokens=growth.rm_tokens,
            target_reward=growth.target_reward,
        )


def _part(old: CompletionOutput, new: CompletionOutput) -> Part:
    # A stop text that ends in a later segment takes back what it began with.
    kept = len(old.text) if new.text.startswith(old.text) else 0
    return Part(
        new.index,
        kept,
        new.text[kept:],
        new.token_ids[len(old.token_ids) :],
        new.logprobs[len(old.logprobs) :],
        new.top_logprobs[len(old.top_logprobs) :],
        new.segments[len(old.segments) :],
        new.reward,
        new.rewards,
        new.finish_reason,
    )


def _joined(old: CompletionOutput, part: Part) -> CompletionOutput:
    return CompletionOutput(
        index=part.number,
        text=old.text[: part.kept] + part.text,
        token_ids=old.token_ids + part.token_ids,
        logprobs=old.logprobs + part.logprobs,
        reward=part.reward,
        finish_reason=part.finish_reason,
        segments=old.segments + part.segments,
        top_logprobs=old.top_logprobs + part.top_logprobs,
        rewards=part.rewards,
    )
