"""Command line flags made from the fields of `StarsParams`, so that the two cannot drift apart."""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stars_fast.methods import COMMON, METHODS, kind_of
from stars_fast.params import StarsParams, plain_text, with_fields

#: Fields that the commands set themselves: each request's seed follows from the run's ``--seed``.
RUN_FIELDS = frozenset({"seed"})

_PREFIX = "params."
_SCALARS = (int, float, str)


def add_params_flags(
    parser: argparse.ArgumentParser,
    defaults: Mapping[str, object],
    skip: frozenset[str] = RUN_FIELDS,
) -> None:
    """Add a flag for each field of `StarsParams`.

    Parameters
    ----------
    parser
        Changed: gets an argument group.
    defaults
        Defaults that differ from those of `StarsParams`; shown in the help.
    skip
        Fields that get no flag.
    """
    hints = get_type_hints(StarsParams)
    group = parser.add_argument_group("parameters of a request")
    for field in fields(StarsParams):
        if field.name in skip:
            continue
        assert field.default is not MISSING
        default = defaults.get(field.name, field.default)
        shown = "none" if default is None else str(default)
        if not shown.isprintable():
            shown = repr(shown)
        text = f"{plain_text(field.name)} (default: {shown})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=_PREFIX + field.name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **_flag_kind(hints[field.name]),
        )


def params_from(args: argparse.Namespace, defaults: Mapping[str, object]) -> StarsParams:
    """The parameters that the flags ask for.

    Raises
    ------
    ValueError, TypeError
        From `StarsParams`, naming the parameter.
    """
    given = {
        name.removeprefix(_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(_PREFIX)
    }
    method = str(given.get("method", defaults.get("method", "stars")))
    acceptance = str(given.get("acceptance", defaults.get("acceptance", "soft")))
    own = kind_of(method, acceptance).parameters if method in METHODS else ()
    # The command's defaults for other methods do not apply.
    used = {name: value for name, value in defaults.items() if name in (*COMMON, *own)}
    return with_fields(StarsParams(), {**used, **given})


def _flag_kind(hint: object) -> dict[str, Any]:
    """Keyword arguments of ``add_argument`` for a field of type `hint`."""
    members = _union_members(hint)
    if members == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if any(get_origin(member) is Mapping for member in members):
        return {"type": _json_object, "metavar": "JSON"}
    words = [word for m in members if get_origin(m) is Literal for word in get_args(m)]
    elements = [get_args(m)[0] for m in members if get_args(m) and get_origin(m) is not Literal]
    kinds = [kind for kind in _SCALARS if kind in members or kind in elements]
    if not kinds:
        return {"choices": words}
    metavar = "|".join([*(kind.__name__.upper() for kind in kinds), *words])
    flag: dict[str, Any] = {"type": _reader(kinds, words, metavar), "metavar": metavar}
    return flag | {"action": "append"} if elements else flag


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def _union_members(hint: object) -> list[object]:
    if get_origin(hint) in (Union, types.UnionType):
        return [member for member in get_args(hint) if member is not type(None)]
    return [hint]


def _reader(
    kinds: list[type[int] | type[float] | type[str]], words: list[str], metavar: str
) -> Callable[[str], int | float | str]:
    def read(text: str) -> int | float | str:
        if text in words:
            return text
        for kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
        raise argparse.ArgumentTypeError(f"expected {metavar}, got {text!r}")

    return read
