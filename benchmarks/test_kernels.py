"""Every kernel against the same job done otherwise: small in Triton's interpreter, full on a GPU.

``python benchmarks/gpu.py`` is the script for figures; this suite keeps its cases running.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stars_fast.benchmarks.kernel_cases import FULL, TINY, all_cases

ON_GPU = torch.cuda.is_available()


def test_kernels(benchmark: BenchmarkFixture, full: bool) -> None:
    """Check each case, run everything it is compared with, then time all of ours in a row."""
    if full and not ON_GPU:
        pytest.skip("the kernels at full size need a GPU")
    device = torch.device("cuda" if ON_GPU else "cpu")
    jobs = []
    for case in all_cases(FULL if full else TINY, device):
        case.check()
        for job in case.others.values():
            job(0)
        jobs.append(case.ours)
        benchmark.extra_info[case.name] = case.least_bytes

    def run() -> None:
        for job in jobs:
            job(0)
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=1, iterations=1)
