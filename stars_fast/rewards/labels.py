"""From the outputs of a head to the reward: one label, a weighted sum, log-odds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from stars_fast.errors import UnsupportedModelError
from stars_fast.reward_head import RewardHead

__all__ = ["Readout", "label_readout", "token_readout"]

#: From the outputs [N, L] of a head to rewards [N], float32.
Readout = Callable[[Tensor], Tensor]


def label_readout(head: RewardHead, config: PretrainedConfig, labels: int, name: str) -> Readout:
    """Return how the reward is read from a classifier's logits.

    Parameters
    ----------
    head : RewardHead
        What the user asks for.
    config : PretrainedConfig
        Its ``id2label`` has the labels' names.
    labels : int
        How many there are.
    name : str
        Of the model, for errors.

    Raises
    ------
    UnsupportedModelError
        If there are several labels and the user asks for none.
    ValueError
        If there is no such label, or a token is asked for.
    """
    if head.of_tokens:
        raise ValueError(
            f"reward_head asks for a token, which a language model has; {name} has labels"
        )
    if head.label is not None:
        index = _label(head.label, config, labels, name)
        if head.activation == "log_odds" and labels < 2:
            raise ValueError(f"activation='log_odds' of reward_head needs two labels in {name}")
        return _activated(head, _one(index) if labels < 2 else _of_one(head, index))
    if head.label_weights is not None:
        weights = {
            _label(key, config, labels, name): weight for key, weight in head.label_weights.items()
        }
        if len(weights) < len(head.label_weights):
            raise ValueError("label_weights of reward_head names a label twice")
        return _weighted(weights)
    if labels != 1:
        raise UnsupportedModelError(
            f"{name} has a head of {labels} labels ({', '.join(_names(config, labels))}), and a "
            "reward is one number: pass reward_head, such as RewardHead(label=...), "
            "RewardHead(label=..., activation='log_odds') or RewardHead(label_weights={...})"
        )
    return _activated(head, _one(0))


def token_readout(head: RewardHead, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Readout:
    """Return how the reward is read from a language model's logits.

    Raises
    ------
    ValueError
        If a text is not one token, or an id is out of range.
    """
    if head.tokens is not None:
        first, second = (_token(token, tokenizer, vocab) for token in head.tokens)
        if first == second:
            raise ValueError(f"tokens of reward_head must differ, both are id {first}")
        return _activated(head, _weighted({first: 1.0, second: -1.0}))
    assert head.token is not None
    return _activated(head, _of_one(head, _token(head.token, tokenizer, vocab)))


def _of_one(head: RewardHead, index: int) -> Readout:
    """Return the logit, or the log-odds where the activation is of them."""
    return _one(index) if head.activation == "none" else _log_odds(index)


def _activated(head: RewardHead, readout: Readout) -> Readout:
    """Return the probability of what a readout gives the log-odds of, if that is asked for."""
    if head.activation != "probability":
        return readout
    return lambda logits: readout(logits).sigmoid()


def _one(index: int) -> Readout:
    return lambda logits: logits[:, index].float()


def _weighted(weights: dict[int, float]) -> Readout:
    columns, factors = list(weights), list(weights.values())

    def read(logits: Tensor) -> Tensor:
        chosen = logits[:, columns].float()
        return chosen @ torch.tensor(factors, device=chosen.device)

    return read


def _log_odds(index: int) -> Readout:
    def read(logits: Tensor) -> Tensor:
        logits = logits.float()
        others = torch.cat((logits[:, :index], logits[:, index + 1 :]), dim=1)
        return logits[:, index] - others.logsumexp(dim=1)

    return read


def _names(config: PretrainedConfig, labels: int) -> list[str]:
    names = getattr(config, "id2label", None) or {}
    return [str(names.get(number, number)) for number in range(labels)]


def _label(label: int | str, config: PretrainedConfig, labels: int, name: str) -> int:
    names = _names(config, labels)
    if label in names:
        return names.index(str(label))
    number = int(label) if isinstance(label, int) or label.isdecimal() else -1
    if not 0 <= number < labels:
        raise ValueError(
            f"reward_head names label {label!r}; the labels of {name} are "
            f"{', '.join(f'{i} ({text})' for i, text in enumerate(names))}"
        )
    return number


def _token(token: int | str, tokenizer: PreTrainedTokenizerBase, vocab: int) -> int:
    if isinstance(token, str):
        ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"reward_head names token {token!r}, which is {len(ids)} tokens of the reward "
                f"model, {ids}: give a text that is one, or an id"
            )
        token = ids[0]
    if not 0 <= token < vocab:
        raise ValueError(f"token ids of reward_head must lie in [0, {vocab}), got {token}")
    return token
