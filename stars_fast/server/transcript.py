"""One response as it grows: what is new in each output, and can be sent.

What has been sent is never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stars_fast.decoders import overlap
from stars_fast.outputs import CompletionOutput, FinishReason, Segment


@dataclass(frozen=True)
class Delta:
    """What a newly accepted segment, or several, added to a response.

    Attributes
    ----------
    text
        What can be sent.
    begin
        Where the new tokens begin in the response's text, some of which may not have been sent.
    """

    text: str
    begin: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    segments: Sequence[Segment]
    finish_reason: FinishReason | None
    reward: float | None


class TextDeltas:
    """Cuts one growing response into pieces that together are its final text.

    Held back until it is decided: the beginning of what may become a stop text, which is no part
    of the response.

    Parameters
    ----------
    stops
        The stop texts.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
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
        return len(text) - max((overlap(text, stop) for stop in self._stops), default=0)


class Transcript:
    """Follows one response of a request.

    Parameters
    ----------
    index
        Of the choice that it is.
    stops
        The request's stop texts.
    """

    def __init__(self, index: int, stops: Sequence[str]) -> None:
        self.index = index
        self.latest = CompletionOutput(index)
        self._deltas = TextDeltas(stops)

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
            begin=len(before.text),
            token_ids=output.token_ids[start:],
            logprobs=output.logprobs[start:],
            segments=new,
            finish_reason=output.finish_reason,
            reward=output.reward,
        )
