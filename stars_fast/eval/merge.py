"""Results of several folders as one: of more methods, prompts or seeds, or of several machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stars_fast.eval.attacks import under
from stars_fast.eval.results import read_results
from stars_fast.eval.session import CALIBRATION
from stars_fast.eval.store import Record, Store, read_json, write_json

#: Settings that must be the same: another one would make figures that cannot be compared.
_SAME = ("reference", "gold", "tie_margin", "calibration_quantile", "target", "harm_below")


class MergeError(ValueError):
    """Folders that do not go together; the message says why."""


def merge(folders: Sequence[Path], out: Path) -> tuple[Record, Store]:
    """Write the results of folders into one, and return the record, its summary left out.

    Parameters
    ----------
    folders
        Results of ``stars-fast eval``; not changed.
    out
        Gets ``responses.jsonl``, ``runs.jsonl`` and ``calibration.json``.

    Raises
    ------
    MergeError
        Settings, methods of one label or prompts of one number differ, or two folders share a part
        of their prompts. Of two runs of the same prompts one is taken: that of which more is
        measured, the first folder's of equals.
    DamagedError
        A folder has no record, or a damaged one.
    """
    records = [read_results(folder) for folder in folders]
    first = records[0]["settings"]
    for folder, record in zip(folders[1:], records[1:], strict=True):
        _check(folders[0], first, folder, record["settings"])
    settings = dict(first)
    settings["numbers"] = sorted({n for r in records for n in r["settings"]["numbers"]})
    settings["seeds"] = _union(r["settings"]["seeds"] for r in records)
    settings["prompts"] = ", ".join(_union([r["settings"]["prompts"]] for r in records))
    for name in ("targets", "other_golds", "measured_by"):
        settings[name] = {
            key: value
            for record in reversed(records)  # the first folder has the last word
            for key, value in (record["settings"].get(name) or {}).items()
        }
    judges = [record["settings"]["judge"] for record in records]
    settings["judge"] = next(filter(None, judges), None)
    store = _stored(folders, records, settings["measured_by"], out)
    settings["specs"] = _specs([record["settings"]["specs"] for record in records])
    labels = [spec["label"] for spec in settings["specs"]]
    attacks = _attacks([record["settings"] for record in records], labels)
    if attacks:
        settings["attacks"] = attacks
    for spec in settings["specs"]:
        spec["runs"] = _apart(spec["label"], spec["runs"], store)
    for attack in settings.get("attacks", []):
        attack["runs"] = [
            _apart(under(label, attack["name"]), runs, store)
            for label, runs in zip(labels, attack["runs"], strict=True)
        ]
    _check_prompts(settings, store)
    devices = _union([record["header"]["device"]] for record in records)
    whole = {
        "header": {**records[0]["header"], "device": " and ".join(devices)},
        "settings": settings,
        "failed_runs": [failure for record in records for failure in record["failed_runs"]],
        "problems": _union(record.get("problems", []) for record in records),
        "accuracy": {},  # of preferences, which each folder has its own of
    }
    store.save()
    kept: Record = {}
    for folder in reversed(folders):
        kept |= read_json(folder / CALIBRATION)
    if kept:
        write_json(out / CALIBRATION, kept)
    return whole, store


def _check(folder: Path, first: Mapping[str, Any], other: Path, theirs: Mapping[str, Any]) -> None:
    pairs = {name: (first.get(name), theirs.get(name)) for name in _SAME}
    if "attacks" not in first or "attacks" not in theirs:
        del pairs["harm_below"]
    if None in pairs["target"]:
        del pairs["target"]  # no method of that folder has one
    for name in first["targets"].keys() & theirs["targets"].keys():
        pairs[f"target of {name}"] = (first["targets"][name], theirs["targets"][name])
    if first["judge"] and theirs["judge"]:
        pairs["judge"] = (first["judge"], theirs["judge"])
    for name in ("model", "reward_model"):
        mine, its = first["models"][name], theirs["models"][name]
        pairs[name] = (Path(str(mine)).name, Path(str(its)).name)  # as other machines have them
    for name in first["models"].keys() - {"model", "reward_model", "lm", "rm", "device"}:
        pairs[name] = (first["models"][name], theirs["models"].get(name))
    for name, (mine, its) in pairs.items():
        if mine != its:
            raise MergeError(f"{name} is {mine!r} in {folder} and {its!r} in {other}")


def _union(lists: Any) -> list[Any]:  # noqa: ANN401 - an iterable of lists
    return list(dict.fromkeys(value for values in lists for value in values))


def _names(runs: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the runs of each seed; older records have one of each."""
    return {seed: [names] if isinstance(names, str) else names for seed, names in runs.items()}


def _add(into: dict[str, list[str]], runs: Mapping[str, Any]) -> None:
    for seed, names in _names(runs).items():
        into[seed] = _union([into.get(seed, []), names])


def _specs(of_folders: Sequence[Sequence[Record]]) -> list[Record]:
    found: dict[str, Record] = {}
    for specs in of_folders:
        for spec in specs:
            own = {name: value for name, value in spec.items() if name != "runs"}
            there = found.setdefault(spec["label"], {**own, "runs": {}})
            if own != {name: value for name, value in there.items() if name != "runs"}:
                raise MergeError(
                    f"two methods are labelled {spec['label']!r}, {there['params']} and "
                    f"{own['params']}"
                )
            _add(there["runs"], spec["runs"])
    return list(found.values())


def _attacks(of_folders: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Record]:
    found: dict[str, Record] = {}
    runs: dict[str, dict[str, dict[str, list[str]]]] = {}
    for settings in of_folders:
        for attack in settings.get("attacks", []):
            own = {name: value for name, value in attack.items() if name != "runs"}
            if found.setdefault(attack["name"], own) != own:
                raise MergeError(f"two attacks are called {attack['name']!r}")
            of_specs = runs.setdefault(attack["name"], {label: {} for label in labels})
            for spec, names in zip(settings["specs"], attack["runs"], strict=True):
                _add(of_specs[spec["label"]], names)
    return [{**own, "runs": list(runs[name].values())} for name, own in found.items()]


def _stored(
    folders: Sequence[Path],
    records: Sequence[Record],
    measured_by: Mapping[str, str],
    out: Path,
) -> Store:
    """Gather the runs. What measured alike in all folders has one name in all responses.

    The names tell files apart by their times, too, which differ from machine to machine.
    """
    store = Store(out)
    for folder, record in zip(folders, records, strict=True):
        theirs = record["settings"]["measured_by"]
        own = Store(folder)
        for name, run in own.runs.items():
            rows = own.responses[name]
            for row in rows:
                for column, by in theirs.items():
                    if row.get(f"{column}_by") == by:
                        row[f"{column}_by"] = measured_by[column]
            there = store.responses.get(name)
            if there is None or _measured(there, measured_by) < _measured(rows, measured_by):
                store.runs[name], store.responses[name] = run, rows
    return store


def _measured(rows: Sequence[Record], measured_by: Mapping[str, str]) -> int:
    """Return how much of the rows is measured: a run that a folder did not ask for may lack it."""
    return sum(row.get(f"{column}_by") == by for row in rows for column, by in measured_by.items())


def _apart(label: str, runs: Mapping[str, list[str]], store: Store) -> dict[str, list[str]]:
    """Leave out the runs whose prompts others have: `vanilla`, say, runs in every folder."""
    found: dict[str, list[str]] = {}
    for seed, names in runs.items():
        seen: set[int] = set()
        found[seed] = kept = []
        there = [name for name in names if name in store.runs]
        for name in sorted(there, key=lambda name: -store.runs[name]["responses"]):
            numbers = {row["number"] for row in store.responses[name]}
            if numbers <= seen:
                continue
            if both := numbers & seen:
                raise MergeError(
                    f"{label}, seed {seed}: two folders have a response to prompt {min(both)}, and "
                    "neither has all of the other's prompts"
                )
            seen |= numbers
            kept.append(name)
    return found


def _check_prompts(settings: Mapping[str, Any], store: Store) -> None:
    """Check that each number is one prompt, as a language model reads it."""
    prompts: dict[tuple[int, str | None], Any] = {}
    for spec in settings["specs"]:
        for name in (name for names in spec["runs"].values() for name in names):
            for row in store.responses[name]:
                at, prompt = (row["number"], spec["lm"]), row["prompt_token_ids"]
                if row["error"] is None and prompts.setdefault(at, prompt) != prompt:
                    raise MergeError(
                        f"prompt {row['number']} is not the same in all folders: take parts of one "
                        "file, by --prompt-offset and --num-prompts"
                    )
