"""The demo: small models that ship with the package, prompts for them, and a gold score.

The language model and the reward model are made by ``scripts/training/make_demo_models.py`` from
reviews that `stars_fast.demo.grammar` writes. Importing this package does not import torch.
"""

from __future__ import annotations

from pathlib import Path

from stars_fast.demo.gold import gold_score
from stars_fast.demo.openings import prompts

__all__ = ["gold_score", "model_dir", "prompts", "reward_model_dir"]

_MODELS = Path(__file__).parent / "models"


def model_dir() -> Path:
    """Directory of the demo's causal language model and its tokenizer."""
    return _MODELS / "lm"


def reward_model_dir() -> Path:
    """Directory of the demo's reward model: a one-label sequence classifier, same tokenizer."""
    return _MODELS / "rm"
