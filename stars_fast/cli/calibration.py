"""The target reward of a run with ``--target-reward auto``, kept beside the output file.

A resumed run must test against the same target as the run that it continues. The target is
therefore written to ``<output>.calibration.json``, with everything it depends on, before the first
result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stars_fast.cli.errors import UsageError
from stars_fast.outputs import Calibration


def sidecar_of(output: Path) -> Path:
    """The path at which the target of a run that writes `output` is kept."""
    return output.with_name(output.name + ".calibration.json")


@dataclass(frozen=True)
class Sidecar:
    """The file that keeps a run's target.

    Parameters
    ----------
    path
        The file.
    settings
        What the target depends on: models, prompts, sampling; JSON values.
    """

    path: Path
    settings: dict[str, Any]

    def read(self) -> float | None:
        """The target of the run that is being resumed; None if it had none yet.

        Raises
        ------
        UsageError
            The file is damaged, or was made with other settings; the message names them.
        """
        if not self.path.exists():
            return None
        try:
            kept = json.loads(self.path.read_bytes())
            target = float(kept["target_reward"])
            settings = dict(kept["settings"])
        except (ValueError, TypeError, KeyError):
            raise UsageError(f"{self.path} is damaged; delete it to calibrate again") from None
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise UsageError(
                    f"{self.path} was calibrated with {name} {settings.get(name)!r}, this run has "
                    f"{value!r}; a resumed run needs the same (or delete the file to calibrate "
                    "again)"
                )
        return target

    def write(self, calibration: Calibration) -> None:
        """Keep a target atomically: an interrupted run leaves the whole file or none."""
        kept = {
            "target_reward": calibration.target_reward,
            "quantiles": {str(q): reward for q, reward in calibration.quantiles.items()},
            "settings": self.settings,
        }
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)
