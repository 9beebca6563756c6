"""Classifiers of transformers' own classes, of sequences and of tokens; any that is loaded."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.reward_head import RewardHead
from stars_fast.rewards.checkpoint import CALLABLE_ADVICE, Checkpoint, Loading
from stars_fast.rewards.head import reward_module
from stars_fast.rewards.kinds.base import Kind, Loaded
from stars_fast.rewards.labels import Readout, label_readout
from stars_fast.rewards.reading import Head, LastToken

__all__ = ["CLASSIFIER", "TOKEN_CLASSIFIER", "is_encoder", "labelled", "of_classifier"]

_SEQUENCE = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
_TOKEN = frozenset(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values())


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model is of a masked-LM family, and so bidirectional."""
    decoder = getattr(config, "is_decoder", False) or config.is_encoder_decoder
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder


def num_labels(config: PretrainedConfig) -> int:
    """Return how many labels a classifier has."""
    return int(config.num_labels or 0)


def labelled(head: nn.Module | Head, readout: Readout) -> Head:
    """Return the map from hidden states to rewards: labels, then the choice among them."""

    def rewards(hidden: Tensor) -> Tensor:
        return readout(head(hidden))

    return rewards


def of_classifier(model: PreTrainedModel, head: RewardHead, name: str) -> Loaded:
    """Return how the reward of a loaded classifier is read.

    Raises
    ------
    UnsupportedModelError
        If its labels are not a function of the last hidden state, or are several and the user
        asks for none.
    ValueError
        If the user asks for what it does not have.
    """
    if is_encoder(model.config):
        return Loaded(
            model, readout=label_readout(head, model.config, num_labels(model.config), name)
        )
    module, labels = reward_module(model)
    reading = LastToken(
        labelled(module, label_readout(head, model.config, labels, name)),
        None if type(model).__name__ in _TOKEN else model.config.get_text_config().pad_token_id,
    )
    return Loaded(model, reading=lambda _: reading)


def _load(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    if checkpoint.architecture in _SEQUENCE:  # of anything else the head is missing, said below
        label_readout(head, checkpoint.config, num_labels(checkpoint.config), checkpoint.name)
    model, report = how.model(
        AutoModelForSequenceClassification, checkpoint.source, checkpoint.config
    )
    _check_weights(checkpoint, model, report["missing_keys"], report["unexpected_keys"])
    return of_classifier(model, head, checkpoint.name)


def _load_token_classifier(checkpoint: Checkpoint, head: RewardHead, how: Loading) -> Loaded:
    if is_encoder(checkpoint.config):
        raise UnsupportedModelError(
            f"{checkpoint.name} is {checkpoint.architecture}, a bidirectional classifier of "
            f"tokens, none of which is the text's: {CALLABLE_ADVICE}"
        )
    label_readout(head, checkpoint.config, num_labels(checkpoint.config), checkpoint.name)
    model, report = how.model(AutoModelForTokenClassification, checkpoint.source, checkpoint.config)
    _check_weights(checkpoint, model, report["missing_keys"], report["unexpected_keys"])
    return of_classifier(model, head, checkpoint.name)


def _check_weights(
    checkpoint: Checkpoint, model: PreTrainedModel, missing: set[str], unexpected: set[str]
) -> None:
    if missing:
        names = sorted(missing)
        raise ModelLoadError(
            f"{checkpoint.name} has no weights for {', '.join(names[:4])}"
            f"{' and others' if len(names) > 4 else ''} of {type(model).__name__}; transformers "
            "would make them up at random. Its config.json names "
            f"{checkpoint.architecture or 'no architecture'}: if it has a head of its own, "
            f"{CALLABLE_ADVICE}"
        )
    unread = sorted(key for key in unexpected if key.startswith(("score.", "classifier.")))
    if unread:
        raise ModelLoadError(
            f"{checkpoint.name} has head weights that {type(model).__name__} does not read "
            f"({', '.join(unread)}): {CALLABLE_ADVICE}"
        )


def _is_classifier(checkpoint: Checkpoint, _: RewardHead) -> bool:
    known = checkpoint.config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return known and (checkpoint.architecture in _SEQUENCE or not checkpoint.remote_code)


CLASSIFIER = Kind("sequence classifier", _is_classifier, _load)
TOKEN_CLASSIFIER = Kind(
    "token classifier",
    lambda checkpoint, _: checkpoint.architecture in _TOKEN,
    _load_token_classifier,
)
