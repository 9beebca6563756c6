"""Flags for the models of a command and the memory they use."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any, get_args

from stars_fast.cli.errors import UsageError, value_errors
from stars_fast.config import FLAGS, Attention, Combine, KvDtype, Quantize
from stars_fast.models.progress import quiet_libraries
from stars_fast.reward import Reward, rewards_of

if TYPE_CHECKING:
    from stars_fast.engine import Engine
    from stars_fast.params import StarsParams
    from stars_fast.rewards.log_ratio import LogRatio


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def _log_ratio(text: str) -> LogRatio:
    from stars_fast.rewards.log_ratio import LogRatio  # slow to import

    try:
        return LogRatio.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def template(text: str) -> str:
    r"""Read a template as people write it: \n and \t are a newline and a tab, \\ a backslash."""
    read = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: read[found[1]], text)


#: Arguments of ``add_argument`` by the type of an option; others are text.
_KINDS: dict[str, dict[str, Any]] = {
    "bool": {"action": "store_true"},
    "int": {"type": int},
    "int | None": {"type": int},
    "float": {"type": float},
    "float | None": {"type": float},
    "Attention": {"choices": get_args(Attention)},
    "Combine": {"choices": get_args(Combine)},
    "KvDtype": {"choices": get_args(KvDtype)},
    "Quantize": {"choices": get_args(Quantize)},
    "Quantize | None": {"choices": get_args(Quantize)},
    "TemplateLike": {"type": template},
    "Mapping[str, Any] | None": {"type": _json_object},
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags for models and memory, in two argument groups."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="language model (default: the demo's pair)",
    )
    reward = models.add_mutually_exclusive_group()
    reward.add_argument(
        "--reward-model",
        metavar="DIR_OR_HUB_ID",
        help="reward model; needed unless the method is vanilla",
    )
    reward.add_argument(
        "--log-ratio",
        dest="reward_model",
        type=_log_ratio,
        metavar="POLICY[,REFERENCE][,beta=FLOAT][,over=segment]",
        help="in place of a reward model, the log-ratio of two language models, such as a DPO "
        "model and its reference (default: the language model)",
    )
    models.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="SPEC",
        help="a reward among several, in place of --reward-model: NAME=DIR_OR_HUB_ID, and behind "
        "commas weight=FLOAT, at_least=FLOAT, at_most=FLOAT, template=TEXT, device=DEVICE and what "
        "--reward-head takes, where wanted; can be repeated",
    )
    groups = {"models": models, "memory": parser.add_argument_group("memory")}
    add_threads_flag(models)
    for name, field in FLAGS.items():
        metavar = {"metavar": field.metadata["metavar"]} if field.metadata["metavar"] else {}
        groups[field.metadata["group"]].add_argument(
            "--" + (field.metadata["flag"] or name.replace("_", "-")),
            dest=name,
            default=field.default,
            help=field.metadata["text"],
            **_KINDS.get(str(field.type), {}),
            **metavar,
        )


def add_threads_flag(parser: argparse._ActionsContainer) -> None:
    """Add ``--threads``, for `set_threads`."""
    parser.add_argument(
        "--threads",
        type=int,
        metavar="INT",
        help="processor threads (default: PyTorch's choice, one for each core)",
    )


def set_threads(args: argparse.Namespace) -> None:
    """Set the number of threads that the flag names; without it nothing changes.

    Raises
    ------
    UsageError
        It is below 1.
    """
    if args.threads is None:
        return
    if args.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {args.threads}")
    import torch

    torch.set_num_threads(args.threads)


def add_tensor_parallel_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--tensor-parallel``, for commands in which the other ranks follow rank 0."""
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="split the models over the processes that torchrun has started",
    )


def check_models(args: argparse.Namespace, base: StarsParams) -> None:
    """Refuse models that do not go together; with none, the demo's pair runs.

    Raises
    ------
    UsageError
        Naming the flag that is missing.
    """
    reward_model = reward_model_of(args)
    if args.model is None and reward_model is not None:
        flag = "--reward" if args.reward else "--reward-model"
        raise UsageError(f"{flag} needs --model beside it")
    if base.kind.draft is not None and args.draft_model is None:
        raise UsageError(f"--draft-model is needed for method {base.method!r}")
    if args.model is not None and reward_model is None and base.kind.needs_reward:
        raise UsageError(f"--reward-model is needed for method {base.method!r}")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the `Engine` options given by the flags, without the models."""
    return {name: getattr(args, name) for name in FLAGS}


def reward_model_of(args: argparse.Namespace) -> str | list[Reward] | None:
    """Return the reward model that the flags name, or the several.

    Raises
    ------
    UsageError
        Rewards that cannot be read, or do not go together.
    """
    if not args.reward:
        name: str | None = args.reward_model
        return name
    if args.reward_model is not None:
        raise UsageError("--reward and --reward-model cannot be given together")
    try:
        rewards = [Reward.of(text) for text in args.reward]
        rewards_of(rewards)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--reward: {error}") from None
    return rewards


def load_engine(args: argparse.Namespace) -> Engine:
    """Build the engine that the flags ask for; without ``--model`` it is the demo's.

    Raises
    ------
    UsageError
        The models cannot be loaded, or do not go together.
    """
    from stars_fast.engine import Engine

    quiet_libraries()
    set_threads(args)
    options = {
        "seed": args.seed,
        "tensor_parallel": args.tensor_parallel,
        **engine_options(args),
    }
    with value_errors():
        if args.model is None:
            return Engine.demo(**options)
        return Engine(args.model, reward_model=reward_model_of(args), **options)
