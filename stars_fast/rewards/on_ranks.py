"""A reward model where several ranks run one engine: rewards are rank 0's, on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch
from transformers import AutoConfig, PreTrainedModel

from stars_fast.distributed import ALONE, Ranks
from stars_fast.errors import RewardError
from stars_fast.models.load import same_device
from stars_fast.models.sharded import num_shards, why_not_sharded
from stars_fast.reward import rewards_of
from stars_fast.rewards.base import Prompt, ScoreJob, Scorer
from stars_fast.rewards.load_several import RewardModelsLike
from stars_fast.rewards.log_ratio import LogRatio
from stars_fast.rewards.persona import Persona

__all__ = ["ScorerOnRanks", "load_on_ranks"]

_log = logging.getLogger(__name__)


def load_on_ranks(
    load: Callable[[Ranks], Scorer],
    reward_model: RewardModelsLike,
    ranks: Ranks,
    *,
    device: torch.device | str | None = None,
) -> Scorer:
    """Load a reward model split over the ranks where that can be, else on rank 0 alone.

    Parameters
    ----------
    load
        Loads it, split over the ranks that it is given.
    reward_model
        What it loads. Split are models by name whose architecture can be, loaded models that are
        already, a `Persona`, and both models of a `LogRatio`; functions, encoders, and what is on
        another device are not. Of several all are, or none.
    ranks
        Those of the language model.
    device
        That the user wants it on; None: where the language model is.

    Raises
    ------
    Exception
        What `load` raises, on every rank.
    """
    reason = _why_alone(reward_model, ranks, device)
    if not reason:
        return ScorerOnRanks(load(ranks), ranks, everywhere=True)
    scorer: Scorer | None = None
    failure: Exception | None = None
    if ranks.rank == 0:
        _log.info("the reward model runs on rank 0 alone: %s", reason)
        try:
            scorer = load(ALONE)
        except Exception as error:  # noqa: BLE001 - raised below
            failure = error
    message = ranks.first("" if failure is None else f"{type(failure).__name__}: {failure}")
    if message:
        raise failure or ValueError(f"on rank 0: {message}")
    return ScorerOnRanks(scorer, ranks, everywhere=False)


def _why_alone(
    reward_model: RewardModelsLike, ranks: Ranks, device: torch.device | str | None
) -> str:
    several = rewards_of(reward_model)
    if several is not None:
        reasons = ((r.name, _why_alone(r.model, ranks, r.device or device)) for r in several)
        return next((f"of {name!r} {reason}" for name, reason in reasons if reason), "")
    if isinstance(reward_model, Persona):
        return ""
    elsewhere = device is not None and not same_device(
        torch.device(device), torch.device(ranks.device or "cpu")
    )
    if isinstance(reward_model, LogRatio):
        if elsewhere and reward_model.reference is None:
            raise ValueError(
                "reward_device must be None for a LogRatio without a reference where "
                f"tensor_parallel=True, got {device}: every rank has a part of the language model"
            )
        return f"it is to be on {device}" if elsewhere else ""
    if isinstance(reward_model, PreTrainedModel):
        return "" if num_shards(reward_model) == ranks.size else "it was loaded whole"
    if not isinstance(reward_model, str | os.PathLike):
        return "it is a function"
    if elsewhere:
        return f"it is to be on {device}"
    try:
        config = AutoConfig.from_pretrained(os.fspath(reward_model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        return str(error)  # which loading it will say better
    return why_not_sharded(config, ranks.size)


class ScorerOnRanks(Scorer):
    """Rank 0's rewards for every rank, which must all make the same calls.

    Floating-point sums may differ between ranks, and functions may be random or know what happened
    before; a reward that is compared with a threshold must not.

    Parameters
    ----------
    scorer
        The reward model, of which each rank has a share or rank 0 has all; None where it has none.
    ranks
        Those that call.
    everywhere
        Whether each rank has a share.
    """

    def __init__(self, scorer: Scorer | None, ranks: Ranks, *, everywhere: bool) -> None:
        self._scorer = scorer
        self._ranks = ranks
        self._everywhere = everywhere
        # Nobody reads the texts where there is no model.
        self.needs_text = scorer is not None and scorer.needs_text
        self.device = None if scorer is None else scorer.device
        self._tokens: dict[int, int] = {}
        self._stats: dict[str, int] = dict.fromkeys(("rm_jobs", "rm_calls", "rm_tokens"), 0)

    @property
    def devices(self) -> frozenset[torch.device]:
        """Devices of the models that are here."""
        return frozenset() if self._scorer is None else self._scorer.devices

    @property
    def modules(self) -> list[PreTrainedModel]:
        """The models that are here."""
        return [] if self._scorer is None else self._scorer.modules

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Admit a request, or refuse it on every rank; see `Scorer.start`."""
        failure: Exception | None = None
        if self._scorer is not None:
            try:
                self._scorer.start(request, prompt, max_response_tokens)
            except Exception as error:
                if self._everywhere:
                    raise  # lengths and tokens are all that it depends on: the others do, too
                failure = error
        if not self._everywhere:
            message = self._ranks.first("" if failure is None else str(failure))
            if message or failure is not None:
                raise failure or ValueError(message)

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Score every job on the ranks that can; see `Scorer.score`."""
        rewards: list[float | Exception] = []
        if self._scorer is not None:
            try:
                rewards = self._scorer.score(jobs)
            except Exception as error:
                if self._everywhere:
                    raise
                rewards = [RewardError(f"{type(error).__name__}: {error}")] * len(jobs)
            for request, tokens in self._scorer.take_tokens().items():
                self._tokens[request] = self._tokens.get(request, 0) + tokens
            self._stats = self._scorer.stats()
        # Of errors only the text is sent: not every one survives pickling.
        sent = [str(reward) if isinstance(reward, Exception) else reward for reward in rewards]
        found, self._tokens, self._stats = self._ranks.first((sent, self._tokens, self._stats))
        return [RewardError(reward) if isinstance(reward, str) else reward for reward in found]

    def keep(self, request: int, branch: int) -> None:
        """See `Scorer.keep`."""
        if self._scorer is not None:
            self._scorer.keep(request, branch)

    def accept(self, request: int, branch: int) -> None:
        """See `Scorer.accept`."""
        if self._scorer is not None:
            self._scorer.accept(request, branch)

    def fork(self, source: int, target: int) -> None:
        """See `Scorer.fork`."""
        if self._scorer is not None:
            self._scorer.fork(source, target)

    def prune(self, request: int) -> None:
        """See `Scorer.prune`."""
        if self._scorer is not None:
            self._scorer.prune(request)

    def finish(self, request: int) -> None:
        """Forget the request."""
        if self._scorer is not None:
            self._scorer.finish(request)

    def take_tokens(self) -> dict[int, int]:
        """Return the tokens run for each request up to the last call of `score`."""
        taken, self._tokens = self._tokens, {}
        return taken

    def stats(self) -> dict[str, int]:
        """Return the counters of `Scorer.stats`; rank 0's of the last call where it is alone."""
        return dict(self._stats) if self._scorer is None else self._scorer.stats()
