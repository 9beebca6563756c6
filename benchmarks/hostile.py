"""What a hostile client tries, one kind after the other, while a neighbour's stream goes on.

Each kind is a row: a function that talks to a server and raises `FailedError` if the server did not
hold. For `faults`, which prints the table.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from stars_fast.benchmarks.clients import read_metrics

#: Seconds that an answer may take on a busy machine.
_PATIENCE = 120.0
_PATH = "/v1/completions"
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class FailedError(Exception):
    """The server did not hold."""


@dataclass
class Target:
    """A server under attack.

    Attributes
    ----------
    url
        Its address.
    body
        Of a request that it answers, of some segments; with a seed, so the text is always the same.
    size
        How many clients a row is tried with.
    tried
        Inputs so far.
    """

    url: str
    body: dict[str, Any]
    size: int = 100
    tried: int = field(default=0)

    def connect(self) -> socket.socket:
        """Return a connection."""
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), timeout=_PATIENCE)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        """Return status and body of the answer to one request, whose body is JSON or bytes."""
        self.tried += 1
        address = urlsplit(self.url)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(
            http.client.HTTPConnection(str(address.hostname), address.port, timeout=_PATIENCE)
        ) as connection:
            connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            return response.status, response.read()

    def post(self, body: object, path: str = _PATH) -> tuple[int, bytes]:
        """Return the answer to a body."""
        return self.ask("POST", path, body)

    def text(self) -> str:
        """Return the text of the request that is answered."""
        status, answer = self.post(self.body)
        same(status, 200, "a plain request")
        return str(json.loads(answer)["choices"][0]["text"])

    def raw(self, *parts: bytes) -> bytes:
        """Return what comes back for bytes until the server closes the connection."""
        self.tried += 1
        answer = b""
        with self.connect() as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                while part := connection.recv(1 << 16):
                    answer += part
            except ConnectionError:
                pass  # closed with some of our bytes unread
        return answer

    def stream(self) -> Iterator[str]:
        """Yield the texts of the chunks of a stream."""
        address = urlsplit(self.url)
        connection = http.client.HTTPConnection(
            str(address.hostname), address.port, timeout=_PATIENCE
        )
        with closing(connection):
            data = json.dumps({**self.body, "stream": True})
            connection.request("POST", _PATH, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            same(response.status, 200, "a stream")
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise FailedError(f"a stream ended with {event['error']['message']}")
                    yield event["choices"][0]["text"]


def same(found: object, wanted: object, what: str) -> None:
    """Raise `FailedError` if something is not what it should be."""
    if found != wanted:
        raise FailedError(f"{what}: {found!r:.120}, not {wanted!r:.80}")


class Neighbour:
    """Streams the same request again and again; its texts must stay what they are."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._ends = threading.Event()
        self._wanted = target.text()
        self._thread = threading.Thread(target=self._run)
        self.streams = 0
        self.longest_gap = 0.0
        self.failed: Exception | None = None

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ends.is_set():
                at, text = time.monotonic(), ""
                for part in self._target.stream():
                    text += part
                    now = time.monotonic()
                    self.longest_gap, at = max(self.longest_gap, now - at), now
                same(text, self._wanted, "the neighbour's text")
                self.streams += 1
        except Exception as error:  # noqa: BLE001 - it is reported
            self.failed = error

    def check(self) -> str:
        """Return what it saw, at the end."""
        if self.failed is not None:
            raise FailedError(f"{type(self.failed).__name__}: {self.failed}")
        return f"{self.streams} streams, each with its text; longest wait {self.longest_gap:.2f} s"


# The rows


def endless_head(target: Target) -> None:
    """One header line without end."""
    answer = target.raw(b"GET /health HTTP/1.1\r\nX-Endless: ", *[b"a" * 4096] * 100)
    if answer:
        same(answer[9:12], b"431", "its status")


def long_prompts(target: Target) -> None:
    """Prompts of the longest body, far over the context."""
    for words in ("a ", "<|im_start|> ", "<", "</s>"):
        prompt = words * (900_000 // len(words))
        same(target.post({**target.body, "prompt": prompt})[0], 400, f"{words!r} over and over")
        chat = {"messages": [{"role": "user", "content": prompt}]}
        same(target.post(chat, "/tokenize")[0], 400, f"{words!r} over and over in a chat")


def stop_texts(target: Target) -> None:
    """More stop texts than there may be, and as many as there may be."""
    many = {**target.body, "stop": [f"x{i}" for i in range(70_000)]}
    same(target.post(many)[0], 400, "70,000 stop texts")
    most = {**target.body, "stop": [f"{i:0800}" for i in range(1024)]}
    same(target.post(most)[0], 200, "1,024 stop texts of 800 characters")


def wrong_bodies(target: Target) -> None:
    """Bodies that are no requests."""
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for body in (
        *(b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b"9" * 100_000),
        *(b'{"prompt": "a", "max_tokens": ' + x + b"}" for x in (b"-1", b"1e9", b"NaN", b"[]")),
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "stars": {"method": ["stars"]}}',
        b'{"prompt": "a", "stars": ' + deep + b"}",
        b'{"prompt": "a", "logit_bias": {"\\u0661": 1e400}}',
        b'{"prompt": [[1], 2]}',
        b'{"prompt": [1e400]}',
    ):
        status, answer = target.post(body)
        same(status, 400, f"{body!r:.60}")
        if not json.loads(answer)["error"]["message"]:
            raise FailedError(f"{body!r:.60} got no message")
    chat = b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": ' + deep
    same(target.post(chat + b"}", "/v1/chat/completions")[0], 400, "a deep chat_template_kwargs")
    same(target.post({**target.body, "user": "u" * 1_100_000})[0], 413, "a long body")
    same(target.post({**target.body, "user": "u" * 300_000})[0], 200, "a long user")
    same(target.post({**target.body, "model": "m" * 300_000})[0], 404, "a long name of a model")


def wrong_http(target: Target) -> None:
    """Bytes that are no HTTP, chunks and lengths that are wrong."""
    body = json.dumps(target.body).encode()
    sized = b"%x\r\n" % len(body)
    for data in (
        b"\x16\x03\x01\x02\x00" * 20,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        _CHUNKED + b"5\r\n" + body + b"\r\n0\r\n\r\n",
        _CHUNKED + b"f" * 17 + b"\r\n",
        _HEAD + b"Content-Length: -3\r\n\r\nabc",
        _HEAD + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\nabc",
        _HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + sized + body,
    ):
        same(target.raw(data)[9:12], b"400", f"{data[-60:]!r}")
    trailers = [b"X: " + b"a" * 4096 + b"\r\n"] * 50
    answer = target.raw(_CHUNKED + b"0\r\n", *trailers)
    if b" 200 " in answer[:20]:
        raise FailedError("trailers without end were read")


def unusual_http(target: Target) -> None:
    """What is right, though few clients do it."""
    body = json.dumps(target.body).encode()
    request = _HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    same(target.raw(request * 3 + last).count(b"HTTP/1.1 200 "), 4, "answers to four at once")
    upgrade = b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade, close"
    same(target.raw(upgrade + b"\r\n\r\n")[9:12], b"200", "an upgrade")
    same(target.ask("HEAD", "/v1/models"), (200, b""), "HEAD")
    status, answer = target.ask("POST", _PATH, target.body, **{"Content-Type": "text/plain"})
    if status != 400 or b"Content-Type" not in answer:
        raise FailedError(f"JSON under another name: {status}, {answer!r:.80}")


def short_connections(target: Target) -> None:
    """Connections that are opened and closed, with a part of a request or without."""
    parts = itertools.cycle([b"", b"GET", _HEAD, _HEAD + b"Content-Length: 9\r\n\r\n{"])
    for _ in range(10 * target.size):
        target.tried += 1
        with target.connect() as connection:
            connection.sendall(next(parts))


def streams_that_are_left(target: Target) -> None:
    """Streams whose clients leave at the first chunk, all at once."""

    def leave() -> None:
        for _ in target.stream():
            break

    threads = [threading.Thread(target=leave) for _ in range(min(target.size, 100))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target.tried += len(threads)


#: What is tried, by what it is called in the table.
ROWS: dict[str, Callable[[Target], None]] = {
    "a header without end": endless_head,
    "prompts far over the context": long_prompts,
    "70,000 stop texts": stop_texts,
    "bodies that are no requests": wrong_bodies,
    "bytes that are no HTTP": wrong_http,
    "unusual HTTP": unusual_http,
    "short connections": short_connections,
    "streams that are left": streams_that_are_left,
}


def attack(target: Target) -> dict[str, str | None]:
    """Try every row beside a neighbour; returns why each did not hold, None where it did."""
    wanted = target.text()
    found: dict[str, str | None] = {}
    with Neighbour(target) as neighbour:
        for name, row in ROWS.items():
            found[name] = why(partial(row, target))
    found["the neighbour's streams"] = why(neighbour.check)
    found["nothing is left behind"] = why(lambda: _nothing_left(target))
    found["the same text as before"] = why(lambda: same(target.text(), wanted, "the text"))
    return found


def why(row: Callable[[], object]) -> str | None:
    """Return why a row did not hold; None if it did."""
    try:
        row()
    except Exception as error:  # noqa: BLE001 - the others are tried too
        return f"{type(error).__name__}: {error}"
    return None


def _nothing_left(target: Target) -> None:
    same(target.ask("GET", "/health")[0], 200, "/health")
    deadline = time.monotonic() + _PATIENCE
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while True:
        values = read_metrics(target.ask("GET", "/metrics")[1].decode())
        busy = {name: values[f"stars:{name}"] for name in names if values[f"stars:{name}"]}
        if not busy:
            return
        if time.monotonic() > deadline:
            raise FailedError(f"left behind: {busy}")
        time.sleep(0.1)
