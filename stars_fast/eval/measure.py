"""Measurements of finished responses: rewards, log-probabilities under the base, verdicts.

Each measurement is a column of the responses' records, with the name of what it was made by beside
it (``gold``, ``gold_error``, ``gold_by``). So it is made once, again where it had failed, and anew
where another scorer is asked for, without running the methods again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stars_fast.eval.datasets import Item
from stars_fast.eval.judge import JudgeError, PairJudge
from stars_fast.eval.store import Record, Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SAVE_SECONDS = 60.0  # of work that an interruption may cost

Rows = Sequence[Record]


class Scores(Protocol):
    """What `TextScorer` does."""

    def score(self, prompts: Sequence[Any], responses: Sequence[str], /) -> list[float | Exception]:
        """Return the reward of each response, or why there is none."""
        ...


class Saver:
    """Saves a store now and then, and at the end, also of a failure."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._saved = time.monotonic()
        self._changed = False

    def __enter__(self) -> Saver:
        return self

    def changed(self) -> None:
        """Note a change."""
        self._changed = True
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self._save()

    def __exit__(self, *_: object) -> None:
        if self._changed:
            self._save()

    def _save(self) -> None:
        self._store.save()
        self._saved = time.monotonic()
        self._changed = False


def unmeasured(runs: Iterable[Rows], column: str, by: str) -> list[Rows]:
    """Return, of each run, the responses that lack a measurement; runs that lack none are left out.

    Parameters
    ----------
    runs
        The runs' responses.
    column
        ``"reward"``, ``"gold"``, ``"gold:NAME"``, ``"base_logprob"`` or ``"judge"``.
    by
        Name of what measures.
    """
    lacking = [
        [
            row
            for row in rows
            if row["error"] is None
            and (row.get(f"{column}_by") != by or row.get(f"{column}_error") is not None)
        ]
        for rows in runs
    ]
    return [rows for rows in lacking if rows]


def score_rows(
    runs: Iterable[Rows],
    column: str,
    by: str,
    scores: Scores,
    items: Mapping[int, Item],
    saver: Saver,
    *,
    by_answer: bool = False,
) -> None:
    """Fill a column of rewards, of whole responses: with the opening, where there is one.

    With several rewards, those that one is made of are in the column with an ``s``, by name.

    Parameters
    ----------
    runs
        From `unmeasured`; changed.
    column, by
        As for `unmeasured`.
    scores
        The reward.
    items
        The prompts, by number.
    saver
        Told of each run.
    by_answer
        Whether `scores` gets the answers in place of the prompts.
    """
    from stars_fast.rewards.combine import CombinedReward

    for rows in runs:
        asked = [items[row["number"]] for row in rows]
        prompts = [(item.answer or "") if by_answer else item.prompt for item in asked]
        texts = [items[row["number"]].whole(row["text"]) for row in rows]
        values = scores.score(prompts, texts)
        for row, value in zip(rows, values, strict=True):
            failed = isinstance(value, Exception)
            row[column] = None if isinstance(value, Exception) else float(value)
            if isinstance(value, CombinedReward):
                row[f"{column}s"] = value.rewards
            row[f"{column}_error"] = str(value) or type(value).__name__ if failed else None
            row[f"{column}_by"] = by
        saver.changed()


def base_logprob_rows(
    runs: Iterable[Rows],
    by: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    alike: bool,
    items: Mapping[int, Item],
    saver: Saver,
) -> None:
    """Fill in log-probabilities under the base model of responses that another model has drawn.

    Parameters
    ----------
    runs, by, items, saver
        As for `score_rows`.
    model, tokenizer
        The base.
    alike
        Whether the token ids of the responses mean the same to `tokenizer`; where not, the text is
        read again, and ``same_tokens`` of the record is False: log-probabilities of unlike tokens
        cannot be compared.
    """
    from stars_fast.eval.fluency import response_logprobs
    from stars_fast.prompts import PromptReader

    reader = PromptReader(tokenizer, sys.maxsize, None)
    for rows in runs:
        pairs = []
        for row in rows:
            ids = row["token_ids"]
            if not alike and tokenizer is not None:
                ids = list(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
            pairs.append((reader.read(items[row["number"]].prompt, 0).token_ids, ids))
        for row, (_, ids), value in zip(rows, pairs, response_logprobs(model, pairs), strict=True):
            row |= {"base_logprob": value, "base_tokens": len(ids), "same_tokens": alike}
            row["base_logprob_by"] = by
        saver.changed()


def judge_rows(
    runs: Iterable[Rows],
    by: str,
    judge: PairJudge,
    reference: Mapping[int, Record],
    saver: Saver,
    answered: Callable[[], object],
) -> None:
    """Fill in a judge's verdicts against the reference: for each order 1 won, 0 lost, 0.5 a tie.

    Parameters
    ----------
    runs, by, saver
        As for `score_rows`.
    judge
        The judge.
    reference
        The reference's responses with the same seed, by number.
    answered
        Called after each comparison.
    """
    for rows in runs:
        asked = [(row, reference[row["number"]]) for row in rows if row["number"] in reference]
        pairs = [(row["prompt"] or "", row["text"], other["text"]) for row, other in asked]
        for place, result in judge.compare_all(pairs):
            row = asked[place][0]
            failed = isinstance(result, JudgeError)
            row["judge"] = None if isinstance(result, JudgeError) else list(result)
            row["judge_error"] = str(result) if failed else None
            row["judge_by"] = by
            answered()
            saver.changed()
