"""Flags for the models of a command, and for the memory they may take."""

from __future__ import annotations

import argparse
from typing import Any

#: Options of `Engine` that are flags, the models left out.
ENGINE_OPTIONS = (
    "reward_template",
    "device",
    "reward_device",
    "dtype",
    "kv_dtype",
    "compile_model",
    "page_size",
    "num_pages",
    "max_rows",
    "trust_remote_code",
    "allow_pickle",
)


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
    models.add_argument(
        "--reward-template",
        metavar="TEXT",
        help="what the reward model reads: chat, plain, or text with {prompt} and {response} "
        "(default: its chat template if it has one)",
    )
    models.add_argument("--dtype", default="auto", help="such as bfloat16 (default: the model's)")
    models.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")
    models.add_argument(
        "--reward-device",
        help="of the reward model (default: that of the model); on another one than the model's, "
        "scoring runs beside the next draft",
    )
    models.add_argument(
        "--compile-model", action="store_true", help="fuse small operations by torch.compile"
    )
    models.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with a model"
    )
    models.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load weights that are not safetensors; unpickling can run code",
    )
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--page-size", type=int, default=16, metavar="INT", help="tokens of a page (default: 16)"
    )
    memory.add_argument(
        "--num-pages",
        type=int,
        metavar="INT",
        help="pages of the model's pool (default: as memory allows)",
    )
    memory.add_argument(
        "--kv-dtype",
        choices=["auto", "fp8"],
        default="auto",
        help="what pages hold; fp8 is half of bfloat16, on a GPU (default: the model's dtype)",
    )
    memory.add_argument(
        "--max-rows", type=int, default=256, metavar="INT", help="rows of a round (default: 256)"
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
    return {name: getattr(args, name) for name in ENGINE_OPTIONS}
