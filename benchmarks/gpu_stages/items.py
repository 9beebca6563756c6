"""Items of a run, each in a try of its own, and the record that is written after each."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Item:
    """A part of a stage.

    Attributes
    ----------
    name
        In the record.
    run
        Returns what is recorded, or raises.
    """

    name: str
    run: Callable[[], Any]


def run_items(
    items: Sequence[Item], record: dict[str, Any], out: Path | None, seconds: float
) -> list[str]:
    """Run items in order, and return the names of those that failed.

    Parameters
    ----------
    items
        The most important first.
    record
        Gets ``items``, what each returned or its error, with the seconds it took, and
        ``left_out``, the names of those that did not begin.
    out
        Where the record is written, whole, before the first item and after each; None: nowhere.
    seconds
        After which no further item begins.
    """
    found: dict[str, Any] = {}
    left_out = [item.name for item in items]
    record |= {"items": found, "left_out": left_out}
    failed = []
    begun = time.monotonic()
    write(record, out)
    for item in items:
        if time.monotonic() - begun > seconds:
            break
        print(f"\n=== {item.name}", flush=True)
        at = time.monotonic()
        row: dict[str, Any] = {}
        try:
            row["found"] = item.run()
        except Exception as error:  # noqa: BLE001 - the other items are worth having
            # As text: the error itself holds the item's memory, through its frames.
            row["failed"] = f"{type(error).__name__}: {error}"[:4000]
            failed.append(item.name)
            print(f"FAILED: {row['failed']}")
        row["seconds"] = time.monotonic() - at
        found[item.name] = row
        left_out.remove(item.name)
        print(f"=== {item.name}: {row['seconds']:.0f} s", flush=True)
        write(record, out)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


def write(record: Mapping[str, Any], out: Path | None) -> None:
    """Replace a record's file in one move, so that a run cut short leaves the last one whole."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(out)
