"""Arguments of a served application, named and with defaults as in ``stars-fast serve``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, create_model, model_validator

from stars_fast.config import FLAGS, Attention, Combine, KvDtype, Quantize
from stars_fast.outputs import TargetKind
from stars_fast.params import StarsParams, with_fields
from stars_fast.reward import Reward, rewards_of
from stars_fast.server.settings import ServerSettings

if TYPE_CHECKING:
    from stars_fast.rewards.load_several import RewardModelsLike

#: Seconds that a replica has to end beyond what its requests have.
_SHUTDOWN_SECONDS = 15.0


def _from_json(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


def _specs(value: object) -> object:
    """Read one text, or JSON text of several, as several."""
    if isinstance(value, str):
        return json.loads(value) if value.lstrip().startswith("[") else [value]
    return value


def _type_of(option: dataclasses.Field[Any]) -> Any:  # noqa: ANN401 - of a field
    """Return what an option is read as: devices and dtypes are text here."""
    if option.name == "max_rows":
        return Annotated[int, Field(ge=1)]
    if option.name == "chat_template_kwargs":
        return Annotated[dict[str, Any] | None, BeforeValidator(_from_json)]
    kinds: dict[str, Any] = {
        "bool": bool,
        "int": int,
        "int | None": int | None,
        "float": float,
        "float | None": float | None,
        "Attention": Attention,
        "Combine": Combine,
        "KvDtype": KvDtype,
        "Quantize": Quantize,
        "Quantize | None": Quantize | None,
    }
    return kinds.get(str(option.type), str | None if option.default is None else str)


_FIELDS: dict[str, Any] = {name: (_type_of(field), field.default) for name, field in FLAGS.items()}

#: Those of `Engine` that are flags of ``stars-fast serve``.
EngineArgs: Any = create_model(
    "EngineArgs",
    __config__=ConfigDict(extra="forbid", protected_namespaces=()),
    **_FIELDS,
)


class ServeArgs(EngineArgs):
    """Arguments of `stars_fast.cluster.serve.build_app`; text is read as what is wanted.

    Fields that are not described here are flags of ``stars-fast serve``.
    """

    model: str | None = Field(None, description="None: the demo's pair.")
    reward_model: str | Callable[..., Any] | None = None
    log_ratio: str | None = None
    reward: Annotated[tuple[str, ...], BeforeValidator(_specs)] = Field(
        (), description="One or more, each as of ``--reward``; several may be JSON text."
    )
    reward_num_pages: int | None = None

    params: Annotated[dict[str, Any], BeforeValidator(_from_json)] = Field(
        default_factory=dict, description="Fields of `StarsParams`; may be JSON text."
    )
    seed: int = Field(0, ge=0, lt=2**64)
    calibration_prompts: str | None = Field(None, description="File, read where this is built.")
    calibration_share: float | None = Field(
        None, gt=0, le=1, description="Each replica follows the requests that it is sent."
    )
    calibration_quantile: float = Field(0.9, gt=0, lt=1)
    calibration_targets: TargetKind = "pooled"

    served_model_name: str | None = None
    api_key: str | None = None
    chat_template: str | None = Field(None, description="File, read where this is built.")
    log_prompts: bool = False
    allowed_origins: tuple[str, ...] = ()
    tool_call_parser: str | None = None
    image_hosts: tuple[str, ...] = ()
    max_running: int | None = Field(None, ge=1)
    max_waiting: int = Field(256, ge=0)
    max_prompt_tokens: int | None = Field(None, ge=1)
    max_body_bytes: int = 1 << 20
    max_choices: int = 128
    request_timeout: float | None = 600.0
    drain_timeout: float = 30.0

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Requests of a replica to aim at; None: its `max_running`."
    )
    upscale_delay_s: float = Field(30.0, ge=0)
    downscale_delay_s: float = Field(600.0, ge=0)
    num_cpus: float = Field(1, ge=0, description="CPUs of each replica.")
    num_gpus: float = Field(0, ge=0, description="GPUs of each replica; at 0 Ray hides them.")

    @model_validator(mode="after")
    def _fit_together(self) -> ServeArgs:
        base = self.stars_params()
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must be at most max_replicas, {self.max_replicas}, "
                f"got {self.min_replicas}"
            )
        given = [name for name in ("reward_model", "log_ratio", "reward") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot be given together")
        if self.model is None and given:
            raise ValueError(f"{given[0]} needs model beside it")
        if self.model is not None and not given and base.kind.needs_reward:
            raise ValueError(f"reward_model is needed for method {base.method!r}")
        self.reward_models()
        self._check_target(base, judged=bool(given) or self.model is None)
        self.server_settings()
        return self

    def _check_target(self, base: StarsParams, *, judged: bool) -> None:
        if self.calibration_share is not None:
            for name, asked in (
                ("calibration_prompts", self.calibration_prompts is not None),
                ("params.budget", base.budget is not None),
                ("params.calibrate_prefixes", base.calibrate_prefixes),
            ):
                if asked:
                    raise ValueError(f"calibration_share and {name} cannot be given together")
            if not judged:
                raise ValueError("calibration_share needs reward_model")
            return
        asked = base.target_reward == "auto" or base.budget is not None
        if base.needs_target and asked and not self.calibration_prompts:
            name = "target_reward 'auto'" if base.budget is None else "budget"
            other = " or calibration_share" if base.budget is None else ""
            raise ValueError(f"params.{name} needs calibration_prompts{other}")

    def reward_models(self) -> RewardModelsLike | None:
        """Return what `Engine` takes as reward model."""
        if self.log_ratio is not None:
            from stars_fast.rewards.log_ratio import LogRatio  # slow to import

            return LogRatio.of(self.log_ratio)
        if self.reward:
            rewards = [Reward.of(spec) for spec in self.reward]
            rewards_of(rewards)
            return rewards
        return self.reward_model

    def stars_params(self) -> StarsParams:
        """Return the default parameters of requests."""
        return with_fields(StarsParams(), self.params)

    def server_settings(self) -> ServerSettings:
        """Return the settings of the HTTP application."""
        return ServerSettings(
            model_name=self.served_model_name or self.model or "demo",
            params=self.stars_params(),
            api_key=self.api_key,
            request_timeout=self.request_timeout,
            drain_timeout=self.drain_timeout,
            max_body_bytes=self.max_body_bytes,
            max_choices=self.max_choices,
            log_prompts=self.log_prompts,
            model_path=self.model,
            allowed_origins=self.allowed_origins,
            tool_call_parser=self.tool_call_parser,
            image_hosts=self.image_hosts,
        )

    def engine_options(self) -> dict[str, Any]:
        """Return the options of `Engine`, models and seed left out."""
        options: dict[str, Any] = self.model_dump(include={*FLAGS, "reward_num_pages"})
        return options

    def deployment_options(self) -> dict[str, Any]:
        """Return the options of `ray.serve.deployment`.

        A replica is sent as many requests as its engine takes; the others wait in Ray's proxies.
        Autoscaling aims at `target_ongoing_requests` for each replica, those in the proxies
        included.
        """
        running = self.max_running or self.max_rows
        return {
            "max_ongoing_requests": running + self.max_waiting,
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests or running,
                "upscale_delay_s": self.upscale_delay_s,
                "downscale_delay_s": self.downscale_delay_s,
            },
            "graceful_shutdown_timeout_s": self.drain_timeout + _SHUTDOWN_SECONDS,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }
