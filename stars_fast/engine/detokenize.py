"""The text of a response as it grows: what its tokens add to the text of the prompt.

Prompt and response together are the decoded whole. Decoders treat the first token of a text apart
(Llama 2's and Mistral's drop its space), and bytes of one character may lie in several tokens, so
tokens are decoded behind those before them. A few of these decide, which is what vLLM's
incremental detokenizer rests on, too: the cost of a segment does not grow with the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stars_fast.prompts import Prompt
from stars_fast.text.decoders import (
    CONTEXT,
    HALF_CHARACTER,
    NOTHING_HELD,
    Decoder,
    Decodes,
    cleaned,
    decoder_of,
    halves,
)


@dataclass(frozen=True)
class ResponseText:
    """The text of a response so far.

    It does not change: a candidate's text goes on from that of the committed response, which stays
    as it is.

    Attributes
    ----------
    text
        What no later token changes.
    """

    text: str
    _decoder: Decoder
    _window: tuple[int, ...]  # tokens that the next ones are decoded behind
    _taken: int  # characters of the window's text that are in `text`, the prompt's included
    _rest: str = ""  # those behind, at most one
    _held: tuple[str, ...] = NOTHING_HELD  # by each step of cleaning

    @property
    def decided(self) -> str:
        """The text without the bytes of an unfinished character.

        Unlike `text` it has the end that waits for its spaces to be cleaned up.
        """
        return self.text + cleaned("", self._held, flush=True)[0]

    @property
    def whole(self) -> str:
        """The text if nothing follows; an unfinished character is one U+FFFD."""
        return self.text + cleaned(self._rest, self._held, flush=True)[0]

    def extended(self, token_ids: Sequence[int]) -> ResponseText:
        """Return the text with further tokens; special ones and unknown ones add nothing."""
        new = tuple(filter(self._decoder.speaks, token_ids))
        if not new:
            return self
        window = self._window + new
        decoded = self._decoder.decode(window)
        end = max(self._taken, len(decoded.removesuffix(HALF_CHARACTER)))
        text, held = decoded[self._taken : end], self._held
        if self._decoder.cleans_up:
            text, held = cleaned(text, held)
        window, taken = self._decoder.trimmed(window, decoded, end)
        return ResponseText(self.text + text, self._decoder, window, taken, decoded[end:], held)


def response_text(tokenizer: Decodes | None, prompt: Prompt) -> ResponseText:
    """Return the text of a response that is still empty; it stays so without a tokenizer."""
    decoder = decoder_of(tokenizer)
    window = decoder.last_of(prompt.token_ids)
    decoded = decoder.decode(window)
    taken = len(decoded)
    if halves(decoded) > halves(prompt.text):  # it ends within a character, which is the response's
        taken -= 1
    return ResponseText("", decoder, window, taken)


def token_text(tokenizer: Decodes | None, token_ids: Sequence[int]) -> str:
    """Return tokens as a piece of text, special ones included, without those before them."""
    return decoder_of(tokenizer).piece(token_ids)


def token_offsets(
    tokenizer: Decodes | None,
    prompt: Prompt,
    token_ids: Sequence[int],
    first: int = 0,
    begin: int = 0,
) -> list[int]:
    """Return where in a response's text each of its tokens begins, from number `first` on.

    A token that continues a character begins where the character does.

    Parameters
    ----------
    begin
        Length of the text of the tokens before `first`, as `ResponseText.text` has it.
    """
    # Tokens far before the first one change nothing; those near it may hold back spaces.
    near = max(0, first - CONTEXT)
    before = prompt
    if near:
        before = replace(prompt, text="", token_ids=[*prompt.token_ids, *token_ids[:near]])
    text = response_text(tokenizer, before).extended(token_ids[near:first])
    begin -= len(text.text)
    offsets = []
    for token in token_ids[first:]:
        offsets.append(begin + len(text.text))
        text = text.extended((token,))
    return offsets


def find_step_end(
    committed: ResponseText, segment: Sequence[int], step_text: str, least: int
) -> int | None:
    """Return how many tokens of a segment there are up to the end of a step; None: none ends.

    Steps are counted from the beginning of the response, and no two have a character of their ends
    in common.

    Parameters
    ----------
    least
        Tokens that a segment has at least.
    """

    def behind(text: ResponseText, start: int) -> int:
        decided = text.decided
        while (at := decided.find(step_text, start)) >= 0:
            start = at + len(step_text)
        return start

    done = behind(committed, 0)
    if not committed._decoder.cleans_up and behind(committed.extended(segment), done) == done:
        return None
    text = committed
    for kept, token in enumerate(segment, 1):
        text = text.extended((token,))
        before, done = done, behind(text, done)
        if done > before and kept >= least:
            return kept
    return None


def find_stop(
    committed: ResponseText, segment: Sequence[int], stops: Sequence[str], held: int = 0
) -> tuple[int, int] | None:
    """Return where a stop text ends the response, if the segment completes one.

    Parameters
    ----------
    held
        Tokens of the segment that come too early to end it: a stop text that they complete is text.

    Returns
    -------
    tuple[int, int] or None
        The fewest tokens of the segment that complete a stop text, and where that text begins in
        the response's text.
    """
    held = max(0, held)
    text = committed.extended(segment[:held])
    # Those that lie in this text came too early.
    starts = {stop: max(0, len(text.text) - len(stop) + 1) for stop in stops}

    def begin(text: ResponseText) -> int | None:
        decided = text.decided
        found = (decided.find(stop, start) for stop, start in starts.items())
        return min((at for at in found if at >= 0), default=None)

    if not committed._decoder.cleans_up and begin(committed.extended(segment)) is None:
        return None
    for kept, token in enumerate(segment[held:], held + 1):
        text = text.extended((token,))
        found = begin(text)
        if found is not None:
            return kept, found
    return None
