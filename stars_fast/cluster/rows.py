"""Rows of a data set: the lines of ``stars-fast generate``, in a table.

A row is a line of that command's input in one of two forms. `as_rows` and `read_rows` make
``{"line": 3, "request": b'{"prompt": "The film"}'}``: two columns of one type each, whatever the
lines are like. Rows of other sources have the line's keys as columns, ``prompt``, ``messages`` or
``prompt_token_ids``, ``id`` and ``params``, and may have ``line``; a table has every column in
every row, so null stands for a key that is left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stars_fast.params import StarsParams
from stars_fast.records import InputRecord, LineError, input_record, parse_line
from stars_fast.seeds import derive_seed

Row = Mapping[str, Any]


def as_rows(requests: Iterable[Row], first: int = 1) -> list[dict[str, Any]]:
    """Number requests from `first` on, as lines of a file would be.

    Parameters
    ----------
    requests
        Objects as in a line of ``stars-fast generate``.
    first
        Number of the first; seeds follow from it.

    Raises
    ------
    TypeError
        If a request is no JSON object.
    """
    return [
        {"line": first + i, "request": json.dumps(dict(request), ensure_ascii=False).encode()}
        for i, request in enumerate(requests)
    ]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read an input file of ``stars-fast generate``; the row of a malformed line has its error.

    Blank lines make no rows, but are counted.
    """
    with Path(path).open("rb") as file:
        return [{"line": i, "request": raw} for i, raw in enumerate(file, 1) if raw.strip()]


def request_of(row: Row, base: StarsParams, seed: int) -> InputRecord:
    """Read a row.

    Parameters
    ----------
    row
        In either form.
    base
        Default parameters of the request.
    seed
        Seed of the run. A row whose parameters have no seed gets one from this and its line, or,
        if it has none, its id. Its tokens depend neither on its batch nor on its worker.

    Returns
    -------
    InputRecord
        `line` is 0 where the row has none.

    Raises
    ------
    ValueError, TypeError
        What `parse_line` refuses, and a row without line, id and seed.
    """
    line = line_of(row)
    raw = row.get("request")
    if raw is not None:
        try:
            request = parse_line(raw.encode() if isinstance(raw, str) else raw, line or 0, base)
        except LineError as error:
            raise ValueError(error.reason) from None
        if request is None:
            raise ValueError("request is blank")
    else:
        given = {key: value for key, value in row.items() if key not in {"line", "request"}}
        request = input_record(_without_nulls(given), line or 0, base)
    if request.params.seed is not None:
        return request
    if line is None and request.id is None:
        raise ValueError("a row needs line, id or params.seed: its draws follow from it")
    index = line if line is not None else index_of(request.id)
    return replace(request, params=replace(request.params, seed=derive_seed(seed, index)))


def line_of(row: Row) -> int | None:
    """Return the number of a row's line, None if it has none.

    Raises
    ------
    ValueError
        If it is no integer of at least 1.
    """
    line = row.get("line")
    if line is None:
        return None
    if isinstance(line, bool) or not isinstance(line, int) or line < 1:
        raise ValueError(f"line must be an integer of at least 1, got {line!r}")
    return line


def rows_of(batch: object) -> list[dict[str, Any]]:
    """Return the rows of a batch of Ray Data, in Python's own types.

    Parameters
    ----------
    batch
        In the format ``"pyarrow"`` or ``"numpy"``. The latter cannot tell null from NaN.

    Raises
    ------
    TypeError
        A batch in another format.
    """
    if isinstance(batch, Mapping):
        columns: dict[str, Sequence[Any]] = {k: _plain(v) for k, v in batch.items()}
        count = len(next(iter(columns.values()), ()))
        return [{name: values[i] for name, values in columns.items()} for i in range(count)]
    to_pylist = getattr(batch, "to_pylist", None)
    if to_pylist is None:
        raise TypeError(
            f"batch_format must be 'pyarrow' or 'numpy', got a batch of type {type(batch).__name__}"
        )
    rows: list[dict[str, Any]] = to_pylist()
    return rows


def _plain(value: object) -> Any:  # noqa: ANN401 - whatever a table holds
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        # Numpy has integers with gaps as floats.
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _without_nulls(row: Row) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if value is not None}
    if isinstance(kept.get("params"), Mapping):
        params = {key: value for key, value in kept["params"].items() if value is not None}
        kept["params"] = params
    return kept


def index_of(name: str | int | None) -> int:
    """Return a 64-bit number that follows from an id; 3 and "3" have two."""
    digest = hashlib.blake2b(json.dumps(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
