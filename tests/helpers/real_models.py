"""Where real models lie: STARS_REAL_MODELS names the folder that scripts/real_models.py made."""

from __future__ import annotations

import os
from pathlib import Path


def real_model(name: str) -> Path | None:
    """Return the directory of "smollm2" or "gemma3"; None where no folder is named."""
    folder = os.environ.get("STARS_REAL_MODELS")
    return None if folder is None else Path(folder) / name
