"""One thread for every test: the models are so small that a second one only gets in the way.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and triton are imported, and without importing either: the tests of the core run
# without them.
os.environ["OMP_NUM_THREADS"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
