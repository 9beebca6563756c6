"""``stars-fast generate``: responses for a file, a pipe or a few prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from stars_fast.cli.calibration import Sidecar, sidecar_of
from stars_fast.cli.errors import UsageError, file_errors, value_errors
from stars_fast.cli.flags import add_params_flags, params_from
from stars_fast.cli.lines import (
    Requests,
    is_regular_file,
    opened_input,
)
from stars_fast.cli.model_flags import (
    add_model_flags,
    add_tensor_parallel_flag,
    engine_options,
)
from stars_fast.cli.runner import Runner
from stars_fast.cli.terminal import say
from stars_fast.models.progress import quiet_libraries
from stars_fast.params import StarsParams
from stars_fast.records import Done, InputRecord, read_done

if TYPE_CHECKING:
    from stars_fast.engine import Engine

#: A run without a target has nothing to aim at, so unlike `StarsParams` it calibrates one.
DEFAULTS = {"target_reward": "auto"}

#: Requests in progress for each row of the engine: enough to keep it full, few enough for memory.
_REQUESTS_PER_ROW = 2

_EPILOG = """\
An input line is {"prompt": "text"}, {"messages": [{"role": "user", "content": "text"}]} or
{"prompt_token_ids": [1, 2]}; "id" (text or an integer) and "params" (an object with parameters of
this request, over the flags) are optional. Output lines come in the order in which requests finish;
"line" says which input line each one belongs to.

A request without a seed of its own gets one made from --seed and its line number, so a run that was
interrupted and resumed gives the same tokens as one that was not. For that the other flags must be
the same too. With --target-reward auto the target is kept in OUTPUT.calibration.json.

exit codes: 0 done; 1 failed while running; 2 wrong flags, input or files; 130 interrupted
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``generate`` to the command line."""
    parser = commands.add_parser(
        "generate",
        help="generate responses for prompts in a file, a pipe or on the command line",
        description="Generate responses with your own models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_tensor_parallel_flag(parser)
    data = parser.add_argument_group("input and output")
    data.add_argument(
        "--input", metavar="FILE", help="JSON lines; - for standard input (the default)"
    )
    data.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; can be given again"
    )
    data.add_argument(
        "--output", metavar="FILE", help="JSON lines; - for standard output (the default)"
    )
    data.add_argument(
        "--resume", action="store_true", help="continue OUTPUT: run only what it has no result for"
    )
    data.add_argument(
        "--on-error",
        choices=["stop", "record"],
        default="stop",
        help="stop at a request that is malformed or fails (the default), or write an error record",
    )
    data.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="seed of the run (default: 0)"
    )
    data.add_argument(
        "--calibration-prompts",
        type=int,
        default=32,
        metavar="INT",
        help="prompts, from the first, that --target-reward auto draws samples for (default: 32)",
    )
    data.add_argument(
        "--calibration-quantile",
        type=float,
        default=0.9,
        metavar="FLOAT",
        help="quantile of the samples' rewards that becomes the target (default: 0.9)",
    )
    add_params_flags(parser, DEFAULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises
    ------
    UsageError
        Before any model is loaded where that is possible.
    """
    with value_errors():
        base = params_from(args, DEFAULTS)
    source = None if args.input in (None, "-") else Path(args.input)
    output = None if args.output in (None, "-") else Path(args.output)
    _check_flags(args, base)
    with file_errors(), value_errors():
        if source and output and output.exists() and source.samefile(output):
            raise UsageError(f"--input and --output are the same file, {source}")
        done = _done_before(output, resume=args.resume)
        sidecar = Sidecar(sidecar_of(output), _settings(args, base)) if output else None
        target = sidecar.read() if sidecar and args.resume and base.needs_calibration else None
        total = _check_input(args, source, base, done)
    if total is not None and total == len(done):
        say(f"nothing to do: {output} has a result for every request")
        return 0
    with opened_input(source, args.prompt) as read_line, _opened(output) as stream:
        engine = _load_engine(args)
        if engine.rank != 0:
            engine.follow()
            return 0
        requests = Requests(read_line, base, args.seed)
        with engine.lead():
            if base.needs_calibration and target is None:
                target = _calibrate(engine, requests, base, sidecar, args)
            with _progress(total, done=len(done), to_terminal=stream.isatty()) as bar:
                job = Runner(engine, requests, done, stream, bar, target, args.on_error == "record")
                limit = _REQUESTS_PER_ROW * args.max_rows
                try:
                    code = job.run(limit)
                except KeyboardInterrupt:
                    bar.close()
                    kept = f"; {job.written} results are in {output}; --resume continues"
                    say("interrupted" + (kept if output else ""))
                    return 130
    if output:
        failed = f", {job.failed} of them errors" if job.failed else ""
        say(f"{job.written} results written to {output}{failed}")
    return code


def _check_flags(args: argparse.Namespace, base: StarsParams) -> None:
    if args.prompt and args.input:
        raise UsageError("--prompt and --input cannot be given together")
    if args.resume and args.output in (None, "-"):
        raise UsageError("--resume needs --output FILE, the file to continue")
    if args.reward_model is None and base.kind.needs_reward:
        raise UsageError(f"--reward-model is needed for method {base.method!r}")
    if args.calibration_prompts < 1:
        raise UsageError(
            f"--calibration-prompts must be at least 1, got {args.calibration_prompts}"
        )
    if not 0 < args.calibration_quantile < 1:
        raise UsageError(
            f"--calibration-quantile must be in (0, 1), got {args.calibration_quantile}"
        )
    if not 0 <= args.seed < 2**64:
        raise UsageError(f"--seed must be in [0, 2**64), got {args.seed}")


def _done_before(output: Path | None, *, resume: bool) -> Done:
    """What the output file holds already, which must be nothing unless the run resumes."""
    if output is None:
        return Done()
    if resume:
        return read_done(output)
    if output.exists() and output.stat().st_size > 0:
        raise UsageError(f"{output} exists; give --resume to continue it, or another --output")
    return Done()


def _settings(args: argparse.Namespace, base: StarsParams) -> dict[str, Any]:
    """What a calibrated target depends on."""
    models = (
        "model",
        "reward_model",
        "reward_template",
        "chat_template_kwargs",
        "dtype",
        "kv_dtype",
    )
    flags = (*models, "seed", "calibration_prompts", "calibration_quantile")
    sampling = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "ignore_eos")
    return {
        **{name: getattr(args, name) for name in flags},
        **{name: getattr(base, name) for name in sampling},
        "stop": list(base.stop_texts),
        "stop_token_ids": list(base.stop_token_ids or ()),
    }


def _check_input(
    args: argparse.Namespace, source: Path | None, base: StarsParams, done: Done
) -> int | None:
    """Read the whole input once, if that can be done twice; returns the number of requests.

    Raises
    ------
    UsageError
        A malformed line, unless it will be recorded, or an input that is not that of `done`.
    """
    if not args.prompt and (source is None or not is_regular_file(source)):
        return None
    total = 0
    with opened_input(source, args.prompt) as read_line:
        requests = Requests(read_line, base, args.seed)
        while (item := requests.take(wait=True)) is not None:
            total += 1
            if isinstance(item, InputRecord):
                done.has(item)
            elif args.on_error == "stop":
                raise item
    return total


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    if output is None:
        yield sys.stdout.buffer
        return
    with file_errors():
        stream = output.open("ab")
    with stream:
        yield stream


def _load_engine(args: argparse.Namespace) -> Engine:
    from stars_fast.engine import Engine

    quiet_libraries()
    try:
        return Engine(
            args.model,
            reward_model=args.reward_model,
            seed=args.seed,
            tensor_parallel=args.tensor_parallel,
            **engine_options(args),
        )
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _calibrate(
    engine: Engine,
    requests: Requests,
    base: StarsParams,
    sidecar: Sidecar | None,
    args: argparse.Namespace,
) -> float | None:
    """A target from unaligned samples of the first prompts; None if there is no prompt."""
    prompts: Sequence[Any] = [item.prompt for item in requests.peek(args.calibration_prompts)]
    if not prompts:
        return None
    try:
        calibration = engine.calibrate(
            prompts, args.calibration_quantile, params=base, use_tqdm=sys.stderr.isatty()
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"calibration on the first {len(prompts)} prompts: {error}") from error
    if sidecar:
        sidecar.write(calibration)
    say(
        f"target reward {calibration.target_reward:.4g}: the {args.calibration_quantile:g} "
        f"quantile of {len(calibration.rewards)} unaligned responses to the first {len(prompts)} "
        "prompts"
    )
    return calibration.target_reward


def _progress(total: int | None, done: int, *, to_terminal: bool) -> tqdm[Any]:
    # Results that go to the terminal themselves are progress enough.
    hidden = to_terminal or not sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        unit="request",
        disable=hidden,
        file=sys.stderr,
        dynamic_ncols=True,
    )
