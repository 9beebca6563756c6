"""Which architectures can run on paged attention, judged by their class and configuration."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from stars_fast.errors import UnsupportedModelError

_PAGED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    """The error for a model that cannot run on paged attention, with its name and the reason."""
    return UnsupportedModelError(
        f"{type(model).__name__} (model type {model.config.model_type!r}) cannot run on paged "
        f"attention: {reason}."
    )


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse models whose class or configuration rules paged attention out.

    Passing is necessary, not sufficient: `stars_fast.models.probe` looks at the attention calls
    and `stars_fast.models.selfcheck` at the numbers.

    Raises
    ------
    TypeError
        If `model` is not a transformers model.
    UnsupportedModelError
        With the architecture and the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise unsupported(model, "it is an encoder-decoder; only decoders keep one cache")
    if _uses_alibi(config):
        raise unsupported(model, "it adds ALiBi position biases to its attention scores")
    if model._is_stateful:
        raise unsupported(model, "its layers carry a recurrent state, which has no pages to share")
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - _PAGED_LAYERS)
    if other_layers:
        raise unsupported(model, f"it has layers of type {', '.join(other_layers)}")
    if not type(model)._supports_attention_backend:
        raise unsupported(
            model, "it does not call its attention through transformers' AttentionInterface"
        )
    rope_types = _rope_types(config)
    if "dynamic" in rope_types:
        raise unsupported(
            model,
            "its rotary embedding (rope_type 'dynamic') changes with the longest sequence run",
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise unsupported(model, "its layers are spread over several devices")


def has_lm_head(model: PreTrainedModel) -> bool:
    """Whether a model's forward gives next-token logits."""
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None


def max_length(model: PreTrainedModel) -> int | None:
    """Longest sequence that a model takes, in tokens; None if its configuration does not say.

    Rotary embeddings of type "longrope" switch for every token of a batch once one of its
    sequences passes a length; up to that length a row depends on itself alone.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, "max_position_embeddings", None)]
    if "longrope" in _rope_types(config):
        limits.append(getattr(config, "original_max_position_embeddings", None))
        limits += [p.get("original_max_position_embeddings") for p in _rope_parameters(config)]
    known = [int(limit) for limit in limits if limit]
    return min(known) if known else None


def _uses_alibi(config: PreTrainedConfig) -> bool:
    # Bloom and MPT have no switch for it at the top of their configuration.
    return bool(
        getattr(config, "alibi", False)
        or config.model_type in ("bloom", "mpt")
        or getattr(config, "position_embedding_type", None) == "alibi"
    )


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Rotary parameters, one dictionary, or one per layer type where the model has several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rope_types(config: PreTrainedConfig) -> set[str]:
    return {str(parameters.get("rope_type")) for parameters in _rope_parameters(config)}
