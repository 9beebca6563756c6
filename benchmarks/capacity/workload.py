"""What users ask of a simulated replica: when requests arrive, how long and how hard they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival, ``[n]`` each.

    Attributes
    ----------
    arrival
        Seconds.
    prompt_length, response_length
        Tokens, at least 1; a response ends at the latest at the `max_tokens` of its workload. The
        scheduler does not know where.
    pass_rate
        Probability that an attempt passes, whatever the segment.
    """

    arrival: Floats
    prompt_length: Ints
    response_length: Ints
    pass_rate: Floats

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True)
class Workload:
    """What users ask for.

    Attributes
    ----------
    prompt_mean, prompt_spread, prompt_max
        Prompt lengths are log-normal: the mean in tokens before the cut at `prompt_max`, and the
        standard deviation of their logarithm.
    response_mean, max_tokens
        A response ends after each token with probability 1 / `response_mean`, at the latest after
        `max_tokens`.
    segment_length, max_attempts
        Of every request, as `StarsParams` has them.
    pass_rate, pass_concentration
        Each request draws the pass probability of its attempts from a Beta distribution of mean
        `pass_rate` and parameters a + b = `pass_concentration`: the smaller, the more requests
        differ. With `pass_rate` 1 every attempt passes.
    """

    prompt_mean: float = 512.0
    prompt_spread: float = 0.6
    prompt_max: int = 2048
    response_mean: float = 128.0
    max_tokens: int = 256
    segment_length: int = 32
    max_attempts: int = 20
    pass_rate: float = 0.5
    pass_concentration: float = 4.0

    def draw(self, count: int, requests_per_second: float, seed: int) -> Requests:
        """Draw requests that arrive as a Poisson process; infinite load: all are there at once.

        With one seed the requests are the same at every load, and so are the gaps between them up
        to the scale.
        """
        random = np.random.default_rng(seed)
        gaps = random.exponential(size=count)
        location = np.log(self.prompt_mean) - self.prompt_spread**2 / 2
        prompts = np.rint(random.lognormal(location, self.prompt_spread, count))
        responses = random.geometric(1.0 / self.response_mean, count)
        a = self.pass_rate * self.pass_concentration
        b = self.pass_concentration - a
        return Requests(
            arrival=np.cumsum(gaps) / requests_per_second,
            prompt_length=np.clip(prompts, 1, self.prompt_max).astype(np.int64),
            response_length=np.minimum(responses, self.max_tokens).astype(np.int64),
            pass_rate=random.beta(a, b, count) if b > 0.0 else np.ones(count),
        )
