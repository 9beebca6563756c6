"""One thread for every test: the models are so small that a second one only gets in the way.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import zlib
from pathlib import Path

import pytest

ON_GPU = Path("/dev/nvidiactl").exists()

# Before torch and triton are imported, and without importing either: the tests of the core run
# without them.
os.environ["OMP_NUM_THREADS"] = "1"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# Nothing comes from a hub. Where none can be reached, asking for a model takes half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's job in the background ignores it, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Flags of tests/fuzz, which is short without them."""
    group = parser.getgroup("fuzz")
    group.addoption(
        "--fuzz-seconds", type=float, help="go on with random cases for so long; 0: a single case"
    )
    group.addoption("--fuzz-from", type=int, default=0, help="number of the first case")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have what a test draws without a seed be the same, whichever tests ran before it."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    for item in items:
        if not ON_GPU and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
