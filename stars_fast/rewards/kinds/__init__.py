"""The kinds of reward models that load from a directory, a file each, in the order of asking."""

from __future__ import annotations

from stars_fast.errors import UnsupportedModelError
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import CALLABLE_ADVICE, Checkpoint, Loading
from stars_fast.rewards.kinds.base import Kind, Loaded
from stars_fast.rewards.kinds.classifier import CLASSIFIER, TOKEN_CLASSIFIER
from stars_fast.rewards.kinds.gated import GATED
from stars_fast.rewards.kinds.language_model import LANGUAGE_MODEL
from stars_fast.rewards.kinds.mlp_head import MLP_HEAD
from stars_fast.rewards.kinds.uncertain import UNCERTAIN
from stars_fast.rewards.kinds.value_head import VALUE_HEAD

__all__ = ["KINDS", "Kind", "Loaded", "load_kind"]

#: The first that fits is taken: the ones that are known by more come first.
KINDS = (
    GATED,
    UNCERTAIN,
    MLP_HEAD,
    VALUE_HEAD,
    TOKEN_CLASSIFIER,
    LANGUAGE_MODEL,
    CLASSIFIER,
)


def load_kind(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    """Load a reward model as the kind that it is.

    Raises
    ------
    UnsupportedModelError
        If it is of none.
    ModelLoadError, ValueError
        As the kind's `load`.
    """
    for kind in KINDS:
        if kind.fits(checkpoint, head):
            return kind.load(checkpoint, head, how)
    name = checkpoint.architecture or "a model without a class name"
    if checkpoint.remote_code:
        raise UnsupportedModelError(
            f"{checkpoint.name} is {name}, which needs its own remote code: {CALLABLE_ADVICE}"
        )
    raise UnsupportedModelError(
        f"{checkpoint.name} is {name}, and transformers has no sequence classifier of that "
        f"family: {CALLABLE_ADVICE}"
    )
