"""What of a reward model's head is the reward: a label, a sum of labels, a token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from stars_fast.text.named_values import values_of

__all__ = ["Activation", "RewardHead", "RewardHeadLike"]

Activation = Literal["none", "log_odds"]


@dataclass(frozen=True)
class RewardHead:
    """The number that is read from a head with several outputs, or from a language model's logits.

    Give at most one of `label`, `label_weights`, `token` and `tokens`; none of them is a model's
    one label.

    Parameters
    ----------
    label : int or str, optional
        The logit of this label of a classifier: its number, or its name in ``id2label``.
    label_weights : mapping of int or str to float, optional
        The sum of these labels' logits times these weights. ``{"safe": 1, "unsafe": -1}`` is the
        log-odds of the one label against the other.
    token : int or str, optional
        The logit that a language model gives this token, an id or a text that is one token, as the
        one behind the template.
    tokens : pair of int or str, optional
        The log-odds of the first token against the second, the difference of their logits.
    activation : str
        ``"none"``, or ``"log_odds"``: log(p / (1 - p)) of `label` or `token`, p being its
        probability among all of them.

    Raises
    ------
    ValueError, TypeError
        If more than one is given, or a value is of the wrong kind.
    """

    label: int | str | None = None
    label_weights: Mapping[int | str, float] | None = None
    token: int | str | None = None
    tokens: tuple[int | str, int | str] | None = None
    activation: Activation = "none"

    def __post_init__(self) -> None:
        given = [name for name in _CHOICES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"reward_head takes one of {', '.join(_CHOICES)}, got {given}")
        if self.activation not in get_args(Activation):
            raise ValueError(
                "activation of reward_head must be one of "
                f"{', '.join(get_args(Activation))}, got {self.activation!r}"
            )
        if self.activation == "log_odds" and given not in (["label"], ["token"]):
            raise ValueError("activation='log_odds' of reward_head needs label or token beside it")
        for name in ("label", "token"):
            if getattr(self, name) is not None:
                _check_name(name, getattr(self, name))
        if self.label_weights is not None:
            weights = _checked_weights(self.label_weights)
            object.__setattr__(self, "label_weights", weights)
        if self.tokens is not None:
            if not isinstance(self.tokens, tuple | list) or len(self.tokens) != 2:
                raise ValueError(f"tokens of reward_head must be two, got {self.tokens!r}")
            for token in self.tokens:
                _check_name("tokens", token)
            object.__setattr__(self, "tokens", tuple(self.tokens))

    @property
    def of_tokens(self) -> bool:
        """Whether it reads a language model's logits."""
        return self.token is not None or self.tokens is not None

    @property
    def of_labels(self) -> bool:
        """Whether it says which labels of a classifier are read."""
        return self.label is not None or self.label_weights is not None

    @classmethod
    def of(cls, value: RewardHeadLike) -> RewardHead:
        """Return the head that a user means.

        Parameters
        ----------
        value : RewardHead, str or None
            Text is ``name=value,...`` with the names of the parameters; values are JSON, or else
            plain text: ``label=safe``, ``token=0`` (an id), ``tokens=["Yes", "No"]``.

        Raises
        ------
        ValueError, TypeError
            If it cannot be one.
        """
        if isinstance(value, RewardHead):
            return value
        if value is None:
            return cls()
        if not isinstance(value, str):
            raise TypeError(
                f"reward_head must be None, a RewardHead or text, got {type(value).__name__}"
            )
        try:
            values = values_of(value)
        except ValueError as error:
            raise ValueError(f"reward_head: {error}") from error
        names = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in names]
        if unknown or not values:
            raise ValueError(
                f"reward_head must be name=value,... with names among {', '.join(names)}, "
                f"got {value!r}"
            )
        return cls(**values)


RewardHeadLike: TypeAlias = RewardHead | str | None

_CHOICES = ("label", "label_weights", "token", "tokens")


def _check_name(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{name} of reward_head must be int or str, got {value!r}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} of reward_head must be at least 0, got {value}")


def _checked_weights(weights: Any) -> dict[int | str, float]:  # noqa: ANN401 - checked here
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(
            "label_weights of reward_head must be a mapping from labels to weights, got "
            f"{weights!r}"
        )
    for label, weight in weights.items():
        _check_name("label_weights", label)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"label_weights of reward_head must be numbers, got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"label_weights of reward_head must be finite, got {weight}")
    return {label: float(weight) for label, weight in weights.items()}
