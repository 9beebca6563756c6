"""Records of a data set in files, so that an interrupted run can continue.

A folder holds files of output lines of ``stars-fast generate``. Each is written by one task, whole,
under a name of its own; a task that is done again writes the same file again. What a killed run
leaves may end in a torn line, which is no record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from stars_fast.cluster.rows import Row, line_of, request_of
from stars_fast.params import StarsParams
from stars_fast.records import Done, output_record, write_record

if TYPE_CHECKING:
    from ray.data import Dataset


def write_records(dataset: Dataset, folder: str | Path) -> None:
    """Run a data set of records, and write each block of them to a file in `folder`.

    Parameters
    ----------
    dataset
        From `stars_fast.cluster.bulk.map_rows`.
    folder
        Where every machine can write: a shared file system or, as text, a URL that Ray knows. It
        is made if it is not there; files in it stay.
    """
    from ray.data.block import BlockAccessor
    from ray.data.datasource import BlockBasedFileDatasink

    class RecordFiles(BlockBasedFileDatasink):
        """Output lines, a file for each block."""

        def write_block_to_file(self, block: BlockAccessor, file: BinaryIO) -> None:
            rows: Iterable[Row] = block.iter_rows(public_row_format=True)
            for row in rows:
                write_record(file, dict(row))

    dataset.write_datasink(RecordFiles(str(folder), file_format="jsonl"))


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """Return the records of a folder by rising line, one for each.

    A line that failed in one run and was done in a later one has only its result. Records
    without a line come last and are all returned.
    """
    numbered: dict[int, dict[str, Any]] = {}
    others = []
    for record in _records(Path(folder)):
        line = record["line"]
        if line == 0:
            others.append(record)
        elif line not in numbered or numbered[line]["error"] is not None:
            numbered[line] = record
    return [record for _, record in sorted(numbered.items())] + others


def remaining(
    rows: Iterable[Row], folder: str | Path, params: StarsParams | None = None
) -> list[Row]:
    """Return the rows without a result in `folder`: those to run when a run continues.

    Errors are not results. Rows without a line always remain. `params` are those of the run.

    Raises
    ------
    ValueError
        If the folder was made from other rows.
    """
    base, done = params or StarsParams(), Done()
    for record in _records(Path(folder)):
        if record["error"] is None and record["line"] > 0:
            done.add(record["line"], record["id"], record["prompt"])
    return [row for row in rows if not _is_done(row, base, done)]


def _is_done(row: Row, base: StarsParams, done: Done) -> bool:
    try:
        if line_of(row) is None:
            return False
        request = request_of(row, base, seed=0)
    except (ValueError, TypeError):
        return False
    return done.has(request)


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as file:
            for raw in file:
                record = output_record(raw)
                if record is not None:
                    yield record
