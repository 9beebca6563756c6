"""Responses drawn from a language model by the engine, and what they are worth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stars_fast import Engine, StarsParams
from stars_fast.demo import gold_score


@dataclass(frozen=True)
class Sample:
    """A response to a prompt.

    Attributes
    ----------
    prompt, text
        What was asked, and the response.
    prompt_ids, response_ids
        The same as tokens; an end-of-sequence token counts to the response.
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """Prompt and response."""
        return [*self.prompt_ids, *self.response_ids]

    @property
    def gold(self) -> float:
        """Gold sentiment of the whole review."""
        return gold_score(self.prompt + self.text)


def sample_responses(
    model: str | os.PathLike[str],
    prompts: Sequence[str],
    samples_per_prompt: int,
    *,
    seed: int = 0,
    params: StarsParams | None = None,
    use_tqdm: bool = True,
) -> list[Sample]:
    """Draw unaligned responses, prompt by prompt.

    Parameters
    ----------
    model
        Directory of a causal language model.
    prompts
        Texts.
    samples_per_prompt
        At least 1.
    seed
        Of the engine.
    params
        How tokens are drawn, and how many at most; None: the defaults. Its ``method`` and ``n``
        are not looked at.
    use_tqdm
        Show a progress bar.

    Raises
    ------
    RuntimeError
        If the engine refuses a prompt.
    """
    plain = (params or StarsParams()).with_method("vanilla", n=samples_per_prompt)
    engine = Engine(model, seed=seed)
    outputs = engine.generate(list(prompts), plain, use_tqdm=use_tqdm)
    samples = []
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.error is not None:
            raise RuntimeError(f"{prompt!r} could not be sampled: {output.error}")
        samples += [
            Sample(prompt, one.text, tuple(output.prompt_token_ids), tuple(one.token_ids))
            for one in output.outputs
        ]
    return samples


def gold_figures(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean gold with its standard error over prompts, length and variety.

    The responses to one prompt are averaged first: they are not independent.
    """
    by_prompt: dict[str, list[float]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample.gold)
    means = np.array([np.mean(values) for values in by_prompt.values()])
    spread = float(means.std(ddof=1)) if len(means) > 1 else 0.0
    return {
        "gold": float(means.mean()),
        "standard_error": spread / len(means) ** 0.5,
        "tokens": float(np.mean([len(sample.response_ids) for sample in samples])),
        "distinct": len({sample.text for sample in samples}) / len(samples),
    }
