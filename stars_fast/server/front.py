"""The front of a server: connections, JSON, and the reading of prompts, in a process of its own.

The engine is in the process that has started this one, see `host`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from stars_fast.engine.async_engine import in_time
from stars_fast.engine.engine_thread import LAST_ROUND_SECONDS, queue_full
from stars_fast.engine.readers import ReaderThreads
from stars_fast.engine.streams import RequestStream
from stars_fast.errors import DeadlineError, EngineStoppedError
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike, Reader
from stars_fast.server.app import create_app
from stars_fast.server.growth import Growth, Joiner
from stars_fast.server.logs import configure_logs
from stars_fast.server.uvicorn_config import uvicorn_config
from stars_fast.server.wire import Setup, State, Unpacker, packed, portable

if TYPE_CHECKING:
    from stars_fast.engine.batches import BatchEngine

T = TypeVar("T")

#: Seconds that connections have to take the last answers, once the engine has drained.
_LAST_SECONDS = 5
#: Seconds that the engine's process has to say how it is.
_ANSWER_SECONDS = 1.0
#: New objects before garbage is sought. Python's own number, some hundreds, is that of one request:
#: a quarter of the time would go into that.
_GARBAGE = 100_000


def main(number: int) -> None:
    """Serve what the process with the engine says, until it has drained or is gone.

    Parameters
    ----------
    number
        The file descriptor of the connection with it.
    """
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # it says when to drain
    connection = socket.socket(fileno=number)
    setup = _setup(connection)
    if setup is None:
        return
    configure_logs()
    engine = EngineClient(setup)
    app = create_app(engine, setup.settings)
    host, port = setup.address
    config = uvicorn_config(app, host=host, port=port, timeout_graceful_shutdown=_LAST_SECONDS)
    server = FrontServer(config, engine, connection, setup.settings.drain_timeout)
    app.state.metrics.connections = lambda: len(server.server_state.connections)
    gc.collect()
    gc.freeze()  # what is loaded stays, and need not be looked at again and again
    gc.set_threshold(_GARBAGE, *gc.get_threshold()[1:])
    server.run()


def _setup(connection: socket.socket) -> Setup | None:
    """Wait for what there is to serve; None if the other process ends before."""
    received = Unpacker()
    while data := connection.recv(1 << 20):
        for name, value in received.feed(data):
            if name == "path":
                sys.path[:] = value
            else:
                return value  # type: ignore[no-any-return]
    return None


class FrontServer(uvicorn.Server):
    """A server that goes on answering until its engine has drained.

    So load balancers see /ready change, new requests get a 503 in JSON, and a stream whose time is
    over ends with an error event; uvicorn alone closes the port at once, and then the connections.

    Parameters
    ----------
    config
        Of the server.
    engine, connection
        The engine, and the connection with its process.
    drain_timeout
        Seconds that unfinished requests have when the server stops.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: EngineClient,
        connection: socket.socket,
        drain_timeout: float,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._connection = connection
        self._drain_timeout = drain_timeout
        self._drained: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Connect with the engine, and listen."""
        await self._engine.connect(self._connection, self._begin_to_drain, self._end)
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield

    def _begin_to_drain(self) -> None:
        self._drained = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._engine.drain(self._drain_timeout)
        self._end()

    def _end(self) -> None:
        self.should_exit = True


class EngineClient:
    """An engine in another process, as `AsyncEngine` is one in this.

    For one event loop, on which all but the reading of prompts is done.

    Parameters
    ----------
    setup
        What that process says of it.
    """

    def __init__(self, setup: Setup) -> None:
        self.tokenizer = setup.tokenizer
        self.max_length = setup.max_length
        self.has_logprobs = setup.has_logprobs
        self._reader = setup.reader
        self._queue = setup.queue
        self._stuck_after = setup.stuck_after
        self._stats = setup.stats
        self._state: State | None = None
        self._state_at = time.monotonic()
        self._numbers = itertools.count()
        self._readers = ReaderThreads(together=bool(getattr(setup.tokenizer, "is_fast", True)))
        self._open: dict[str, tuple[RequestStream, Joiner]] = {}
        # Whose prompts are being read here: the engine knows nothing of them.
        self._reading: set[str] = set()
        self._reads = 0
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._refuses = False
        self._ended = asyncio.Event()
        self._why = "the engine has stopped"

    async def connect(
        self, connection: socket.socket, drain: Callable[[], None], end: Callable[[], None]
    ) -> None:
        """Begin to send and to receive.

        Parameters
        ----------
        connection
            With the engine's process.
        drain, end
            Called when the server is to drain, and when the engine has ended.
        """
        self._loop = asyncio.get_running_loop()
        self._on_end = end
        orders: dict[str, Callable[..., None]] = {
            "admit": self._admit,
            "grow": self._grow,
            "fail": self._fail,
            "answer": self._answer,
            "state": self._note,
            "ended": self._end,
            "drain": drain,
        }
        connection.setblocking(False)
        self._transport, _ = await self._loop.create_unix_connection(
            lambda: _Messages(orders, self._end), sock=connection
        )

    def submit(
        self,
        prompt: PromptLike | Prompt,
        params: StarsParams | None = None,
        *,
        timeout: float | None = None,
    ) -> RequestStream:
        """Queue a request and return at once; parameters and errors as `AsyncEngine.submit`."""
        self._check_room()
        name = f"request-{next(self._numbers)}"
        stream = RequestStream(
            name, prompt, params or StarsParams(), lambda: self._abort(name), timeout
        )
        self._open[name] = stream, Joiner(name)
        self._reading.add(name)
        self._readers.put(partial(self._read, stream), prompt)
        return stream

    async def call(self, work: Callable[[BatchEngine], T], timeout: float | None = None) -> T:
        """Do something with the engine between two rounds, as `AsyncEngine.call`.

        `work`, and what it returns, are pickled.
        """
        self._check_room()
        return await self._ask("call", work, timeout=timeout)  # type: ignore[no-any-return]

    async def read(
        self, work: Callable[[Reader], T], prompt: object, timeout: float | None = None
    ) -> T:
        """Do something with the reader beside the rounds, as `AsyncEngine.read`."""
        self._check_room()
        done: futures.Future[T] = futures.Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work(self._reader))
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                done.set_exception(portable(error))

        self._readers.put(run, prompt)
        self._reads += 1
        try:
            return await in_time(done, timeout)
        finally:
            self._reads -= 1

    async def check_request(
        self, prompt: PromptLike | Prompt, params: StarsParams, timeout: float | None = None
    ) -> Prompt:
        """Read a prompt, and return it if it may be run, as `AsyncEngine.check_request`."""
        read = await self.read(
            lambda reader: reader.read(prompt, params.longest_response), prompt, timeout
        )
        self._check_room()
        checked: Prompt = await self._ask("check", read, params, timeout=timeout)
        return checked

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse further requests, wait for the others, then end, as `AsyncEngine.drain`."""
        self._refuses = True
        try:
            await asyncio.wait_for(self._idle_and_ended(), timeout)
        except asyncio.TimeoutError:
            for name in [*self._reading]:
                self._fail(name, EngineStoppedError("aborted: the server stops"))
            self._send("end_when_idle")
            self._send("abort_all")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), LAST_ROUND_SECONDS)

    async def _idle_and_ended(self) -> None:
        while self._reading and not self._ended.is_set():
            await asyncio.sleep(0.01)
        self._send("end_when_idle")
        await self._ended.wait()

    @property
    def accepting(self) -> bool:
        """Whether new requests are accepted if the queue has room."""
        return not (self._refuses or self._ended.is_set())

    @property
    def healthy(self) -> bool:
        """Whether the engine said so not long ago, and no prompt takes too long to read."""
        state = self._state
        if self._ended.is_set() or (state is not None and not state.healthy):
            return False
        silent = time.monotonic() - self._state_at
        return (
            self._stuck_after is None or max(silent, self._readers.seconds()) <= self._stuck_after
        )

    @property
    def num_running(self) -> int:
        """Requests in the engine, a moment ago."""
        return 0 if self._state is None else self._state.num_running

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return max(0, self._unfinished - self.num_running)

    def stats(self) -> dict[str, float]:
        """Return the counters of `Engine.stats`, about a round and a second old at most."""
        return dict(self._stats if self._state is None else self._state.stats)

    async def refresh(self) -> None:
        """Have the numbers that are shown be those of now, as far as the engine's process answers.

        It does so while a round runs, too.
        """
        if not self._ended.is_set():
            with contextlib.suppress(DeadlineError, EngineStoppedError):
                self._note(await self._ask("state", timeout=_ANSWER_SECONDS))

    @property
    def _unfinished(self) -> int:
        return len(self._open) + len(self._calls) + self._reads

    def _check_room(self) -> None:
        if self._ended.is_set():
            raise EngineStoppedError(self._why)
        if self._refuses:
            raise EngineStoppedError("the engine is stopping and takes no requests")
        if self._unfinished >= sum(self._queue):
            raise queue_full(*self._queue)

    def _send(self, *message: Any) -> None:
        self._write(packed([message]))

    def _write(self, packet: bytes) -> None:
        if not self._ended.is_set():  # uvloop's transports raise once they are closed
            self._transport.write(packet)

    async def _ask(self, what: str, *arguments: object, timeout: float | None) -> Any:  # noqa: ANN401
        number = next(self._numbers)
        self._send(what, number, *arguments)
        done = self._calls[number] = self._loop.create_future()
        try:
            return await asyncio.wait_for(done, timeout)
        except asyncio.TimeoutError:
            raise DeadlineError(f"the request was not finished within {timeout:g} s") from None
        finally:
            if done.cancelled():
                self._send("cancel", number)
            del self._calls[number]

    # Where prompts are read

    def _read(self, stream: RequestStream) -> None:
        name = stream.request_id
        if name not in self._reading:
            return  # it has left
        try:
            read = self._reader.read(stream.prompt, stream.params.longest_response)
            packet = packed([("submit", name, read, stream.params)])
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self._loop.call_soon_threadsafe(self._fail, name, portable(error))
        else:
            self._loop.call_soon_threadsafe(self._pass_on, name, packet)

    def _pass_on(self, name: str, packet: bytes) -> None:
        if name in self._reading:
            self._reading.remove(name)
            self._write(packet)

    # What the engine's process says

    def _admit(self, name: str, prompt_tokens: int) -> None:
        if name in self._open:
            self._open[name][0].admit(prompt_tokens)

    def _grow(self, name: str, growth: Growth) -> None:
        if name not in self._open:
            return
        stream, joiner = self._open[name]
        if growth.finished:
            del self._open[name]
        stream.deliver(joiner.join(growth))

    def _fail(self, name: str, error: Exception) -> None:
        self._reading.discard(name)
        if name in self._open:
            stream, _ = self._open.pop(name)
            stream.fail(error)

    def _answer(self, number: int, result: object, error: Exception | None) -> None:
        done = self._calls.get(number)
        if done is None or done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def _note(self, state: State) -> None:
        self._state, self._state_at = state, time.monotonic()

    def _end(self, why: str) -> None:
        if self._ended.is_set():
            return
        self._why = why
        self._ended.set()
        stopped = EngineStoppedError(why)
        for name in [*self._open]:
            self._fail(name, stopped)
        for number in [*self._calls]:
            self._answer(number, None, stopped)
        self._on_end()

    def _abort(self, name: str) -> None:
        if name in self._reading:
            self._reading.remove(name)
            del self._open[name]
        elif name in self._open:
            self._send("abort", name)


class _Messages(asyncio.Protocol):
    """Carries out messages as they come.

    Parameters
    ----------
    orders
        What to call with the arguments of a message, by its name.
    end
        Called, with why, when none will come.
    """

    def __init__(self, orders: dict[str, Callable[..., None]], end: Callable[[str], None]) -> None:
        self._orders = orders
        self._end = end
        self._received = Unpacker()

    def data_received(self, data: bytes) -> None:
        """Do what came."""
        for name, *arguments in self._received.feed(data):
            self._orders[name](*arguments)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._end("the engine's process has ended")
