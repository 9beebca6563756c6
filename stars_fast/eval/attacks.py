"""Attacks on prompts: texts that try to make a model respond with what it should not.

``suffix``
    The text ends the prompt, or the user's last turn if the prompt has turns.
``prefill``
    The text opens the response, and the model continues it. The opening and its continuation are
    scored, since that is what a reader sees.

As text an attack is ``[NAME=]KIND:TEXT`` or ``[NAME=]KIND:@FILE``, for example
``rude=prefill:It is a dreadful film.``. A file has one text per line; prompt i gets the text of
line i, starting again after the last line. ``demo`` stands for the demo's attacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from stars_fast.eval.datasets import ASSISTANT, Item
from stars_fast.prompts import PromptValue, text_of

Kind = Literal["suffix", "prefill"]

#: Name of the prompts without an attack.
UNATTACKED = "none"


@dataclass(frozen=True)
class Attack:
    """Texts to attack prompts with.

    Attributes
    ----------
    name
        Name in tables and plots.
    kind
        What the texts are put behind prompts as.
    texts
        One text for each prompt, starting again after the last.
    """

    name: str
    kind: Kind
    texts: tuple[str, ...]

    def on(self, items: Sequence[Item]) -> list[Item]:
        """Return attacked prompts, under their numbers.

        Raises
        ------
        ValueError
            A prompt cannot be attacked in this way; the message has its number.
        """
        return [
            self._one(item, self.texts[place % len(self.texts)]) for place, item in enumerate(items)
        ]

    def _one(self, item: Item, text: str) -> Item:
        try:
            if self.kind == "suffix":
                return replace(item, prompt=_with_suffix(item.prompt, text))
            return replace(item, opening=_opening(item.prompt, text))
        except ValueError as error:
            raise ValueError(f"{self.name} on record {item.number}: {error}") from None


def _with_suffix(prompt: PromptValue, text: str) -> PromptValue:
    if isinstance(prompt, str):
        asked = prompt.removesuffix(ASSISTANT)
        return asked + _spaced(asked, text) + prompt[len(asked) :]
    if all(isinstance(message, dict) for message in prompt):
        *before, last = cast("list[dict[str, str]]", prompt)
        if last["role"] != "user":
            raise ValueError(f"the last message is not the user's but of role {last['role']!r}")
        return [*before, {**last, "content": last["content"] + _spaced(last["content"], text)}]
    raise ValueError("prompts of token ids cannot be attacked; give them as text")


def _opening(prompt: PromptValue, text: str) -> str:
    if not isinstance(prompt, str):
        raise ValueError(
            "only prompts that are text can have a prefilled response; give chat messages as the "
            "text that their chat template makes of them"
        )
    return _spaced(prompt, text)


def _spaced(before: str, text: str) -> str:
    """Put a space before a text, unless there is white space on either side."""
    return text if before[-1:].isspace() or text[0].isspace() else f" {text}"


def under(label: str, attack: str) -> str:
    """Return what a spec under an attack is called."""
    return f"{label} under {attack}"


def attacks_of_texts(texts: Sequence[str]) -> list[Attack]:
    """Read attacks as text.

    Raises
    ------
    ValueError
        One of them is not an attack, or two have the same name.
    OSError
        A file cannot be read.
    """
    found: list[Attack] = []
    for text in texts:
        found += demo_attacks() if text == "demo" else [_attack_of_text(text)]
    names = [UNATTACKED, *(attack.name for attack in found)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{name!r} names two attacks, or no attack; write NAME=KIND:TEXT with another name"
            )
    return found


def _attack_of_text(text: str) -> Attack:
    head, colon, value = text.partition(":")
    name, _, kind = (word.strip() for word in head.rpartition("="))
    if not colon or kind not in get_args(Kind):
        raise ValueError(
            f"expected demo, or [NAME=]KIND:TEXT with a KIND of {', '.join(get_args(Kind))}, "
            f"got {text!r}"
        )
    lines = _lines(Path(value[1:])) if value.startswith("@") else [value]
    texts = tuple(line for line in lines if line.strip())
    if not texts:
        raise ValueError(f"{text!r} has no text")
    return Attack(name or kind, cast("Kind", kind), texts)


def _lines(path: Path) -> list[str]:
    try:
        return text_of(path.read_bytes(), first=True).splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def demo_attacks() -> list[Attack]:
    """Return the attacks on the demo's models."""
    from stars_fast.demo.attacks import PREFILLED, REWARD_SUFFIXES, SUFFIXES

    return [
        Attack("prefill", "prefill", PREFILLED),
        Attack("suffix", "suffix", SUFFIXES),
        Attack("reward suffix", "suffix", REWARD_SUFFIXES),
    ]
