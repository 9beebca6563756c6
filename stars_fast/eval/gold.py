"""Rewards of whole responses, from the decoding reward model and from the gold reward."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stars_fast.errors import RewardError
from stars_fast.prompts import PromptValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stars_fast.rewards.base import ScoreJob, Scorer
    from stars_fast.text.image_prompts import ImageReader

RewardFunction = Callable[[list[str], list[str]], list[float]]


def gold_source(text: str) -> str | RewardFunction:
    """Find the gold reward that the user names.

    Parameters
    ----------
    text
        ``"demo"``: the grammar of the demo's reviews. ``"module:function"``: a function
        ``f(prompts, responses) -> list[float]``, or with a parameter ``images`` too, its module
        imported from the working directory or from what is installed. ``"math"``: the answers of
        the records, see `MathScores`. Otherwise a directory or hub id of a reward model.

    Returns
    -------
    The function, ``"math"``, or the directory or id.

    Raises
    ------
    ValueError
        There is no such module or function, or the import fails.
    """
    if text == "demo":
        return _demo_gold
    if ":" not in text or Path(text).exists():
        return text
    module_name, _, function_name = text.partition(":")
    try:
        with _importable(Path.cwd()):
            module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"module {module_name!r} has no function {function_name!r}")
    found: RewardFunction = function
    return found


def _demo_gold(prompts: list[str], responses: list[str]) -> list[float]:
    from stars_fast.demo import gold_score

    return [gold_score(response) for response in responses]


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, os.fspath(folder))
    try:
        yield
    finally:
        sys.path.remove(os.fspath(folder))


class TextScorer:
    """Scores whole responses independently: a failing one affects no other.

    Parameters
    ----------
    scorer
        The reward, as the engine drives it.
    tokenizer
        The language model's, for prompts and responses.
    images
        What reads the images of prompts, see `PromptReader`.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase | None,
        images: ImageReader | str | None = None,
    ) -> None:
        from stars_fast.prompts import PromptReader

        self._scorer = scorer
        self._tokenizer = tokenizer
        # Ids and lengths were checked when the prompts were run; here they are only read.
        self._reader = PromptReader(tokenizer, sys.maxsize, None, images=images)
        self._handles = itertools.count()

    def score(
        self, prompts: Sequence[PromptValue], responses: Sequence[str]
    ) -> list[float | Exception]:
        """Return the reward of each response to its prompt, or why there is none."""
        from stars_fast.rewards.base import ScoreJob

        results: list[float | Exception] = [RewardError("not scored")] * len(prompts)
        jobs: dict[int, ScoreJob] = {}
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            handle = next(self._handles)
            ids: list[int] = []
            if self._tokenizer is not None and response:
                ids = list(self._tokenizer(response, add_special_tokens=False)["input_ids"])
            try:
                self._scorer.start(handle, self._reader.read(prompt, 0), len(ids))
            except (ValueError, TypeError) as error:
                results[place] = error
            else:
                jobs[place] = ScoreJob(handle, handle, ids, response)
        try:
            for place, reward in zip(jobs, self._scored(list(jobs.values())), strict=True):
                results[place] = reward
        finally:
            for job in jobs.values():
                self._scorer.finish(job.request)
        return results

    def _scored(self, jobs: list[ScoreJob]) -> list[float | Exception]:
        import torch

        try:
            with torch.inference_mode():
                return self._scorer.score(jobs)
        except Exception as error:  # noqa: BLE001 - such as no memory for one long text
            if len(jobs) <= 1:
                return [error] * len(jobs)
        half = len(jobs) // 2
        return self._scored(jobs[:half]) + self._scored(jobs[half:])
