"""STARS as a decoding method of transformers: ``model.generate(..., custom_generate=generate)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from stars_fast.engine import Engine
from stars_fast.errors import RequestFailedError
from stars_fast.outputs import CompletionOutput
from stars_fast.params import StarsParams
from stars_fast.reward import Reward
from stars_fast.rewards.load_several import RewardModelsLike
from stars_fast.seeds import derive_seed

__all__ = ["StarsGenerateOutput", "generate"]

#: Where a model keeps the engine that was made for it.
_KEPT = "_stars_fast_engine"
#: In the order in which transformers and the engine apply them, with the attribute of the value.
_PROCESSORS: tuple[tuple[type, str, str], ...] = (
    (SequenceBiasLogitsProcessor, "logit_bias", "sequence_bias"),
    (RepetitionPenaltyLogitsProcessor, "repetition_penalty", "penalty"),
    (MinLengthLogitsProcessor, "min_length", "min_length"),
    (MinNewTokensLengthLogitsProcessor, "min_tokens", "min_new_tokens"),
    (TemperatureLogitsWarper, "temperature", "temperature"),
    (TopKLogitsWarper, "top_k", "top_k"),
    (TopPLogitsWarper, "top_p", "top_p"),
    (MinPLogitsWarper, "min_p", "min_p"),
)
_OFF = {
    "logit_bias": None,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}
#: Fields of `StarsParams` that `model.generate` has arguments for.
_GIVEN_BY_TRANSFORMERS = (
    *_OFF,
    "max_tokens",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
#: What transformers hands to every decoding method and paged decoding has no use for.
_NEEDLESS = {"use_cache", "position_ids", "cache_position", "logits_to_keep"}


@dataclass
class StarsGenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with ``return_dict_in_generate=True``.

    Attributes
    ----------
    sequences
        int64 ``[B, T]``: prompts, responses, padding on the right.
    rewards
        float32 ``[B]``, reward of each response; None with ``method="vanilla"``.
    completions
        Each response with its segments.
    """

    rewards: Tensor | None = None
    completions: list[CompletionOutput] | None = None


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    reward_model: RewardModelsLike | None = None,
    stars_params: StarsParams | None = None,
    lm_tokenizer: PreTrainedTokenizerBase | None = None,
    engine_options: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> Tensor | StarsGenerateOutput:
    """Decode a batch with `Engine`, as ``model.generate(custom_generate=generate)`` asks for it.

    ``model.generate(**inputs, custom_generate=stars_fast.hf.generate, reward_model=...,
    do_sample=True, max_new_tokens=128)``. From `model.generate` come the batch and its padding,
    `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `sequence_bias` of
    single tokens, `min_new_tokens` or `min_length`, `max_new_tokens` or `max_length`,
    `eos_token_id`, `num_return_sequences` and `return_dict_in_generate`. A penalty, a constraint or
    a stopping criterion of another kind is refused, as is what scores, attentions or hidden states
    would need. transformers hands no `streamer` and no `tokenizer` to a function (5.23).

    The engine is kept with the model for the next call with the same `reward_model`,
    `lm_tokenizer` and `engine_options`; what it has cached of prompts is forgotten at each call, so
    weights may be trained in between.

    Parameters
    ----------
    model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        From transformers; ids int64 ``[B, T]``, padded on the left.
    reward_model
        As for `Engine`.
    stars_params
        Method, target reward and other fields that transformers has no argument for; None: the
        defaults. A request's seed follows from `seed` and its row, or from torch's global generator
        where that is None.
    lm_tokenizer
        Of `model`; None: loaded from where the model came from, if there is one. A reward model on
        the same token ids needs none.
    engine_options
        Further arguments of `Engine`, such as ``{"num_pages": 4096}``.

    Returns
    -------
    Tensor or StarsGenerateOutput
        int64 ``[B, T']``, prompts and responses padded on the right; the latter with
        ``return_dict_in_generate=True``.

    Raises
    ------
    ValueError
        If transformers' arguments ask for what cannot be honoured, or `stars_params` set what they
        are to set, or `Engine` refuses one of its own.
    RequestFailedError
        If one of the requests fails.
    """
    prompts = _prompts(input_ids, model_kwargs)
    _refuse_outputs(generation_config)
    params = replace(
        _own(stars_params or StarsParams()),
        max_tokens=generation_config.max_length - input_ids.shape[1],
        stop_token_ids=_stop_token_ids(stopping_criteria),
        ignore_eos=True,  # they are in the line above
    )
    values = _sampling(logits_processor, generation_config)
    least = values.pop("min_length", 0) - input_ids.shape[1]
    values["min_tokens"] = max(values["min_tokens"], least)
    values["top_k"] = min(values["top_k"], model.config.get_text_config().vocab_size)
    params = replace(params, **{k: v for k, v in values.items() if k in params.own_parameters()})
    engine = _engine(model, reward_model, lm_tokenizer, dict(engine_options or {}))
    seed = params.seed
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (1,)))
    each = [replace(params, seed=derive_seed(seed, row)) for row in range(len(prompts))]
    completions = []
    for row, output in enumerate(engine.generate(prompts, each, use_tqdm=False)):
        if output.error is not None:
            raise RequestFailedError(f"row {row} of the batch: {output.error}")
        completions += output.outputs
    sequences = _joined(input_ids, completions, generation_config)
    if not generation_config.return_dict_in_generate:
        return sequences
    rewards = [c.reward for c in completions if c.reward is not None]
    return StarsGenerateOutput(
        sequences=cast("torch.LongTensor", sequences),
        rewards=torch.tensor(rewards) if rewards else None,
        completions=completions,
    )


def _prompts(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """The ids of each row, without its padding."""
    given = {name for name, value in model_kwargs.items() if value is not None}
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("past_key_values must be left out, or empty: the engine has its own pages")
    unknown = given - _NEEDLESS - {"attention_mask", "past_key_values"}
    if unknown:
        raise ValueError(f"{min(unknown)} must be left out: the engine runs token ids alone")
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        return [list(row) for row in input_ids.tolist()]
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask must pad on the left: set tokenizer.padding_side = 'left'")
    return [ids[keep.bool()].tolist() for ids, keep in zip(input_ids, mask, strict=True)]


def _refuse_outputs(config: GenerationConfig) -> None:
    names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    for name in names:
        if getattr(config, name, None):
            raise ValueError(f"{name} must be False: the engine does not keep them")


def _own(params: StarsParams) -> StarsParams:
    """Check that nothing is set in two places."""
    for item in fields(params):
        if item.name in _GIVEN_BY_TRANSFORMERS and getattr(params, item.name) != item.default:
            raise ValueError(
                f"{item.name} must be left out of stars_params: model.generate has arguments for "
                f"it, got {getattr(params, item.name)!r}"
            )
    return params


def _stop_token_ids(criteria: StoppingCriteriaList) -> list[int]:
    found: list[int] = []
    for one in criteria:
        if isinstance(one, EosTokenCriteria):
            found += one.eos_token_id.tolist()
        elif not isinstance(one, MaxLengthCriteria):
            raise ValueError(
                f"stopping_criteria must be a length or end-of-sequence tokens, got a "
                f"{type(one).__name__}"
            )
    return found


def _sampling(processors: LogitsProcessorList, config: GenerationConfig) -> dict[str, Any]:
    """Biases, penalties, temperature and filters, from what transformers made of its arguments."""
    if not config.do_sample:
        raise ValueError(
            "do_sample must be True: greedy decoding has one candidate for each segment"
        )
    values: dict[str, Any] = dict(_OFF)
    rest = iter(_PROCESSORS)
    for processor in processors:
        for kind, name, attribute in rest:
            if type(processor) is kind:
                values[name] = getattr(processor, attribute)
                break
        else:
            order = ", ".join(kind.__name__ for kind, _, _ in _PROCESSORS)
            raise ValueError(
                f"logits_processor must hold none but {order}, in this order, got a "
                f"{type(processor).__name__}"
            )
    if values["logit_bias"]:
        values["logit_bias"] = _single_tokens(values["logit_bias"])
    return values


def _single_tokens(biases: Mapping[tuple[int, ...], float]) -> dict[int, float]:
    for tokens in biases:
        if len(tokens) != 1:
            raise ValueError(f"sequence_bias must be of single tokens, got {list(tokens)}")
    return {tokens[0]: bias for tokens, bias in biases.items()}


class _Kept:
    """The engine of a model. A copy of the model, or a pickled one, has none."""

    def __init__(self, key: tuple[object, ...], engine: Engine) -> None:
        self.key = key
        self.engine = engine

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


def _engine(
    model: PreTrainedModel,
    reward_model: RewardModelsLike | None,
    tokenizer: PreTrainedTokenizerBase | None,
    options: dict[str, Any],
) -> Engine:
    key = (reward_model, tokenizer, options)
    kept = model.__dict__.get(_KEPT)
    if isinstance(kept, _Kept) and _same(kept.key, key) and not kept.engine.has_unfinished():
        kept.engine.reset_prefix_cache()
        return kept.engine
    model.__dict__.pop(_KEPT, None)  # first, for its pages
    engine = Engine(model, reward_model, tokenizer=tokenizer or _tokenizer_of(model), **options)
    model.__dict__[_KEPT] = _Kept(key, engine)
    return engine


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    (reward, tokenizer, options), (reward_2, tokenizer_2, options_2) = one, other
    by_value = isinstance(reward, str | Path | Reward | list | tuple)
    same_reward = reward is reward_2 or (by_value and reward == reward_2)
    return same_reward and tokenizer is tokenizer_2 and options == options_2


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    source = model.config.name_or_path
    if not source:
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None  # the engine says so if it needs one


def _joined(
    input_ids: Tensor, completions: list[CompletionOutput], config: GenerationConfig
) -> Tensor:
    pad = config._pad_token_tensor
    responses = [torch.tensor(c.token_ids, dtype=torch.int64) for c in completions]
    padded = torch.nn.utils.rnn.pad_sequence(
        responses, batch_first=True, padding_value=0 if pad is None else int(pad)
    )
    return torch.cat((input_ids, padded.to(input_ids)), dim=1)
