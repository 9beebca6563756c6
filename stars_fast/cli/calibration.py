"""The target reward of a run with ``--target-reward auto``, kept beside the output file.

A resumed run must test against the same target as the run that it continues. So the target is
written to ``<output>.calibration.json`` before the first result.
"""

from __future__ import annotations

import json
from pathlib import Path

from stars_fast.cli.continuation import write_json
from stars_fast.cli.errors import UsageError
from stars_fast.outputs import Calibration


def read_target(path: Path) -> float | None:
    """Return the target of the run that is being resumed; None if it had none yet.

    Raises
    ------
    UsageError
        The file is damaged.
    """
    if not path.exists():
        return None
    try:
        return float(json.loads(path.read_bytes())["target_reward"])
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{path} is damaged; delete it to calibrate again") from None


def write_target(path: Path, calibration: Calibration) -> None:
    """Keep a target."""
    quantiles = {str(q): reward for q, reward in calibration.quantiles.items()}
    write_json(path, {"target_reward": calibration.target_reward, "quantiles": quantiles})
