"""Loads the models that guide a language model, and checks that they speak of the same tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_fast.config import UNIFORM, EngineConfig
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.guidance import GuidedModel
from stars_fast.models.lora import LoraLayers
from stars_fast.models.paged import PagedModel
from stars_fast.models.parameters import embedding_rows
from stars_fast.rewards.load import load_language_model
from stars_fast.rewards.load_log_ratio import Drafting
from stars_fast.rewards.vocabulary import check_vocabulary, same_tokens


@dataclass(frozen=True)
class LoadedGuide:
    """A guide or its reference, before it has pages.

    Attributes
    ----------
    model
        On the language model's device.
    lora
        What is active in its passes, where its weights are the language model's.
    """

    model: PreTrainedModel
    lora: LoraLayers | None


def load_guides(
    config: EngineConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: str | None,
) -> list[LoadedGuide]:
    """Return the guide and, where that is a model beside the language model, its reference.

    Parameters
    ----------
    config
        Names them; none without a guide.
    model, tokenizer, source
        The language model, and the directory or hub id whose weights it has.

    Raises
    ------
    ModelLoadError, UnsupportedModelError
        If one cannot be loaded or run.
    ValueError
        If one has other tokens, or is elsewhere.
    """
    named = {"guide": config.guide, "guide_reference": config.guide_reference}
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
            guide, lora, own = drafting.load(
                wanted, load, model.device, backend=config.backend, shares=not config.compile_model
            )
        except (ModelLoadError, UnsupportedModelError) as error:
            raise type(error)(f"{name}: {error}") from error
        if guide.device != model.device:
            raise ValueError(
                f"{name} must be on the language model's device, {model.device}, got one on "
                f"{guide.device}"
            )
        _check_tokens(name, guide, own, model, tokenizer)
        loaded.append(LoadedGuide(guide, lora))
    return loaded


def guided_model(
    lm: PagedModel, guides: list[LoadedGuide], config: EngineConfig
) -> GuidedModel | None:
    """Return the language model with its guides on as many pages; None if there are none."""
    if not guides:
        return None
    guide, *reference = (
        PagedModel(
            one.model,
            num_pages=lm.num_pages,
            page_size=lm.page_size,
            backend=config.backend,
            kv_dtype=config.kv_dtype,
            compile_model=config.compile_model,
            lora=one.lora,
        )
        for one in guides
    )
    for model in (guide, *reference):
        model.pack_weights()
    if reference:
        return GuidedModel(lm, guide, reference[0])
    return GuidedModel(lm, guide, "lm" if config.guide_reference is None else "uniform")


def _check_tokens(
    name: str,
    guide: PreTrainedModel,
    own: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse a model to which the language model's token ids mean something else.

    One without a tokenizer beside it is taken to have the language model's.
    """
    rows, wanted = embedding_rows(guide), embedding_rows(model)
    if tokenizer is None:
        if rows != wanted:
            raise ValueError(
                f"{name} must have the language model's vocabulary: without a tokenizer, {wanted} "
                f"embeddings, got {rows}"
            )
        return
    if own is not None and not same_tokens(tokenizer, own):
        raise ValueError(
            f"{name} must have the language model's tokens: {_named(own, guide)} and the language "
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
