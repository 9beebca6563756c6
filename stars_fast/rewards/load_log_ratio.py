"""Makes the scorer of a `LogRatio`: two language models, on tokens that both know."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_fast.config import Attention, Backend, LanguageModelLike, TemplateLike
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.images import encoder_like
from stars_fast.models.load import adapted_model, same_device
from stars_fast.models.lora import LoraAdapter, LoraLayers
from stars_fast.models.parameters import embedding_rows
from stars_fast.models.selfcheck import check_numbers
from stars_fast.rewards.adapter import adapts
from stars_fast.rewards.base import Prompt
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.log_probs import PromptTokens, log_prob_scorer
from stars_fast.rewards.log_ratio import LogRatio, LogRatioScorer
from stars_fast.rewards.pool import RewardPool
from stars_fast.rewards.text import CallableTemplate, FramedPrompt, Template, make_template
from stars_fast.rewards.tokens import RetokenizedText, TokenSource
from stars_fast.rewards.vocabulary import check_vocabulary, same_tokens

__all__ = ["Drafting", "LoadsModel", "load_log_ratio"]

LoadsModel: TypeAlias = (
    "Callable[[LanguageModelLike], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]]"
)


@dataclass(frozen=True)
class Drafting:
    """The language model that drafts, as far as it is here.

    Parameters
    ----------
    model : PreTrainedModel or None
    tokenizer : transformers tokenizer or None
    source : str or None
        The directory or hub id whose weights it has; None: another's, or changed ones.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    source: str | None

    def base_of(self, adapter: LoraAdapter, device: object) -> PreTrainedModel | None:
        """Return the model if an adapter adapts just that, on that device."""
        if self.model is None or not adapts(adapter, self.source):
            return None
        here = device is None or same_device(torch.device(str(device)), self.model.device)
        return self.model if here else None

    def load(
        self,
        source: LanguageModelLike,
        load: LoadsModel,
        device: torch.device | str | None,
        *,
        backend: Backend,
        attention: Attention = "auto",
        shares: bool = True,
    ) -> tuple[PreTrainedModel, LoraLayers | None, PreTrainedTokenizerBase | None]:
        """Load a language model that runs beside it, with its tokenizer.

        Parameters
        ----------
        source : str, path or PreTrainedModel
        load
            Loads one whose weights are its own.
        device : torch.device or str, optional
            Where to.
        backend, attention : str
            On which the loaded model is checked.
        shares : bool
            An adapter whose base is this model is layers beside its weights, the second result.
        """
        source = adapted_model(source)
        adapter = None
        if isinstance(source, str | os.PathLike) and shares:
            adapter = LoraAdapter.find(os.fspath(source))
        base = None if adapter is None else self.base_of(adapter, device)
        if adapter is not None and base is not None:
            beside = adapter.beside(base, adapter.weights())
            if beside is not None and not beside[1]:
                return base, beside[0], self.tokenizer
        model, found = load(source)
        check_numbers(model, backend=backend, attention=attention)
        return model, None, found


@dataclass(frozen=True)
class _Model:
    whose: str
    model: PreTrainedModel
    lora: LoraLayers | None
    tokenizer: PreTrainedTokenizerBase


class _OpenTemplate:
    """A template without what it has behind the response."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.add_special_tokens = template.add_special_tokens

    def bind(self, prompt: Prompt) -> FramedPrompt:
        """Return the prompt, open at its end."""
        framed = self._template.bind(prompt)
        assert isinstance(framed, FramedPrompt)
        return replace(framed, suffix="", strip_right=False)


def load_log_ratio(
    ratio: LogRatio,
    drafting: Drafting,
    pool: RewardPool,
    load: LoadsModel,
    *,
    device: torch.device | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    template: TemplateLike,
    parse_special: bool,
) -> LogRatioScorer:
    """Load both models and give each its pages.

    Parameters
    ----------
    ratio : LogRatio
    drafting : Drafting
    pool : RewardPool
        Options for the pages of each.
    load
        Loads a language model.
    device
        Where to.
    tokenizer
        That of both models; None: what is found beside each.
    template
        None: both read the ids that the language model reads and draws, if their tokenizers agree.
    parse_special
        See `load_scorer`.

    Raises
    ------
    ModelLoadError, UnsupportedModelError
        If a model cannot be loaded or run.
    ValueError
        If there is no language model to be the reference, or tokenizers do not go together.
    """
    if ratio.reference is None and drafting.model is None:
        raise ValueError(
            "a LogRatio without a reference is against the language model, which is not here: name "
            "its reference"
        )

    def loaded(whose: str, source: LanguageModelLike | None) -> _Model:
        if source is None:
            assert drafting.model is not None
            return _Model(whose, drafting.model, None, _known(whose, drafting.tokenizer))
        try:
            model, lora, found = drafting.load(
                source,
                load,
                device,
                backend=pool.backend,
                attention=pool.attention,
                shares=not pool.compile_model,
            )
        except (ModelLoadError, UnsupportedModelError) as error:
            raise type(error)(f"{whose}: {error}") from error
        own = _known(whose, tokenizer or found)
        check_vocabulary(own, embedding_rows(model), pads=False)
        return _Model(whose, model, lora, own)

    both = (
        loaded("the policy of LogRatio", ratio.policy),
        loaded("the reference of LogRatio", ratio.reference),
    )
    ids = template is None and all(_same(drafting.tokenizer, each.tokenizer) for each in both)
    if not ids:
        _check_texts(ratio, template, *both)
    policy, reference = (
        _scorer(
            each,
            pool,
            _source(each, template, parse_special, drafting.model, ids=ids),
            1 - at,
            anew=not ids,
        )
        for at, each in enumerate(both)
    )
    sums = ids and ratio.over == "response"
    return LogRatioScorer(policy, reference, beta=ratio.beta, sums=sums)


def _known(whose: str, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ModelLoadError(
            f"{whose} has no tokenizer: save it beside the model, or pass reward_tokenizer"
        )
    return tokenizer


def _same(one: PreTrainedTokenizerBase | None, other: PreTrainedTokenizerBase) -> bool:
    return one is not None and same_tokens(one, other)


def _check_texts(
    ratio: LogRatio, template: TemplateLike, policy: _Model, reference: _Model
) -> None:
    """Refuse texts that cannot be compared, or are to be scored by segments."""
    why = "their tokenizer is not the language model's"
    if template is not None:
        why = "reward_template is given"
    if ratio.over == "segment":
        raise ValueError(
            "over='segment' of a LogRatio needs the language model's own tokens, and texts are "
            f"tokenised again, as {why}: use over='response'"
        )
    one, other = policy.tokenizer, reference.tokenizer
    if not (same_tokens(one, other) or same_tokens(other, one)):
        raise ValueError(
            "policy and reference of a LogRatio must have the same tokens, and their tokenizers "
            f"differ ({len(one)} and {len(other)} tokens)"
        )


def _source(
    each: _Model,
    template: TemplateLike,
    parse_special: bool,
    drafts: PreTrainedModel | None,
    *,
    ids: bool,
) -> TokenSource:
    if ids:
        images = encoder_like(each.model, drafts)
        return PromptTokens(embedding_rows(each.model), each.whose, images)
    chosen = make_template(template, each.tokenizer, pairs=False, parse_special=parse_special)
    opened = isinstance(template, str) and template not in ("chat", "plain")
    if isinstance(chosen, CallableTemplate) or (
        opened and not str(template).endswith("{response}")
    ):
        raise ValueError(
            "reward_template of a LogRatio must be None, 'chat', 'plain' or text that ends with "
            f"{{response}}, got {template!r}"
        )
    return RetokenizedText(each.tokenizer, _OpenTemplate(chosen))


def _scorer(
    each: _Model, pool: RewardPool, source: TokenSource, others: int, *, anew: bool
) -> CausalScorer:
    paged = pool.paged(each.model, each.lora, others)
    paged.pack_weights()
    return log_prob_scorer(
        paged,
        source,
        max_rows=pool.max_rows,
        anew=anew,
        words=(each.whose, f"for {each.whose}", "the prompt"),
    )
