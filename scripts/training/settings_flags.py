"""A frozen dataclass of settings as flags: one for each field, with its default."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

_Settings = TypeVar("_Settings")


def parser_of(
    description: str | None, settings: type[Any], out: str = "directory to write"
) -> argparse.ArgumentParser:
    """Parser with ``--out`` and the flags of ``settings``; more may be added to it."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help=out)
    for field in fields(settings):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    return parser


def settings_of(settings: type[_Settings], arguments: argparse.Namespace) -> _Settings:
    """The settings that were given."""
    names = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(arguments, name) for name in names})
