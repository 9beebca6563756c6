"""Prompts as users write them: text, token ids or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stars_fast.rewards.base import Prompt

#: One prompt: text, token ids, or chat messages ({"role": ..., "content": ...}).
PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]]


def as_prompt_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """Return the prompts as a list: a single text, id list or message list is a list of one.

    Raises
    ------
    TypeError
        If `prompts` is none of the forms a prompt can have.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be text, token ids, chat messages or a list of these, "
            f"got {type(prompts).__name__}"
        )
    if prompts and isinstance(prompts[0], Mapping | Integral):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


class PromptReader:
    """Turns prompts into token ids and checks them.

    Parameters
    ----------
    tokenizer
        The language model's; None if there is none: then prompts must be token ids.
    vocab_size
        Of the language model.
    max_length
        Its context, in tokens; None if it has no limit.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, max_length: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_length = max_length

    def read(self, prompt: PromptLike | Prompt, max_tokens: int) -> Prompt:
        """Return the prompt with its ids, ready to be continued by `max_tokens` tokens.

        One that was read before is checked only.

        Raises
        ------
        ValueError, TypeError
            If it is empty, malformed, holds ids outside the vocabulary, or does not fit the context
            together with `max_tokens`.
        """
        read = prompt if isinstance(prompt, Prompt) else self._parse(prompt)
        self._check(read.token_ids, max_tokens)
        return read

    def _parse(self, prompt: PromptLike) -> Prompt:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt is empty: give text, or token ids such as [bos_token_id]")
            ids = self._need_tokenizer("a text prompt")(prompt)["input_ids"]
            return Prompt(prompt, list(ids), None)
        if not isinstance(prompt, Sequence):
            raise TypeError(
                f"prompt must be text, token ids or chat messages, got {type(prompt).__name__}"
            )
        if not prompt:
            raise ValueError("prompt is empty: it needs at least one token")
        if isinstance(prompt[0], Mapping):
            return self._parse_chat(prompt)  # type: ignore[arg-type]
        ids = _checked_ids(prompt)
        self._check_range(ids)  # tokenizers fail on ids of more than 32 bits
        return Prompt(self._decode(ids), ids, None)

    def _parse_chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        for number, message in enumerate(messages):
            if (
                not isinstance(message, Mapping)
                or not isinstance(message.get("role"), str)
                or not isinstance(message.get("content"), str)
            ):
                raise ValueError(
                    f'prompt message {number} must be {{"role": text, "content": text}}, '
                    f"got {message!r}"
                )
        tokenizer = self._need_tokenizer("a chat prompt")
        if not tokenizer.chat_template:
            raise ValueError(
                "prompt is a list of chat messages, but the tokenizer has no chat template"
            )
        plain = [dict(message) for message in messages]
        try:
            text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # some templates refuse roles, or their order
            raise ValueError(f"prompt is refused by the chat template: {error}") from error
        # The template writes its own special tokens.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(str(text), list(ids), plain)

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        # Whoever tokenises the text again adds its own leading BOS.
        start = 1 if ids[0] == self._tokenizer.bos_token_id else 0
        return str(self._tokenizer.decode(ids[start:]))

    def _need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer: pass Engine(..., tokenizer=...) or ids")
        return self._tokenizer

    def _check(self, ids: list[int], max_tokens: int) -> None:
        if not ids:
            raise ValueError("prompt is empty: it has no tokens after tokenisation")
        self._check_range(ids)
        if self._max_length is not None and len(ids) + max_tokens > self._max_length:
            raise ValueError(
                f"prompt of {len(ids)} tokens with max_tokens={max_tokens} does not fit the "
                f"model's context of {self._max_length} tokens: shorten the prompt or lower "
                "max_tokens"
            )

    def _check_range(self, ids: list[int]) -> None:
        for position, token in enumerate(ids):
            if not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"prompt token id {token} at position {position} is out of range: "
                    f"must be in [0, {self._vocab_size})"
                )


def _checked_ids(prompt: Sequence[Any]) -> list[int]:
    for position, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(
                f"prompt token id at position {position} must be an integer, got {token!r}"
            )
    return [int(token) for token in prompt]
