"""How far an eval is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Between two lines about one thing.
SECONDS = 30.0


class Lines:
    """Lines about work under way, at most one in `SECONDS`, so that short work has none.

    Parameters
    ----------
    say
        Gets a line.
    what
        Begins each line.
    """

    def __init__(self, say: Callable[[str], object], what: str) -> None:
        self._say = say
        self._what = what
        self._begun = self._said = time.monotonic()

    def update(self, how_far: Callable[[], str]) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        if now - self._said >= SECONDS:
            self._said = now
            self._say(f"{self._what}: {how_far()} after {now - self._begun:.0f} s")
