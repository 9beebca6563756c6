"""``stars-fast demo``: unaligned and STARS responses of the small models in the package."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from stars_fast.cli.errors import UsageError
from stars_fast.cli.flags import RUN_FIELDS, add_params_flags, params_from
from stars_fast.cli.layout import Page, Response, comparison
from stars_fast.demo import gold_score, prompts
from stars_fast.eval.bootstrap import RESAMPLES, mean_interval
from stars_fast.models.progress import quiet_libraries
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.seeds import derive_seed

if TYPE_CHECKING:
    from stars_fast.engine import Engine

#: The reviews are short: segments of about a sentence. The demo's rewards spread by about 1, so a
#: `beta` of 0.3 makes a test that means something.
DEFAULTS = {"target_reward": "auto", "segment_length": 16, "beta": 0.3}

_LEVEL = 0.95
_NAMES = {
    "stars": "STARS",
    "best_of_n": "best of n",
    "cards": "CARDS",
    "args": "ARGS",
    "speculative_rejection": "speculative rejection",
    "smc": "SMC",
}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="compare unaligned and STARS responses of the small models in the package",
        description="Compare unaligned and STARS responses of the small models in the package: "
        "film and product reviews, a reward model that likes kind ones, and a gold score that "
        "neither model knows.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompts", type=int, default=64, metavar="INT", help="prompts to compare (default: 64)"
    )
    parser.add_argument(
        "--show", type=int, default=3, metavar="INT", help="prompts to print (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="(default: 0)")
    add_params_flags(parser, DEFAULTS, skip=RUN_FIELDS | {"n", "trace"})
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises
    ------
    UsageError
        A flag out of its range.
    """
    if args.prompts < 2:
        raise UsageError(f"--prompts must be at least 2, got {args.prompts}")
    if args.show < 0:
        raise UsageError(f"--show must be at least 0, got {args.show}")
    try:
        params = params_from(args, DEFAULTS)
        texts = prompts(args.prompts)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    from stars_fast.engine import Engine

    quiet_libraries()
    engine = Engine.demo(seed=args.seed)
    page = Page.of(sys.stdout)
    if params.needs_calibration:
        target, origin = _calibrated(engine, texts, params)
        params = replace(params, target_reward=target)
        print("\n".join(textwrap.wrap(origin, page.width)))
    if params.needs_target:
        print("\n".join(textwrap.wrap(_legend(params), page.width)), end="\n\n")
    unaligned = _responses(engine, texts, _unaligned(params), args.seed)
    aligned = _responses(engine, texts, params, args.seed)
    name = _NAMES.get(params.method, params.method)
    for number, text in enumerate(texts[: args.show], 1):
        title = f"Prompt {number} of {len(texts)}: {text}"
        sides = {"unaligned": unaligned[number - 1], name: aligned[number - 1]}
        print(comparison(page, title, sides))
    print(_summary(page, name, unaligned, aligned, args.seed))
    return 0


def _unaligned(params: StarsParams) -> StarsParams:
    """Plain sampling with segment rewards to show: one attempt keeps whatever is drawn first."""
    target = params.target_reward if params.needs_target else 0.0
    return params.with_method("stars", acceptance="soft", target_reward=target, max_attempts=1)


def _calibrated(engine: Engine, texts: Sequence[str], params: StarsParams) -> tuple[float, str]:
    """A target reward, and a sentence on its source."""
    calibration = engine.calibrate(texts, params=params, use_tqdm=sys.stderr.isatty())
    target = calibration.target_reward
    samples = len(calibration.rewards)
    return target, (
        f"Target reward {target:+.2f}: the 0.9 quantile of the rewards of {samples} unaligned "
        "responses."
    )


def _legend(params: StarsParams) -> str:
    rule = f"soft with beta {params.beta:g}" if params.acceptance == "soft" else "hard"
    return (
        f"A segment has up to {params.draft_length} tokens. It is kept if its reward passes the "
        f"test ({rule}) against the threshold, which rises to the target; if "
        f"{params.attempts_per_segment} attempts fail, the best of them is kept as a fallback."
    )


def _responses(
    engine: Engine, texts: Sequence[str], params: StarsParams, seed: int
) -> list[Response]:
    # Both sides draw from the same seeds: they agree up to the first rejected segment.
    each = [replace(params, seed=derive_seed(seed, i + 1)) for i in range(len(texts))]
    outputs = engine.generate(texts, each, use_tqdm=sys.stderr.isatty())
    return [_response(output) for output in outputs]


def _response(output: RequestOutput) -> Response:
    if output.error is not None:
        raise UsageError(output.error)
    completion = output.outputs[0]
    return Response(completion, gold_score(completion.text))


def _summary(
    page: Page, name: str, unaligned: Sequence[Response], aligned: Sequence[Response], seed: int
) -> str:
    gains = [ours.gold - plain.gold for plain, ours in zip(unaligned, aligned, strict=True)]
    low, high = mean_interval(gains, _LEVEL, seed)
    interval = f"{_LEVEL:.0%} confidence interval [{low:+.3f}, {high:+.3f}]"
    segments = [segment for response in aligned for segment in response.completion.segments]
    tested = [segment for segment in segments if segment.threshold is not None]
    lines = [
        page.bold(f"Mean gold score over {len(gains)} prompts (-1 worst, +1 best)"),
        f"  {'unaligned':<11} {fmean(r.gold for r in unaligned):+.3f}",
        f"  {name:<11} {fmean(r.gold for r in aligned):+.3f}",
        f"  {'difference':<11} {fmean(gains):+.3f}, {interval}",
        *textwrap.wrap(
            f"The interval is a percentile bootstrap: {RESAMPLES:,} resamples of the {len(gains)} "
            "paired differences, one per prompt.",
            page.width,
        ),
    ]
    if tested:
        attempts = sum(segment.attempts for segment in tested)
        fallbacks = sum(segment.accepted == "fallback" for segment in tested)
        lines += textwrap.wrap(
            f"{name} made {attempts} attempts for {len(tested)} segments; {fallbacks} of these "
            "are fallbacks, the best of attempts that all failed the test.",
            page.width,
        )
    return "\n".join(lines)
