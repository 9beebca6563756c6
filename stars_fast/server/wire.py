"""Messages between the process that has the engine and the one that has the connections.

A packet is a list of messages, pickled behind its length; a message is the name of what to do, and
its arguments. Both processes are ours, on a pair of sockets that nobody else has.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stars_fast.prompts import Reader
from stars_fast.server.settings import ServerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = tuple[Any, ...]

_LENGTH = struct.Struct("!Q")


def packed(messages: Sequence[Message]) -> bytes:
    """Return messages as a packet."""
    body = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Cuts what comes into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that these bytes complete."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                return
            body = bytes(memoryview(self._data)[_LENGTH.size : end])
            del self._data[:end]
            yield from pickle.loads(body)  # noqa: S301 - of our own process


@dataclass(frozen=True)
class Setup:
    """What the front is told at first.

    Attributes
    ----------
    address
        Host and port to listen at.
    reader, tokenizer
        The engine's.
    queue
        `max_running` and `max_waiting` of the engine.
    stats
        The engine's counters before the first request.
    """

    settings: ServerSettings
    address: tuple[str, int]
    reader: Reader
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int | None
    has_logprobs: bool
    queue: tuple[int, int]
    stuck_after: float | None
    stats: dict[str, float]


@dataclass(frozen=True)
class State:
    """How the engine is; `EngineThread` says what each of these means."""

    healthy: bool
    num_running: int
    stats: dict[str, float]


def portable(error: BaseException) -> Exception:
    """Return an error that the other process can read, and that ends no more than a request."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - whatever its class does
        copy = None
    if isinstance(copy, Exception):
        return copy
    return RuntimeError(f"{type(error).__name__}: {error}")
