"""``stars-fast serve``: an HTTP server with OpenAI's API."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import signal
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stars_fast.cli import demo
from stars_fast.cli.calibration import add_targets_flag, told, told_budget
from stars_fast.cli.errors import UsageError, file_errors, value_errors
from stars_fast.cli.flags import add_params_flags, params_from
from stars_fast.cli.lines import Requests, opened_input
from stars_fast.cli.model_flags import (
    add_model_flags,
    add_tensor_parallel_flag,
    check_models,
    load_engine,
    reward_model_of,
)
from stars_fast.cli.terminal import say
from stars_fast.params import StarsParams
from stars_fast.records import LineError
from stars_fast.text.tool_calls import TOOL_CALL_PARSERS

if TYPE_CHECKING:
    from stars_fast.engine import Engine
    from stars_fast.server import ServerSettings
    from stars_fast.server.host import FrontProcess

_DEMO_PROMPTS = 32
_KEY_VARIABLE = "STARS_FAST_API_KEY"

_EPILOG = f"""\
Without models, the demo's pair is served. The parameters are the defaults of requests. With
--target-reward auto, the target is found at start-up from samples for the prompts of
--calibration-prompts, or with --calibration-share from the requests while they are served; without
a target, every request must give its own.

Endpoints: /v1/completions, /v1/chat/completions, /v1/responses, /v1/models, /health, /ready,
/metrics, /openapi.json, and a page to try prompts on at /; docs/serving.md lists all. Logs are JSON
lines on standard error. On SIGTERM the server accepts no new requests, finishes those under way and
exits. The API key can also be set in {_KEY_VARIABLE}.

exit codes: 0 stopped; 1 could not start, or the engine has failed; 2 wrong flags or files; 130
interrupted
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``serve`` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="serve a model pair over HTTP with OpenAI's API",
        description="Serve a model pair over HTTP with OpenAI's API.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_tensor_parallel_flag(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="INT", help="(default: 8000)")
    server.add_argument("--api-key", metavar="KEY", help="key that clients must send to /v1")
    server.add_argument(
        "--served-model-name", metavar="NAME", help="(default: the value of --model, or demo)"
    )
    server.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template (default: the tokenizer's)"
    )
    server.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose pages may call this server (CORS), or *; can be repeated",
    )
    server.add_argument(
        "--tool-call-parser",
        choices=[*TOOL_CALL_PARSERS],
        help="how the model writes calls of tools, which chats then answer as tool_calls "
        "(default: they stay text)",
    )
    server.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures that chats link to from this host, HOST or HOST:PORT; can be repeated "
        "(default: pictures come as data URLs only)",
    )
    server.add_argument("--log-prompts", action="store_true", help="also log prompts and responses")
    server.add_argument("--seed", type=int, default=0, metavar="INT", help="(default: 0)")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-running",
        type=int,
        metavar="INT",
        help="requests in the engine at once (default: --max-rows)",
    )
    limits.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="INT",
        help="requests in the queue; further ones get status 429 (default: 256)",
    )
    limits.add_argument(
        "--max-prompt-tokens",
        type=int,
        metavar="INT",
        help="(default: what the model's context leaves)",
    )
    limits.add_argument(
        "--max-body-bytes",
        type=int,
        default=1 << 20,
        metavar="INT",
        help="size of a request body (default: 1048576)",
    )
    limits.add_argument(
        "--max-choices",
        type=int,
        default=128,
        metavar="INT",
        help="responses drawn for one request (default: 128)",
    )
    limits.add_argument(
        "--request-timeout",
        type=float,
        default=600.0,
        metavar="FLOAT",
        help="seconds before a request is aborted (default: 600)",
    )
    limits.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="FLOAT",
        help="seconds to finish requests when the server stops (default: 30)",
    )
    limits.add_argument(
        "--stuck-after",
        type=float,
        default=300.0,
        metavar="FLOAT",
        help="seconds of one round after which /health and /ready answer 503 (default: 300)",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration-prompts",
        metavar="FILE",
        help="prompts for --target-reward auto, JSON lines as for generate",
    )
    calibration.add_argument(
        "--calibration-share",
        type=float,
        metavar="FLOAT",
        help="in place of prompts: the target follows the requests, by unaligned samples of their "
        "prompts, which take at most this share of the tokens drawn, in (0, 1], such as 0.05",
    )
    calibration.add_argument(
        "--calibration-quantile",
        type=float,
        default=0.9,
        metavar="FLOAT",
        help="quantile of the samples' rewards that becomes the target (default: 0.9)",
    )
    add_targets_flag(calibration)
    add_params_flags(parser, {})
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises
    ------
    UsageError
        Wrong flags or files, before any model is loaded where that is possible.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"serve needs {package}, which is not installed: pip install 'stars_fast[server]'"
            )
    try:
        base = params_from(args, demo.DEFAULTS if args.model is None else {})
        settings = _settings(args, base)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    prompts = _calibration_prompts(args, base)
    template = _chat_template(args)
    _check_port(args.host, args.port)
    from stars_fast.server.host import FrontProcess

    # Of the ranks that torchrun has started, the first alone serves.
    leads = not args.tensor_parallel or os.environ.get("RANK", "0") == "0"
    with FrontProcess() if leads else nullcontext() as front:
        return _with_engine(load_engine(args), front, settings, args, base, prompts, template)


def _with_engine(
    engine: Engine,
    front: FrontProcess | None,
    settings: ServerSettings,
    args: argparse.Namespace,
    base: StarsParams,
    prompts: list[Any],
    template: str | None,
) -> int:
    gc.collect()
    gc.freeze()  # a collection that looked at all that is loaded would hold a round up for 0.2 s
    if template is not None:
        if engine.tokenizer is None:
            raise UsageError("--chat-template needs a model with a tokenizer")
        engine.tokenizer.chat_template = template
    if front is None:
        # torchrun sends signals to all: these end when rank 0 has drained.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        engine.follow()
        return 0
    with engine.lead():
        if args.calibration_share is not None:
            with value_errors():
                engine.calibrate_on_requests(
                    args.calibration_quantile,
                    args.calibration_share,
                    targets=args.calibration_targets,
                )
        elif prompts:
            _calibrate(engine, prompts, base, args)
        return _serve(engine, front, settings, args)


def _settings(args: argparse.Namespace, base: StarsParams) -> ServerSettings:
    from stars_fast.server import ServerSettings

    check_models(args, base)
    if not 0 < args.calibration_quantile < 1:
        raise ValueError(
            f"--calibration-quantile must be in (0, 1), got {args.calibration_quantile}"
        )
    _check_share(args, base)
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"--seed must be in [0, 2**64), got {args.seed}")
    if args.api_key == "":
        raise ValueError("--api-key must not be empty: leave it out to ask for none")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must be in [0, 65536), got {args.port}")
    return ServerSettings(
        model_name=args.served_model_name or args.model or "demo",
        params=base,
        api_key=args.api_key or os.environ.get(_KEY_VARIABLE) or None,
        request_timeout=args.request_timeout,
        drain_timeout=args.drain_timeout,
        max_body_bytes=args.max_body_bytes,
        max_choices=args.max_choices,
        log_prompts=args.log_prompts,
        model_path=args.model,
        allowed_origins=tuple(args.allow_origin),
        tool_call_parser=args.tool_call_parser,
        image_hosts=tuple(args.allow_image_host),
    )


def _check_share(args: argparse.Namespace, base: StarsParams) -> None:
    """Raise ValueError where the target cannot follow the requests as it is asked to."""
    share = args.calibration_share
    if share is None:
        return
    if not 0 < share <= 1:
        raise ValueError(f"--calibration-share must be in (0, 1], got {share}")
    for flag, given in (
        ("--calibration-prompts", args.calibration_prompts is not None),
        ("--budget", base.budget is not None),
        ("--calibrate-prefixes", base.calibrate_prefixes),
        ("--tensor-parallel", args.tensor_parallel),
    ):
        if given:
            raise ValueError(f"--calibration-share and {flag} cannot be given together")
    if args.model is not None and reward_model_of(args) is None:
        raise ValueError("--calibration-share needs --reward-model")


def _calibration_prompts(args: argparse.Namespace, base: StarsParams) -> list[Any]:
    """The prompts to calibrate on; empty if the target is not calibrated."""
    if not base.needs_target or (base.target_reward != "auto" and base.budget is None):
        return []
    if args.calibration_share is not None:
        return []
    if args.calibration_prompts is None:
        if args.model is None:
            from stars_fast.demo import prompts

            return list(prompts(_DEMO_PROMPTS))
        flag = "--target-reward auto" if base.budget is None else "--budget"
        other = " or --calibration-share FLOAT" if base.budget is None else ""
        raise UsageError(f"{flag} needs --calibration-prompts FILE{other}")
    found = []
    with opened_input(Path(args.calibration_prompts), []) as read_line:
        requests = Requests(read_line, base, args.seed)
        while (item := requests.take(wait=True)) is not None:
            if isinstance(item, LineError):
                raise UsageError(f"{args.calibration_prompts}: {item}")
            found.append(item.prompt)
    if not found:
        raise UsageError(f"{args.calibration_prompts} has no prompts")
    return found


def _check_port(host: str, port: int) -> None:
    """Raise UsageError where nothing can listen there: now, and not when models are loaded."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen at --host {host} --port {port}: {error.strerror}"
        ) from None


def _chat_template(args: argparse.Namespace) -> str | None:
    if args.chat_template is None:
        return None
    with file_errors():
        return Path(args.chat_template).read_text(encoding="utf-8")


def _calibrate(
    engine: Engine, prompts: list[Any], base: StarsParams, args: argparse.Namespace
) -> None:
    try:
        found = engine.calibrate(
            prompts,
            args.calibration_quantile,
            params=replace(base, n=1),
            use_tqdm=False,
            targets=args.calibration_targets,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"calibration on {len(prompts)} prompts: {error}") from error
    say(told(found, args.calibration_quantile, f"{len(prompts)} prompts"))
    if base.budget is not None:
        try:
            say(told_budget(base, engine.within_budget(base)))
        except ValueError as error:
            raise UsageError(str(error)) from error


def _serve(
    engine: Engine, front: FrontProcess, settings: ServerSettings, args: argparse.Namespace
) -> int:
    from stars_fast.server.host import EngineHost
    from stars_fast.server.run import run_server

    calibrated = engine.calibrates_on_requests or engine.calibration is not None
    if settings.params.needs_calibration and not calibrated:
        say("no target reward: each request must give target_reward, or another method")
    try:
        running = EngineHost(
            engine,
            front,
            settings,
            args.host,
            args.port,
            max_running=args.max_running,
            max_waiting=args.max_waiting,
            max_prompt_tokens=args.max_prompt_tokens,
            stuck_after=args.stuck_after,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    run_server(running)
    return 0
