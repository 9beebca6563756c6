"""What of a reward model's head is the reward: a label, a sum of labels, a token; and where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from stars_fast.text.named_values import values_of
from stars_fast.text.surrogates import check_unicode

__all__ = ["Activation", "Aggregate", "At", "RewardHead", "RewardHeadLike"]

Activation = Literal["none", "log_odds", "probability"]
At = Literal["end", "steps"]
Aggregate = Literal["last", "min", "prod", "mean", "sum"]


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
        probability among all of them; or ``"probability"``: that p, of `tokens` the one of the two,
        of a model's one label the sigmoid of its logit.
    at : str
        ``"end"``: the text is read once, at its end. ``"steps"``: a process reward model's, read
        behind each step of the response, a last one that has not ended included. Of an empty
        response one empty step is read.
    step_text : str
        The text that ends a step of a response.
    step_tag : str, optional
        What the reward model reads in its place; the score is read at the tag's last token. With
        ``{score}`` in it, it is read there, and what follows stands before the next step. None: the
        step text itself.
    aggregate : str
        The reward from the scores of the steps: the ``"last"``, their ``"min"``, ``"prod"``,
        ``"mean"`` or ``"sum"``. The product is one of probabilities.
    after : str, optional
        Read of a response only what follows this text, ``"</think>"`` for models that think before
        they answer. While it has not come, the reward is that of the empty response, so that no
        thought is judged as if it were an answer. A prompt that ends with it has it behind it.

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
    at: At = "end"
    step_text: str = "\n\n"
    step_tag: str | None = None
    aggregate: Aggregate = "last"
    after: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _CHOICES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"reward_head takes one of {', '.join(_CHOICES)}, got {given}")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"{name} of reward_head must be one of {', '.join(words)}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.activation == "log_odds" and given not in (["label"], ["token"]):
            raise ValueError("activation='log_odds' of reward_head needs label or token beside it")
        if self.activation == "probability" and given == ["label_weights"]:
            raise ValueError("activation='probability' of reward_head is not of label_weights")
        self._check_steps()
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

    def _check_steps(self) -> None:
        for name in ("step_text", "step_tag", "after"):
            value = getattr(self, name)
            if value is None and name != "step_text":
                continue
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} of reward_head must be text, not empty, got {value!r}")
            check_unicode(value, f"{name} of reward_head")
        if self.at == "steps":
            if self.step_tag is not None and self.step_tag.count("{score}") > 1:
                raise ValueError(
                    f"step_tag of reward_head must have {{score}} once, got {self.step_tag!r}"
                )
            if self.aggregate == "prod" and self.activation != "probability":
                raise ValueError(
                    "aggregate='prod' of reward_head is of probabilities: pass "
                    "activation='probability'"
                )
            return
        for name, default in (("step_text", "\n\n"), ("step_tag", None), ("aggregate", "last")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} of reward_head is for at='steps', got {getattr(self, name)!r}"
                )

    @property
    def is_asked(self) -> bool:
        """Whether it says which number is the reward."""
        return self.of_labels or self.of_tokens or self.activation != "none"

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

_WORDS = {
    "activation": get_args(Activation),
    "at": get_args(At),
    "aggregate": get_args(Aggregate),
}
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
