"""Runs every command and every block of code of README.md and docs/, as a reader copies them.

Usage: python scripts/first_hour.py [PAGE ...]

Python is that of an environment after the README's first command. Pages are run in order, in one
new folder that has what the checkout has; extras are installed by the pages' own lines. A block
below ``<!-- not run: REASON -->`` is not run: it is counted, and named at the end.

* ``bash``: command by command. A server goes on in the background until another one takes its port.
  A command that has run before does not run again.
* ``python``: the blocks of a page share their names. A page's names are gone on the next page.
* ``console``: commands behind ``$``; their output has to be what the page says.
* ``json`` has to be JSON. ``text`` is anything else.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stars_fast import demo

ROOT = Path(__file__).resolve().parents[1]

#: What the pages leave to the reader.
STAND_INS = {
    "LM_DIR": str(demo.model_dir()),
    "RM_DIR": str(demo.reward_model_dir()),
}

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SERVER = re.compile(r"^(stars-fast|vllm) serve\b")
_SHOWN = re.compile(r"^\$ (.*)\n((?:[^$].*\n|\n)*)", re.MULTILINE)
_PORT = re.compile(r"--port (\d+)")
_DEFAULT_PORT = 8000
_LIMIT_SECONDS = 600


class BlockError(Exception):
    """A block that does not do what the page says; the message has its output."""


@dataclass(frozen=True)
class Block:
    """A fenced block: ``page`` and ``line`` of its first line, and why it is not run, if so."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        """``PAGE:LINE``."""
        return f"{self.page}:{self.line}"


def blocks_of(page: Path, name: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page=name,
            line=text.count("\n", 0, found.start("text")) + 1,
            language=found["language"],
            text=found["text"],
            reason=found["reason"],
        )
        for found in _BLOCK.finditer(text)
    ]


def commands_of(text: str) -> Iterator[str]:
    """Commands of a shell: lines, joined behind a backslash and within quotes."""
    pending = ""
    for line in text.splitlines(keepends=True):
        pending += line
        with contextlib.suppress(ValueError):  # within quotes
            if not shlex.split(pending, comments=True):
                pending = ""
            elif not pending.endswith("\\\n"):
                yield pending.strip()
                pending = ""
    if pending:
        raise BlockError(f"not a whole command: {pending}")


def words_of(command: str) -> tuple[str, ...]:
    """The words of a command, without its comment."""
    return tuple(shlex.split(command.replace("\\\n", " "), comments=True))


@dataclass
class Reader:
    """Does in a folder what the pages say."""

    folder: Path
    servers: dict[int, tuple[str, subprocess.Popen[bytes]]] = field(default_factory=dict)
    #: Ports of the pages and those that are used for them: others, where those are taken.
    ports: dict[int, int] = field(default_factory=dict)
    done: set[tuple[str, ...]] = field(default_factory=set)
    names: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Put the checkout into the folder, and what is needed for curl to fail where it should."""
        for entry in ROOT.iterdir():
            if not entry.name.startswith("."):
                (self.folder / entry.name).symlink_to(entry)
        (self.folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CURL_HOME": str(self.folder),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def run(self, block: Block) -> None:
        """Run a block.

        Raises
        ------
        BlockError
            It fails, or prints something else than the page says.
        """
        text = block.text
        for name, value in STAND_INS.items():
            text = re.sub(rf"\b{name}\b", value, text)
        if block.language == "bash":
            for command in commands_of(text):
                self.command(command)
        elif block.language == "console":
            for command, expected in _SHOWN.findall(text):
                output = self.command(command)
                if output != expected:
                    raise BlockError(f"{output}\nis not what the page says of: {command}")
        elif block.language == "python":
            self.python(text, block)
        elif block.language == "json":
            json.loads(text)
        elif block.language != "text":
            raise BlockError(f"language {block.language!r} is none of bash, console, json, text")

    def python(self, text: str, block: Block) -> None:
        """Run Python, with the names of the page's blocks before."""
        importlib.invalidate_caches()  # pip may have been here
        code = compile("\n" * (block.line - 1) + self.moved(text), block.page, "exec")
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                exec(code, self.names)
        except Exception:
            raise BlockError(output.getvalue() + traceback.format_exc()) from None
        for name, value in self.names.items():  # a request that failed is printed, not raised
            if getattr(value, "error", None) is not None:
                raise BlockError(f"{output.getvalue()}{name}.error is {value.error!r}")

    def command(self, text: str) -> str:
        """Run a command and return what it printed; a server is started and left to run."""
        if _SERVER.match(text):
            self.serve(text)
            return ""
        words = words_of(text)
        if words in self.done:
            return ""
        self.done.add(words)
        found = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.moved(text)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
        if found.returncode:
            raise BlockError(f"{text}\n{found.stdout}{found.stderr}exit code {found.returncode}")
        return found.stdout

    def serve(self, text: str) -> None:
        """Start a server, and wait until it is ready."""
        command = shlex.join(words_of(text))
        found = _PORT.search(command)
        port = int(found[1]) if found else _DEFAULT_PORT
        if port in self.servers:
            if self.servers[port][0] == command:
                return
            self.stop(port)
        used = self.ports[port] = _free_port(port)
        asked = command if used == port else f"{_PORT.sub('', command)} --port {used}"
        log = self.folder / f"server-{port}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {asked}"],
                cwd=self.folder,
                env=self.environment,
                stdout=stream,
                stderr=stream,
            )
        address = f"http://127.0.0.1:{used}/ready"
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise BlockError(f"{text}\n{log.read_text()}it does not answer at {address}")
            time.sleep(0.1)
        self.servers[port] = command, process

    def stop(self, port: int) -> None:
        """End a server as its page says: by SIGTERM, after which it exits with 0."""
        command, process = self.servers.pop(port)
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            log = (self.folder / f"server-{port}.log").read_text()
            raise BlockError(f"{command}\n{log}exit code {code}")

    def moved(self, text: str) -> str:
        """A text with the ports that are used for those of the page."""
        for written, used in self.ports.items():
            text = text.replace(f":{written}", f":{used}")
        return text

    def close(self) -> None:
        """End all servers."""
        for port in list(self.servers):
            self.stop(port)


def _free_port(wanted: int) -> int:
    """A port that no program listens at: the wanted one, if possible."""
    with socket.socket() as client, socket.socket() as other:
        if client.connect_ex(("127.0.0.1", wanted)):
            return wanted
        other.bind(("127.0.0.1", 0))
        port: int = other.getsockname()[1]
        return port


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def run_pages(reader: Reader, names: list[str]) -> None:
    """Run pages, and print what was run and what was not."""
    ran, left, began = 0, [], time.monotonic()
    for name in names:
        reader.names = {"__name__": "__main__"}
        for block in blocks_of(ROOT / name, name):
            if block.reason is not None:
                left.append(block)
                continue
            start = time.monotonic()
            try:
                reader.run(block)
            except Exception as error:
                raise BlockError(f"{block.place}: {error}") from error
            ran += 1
            print(f"{time.monotonic() - start:6.1f} s  {block.place} {block.language}", flush=True)
    print(f"{ran} blocks run in {time.monotonic() - began:.0f} s; {len(left)} not run:")
    for block in left:
        print(f"  {block.place} {block.language}: {block.reason}")


def main(names: list[str]) -> int:
    """Run pages, all by default; 1 if a block fails."""
    names = names or ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.closing(Reader(Path(folder))) as reader:
                run_pages(reader, names)
        except BlockError as error:
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
