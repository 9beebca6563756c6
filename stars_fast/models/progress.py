"""Progress bars of the libraries that load models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Without a terminal, keep transformers and the hub from drawing their progress bars."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Do that while a model is loaded, and leave the libraries as they were."""
    from transformers.utils import logging

    hidden = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hidden:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
