"""Makes one scorer of a reward model or of several; those that share a backbone run it once."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from stars_fast.config import Combine
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.lora import LoraAdapter
from stars_fast.reward import Reward, rewards_of
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.base import Scorer
from stars_fast.rewards.checkpoint import LoadedModels
from stars_fast.rewards.combine import Combination
from stars_fast.rewards.load import RewardModelLike, load_scorer
from stars_fast.rewards.persona import Persona
from stars_fast.rewards.pool import RM_POOL_SHARE
from stars_fast.rewards.several import Part, SeveralScorer

__all__ = ["RewardModelsLike", "load_rewards", "named_rewards"]

RewardModelsLike: TypeAlias = "RewardModelLike | Reward | Sequence[Reward]"

#: Fields of `RewardHead` that say which number is read at the last token.
_NUMBER = ("label", "label_weights", "token", "tokens", "activation")

#: Options of `load_scorer` that each `Reward` has of its own.
_OWN = {"template": "template", "head": "label and others", "reward_tokenizer": "tokenizer"}


def named_rewards(reward_model: object, **options: object) -> tuple[Reward, ...] | None:
    """Return the rewards of a list; None: it is one model, without a name.

    Parameters
    ----------
    reward_model
        The user's.
    options
        `template`, `head` and `reward_tokenizer` of `load_scorer`, which are of one model.

    Raises
    ------
    ValueError, TypeError
        If the rewards do not go together, one is a `Persona`, or one of the options is given.
    """
    rewards = rewards_of(reward_model)
    if rewards is None:
        return None
    for option, own in _OWN.items():
        if options.get(option) is not None:
            name = option if option.startswith("reward_") else f"reward_{option}"
            raise ValueError(f"{name} is for one reward model: give each Reward its own {own}")
    for reward in rewards:
        if isinstance(reward.model, Persona):
            raise ValueError(
                f"model of reward {reward.name!r} must not be a Persona, whose values are of "
                "segments: give it as reward_model, by itself"
            )
    return rewards


def load_rewards(
    reward_model: RewardModelsLike,
    *,
    combine: Combine = "sum",
    combine_stds: float = 1.0,
    device: Any = None,  # noqa: ANN401 - as `load_scorer` has it
    **options: Any,
) -> Scorer:
    """Make the scorer of a reward model, or of several.

    Rewards of one loaded model, or of one directory, run it once if nothing but the number that is
    read from its head tells them apart; where their templates or tokenizers do, too, they share its
    weights. Of adapters each is a model of its own.

    Parameters
    ----------
    reward_model : str, path, PreTrainedModel, Persona, callable, RewardModel, Reward or a list
        As for `load_scorer`, or named rewards; then results are `CombinedReward`.
    combine, combine_stds
        See `Combination`.
    device
        For rewards without a device of their own.
    options
        Others of `load_scorer`.

    Raises
    ------
    ValueError, TypeError, ModelLoadError, UnsupportedModelError
        As `load_scorer` and `named_rewards`.
    """
    own = {option: options.get(option) for option in _OWN}
    rewards = named_rewards(reward_model, **own)
    if rewards is None:
        return load_scorer(reward_model, device=device, **options)  # type: ignore[arg-type]
    groups: dict[Hashable, list[int]] = {}
    for place, reward in enumerate(rewards):
        groups.setdefault(_backbone(reward), []).append(place)
    parts = []
    loaded: LoadedModels = {}
    for places in groups.values():
        members = [rewards[place] for place in places]
        first = members[0]
        heads: list[RewardHead] = []
        for member in members:
            if member.head not in heads:
                heads.append(member.head)
        try:
            scorer = load_scorer(
                first.model,
                **options
                | {
                    "head": heads,
                    "template": first.template,
                    "reward_tokenizer": first.tokenizer,
                    "device": device if first.device is None else first.device,
                    "pool_share": RM_POOL_SHARE / len(groups),
                    "loaded_models": loaded,
                },
            )
        except (ValueError, TypeError) as error:
            raise _about(error, members) from error
        names = tuple(member.name for member in members)
        each = tuple(heads.index(member.head) for member in members)
        parts.append(Part(scorer, names, tuple(places), each))
    return SeveralScorer(parts, Combination(rewards, combine, combine_stds))


def _about(error: Exception, rewards: Sequence[Reward]) -> Exception:
    """Return an error of the same kind that says which rewards it is about."""
    kinds = (ModelLoadError, UnsupportedModelError, TypeError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
    return kind(f"reward {', '.join(repr(one.name) for one in rewards)}: {error}")


def _backbone(reward: Reward) -> Hashable:
    """Return what is equal for rewards that are read from the same passes."""
    model, head, template = reward.model, reward.head, reward.template
    number = {name: getattr(head, name) for name in _NUMBER}
    if head != RewardHead(**number):
        return reward.name  # read in another way than at the last token
    how = (
        id(reward.tokenizer),
        template if isinstance(template, str) else id(template),
        str(reward.device),
        head.of_tokens,
        head == RewardHead(),  # a model's own reward may be read at more than the last token
    )
    if isinstance(model, PreTrainedModel):
        return (id(model), *how)
    if isinstance(model, str | os.PathLike) and LoraAdapter.find(os.fspath(model)) is None:
        source = os.fspath(model)
        return (str(Path(source).resolve()) if Path(source).exists() else source, *how)
    return reward.name  # a function; what it runs is not known
