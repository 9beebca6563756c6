"""The machine's memory, and what libraries keep in it."""

from __future__ import annotations

import os


def memory_bytes() -> int:
    """Return the machine's memory, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


#: Compiled forms that oneDNN, and torch in front of it, keep at most: some half a megabyte each,
#: one for each shape of each product. Their own default is 1,024 of both.
_KEPT_KERNELS = 128


def bound_kernel_caches() -> None:
    """Have oneDNN keep few of the kernels that it compiles for each new shape of a batch.

    It reads its environment once, at its first product: later this changes nothing. What the user
    has set there stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KEPT_KERNELS))
