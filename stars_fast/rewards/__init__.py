"""Reward models of every kind behind one interface, each scored incrementally where it can be."""

from __future__ import annotations

from stars_fast.rewards.base import Prompt, RewardModel, ScoreJob, Scorer
from stars_fast.rewards.load import load_scorer
from stars_fast.rewards.log_ratio import LogRatio
from stars_fast.rewards.persona import Persona

__all__ = ["LogRatio", "Persona", "Prompt", "RewardModel", "ScoreJob", "Scorer", "load_scorer"]
