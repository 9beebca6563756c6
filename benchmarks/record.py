"""Run benchmarks at full size and keep what matters of the result.

    python benchmarks/record.py results/NAME.json [pytest arguments]

The file holds the command, the commit, the processor, the versions, and for each benchmark its
`extra_info` and times. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "numpy", "stars_fast")


def main(arguments: list[str]) -> None:
    """Run pytest and write the record."""
    if not arguments:
        raise SystemExit(__doc__)
    target, rest = HERE / arguments[0], arguments[1:]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = ["-m", "pytest", "benchmarks", "--full", f"--benchmark-json={raw}", *rest]
        subprocess.run([sys.executable, *command], check=True, cwd=HERE.parent)
        measured = json.loads(raw.read_text(encoding="utf-8"))
    record = {
        "command": " ".join(["python benchmarks/record.py", *arguments]),
        "commit": measured["commit_info"]["id"],
        "uncommitted_changes": measured["commit_info"]["dirty"],
        "date": measured["datetime"][:10],
        "processor": measured["machine_info"]["cpu"].get("brand_raw", platform.processor()),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "benchmarks": [_row(benchmark) for benchmark in measured["benchmarks"]],
    }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


def _row(benchmark: dict[str, Any]) -> dict[str, Any]:
    times = {name: benchmark["stats"][name] for name in ("rounds", "min", "median", "max")}
    return {"name": benchmark["name"], **benchmark["extra_info"], "seconds": times}


if __name__ == "__main__":
    main(sys.argv[1:])
