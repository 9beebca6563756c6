"""What a new user does to the program's processes by mistake, one kind after the other.

For `faults`, as `hostile`: a row raises `FailedError` if something did not hold.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stars_fast import Engine, StarsParams, demo
from stars_fast.benchmarks.hostile import FailedError, Target, same
from stars_fast.benchmarks.served import COMMAND, STOP_SECONDS, started
from stars_fast.errors import ConcurrentCallError

_ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 300.0
_LONG = {"prompt": "The film", "max_tokens": 400, "seed": 1}
_LONG["stars"] = {"target_reward": 3.0, "segment_length": 2}


def _ends(command: Sequence[str], code: int, words: str, cwd: Path | None = None) -> None:
    """Run a command, which must end with a code and say something, without a traceback."""
    done = subprocess.run(
        list(command), capture_output=True, text=True, timeout=_SECONDS, check=False, cwd=cwd
    )
    said = done.stdout + done.stderr
    if done.returncode != code or words not in said or "Traceback" in said:
        raise FailedError(f"{' '.join(command)[-60:]} ended with {done.returncode}: {said[-200:]}")


def two_threads(folder: Path) -> None:
    """One Engine, one thread steps and another adds."""
    engine = Engine(str(demo.model_dir()))
    params = StarsParams("vanilla", max_tokens=60, seed=1)
    wanted = engine.generate("The film", params, use_tqdm=False)[0].outputs[0].text
    found: list[str] = []
    refused = 0
    ends = threading.Event()

    def step() -> None:
        while not ends.is_set():
            try:
                outputs = engine.step()
            except ConcurrentCallError:
                continue
            found.extend(output.outputs[0].text for output in outputs if output.finished)

    stepping = threading.Thread(target=step)
    stepping.start()
    try:
        for number in range(50):
            try:
                engine.add_request(str(number), "The film", params)
            except ConcurrentCallError:
                refused += 1
            time.sleep(0.001)
        deadline = time.monotonic() + _SECONDS
        while engine.has_unfinished() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        ends.set()
        stepping.join()
    same((len(found) + refused, set(found) - {wanted}), (50, set()), "texts of two threads")


def empty_key(folder: Path) -> None:
    """An API key that is empty."""
    _ends([*COMMAND, "--api-key", ""], 2, "--api-key must not be empty")


def from_the_checkout(folder: Path) -> None:
    """Python in the checkout, beside the folder kernels/."""
    code = "from stars_fast import Engine; print('imported')"
    _ends([sys.executable, "-c", code], 0, "imported", _ROOT)


def _generate(folder: Path, *flags: str) -> list[str]:
    source = folder / "in.jsonl"
    lines = [json.dumps({"prompt": prompt}) for prompt in demo.prompts(20)]
    source.write_text("\n".join(lines), encoding="utf-8")
    files = ["--input", str(source), "--output", str(folder / "out.jsonl"), "--resume"]
    model = ["--model", str(demo.model_dir()), "--method", "vanilla"]
    return [COMMAND[0], "generate", *model, *files, *flags]


def two_writers(folder: Path) -> None:
    """Two programs that write the same file."""
    command = _generate(folder, "--max-tokens", "200")
    with subprocess.Popen(command, stderr=-1) as one, subprocess.Popen(command, stderr=-1) as two:
        codes = sorted([one.wait(_SECONDS), two.wait(_SECONDS)])
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    same(len(lines), 20, "lines of two writers")
    if codes[0] != 0 or codes[1] not in (0, 1, 2):
        raise FailedError(f"they ended with {codes}")
    _ends(_generate(folder, "--max-tokens", "100"), 2, "max_tokens")


def told_to_end(folder: Path) -> None:
    """SIGTERM while streams run: new requests are told, and the streams come to an end."""
    log = folder / "log"
    with started([*COMMAND, "--port", "0", "--drain-timeout", "1"], log) as (url, process):
        target = Target(url, _LONG)
        stream = target.stream()
        next(stream)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while target.ask("GET", "/ready")[0] != 503:
            if time.monotonic() > deadline:
                raise FailedError("/ready does not say that it drains")
        status, answer = target.post(_LONG)
        same((status, json.loads(answer)["error"]["code"]), (503, "stopping"), "a late request")
        try:
            for _ in stream:
                pass
        except FailedError as error:
            same(str(error), "a stream ended with aborted: the server stops", "its end")
        same(process.wait(STOP_SECONDS), 0, "its exit code")
    if "Traceback" in log.read_text(encoding="utf-8"):
        raise FailedError("a traceback in the log")


def interrupted_twice(folder: Path) -> None:
    """Ctrl-C twice while streams run."""
    log = folder / "log"
    with started([*COMMAND, "--port", "0"], log) as (url, process):
        stream = Target(url, {**_LONG, "n": 8}).stream()
        next(stream)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        code = process.wait(STOP_SECONDS)
        if code not in (0, 130):  # 0: the stream had ended between the two
            raise FailedError(f"it ended with {code}")


#: What is tried, in a folder of its own each, by what it is called in the table.
ROWS: dict[str, Callable[[Path], None]] = {
    "two threads on one engine": two_threads,
    "an empty API key": empty_key,
    "Python in the checkout": from_the_checkout,
    "two writers of one file, other settings": two_writers,
    "SIGTERM while streams run": told_to_end,
    "Ctrl-C twice": interrupted_twice,
}
