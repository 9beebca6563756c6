"""Loads models that run beside a language model, and checks that they speak of the same tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_fast.config import UNIFORM, EngineConfig, LanguageModelLike
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.drafted import DraftedModel
from stars_fast.models.guidance import GuidedModel
from stars_fast.models.lockstep import Lockstep
from stars_fast.models.lora import LoraLayers
from stars_fast.models.paged import PagedModel
from stars_fast.models.parameters import embedding_rows
from stars_fast.rewards.load import load_language_model
from stars_fast.rewards.load_log_ratio import Drafting
from stars_fast.rewards.vocabulary import check_vocabulary, same_tokens


@dataclass(frozen=True)
class LoadedModel:
    """A model before it has pages.

    Attributes
    ----------
    model
        On the language model's device.
    lora
        What is active in its passes, where its weights are the language model's.
    """

    model: PreTrainedModel
    lora: LoraLayers | None


def load_beside(
    named: Mapping[str, LanguageModelLike | None],
    config: EngineConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str | None,
) -> list[LoadedModel]:
    """Return the models that are named, each with pages to come beside the language model's.

    Parameters
    ----------
    named
        By the option that names each; None and ``"uniform"`` are no models.
    model, tokenizer, source
        The language model, and the directory or hub id whose weights it has.

    Raises
    ------
    ModelLoadError, UnsupportedModelError
        If one cannot be loaded or run.
    ValueError
        If one has other tokens, or is elsewhere.
    """
    drafting = Drafting(model, tokenizer, source)
    load = functools.partial(
        load_language_model,
        dtype=config.dtype,
        device=model.device,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        num_ranks=1,
        quantize=config.quantize,
    )
    loaded = []
    for name, wanted in named.items():
        if wanted is None or wanted == UNIFORM:
            continue
        try:
            one, lora, own = drafting.load(
                wanted,
                load,
                model.device,
                backend=config.backend,
                attention=config.attention,
                shares=not config.compile_model,
            )
        except (ModelLoadError, UnsupportedModelError) as error:
            raise type(error)(f"{name}: {error}") from error
        if one.device != model.device:
            raise ValueError(
                f"{name} must be on the language model's device, {model.device}, got one on "
                f"{one.device}"
            )
        _check_tokens(name, one, own, model, tokenizer)
        loaded.append(LoadedModel(one, lora))
    return loaded


def in_lockstep(lm: PagedModel, beside: list[LoadedModel], config: EngineConfig) -> Lockstep | None:
    """Return the language model with those beside it on as many pages; None if there are none."""
    if not beside:
        return None
    first, *reference = (
        PagedModel(
            one.model,
            num_pages=lm.num_pages,
            page_size=lm.page_size,
            backend=config.backend,
            attention=config.attention,
            kv_dtype=config.kv_dtype,
            compile_model=config.compile_model,
            lora=one.lora,
        )
        for one in beside
    )
    for model in (first, *reference):
        model.pack_weights()
    if config.draft_model is not None:
        return DraftedModel(lm, first, reference[0] if reference else None)
    if reference:
        return GuidedModel(lm, first, reference[0])
    return GuidedModel(lm, first, "lm" if config.guide_reference is None else "uniform")


def _check_tokens(
    name: str,
    other: PreTrainedModel,
    own: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse a model to which the language model's token ids mean something else.

    One without a tokenizer beside it is taken to have the language model's.
    """
    rows, wanted = embedding_rows(other), embedding_rows(model)
    if tokenizer is None:
        if rows != wanted:
            raise ValueError(
                f"{name} must have the language model's vocabulary: without a tokenizer, {wanted} "
                f"embeddings, got {rows}"
            )
        return
    if own is not None and not same_tokens(tokenizer, own):
        raise ValueError(
            f"{name} must have the language model's tokens: {_named(own, other)} and the language "
            f"model's {_named(tokenizer, model)} give other ids to some token or text"
        )
    try:
        check_vocabulary(tokenizer, rows, pads=False)
    except ValueError:
        raise ValueError(
            f"{name} must have an embedding for every token of the language model's tokenizer "
            f"({len(tokenizer)} tokens), got {rows} embeddings"
        ) from None


def _named(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str:
    where = tokenizer.name_or_path or model.name_or_path or type(model).__name__
    return f"tokenizer of {where!r} ({len(tokenizer)} tokens)"
