"""What the language model and the reward model read of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fuzz.texts import cleans_up, plain_text

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt with its text and its ids; messages if it came as such."""

    text: str
    token_ids: list[int]
    messages: Messages | None

    @property
    def bare_text(self) -> str:
        """The content of a single message, else the text."""
        if self.messages is not None and len(self.messages) == 1:
            return self.messages[0]["content"]
        return self.text

    @property
    def conversation(self) -> tuple[Messages, str]:
        """The messages before the response, and the text that opens the response's message."""
        if self.messages is None:
            return [{"role": "user", "content": self.text}], ""
        if self.messages[-1]["role"] == "assistant":
            return self.messages[:-1], self.messages[-1]["content"]
        return self.messages, ""


def read_prompt(tokenizer: Any, prompt: Any) -> ReadPrompt:
    """Read text, ids or messages."""
    if isinstance(prompt, str):
        return ReadPrompt(prompt, list(tokenizer(prompt)["input_ids"]), None)
    if isinstance(prompt[0], dict):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer.apply_chat_template(
            prompt, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return ReadPrompt(text, list(encoded["input_ids"]), prompt)
    shown = prompt[1:] if prompt[0] == tokenizer.bos_token_id else prompt
    text = plain_text(tokenizer, shown, with_special=True)
    if cleans_up(tokenizer):
        text = tokenizer.clean_up_tokenization(text)
    return ReadPrompt(text.removesuffix("\ufffd"), list(prompt), None)


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def encoded(tokenizer: Any, text: str, *, adds_special: bool = True) -> dict[str, list[int]]:
    """The tokenizer's fields of a text, which gets no second BOS."""
    if adds_special and tokenizer.bos_token_id in added_ids(tokenizer)[0]:
        text = text.removeprefix(tokenizer.bos_token)
    return dict(tokenizer(text, add_special_tokens=adds_special))
