"""When a round ends although some of its rows go on: what they wait for against a round's cost."""

from __future__ import annotations

_FORGET = 0.95  # weight of what was known before a round
_DOUBT = 0.1  # spread of the tokens, over their mean, below which the prior rules
_FIXED = 32.0  # tokens that cost as much as scoring's fixed part, by the prior
_UNKNOWN = 1.0  # patience until a round was measured


class Pace:
    """Says when enough of a round's rows have ended to end the round; the others go on in the next.

    A step over R rows of which E have ended wastes E / R of it. The round ends when its waste has
    come to what one more round costs beside its steps: then neither is more than twice what the
    best moment would have cost. The tokens are the same whenever rounds end.

    Attributes
    ----------
    spans
        Whether segments may span rounds at all.
    patience
        What a round costs beside its steps and beside the tokens that it scores, in steps.
    """

    def __init__(self) -> None:
        self.spans = True
        self.patience = _UNKNOWN
        self._weight = 0.0
        self._step = 0.0  # seconds
        self._tokens = _Mean()
        self._beside = _Mean()

    def enough(self, waste: float) -> bool:
        """Whether a round ends: `waste` is the sum over its steps of the share of ended rows."""
        return self.spans and waste >= self.patience

    def observe(self, steps: int, drafting: float, tokens: int, beside: float) -> float:
        """Note a round and return the patience that it tells.

        Parameters
        ----------
        steps
            Steps run.
        drafting, beside
            Seconds of these, and of all else but prompts.
        tokens
            Tokens scored.
        """
        self._weight = _FORGET * self._weight + 1.0
        rate = 1.0 / self._weight
        self._step += rate * (drafting / steps - self._step)
        token_step, beside_step = tokens - self._tokens.mean, beside - self._beside.mean
        self._tokens.add(rate, tokens, token_step * token_step)
        self._beside.add(rate, beside, token_step * beside_step)
        # What the tokens cost is no cost of a round. It is learned where their number varies, so
        # the prior is one with which rounds end early and it does.
        prior = self._beside.mean / (self._tokens.mean + _FIXED) if self._tokens.mean else 0.0
        doubt = (_DOUBT * self._tokens.mean) ** 2 + 1.0
        slope = (self._beside.product + doubt * prior) / (self._tokens.product + doubt)
        fixed = self._beside.mean - max(0.0, slope) * self._tokens.mean
        return max(0.0, fixed) / max(self._step, 1e-9)


class _Mean:
    """A mean that forgets, and that of a product of differences to means."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.product = 0.0

    def add(self, rate: float, value: float, product: float) -> None:
        self.mean += rate * (value - self.mean)
        self.product = (1.0 - rate) * (self.product + rate * product)
