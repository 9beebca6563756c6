"""Responses for training: what the engine draws, with its tokens and its gold."""

from __future__ import annotations

import pytest
from prompt_sets import tuning_prompts
from sampling import Sample, gold_figures, sample_responses

from stars_fast import Engine, StarsParams, demo


def test_samples_are_the_engine_s() -> None:
    prompts = tuning_prompts()[:3]
    params = StarsParams(max_tokens=12)
    samples = sample_responses(demo.model_dir(), prompts, 2, seed=5, params=params, use_tqdm=False)
    assert [sample.prompt for sample in samples] == [p for p in prompts for _ in range(2)]
    plain = StarsParams(method="vanilla", n=2, max_tokens=12)
    outputs = Engine(demo.model_dir(), seed=5).generate(prompts, plain, use_tqdm=False)
    drawn = [one for output in outputs for one in output.outputs]
    assert [sample.text for sample in samples] == [one.text for one in drawn]
    assert [list(sample.response_ids) for sample in samples] == [one.token_ids for one in drawn]
    assert samples[0].ids == [*outputs[0].prompt_token_ids, *drawn[0].token_ids]


def test_a_prompt_that_cannot_be_sampled_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="could not be sampled"):
        sample_responses(demo.model_dir(), ["word " * 600], 1, use_tqdm=False)


def test_figures_average_prompts_first() -> None:
    kind = " The plot is superb."

    def sample(prompt: str, text: str) -> Sample:
        return Sample(prompt, text, (1,), (2, 3))

    worth = sample("A:", kind).gold
    assert worth > 0.3
    figures = gold_figures([sample("A:", kind), sample("A:", kind), sample("B:", " It came.")])
    assert figures["gold"] == pytest.approx(worth / 2)
    assert figures["standard_error"] == pytest.approx(worth / 2)
    assert figures["tokens"] == 2.0
    assert figures["distinct"] == pytest.approx(2 / 3)
