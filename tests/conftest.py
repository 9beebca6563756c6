"""One thread for every test: the models are so small that a second one only gets in the way."""

from __future__ import annotations

import os

# Before torch is imported, and without importing it: the tests of the core run without torch.
os.environ["OMP_NUM_THREADS"] = "1"
