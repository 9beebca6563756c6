"""A Triton cache that was made on another machine."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path


def use_cache(folder: Path) -> Path:
    """Have Triton look for kernels in a copy of a folder; before Triton is imported.

    Triton finds a kernel by a hash of its source, its arguments' types, its options and Triton
    itself, down to the bytes of its libraries: only the same build of Triton, for the same Python,
    finds what is there. The files of a kernel are listed by their absolute paths, which are
    rewritten here.

    Returns
    -------
    Path
        The copy.

    Raises
    ------
    NotADirectoryError
        If there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"the cache must be a folder, got {str(folder)!r}")
    copy = Path(tempfile.mkdtemp(prefix="triton-cache-"))
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    for group in copy.glob("*/__grp__*"):
        listed = json.loads(group.read_text(encoding="utf-8"))
        listed["child_paths"] = {name: str(group.parent / name) for name in listed["child_paths"]}
        group.write_text(json.dumps(listed), encoding="utf-8")
    os.environ["TRITON_CACHE_DIR"] = str(copy)
    return copy
