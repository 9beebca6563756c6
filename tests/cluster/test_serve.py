"""The arguments of a served application, and the health of a replica."""

from __future__ import annotations

from typing import Any

import pytest

from stars_fast import Engine

for package in ("ray.serve", "fastapi", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras ray and test")


from stars_fast.cluster.serve import build_app  # noqa: E402
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
        ({"params": '{"target_reward": "auto"}'}, "needs calibration_prompts"),
        ({"params": "{"}, "params"),
        ({"request_timeout": 0}, "request_timeout must be above 0"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_app(args)


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
