"""The decoding methods: what each is, which parameters it has, and how its segments are decided."""

from __future__ import annotations

from stars_fast.methods.kinds import COMMON, GIBBS, METHODS, Method, MethodKind, kind_of

__all__ = ["COMMON", "GIBBS", "METHODS", "Method", "MethodKind", "kind_of"]
