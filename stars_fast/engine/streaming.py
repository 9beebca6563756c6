"""A calibration that is learned from the requests while they are served.

Aligned responses say nothing of the target, which is a quantile of the rewards of *unaligned* ones.
So plain samples of requests' own prompts, with the requests' own parameters, are drawn beside them:

- A request with an automatic target that comes before `ENOUGH` prompts have been sampled waits: for
  the samples of its own prompt, or, where as many prompts are under way, for the last of these. Its
  target is of all the samples that there are then, its own among them.
- Later ones begin at once. The prompt of each is sampled with probability `share`, but of none
  while samples have taken more than `share` of the tokens that these requests and the samples have
  drawn, or `ENOUGH` prompts are under way.
- The last `WINDOW` prompts count, so that the target follows the traffic.

Whether a prompt is sampled is settled when its request comes, by chance and by what was before it,
and all its samples count or none: neither its reward nor its length or cost changes its chance.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from stars_fast.engine.calibration import calibration_of, plain_params
from stars_fast.engine.prompt_targets import SampledPrompt, gathered, prompt_targets_of
from stars_fast.engine.requests import Request
from stars_fast.outputs import Calibration, TargetKind
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt
from stars_fast.seeds import derive_seed

_log = logging.getLogger(__name__)

#: Samples of a prompt, as many as `Engine.calibrate` draws by default.
SAMPLES = 4
#: Prompts that have to be sampled before requests begin at once; most that are under way.
ENOUGH = 8
#: Prompts whose samples count.
WINDOW = 64

#: Sets the draws of these samples apart from those of requests and of `Engine.calibrate`.
_SALT = 0x57AEA3CA1

#: And the choice of prompts apart from those.
_CHOICE = 0xC401CE

_PromptRewards = Callable[[Sequence[Prompt]], list[float]]


@dataclass(eq=False)
class PlainSamples:
    """The unaligned samples of a request's prompt.

    Attributes
    ----------
    number
        Of the prompt, from 0.
    params
        Parameters of one sample, but for its seed.
    awaited
        Whether requests wait for them.
    due, under_way
        How many are still to be started, and have been and not ended.
    rewards
        Of those that have ended.
    error
        Why one has failed, and with it all; None if none has.
    """

    number: int
    prompt: Prompt
    params: StarsParams
    awaited: bool
    due: int = SAMPLES
    under_way: int = 0
    rewards: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing more to come."""
        return not self.due and not self.under_way

    def fail(self, error: str) -> None:
        """Give up those that have not been started."""
        self.error, self.due = error, 0


class StreamingCalibration:
    """What the requests so far have shown of unaligned rewards, and whose prompt is sampled next.

    Parameters
    ----------
    quantile, targets
        As of `Engine.calibrate`.
    share
        In (0, 1], see above.
    seed
        Of the engine.

    Attributes
    ----------
    open
        The prompts whose samples have not all been taken in, the oldest first.
    num_running
        Samples that run.

    Raises
    ------
    ValueError
        For values out of range.
    """

    def __init__(self, quantile: float, share: float, targets: TargetKind, seed: int) -> None:
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"quantile must be in (0, 1), got {quantile}")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if targets not in get_args(TargetKind):
            raise ValueError(
                f"targets must be one of {', '.join(get_args(TargetKind))}, got {targets!r}"
            )
        self._quantile = quantile
        self._share = share
        self._targets = targets
        self._seed = seed
        self._window: deque[SampledPrompt] = deque(maxlen=WINDOW)
        self.open: list[PlainSamples] = []
        self._held: dict[str, tuple[Request, PlainSamples]] = {}
        self._num_arrived = 0
        self._num_prompts = 0
        self._tokens = 0  # that samples have drawn
        self._served = 0  # that requests with an automatic target have drawn
        self.num_running = 0

    def stats(self) -> dict[str, float]:
        """Return the samples that count, and the tokens that all have drawn."""
        samples = sum(len(prompt.rewards) for prompt in self._window)
        return {"calibration_samples": samples, "calibration_tokens": self._tokens}

    @property
    def holds(self) -> bool:
        """Whether any request waits."""
        return bool(self._held)

    def arrive(self, request: Request) -> PlainSamples | None:
        """Take note of a request with an automatic target; return what it has to wait for."""
        self._num_arrived += 1
        if len(self._window) >= ENOUGH:
            if self._chosen():
                self._plan(request, awaited=False)
            return None
        samples = self._awaited(request)
        self._held[request.request_id] = request, samples
        return samples

    def _chosen(self) -> bool:
        chance = derive_seed(self._seed ^ _CHOICE, self._num_arrived) / 2**64
        spare = self._share * (self._tokens + self._served) - self._tokens
        return chance < self._share and spare >= 0 and len(self.open) < ENOUGH

    def _awaited(self, request: Request) -> PlainSamples:
        if len(self._window) + len(self.open) < ENOUGH:
            return self._plan(request, awaited=True)
        return self.open[-1]

    def _plan(self, request: Request, *, awaited: bool) -> PlainSamples:
        plain = plain_params(request.params, 1)
        samples = PlainSamples(self._num_prompts, request.prompt, plain, awaited)
        self._num_prompts += 1
        self.open.append(samples)
        return samples

    def next_sample(self, samples: PlainSamples) -> Request:
        """Return the next of a prompt's samples that are due, to be started now."""
        number = samples.number * SAMPLES + SAMPLES - samples.due
        seed = derive_seed(self._seed ^ _SALT, 1 + number)
        params = replace(samples.params, seed=seed)
        samples.due -= 1
        samples.under_way += 1
        self.num_running += 1
        name = f"calibration-sample-{number}"
        return Request(name, samples.prompt, params, samples=samples)

    def leave(self, request: Request) -> None:
        """Take note of a sample, or a request, that has ended."""
        if request.samples is not None:
            self._take(request, request.samples)
            return
        self._held.pop(request.request_id, None)
        if request.calibrated:
            self._served += request.drafted_tokens

    def _take(self, sample: Request, samples: PlainSamples) -> None:
        samples.under_way -= 1
        self.num_running -= 1
        self._tokens += sample.drafted_tokens
        outputs = [response.output for response in sample.responses]
        reward = next((one.reward for one in outputs if one.finish_reason != "abort"), None)
        if sample.error is not None or reward is None:
            samples.fail(sample.error or "its samples were aborted")
        else:
            samples.rewards.append(reward)

    def learn(self, prompt_rewards: _PromptRewards) -> Calibration | None:
        """Take in the prompts whose samples are there; return the calibration if it has changed.

        `prompt_rewards`: gives r(x), which targets relative to it need.
        """
        changed = False
        for samples in [samples for samples in self.open if samples.done]:
            self.open.remove(samples)
            alone: float | None = None
            if samples.error is None and self._targets in ("relative", "best"):
                try:
                    (alone,) = prompt_rewards([samples.prompt])
                except Exception as error:  # noqa: BLE001 - the round that has been must count
                    samples.error = str(error)
            if samples.error is not None:
                _log.warning("a prompt gives no samples to calibrate on: %s", samples.error)
                continue
            ids = tuple(samples.prompt.token_ids)
            self._window.append(SampledPrompt(ids, alone, tuple(samples.rewards)))
            changed = True
        return self._calibration() if changed else None

    def _calibration(self) -> Calibration:
        rewards = [reward for prompt in self._window for reward in prompt.rewards]
        own = None
        if self._targets != "pooled":
            try:
                own = prompt_targets_of(gathered(self._window), self._quantile, self._targets)
            except ValueError:
                own = None  # too few for this kind as yet: the pooled target
        return calibration_of(rewards, self._quantile, targets=own)

    def released(self) -> list[tuple[Request, str | None]]:
        """Return the requests that wait no longer, each with why it fails, or None.

        One that has waited in vain for another's samples waits for its own.
        """
        ready: list[tuple[Request, str | None]] = []
        for name, (request, samples) in list(self._held.items()):
            if len(self._window) < ENOUGH and not samples.done:
                continue
            if not self._window and samples.prompt is not request.prompt:
                self._held[name] = request, self._awaited(request)
                continue
            del self._held[name]
            ready.append((request, None if self._window else samples.error))
        return ready
