"""The front in its process: what it needs, what travels, and what happens when one side is gone."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

import httpx  # noqa: E402
from helpers.serving import PARAMS, Gate, letter_engine, until  # noqa: E402

from stars_fast import StarsParams  # noqa: E402
from stars_fast.benchmarks.server_thread import server_with_front  # noqa: E402
from stars_fast.errors import EngineStoppedError, NotCalibratedError  # noqa: E402
from stars_fast.server import ServerSettings  # noqa: E402
from stars_fast.server.growth import Cutter, Growth, Joiner  # noqa: E402
from stars_fast.server.host import EngineHost, FrontProcess  # noqa: E402
from stars_fast.server.run import run_server  # noqa: E402
from stars_fast.server.wire import Setup, Unpacker, packed, portable  # noqa: E402


def test_it_starts_without_torch() -> None:
    code = "import sys, stars_fast.server.front; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "top_logprobs": 2, "trace": True},
        {"stop": ["ab", "ba"], "segment_length": 1, "seed": 5, "n": 4},
        {"method": "best_of_n"},
    ],
    ids=["n", "stop", "best_of_n"],
)
def test_outputs_travel_as_what_is_new(fields: dict[str, Any]) -> None:
    method = fields.pop("method", "stars")
    params: StarsParams = PARAMS.with_method(method, **fields)
    engine, cutter, joiner = letter_engine(Gate()), Cutter(), Joiner("x")
    engine.add_request("x", "ab", params)
    growths: list[Growth] = []
    while engine.has_unfinished():
        for output in engine.step():
            growths.append(pickle.loads(pickle.dumps(cutter.cut(output))))
            joined = joiner.join(growths[-1])
            assert joined == output
            assert joined.drafted_tokens == output.drafted_tokens
    sent = sum(len(part.token_ids) for growth in growths for part in growth.parts)
    assert sent == sum(len(one.token_ids) for one in output.outputs)
    assert [growth.prompt is None for growth in growths] == [False] + [True] * (len(growths) - 1)


def test_garbage_is_not_sought_at_every_request() -> None:
    ours, theirs = socket.socketpair()
    code = (
        "import gc; from stars_fast.server.front import FrontServer, main; "
        "FrontServer.run = lambda self: print(gc.get_freeze_count(), gc.get_threshold()[0]); "
        f"main({theirs.fileno()})"
    )
    told = Setup(
        ServerSettings("x", PARAMS), ("127.0.0.1", 0), None, None, 8, True, (1, 1), None, {}
    )
    with ours, theirs:
        ours.sendall(packed([("setup", told)]))
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            pass_fds=[theirs.fileno()],
        )
    frozen, threshold = map(int, done.stdout.split())
    assert frozen > 10_000
    assert threshold > 10_000


def test_messages_come_in_pieces() -> None:
    messages = [("a", 1), ("b", "x" * 300)]
    data = packed(messages) + packed([("c",)])
    received = Unpacker()
    found = [one for at in range(0, len(data), 7) for one in received.feed(data[at : at + 7])]
    assert found == [*messages, ("c",)]


class _OddError(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (NotCalibratedError("none"), NotCalibratedError, "none"),
        (_OddError(1, 2), RuntimeError, "_OddError: 1 and 2"),
        (SystemExit(1), RuntimeError, "SystemExit: 1"),
    ],
)
def test_errors_travel(error: BaseException, kind: type[Exception], text: str) -> None:
    found = portable(error)
    assert type(found) is kind
    assert str(found) == text


def test_a_full_queue_and_then_the_end_of_the_engines_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    gate = Gate()
    settings = ServerSettings("letters", PARAMS)
    body = {"prompt": "ab", "seed": 1, "stream": True}
    with server_with_front(letter_engine(gate), settings, max_running=1, max_waiting=1) as (
        url,
        running,
    ):
        thread = running.thread
        gate.open.clear()
        ended: list[str] = []

        def read() -> None:
            ended.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).text)

        readers = [threading.Thread(target=read)]
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60):
            readers[0].start()
            until(lambda: (thread.num_running, thread.num_waiting) == (1, 1))
            full = httpx.post(f"{url}/v1/completions", json=body)
            assert full.status_code == 429
            assert full.headers["retry-after"] == "1"
            assert full.json()["error"]["message"].startswith("queue full: 1 requests run and 1")
        # The first client has left, and its request with it.
        gate.open.set()
        until(lambda: len(ended) == 1)
        assert ended[0].endswith("[DONE]\n\n")
        until(lambda: thread.num_running + thread.num_waiting == 0)
        until(lambda: thread.stats()["pages_used"] == 0)
        gate.open.clear()
        readers.append(threading.Thread(target=read))
        readers[1].start()
        until(lambda: thread.num_running == 1)
        running.front.socket.shutdown(2)  # as where the process is gone
        assert running.front.process.wait(60) == 0
        readers[1].join()
        error = json.loads(ended[1].split("data: ")[-2])["error"]
        assert error["message"] == "the engine's process has ended"
        gate.open.set()
    assert not thread.accepting
    assert thread.num_running == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_front_that_dies_ends_the_server_and_says_so() -> None:
    with FrontProcess() as front:
        running = EngineHost(
            letter_engine(Gate()), front, ServerSettings("letters", PARAMS), "127.0.0.1", 0
        )
        front.process.kill()
        with pytest.raises(EngineStoppedError, match="connections has ended with -9"):
            run_server(running)
    assert not running.thread.accepting
