"""The machine's memory, and what libraries keep in it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import torch


def memory_bytes() -> int:
    """Return the machine's memory, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Bits of an entry of /proc/self/pagemap, and the advice of madvise.
_PRESENT, _SWAPPED, _OF_FILE = (1 << bit for bit in (63, 62, 61))
_DONTNEED = 4


def release_file_pages(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor that is mapped from a file and has not been written to.

    The system reads the pages again when they are used. Nothing is done with any other tensor, or
    off Linux.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.is_meta:
        return
    size = os.sysconf("SC_PAGE_SIZE")
    first, end = -(-tensor.data_ptr() // size), (tensor.data_ptr() + tensor.nbytes) // size
    if end <= first or not tensor.is_contiguous():
        return
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            pages = np.frombuffer(pagemap.read(8 * (end - first)), np.uint64)
    except OSError:
        return
    written = (pages & _SWAPPED != 0) | ((pages & _PRESENT != 0) & (pages & _OF_FILE == 0))
    if len(pages) == end - first and not written.any():
        libc = ctypes.CDLL(None)
        libc.madvise(
            ctypes.c_void_p(first * size), ctypes.c_size_t((end - first) * size), _DONTNEED
        )


def trim_heap() -> None:
    """Give back memory that was freed; glibc keeps it, in pieces smaller than what comes next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


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
