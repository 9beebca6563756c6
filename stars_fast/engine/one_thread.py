"""A guard on the calls of an engine, which is for one thread at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from stars_fast.errors import ConcurrentCallError

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")
_Self = TypeVar("_Self", bound="OneThread")


class OneThread:
    """Has methods marked `one_thread`, of which one thread at a time may be inside."""

    def __init__(self) -> None:
        # Reentrant: these methods call each other.
        self._inside = threading.RLock()
        self._call = ""


def one_thread(
    method: Callable[Concatenate[_Self, _Params], _Result],
) -> Callable[Concatenate[_Self, _Params], _Result]:
    """Have a method of a `OneThread` raise where another thread is inside of one; never wait.

    Raises
    ------
    ConcurrentCallError
        Before anything is done.
    """
    name = method.__name__

    @functools.wraps(method)
    def guarded(self: _Self, /, *args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        if not self._inside.acquire(blocking=False):
            own = type(self).__name__
            raise ConcurrentCallError(
                f"{own}.{name} was called while another thread is in {own}.{self._call}: one "
                "thread at a time may use an engine; AsyncEngine takes requests from many"
            )
        outer, self._call = self._call, name
        try:
            return method(self, *args, **kwargs)
        finally:
            self._call = outer
            self._inside.release()

    return guarded
