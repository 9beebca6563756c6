"""What a kind of reward model is: how it is known, and how its reward is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import Checkpoint, Loading
from stars_fast.rewards.labels import Readout
from stars_fast.rewards.reading import Reading

__all__ = ["Kind", "Loaded"]


@dataclass(frozen=True)
class Loaded:
    """A loaded model and how its reward is read: one of the two.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode.
    reading : callable, optional
        Of a causal model: from its tokenizer to where hidden states are read.
    readout : callable, optional
        Of an encoder: from its logits to rewards.
    """

    model: PreTrainedModel
    reading: Callable[[PreTrainedTokenizerBase], Reading] | None = None
    readout: Readout | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of reward model in a directory.

    Parameters
    ----------
    name : str
        As docs/rewards.md has it.
    fits : callable
        Whether a checkpoint is of this kind, the user's `RewardHead` given.
    load : callable
        Loads it; raises ModelLoadError, UnsupportedModelError or ValueError, naming what to change.
    """

    name: str
    fits: Callable[[Checkpoint, RewardHead], bool]
    load: Callable[[Checkpoint, RewardHead, Loading], Loaded]
