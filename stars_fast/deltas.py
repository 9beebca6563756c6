"""Text as it can be sent while it grows: what has been sent is never taken back."""

from __future__ import annotations

from collections.abc import Sequence

from stars_fast.detokenize import settled


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
