"""The specs that are compared: methods with their parameters and models, each under a label.

As text a spec is ``[LABEL=]METHOD[:name=value,...]``, for example
``fast=stars:segment_length=16,beta=0.3`` or ``vanilla:lm=sft``. Names are the fields of
`StarsParams`, and ``lm`` and ``rm``: models other than the base and its reward model. Values are
JSON, or else plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from stars_fast.params import Method, StarsParams
from stars_fast.prompts import json_of, short
from stars_fast.text.named_values import values_of

#: Fields that an eval sets itself, or that would change what is compared.
_NOT_HERE = frozenset({"method", "seed", "n", "trace"})

_MODELS = ("lm", "rm")
_DEFAULTS = StarsParams()


@dataclass(frozen=True)
class ModelNames:
    """Names of the models other than the base and its reward model.

    Attributes
    ----------
    lm, rm
        Language models and reward models.
    """

    lm: tuple[str, ...] = ()
    rm: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A method with its parameters and its language model.

    Attributes
    ----------
    label
        Its name in tables and plots.
    params
        Parameters of every request, without the seed.
    lm
        Name of a language model; None is the base.
    rm
        Name of the reward model that it decides by; None is that of the eval.
    """

    label: str
    params: StarsParams
    lm: str | None = None
    rm: str | None = None

    @property
    def needs_target(self) -> bool:
        """Whether it runs against a calibrated target."""
        return self.params.needs_calibration and self.params.budget is None


def names(method: Method | None = None) -> list[str]:
    """Return the parameters that a spec can have; of one method, if it is named."""
    own = [field.name for field in fields(StarsParams)]
    if method is not None:
        own = list(StarsParams(method=method).own_parameters())
    return [name for name in own if name not in _NOT_HERE] + list(_MODELS)


def spec_of_text(text: str, common: Mapping[str, Any], models: ModelNames) -> Spec:
    """Read a spec as text; see `make_spec`."""
    head, _, parameters = text.partition(":")
    label, _, method = (word.strip() for word in head.rpartition("="))
    return make_spec(method, values_of(parameters), common, models, label=label)


def specs_of_json(raw: str, common: Mapping[str, Any], models: ModelNames) -> list[Spec]:
    """Read a JSON list of objects with ``method``, ``label`` and parameters; see `make_spec`.

    Raises
    ------
    ValueError
        It is no such list; the message says which object is wrong.
    """
    value = json_of(raw)
    if not isinstance(value, list):
        raise ValueError(f"expected a JSON list of methods, got {short(value)}")
    found = []
    for number, entry in enumerate(value, 1):
        try:
            given = _object(entry)
            method, label = given.pop("method", None), given.pop("label", "")
            found.append(make_spec(method, given, common, models, label=label))
        except (ValueError, TypeError) as error:
            raise ValueError(f"method {number}: {error}") from None
    return found


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {short(value)}")
    return dict(value)


def make_spec(
    method: Any,  # noqa: ANN401 - what a file says
    given: Mapping[str, Any],
    common: Mapping[str, Any],
    models: ModelNames,
    *,
    label: object = "",
) -> Spec:
    """Make a spec.

    Parameters
    ----------
    method
        A method of `StarsParams`.
    given
        Its parameters, ``lm`` and ``rm``.
    common
        Default parameters of all specs.
    models
        Allowed values of ``lm`` and ``rm``.
    label
        Empty: the method and `given`.

    Raises
    ------
    ValueError, TypeError
        An unknown method, parameter or model, with the known ones; a parameter that the method does
        not have, with those it has; a value that it cannot have.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not isinstance(label, str):
        raise ValueError(f"label must be text, got {short(label)}")
    chosen = {**common, **given}
    for name in chosen:
        if name not in names():
            raise ValueError(
                f"unknown parameter {name!r}; those of {method} are {', '.join(names(method))}"
            )
    lm = _model("lm", chosen.pop("lm", None), models.lm)
    rm = _model("rm", chosen.pop("rm", None), models.rm)
    params = StarsParams(method=method, **chosen)
    shown = " ".join([method, *(f"{name}={value}" for name, value in given.items())])
    return Spec(label or shown, params, lm, rm)


def _model(kind: str, name: object, known: tuple[str, ...]) -> str | None:
    if name is None:
        return None
    if name not in known:
        allowed = f"must be one of {', '.join(known)}" if known else "names no model: none is given"
        raise ValueError(f"{kind} {allowed}, got {name!r}; see --{kind}")
    return str(name)


def with_reference(specs: Sequence[Spec], common: Mapping[str, Any]) -> tuple[list[Spec], str]:
    """Put the reference first.

    It is the first spec that is ``vanilla`` on the base model, and led by a guide no more than
    `common` says; if there is none, one is added.

    Returns
    -------
    The specs, and the label of the reference.

    Raises
    ------
    ValueError
        Two specs have one label.
    """
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two methods are labelled {label!r}; write LABEL=METHOD:...")
    weight = common.get("guide_weight", 0.0)
    plain = (s for s in specs if s.params.kind.plain and s.lm is None)
    chosen = next((s for s in plain if s.params.guide_weight == weight), None)
    if chosen is None:
        label = "vanilla" if "vanilla" not in labels else "vanilla on the base model"
        chosen = make_spec("vanilla", {}, common, ModelNames(), label=label)
    return [chosen, *(spec for spec in specs if spec is not chosen)], chosen.label


def described(spec: Spec) -> dict[str, Any]:
    """Return a spec for the record: JSON values, and only what is not the default."""
    changed = {
        field.name: getattr(spec.params, field.name)
        for field in fields(StarsParams)
        if field.name not in _NOT_HERE
        and getattr(spec.params, field.name) != getattr(_DEFAULTS, field.name)
    }
    return {
        "label": spec.label,
        "method": spec.params.method,
        "lm": spec.lm,
        "rm": spec.rm,
        "params": {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()},
    }
