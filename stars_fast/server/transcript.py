"""One response as it grows: what is new in each output, and can be sent.

What has been sent is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from stars_fast.engine.detokenize import rewrites_spaces, settled
from stars_fast.outputs import CompletionOutput, FinishReason, Segment


@dataclass(frozen=True)
class Delta:
    """What a newly accepted segment, or several, added to a response."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    segments: Sequence[Segment]
    finish_reason: FinishReason | None
    reward: float | None


class TextDeltas:
    """Cuts one growing response into pieces that together are its final text.

    Held back until it is decided: the first bytes of a character whose others are in the next
    segment, and the beginning of what may become a stop text, which is no part of the response.

    Parameters
    ----------
    stops
        The stop texts.
    rewrites_spaces
        The tokenizer changes white space before what follows it
        (``clean_up_tokenization_spaces``): the last word is held back, too.
    """

    def __init__(self, stops: Sequence[str] = (), *, rewrites_spaces: bool = False) -> None:
        self._stops = tuple(stops)
        self._rewrites_spaces = rewrites_spaces
        self._sent = 0

    def push(self, text: str, *, finished: bool) -> str:
        """Return what can be sent beside all that was returned before.

        Parameters
        ----------
        text
            The response so far, from its beginning.
        finished
            It is the final text: nothing is held back.
        """
        sendable = text if finished else text[: self._sendable(text)]
        delta = sendable[self._sent :]
        self._sent += len(delta)
        return delta

    def _sendable(self, text: str) -> int:
        whole = settled(text)
        if self._rewrites_spaces:
            words = whole.rstrip()
            whole = words[: max(words.rfind(" "), 0)]
        return len(whole) - max((overlap(whole, stop) for stop in self._stops), default=0)


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with and goes beyond."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Transcript:
    """Follows one response of a request.

    Parameters
    ----------
    index
        Of the choice that it is.
    stops
        The request's stop texts.
    tokenizer
        The language model's.
    """

    def __init__(
        self, index: int, stops: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.index = index
        self.latest = CompletionOutput(index)
        self._deltas = TextDeltas(stops, rewrites_spaces=rewrites_spaces(tokenizer))

    def advance(self, output: CompletionOutput) -> Delta | None:
        """Return what `output`, a later state of the response, adds; None if nothing."""
        before, self.latest = self.latest, output
        new = output.segments[len(before.segments) :]
        ended = output.finish_reason is not None
        if not new and ended == (before.finish_reason is not None):
            return None
        start = len(before.token_ids)
        return Delta(
            text=self._deltas.push(output.text, finished=ended),
            token_ids=output.token_ids[start:],
            logprobs=output.logprobs[start:],
            segments=new,
            finish_reason=output.finish_reason,
            reward=output.reward,
        )


def token_text(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return tokens as text, special ones included."""
    if tokenizer is None:
        return ""
    return str(tokenizer.decode(list(token_ids)))
