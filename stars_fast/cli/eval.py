"""``stars-fast eval``: the quality and cost of several methods."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from stars_fast.cli.calibration import add_targets_flag
from stars_fast.cli.errors import UsageError, file_errors
from stars_fast.cli.model_flags import (
    add_model_flags,
    engine_options,
    reward_model_of,
    set_threads,
    template,
)
from stars_fast.cli.terminal import say
from stars_fast.eval.answers import MATH, check_answers
from stars_fast.eval.attacks import Attack, attacks_of_texts
from stars_fast.eval.datasets import Item, Layout, RecordError, read_items
from stars_fast.eval.gold import RewardFunction, gold_source
from stars_fast.eval.judge import PairJudge
from stars_fast.eval.merge import merge
from stars_fast.eval.models import Models, RewardSource, identity_of, sources_of
from stars_fast.eval.results import can_plot, failures, read_results, write_results
from stars_fast.eval.run import Plan
from stars_fast.eval.session import Session
from stars_fast.eval.specs import (
    ModelNames,
    Spec,
    spec_of_text,
    specs_of_json,
    with_reference,
)
from stars_fast.eval.store import RESPONSES, RUNS, DamagedError, Store
from stars_fast.models.progress import quiet_libraries
from stars_fast.prompts import text_of
from stars_fast.tables import shell_line
from stars_fast.text.named_values import values_of

if TYPE_CHECKING:
    from stars_fast.rewards.persona import Persona

_DEMO = "demo"

_EPILOG = """\
A method is [LABEL=]METHOD[:name=value,...], for example
  --method best_of_n:candidates=8 --method 'fast=stars:segment_length=16,beta=0.3'
Names are the parameters of the method as in `stars-fast generate --help`, and lm=NAME and rm=NAME
for models given by --lm and --rm. --methods FILE has the same as a JSON list of objects with
"label", "method" and parameters. vanilla on the base model always runs: it is the reference.

Prompts are JSON lines as for `stars-fast generate`, or records of HH-RLHF ("chosen", "rejected") or
AlpacaEval ("instruction"). The file can also be a JSON list, and gzipped.

An attack is [NAME=]KIND:TEXT, or [NAME=]KIND:@FILE with one text per line, one line per prompt:
  --attack suffix:@FILE                       at the end of the prompt
  --attack 'rude=prefill:It is a bad film.'   as the opening of the response, scored as part of it
or demo, the attacks on the demo's language model. The prompts without an attack always run too.

OUT gets results.json, responses.jsonl (a line for each method, seed and prompt), runs.jsonl (the
cost of each run), report.md and plots. Finished runs and measurements are kept even if the command
fails or is interrupted; --resume does the rest.

exit codes: 0 done; 1 some runs or measurements failed; 2 wrong flags, input or files;
130 interrupted
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``eval`` to the command line."""
    parser = commands.add_parser(
        "eval",
        help="compare methods: reward, gold score, win rate, diversity, KL, cost",
        description="Compare decoding methods on the same prompts and seeds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    parser.add_argument(
        "--lm", action="append", default=[], metavar="NAME=DIR_OR_HUB_ID",
        help="another language model, for lm=NAME in a method; can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--rm", action="append", default=[], metavar="NAME=DIR_OR_HUB_ID",
        help="another reward model to decide by, for rm=NAME in a method; can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--persona", action="append", default=[], metavar="NAME=TEXT",
        help="a judge for method persona_judge with rm=NAME: a system message, or a template with "
        "{prompt}",
    )  # fmt: skip
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts", metavar="FILE", help="a file, or demo (the default with the demo's pair)"
    )
    prompts.add_argument(
        "--layout", choices=get_args(Layout), help="(default: detected from the first record)"
    )
    prompts.add_argument(
        "--num-prompts",
        type=int,
        metavar="INT",
        help="number of prompts to use (default: all)",
    )
    prompts.add_argument(
        "--prompt-offset",
        type=int,
        default=0,
        metavar="INT",
        help="number of leading prompts to leave out (default: 0); the others keep their numbers, "
        "and so their draws",
    )
    prompts.add_argument("--chat", action="store_true", help="turn text prompts into chat messages")
    methods = parser.add_argument_group("methods")
    methods.add_argument(
        "--method", action="append", default=[], metavar="SPEC", help="see below; can be repeated"
    )
    methods.add_argument("--methods", metavar="FILE", help="methods in a JSON file")
    methods.add_argument(
        "--common", default="", metavar="NAME=VALUE,...",
        help="parameters of all methods, such as max_tokens=64,temperature=1",
    )  # fmt: skip
    methods.add_argument(
        "--seeds",
        default="0",
        metavar="INT,...",
        help="seeds; each method runs once with each (default: 0)",
    )
    methods.add_argument(
        "--calibration-quantile", type=float, default=0.9, metavar="FLOAT",
        help="quantile of unaligned rewards that target_reward=auto takes (default: 0.9)",
    )  # fmt: skip
    add_targets_flag(methods)
    quality = parser.add_argument_group("quality")
    quality.add_argument(
        "--gold", action="append", default=[], metavar="[NAME=]REWARD",
        help="a reward that no method sees: demo, a directory or hub id, module:function with "
        "f(prompts, responses) -> list of numbers, or math: 1 where the response has the answer "
        "of its record, else 0 (default with the demo's pair: demo); can be repeated, methods are "
        "compared by the first",
    )  # fmt: skip
    quality.add_argument(
        "--gold-template",
        type=template,
        metavar="TEXT",
        help="as --reward-template, for gold models",
    )
    quality.add_argument(
        "--tie-margin", type=float, default=1e-9, metavar="FLOAT",
        help="largest difference of gold scores that is a tie (default: 1e-9)",
    )  # fmt: skip
    quality.add_argument(
        "--reward-accuracy", action="store_true",
        help="with preferences, report how often the rewards prefer the chosen response",
    )  # fmt: skip
    attacks = parser.add_argument_group("attacks")
    attacks.add_argument(
        "--attack", action="append", default=[], metavar="ATTACK",
        help="also run the methods under this attack; see below; can be repeated",
    )  # fmt: skip
    attacks.add_argument(
        "--harm-below", type=float, metavar="FLOAT",
        help="gold score below which an attack has succeeded (default with gold demo: 0)",
    )  # fmt: skip
    judge = parser.add_argument_group("judge")
    judge.add_argument(
        "--judge-url", metavar="URL", help="URL of an OpenAI-compatible API, such as .../v1"
    )
    judge.add_argument("--judge-model", metavar="NAME", help="model of the judge")
    judge.add_argument(
        "--judge-key-env", metavar="NAME", help="environment variable that holds the key"
    )
    judge.add_argument(
        "--judge-timeout", type=float, default=60.0, metavar="SECONDS", help="(default: 60)"
    )
    judge.add_argument(
        "--judge-workers",
        type=int,
        default=8,
        metavar="INT",
        help="pairs judged at once (default: 8)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", help="folder for the results")
    output.add_argument(
        "--resume", action="store_true", help="continue OUT: run and measure what is missing"
    )
    output.add_argument("--no-plots", action="store_true", help="draw nothing")
    output.add_argument(
        "--report", metavar="FOLDER",
        help="remake results.json, report.md and the plots of this folder, and run nothing",
    )  # fmt: skip
    output.add_argument(
        "--merge", nargs="+", default=[], metavar="FOLDER",
        help="put the results of these folders together in OUT, and run nothing: of more methods, "
        "prompts (--prompt-offset) or seeds",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises
    ------
    UsageError
        Flags, files or prompts that it cannot work with, before any model is loaded where that is
        possible.
    """
    plots = not args.no_plots
    if plots and not can_plot():
        raise UsageError(
            "plots need matplotlib, which is not installed: pip install 'stars_fast[eval]', or "
            "give --no-plots"
        )
    try:
        if args.report is not None:
            return _report(Path(args.report), plots=plots)
        if args.merge:
            return _merge(args, plots=plots)
        session = _session(args)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    quiet_libraries()
    try:
        session.calibrate()
    except (ValueError, TypeError) as error:
        raise UsageError(f"calibration: {error}") from error
    code = 0
    try:
        session.run()
        session.measure()
    except KeyboardInterrupt:
        code = 130
    finally:
        if session.judge is not None:
            session.judge.endpoint.close()
    record = _write(session, args, plots=plots)
    for line in failures(record):
        say(line)
    if code:
        say(f"interrupted; {len(session.store.runs)} runs are in {args.out}; --resume continues")
    return code or int(bool(session.failed_runs or session.problems))


def _report(folder: Path, *, plots: bool) -> int:
    record = read_results(folder)
    _, written = write_results(folder, record, Store(folder), plots=plots)
    for path in written:
        say(f"wrote {path}")
    return 0


def _merge(args: argparse.Namespace, *, plots: bool) -> int:
    if args.out is None:
        raise UsageError("--out FOLDER is needed")
    folder = Path(args.out)
    _store(folder, resume=False)
    record, store = merge([Path(name) for name in args.merge], folder)
    record["header"]["command"] = shell_line(["stars-fast", *args.argv])
    whole, written = write_results(folder, record, store, plots=plots)
    for path in written:
        say(f"wrote {path}")
    for line in failures(whole):
        say(line)
    return 0


def _session(args: argparse.Namespace) -> Session:
    """Check the flags and read the files that they name."""
    if args.out is None:
        raise UsageError("--out FOLDER is needed")
    demo = args.model is None
    if demo and reward_model_of(args) is not None:
        raise UsageError(f"{'--reward' if args.reward else '--reward-model'} needs --model")
    for flag in ("prompts", "gold"):
        if not demo and not getattr(args, flag):
            raise UsageError(f"--{flag} is needed with --model")
    if not 0 < args.calibration_quantile < 1:
        raise UsageError(
            f"--calibration-quantile must be in (0, 1), got {args.calibration_quantile}"
        )
    if args.tie_margin < 0:
        raise UsageError(f"--tie-margin must be at least 0, got {args.tie_margin}")
    set_threads(args)
    models = _models(args)
    specs, reference = _specs(args, models)
    golds = _golds(args.gold or [_DEMO])
    items = _items(args)
    if MATH in golds.values():
        try:
            check_answers(items)
        except ValueError as error:
            raise UsageError(f"--gold: {error}") from None
    if args.reward_accuracy and all(item.chosen is None for item in items):
        raise UsageError("--reward-accuracy needs prompts with chosen and rejected responses")
    attacks, harm_below = _attacks(args, items)
    judge = _judge(args)
    _check_directories(models, [gold for gold in golds.values() if gold != MATH])
    plan = Plan(
        specs,
        items,
        _seeds(args.seeds),
        {**models.identity(), "device": _device(args)},
        {name: identity_of(source) for name, source in _named(models.model, models.lms)},
        {name: identity_of(source) for name, source in _named(models.reward_model, models.rms)},
    )
    return Session(
        Path(args.out),
        plan,
        _store(Path(args.out), resume=args.resume),
        models,
        reference,
        golds,
        say,
        gold_template=args.gold_template,
        judge=judge,
        accuracy=args.reward_accuracy,
        tie_margin=args.tie_margin,
        quantile=args.calibration_quantile,
        target_kind=args.calibration_targets,
        attacks=attacks,
        harm_below=harm_below,
    )


def _named(base: Any, others: Any) -> list[tuple[str | None, Any]]:  # noqa: ANN401 - models
    return [(None, base), *others.items()]


def _models(args: argparse.Namespace) -> Models:
    from stars_fast import demo

    lms = _pairs("--lm", args.lm)
    rms: dict[str, RewardSource] = {**_pairs("--rm", args.rm)}
    for name, text in _pairs("--persona", args.persona).items():
        if name in rms:
            raise UsageError(f"--persona: {name!r} is a reward model given by --rm, too")
        rms[name] = _persona(text)
    model, reward = args.model, reward_model_of(args)
    if model is None:
        model, reward = str(demo.model_dir()), str(demo.reward_model_dir())
    return Models(model, reward, lms, rms, engine_options(args))


def _persona(text: str) -> Persona:
    from stars_fast.rewards.persona import Persona

    return Persona(template=text) if "{prompt}" in text else Persona(system=text)


def _golds(texts: Sequence[str]) -> dict[str, str | RewardFunction]:
    """Find the gold rewards, by their names: those given, or what the user wrote."""
    found: dict[str, str | RewardFunction] = {}
    for text in texts:
        name, source = text, text
        if (given := re.fullmatch(r"([\w.-]+)=(.+)", text, re.DOTALL)) is not None:
            name, source = given.groups()
        if name in found:
            raise UsageError(f"--gold: {name!r} is given twice; write NAME=REWARD")
        try:
            found[name] = gold_source(source)
        except ValueError as error:
            raise UsageError(f"--gold: {error}") from None
    return found


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{flag} must be NAME=VALUE, got {text!r}")
        if name in found:
            raise UsageError(f"{flag}: {name!r} is given twice")
        found[name] = value
    return found


def _specs(args: argparse.Namespace, models: Models) -> tuple[list[Spec], str]:
    names = ModelNames(tuple(models.lms), tuple(models.rms))
    try:
        common = values_of(args.common)
    except ValueError as error:
        raise UsageError(f"--common: {error}") from None
    if common.keys() & {"lm", "rm"}:
        raise UsageError("--common: lm and rm are of single methods")
    specs = []
    for text in args.method:
        try:
            specs.append(spec_of_text(text, common, names))
        except (ValueError, TypeError) as error:
            raise UsageError(f"--method {text!r}: {error}") from None
    if args.methods is not None:
        with file_errors():
            raw = Path(args.methods).read_bytes()
        try:
            specs += specs_of_json(text_of(raw, first=True), common, names)
        except ValueError as error:
            raise UsageError(f"{args.methods}: {error}") from None
    try:
        found, reference = with_reference(specs, common)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    for spec in found:
        _check_reward(spec, models)
    return found, reference


def _check_reward(spec: Spec, models: Models) -> None:
    """Check that a method has the kind of reward model that it needs."""
    from stars_fast.rewards.persona import Persona

    reward = models.reward_model if spec.rm is None else models.rms[spec.rm]
    method, kind = spec.params.method, spec.params.kind
    if kind.draft is not None and models.options.get("draft_model") is None:
        raise UsageError(f"{spec.label}: --draft-model is needed for method {method!r}")
    if not kind.needs_reward:
        return
    if reward is None:
        raise UsageError(f"{spec.label}: --reward-model is needed for method {method!r}")
    if isinstance(reward, Persona) != kind.judges:
        raise UsageError(
            f"{spec.label}: method persona_judge and rm=NAME of a --persona go together"
        )


def _items(args: argparse.Namespace) -> list[Item]:
    if args.num_prompts is not None and args.num_prompts < 1:
        raise UsageError(f"--num-prompts must be at least 1, got {args.num_prompts}")
    offset = args.prompt_offset
    if offset < 0:
        raise UsageError(f"--prompt-offset must be at least 0, got {offset}")
    if args.prompts in (None, _DEMO):
        from stars_fast import demo
        from stars_fast.demo.openings import HELD_OUT

        try:
            last = HELD_OUT if args.num_prompts is None else offset + args.num_prompts
            texts = demo.prompts(last)
        except ValueError as error:
            raise UsageError(f"--num-prompts: {error}") from None
        items = [Item(number, text) for number, text in enumerate(texts, 1)][offset:]
        if not items:
            raise UsageError(f"--prompt-offset {offset} leaves no prompt")
        return items
    try:
        with file_errors():
            return read_items(
                Path(args.prompts),
                layout=args.layout,
                offset=offset,
                limit=args.num_prompts,
                chat=args.chat,
            )
    except RecordError as error:
        raise UsageError(str(error)) from None


def _attacks(args: argparse.Namespace, items: Sequence[Item]) -> tuple[list[Attack], float]:
    """Read the attacks and try them on the prompts."""
    if args.harm_below is not None and not args.attack:
        raise UsageError("--harm-below needs --attack")
    if args.harm_below is None and args.attack and args.gold[:1] not in ([], [_DEMO]):
        raise UsageError("--harm-below is needed with --attack and another gold than the demo's")
    harm_below = 0.0 if args.harm_below is None else args.harm_below
    if not math.isfinite(harm_below):
        raise UsageError(f"--harm-below must be finite, got {harm_below}")
    try:
        with file_errors():
            attacks = attacks_of_texts(args.attack)
        for attack in attacks:
            attack.on(items)
    except ValueError as error:
        raise UsageError(f"--attack: {error}") from None
    return attacks, harm_below


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--seeds must be integers, such as 0,1,2, got {text!r}") from None
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**64 for seed in seeds):
        raise UsageError(f"--seeds must be different, in [0, 2**64), got {text!r}")
    return seeds


def _judge(args: argparse.Namespace) -> PairJudge | None:
    if args.judge_url is None and args.judge_model is None:
        return None
    if args.judge_url is None or args.judge_model is None:
        raise UsageError("--judge-url and --judge-model go together")
    key = None
    if args.judge_key_env is not None:
        key = os.environ.get(args.judge_key_env)
        if not key:
            raise UsageError(f"--judge-key-env: {args.judge_key_env} is not set")
    if args.judge_workers < 1:
        raise UsageError(f"--judge-workers must be at least 1, got {args.judge_workers}")
    if not args.judge_timeout > 0:
        raise UsageError(f"--judge-timeout must be above 0, got {args.judge_timeout}")
    try:
        from stars_fast.remote.http import Endpoint

        endpoint = Endpoint(
            args.judge_url,
            api_key=key,
            timeout=args.judge_timeout,
            max_connections=args.judge_workers,
        )
    except (ModuleNotFoundError, ValueError) as error:
        raise UsageError(f"--judge-url: {error}") from None
    return PairJudge(endpoint, args.judge_model, args.judge_workers)


def _check_directories(models: Models, golds: Sequence[Any]) -> None:
    """Report missing models before the first one is loaded, not after hours."""
    from stars_fast.models.files import check_model_directory

    sources = [*golds, *models.lms.values(), *models.rms.values()]
    decoding = models.reward_model
    sources += [r.model for r in decoding] if isinstance(decoding, list) else [decoding]
    if not models.options.get("gguf_file"):
        sources.append(models.model)
    for source in sources:
        for name in [source] if isinstance(source, str) else sources_of(source):
            check_model_directory(name)


def _store(folder: Path, *, resume: bool) -> Store:
    if not resume and any((folder / name).exists() for name in (RESPONSES, RUNS)):
        raise UsageError(f"{folder} has results; give --resume to go on, or another --out")
    with file_errors():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return Store(folder)
        except DamagedError as error:
            raise UsageError(str(error)) from None


def _device(args: argparse.Namespace) -> str:
    """Name the device of the runs, on which their seconds depend."""
    import torch

    from stars_fast.benchmarks.measure import default_device, device_name

    return device_name(torch.device(args.device) if args.device else default_device())


def _write(session: Session, args: argparse.Namespace, *, plots: bool) -> dict[str, Any]:
    import torch

    from stars_fast.benchmarks.measure import default_device, header

    device = torch.device(args.device) if args.device else default_device()
    command = shell_line(["stars-fast", *args.argv])
    record = session.record(header(command, device), args.prompts or _DEMO)
    if args.model is None:  # where the package lies is of no interest
        record["settings"]["models"] |= {"model": _DEMO, "reward_model": _DEMO}
    whole, written = write_results(session.folder, record, session.store, plots=plots)
    for path in written:
        say(f"wrote {path}")
    return whole
