"""Progress bars of the libraries that load models."""

from __future__ import annotations

import sys


def quiet_libraries() -> None:
    """Without a terminal, keep transformers and the hub from drawing their progress bars."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
