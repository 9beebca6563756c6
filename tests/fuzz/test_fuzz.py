"""The whole engine on random cases, against every method written out over plain passes.

``pytest tests/fuzz --fuzz-seconds 600`` goes on for ten minutes; ``--fuzz-from N`` begins with
case N, and with ``--fuzz-seconds 0`` runs it alone.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from fuzz.cases import TURNS, Case, draw_case, with_other_candidates
from fuzz.checks import Checker
from fuzz.runs import Run, run_at_once, run_by_steps
from fuzz.tokenizers import FAMILIES

#: Of the short run; every method twice, and every tokenizer.
SHORT = 2 * len(TURNS)
_SHOWN = 8  # problems of a case

EVERYTHING = (
    *(f"method {' '.join(turn.values())}" for turn in TURNS),
    *(f"tokenizer {family}" for family in FAMILIES),
    *("preemptions", "paths copied", "pages copied", "prompt tokens cached"),
    *("fallbacks", "stop texts", "streams", "aborted", "refused", "again", "alone"),
    *("finish stop", "finish length"),
)


def test_everything_is_as_written_out(
    pytestconfig: pytest.Config, subtests: pytest.Subtests
) -> None:
    covered: Counter[str] = Counter()
    seconds = pytestconfig.getoption("fuzz_seconds")
    first = pytestconfig.getoption("fuzz_from")
    numbers = range(SHORT) if seconds is None and first == 0 else timed(first, seconds or 0.0)
    failed = []
    for number in numbers:
        with subtests.test(case=number):
            failed.append(number)
            run_case(draw_case(number), covered)
            failed.pop()
        if seconds:
            show(pytestconfig, f"case {number}: {covered['responses']} responses, failed: {failed}")
    if seconds is not None:
        show(pytestconfig, "\n".join(f"{covered[name]:>8} {name}" for name in sorted(covered)))
    elif not failed and first == 0:
        assert [name for name in EVERYTHING if not covered[name]] == []


def timed(first: int, seconds: float) -> Iterator[int]:
    """The numbers from the first one on, until the time is over."""
    end = time.monotonic() + seconds
    yield first
    while time.monotonic() < end:
        first += 1
        yield first


def show(config: pytest.Config, lines: str) -> None:
    """Print while the test runs."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # there is none in a process of xdist
        with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            reporter.write_line(f"\n{lines}")


def run_case(case: Case, covered: Counter[str]) -> None:
    """Run a case together, again and alone; fail with all that is needed to run it again."""
    checker = Checker(case, covered)
    try:
        problems = [
            f"{name}: {problem}"
            for name, run in runs_of(case, covered)
            for problem in checker.problems(run)
        ]
    except Exception as error:
        error.add_note(str(case))
        raise
    covered[f"tokenizer {case.world.family}"] += 1
    covered[f"model {case.world.architecture}"] += 1
    covered[f"rewards {case.world.rewards.label}"] += 1
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        pytest.fail("\n".join([str(case), *problems[:_SHOWN], *more]), pytrace=False)


def runs_of(case: Case, covered: Counter[str]) -> Iterator[tuple[str, Run]]:
    """Run all requests together where there is no room, then again, then some of them alone."""
    scarce = case.world.engine(case.number, case.scarce)
    together = run_by_steps(case, scarce)
    yield "together", together
    covered["aborted"] += len(together.aborted)
    covered["refused"] += together.refused_bad
    if scarce.has_unfinished():
        return  # it is stuck
    whole = [
        number
        for number, stages in together.stages.items()
        if stages[-1].error is None and number not in together.aborted
    ]
    if whole:
        yield "again", run_at_once(scarce, {number: case.asks[number] for number in whole})
        covered["again"] += len(whole)
    stats = scarce.stats()
    for name, counter in (
        ("preemptions", "preemptions"),
        ("reward evictions", "rm_evictions"),
        ("paths copied", "paths_copied"),
        ("pages copied", "page_copies"),
        ("prompt tokens cached", "cached_prompt_tokens"),
    ):
        covered[name] += int(stats.get(counter, 0))
    rng = random.Random(f"alone {case.number}")
    roomy = case.world.engine(case.number + 1, case.roomy)
    for number in rng.sample(whole, min(2, len(whole))):
        ask = with_other_candidates(rng, case.asks[number])
        yield "alone", run_at_once(roomy, {number: ask})
        covered["alone"] += 1
