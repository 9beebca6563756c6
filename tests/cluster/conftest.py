"""Ray's own warnings are let be in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

#: Ray's own, under warnings that are errors elsewhere.
RAY_WARNINGS = (
    # Its settings warn about themselves when they are made.
    "ignore:.*deprecated.*:DeprecationWarning:ray.*",
    "ignore:Tip. In future versions of Ray:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Ray's warnings be in this folder."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for line in RAY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(line))
