"""The target reward of a run with ``--target-reward auto``, kept beside the output file.

A resumed run must test against the same target as the run that it continues. So the target is
written to ``<output>.calibration.json`` before the first result. Targets of single prompts are
found again, from the same prompts with the same draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from stars_fast.cli.continuation import write_json
from stars_fast.cli.errors import UsageError
from stars_fast.outputs import Calibration, TargetKind
from stars_fast.params import StarsParams


def add_targets_flag(parser: argparse._ActionsContainer) -> None:
    """Add ``--calibration-targets``."""
    parser.add_argument(
        "--calibration-targets",
        choices=get_args(TargetKind),
        default="pooled",
        help="pooled: one target for all prompts (the default); prompt: one for each prompt that "
        "is calibrated on, by its own samples, pooled towards the others; relative: by the reward "
        "of the prompt alone; best: what predicts held-out samples best",
    )


def told(calibration: Calibration, quantile: float, prompts: str) -> str:
    """Return what to say of a calibration; `prompts`: on which it was."""
    samples = f"the {quantile:g} quantile of {len(calibration.rewards)} unaligned responses"
    targets = calibration.targets
    if targets is None:
        return f"target reward {calibration.target_reward:.4g}: {samples} to {prompts}"
    losses = ", ".join(f"{kind} {loss:.4g}" for kind, loss in targets.losses.items())
    others = f", of other prompts by {targets.unseen}" if targets.unseen != targets.kind else ""
    return (
        f"target rewards by {targets.kind}{others}, from {samples} to {prompts}; losses on "
        f"held-out samples: {losses}"
    )


def told_budget(asked: StarsParams, found: StarsParams) -> str:
    """Return what a budget has come to."""
    return (
        f"budget {asked.budget:g}: target reward {found.target_reward:.4g}, "
        f"{found.max_attempts} attempts, {found.candidates} at a time"
    )


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
