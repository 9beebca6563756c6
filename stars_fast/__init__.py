"""stars_fast: aligning language models while they decode (STARS, arXiv 2511.03827)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pkgutil import extend_path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stars_fast.engine import Engine
    from stars_fast.engine.async_engine import AsyncEngine
    from stars_fast.outputs import Calibration, CompletionOutput, RequestOutput, Segment
    from stars_fast.params import StarsParams
    from stars_fast.remote import Judge, RemoteEngine, RemoteReward
    from stars_fast.reward import Reward
    from stars_fast.reward_head import RewardHead
    from stars_fast.rewards.log_ratio import LogRatio
    from stars_fast.rewards.persona import Persona

# A checkout that is the current folder hides the installed package, which has the compiled core.
if find_spec(f"{__name__}._core") is None:
    __path__ = extend_path(__path__, __name__)

# Imported on first use: the C++ core and the command line's --help need no torch.
_HOMES = {
    "AsyncEngine": "stars_fast.engine.async_engine",
    "Calibration": "stars_fast.outputs",
    "CompletionOutput": "stars_fast.outputs",
    "Engine": "stars_fast.engine",
    "Judge": "stars_fast.remote",
    "LogRatio": "stars_fast.rewards.log_ratio",
    "Persona": "stars_fast.rewards.persona",
    "RemoteEngine": "stars_fast.remote",
    "RemoteReward": "stars_fast.remote",
    "RequestOutput": "stars_fast.outputs",
    "Reward": "stars_fast.reward",
    "RewardHead": "stars_fast.reward_head",
    "Segment": "stars_fast.outputs",
    "StarsParams": "stars_fast.params",
}

__all__ = [
    "AsyncEngine",
    "Calibration",
    "CompletionOutput",
    "Engine",
    "Judge",
    "LogRatio",
    "Persona",
    "RemoteEngine",
    "RemoteReward",
    "RequestOutput",
    "Reward",
    "RewardHead",
    "Segment",
    "StarsParams",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("stars-fast")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        if find_spec(f"{__name__}._core") is not None:
            raise
        raise ImportError(
            "stars_fast is not built: install it first (pip install -c constraints.txt .)"
        ) from error


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
