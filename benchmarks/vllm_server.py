"""A `vllm serve`, with our routes or without, as a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_START_SECONDS = 900  # minutes, where the processors are busy
#: Of a CPU build on a small machine; what the environment says goes first.
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
}


@contextmanager
def vllm_server(
    model: str,
    log: Path,
    options: Mapping[str, Any] | None,
    flags: Sequence[str] = (),
    *,
    python: str = sys.executable,
    threads: int = 2,
) -> Iterator[tuple[str, int]]:
    """Run it on a free port; yields its address, once it answers, and its process id.

    Parameters
    ----------
    model
        To be served, in float32.
    log
        File for what it says.
    options
        Of our routes, see `stars_fast.vllm.options`; None: without them.
    flags
        Of ``vllm serve``.
    python
        An interpreter that has vLLM, and stars_fast where our routes are asked for.
    threads
        Of its products, on the first processors.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--no-enable-chunked-prefill", *flags]  # a CPU's has no seeds, see StarsLLM
    ours, ready = {"VLLM_PLUGINS": ""}, "/health"
    if options is not None:
        ours = {"VLLM_PLUGINS": "stars", "STARS_OPTIONS": json.dumps(options)}
        ready = "/plugins/stars/ready"
    on = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**_SETTINGS, **on, **os.environ, **ours},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _until_it_answers(url + ready, process, log)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            httpx.get(url, timeout=5).raise_for_status()
        except httpx.HTTPError:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text()[-4000:]
                raise RuntimeError(f"vllm serve did not start:\n{tail}") from None
            time.sleep(0.2)
        else:
            return
