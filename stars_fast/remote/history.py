"""How a response on its way is known: by its tokens, or by its text alone.

The rounds work on token ids. A `TokenHistory` has them: the server tells the ids that it drew and
continues ids, so that nothing is ever tokenised twice. A `TextHistory` has texts and counts, and
makes up ids that stand for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from stars_fast.params import StarsParams
from stars_fast.remote.calls import Drawn
from stars_fast.remote.completions import Choice
from stars_fast.remote.http import RemoteError
from stars_fast.rewards.base import Prompt
from stars_fast.rewards.tokens import special_ids


class History(Protocol):
    """Prompts of calls, and the ids of what they return."""

    def prompt(self, prompt: Prompt, committed: list[int]) -> str | list[int]:
        """Return what a call has to continue."""
        ...

    def segment(self, request_id: str, params: StarsParams, choice: Choice, wanted: int) -> Drawn:
        """Return the segment of a choice, 1 to `wanted` tokens.

        Raises
        ------
        RemoteError
            If the server did not tell what is needed.
        """
        ...

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request."""
        ...


class TokenHistory:
    """Responses by their tokens.

    Parameters
    ----------
    tokenizer
        That of the model at the server.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)

    def prompt(self, prompt: Prompt, committed: list[int]) -> str | list[int]:
        """Return ids."""
        return prompt.token_ids + committed

    def segment(self, request_id: str, params: StarsParams, choice: Choice, wanted: int) -> Drawn:
        """Return the ids that the server drew, the token that ended them included."""
        if choice.token_ids is None:
            raise RemoteError(
                "the server did not return the token ids of a choice, which return_token_ids asked "
                "for; without tokenizer= texts are enough"
            )
        ids = choice.token_ids[:wanted]
        stopped = choice.finish == "stop"
        if stopped and not self._has_end(ids, params, choice.text):
            end = self._tokenizer.eos_token_id
            if end is not None and len(ids) < wanted:
                ids.append(int(end))
            else:
                stopped = False
        if not ids:
            raise RemoteError("the server returned no token")
        logprobs, top = choice.logprobs[:wanted], choice.top_logprobs[:wanted]
        if any(told and len(told) != len(ids) for told in (logprobs, top)):
            raise RemoteError(
                f"the server returned log-probabilities of {len(choice.logprobs)} tokens for "
                f"{len(ids)}"
            )
        return Drawn(ids, stopped, logprobs, top)

    def forget(self, request_id: str) -> None:
        """Do nothing."""

    def _has_end(self, ids: list[int], params: StarsParams, text: str) -> bool:
        """Whether the last token is the one that ended the choice, and so is not part of its text.

        A server may stop at a token that is only known to its ``generation_config.json``.
        """
        if not ids:
            return False
        if ids[-1] in self._special or ids[-1] in (params.stop_token_ids or ()):
            return True
        before = str(self._tokenizer.decode(ids[:-1], skip_special_tokens=True))
        return before.strip() == text.strip()


class SegmentTexts:
    """Decodes made-up ids: each stands for the text of a whole segment, or for none.

    In the place of the rounds' tokenizer, of which they use `decode` alone.
    """

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._numbers = itertools.count(1)

    def add(self, text: str) -> int:
        """Return a new id for a text."""
        number = next(self._numbers)
        self._texts[number] = text
        return number

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the texts of the ids, one after the other."""
        return "".join(self._texts.get(token, "") for token in token_ids)

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget ids."""
        for number in numbers:
            self._texts.pop(number, None)


class TextHistory:
    """Responses by their texts.

    Prompt and accepted text go to the server as one text each time, so what it tokenises has one
    beginning, and no border that is not in the text.
    """

    def __init__(self, *, counts_end: bool) -> None:
        self.texts = SegmentTexts()
        self._counts_end = counts_end
        self._of_request: dict[str, list[int]] = {}

    def prompt(self, prompt: Prompt, committed: list[int]) -> str | list[int]:
        """Return the text so far."""
        return prompt.text + self.texts.decode(committed)

    def segment(self, request_id: str, params: StarsParams, choice: Choice, wanted: int) -> Drawn:
        """Return as many ids as the server drew tokens; one of them stands for the text."""
        text = choice.text
        if choice.finish == "length" and text:
            return Drawn([0] * (wanted - 1) + [self._add(request_id, text)], stopped=False)
        length = wanted
        if choice.finish == "stop":
            if choice.count is None:
                raise RemoteError("the server does not say how many tokens it drew: no usage")
            length = choice.count + (0 if self._counts_end else 1)
        # The last id is that of the end, which is not part of the text. No text at all is an end,
        # too: the next call would be the same again.
        length = max(1, min(length, wanted))
        if not text:
            return Drawn([0] * length, stopped=True)
        if wanted == 1:
            return Drawn([self._add(request_id, text)], stopped=False)
        return Drawn([0] * (length - 2) + [self._add(request_id, text), 0], stopped=True)

    def forget(self, request_id: str) -> None:
        """Drop the texts of a request's segments."""
        self.texts.drop(self._of_request.pop(request_id, []))

    def _add(self, request_id: str, text: str) -> int:
        number = self.texts.add(text)
        self._of_request.setdefault(request_id, []).append(number)
        return number
