"""A language model whose reward is the logit, or the log-odds, of the token behind the template.

Nemotron's reward model (token 0), verdicts of "Yes" and "No", "+" and "-".
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.logits import LogitHead
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import CALLABLE_ADVICE, Checkpoint, Loading
from stars_fast.rewards.kinds.base import Kind, Loaded
from stars_fast.rewards.labels import token_readout
from stars_fast.rewards.reading import LOGIT_BYTES, LastToken

__all__ = ["LANGUAGE_MODEL", "of_language_model"]

_NATIVE = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def of_language_model(model: PreTrainedModel, head: RewardHead, name: str) -> Loaded:
    """Return how the reward of a loaded language model is read.

    Raises
    ------
    UnsupportedModelError
        If no token is asked for, or the logits cannot be had from the last hidden state.
    """
    _check_asked(head, name, type(model).__name__)
    logits = LogitHead(model)
    rows = max(1, LOGIT_BYTES // (4 * logits.vocab_size))

    def reading(tokenizer: PreTrainedTokenizerBase) -> LastToken:
        readout = token_readout(head, tokenizer, logits.vocab_size)

        def rewards(hidden: Tensor) -> Tensor:
            return torch.cat([readout(logits(part)) for part in torch.split(hidden, rows)])

        return LastToken(rewards, None)

    return Loaded(model, reading=reading)


def _check_asked(head: RewardHead, name: str, architecture: str) -> None:
    if not head.of_tokens:
        raise UnsupportedModelError(
            f"{name} is a language model ({architecture}), without a head for rewards: say which "
            "token's logit is the reward, reward_head=RewardHead(token=...) or "
            f"RewardHead(tokens=(..., ...)), or {CALLABLE_ADVICE}"
        )


def _load(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    _check_asked(head, checkpoint.name, checkpoint.architecture)
    model, report = how.model(AutoModelForCausalLM, checkpoint.source, checkpoint.config)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{checkpoint.name} has no weights for {', '.join(missing[:4])} of "
            f"{type(model).__name__}"
        )
    return of_language_model(model, head, checkpoint.name)


LANGUAGE_MODEL = Kind(
    "token of a language model",
    lambda checkpoint, _: checkpoint.architecture in _NATIVE,
    _load,
)
