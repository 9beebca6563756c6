"""What a request asks for: ``extra_args={"stars": {...}}`` beside vLLM's sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from stars_fast.params import StarsParams, with_fields

if TYPE_CHECKING:
    from vllm import SamplingParams

#: The key in `SamplingParams.extra_args`, or in ``vllm_xargs`` of a body.
KEY = "stars"

#: Fields of vLLM's `SamplingParams` that are fields of `StarsParams`, by the same names.
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words"),
    *("max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos"),
)
#: Fields that say nothing of what is drawn, or that vLLM has carried out before its scheduler.
_NEUTRAL = (
    *("n", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    *("include_stop_str_in_output", "output_kind", "stream_interval", "output_text_buffer_length"),
    *("skip_clone", "skip_reading_prefix_cache", "flat_logprobs", "extra_args"),
)
_HERE = tuple(
    field.name
    for field in fields(StarsParams)
    if field.name not in (*SAMPLING, "n", "top_logprobs")
)


def params_of(base: StarsParams, sampling: SamplingParams) -> StarsParams:
    """Return the parameters of a request that has our key; `base`: see `request_params`.

    Raises
    ------
    ValueError, TypeError
        As `request_params`.
    """
    defaults = type(sampling)()
    names = sampling.__struct_fields__
    values, usual = ({name: getattr(x, name) for name in names} for x in (sampling, defaults))
    return request_params(base, (sampling.extra_args or {})[KEY], values, usual)


def request_params(
    base: StarsParams, given: object, sampling: Mapping[str, Any], defaults: Mapping[str, Any]
) -> StarsParams:
    """Return the parameters of a request.

    Parameters
    ----------
    base
        Defaults of what `given` leaves out.
    given
        An object with fields of `StarsParams`, or its JSON text; those of `SAMPLING` not.
    sampling, defaults
        Every field of the request's `SamplingParams`, and of those that ask for nothing.

    Raises
    ------
    ValueError, TypeError
        Naming the field, its value and what is allowed.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"{KEY} must be an object or its JSON text: {error}") from error
    if not isinstance(given, Mapping):
        raise TypeError(f"{KEY} must be an object, got {given!r:.80}")
    for name in given:
        if name in SAMPLING or name in ("n", "top_logprobs"):
            raise ValueError(
                f"{name} must be given in the sampling parameters, not in {KEY}, got "
                f"{given[name]!r:.80}"
            )
        if name not in _HERE:
            raise ValueError(f"unknown field {name!r} in {KEY}; the fields are {', '.join(_HERE)}")
    for name, value in sampling.items():
        if name in SAMPLING or name in _NEUTRAL or name.startswith("_"):
            continue
        if value != defaults[name] and (value or defaults[name]):
            raise ValueError(f"{name} must be {defaults[name]!r} with {KEY}, got {value!r:.80}")
    drawn = {name: sampling[name] for name in SAMPLING}
    for name in ("stop", "stop_token_ids", "bad_words", "logit_bias"):
        drawn[name] = drawn[name] or None
    drawn["top_k"] = max(drawn["top_k"], 0)  # -1 is vLLM's other word for all
    params = with_fields(base, {**given, **drawn})
    if params.target_reward == "auto" and params.needs_target:
        raise ValueError(f"target_reward must be a number in {KEY}, got 'auto'")
    return params
