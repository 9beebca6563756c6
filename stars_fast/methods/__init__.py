"""The decoding methods: what each is, which parameters it has, and how its segments are decided."""

from __future__ import annotations

from stars_fast.methods.catalogue import GIBBS, METHODS, Method, has_gibbs, kind_of
from stars_fast.methods.kinds import COMMON, MethodKind

__all__ = ["COMMON", "GIBBS", "METHODS", "Method", "MethodKind", "has_gibbs", "kind_of"]
