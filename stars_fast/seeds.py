"""Seeds that follow from other seeds."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def derive_seed(seed: int, index: int) -> int:
    """Return the 64-bit seed of the `index`-th child of `seed`; the 0-th is `seed` itself.

    SplitMix64 (Steele et al., OOPSLA 2014) over the pair, so that children of neighbouring seeds
    do not meet, as they would in ``seed + index``.
    """
    if index == 0:
        return seed
    state = _mix(seed + 0x9E3779B97F4A7C15)
    return _mix(state ^ _mix(index * 0x9E3779B97F4A7C15))


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
