"""The arguments of a served application, and the health of a replica."""

from __future__ import annotations

from typing import Any

import pytest

from stars_fast import Engine, LogRatio, Reward

for package in ("ray.serve", "fastapi", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras ray and test")


from stars_fast.cluster.serve import Plan, build_app  # noqa: E402
from stars_fast.cluster.serve_args import ServeArgs  # noqa: E402


def test_arguments_become_options_of_the_deployment() -> None:
    pair = {"model": "lm", "reward_model": "rm"}
    args = ServeArgs.model_validate({**pair, "max_rows": "64", "num_gpus": "1", "max_replicas": 4})
    options = args.deployment_options()
    assert options["max_ongoing_requests"] == 64 + 256
    assert options["autoscaling_config"]["target_ongoing_requests"] == 64
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert options["graceful_shutdown_timeout_s"] > args.drain_timeout
    small = ServeArgs(**pair, max_running=8, max_waiting=2, target_ongoing_requests=5)
    assert small.deployment_options()["max_ongoing_requests"] == 10
    assert small.deployment_options()["autoscaling_config"]["target_ongoing_requests"] == 5
    assert args.engine_options()["max_rows"] == 64
    assert ServeArgs().server_settings().model_name == "demo"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "lm"}, "reward_model is needed for method 'stars'"),
        ({"reward_model": "rm"}, "reward_model needs model"),
        ({"max_row": 3}, "max_row"),
        ({"max_rows": 0}, "max_rows"),
        ({"min_replicas": 3}, "min_replicas must be at most max_replicas, 1, got 3"),
        ({"params": '{"betta": 1}'}, "unknown parameter 'betta'"),
        ({"params": '{"target_reward": "auto"}'}, "needs calibration_prompts or calibration_share"),
        ({"params": '{"budget": 3}'}, r"params.budget needs calibration_prompts \["),
        ({"calibration_share": 0}, "calibration_share"),
        ({"calibration_share": 0.1, "calibration_prompts": "x"}, "cannot be given together"),
        ({"calibration_share": 0.1, "params": {"budget": 3}}, "and params.budget cannot be given"),
        (
            {"model": "lm", "calibration_share": 0.1, "params": {"method": "vanilla"}},
            "calibration_share needs reward_model",
        ),
        ({"calibration_targets": "each"}, "calibration_targets"),
        ({"reward": "help=rm"}, "reward needs model beside it"),
        ({"model": "lm", "reward": "rm"}, "a reward must be NAME=DIR_OR_HUB_ID,..., got 'rm'"),
        ({"model": "lm", "reward": '["a=b", "a=c"]'}, "names of rewards must differ, 'a' is"),
        ({"model": "lm", "reward_model": "rm", "log_ratio": "dpo"}, "reward_model and log_ratio"),
        ({"params": "{"}, "params"),
        ({"request_timeout": 0}, "request_timeout must be above 0"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_app(args)


def test_rewards_are_those_of_the_flags() -> None:
    one = ServeArgs.model_validate({"model": "lm", "reward": "help=rm,weight=2"}).reward_models()
    two = ServeArgs(model="lm", reward='["help=rm,weight=2", "harm=other,at_most=1"]')
    assert one == [Reward("help", "rm", weight=2)]
    assert two.reward_models() == [*one, Reward("harm", "other", at_most=1)]
    ratio = ServeArgs(model="lm", log_ratio="dpo,beta=0.5").reward_models()
    assert ratio == LogRatio("dpo", beta=0.5)
    assert ServeArgs(model="lm", reward_model="rm").reward_models() == "rm"
    assert ServeArgs().reward_models() is None


def test_a_replica_follows_its_requests() -> None:
    told = ServeArgs(calibration_share=0.5, num_pages=64, params={"target_reward": "auto"})
    app = Plan(told, None, None).make("replica")
    try:
        engine = app.state.engine._engine
        assert engine.calibrates_on_requests
        params = told.stars_params()
        assert [o.error for o in engine.generate("The film was", params, use_tqdm=False)] == [None]
    finally:
        app.state.engine.close()


def test_a_replica_whose_engine_has_stopped_is_not_healthy() -> None:
    from fastapi import FastAPI

    from stars_fast.cluster.serve import StarsServer
    from stars_fast.engine.async_engine import AsyncEngine

    server, engine = StarsServer(), AsyncEngine(Engine.demo(num_pages=64, device="cpu"))
    server.app = FastAPI()
    server.app.state.engine = engine
    server.check_health()
    engine.close()
    with pytest.raises(RuntimeError, match="engine has stopped"):
        server.check_health()
