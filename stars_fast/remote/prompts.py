"""Prompts for a server that takes text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from stars_fast.prompts import PromptLike, PromptReader
from stars_fast.rewards.base import Prompt
from stars_fast.text.tokenization import TextEncoder


class TextPromptReader(PromptReader):
    """Reads prompts as texts.

    Parameters
    ----------
    tokenizer
        Writes chat messages and token ids as text; None: prompts must be text.
    template_kwargs, parse_special
        See `PromptReader`.
    """

    #: The rounds want a token to begin with.
    NO_IDS = (0,)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        parse_special: bool = False,
    ) -> None:
        size = 0 if tokenizer is None else len(tokenizer)
        super().__init__(tokenizer, size, None, template_kwargs, parse_special=parse_special)
        self._chat = None if tokenizer is None else TextEncoder(tokenizer, add_special_tokens=True)

    def read(self, prompt: PromptLike | Prompt, max_tokens: int) -> Prompt:
        """Return the prompt with its text; a prompt that was already read is returned unchanged.

        A chat template may write the token that begins a text; the server adds one itself.

        Raises
        ------
        ValueError, TypeError
            If it is empty or malformed, or needs a tokenizer and there is none.
        """
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt is empty: give text")
            return Prompt(prompt, list(self.NO_IDS), None)
        if self._chat is None:
            raise ValueError(
                "prompt must be text, or RemoteEngine needs tokenizer= to write chat messages and "
                f"token ids as text, got {type(prompt).__name__}"
            )
        read = super().read(prompt, max_tokens)
        text = self._chat.single_bos(read.text)
        cut = len(read.text) - len(text)
        control = tuple((begin - cut, end - cut) for begin, end in read.control if begin >= cut)
        return replace(read, text=text, token_ids=list(self.NO_IDS), control=control)
