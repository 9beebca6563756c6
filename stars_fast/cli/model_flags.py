"""Flags for the models of a command, and for the memory they may take."""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

from stars_fast.config import FLAGS, KvDtype


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


#: Arguments of ``add_argument`` by the type of an option; others are text.
_KINDS: dict[str, dict[str, Any]] = {
    "bool": {"action": "store_true"},
    "int": {"type": int},
    "int | None": {"type": int},
    "KvDtype": {"choices": get_args(KvDtype)},
    "Mapping[str, Any] | None": {"type": _json_object},
}


def add_model_flags(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    """Add flags for models and memory.

    Parameters
    ----------
    parser
        Changed: gets two argument groups.
    model
        What stands for ``--model`` where it is left out, for the help; None: it must be given.
    """
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        required=model is None,
        metavar="DIR_OR_HUB_ID",
        help="language model" + (f" (default: {model})" if model else ""),
    )
    models.add_argument(
        "--reward-model",
        metavar="DIR_OR_HUB_ID",
        help="reward model; needed unless the method is vanilla",
    )
    groups = {"models": models, "memory": parser.add_argument_group("memory")}
    for name, field in FLAGS.items():
        metavar = {"metavar": field.metadata["metavar"]} if field.metadata["metavar"] else {}
        groups[field.metadata["group"]].add_argument(
            "--" + name.replace("_", "-"),
            default=field.default,
            help=field.metadata["text"],
            **_KINDS.get(str(field.type), {}),
            **metavar,
        )


def add_tensor_parallel_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--tensor-parallel``, for commands in which the other ranks follow rank 0."""
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="split the models over the processes that torchrun has started",
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `Engine` that the flags ask for, the models left out."""
    return {name: getattr(args, name) for name in FLAGS}
