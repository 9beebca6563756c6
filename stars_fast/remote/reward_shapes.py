"""What servers of reward models are asked and how they answer: one record each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from stars_fast.remote.http import RemoteError

ShapeName: TypeAlias = Literal[
    "auto", "vllm-classify", "vllm-pooling", "vllm-score", "sglang-classify", "openrlhf"
]


@dataclass(frozen=True)
class ScoredText:
    """A response to be scored: its prompt, itself, and the text that the template makes of them."""

    prompt: str
    response: str
    text: str


@dataclass(frozen=True)
class RewardShape:
    """The form of a server's calls and answers.

    Attributes
    ----------
    name
        As `RemoteReward` takes it.
    paths
        Ends of addresses at which it is looked for.
    body
        Makes the body of a call, but for the model's name.
    entries
        Returns what the answer says of each text, in the order of the texts; None: it is not of
        this form.
    field
        Where an entry has its number or numbers; None: the entry is it.
    has_activation
        Whether ``use_activation`` is sent, which asks for raw scores or for what the server makes
        of them.
    has_template
        Whether the text of a template is sent, and not only prompt and response.
    """

    name: str
    paths: tuple[str, ...]
    body: Callable[[Sequence[ScoredText]], dict[str, Any]]
    entries: Callable[[object], list[Any] | None]
    field: str | None
    has_activation: bool = False
    has_template: bool = True

    def read(self, answer: object, count: int) -> list[list[Any]]:
        """Return the numbers of each text, not checked to be any.

        Raises
        ------
        RemoteError
            The answer has another form, or not one entry for each of `count` texts.
        """
        found = self.entries(answer)
        if found is None:
            raise RemoteError(f"the answer is not one of {self.name!r}: {answer!r:.200}")
        if len(found) != count:
            raise RemoteError(f"the reward server returned {len(found)} scores for {count} texts")
        return [self._numbers(entry) for entry in found]

    def _numbers(self, entry: object) -> list[Any]:
        value = entry
        if self.field is not None:
            if not isinstance(entry, dict) or self.field not in entry:
                raise RemoteError(
                    f"an entry of the answer has no {self.field!r}, as {self.name!r} has: "
                    f"{entry!r:.200}"
                )
            value = entry[self.field]
        if isinstance(value, list) and value and isinstance(value[0], list):
            value = value[-1]  # numbers of each token
        return value if isinstance(value, list) else [value]


def number_of(values: Sequence[Any], label: int | None) -> float:
    """Return the one number of a text that is its reward.

    Parameters
    ----------
    values
        What the server returned for it.
    label
        Place of the reward among several; None: there must be one.

    Raises
    ------
    RemoteError
        There are several and no label says which, or it is no finite number.
    """
    if label is None and len(values) != 1:
        raise RemoteError(
            f"the reward server returned {len(values)} numbers for a text; label must say which "
            "of them is the reward"
        )
    if label is not None and label >= len(values):
        raise RemoteError(
            f"label is {label}, and the reward server returned {len(values)} numbers for a text"
        )
    value = values[label or 0]
    with contextlib.suppress(OverflowError):  # an integer beyond float
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    raise RemoteError(f"the reward server returned {value!r:.80} where a score was due")


def shapes_at(url: str) -> list[RewardShape]:
    """Return the shapes that an address may have, the likeliest first.

    Raises
    ------
    ValueError
        Its path is none that is known.
    """
    path = urlsplit(url).path.rstrip("/")
    found = [shape for shape in SHAPES.values() if path.endswith(shape.paths)]
    if not found:
        known = sorted({path for shape in SHAPES.values() for path in shape.paths})
        raise ValueError(
            f"url must end in one of {', '.join(known)} where shape is 'auto', got {url!r}: give "
            f"the whole address, or shape as one of {', '.join(map(repr, SHAPES))}"
        )
    return found


def _in_order(answer: object) -> list[Any] | None:
    """Return ``data``, by the ``index`` of its entries where they have one."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        return None
    places = [entry.get("index") if isinstance(entry, dict) else None for entry in data]
    if all(place is None for place in places):
        return data
    if {place for place in places if type(place) is int} != set(range(len(places))):
        raise RemoteError(
            f"the reward server returned entries with index {places!r:.200} for {len(places)} texts"
        )
    return sorted(data, key=lambda entry: entry["index"])


def _listed(answer: object) -> list[Any] | None:
    """Return an answer that is a list by itself."""
    return answer if isinstance(answer, list) else None


def _openrlhf(answer: object) -> list[Any] | None:
    """Return ``rewards``, else ``scores``; a number by itself is that of one text."""
    if not isinstance(answer, dict):
        return None
    found = answer.get("rewards")
    if found is None:
        found = answer.get("scores")
    if isinstance(found, int | float):
        return [found]
    return found if isinstance(found, list) else None


def _texts(asked: Sequence[ScoredText]) -> list[str]:
    return [one.text for one in asked]


_ALL = (
    # docs.vllm.ai, "Classification API"; SGLang's /v1/classify (docs.sglang.io) has the same form.
    RewardShape(
        name="vllm-classify",
        paths=("/classify",),
        body=lambda asked: {"input": _texts(asked)},
        entries=_in_order,
        field="probs",
        has_activation=True,
    ),
    # docs.vllm.ai, "Pooling API"
    RewardShape(
        name="vllm-pooling",
        paths=("/pooling",),
        body=lambda asked: {"input": _texts(asked)},
        entries=_in_order,
        field="data",
        has_activation=True,
    ),
    # docs.vllm.ai, "Score API"
    RewardShape(
        name="vllm-score",
        paths=("/score",),
        body=lambda asked: {
            "text_1": [one.prompt for one in asked],
            "text_2": [one.response for one in asked],
        },
        entries=_in_order,
        field="score",
        has_activation=True,
        has_template=False,
    ),
    # docs.sglang.io, "SGLang Native APIs": raw scores
    RewardShape(
        name="sglang-classify",
        paths=("/classify",),
        body=lambda asked: {"text": _texts(asked)},
        entries=_listed,
        field="embedding",
    ),
    # OpenRLHF's --reward.remote_url (openrlhf/utils/agent.py, openrlhf/cli/serve_rm.py); a label is
    # the reference of a prompt, empty where a data set has none.
    RewardShape(
        name="openrlhf",
        paths=("/get_reward",),
        body=lambda asked: {
            "query": _texts(asked),
            "prompts": [one.prompt for one in asked],
            "labels": [""] * len(asked),
        },
        entries=_openrlhf,
        field=None,
    ),
)

#: The shapes by their names.
SHAPES: dict[str, RewardShape] = {shape.name: shape for shape in _ALL}
assert set(SHAPES) == set(get_args(ShapeName)) - {"auto"}
