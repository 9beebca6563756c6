"""What a response is worth, by a plain pass over all that the reward model is to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fuzz.draws import PlainLogits
from fuzz.prompts import Messages, ReadPrompt, added_ids, encoded
from fuzz.texts import special_ids
from helpers.tiny_rewards import plain_reward

from stars_fast.rewards import Persona

TemplateKind = Literal["chat", "plain", "pair", "format", "callable"]
#: (ids of the response, its text) -> reward
Reward: TypeAlias = "Callable[[Sequence[int], str], float]"

_STAND_IN = "ZQXRESPONSEXQZ"


def function_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """In [-2, 2), different for nearly every text."""

    def one(prompt: str, response: str) -> float:
        letters = sum(map(ord, response[-9:])) + sum(map(ord, prompt[-5:]))
        return ((len(prompt) * 31 + len(response) * 7919 + letters) % 1000) / 250 - 2

    return [one(*pair) for pair in zip(prompts, responses, strict=True)]


@dataclass(frozen=True)
class RewardSetup:
    """A reward model and how it reads.

    Attributes
    ----------
    name
        "function", "persona" or a family of models.
    model
        As the engine takes it.
    template
        As the engine takes it; None with "function" and "persona", which have none.
    kind
        What the template is, where the model has one.
    encoder
        It reads both ways, and whole texts alone.
    shared
        It reads the ids of the response as they were drawn, its tokenizer being the language
        model's.
    """

    name: str
    model: Any
    tokenizer: Any = None
    template: Any = None
    kind: TemplateKind | None = None
    encoder: bool = False
    shared: bool = False

    @property
    def label(self) -> str:
        """The name, with what else makes a difference to how it reads."""
        ids = "shared ids" if self.shared else "ids of its own"
        return self.name if self.kind is None else f"{self.name}, {self.kind}, {ids}"

    @property
    def engine_options(self) -> dict[str, Any]:
        """What the engine is told beside the model."""
        if self.kind is None:
            return {}
        return {"reward_template": self.template, "reward_tokenizer": self.tokenizer}

    @property
    def is_exact(self) -> bool:
        """Whether rewards are the same to the last bit, whatever else is scored."""
        return self.name == "function"

    def of(self, prompt: ReadPrompt) -> Reward:
        """The rewards of responses to a prompt, of every method but "persona_judge"."""
        if self.name == "function":
            return lambda ids, text: function_reward([prompt.text], [text])[0]

        def reward(ids: Sequence[int], text: str) -> float:
            if self.shared and max(ids, default=0) >= len(self.tokenizer):
                return math.nan  # what only the language model knows has none
            return plain_reward(self.model, **self.fields(prompt, ids, text))

        return reward

    def fields(self, prompt: ReadPrompt, ids: Sequence[int], text: str) -> dict[str, Any]:
        """What the model's forward pass is given."""
        if self.shared:
            before, behind = self.frame(prompt)
            response = list(ids)
            closing = special_ids(self.tokenizer) - {self.tokenizer.unk_token_id}
            while behind and response and response[-1] in closing:
                response.pop()  # the template closes the turn itself
            return {"ids": before + response + behind}
        if self.kind == "pair":
            read = encoded(self.tokenizer, prompt.bare_text, text)
        else:
            read = encoded(
                self.tokenizer, self.text(prompt, text), adds_special=self.kind != "chat"
            )
        kinds = {"token_type_ids": read["token_type_ids"]} if "token_type_ids" in read else {}
        return {"ids": read["input_ids"], **kinds}

    def text(self, prompt: ReadPrompt, response: str) -> str:
        """The one text that prompt and response are put into."""
        if self.kind == "chat":
            messages, opening = prompt.conversation
            before, behind = self._chat(messages, opening + _STAND_IN).split(_STAND_IN)
            if "| trim" in self.tokenizer.chat_template:
                response = response.rstrip() if opening else response.strip()
            return before + response + behind
        if self.kind == "plain":
            return prompt.text + response
        if self.kind == "format":
            before, behind = self.template.split("{response}")
            bare = prompt.bare_text
            return str(
                before.replace("{prompt}", bare) + response + behind.replace("{prompt}", bare)
            )
        return str(self.template(prompt.bare_text, response))

    def frame(self, prompt: ReadPrompt) -> tuple[list[int], list[int]]:
        """The ids before and behind a response whose ids are shared."""
        head, tail = added_ids(self.tokenizer)
        if self.kind == "plain":
            return prompt.token_ids, tail
        before, behind = self.text(prompt, _STAND_IN).split(_STAND_IN)
        if self.kind == "chat":
            head, tail = [], []
        ids = encoded(self.tokenizer, before, adds_special=bool(head))["input_ids"]
        if tail and head:
            ids = ids[: -len(tail)]
        return ids, _ids_behind(self.tokenizer, behind) + tail

    def _chat(self, messages: Messages, reply_text: str) -> str:
        reply = {"role": "assistant", "content": reply_text}
        return str(self.tokenizer.apply_chat_template([*messages, reply], tokenize=False))


@dataclass(frozen=True)
class JudgeReward:
    """log(p_judge / p_draft) of a response's last token."""

    judge: PlainLogits
    draft: PlainLogits

    def __call__(self, ids: Sequence[int], text: str) -> float:
        before, token = ids[:-1], ids[-1]
        return self.judge.logprob(before, token) - self.draft.logprob(before, token)


def judge_ids(persona: Persona, tokenizer: Any, prompt: ReadPrompt) -> list[int]:
    """What the judge reads before the response."""
    assert persona.template is not None
    text = persona.template.replace("{prompt}", prompt.bare_text)
    return encoded(tokenizer, text)["input_ids"]


def _ids_behind(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that stands behind another, where no "▁" is put before it."""
    if not text:
        return []
    if tokenizer.convert_tokens_to_ids("<0x00>") in (None, tokenizer.unk_token_id):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # A zero byte joins no token: what follows it is cut as it would be behind any other text.
    ids = tokenizer(f"\0{text}", add_special_tokens=False)["input_ids"]
    return list(ids[ids.index(tokenizer.convert_tokens_to_ids("<0x00>")) + 1 :])
