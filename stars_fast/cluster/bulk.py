"""A data set through several engines, by Ray Data.

    rows = read_rows("prompts.jsonl")
    calibration = calibrate(rows, "MODEL", "REWARD_MODEL", params=params, num_gpus=1)
    results = map_rows(ray.data.from_items(rows), "MODEL", "REWARD_MODEL", workers=4, num_gpus=1,
                       params=params, calibration=calibration)
    write_records(results, "results/")

A row's draws follow from the seed of the run and its own line, so the outputs are those of
``stars-fast generate`` with the same file and seed: whichever worker runs the row, in whichever
batch, and however often, because one was killed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stars_fast.cluster.engines import calibrate, load_engine
from stars_fast.cluster.rows import Row, line_of, request_of, rows_of
from stars_fast.outputs import Calibration
from stars_fast.params import StarsParams
from stars_fast.records import InputRecord, error_record, result_record

if TYPE_CHECKING:
    import pandas as pd
    from ray.data import Dataset

    from stars_fast.rewards.load_several import RewardModelsLike

__all__ = ["StarsMapper", "calibrate", "map_rows"]


class StarsMapper:
    """An engine that answers batches of rows; for `ray.data.Dataset.map_batches`.

    `map_rows` calls that with the options that it needs.

    Parameters
    ----------
    model, reward_model
        As for `Engine`, without models in memory; None for `model` is the demo's pair.
        Directories must exist on every machine.
    params
        Default parameters of a row's request.
    seed
        Seed of the run.
    calibration
        Calibration for ``target_reward="auto"`` and None, from `calibrate`, so that all workers
        test against the same target. Without it, such a row is an error.
    options
        Other options of `Engine`.
    """

    def __init__(
        self,
        model: str | None,
        reward_model: RewardModelsLike | None = None,
        *,
        params: StarsParams | None = None,
        seed: int = 0,
        calibration: Calibration | None = None,
        **options: Any,
    ) -> None:
        self._engine = load_engine(model, reward_model, seed, options)
        self._engine.calibration = calibration
        self._params = params or StarsParams()
        self._seed = seed

    def __call__(self, batch: object) -> pd.DataFrame:
        """Return a record for each row, as ``stars-fast generate`` writes them.

        Parameters
        ----------
        batch
            Rows, see `stars_fast.cluster.rows`; in the format ``"pyarrow"`` or ``"numpy"``.

        Returns
        -------
        DataFrame
            Columns ``id``, ``line`` (0 where the row has none), ``prompt``, ``outputs``,
            ``error``: Python objects, in the order of the rows. A row that is not a request, or
            fails, has its `error` and affects no other.
        """
        import pandas as pd

        # As objects: tables of Arrow or pandas would change None and mixed types.
        return pd.DataFrame(self.records(rows_of(batch)), dtype=object)

    def records(self, rows: Iterable[Row]) -> list[dict[str, Any]]:
        """Return the record of each row, in order."""
        engine = self._engine
        records: dict[int, dict[str, Any]] = {}
        running: dict[str, tuple[int, InputRecord]] = {}
        for number, row in enumerate(rows):
            request = None
            try:
                request = request_of(row, self._params, self._seed)
                self._check_target(request.params)
                engine.add_request(str(number), request.prompt, request.params)
            except (ValueError, TypeError) as error:
                records[number] = error_record(_line(row), request, str(error))
            else:
                running[str(number)] = (number, request)
        try:
            while engine.has_unfinished():
                for output in engine.step():
                    if output.finished:
                        number, request = running[output.request_id]
                        records[number] = result_record(request, output)
        except BaseException:
            for name in running:
                engine.abort(name)
            raise
        return [record for _, record in sorted(records.items())]

    def _check_target(self, params: StarsParams) -> None:
        if params.needs_calibration and self._engine.calibration is None:
            raise ValueError(
                f"target_reward must be a number for method {params.method!r}, got "
                f"{params.target_reward!r}; calibrate(...) once, and pass calibration="
            )


def map_rows(
    dataset: Dataset,
    model: str | None,
    reward_model: RewardModelsLike | None = None,
    *,
    workers: int,
    batch_size: int = 512,
    num_cpus: float = 1,
    num_gpus: float = 0,
    params: StarsParams | None = None,
    seed: int = 0,
    calibration: Calibration | None = None,
    **options: Any,
) -> Dataset:
    """Run the rows of a data set on `workers` engines; returns the data set of their records.

    An actor holds each engine. An actor that dies is restarted, and the rows that it had not
    returned are repeated, with the same outputs, as often as necessary.

    Parameters
    ----------
    dataset
        Data set of rows, see `stars_fast.cluster.rows`.
    workers
        Engines.
    batch_size
        Rows that an engine gets at a time and that are lost with a worker. Several times its
        `max_rows` is best, as an engine runs empty towards the end of a batch.
    num_cpus, num_gpus
        Resources of each worker. Ray hides the GPUs from a worker that asks for none.
    model, reward_model, params, seed, calibration, options
        See `StarsMapper`.

    Raises
    ------
    ValueError
        If `workers` or `batch_size` is below 1.
    """
    from ray.data import ActorPoolStrategy

    # That actors are restarted and their batches done again, without limit, is Ray Data's default;
    # to ask for it is deprecated.
    for name, value in (("workers", workers), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return dataset.map_batches(
        StarsMapper,
        fn_constructor_args=(model, reward_model),
        fn_constructor_kwargs={
            "params": params,
            "seed": seed,
            "calibration": calibration,
            **options,
        },
        # One batch at a time: a second one would only wait in the worker that may be killed.
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def _line(row: Row) -> int:
    try:
        return line_of(row) or 0
    except ValueError:
        return 0
