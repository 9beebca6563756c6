"""Options and fixtures of the suites: small by default, so that CI can run each; or ``--full``."""

from __future__ import annotations

import pytest

from stars_fast.benchmarks.interpreter import interpret_without_gpu

interpret_without_gpu()

import torch  # noqa: E402 - after the choice of the interpreter
from pytest_benchmark.fixture import BenchmarkFixture  # noqa: E402

from stars_fast.benchmarks.compare import Compare  # noqa: E402
from stars_fast.benchmarks.measure import default_device  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--full`` and ``--vllm-python``."""
    parser.addoption("--full", action="store_true", help="benchmark at full size")
    parser.addoption("--vllm-python", default="", help="a Python that has vLLM for CPUs")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of sizes."""
    config.addinivalue_line(
        "markers", "sizes(names, full, small): parameters with --full, and without"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by the sizes that were asked for."""
    size = "full" if metafunc.config.getoption("--full") else "small"
    for marker in metafunc.definition.iter_markers("sizes"):
        metafunc.parametrize(marker.args[0], marker.kwargs[size], ids=marker.kwargs.get("ids"))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to run at full size."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What is measured: the GPU if there is one."""
    return default_device()


@pytest.fixture
def compare(benchmark: BenchmarkFixture, device: torch.device, full: bool) -> Compare:
    """Time this test's sides in turn."""
    return Compare(benchmark, device, full=full)
