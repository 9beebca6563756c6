"""Makes a scorer of the user's reward model, or raises an error that says what to change.

Everything that can be checked before the first round is checked here: the files, the head, the
tokenizer, the context length, the architecture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from stars_fast.config import Backend, KvDtype, TemplateLike
from stars_fast.distributed import ALONE, Ranks
from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.load import check_model_directory, load_tokenizer, same_device
from stars_fast.models.paged import PagedModel
from stars_fast.models.pool import default_num_pages
from stars_fast.models.progress import bars_on_terminals_only
from stars_fast.models.selfcheck import check_numbers
from stars_fast.models.sharded import loading_options
from stars_fast.rewards.base import RewardModel, Scorer
from stars_fast.rewards.callable import CallableScorer, RewardFunction
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.encoder import EncoderScorer, encoder_context
from stars_fast.rewards.head import check_labels, linear_head
from stars_fast.rewards.persona import Persona, PersonaScorer, PersonaTokens
from stars_fast.rewards.reading import LastToken
from stars_fast.rewards.text import CallableTemplate, make_template
from stars_fast.rewards.tokens import RetokenizedText, SharedTokens, TokenSource
from stars_fast.rewards.vocabulary import check_vocabulary, embedding_rows, same_tokens

__all__ = ["RewardModelLike", "load_scorer"]

RewardModelLike: TypeAlias = (
    "str | os.PathLike[str] | PreTrainedModel | Persona | RewardModel | RewardFunction"
)
# Of the free memory on a GPU, once the language model's pool is there.
RM_POOL_SHARE = 0.6
_CALLABLE_ADVICE = (
    "pass as reward_model a function f(prompts, responses) -> list[float] that loads and calls it"
)


def load_scorer(
    reward_model: RewardModelLike,
    *,
    lm_tokenizer: PreTrainedTokenizerBase | None,
    language_model: PreTrainedModel | None = None,
    reward_tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    template: TemplateLike = None,
    num_pages: int | None = None,
    page_size: int = 16,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    max_rows: int = 256,
    backend: Backend = "auto",
    kv_dtype: KvDtype = "auto",
    compile_model: bool = False,
    texts_only: bool = False,
    parse_special: bool = False,
    timeout: float | None = None,
    ranks: Ranks = ALONE,
) -> Scorer:
    """Make the scorer of a reward model.

    Parameters
    ----------
    reward_model : str, path, PreTrainedModel, Persona, callable or RewardModel
        A local directory or hub id of a transformers sequence classifier with one label; such a
        model, loaded (it stays on its device and in its dtype, and is put in eval mode); a
        `Persona`, under which the language model judges itself; a function
        `f(prompts, responses) -> list[float]`; or an object with such a method `score`.
    lm_tokenizer : transformers tokenizer or None
        The language model's. Where the reward model's agrees with it token for token, response ids
        are used as they are; otherwise texts are tokenised again. Without one there are no texts,
        which is for reward functions alone.
    language_model : PreTrainedModel, optional
        The language model, known to run on pages; a `Persona` needs it.
    reward_tokenizer : transformers tokenizer, optional
        The reward model's. By default it is loaded from where the model came from.
    device : torch.device or str, optional
        Where to put a model that is loaded here; the CPU by default.
    dtype : torch.dtype or str
        Its dtype; "auto" is the one it was saved in.
    template : None, str or callable
        The text that the reward model reads, see `stars_fast.rewards.text`.
    num_pages : int, optional
        Pages of a causal reward model's or a judge's cache; by default see `default_num_pages`.
    page_size : int
        Tokens per page.
    trust_remote_code : bool
        Whether the tokenizer may bring its own code. The model may not: give it as a function.
    allow_pickle : bool
        Whether weights may be loaded from other files than safetensors.
    max_rows : int
        Most rows of one forward pass.
    backend, kv_dtype, compile_model
        Options of a causal reward model or a judge, see `stars_fast.models.paged.PagedModel`.
    texts_only
        Responses come as text although there is no tokenizer.
    parse_special
        Special tokens written in prompts and responses are special, not text.
    timeout
        Seconds that a call of a function may take; None: no limit.
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
    pool = _Pool(
        num_pages=num_pages,
        page_size=page_size,
        max_rows=max_rows,
        backend=backend,
        kv_dtype=kv_dtype,
        compile_model=compile_model,
        ranks=ranks,
    )
    if isinstance(reward_model, Persona):
        judge = _check_judge(language_model, lm_tokenizer, reward_tokenizer, template, device)
        return _persona_scorer(reward_model, *judge, pool, parse_special)
    if not isinstance(reward_model, str | os.PathLike | PreTrainedModel):
        return _python_scorer(reward_model, template, timeout)
    if lm_tokenizer is None and not texts_only:
        raise ValueError(
            "a reward model that is not a function needs the language model's tokenizer, and none "
            "was found beside the language model: pass tokenizer"
        )
    if isinstance(reward_model, str | os.PathLike):
        source = os.fspath(reward_model)
        config = _load_config(source, allow_pickle)
        tokenizer = reward_tokenizer or _load_tokenizer(source, trust_remote_code)
        model = _load_model(source, config, device, dtype, allow_pickle, ranks.size)
    else:
        model = reward_model
        model.train(False)
        check_labels(type(model).__name__, model.config.num_labels)
        tokenizer = reward_tokenizer or _tokenizer_of(model, trust_remote_code)
    if _is_encoder(model):
        return _encoder_scorer(model, tokenizer, template, parse_special)
    return _causal_scorer(model, tokenizer, lm_tokenizer, template, pool, parse_special)


@dataclass(frozen=True)
class _Pool:
    """The user's options for a causal model's pages."""

    num_pages: int | None
    page_size: int
    max_rows: int
    backend: Backend
    kv_dtype: KvDtype
    compile_model: bool
    ranks: Ranks

    def paged(self, model: PreTrainedModel) -> PagedModel:
        """Return the model on pages, as many as fit where none were asked for."""
        num_pages = self.num_pages
        if num_pages is None:
            num_pages = default_num_pages(
                model,
                page_size=self.page_size,
                max_rows=self.max_rows,
                gpu_share=RM_POOL_SHARE,
                kv_dtype=self.kv_dtype,
            )
            num_pages = self.ranks.smallest(num_pages)
        return PagedModel(
            model,
            num_pages=num_pages,
            page_size=self.page_size,
            backend=self.backend,
            kv_dtype=self.kv_dtype,
            compile_model=self.compile_model,
            ranks=self.ranks,
        )


def _python_scorer(reward_model: object, template: TemplateLike, timeout: float | None) -> Scorer:
    if isinstance(reward_model, torch.nn.Module):
        raise TypeError(
            f"reward_model is a {type(reward_model).__name__}, not a transformers model: "
            + _CALLABLE_ADVICE
        )
    score = getattr(reward_model, "score", reward_model)
    if not callable(score):
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
    return CallableScorer(score, timeout)


def _encoder_scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateLike,
    parse_special: bool,
) -> Scorer:
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the reward model's tokenizer has no padding token, which an encoder needs: set "
            "pad_token in its tokenizer_config.json"
        )
    check_vocabulary(tokenizer, embedding_rows(model), pads=True)
    return EncoderScorer(
        model,
        tokenizer,
        make_template(template, tokenizer, pairs=True, parse_special=parse_special),
        context=encoder_context(model, tokenizer),
    )


def _causal_scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lm_tokenizer: PreTrainedTokenizerBase | None,
    template: TemplateLike,
    pool: _Pool,
    parse_special: bool,
) -> Scorer:
    rows = embedding_rows(model)
    check_vocabulary(tokenizer, rows, pads=False)
    chosen = make_template(template, tokenizer, pairs=False, parse_special=parse_special)
    head = linear_head(model)
    try:
        check_numbers(model, backend=pool.backend)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error} As a reward model: {_CALLABLE_ADVICE}") from error
    paged = pool.paged(model)
    source: TokenSource
    if (
        lm_tokenizer is not None
        and not isinstance(chosen, CallableTemplate)
        and same_tokens(lm_tokenizer, tokenizer)
    ):
        source = SharedTokens(tokenizer, chosen, rows)
    else:
        source = RetokenizedText(tokenizer, chosen)
    return CausalScorer(
        paged,
        LastToken(head, model.config.get_text_config().pad_token_id),
        source,
        num_pages=paged.num_pages,
        page_size=paged.page_size,
        max_rows=pool.max_rows,
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
    pool: _Pool,
    parse_special: bool,
) -> Scorer:
    rows = embedding_rows(language_model)
    source = PersonaTokens(persona, tokenizer, rows, parse_special=parse_special)
    paged = pool.paged(language_model)
    return PersonaScorer(
        paged,
        source,
        num_pages=paged.num_pages,
        page_size=paged.page_size,
        max_rows=pool.max_rows,
    )


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether the model is of a masked-LM family, and so bidirectional."""
    config = model.config
    decoder = getattr(config, "is_decoder", False) or config.is_encoder_decoder
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder


def _load_config(source: str, allow_pickle: bool) -> PretrainedConfig:
    """Load the configuration and refuse what it says cannot be used."""
    check_model_directory(source, allow_pickle=allow_pickle)
    try:
        fields, _ = PretrainedConfig.get_config_dict(source)
    except OSError as error:
        raise ModelLoadError(f"reward model {source!r}: {error}") from error
    names = fields.get("architectures") or ["a model without a class name"]
    native = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
    if fields.get("auto_map") and names[0] not in native:
        raise UnsupportedModelError(
            f"reward model {source!r} is {names[0]}, which needs its own remote code: "
            + _CALLABLE_ADVICE
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"reward model {source!r}: {error}") from error
    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"reward model {source!r} is {names[0]}, and transformers has no sequence classifier "
            f"of that family: {_CALLABLE_ADVICE}"
        )
    if names[0] in native:  # of anything else the head is missing, which is the better message
        check_labels(f"reward model {source!r}", config.num_labels)
    return config


def _load_model(
    source: str,
    config: PretrainedConfig,
    device: torch.device | str | None,
    dtype: torch.dtype | str,
    allow_pickle: bool,
    num_ranks: int,
) -> PreTrainedModel:
    try:
        with bars_on_terminals_only():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
                output_loading_info=True,
                **loading_options(num_ranks),
            )
    except (OSError, ValueError, RuntimeError) as error:
        hint = "" if allow_pickle else " (only safetensors are loaded unless allow_pickle=True)"
        raise ModelLoadError(f"reward model {source!r}: {error}{hint}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"reward model {source!r} has no weights for {', '.join(missing[:4])}"
            f"{' and others' if len(missing) > 4 else ''} of {type(model).__name__}; transformers "
            "would make them up at random. Its config.json names "
            f"{', '.join(config.architectures or ['no architecture'])}: is it a language model, or "
            f"one with a head of its own? If the latter, {_CALLABLE_ADVICE}"
        )
    heads = ("score.", "classifier.")
    unread = sorted(key for key in report["unexpected_keys"] if key.startswith(heads))
    if unread:
        raise ModelLoadError(
            f"reward model {source!r} has head weights that {type(model).__name__} does not read "
            f"({', '.join(unread)}): {_CALLABLE_ADVICE}"
        )
    loaded: PreTrainedModel = (model if num_ranks > 1 else model.to(device or "cpu")).eval()
    return loaded


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
