"""The engine's side of a server: its rounds in this process, HTTP in one beside it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stars_fast.engine.engine_thread import LAST_ROUND_SECONDS, STUCK_AFTER, EngineThread
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike
from stars_fast.server.growth import Cutter
from stars_fast.server.settings import ServerSettings
from stars_fast.server.wire import Message, Setup, State, Unpacker, packed, portable

if TYPE_CHECKING:
    from stars_fast.engine.batches import BatchEngine

#: Seconds between two messages that say how the engine is.
STATE_SECONDS = 0.25
#: Seconds that the front has to end once its connection has.
_LAST_SECONDS = 5.0


class FrontProcess:
    """The process with the connections, which waits to be told what to serve.

    It runs from the first: what it imports is there by the time that the models are loaded. It
    leaves signals to this process, and ends with it. As a context manager it ends with the block.

    Attributes
    ----------
    socket
        The connection with it.
    """

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        number = theirs.fileno()
        # The same modules as here, whatever the folder.
        program = (
            f"import sys; sys.path[:] = {[*map(str, sys.path)]!r}; "
            f"from stars_fast.server.front import main; main({number})"
        )
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - this program, and ours
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
                start_new_session=True,  # a Ctrl-C is for this process alone
            )

    def __enter__(self) -> FrontProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()  # which ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0 if kind is not None else _LAST_SECONDS)
        self.process.kill()
        self.process.wait()


class EngineHost:
    """Runs an engine for a front.

    Parameters
    ----------
    engine
        The engine to run; nothing else may use it from now on.
    front
        Whose requests these are; it begins to serve.
    settings
        Of the server.
    host, port
        To listen at; port 0 is any free one.
    max_running, max_waiting, max_prompt_tokens, stuck_after
        As `AsyncEngine`.

    Attributes
    ----------
    thread
        The engine's.
    front
        The other process.

    Raises
    ------
    ValueError
        A parameter is out of range.
    """

    def __init__(
        self,
        engine: BatchEngine,
        front: FrontProcess,
        settings: ServerSettings,
        host: str,
        port: int,
        *,
        max_running: int | None = None,
        max_waiting: int = 256,
        max_prompt_tokens: int | None = None,
        stuck_after: float | None = STUCK_AFTER,
    ) -> None:
        self.front = front
        self._socket = front.socket
        self._sending = threading.Lock()
        self._asked: dict[int, futures.Future[Any]] = {}
        self.thread: EngineThread[_WireStream] = EngineThread(
            engine,
            _Packets(self.send),
            max_running=max_running,
            max_waiting=max_waiting,
            max_prompt_tokens=max_prompt_tokens,
            stuck_after=stuck_after,
        )
        self._orders: dict[str, Callable[..., None]] = {
            "submit": self._submit,
            "call": self._call,
            "check": self._check,
            "cancel": self._cancel,
            "state": lambda number: self.send(("answer", number, self._state(), None)),
            "abort": self.thread.abort,
            "abort_all": self.thread.abort_all,
            "end_when_idle": self.thread.end_when_idle,
        }
        told = Setup(
            settings,
            (host, port),
            engine.reader,
            engine.tokenizer,
            engine.max_length,
            engine.has_logprobs,
            (self.thread.max_running, self.thread.max_waiting),
            stuck_after,
            self.thread.stats(),
        )
        # By itself first: what a tokenizer's class is imported from may have been added since.
        self.send(("path", sys.path))
        self.send(("setup", told))
        self.thread.call_when_ended(self._tell_end)

    def serve(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Do what the front asks for, until it has ended.

        Parameters
        ----------
        interrupted
            Whether it is time to drain; asked some times a second.
        """
        received, drains, due = Unpacker(), False, 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while True:
                if time.monotonic() >= due:
                    self.send(("state", self._state()))
                    due = time.monotonic() + STATE_SECONDS
                if not drains and interrupted():
                    drains = True
                    self.send(("drain",))
                if not selector.select(due - time.monotonic()):
                    continue
                try:
                    data = self._socket.recv(1 << 18)
                except ConnectionError:
                    return
                if not data:
                    return
                for name, *arguments in received.feed(data):
                    self._orders[name](*arguments)

    def close(self) -> None:
        """Abort every request, and wait for the round under way, but not for ever."""
        self.thread.close(LAST_ROUND_SECONDS)

    def send(self, *messages: Message) -> None:
        """Send messages in one packet; from any thread. Without a front they go nowhere."""
        packet = packed(messages)
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(packet)

    def _state(self) -> State:
        thread = self.thread
        return State(thread.healthy, thread.num_running, thread.stats())

    def _tell_end(self) -> None:
        failure = self.thread.failure
        why = "" if failure is None else f": {type(failure).__name__}: {failure}"
        self.send(("ended", f"the engine has stopped{why}"))

    # What the front asks for

    def _submit(self, request_id: str, prompt: PromptLike | Prompt, params: StarsParams) -> None:
        try:
            self.thread.add(_WireStream(request_id, prompt, params), check_here=True)
        except Exception as error:  # noqa: BLE001 - it is the request's
            self.send(("fail", request_id, portable(error)))

    def _call(self, number: int, work: Callable[[BatchEngine], object]) -> None:
        self._ask(number, lambda: self.thread.ask(work))

    def _check(self, number: int, prompt: Prompt, params: StarsParams) -> None:
        self._ask(
            number,
            lambda: self.thread.ask_reader(lambda _: self.thread.checked(prompt, params), prompt),
        )

    def _ask(self, number: int, ask: Callable[[], futures.Future[Any]]) -> None:
        try:
            done = ask()
        except Exception as error:  # noqa: BLE001 - it is the request's
            self.send(("answer", number, None, portable(error)))
            return
        self._asked[number] = done
        done.add_done_callback(partial(self._answer, number))

    def _answer(self, number: int, done: futures.Future[Any]) -> None:
        self._asked.pop(number, None)
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            try:
                self.send(("answer", number, done.result(), None))
            except Exception as unsent:  # noqa: BLE001 - a result that cannot be pickled
                error = unsent
        if error is not None:
            self.send(("answer", number, None, portable(error)))

    def _cancel(self, number: int) -> None:
        done = self._asked.get(number)
        if done is not None:
            done.cancel()


class _WireStream:
    """A request of the front; what becomes of it is kept until the packet goes."""

    def __init__(self, request_id: str, prompt: PromptLike | Prompt, params: StarsParams) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.messages: list[Message] = []
        self._cutter = Cutter()

    def admit(self, prompt_tokens: int) -> None:
        self.messages.append(("admit", self.request_id, prompt_tokens))

    def deliver(self, output: RequestOutput) -> None:
        self.messages.append(("grow", self.request_id, self._cutter.cut(output)))

    def fail(self, error: Exception) -> None:
        self.messages.append(("fail", self.request_id, portable(error)))


class _Packets:
    """The engine's outbox: a packet for each round."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._messages: list[Message] = []

    def put(self, stream: _WireStream, call: Callable[[], None]) -> None:
        """Make the call now, and keep what it says."""
        call()
        self._messages += stream.messages
        stream.messages.clear()

    def send(self) -> list[_WireStream]:
        """Send what was kept."""
        messages, self._messages = self._messages, []
        if messages:
            self._send(*messages)
        return []
