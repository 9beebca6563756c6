"""The record of an eval, ``results.json``, and the files made from it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stars_fast.eval.plots import draw
from stars_fast.eval.store import DamagedError, Store, write_json
from stars_fast.eval.summary import summarise
from stars_fast.eval.tables import report, with_attacked

RESULTS = "results.json"
REPORT = "report.md"


def write_results(
    folder: Path, record: Mapping[str, Any], store: Store, *, plots: bool
) -> tuple[dict[str, Any], list[Path]]:
    """Summarise what has been measured and write ``results.json``, ``report.md`` and the plots.

    Parameters
    ----------
    folder
        Folder of the evaluation.
    record
        ``header``, ``settings``, ``failed_runs`` and others; a summary in it is replaced.
    store
        The results.
    plots
        Also draw the plots, which needs matplotlib.

    Returns
    -------
    The record, and the files written.
    """
    whole = {**record, **summarise(record["settings"], store)}
    write_json(folder / RESULTS, whole)
    drawn = draw(whole, folder) if plots else sorted(folder.glob("*.png"))
    text = report(whole, [path.name for path in drawn])
    (folder / REPORT).write_text(text, encoding="utf-8")
    return whole, [folder / RESULTS, folder / REPORT, *(drawn if plots else [])]


def read_results(folder: Path) -> dict[str, Any]:
    """Read a record.

    Raises
    ------
    DamagedError
        There is none, or it is damaged.
    """
    path = folder / RESULTS
    record: dict[str, Any] = {}
    try:
        record = json.loads(path.read_bytes())
        complete = all("runs" in spec for spec in record["settings"]["specs"])
    except (OSError, ValueError, TypeError, KeyError):
        complete = False
    if not complete:
        raise DamagedError(f"{path} is no record of `stars-fast eval`")
    return record


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def failures(record: Mapping[str, Any]) -> Sequence[str]:
    """Return a line for each kind of failure in a record's summary, with the records' numbers."""
    lines = [
        f"{failure['label']}, seed {failure['seed']}: {failure['error']}"
        for failure in record["failed_runs"]
    ]
    lines += record.get("problems", [])
    for spec in with_attacked(record):
        kinds = {
            "requests": spec["failed"],
            "rewards": spec["reward_failed"],
            "gold scores": spec["gold_failed"],
            **{
                f"gold scores of {name}": gold["failed"]
                for name, gold in spec.get("other_golds", {}).items()
            },
            "verdicts": (spec.get("judge") or {}).get("failed", []),
        }
        for what, failed in kinds.items():
            if failed:
                numbers = ", ".join(map(str, sorted({f["number"] for f in failed})))
                lines.append(
                    f"{spec['label']}: {len(failed)} {what} failed, of records {numbers}; the "
                    f"first: {failed[0]['error']}"
                )
    return lines
