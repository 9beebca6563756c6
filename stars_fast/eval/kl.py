"""The distance of a method's responses from those of the base model: KL(method || base).

Both as sampled: the base's distribution q also has temperature and filters.

Segments that pass a test
    A segment s is drawn from q(. | prefix) until one passes, each with probability
    a(s) = min(1, exp((r(s) - tau) / beta)), or a(s) = 1[r(s) >= tau] where the test is hard. What
    is kept has the distribution p(s) = q(s) a(s) / A, with A = E_q[a], so

        KL(p || q) = E_p[log a(s)] - log A,

    and the KL of the response is the sum over its segments, in expectation over their prefixes
    (chain rule). a(s) follows from the segment's reward and threshold. A is not known, but the
    number of attempts n is geometric, P(n > k) = (1 - A)^k, and independent of the segment that
    passed. With the harmonic numbers H_k = 1 + 1/2 + ... + 1/k, H_0 = 0,

        E[H_(n-1)] = sum_k P(n > k) / k = sum_k (1 - A)^k / k = -log A,

    so log a(s) + H_(n-1) is an unbiased estimate, without a further call of any model.

Chosen among N draws, by whatever rule
    What is kept lies in a set S only if one of the draws does: p(S) <= 1 - (1 - q(S))^N. Of all p
    that obey this, the best of N by a reward without ties is the farthest from q, so

        KL(p || q) <= log N - (N - 1) / N

    (Beirami et al., Theoretical guarantees on the best-of-n alignment policy, 2024, for the best of
    N). This is an upper bound for responses of ``best_of_n`` and ``speculative_rejection``, and for
    each segment of ``acceptance="gibbs"``.

Segments kept by fallback
    After R failed attempts the best of them is kept. Such a segment counts as chosen among R draws.
    That is an approximation: it leaves out that all R had failed the test; and where there are
    fallbacks the attempts of the other segments are cut off at R, which makes H_(n-1) too small.
    With few fallbacks neither matters; their share is reported. With R = 1 whatever comes first is
    kept, so the KL is 0.

Another language model
    log p(y) - log q(y) of its own responses y, from the log-probabilities of both models. These are
    of the raw distributions, so with a temperature other than 1, or filters, it is that of the raw
    models over responses as sampled. Alignment on another model adds both parts (chain rule).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stars_fast.outputs import Segment
from stars_fast.params import StarsParams

Kind = Literal["exact", "estimate", "upper bound"]


@dataclass(frozen=True)
class AlignmentKl:
    """What the choice among a model's own draws adds to the KL of a response, in nats.

    Attributes
    ----------
    value
        Value of this response, whose mean over responses is the estimate; None if there is none.
    kind
        Kind of the value; None without one.
    reason
        Why there is no value; empty otherwise.
    """

    value: float | None
    kind: Kind | None = None
    reason: str = ""


def alignment_kl(params: StarsParams, segments: Sequence[Segment]) -> AlignmentKl:
    """Estimate the KL of a response to the language model it was drawn from.

    Parameters
    ----------
    params
        Parameters of its request.
    segments
        Segments of the response.
    """
    kind = params.kind
    if not kind.needs_reward:
        return AlignmentKl(0.0, "exact")
    if kind.draft is not None:
        return AlignmentKl(None, reason="segments are drawn by two models")
    if kind.competes is not None and not kind.resamples:
        return AlignmentKl(_chosen_among(params.num_candidates), "upper bound")
    if kind.decides == "choice" and not kind.ranked:
        bound = math.fsum(_chosen_among(segment.attempts) for segment in segments)
        return AlignmentKl(bound, "upper bound")
    if kind.decides != "test":
        return AlignmentKl(None, reason=f"there is no estimator for {params.method}")
    if kind.ranked:
        return AlignmentKl(None, reason="candidates are the most likely tokens, not draws")
    if params.rules == "public":
        return AlignmentKl(None, reason='with rules="public" some segments are kept untested')
    if params.attempts_per_segment == 1:
        return AlignmentKl(0.0, "exact")
    tested = [segment for segment in segments if segment.start < params.plain_from]
    if any(segment.reward is None or segment.threshold is None for segment in tested):
        return AlignmentKl(None, reason="a segment has no accept test")
    return AlignmentKl(math.fsum(_of_segment(params, one) for one in tested), "estimate")


def harmonic(count: int) -> float:
    """Return 1 + 1/2 + ... + 1/count, 0 for 0."""
    return math.fsum(1 / k for k in range(1, count + 1))


def _of_segment(params: StarsParams, segment: Segment) -> float:
    assert segment.reward is not None
    assert segment.threshold is not None
    if segment.accepted == "fallback":
        return _chosen_among(segment.attempts)
    log_accept = 0.0
    if params.acceptance == "soft":
        beta = params.kind.schedule(params).beta
        log_accept = min(0.0, (segment.reward - segment.threshold) / beta)
    return log_accept + harmonic(segment.attempts - 1)


def _chosen_among(draws: int) -> float:
    return math.log(draws) - (draws - 1) / draws
