"""What the routes in ``vllm serve`` are told, by environment variables."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stars_fast.config import Quantize
from stars_fast.engine.async_engine import STUCK_AFTER
from stars_fast.params import StarsParams, with_fields
from stars_fast.remote.rewards import RemoteReward
from stars_fast.rewards.load import RewardModelLike
from stars_fast.server.settings import ServerSettings

OPTIONS = "STARS_OPTIONS"
REWARD_MODEL = "STARS_REWARD_MODEL"


class PluginOptions(BaseModel):
    """The JSON object of `STARS_OPTIONS`.

    Fields that are not described here are those of `StarsLLM`, flags of ``stars-fast serve``, or
    arguments of `AsyncEngine`.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    reward_model: str | dict[str, Any] | None = Field(
        None,
        description="A directory or hub id; an object with the arguments of `RemoteReward`; or "
        '`{"function": "MODULE:NAME"}`.',
    )
    params: dict[str, Any] = Field({}, description="Fields of `StarsParams`.")

    tokenizer: str | None = None
    logprobs: bool = True
    seed: int | None = Field(0, ge=0, lt=2**64)
    max_rows: int = Field(256, ge=1)
    overlap_scoring: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    parse_special: bool = False
    trust_remote_code: bool = False
    reward_template: str | None = None
    reward_head: str | None = None
    reward_device: str = "cpu"
    reward_num_pages: int | None = None
    reward_timeout: float | None = None
    reward_quantize: Quantize = "none"
    dtype: str = "auto"
    allow_pickle: bool = False

    max_running: int | None = Field(None, ge=1)
    max_waiting: int = Field(256, ge=0)
    max_prompt_tokens: int | None = Field(None, ge=1)
    stuck_after: float | None = Field(STUCK_AFTER, gt=0)

    log_prompts: bool = False
    max_body_bytes: int = 1 << 20
    max_choices: int = 128
    request_timeout: float | None = 600.0
    drain_timeout: float = 30.0

    @model_validator(mode="after")
    def _fit_together(self) -> PluginOptions:
        base = self.stars_params()
        if self.reward_model is None and base.kind.needs_reward:
            raise ValueError(
                f"reward_model is needed for method {base.method!r}: set {REWARD_MODEL}, or "
                f"reward_model in {OPTIONS}"
            )
        if base.target_reward == "auto" and base.needs_target:
            raise ValueError("params.target_reward must be a number or null, got 'auto'")
        self.server_settings("model", ())
        return self

    def stars_params(self) -> StarsParams:
        """Return the default parameters of requests."""
        return with_fields(StarsParams(), self.params)

    def server_settings(self, model: str, api_keys: tuple[str, ...]) -> ServerSettings:
        """Return the settings of the HTTP application of a model."""
        return ServerSettings(
            model_name=model,
            params=self.stars_params(),
            api_key=api_keys or None,
            request_timeout=self.request_timeout,
            drain_timeout=self.drain_timeout,
            max_body_bytes=self.max_body_bytes,
            max_choices=self.max_choices,
            log_prompts=self.log_prompts,
        )

    def engine_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `StarsLLM` but the reward model."""
        return self.model_dump(
            include={
                *("tokenizer", "logprobs", "seed", "max_rows", "overlap_scoring"),
                *("chat_template_kwargs", "parse_special", "trust_remote_code"),
                *("reward_template", "reward_head", "reward_device", "reward_num_pages"),
                *("reward_timeout", "reward_quantize", "dtype", "allow_pickle"),
            }
        )

    def queue_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `AsyncEngine`."""
        return self.model_dump(
            include={"max_running", "max_waiting", "max_prompt_tokens", "stuck_after"}
        )

    def make_reward_model(self) -> RewardModelLike | None:
        """Return what `StarsLLM` takes as reward model.

        Raises
        ------
        ValueError
            If it is an object, and not one of a `RemoteReward` or of a function that can be
            imported.
        """
        given = self.reward_model
        if not isinstance(given, dict):
            return given
        if given.keys() == {"function"}:
            return _function(str(given["function"]))
        try:
            return RemoteReward(**given)
        except TypeError as error:
            raise ValueError(f"reward_model must be arguments of RemoteReward: {error}") from error


def options_from(environment: Mapping[str, str]) -> PluginOptions:
    """Read the options: JSON text in `STARS_OPTIONS`, or the path of a file with that.

    `STARS_REWARD_MODEL` is a short way to say ``{"reward_model": "..."}``.

    Raises
    ------
    ValueError
        Naming the variable, and what is wrong with it.
    """
    text = environment.get(OPTIONS, "").strip() or "{}"
    try:
        if not text.startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{OPTIONS} must be a JSON object or a file with one: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{OPTIONS} must be a JSON object, got {values!r:.80}")
    reward = environment.get(REWARD_MODEL)
    if reward and values.setdefault("reward_model", reward) != reward:
        raise ValueError(f"{REWARD_MODEL} and reward_model in {OPTIONS} must not differ")
    try:
        return PluginOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{OPTIONS}: {where}{': ' if where else ''}{what}") from error


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward_model: cannot import {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward_model: {name!r} must be a function, got {found!r:.80}")
    reward: Callable[..., Any] = found
    return reward
