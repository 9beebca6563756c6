"""Makes a scorer of the user's reward model, or raises an error that says what to change.

Everything that can be checked before the first round is checked here: the files, the head, the
tokenizer, the context length, the architecture.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_fast.config import Attention, Backend, KvDtype, LanguageModelLike, Quantize, TemplateLike
from stars_fast.distributed import ALONE, Ranks
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.checks import has_lm_head
from stars_fast.models.images import ImageEncoder, encoder_like
from stars_fast.models.load import adapted_model, load_causal_lm, load_tokenizer, same_device
from stars_fast.models.lora import LoraAdapter, LoraLayers
from stars_fast.models.packed import theirs
from stars_fast.models.parameters import embedding_rows
from stars_fast.models.quantize import check_quantize
from stars_fast.models.selfcheck import check_numbers
from stars_fast.reward_head import RewardHead, RewardHeadLike
from stars_fast.rewards.adapter import load_adapter
from stars_fast.rewards.base import RewardModel, Scorer
from stars_fast.rewards.callable import CallableScorer, RewardFunction, ScoresEach
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.checkpoint import CALLABLE_ADVICE, Checkpoint, LoadedModels, Loading
from stars_fast.rewards.encoder import EncoderScorer, encoder_context
from stars_fast.rewards.head import HEAD_NAMES
from stars_fast.rewards.kinds import Loaded, load_kind
from stars_fast.rewards.kinds.classifier import of_classifier
from stars_fast.rewards.kinds.language_model import of_language_model
from stars_fast.rewards.labels import Readout
from stars_fast.rewards.load_log_ratio import Drafting, load_log_ratio
from stars_fast.rewards.log_probs import log_prob_scorer
from stars_fast.rewards.log_ratio import LogRatio
from stars_fast.rewards.persona import Persona, PersonaTokens
from stars_fast.rewards.pool import RM_POOL_SHARE, RewardPool
from stars_fast.rewards.shared import shared
from stars_fast.rewards.steps import StepTokens, at_steps
from stars_fast.rewards.text import AnswerTemplate, CallableTemplate, Template, make_template
from stars_fast.rewards.tokens import RetokenizedText, SharedTokens, TokenSource
from stars_fast.rewards.vocabulary import check_vocabulary, same_tokens
from stars_fast.text.tokenization import SpecialTokens

__all__ = ["RewardModelLike", "load_language_model", "load_scorer"]

RewardModelLike: TypeAlias = (
    "str | os.PathLike[str] | PreTrainedModel | LogRatio | Persona | RewardModel | RewardFunction"
)


def load_scorer(
    reward_model: RewardModelLike,
    *,
    lm_tokenizer: PreTrainedTokenizerBase | None,
    language_model: PreTrainedModel | None = None,
    language_source: str | None = None,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    template: TemplateLike = None,
    head: RewardHeadLike | Sequence[RewardHead] = None,
    num_pages: int | None = None,
    pool_share: float = RM_POOL_SHARE,
    page_size: int = 16,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    quantize: Quantize = "none",
    max_rows: int = 256,
    backend: Backend = "auto",
    attention: Attention = "auto",
    kv_dtype: KvDtype = "auto",
    compile_model: bool = False,
    texts_only: bool = False,
    parse_special: bool = False,
    timeout: float | None = None,
    ranks: Ranks = ALONE,
    loaded_models: LoadedModels | None = None,
) -> Scorer:
    """Make the scorer of a reward model.

    Parameters
    ----------
    reward_model : str, path, PreTrainedModel, LogRatio, Persona, callable or RewardModel
        A local directory or hub id of a reward model of a known kind (docs/rewards.md); a
        classifier or language model, loaded (it stays on its device and in its dtype, and is put in
        eval mode); a `LogRatio` of two language models; a `Persona`, under which the language model
        judges itself; a function `f(prompts, responses) -> list[float]`; or an object with such a
        method `score`.
    lm_tokenizer : transformers tokenizer or None
        The language model's. Where the reward model's agrees with it token for token, response ids
        are used as they are; otherwise texts are tokenised again. Without one there are no texts,
        which is for reward functions alone.
    language_model : PreTrainedModel, optional
        The language model, known to run on pages; a `Persona` needs it, and a `LogRatio` without a
        reference.
    language_source : str, optional
        The directory or hub id whose weights it has, unchanged. A LoRA adapter of these shares
        them.
    reward_tokenizer : transformers tokenizer, optional
        The reward model's. By default it is loaded from where the model came from.
    device : torch.device or str, optional
        Where to put a model that is loaded here; the CPU by default.
    dtype : torch.dtype or str
        Its dtype; "auto" is the one it was saved in.
    template : None, str or callable
        The text that the reward model reads, see `stars_fast.rewards.text`.
    head : RewardHead, str, None or sequence of RewardHead
        What of the model's head is the reward; None: its one label. Of several the scorer returns
        `HeadRewards`.
    num_pages : int, optional
        Pages of a causal reward model's or a judge's cache, of each of a `LogRatio`; by default see
        `default_num_pages`.
    pool_share : float
        Part of a GPU's free memory for them by default.
    page_size : int
        Tokens per page.
    trust_remote_code : bool
        Whether the tokenizer may bring its own code. The model may not: give it as a function.
    allow_pickle : bool
        Whether weights may be loaded from other files than safetensors.
    quantize : str
        ``"int8"``: 8-bit weights for a model that is loaded here, onto the CPU.
    max_rows : int
        Most rows of one forward pass.
    backend, attention, kv_dtype, compile_model
        Options of a causal reward model or a judge, see `stars_fast.models.paged.PagedModel`.
    texts_only
        Responses come as text although there is no tokenizer.
    parse_special
        Special tokens written in prompts and responses are special, not text.
    timeout
        Seconds that a call of a function may take; None: no limit.
    loaded_models : dict, optional
        Models loaded for other scorers, whose weights this one may share; changed.
    ranks : Ranks
        Ranks over which to split a model, or that jointly hold a loaded one or the language model.

    Raises
    ------
    ModelLoadError
        If files are missing or damaged, the checkpoint has no trained head, or there is no
        tokenizer.
    UnsupportedModelError
        If the architecture or its head cannot be used.
    ValueError
        If tokenizer, template or a number does not fit.
    TypeError
        If `reward_model` or `template` is of none of these kinds.
    """
    heads = _heads(head)
    check_quantize(quantize, device=device, num_ranks=ranks.size, name="reward_quantize")
    reward_model = adapted_model(reward_model)
    pool = RewardPool(
        num_pages=num_pages,
        gpu_share=pool_share,
        page_size=page_size,
        max_rows=max_rows,
        backend=backend,
        attention=attention,
        kv_dtype=kv_dtype,
        compile_model=compile_model,
        ranks=ranks,
    )
    if isinstance(reward_model, Persona):
        judge = _check_judge(language_model, lm_tokenizer, reward_tokenizer, template, device)
        _check_no_head(heads, "a Persona")
        return _persona_scorer(reward_model, *judge, pool, parse_special)
    if not isinstance(reward_model, str | os.PathLike | PreTrainedModel | LogRatio):
        _check_no_head(heads, "a reward function")
        return _python_scorer(reward_model, template, timeout)
    if lm_tokenizer is None and not texts_only:
        raise ValueError(
            "a reward model that is not a function needs the language model's tokenizer, and none "
            "was found beside the language model: pass tokenizer"
        )
    drafting = Drafting(language_model, lm_tokenizer, language_source)
    if isinstance(reward_model, LogRatio):
        _check_no_head(heads, "a LogRatio")
        return load_log_ratio(
            reward_model,
            drafting,
            pool,
            functools.partial(
                load_language_model,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
                num_ranks=ranks.size,
                quantize=quantize,
            ),
            device=device,
            tokenizer=reward_tokenizer,
            template=template,
            parse_special=parse_special,
        )
    lora: LoraLayers | None = None
    if isinstance(reward_model, str | os.PathLike):
        source = os.fspath(reward_model)
        how = Loading(device, dtype, allow_pickle, ranks.size, quantize)
        adapter = LoraAdapter.find(source)
        if adapter is not None:
            source = adapter.tokenizer_source
            tokenizer = reward_tokenizer or _load_tokenizer(source, trust_remote_code)
            base = None if compile_model else drafting.base_of(adapter, device)
            (wanted,) = heads  # what is merged into its weights is for this one alone
            loaded, lora = load_adapter(adapter, wanted, how, base)
        else:
            how = replace(how, loaded={} if loaded_models is None else loaded_models)
            checkpoint = Checkpoint.open(source, allow_pickle=allow_pickle)
            tokenizer = reward_tokenizer or _load_tokenizer(source, trust_remote_code)
            loaded = shared([load_kind(checkpoint, wanted, how) for wanted in heads])
    else:
        reward_model.train(False)
        theirs(reward_model)
        tokenizer = reward_tokenizer or _tokenizer_of(reward_model, trust_remote_code)
        loaded = shared([_read_loaded(reward_model, wanted) for wanted in heads])
    head = heads[0]  # several differ in the number alone
    _check_answer(head, lm_tokenizer)
    if loaded.readout is not None:
        return _encoder_scorer(
            loaded.model, tokenizer, template, loaded.readout, head, parse_special
        )
    return _causal_scorer(
        loaded,
        lora,
        tokenizer,
        lm_tokenizer,
        template,
        head,
        pool,
        parse_special,
        images=encoder_like(loaded.model, language_model),
    )


def _python_scorer(reward_model: object, template: TemplateLike, timeout: float | None) -> Scorer:
    if isinstance(reward_model, torch.nn.Module):
        raise TypeError(
            f"reward_model is a {type(reward_model).__name__}, not a transformers model: "
            + CALLABLE_ADVICE
        )
    score = getattr(reward_model, "score", reward_model)
    if isinstance(reward_model, ScoresEach):
        score = reward_model
    elif not callable(score):
        raise TypeError(
            "reward_model must be a directory or hub id, a transformers sequence classifier, a "
            "callable, or an object with a method 'score', got "
            f"{type(reward_model).__name__}"
        )
    if template is not None:
        raise ValueError(
            "reward_template is for transformers models; a reward function gets prompts and "
            "responses and builds its own text"
        )
    scorer = CallableScorer(score, timeout)
    scorer.remote = getattr(reward_model, "remote", False)
    return scorer


def _read_loaded(model: PreTrainedModel, head: RewardHead) -> Loaded:
    """Return how the reward of a model is read that the user has loaded."""
    name = type(model).__name__
    has_head = any(isinstance(getattr(model, label, None), torch.nn.Module) for label in HEAD_NAMES)
    if has_lm_head(model) and (head.of_tokens or not has_head):
        return of_language_model(model, head, name)
    return of_classifier(model, head, name)


def _heads(given: RewardHeadLike | Sequence[RewardHead]) -> list[RewardHead]:
    if isinstance(given, Sequence) and not isinstance(given, str):
        return list(given)
    return [RewardHead.of(given)]


def _check_no_head(heads: Sequence[RewardHead], what: str) -> None:
    if any(head != RewardHead() for head in heads):
        raise ValueError(f"reward_head is for reward models with a head, not for {what}")


def _encoder_scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateLike,
    readout: Readout,
    head: RewardHead,
    parse_special: bool,
) -> Scorer:
    if head.at == "steps":
        raise UnsupportedModelError(
            "at='steps' of reward_head needs a causal reward model; a step of a "
            f"{type(model).__name__} would depend on those behind it"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the reward model's tokenizer has no padding token, which an encoder needs: set "
            "pad_token in its tokenizer_config.json"
        )
    check_vocabulary(tokenizer, embedding_rows(model), pads=True)
    return EncoderScorer(
        model,
        tokenizer,
        _of_answers(
            make_template(template, tokenizer, pairs=True, parse_special=parse_special), head
        ),
        context=encoder_context(model, tokenizer),
        readout=readout,
    )


def _causal_scorer(
    loaded: Loaded,
    lora: LoraLayers | None,
    tokenizer: PreTrainedTokenizerBase,
    lm_tokenizer: PreTrainedTokenizerBase | None,
    template: TemplateLike,
    head: RewardHead,
    pool: RewardPool,
    parse_special: bool,
    *,
    images: ImageEncoder | None,
) -> Scorer:
    model = loaded.model
    rows = embedding_rows(model)
    check_vocabulary(tokenizer, rows, pads=False)
    chosen = make_template(template, tokenizer, pairs=False, parse_special=parse_special)
    assert loaded.reading is not None
    reading = loaded.reading(tokenizer)
    if head.at == "steps":
        if isinstance(chosen, CallableTemplate):
            raise ValueError(
                "at='steps' of reward_head needs a reward_template that is text or 'chat': in "
                "what a function writes, nobody knows where the steps are"
            )
        reading = at_steps(reading, head, type(model).__name__)
    try:
        paged = pool.paged(model, lora)
        check_numbers(model, backend=pool.backend, attention=pool.attention)
        paged.pack_weights()
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error} As a reward model: {CALLABLE_ADVICE}") from error
    source: TokenSource
    if head.at == "steps":
        source = StepTokens(tokenizer, _of_answers(chosen, head), head)
    elif (
        head.after is None
        and lm_tokenizer is not None
        and not isinstance(chosen, CallableTemplate)
        and same_tokens(lm_tokenizer, tokenizer)
    ):
        source = SharedTokens(tokenizer, chosen, rows, images)
    else:
        source = RetokenizedText(tokenizer, _of_answers(chosen, head))
    return CausalScorer(
        paged,
        reading,
        source,
        num_pages=paged.num_pages,
        page_size=paged.page_size,
        max_rows=pool.max_rows,
    )


def _of_answers(template: Template, head: RewardHead) -> Template:
    return template if head.after is None else AnswerTemplate(template, head.after)


def _check_answer(head: RewardHead, lm_tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse to wait for what no text of a response has."""
    if head.after is None or lm_tokenizer is None:
        return
    if any(True for _ in SpecialTokens(lm_tokenizer).find(head.after)):
        raise ValueError(
            f"after of reward_head must be text, got {head.after!r}, which has a special token of "
            "the language model: the texts of responses do not show them"
        )


def _check_judge(
    language_model: PreTrainedModel | None,
    lm_tokenizer: PreTrainedTokenizerBase | None,
    reward_tokenizer: PreTrainedTokenizerBase | None,
    template: TemplateLike,
    device: torch.device | str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model that judges and its tokenizer; refuse what does not go with a persona."""
    if language_model is None:
        raise ValueError("a Persona is judged by the language model: pass language_model")
    if lm_tokenizer is None:
        raise ValueError(
            "a Persona needs the language model's tokenizer, and none was found beside the "
            "language model: pass tokenizer"
        )
    if template is not None:
        raise ValueError("reward_template is for reward models; a Persona has its own template")
    if reward_tokenizer is not None and reward_tokenizer is not lm_tokenizer:
        raise ValueError(
            "reward_tokenizer is for reward models; under a Persona the language model's is used"
        )
    if device is not None and not same_device(torch.device(device), language_model.device):
        raise ValueError(
            "reward_device must be None or the device of the language model, which judges under a "
            f"Persona, {language_model.device}, got {device}"
        )
    return language_model, lm_tokenizer


def _persona_scorer(
    persona: Persona,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: RewardPool,
    parse_special: bool,
) -> Scorer:
    rows = embedding_rows(language_model)
    source = PersonaTokens(persona, tokenizer, rows, parse_special=parse_special)
    return log_prob_scorer(
        pool.paged(language_model),
        source,
        max_rows=pool.max_rows,
        words=("the judge", "with the persona", "the persona or the prompt"),
    )


def load_language_model(
    source: LanguageModelLike,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    num_ranks: int,
    quantize: Quantize,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal language model and its tokenizer; a loaded one stays where and what it is."""
    if isinstance(source, PreTrainedModel):
        source.train(False)
        return load_causal_lm(source, trust_remote_code=trust_remote_code, num_ranks=num_ranks)
    return load_causal_lm(
        source,
        dtype=dtype,
        device=device or "cpu",
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        num_ranks=num_ranks,
        quantize=quantize,
    )


def _tokenizer_of(model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not model.name_or_path:
        raise ValueError(
            f"reward_model is a {type(model).__name__} made in memory, so its tokenizer is not "
            "known: pass reward_tokenizer"
        )
    return _load_tokenizer(model.name_or_path, trust_remote_code)


def _load_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    advice = (
        "save the reward model's own tokenizer there (tokenizer.save_pretrained), or pass "
        "reward_tokenizer"
    )
    try:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"reward model {source!r} has no tokenizer that can be loaded; {advice} ({error})"
        ) from error
    # Without files, transformers makes up a tokenizer of a few special tokens.
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if len(set(tokenizer.get_vocab().values()) - special) < 3:
        raise ModelLoadError(f"reward model {source!r} has no tokenizer files; {advice}")
    return tokenizer
