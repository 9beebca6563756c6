"""How many attempts each part of a response has under a fixed total (AdaSearch, arXiv 2510.23334).

A response of M tokens has S = ceil(M / B) parts of B tokens: of segments of one length B is that
length, of others `min_segment_length`. A part holds the attempts of each segment that begins in it.
With R attempts for each part on average, one is certain, and E = S (R - 1) are left to share out:

    w_i = rate^(i B / K)                    weight of part i = 0 .. S - 1 under "decay"
    q_i = E w_i / (w_0 + ... + w_(S-1))
    a_i = 1 + floor(q_i)

and one more for each of the E - sum floor(q_i) parts of largest q_i - floor(q_i), the earlier of
equals first. So the a_i sum up to S R exactly, none is below 1, and none exceeds the one before it.
"growth" is the same in reverse. K is `segment_length`, so with segments of K tokens each has `rate`
times the attempts of the one before it, before rounding.
"""

from __future__ import annotations

from functools import lru_cache

#: Parts of a response, and attempts of all of them, at most.
MOST_PARTS = 2**16
MOST_ATTEMPTS = 2**28 - 1

_ONE = 2**60  # weights are whole multiples of 1 / _ONE, so that their sums are exact


@lru_cache(maxsize=256)
def shared_out(parts: int, attempts: int, rate: float, *, growth: bool = False) -> tuple[int, ...]:
    """Return the attempts of each part.

    Parameters
    ----------
    parts
        S, at least 1.
    attempts
        R, at least 1.
    rate
        Of the weights of one part and the one before it, above 0.
    growth
        The last part has the most.
    """
    spare = parts * (attempts - 1)
    weights = [max(1, int(rate**part * _ONE)) for part in range(parts)]
    total = sum(weights)
    shares = [divmod(spare * weight, total) for weight in weights]
    left = spare - sum(whole for whole, _ in shares)
    largest = sorted(range(parts), key=lambda part: (-shares[part][1], part))
    more = set(largest[:left])
    found = [1 + whole + (part in more) for part, (whole, _) in enumerate(shares)]
    return tuple(reversed(found) if growth else found)
