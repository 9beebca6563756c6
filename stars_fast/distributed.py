"""The processes that run one engine together, and what they have to agree on.

Each rank holds a share of the weights and of the pages, and runs the whole loop: the same scheduler
on the same input decides the same, so page tables and decisions are not sent around. Input that
could differ is rank 0's on every rank: each draw, each reward, and the seconds of a round, by which
``candidates="auto"`` weighs rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from stars_fast.errors import EngineStoppedError

__all__ = ["ALONE", "OneRank", "Ranks"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: How long a rank waits for the others in a round, unless torch.distributed is already set up.
_TIMEOUT = timedelta(minutes=30)
#: How long a rank that follows waits for something to do: a leader may be idle for as long.
_IDLE_TIMEOUT = timedelta(days=3650)


class Ranks:
    """The ranks of ``torch.distributed``'s world, as this process sees them.

    Every method must be called on every rank, in the same order, except those by which one rank
    leads and the others follow. The host sends over gloo, so it never waits for the device.

    Parameters
    ----------
    device : torch.device
        Where this rank's share of the model is.

    Attributes
    ----------
    rank, size : int
        Number of this rank, and of all ranks.
    lost : str
        Why this rank is out of step with the others; empty while it is not.
    """

    device: torch.device | str | None

    def __init__(self, device: torch.device) -> None:
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()
        self.device = device
        self.lost = ""
        self._leads = self._follows = self._called = False
        self._control: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._commands: Any = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)

    @classmethod
    def connect(cls, device: torch.device | str | None = None) -> Ranks:
        """Join the other processes; `OneRank` if this is the only one.

        Sets up ``torch.distributed`` from torchrun's environment unless that has been done.

        Raises
        ------
        ValueError
            If `device` is not the one that transformers gives this rank: the accelerator of the
            rank's number on its machine, or the CPU where there is none.
        """
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return OneRank(device)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        own = torch.device("cpu")
        if accelerator is not None:
            own = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        wanted = own if device is None else torch.device(device)
        if wanted.type != own.type or wanted.index not in (None, own.index):
            raise ValueError(f"device must be None or {own} on this rank, got {device}")
        if own.type != "cpu":
            torch.accelerator.set_device_index(own.index)
        if not dist.is_initialized():
            device_id = own if own.type == "cuda" else None
            dist.init_process_group(timeout=_TIMEOUT, device_id=device_id)
        return cls(own) if dist.get_world_size() > 1 else OneRank(device)

    # What is the same on every rank

    def first(self, value: _T) -> _T:
        """Return rank 0's value, which is pickled; the others' are dropped."""
        return self._broadcast(value, self._control)

    def smallest(self, value: int) -> int:
        """Return the least of the ranks' values."""
        return min(self._gather(value, self._control))

    def share(self, values: Tensor) -> None:
        """Overwrite a tensor with rank 0's, on the device; the host does not wait."""
        self._check()
        dist.broadcast(values, 0)

    def check_same(self, what: str, *arrays: npt.NDArray[Any]) -> None:
        """Check that every rank has these numbers.

        Raises
        ------
        RuntimeError
            On every rank, if any has others.
        """
        digest = 0
        for array in arrays:
            digest = zlib.crc32(repr(array.shape).encode() + array.tobytes(), digest)
        with self.together():
            found = self._gather(digest, self._control)
            if len(set(found)) > 1:
                odd = ", ".join(str(rank) for rank, one in enumerate(found) if one != found[0])
                raise RuntimeError(
                    f"{what} differs between ranks (from rank 0's on rank {odd}): every rank must "
                    "make the same calls with the same arguments, or follow rank 0"
                )

    # Failure

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that all ranks must run: if it raises on this one, the engine ends.

        Others may wait for this one: between the model's passes they notice at once that its
        connections are closed, within a pass when this process ends or the time is over.

        Raises
        ------
        EngineStoppedError
            If that has happened before.
        """
        self._check()
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        if self.lost:
            return
        self.lost = f"{type(error).__name__}: {error}"
        # Forgetting a group is what closes its connections.
        groups, self._control, self._commands = (self._control, self._commands), None, None
        for group in groups:
            dist.destroy_process_group(group)

    def _check(self) -> None:
        if self.lost:
            raise EngineStoppedError(
                f"rank {self.rank} is out of step with the others since it failed ({self.lost}): "
                "start all of them again"
            )

    # One leads, the others follow

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Have `broadcast_call` reach the ranks that follow; at the end they are released."""
        if self.rank != 0:
            raise ValueError(f"lead: rank 0 leads, and this is rank {self.rank}: call follow()")
        if self._leads:
            raise ValueError("lead: this engine leads already")
        self._check()
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
            if not self.lost:
                with contextlib.suppress(RuntimeError):  # they may have been ended meanwhile
                    self._broadcast(None, self._commands)

    @contextlib.contextmanager
    def broadcast_call(self, name: str, *arguments: Any) -> Iterator[None]:
        """Run inside the block what the following ranks do in their call of `name`.

        Does nothing else unless this rank leads or follows.

        Raises
        ------
        RuntimeError
            If it failed on some ranks only.
        """
        if self.lost or not (self._leads or self._follows):
            yield
            return
        if self._leads:
            self._broadcast((name, arguments), self._commands)
        self._called = True
        failed = True
        try:
            yield
            failed = False
        finally:
            if not self.lost:
                with self.together():
                    if len(set(self._gather(int(failed), self._commands))) > 1:
                        raise RuntimeError(f"{name} failed on some ranks only")

    def follow(self, calls: Mapping[str, Callable[..., object]]) -> None:
        """Make the calls that rank 0 announces until its lead ends.

        A failure inside `broadcast_call` occurs on every rank, and the leader handles it.

        Raises
        ------
        Exception
            What put this rank out of step.
        """
        if self.rank == 0:
            raise ValueError("follow: rank 0 leads: use lead()")
        nothing: Any = None
        self._follows = True
        try:
            while (command := self._broadcast(nothing, self._commands)) is not None:
                self._run_commands(calls, *command)
        finally:
            self._follows = False

    def _run_commands(
        self, calls: Mapping[str, Callable[..., object]], name: str, arguments: tuple[Any, ...]
    ) -> None:
        self._called = False
        try:
            calls[name](*arguments)
        except Exception as error:
            if not self._called:
                self._leave(error)  # rank 0 accepted the call and has begun
            if self.lost:
                raise
            _log.debug("%s: %s", name, error)
            return
        with self.together():
            if not self._called:
                raise RuntimeError(f"{name} has nothing to do on rank {self.rank}")

    # Over gloo

    def _broadcast(self, value: _T, group: Any) -> _T:  # noqa: ANN401 - torch's own type is private
        box = [value]
        with self.together(), self._over_gloo():
            dist.broadcast_object_list(box, 0, group=group, device=torch.device("cpu"))
        return box[0]

    def _gather(self, value: int, group: Any) -> list[int]:  # noqa: ANN401
        mine = torch.tensor([value])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.together(), self._over_gloo():
            dist.all_gather(found, mine, group=group)
        return [int(one) for one in found]

    @contextlib.contextmanager
    def _over_gloo(self) -> Iterator[None]:
        """Raise one clear error where another rank is gone: gloo has several, by how it ended."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} lost the other ranks: one of them failed, was ended, or took "
                f"more than its time, and says why in its own log ({error})"
            ) from error


class OneRank(Ranks):
    """The only process, with no others to agree with; its calls do nothing.

    Parameters
    ----------
    device
        Where the model is to run; None: where it runs by default.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.rank, self.size = 0, 1
        self.device = device
        self.lost = ""

    def first(self, value: _T) -> _T:
        """Return the value."""
        return value

    def smallest(self, value: int) -> int:
        """Return the value."""
        return value

    def share(self, values: Tensor) -> None:
        """Leave the tensor unchanged."""

    def check_same(self, what: str, *arrays: npt.NDArray[Any]) -> None:
        """Do nothing: there are no others."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do nothing around a block."""
        yield

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Do nothing around a block."""
        yield

    @contextlib.contextmanager
    def broadcast_call(self, name: str, *arguments: Any) -> Iterator[None]:
        """Do nothing around a block."""
        yield

    def follow(self, calls: Mapping[str, Callable[..., object]]) -> None:
        """Raise ValueError: there is no other rank to follow."""
        raise ValueError("follow: there is one process, which has nobody to follow")


#: The rank of an engine that is not tensor-parallel.
ALONE = OneRank()
