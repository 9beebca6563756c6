"""The C example, built on the installed CMake package, decides as the Python binding does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from stars_fast import core

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    core.EVENT_ACCEPTED: "accepted",
    core.EVENT_FALLBACK: "fallback",
    core.EVENT_CHOSEN: "chosen",
}


def mix(state: int, value: int) -> int:
    """A step of splitmix64."""
    mask = 2**64 - 1
    state = ((state ^ value) + 0x9E3779B97F4A7C15) & mask
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return state ^ state >> 31


def digest_of(tokens: list[int]) -> int:
    digest = 0
    for token in tokens:
        digest = mix(digest, token)
    return digest


def reward_of(tokens: list[int]) -> float:
    return (digest_of(tokens) >> 11) * 2.0**-53


def draw(tokens: list[int], names: tuple[int, int, int], length: int) -> list[int]:
    """What follows `tokens` in the row of this seed, stream and attempt; 0 is the last."""
    segment: list[int] = []
    while len(segment) < length and (not segment or segment[-1] != 0):
        noise = digest_of(tokens + segment)
        for name in names:
            noise = mix(noise, name)
        segment.append(noise % 24)
    return segment


def in_python() -> tuple[list[str], dict[str, int]]:
    """The lines that the example prints, from whole sequences instead of pages, and the counts."""
    scheduler = core.Scheduler(num_pages=14, page_size=4, max_rows=16)
    prompts = [[1, 2, 3, 4, 5, i + 5, i + 6] for i in range(6)]
    for i, prompt in enumerate(prompts):
        scheduler.add(
            i,
            prompt,
            scored=i % 3 != 0,
            choose=i % 3 == 2,
            segment_length=6,
            max_tokens=20,
            max_attempts=4,
            candidates=2,
            seed=i,
            target_reward=0.9,
            beta=0.2,
        )
    lines: list[str] = []
    kept: dict[int, list[int]] = {}
    while scheduler.has_unfinished:
        plan = scheduler.plan()
        requests = plan.request.tolist()
        names = zip(plan.seed.tolist(), plan.stream.tolist(), plan.attempt.tolist(), strict=True)
        lengths = plan.draft.new_lengths.tolist()
        known = [scheduler.tokens(request) for request in requests]
        drawn = [draw(*row) for row in zip(known, names, lengths, strict=True)]
        for request in plan.unscored.tolist():
            scheduler.set_prompt_reward(request, reward_of(prompts[request]))
        tokens = np.zeros((len(drawn), 6), np.int64)
        for row, segment in enumerate(drawn):
            tokens[row, : len(segment)] = segment
        decision = scheduler.commit(
            tokens,
            [len(segment) for segment in drawn],
            [segment[-1] == 0 for segment in drawn],
            [reward_of(row + segment) for row, segment in zip(known, drawn, strict=True)],
        )
        for row in np.flatnonzero(decision.outcome == core.ROW_KEPT):
            kept[requests[row]] = drawn[row]
        for i, request in enumerate(decision.request.tolist()):
            segment = drawn[decision.row[i]] if decision.row[i] >= 0 else kept[request]
            lines.append(
                f"{request} {KINDS[int(decision.kind[i])]} at {decision.start[i]}"
                f" after {decision.attempts[i]}: {' '.join(map(str, segment))}"
                f"{' (end)' if decision.finish[i] != core.FINISH_NONE else ''}"
            )
    return lines, scheduler.stats


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_example_on_the_installed_package(tmp_path: Path) -> None:
    core_build, prefix, example = (tmp_path / name for name in ("core", "prefix", "example"))
    quick = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-g0"]
    run("cmake", "-S", ROOT, "-B", core_build, "-DSTARS_BUILD_PYTHON=OFF", *quick)
    run("cmake", "--build", core_build, "--parallel", "2")
    run("cmake", "--install", core_build, "--prefix", prefix)
    source = ROOT / "examples" / "c"
    run("cmake", "-S", source, "-B", example, f"-DCMAKE_PREFIX_PATH={prefix}", *quick)
    run("cmake", "--build", example)

    expected, counts = in_python()
    assert run(example / "accept_reject").splitlines() == expected
    # What is compared has all that pages can have done to them.
    assert {"fallbacks", "preemptions", "page_copies", "cached_prompt_tokens"} <= {
        name for name, count in counts.items() if count > 0
    }
