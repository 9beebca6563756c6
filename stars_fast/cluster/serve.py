"""The server of `stars_fast.server` as replicas of a Ray Serve deployment.

    serve run stars_fast.cluster.serve:build_app model=DIR reward_model=DIR num_gpus=1

Each replica holds an engine. Ray's proxies share out the requests, and Ray adds and removes
replicas by how many requests there are for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from stars_fast.cluster.engines import calibrate, load_engine
from stars_fast.cluster.rows import index_of, read_rows
from stars_fast.cluster.serve_args import ServeArgs
from stars_fast.outputs import Calibration

if TYPE_CHECKING:
    from stars_fast.engine.async_engine import AsyncEngine

#: Name of the deployment.
DEPLOYMENT = "stars_fast"
_KEY_VARIABLE = "STARS_FAST_API_KEY"


class StarsServer:
    """A replica. Ray asks it whether it works, and starts another one if it does not."""

    app: FastAPI  # from `serve.ingress`

    def check_health(self) -> None:
        """Report to Ray that the replica is healthy.

        Raises
        ------
        RuntimeError
            If the engine has stopped, or its rounds keep failing.
        """
        engine: AsyncEngine = self.app.state.engine
        if not engine.healthy:
            raise RuntimeError("the engine has stopped, or its rounds keep failing")


@dataclass(frozen=True)
class Plan:
    """What a replica is made from."""

    args: ServeArgs
    calibration: Calibration | None
    chat_template: str | None

    def make(self, replica: str) -> FastAPI:
        """Load the models, start the engine and return the HTTP application.

        Parameters
        ----------
        replica
            Its id. Requests without a seed are drawn by seeds that follow from it, so that two
            replicas do not answer a prompt with the same draws.
        """
        from stars_fast.engine.async_engine import AsyncEngine
        from stars_fast.seeds import derive_seed
        from stars_fast.server import create_app
        from stars_fast.server.logs import configure_logs

        args = self.args
        seed = derive_seed(args.seed, index_of(replica))
        engine = load_engine(args.model, args.reward_models(), seed, args.engine_options())
        if args.calibration_share is not None:
            engine.calibrate_on_requests(
                args.calibration_quantile, args.calibration_share, targets=args.calibration_targets
            )
        else:
            engine.calibration = self.calibration
        if self.chat_template is not None and engine.tokenizer is not None:
            engine.tokenizer.chat_template = self.chat_template
        running = AsyncEngine(
            engine,
            max_running=args.max_running,
            max_waiting=args.max_waiting,
            max_prompt_tokens=args.max_prompt_tokens,
        )
        configure_logs()
        app = create_app(running, args.server_settings())
        app.state.engine = running
        return app


def build_app(args: dict[str, Any]) -> Application:
    """Return the application, for ``serve run`` and for `ray.serve.run`.

    With ``target_reward="auto"`` a Ray task with the resources of a replica finds the target
    first, once for all replicas.

    Parameters
    ----------
    args
        Fields of `stars_fast.cluster.serve_args.ServeArgs`, also as text, as ``serve run`` has it.

    Raises
    ------
    ValueError
        An argument that is unknown or out of range.

    Notes
    -----
    Without the argument `api_key`, the key is the value of `STARS_FAST_API_KEY` in this process.
    """
    told = ServeArgs.model_validate({"api_key": os.environ.get(_KEY_VARIABLE) or None, **args})
    template = told.chat_template
    plan = Plan(
        told,
        _calibration(told),
        None if template is None else Path(template).read_text(encoding="utf-8"),
    )
    server = serve.ingress(_builder(plan))(StarsServer)
    deployment = serve.deployment(name=DEPLOYMENT, **told.deployment_options())(server)
    return deployment.bind()


def _builder(plan: Plan) -> Callable[[], FastAPI]:
    """What Ray calls in each replica; a function, as it tells an application from it by that."""

    def build() -> FastAPI:
        return plan.make(serve.get_replica_context().replica_id.unique_id)

    return build


def _calibration(args: ServeArgs) -> Calibration | None:
    base = args.stars_params()
    if args.calibration_prompts is None or not base.needs_target:
        return None
    return calibrate(
        read_rows(args.calibration_prompts),
        args.model,
        args.reward_models(),
        quantile=args.calibration_quantile,
        targets=args.calibration_targets,
        num_prompts=None,
        params=base,
        seed=args.seed,
        num_cpus=args.num_cpus,
        num_gpus=args.num_gpus,
        **args.engine_options(),
    )
