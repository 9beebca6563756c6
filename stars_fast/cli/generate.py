"""``stars-fast generate``: responses for a file, a pipe or a few prompts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from stars_fast.cli import demo
from stars_fast.cli.calibration import (
    add_targets_flag,
    read_target,
    told,
    told_budget,
    write_target,
)
from stars_fast.cli.continuation import beside, check_settings, only_writer, write_json
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
    check_models,
    load_engine,
)
from stars_fast.cli.runner import Runner, WriteError
from stars_fast.cli.terminal import say
from stars_fast.config import FLAGS
from stars_fast.params import StarsParams
from stars_fast.records import Done, InputRecord, LineError, read_done
from stars_fast.text.chats import empty_answers

if TYPE_CHECKING:
    from stars_fast.engine import Engine

#: A run without a target has nothing to aim at, so unlike `StarsParams` it calibrates one.
DEFAULTS = {"target_reward": "auto"}

#: Requests in progress for each row of the engine: enough to keep it full, few enough for memory.
_REQUESTS_PER_ROW = 2

_EPILOG = """\
Without models, the demo's pair runs, with segments of 16 tokens and beta 0.3 unless flags say
otherwise.

An input line is {"prompt": "text"}, {"messages": [{"role": "user", "content": "text"}]} or
{"prompt_token_ids": [1, 2]}; "id" (text or an integer) and "params" (an object with parameters of
this request, which override the flags) are optional. Output lines are in the order in which
requests finish; "line" is the number of the input line.

A request without its own seed gets one from --seed and its line number, so a resumed run gives the
same tokens as an uninterrupted one, provided that the other flags are the same: they are kept in
OUTPUT.settings.json, and --resume refuses others. With
--target-reward auto the target is kept in OUTPUT.calibration.json.

exit codes: 0 done; 1 failed while running; 2 wrong flags, input or files; 130 interrupted
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``generate`` to the command line."""
    parser = commands.add_parser(
        "generate",
        help="generate responses for prompts in a file, a pipe or on the command line",
        description="Generate responses for prompts in a file, a pipe or on the command line.",
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
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; can be repeated"
    )
    data.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture before each --prompt, which becomes a chat message; can be repeated",
    )
    data.add_argument("--chat", action="store_true", help="turn text prompts into chat messages")
    data.add_argument(
        "--output", metavar="FILE", help="JSON lines; - for standard output (the default)"
    )
    data.add_argument(
        "--resume",
        action="store_true",
        help="continue OUTPUT: run only the requests without a result",
    )
    data.add_argument(
        "--on-error",
        choices=["stop", "record"],
        default="stop",
        help="stop at a malformed or failing request (the default), or write an error record",
    )
    data.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="seed of the run (default: 0)"
    )
    data.add_argument(
        "--calibration-prompts",
        type=int,
        default=32,
        metavar="INT",
        help="number of leading prompts that --target-reward auto samples for (default: 32)",
    )
    data.add_argument(
        "--calibration-quantile",
        type=float,
        default=0.9,
        metavar="FLOAT",
        help="quantile of the samples' rewards that becomes the target (default: 0.9)",
    )
    add_targets_flag(data)
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
        base = params_from(args, demo.DEFAULTS if args.model is None else DEFAULTS)
    source = None if args.input in (None, "-") else Path(args.input)
    output = None if args.output in (None, "-") else Path(args.output)
    _check_flags(args, base)
    if output is None or not _is_ours(output, args):
        return _run(args, base, source, output)
    with only_writer(output):
        return _run(args, base, source, output)


def _is_ours(output: Path, args: argparse.Namespace) -> bool:
    """Whether this process alone is to write an output: not a device, and of torchrun's rank 0."""
    follows = args.tensor_parallel and os.environ.get("RANK", "0") != "0"
    with file_errors():
        if output.is_dir():
            raise UsageError(f"--output {output} is a directory")
        return not follows and (not output.exists() or is_regular_file(output))


def _run(
    args: argparse.Namespace, base: StarsParams, source: Path | None, output: Path | None
) -> int:
    with file_errors(), value_errors():
        if source and output and output.exists() and source.samefile(output):
            raise UsageError(f"--input and --output are the same file, {source}")
        if output is not None and args.resume:
            check_settings(output, _settings(args, base))
        done = _done_before(output, resume=args.resume)
        total = _check_input(args, source, base, done)
        if output is not None and _is_ours(output, args):
            write_json(beside(output, "settings"), _settings(args, base))
    if total is not None and total == len(done):
        say(f"nothing to do: {output} has a result for every request")
        return 0
    target_file = None if output is None else beside(output, "calibration")
    target = None
    if target_file is not None and args.resume and base.needs_calibration:
        one = args.calibration_targets == "pooled" and base.budget is None
        target = read_target(target_file) if one else None
    with opened_input(source, args.prompt, args.image) as read_line, _opened(output) as stream:
        engine = load_engine(args)
        if engine.rank != 0:
            engine.follow()
            return 0
        if total is not None and args.on_error == "stop":
            _check_prompts(engine, args, source, base, done)
        requests = Requests(read_line, base, args.seed, chat=args.chat)
        with engine.lead():
            if base.needs_calibration and target is None:
                target = _calibrate(engine, requests, base, target_file, args)
            with _progress(total, done=len(done), to_terminal=stream.isatty()) as bar:
                job = Runner(engine, requests, done, stream, bar, target, args.on_error == "record")
                limit = _REQUESTS_PER_ROW * args.max_rows
                try:
                    code = job.run(limit)
                except KeyboardInterrupt:
                    bar.close()
                    say("interrupted" + _kept(job, output))
                    return 130
                except WriteError as error:
                    bar.close()
                    raise WriteError(
                        f"{output or 'standard output'}: {error}{_kept(job, output)}"
                    ) from error
    note = empty_answers(engine.tokenizer, bare=job.bare, empty=job.empty)
    if note is not None:
        say(f"warning: {note}")
    if output:
        failed = f", {job.failed} of them errors" if job.failed else ""
        say(f"{job.written} results written to {output}{failed}")
    return code


def _kept(job: Runner, output: Path | None) -> str:
    """What to say of a run that has ended early."""
    return f"; {job.written} results are in {output}; --resume continues" if output else ""


def _check_flags(args: argparse.Namespace, base: StarsParams) -> None:
    if args.prompt and args.input:
        raise UsageError("--prompt and --input cannot be given together")
    if args.image and not args.prompt:
        raise UsageError("--image needs --prompt; in a file, pictures are parts of messages")
    if args.resume and args.output in (None, "-"):
        raise UsageError("--resume needs --output FILE, the file to continue")
    check_models(args, base)
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
    """Results already in the output file; an error unless there are none or the run resumes."""
    if output is None:
        return Done()
    if resume:
        return read_done(output)
    if output.exists() and output.stat().st_size > 0:
        raise UsageError(f"{output} exists; give --resume to continue it, or another --output")
    return Done()


#: Options by which a run can differ from the one that it continues: they change no token, but for
#: rounding.
_FREE = frozenset(
    {
        *("device", "reward_device", "reward_timeout", "compile_model", "trust_remote_code"),
        *("allow_pickle", "page_size", "num_pages", "reward_num_pages", "max_rows"),
    }
)


def _settings(args: argparse.Namespace, base: StarsParams) -> dict[str, Any]:
    """What the tokens of a run depend on beside its input."""
    names = ["model", "reward", "chat"]
    names += [*(name for name in FLAGS if name not in _FREE), "seed"]
    if base.needs_calibration:
        names += ["calibration_prompts", "calibration_quantile", "calibration_targets"]
    params = {field.name: getattr(base, field.name) for field in fields(base)}
    reward_model = None if args.reward_model is None else str(args.reward_model)
    settings = {name: getattr(args, name) for name in names}
    return params | {"reward_model": reward_model} | settings


def _check_input(
    args: argparse.Namespace, source: Path | None, base: StarsParams, done: Done
) -> int | None:
    """Read the whole input once if it can be read twice; returns the number of requests.

    Raises
    ------
    UsageError
        A malformed line, unless it will be recorded, or an input that is not that of `done`.
    """
    if not args.prompt and (source is None or not is_regular_file(source)):
        return None
    total = 0
    with opened_input(source, args.prompt, args.image) as read_line:
        requests = Requests(read_line, base, args.seed, chat=args.chat)
        while (item := requests.take(wait=True)) is not None:
            total += 1
            if isinstance(item, InputRecord):
                done.has(item)
            elif args.on_error == "stop":
                raise item
    return total


def _check_prompts(
    engine: Engine, args: argparse.Namespace, source: Path | None, base: StarsParams, done: Done
) -> None:
    """Have the engine look at every request before it runs the first.

    Raises
    ------
    UsageError
        A prompt that is too long, or that the model cannot read.
    """
    with opened_input(source, args.prompt, args.image) as read_line:
        requests = Requests(read_line, base, args.seed, chat=args.chat)
        while (item := requests.take(wait=True)) is not None:
            if isinstance(item, LineError) or done.has(item):
                continue
            params = item.params
            if params.needs_calibration:
                params = replace(params, budget=None, target_reward=0.0)
            try:
                engine.check_request(item.prompt, replace(params, calibrate_prefixes=False))
            except (ValueError, TypeError) as error:
                raise UsageError(f"input line {item.line}: {error}") from None


@contextmanager
def _opened(output: Path | None) -> Iterator[BinaryIO]:
    if output is None:
        if sys.stdout is None:
            raise UsageError("standard output is closed: give --output FILE")
        try:
            yield sys.stdout.buffer
        except WriteError:
            # What Python still wants to flush at exit has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
        return
    with file_errors():
        stream = output.open("ab")
    try:
        yield stream
    except BaseException:
        with suppress(OSError):  # it still holds what could not be written, of which this tells
            stream.close()
        raise
    stream.close()


def _calibrate(
    engine: Engine,
    requests: Requests,
    base: StarsParams,
    target_file: Path | None,
    args: argparse.Namespace,
) -> float | None:
    """A target from unaligned samples for the first prompts.

    None if there is no prompt, or if the engine has one for each, or for each budget.
    """
    prompts: Sequence[Any] = [item.prompt for item in requests.peek(args.calibration_prompts)]
    if not prompts:
        return None
    try:
        calibration = engine.calibrate(
            prompts,
            args.calibration_quantile,
            params=base,
            use_tqdm=sys.stderr.isatty(),
            targets=args.calibration_targets,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"calibration on the first {len(prompts)} prompts: {error}") from error
    if target_file:
        write_target(target_file, calibration)
    say(told(calibration, args.calibration_quantile, f"the first {len(prompts)} prompts"))
    if base.budget is not None:
        with value_errors():
            say(told_budget(base, engine.within_budget(base)))
        return None
    return None if calibration.targets is not None else calibration.target_reward


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
