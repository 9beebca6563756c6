"""Implicit rewards: the log-ratio of two language models, such as a DPO model and its reference.

A policy trained by direct preference optimisation is a reward model as well: its reward is
r(x, y) = beta log(p_policy(y | x) / p_reference(y | x)), up to a term of the prompt alone (Rafailov
et al. 2023, arXiv 2305.18290, equation 5).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from stars_fast.config import LanguageModelLike
from stars_fast.models.load import adapted_model
from stars_fast.rewards.base import Prompt, ScoreJob, Scorer, finite_reward
from stars_fast.rewards.causal import CausalScorer

__all__ = ["LogRatio", "LogRatioScorer", "Over"]

Over = Literal["response", "segment"]


@dataclass(frozen=True)
class LogRatio:
    """The reward beta (log p_policy(y | x) - log p_reference(y | x)), r(x) being 0.

    Both models read the prompt and the tokens that the language model reads and draws, at
    temperature 1 and without filters.

    Parameters
    ----------
    policy : str, path or PreTrainedModel
        A causal language model: a directory (a LoRA adapter's, too), a hub id, or one that is
        loaded. An adapter whose base is the engine's language model shares its weights.
    reference : str, path, PreTrainedModel or None
        What the policy was trained from; None: the engine's language model.
    beta : float
        Finite and not 0. A policy that is to be avoided has a negative one.
    over : str
        ``"response"``: y is the response so far. ``"segment"``: y is the new segment alone, and x
        all before it.

    Raises
    ------
    ValueError, TypeError
        If one of them is anything else.
    """

    policy: LanguageModelLike
    reference: LanguageModelLike | None = None
    beta: float = 1.0
    over: Over = "response"

    def __post_init__(self) -> None:
        for name in ("policy", "reference"):
            value = adapted_model(getattr(self, name))
            if name == "reference" and value is None:
                continue
            if not isinstance(value, str | os.PathLike | PreTrainedModel):
                raise TypeError(
                    f"{name} of a LogRatio must be a directory, a hub id or a transformers causal "
                    f"language model, got {type(value).__name__}"
                )
            if not isinstance(value, PreTrainedModel) and not os.fspath(value):
                raise ValueError(f"{name} of a LogRatio must not be empty")
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float):
            raise TypeError(f"beta of a LogRatio must be a number, got {self.beta!r}")
        if not math.isfinite(self.beta) or self.beta == 0:
            raise ValueError(f"beta of a LogRatio must be finite and not 0, got {self.beta}")
        if self.over not in get_args(Over):
            raise ValueError(
                f"over of a LogRatio must be one of {', '.join(get_args(Over))}, got {self.over!r}"
            )

    @classmethod
    def of(cls, text: str) -> LogRatio:
        """Return the one of ``POLICY[,REFERENCE][,beta=FLOAT][,over=segment]``, on command lines.

        Raises
        ------
        ValueError
            If the text is not of that form.
        """
        names: list[str] = []
        options: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if not equals or key not in ("beta", "over"):
                names.append(part)
            elif key in options:
                raise ValueError(f"{key} is given twice in {text!r}")
            else:
                options[key] = value
        if not 1 <= len(names) <= 2 or not all(names):
            raise ValueError(
                f"must be POLICY[,REFERENCE][,beta=FLOAT][,over=segment], got {text!r}"
            )
        try:
            beta = float(options.get("beta", 1.0))
        except ValueError:
            raise ValueError(f"beta must be a number, got {options['beta']!r}") from None
        over = options.get("over", "response")
        return cls(*names, beta=beta, over=over)  # type: ignore[arg-type, misc]


class LogRatioScorer(Scorer):
    """Two models' log-probabilities of each job, each from pages of its own.

    Parameters
    ----------
    policy, reference : CausalScorer
        Made by `log_prob_scorer`.
    beta : float
    sums : bool
        Their values are of segments, and the reward is that of the response: what was accepted is
        added.
    """

    def __init__(
        self, policy: CausalScorer, reference: CausalScorer, *, beta: float, sums: bool
    ) -> None:
        self._policy, self._reference = policy, reference
        self._both = (policy, reference)
        self._beta = beta
        self._sums = sums
        self.needs_text = policy.needs_text
        self.device = policy.device
        self.module = policy.module
        self._accepted: dict[int, float] = {}  # log-ratio of the committed text, by request
        self._scored: dict[int, dict[int, float]] = {}  # of each branch's response
        self._jobs = 0

    @property
    def devices(self) -> frozenset[torch.device]:
        """Devices of both models."""
        return self._policy.devices | self._reference.devices

    @property
    def modules(self) -> list[PreTrainedModel]:
        """Both models, or the one that they share."""
        found = [module for scorer in self._both for module in scorer.modules]
        return list({id(module): module for module in found}.values())

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Admit a request to both, or to none; see `Scorer.start`."""
        self._policy.start(request, prompt, max_response_tokens)
        try:
            self._reference.start(request, prompt, max_response_tokens)
        except ValueError:
            self._policy.finish(request)
            raise
        self._accepted[request] = 0.0
        self._scored[request] = {}

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Run both models on what is new of each job; see `Scorer.score`."""
        self._jobs += len(jobs)
        results: list[float | Exception] = []
        values = zip(jobs, *(scorer.score(jobs) for scorer in self._both), strict=True)
        for job, policy, reference in values:
            if isinstance(policy, Exception):
                results.append(policy)
                continue
            if isinstance(reference, Exception):
                results.append(reference)
                continue
            ratio = policy - reference
            if self._sums and not job.of_prompt:
                ratio += self._accepted[job.request]
                self._scored[job.request][job.branch] = ratio
            results.append(finite_reward(self._beta * ratio))
        return results

    def keep(self, request: int, branch: int) -> None:
        """Retain a branch; see `Scorer.keep`."""
        for scorer in self._both:
            scorer.keep(request, branch)

    def accept(self, request: int, branch: int) -> None:
        """Append a branch to the committed text; see `Scorer.accept`."""
        for scorer in self._both:
            scorer.accept(request, branch)
        scored = self._scored[request]
        self._accepted[request] = scored.get(branch, self._accepted[request])
        scored.clear()

    def fork(self, source: int, target: int) -> None:
        """Share the committed text of another request; see `Scorer.fork`."""
        for scorer in self._both:
            scorer.fork(source, target)
        self._accepted[target] = self._accepted[source]
        self._scored[target].clear()

    def prune(self, request: int) -> None:
        """Drop every branch but the kept one."""
        for scorer in self._both:
            scorer.prune(request)

    def finish(self, request: int) -> None:
        """Forget the request and free its pages."""
        for scorer in self._both:
            scorer.finish(request)
        self._accepted.pop(request, None)
        self._scored.pop(request, None)

    def take_tokens(self) -> dict[int, int]:
        """Return the tokens run for each request, in both models; see `Scorer.take_tokens`."""
        return dict(Counter(self._policy.take_tokens()) + Counter(self._reference.take_tokens()))

    def stats(self) -> dict[str, int]:
        """Return the counters of `CausalScorer.stats`, both models' together; jobs once."""
        mine, theirs = self._policy.stats(), self._reference.stats()
        return {name: mine[name] + theirs[name] for name in mine} | {"rm_jobs": self._jobs}
