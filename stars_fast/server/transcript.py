"""One response as it grows: what is new in each output, and can be sent.

What has been sent is never taken back.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stars_fast.outputs import CompletionOutput, FinishReason, Segment
from stars_fast.text.decoders import CONTEXT, HALF_CHARACTER, Decodes, decoder_of


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
    top_logprobs: Sequence[Mapping[int, float]]
    segments: Sequence[Segment]
    finish_reason: FinishReason | None
    reward: float | None
    rewards: Mapping[str, float]


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
        self._stops = sorted(stops)
        self._longest = max(map(len, stops), default=1) - 1  # that is held back
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
        for at in range(max(0, len(text) - self._longest), len(text)):
            # Sorted, the stop texts that begin with what is left come right behind it.
            rest = text[at:]
            next_stop = bisect.bisect_right(self._stops, rest)
            if next_stop < len(self._stops) and self._stops[next_stop].startswith(rest):
                return at
        return len(text)


@dataclass(frozen=True)
class TextOptions:
    """What belongs to the text of a response.

    Attributes
    ----------
    special
        Special tokens, but for one that ended it.
    with_stop
        What ended it: a stop text, or with `special` a token.
    """

    special: bool = False
    with_stop: bool = False

    def text_of(
        self,
        output: CompletionOutput,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        tokenizer: Decodes | None,
    ) -> str:
        """Return the text of a response, finished or not."""
        ids = output.token_ids
        if not self.special and not (self.with_stop and output.finish_reason == "stop"):
            return output.text
        text = _text(tokenizer, prompt_ids, ids, special=False)
        stop = ""
        if output.finish_reason == "stop":
            found = [one for one in stops if text.startswith(one, len(output.text))]
            stop = min(found, key=len, default="")
        if not self.special:
            return output.text + stop
        if output.finish_reason == "stop" and not stop and not self.with_stop:
            ids = ids[:-1]
        text = _text(tokenizer, prompt_ids, ids, special=True)
        if output.finish_reason is None:
            text = text.rstrip(HALF_CHARACTER)
        at = text.rfind(stop) if stop else -1
        return text if at < 0 else text[: at + (len(stop) if self.with_stop else 0)]


def _text(
    tokenizer: Decodes | None, prompt_ids: Sequence[int], ids: Sequence[int], *, special: bool
) -> str:
    """Return what a response adds to its prompt's text, the end of it included."""
    decoder = decoder_of(tokenizer)
    before = prompt_ids[-CONTEXT:]
    whole = decoder.decode([*before, *ids], special=special)
    return whole[len(decoder.decode(before, special=special)) :]


class Transcript:
    """Follows one response of a request.

    Parameters
    ----------
    index
        Of the choice that it is.
    stops
        The request's stop texts.
    options
        Of its text.
    tokenizer
        The language model's.

    Attributes
    ----------
    latest
        The response, its text as it is shown.
    """

    def __init__(
        self,
        index: int,
        stops: Sequence[str],
        options: TextOptions = TextOptions(),
        tokenizer: Decodes | None = None,
    ) -> None:
        self.index = index
        self.latest = CompletionOutput(index)
        self._stops = stops
        self._options = options
        self._tokenizer = tokenizer
        self._deltas = TextDeltas(stops)

    def advance(self, output: CompletionOutput, prompt_ids: Sequence[int] = ()) -> Delta | None:
        """Return what `output`, a later state of the response, adds; None if nothing."""
        before = self.latest
        new = output.segments[len(before.segments) :]
        ended = output.finish_reason is not None
        if not new and ended == (before.finish_reason is not None):
            return None
        if self._options != TextOptions():
            text = self._options.text_of(output, prompt_ids, self._stops, self._tokenizer)
            output = replace(output, text=text)
        self.latest = output
        start = len(before.token_ids)
        return Delta(
            text=self._deltas.push(output.text, finished=ended),
            begin=len(before.text),
            token_ids=output.token_ids[start:],
            logprobs=output.logprobs[start:],
            top_logprobs=output.top_logprobs[start:],
            segments=new,
            finish_reason=output.finish_reason,
            reward=output.reward,
            rewards=output.rewards,
        )
