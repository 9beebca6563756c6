"""One of several rewards: its model, its part in the whole, and the bounds that it must keep."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stars_fast.reward_head import RewardHead
from stars_fast.text.named_values import values_of

if TYPE_CHECKING:
    import torch

__all__ = ["Reward", "rewards_of"]


@dataclass(frozen=True, init=False)
class Reward:
    """A reward among others, ``reward_model=[Reward("help", DIR1), Reward("harm", DIR2, ...)]``.

    Parameters
    ----------
    name : str
        Letters, digits, ``_``, ``.`` and ``-``; rewards are reported under it.
    model
        Whatever `reward_model` of `Engine` may be, except a `Persona`.
    weight : float
        The reward is multiplied with it before the rewards are combined; constraints are on the
        reward itself. With 0 it has no part in the combination.
    at_least, at_most : float, optional
        Constraints: bounds of the reward, in its own units. What breaks one passes no test, and is
        a fallback, a choice or a path only where nothing keeps all constraints.
    template, tokenizer, device
        As `reward_template`, `reward_tokenizer` and `reward_device` of `Engine`, for this model.
    head
        Parameters of `RewardHead`, such as ``label="safe"``.

    Attributes
    ----------
    head : RewardHead

    Raises
    ------
    ValueError, TypeError
        If a value cannot be used; the message names it.
    """

    name: str
    model: Any
    weight: float
    at_least: float | None
    at_most: float | None
    template: str | Callable[..., Any] | None
    tokenizer: Any
    device: str | torch.device | None
    head: RewardHead

    def __init__(
        self,
        name: str,
        model: Any,  # noqa: ANN401 - whatever `load_scorer` takes
        *,
        weight: float = 1.0,
        at_least: float | None = None,
        at_most: float | None = None,
        template: str | Callable[..., Any] | None = None,
        tokenizer: Any = None,  # noqa: ANN401 - transformers is not imported here
        device: str | torch.device | None = None,
        **head: Any,
    ) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"name of a Reward must be of letters, digits, '_', '.' and '-', got {name!r}"
            )
        if model is None:
            raise ValueError(f"model of reward {name!r} must be given, got None")
        values = {
            "name": name,
            "model": model,
            "weight": _number(name, "weight", weight),
            "at_least": None if at_least is None else _number(name, "at_least", at_least),
            "at_most": None if at_most is None else _number(name, "at_most", at_most),
            "template": template,
            "tokenizer": tokenizer,
            "device": device,
            "head": _head(name, head),
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)
        if self.at_least is not None and self.at_most is not None and at_least > at_most:  # type: ignore[operator]
            raise ValueError(
                f"at_least of reward {name!r} must be at most its at_most, {at_most}, "
                f"got {at_least}"
            )

    def keeps(self, value: float) -> bool:
        """Whether a value of this reward is within its bounds."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    @classmethod
    def of(cls, text: str) -> Reward:
        """Return the reward that a text describes.

        Parameters
        ----------
        text : str
            ``name=MODEL,parameter=value,...``; values are JSON, or else plain text:
            ``harm=DIR,weight=-0.5,at_most=0,label=toxic``.

        Raises
        ------
        ValueError, TypeError
            If it describes none.
        """
        first, *rest = re.split(r",(?=\s*\w+\s*=)", text, maxsplit=1)
        name, equals, model = (word.strip() for word in first.partition("="))
        if not equals or not model:
            raise ValueError(f"a reward must be NAME=DIR_OR_HUB_ID,..., got {text!r}")
        try:
            values = values_of(rest[0]) if rest else {}
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from None
        for known in ("name", "model", "tokenizer"):
            if known in values:
                raise ValueError(f"reward {name!r}: {known} cannot be given here")
        return cls(name, model, **values)


def rewards_of(reward_model: object) -> tuple[Reward, ...] | None:
    """Return the named rewards of a `reward_model`; None: it is one model without a name.

    Raises
    ------
    TypeError
        If a list has other members than `Reward`.
    ValueError
        If it has none, two of one name, or none with a weight.
    """
    if isinstance(reward_model, Reward):
        reward_model = [reward_model]
    if not isinstance(reward_model, Sequence) or isinstance(reward_model, str | bytes):
        return None
    for reward in reward_model:
        if not isinstance(reward, Reward):
            raise TypeError(
                "a list as reward_model must be of Reward(name, model), got "
                f"a {type(reward).__name__} ({reward!r:.80})"
            )
    if not reward_model:
        raise ValueError("a list as reward_model must have at least one Reward, got []")
    twice = [name for name, n in Counter(reward.name for reward in reward_model).items() if n > 1]
    if twice:
        raise ValueError(f"names of rewards must differ, {twice[0]!r} is there twice")
    if all(reward.weight == 0 for reward in reward_model):
        raise ValueError("weight of at least one Reward must not be 0, all are")
    return tuple(reward_model)


def _number(name: str, parameter: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{parameter} of reward {name!r} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{parameter} of reward {name!r} must be finite, got {value}")
    return float(value)


def _head(name: str, given: dict[str, Any]) -> RewardHead:
    known = RewardHead.__dataclass_fields__
    for parameter in given:
        if parameter not in known:
            raise TypeError(
                f"reward {name!r} has no parameter {parameter!r}; there are weight, at_least, "
                f"at_most, template, tokenizer, device, {', '.join(known)}"
            )
    try:
        return RewardHead(**given)
    except (ValueError, TypeError) as error:
        raise type(error)(f"reward {name!r}: {error}") from None
