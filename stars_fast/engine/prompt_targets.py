"""Targets of single prompts, from unaligned samples of many.

The q quantile of the rewards of all samples suits no prompt where prompts differ. Two others
predict a sample y_ij of prompt i, the mean of its n_i being ybar_i, and add a quantile of what they
miss:

``"prompt"``
    mu + w(n_i) (ybar_i - mu), the prompt's own mean, pooled towards the mean mu of all prompts by
    w(n) = t^2 / (t^2 + s^2 / n): s^2 is the variance within prompts, t^2 that between them, both by
    moments, t^2 = max(0, Var(ybar_i) - s^2 mean(1 / n_i)).
``"relative"``
    a + b r(x_i), by least squares of ybar_i on the reward of the prompt alone.

What they miss is taken without the sample (``"prompt"``: w and the mean of the other n_i - 1) or
without the prompt (``"relative"``: a and b of the others). The target is the prediction plus the q
quantile of it. The loss of a kind is the pinball loss of its targets on the samples so held out,
mean of max(q e, (q - 1) e) with e = y - target, which the true conditional quantile makes least
(Koenker and Bassett, 1978).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stars_fast.outputs import PromptTargets, TargetKind

Values = npt.NDArray[np.float64]

#: A kind other than the simplest must have a loss below this share of its loss.
_BETTER = 0.98


@dataclass(frozen=True)
class SampledPrompt:
    """A prompt with its unaligned samples.

    Attributes
    ----------
    token_ids
        The prompt's.
    prompt_reward
        r(x); None: nothing is relative to it.
    rewards
        Of its samples, at least one.
    """

    token_ids: tuple[int, ...]
    prompt_reward: float | None
    rewards: Sequence[float]


def gathered(prompts: Iterable[SampledPrompt]) -> list[SampledPrompt]:
    """Put the samples of equal prompts together, where the first of them stands."""
    found: dict[tuple[int, ...], SampledPrompt] = {}
    for prompt in prompts:
        same = found.get(prompt.token_ids)
        rewards = prompt.rewards if same is None else (*same.rewards, *prompt.rewards)
        found[prompt.token_ids] = replace(prompt, rewards=rewards)
    return list(found.values())


def prompt_targets_of(
    prompts: Sequence[SampledPrompt], quantile: float, kind: TargetKind
) -> PromptTargets:
    """Fit the targets of prompts.

    Parameters
    ----------
    prompts
        At least one.
    quantile
        q, in (0, 1).
    kind
        ``"best"``: that with the least loss.

    Raises
    ------
    ValueError
        There are too few samples for this kind.
    """
    samples = [np.asarray(prompt.rewards, np.float64) for prompt in prompts]
    everything = np.concatenate(samples)
    pooled = float(np.quantile(everything, quantile))
    losses: dict[str, float] = {"pooled": _pinball(everything - pooled, quantile)}
    own: Mapping[tuple[int, ...], float] = {}
    intercept, slope = pooled, 0.0

    shrunk = _shrunk(samples)
    if shrunk is not None:
        means, missed = shrunk
        shift = float(np.quantile(missed, quantile))
        losses["prompt"] = _pinball(missed - shift, quantile)
        ids = [prompt.token_ids for prompt in prompts]
        own = dict(zip(ids, (means + shift).tolist(), strict=True))

    known = [prompt.prompt_reward for prompt in prompts if prompt.prompt_reward is not None]
    line = _line(np.asarray(known, np.float64), samples) if len(known) == len(prompts) else None
    if line is not None:
        intercept, slope, missed = line
        shift = float(np.quantile(missed, quantile))
        losses["relative"] = _pinball(missed - shift, quantile)
        intercept += shift

    if kind == "best":
        kind = _best(losses, ("pooled", "relative", "prompt"))
        unseen = _best(losses, ("pooled", "relative"))
    elif kind not in losses:
        needed = {
            "prompt": "two samples of a prompt, and two prompts",
            "relative": "three prompts whose own rewards differ",
        }
        raise ValueError(f"targets={kind!r} needs at least {needed[kind]}")
    else:
        unseen = "relative" if kind == "relative" else "pooled"
    return PromptTargets(kind, unseen, losses, pooled, own, intercept, slope)


def _best(losses: Mapping[str, float], kinds: Sequence[TargetKind]) -> TargetKind:
    found = min((kind for kind in kinds if kind in losses), key=losses.__getitem__)
    return found if losses[found] < _BETTER * losses[kinds[0]] else kinds[0]


def _pinball(errors: Values, quantile: float) -> float:
    return float(np.maximum(quantile * errors, (quantile - 1.0) * errors).mean())


def _shrunk(samples: Sequence[Values]) -> tuple[Values, Values] | None:
    """Return each prompt's pooled mean, and what is missed of samples that are left out."""
    counts = np.array([len(values) for values in samples], np.float64)
    freedom = float((counts - 1).sum())
    if len(samples) < 2 or freedom < 1:
        return None
    means = np.array([values.mean() for values in samples])
    mu = float(means.mean())
    within = sum(float(((v - v.mean()) ** 2).sum()) for v in samples) / freedom
    between = max(0.0, float(means.var(ddof=1)) - within * float((1 / counts).mean()))

    def weight(count: Values) -> Values:
        if between == 0.0:
            return np.zeros_like(count)
        return between / (between + within / np.maximum(count, 1.0)) * (count > 0)

    missed = []
    for values, count in zip(samples, counts, strict=True):
        others = (values.sum() - values) / max(count - 1, 1)
        missed.append(values - mu - weight(np.array(count - 1)) * (others - mu))
    return mu + weight(counts) * (means - mu), np.concatenate(missed)


def _line(at: Values, samples: Sequence[Values]) -> tuple[float, float, Values] | None:
    """Return the line of means over r(x), and what is missed of prompts that are left out."""
    if len(at) < 3:
        return None
    means = np.array([values.mean() for values in samples])
    missed = []
    for left_out, values in enumerate(samples):
        others = np.arange(len(at)) != left_out
        fitted = _fit(at[others], means[others])
        if fitted is None:
            return None
        missed.append(values - fitted[0] - fitted[1] * at[left_out])
    fitted = _fit(at, means)
    return None if fitted is None else (*fitted, np.concatenate(missed))


def _fit(x: Values, y: Values) -> tuple[float, float] | None:
    spread = float(((x - x.mean()) ** 2).sum())
    if spread <= 0:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    return float(y.mean()) - slope * float(x.mean()), slope
