"""Sequential Monte Carlo: whole paths, weighted and resampled where their segments end."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from helpers.letter_law import (
    LETTER,
    PROMPT,
    Law,
    Tokens,
    World,
    count,
    is_over,
    letter_engine,
    model_law,
    p_value,
    segments,
    text,
    tilted,
    total_variation,
)
from helpers.letter_law import reward_model as letter_reward
from helpers.outputs import all_same
from helpers.ragged_law import EVEN, RAGGED, SETTINGS, ragged_engine
from helpers.ragged_law import count as count_ragged
from helpers.tiny_lm import letter_tokenizer, small_model
from helpers.tiny_rewards import plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer

from stars_fast import Engine, RequestOutput, Reward, StarsParams

BETA = 0.5
LETTERS = StarsParams(
    method="smc", segment_length=1, max_tokens=3, beta=BETA, temperature=1.0, top_k=0
)


@pytest.fixture(scope="module")
def letters() -> Engine:
    return letter_engine()


def law_of_two_paths(
    params: StarsParams,
    beta: float = BETA,
    world: World = LETTER,
    keeps: Callable[[str], bool] = lambda response: True,
) -> Law:
    """Every pair of paths, every way in which it is resampled, and the draw at the end.

    At a boundary a path that does not keep a constraint has no weight, unless neither does.
    """
    law: Law = {}

    def counted(paths: tuple[Tokens, Tokens], weights: tuple[float, float]) -> tuple[float, float]:
        kept = [keeps(text(path)) for path in paths]
        return (weights[0] * kept[0], weights[1] * kept[1]) if any(kept) else weights

    def finish(paths: tuple[Tokens, Tokens], weights: tuple[float, float], chance: float) -> None:
        weights = counted(paths, weights)
        for path, weight in zip(paths, weights, strict=True):
            law[path] = law.get(path, 0.0) + chance * weight / sum(weights)

    def all_over(paths: tuple[Tokens, Tokens]) -> bool:
        return all(is_over(path, params.max_tokens) for path in paths)

    def further(path: Tokens) -> list[tuple[Tokens, float, float]]:
        """Paths that follow, with their probability and what their weight grows by."""
        if is_over(path, params.max_tokens):
            return [(path, 1.0, 1.0)]
        length = min(params.segment_length, params.max_tokens - len(path))
        before = world.reward(text(path))
        return [
            (path + segment, p, math.exp((world.reward(text(path + segment)) - before) / beta))
            for segment, p in segments(path, length, world=world)
        ]

    # Pairs of paths that grow, with their weights, and the probability of that.
    states: dict[Any, float] = {(((), ()), (1.0, 1.0)): 1.0}
    while states:
        (paths, weights), chance = states.popitem()
        for (a, p, v), (b, q, w) in itertools.product(further(paths[0]), further(paths[1])):
            heavier = (weights[0] * v, weights[1] * w)
            shown = counted((a, b), heavier)
            total = sum(shown)
            if all_over((a, b)):
                finish((a, b), heavier, chance * p * q)
                continue
            if total**2 / sum(x * x for x in shown) >= 2 * params.ess_threshold:
                outcomes = [((a, b), heavier, 1.0)]
            else:  # systematic: path a is there floor(share) times, and maybe once more
                whole, part = divmod(2 * shown[0] / total, 1.0)
                often = [(b, b), (a, b), (a, a)]
                outcomes = [(often[int(whole)], (1.0, 1.0), 1 - part)]
                outcomes += [(often[int(whole) + 1], (1.0, 1.0), part)] if part else []
            for pair, carried, share in outcomes:
                if all_over(pair):
                    finish(pair, carried, chance * p * q * share)
                else:
                    state = (pair, carried)
                    states[state] = states.get(state, 0.0) + chance * p * q * share
    assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-9)
    return law


@pytest.mark.parametrize(
    ("ess_threshold", "segment_length"), [(0.0, 1), (0.0, 2), (0.8, 1), (1.0, 1), (1.0, 2)]
)
def test_two_paths_match_the_exact_law(
    letters: Engine, ess_threshold: float, segment_length: int
) -> None:
    params = dataclasses.replace(
        LETTERS, candidates=2, ess_threshold=ess_threshold, segment_length=segment_length
    )
    copied = letters.stats()["paths_copied"]
    counts = count(letters, params, 2500)
    assert (letters.stats()["paths_copied"] > copied) == (ess_threshold > 0)
    assert p_value(counts, law_of_two_paths(params)) > 1e-3
    assert p_value(counts, law_of_two_paths(params, beta=1.5)) < 1e-6
    if segment_length == 1:  # at K = 2 the threshold hardly matters
        other = 1.0 - ess_threshold if ess_threshold != 0.8 else 0.0
        changed = dataclasses.replace(params, ess_threshold=other)
        assert p_value(counts, law_of_two_paths(changed)) < 1e-6


@pytest.mark.parametrize("ess_threshold", [0.0, 0.8])
def test_two_paths_under_a_constraint_match_the_exact_law(ess_threshold: float) -> None:
    def length_is_odd(prompts: list[str], responses: list[str]) -> list[float]:
        return [len(response) % 2 for response in responses]

    odd = Reward("odd", length_is_odd, weight=0, at_least=1)
    params = dataclasses.replace(LETTERS, candidates=2, ess_threshold=ess_threshold)
    counts = count(letter_engine([Reward("r", letter_reward), odd]), params, 1500)
    assert p_value(counts, law_of_two_paths(params, keeps=lambda one: len(one) % 2 == 1)) > 1e-3
    assert p_value(counts, law_of_two_paths(params)) < 1e-6


UNEQUAL = StarsParams(method="smc", beta=1.0, ess_threshold=1.0, **SETTINGS)


def test_two_paths_of_unequal_segments_match_the_exact_law() -> None:
    params = dataclasses.replace(UNEQUAL, candidates=2)
    counts = count_ragged(ragged_engine(), params, 4000)
    assert p_value(counts, law_of_two_paths(params, beta=1.0, world=RAGGED)) > 1e-3
    assert p_value(counts, law_of_two_paths(params, beta=1.0, world=EVEN)) < 1e-6


@pytest.mark.parametrize("paths", [16, 64])
def test_many_paths_of_unequal_segments_follow_the_tilted_law(paths: int) -> None:
    """With so many, the bias cannot be seen in so few requests."""
    params = dataclasses.replace(UNEQUAL, candidates=paths)
    counts = count_ragged(ragged_engine(), params, 12_000 // paths)
    plain = model_law(5, world=RAGGED)
    assert p_value(counts, tilted(plain, 1.0, RAGGED)) > 1e-3
    assert p_value(counts, plain) < 1e-6


def test_one_path_is_the_model(letters: Engine) -> None:
    counts = count(letters, dataclasses.replace(LETTERS, candidates=1), 2500)
    assert p_value(counts, model_law(3)) > 1e-3


@pytest.mark.parametrize(("segment_length", "numbers"), [(1, (1, 4, 16, 64)), (2, (1, 4, 16))])
def test_comes_to_the_tilted_distribution_as_paths_grow_in_number(
    letters: Engine, segment_length: int, numbers: tuple[int, ...]
) -> None:
    law = tilted(model_law(3), BETA)
    assert {len(y) for y in law} == {1, 2, 3}
    apart = []
    requests = 400
    for paths in numbers:
        params = dataclasses.replace(LETTERS, candidates=paths, segment_length=segment_length)
        apart.append(total_variation(count(letters, params, requests), law))
    # What as many exact draws would be apart on average, at most: E|X/n - p| <= sqrt(p / n).
    noise = sum(math.sqrt(p / requests) for p in law.values()) / 2
    assert all(after < before for before, after in itertools.pairwise(apart)), apart
    assert apart[0] > 3 * noise, (apart, noise)
    assert apart[-1] < 1.2 * noise, (apart, noise)


# On a model with pages, with rewards from a model that keeps pages of its own.

PROMPTS = ["The film was slow at first, but", "A terrible kettle", "Not bad at all. " * 4]
PARAMS = StarsParams(
    method="smc",
    segment_length=6,
    max_tokens=32,
    candidates=5,
    beta=0.5,
    ess_threshold=0.7,
    temperature=1.0,
    top_k=30,
    stop_token_ids=[i for i in range(20, 400) if i % 23 == 0],  # so that paths differ in length
)
OTHERS = (
    PARAMS.with_method("speculative_rejection", seed=7, rejection_rate=0.3),
    PARAMS.with_method("stars", seed=7, target_reward=2.0, max_attempts=4, candidates=3),
    PARAMS.with_method("stars", seed=7, acceptance="gibbs", candidates=3),
    PARAMS.with_method("best_of_n", seed=7, candidates=3),
    PARAMS.with_method("vanilla", seed=7),
    PARAMS.with_method("cards", seed=7, target_reward=2.0, max_attempts=4, entropy_threshold=5.84),
)


def engine(family: str = "llama", **options: Any) -> Engine:
    tokenizer = bpe_tokenizer()
    settings = {"num_pages": 600, "page_size": 8, "max_rows": 64}
    return Engine(
        small_model(),
        reward_model(family, tokenizer),
        tokenizer=tokenizer,
        reward_template="plain",
        reward_tokenizer=tokenizer,
        **(settings | options),
    )


def run(engine: Engine, params: StarsParams = PARAMS) -> list[RequestOutput]:
    each = [dataclasses.replace(params, seed=50 + i) for i in range(len(PROMPTS))]
    outputs = engine.generate(PROMPTS, each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    assert nothing_held(engine)
    return outputs


def nothing_held(engine: Engine) -> bool:
    stats = engine.stats()
    running = stats["requests_running"] + stats["requests_waiting"]
    return stats["pages_used"] == stats["rm_pages_used"] == running == 0


def same_tokens(first: list[RequestOutput], second: list[RequestOutput]) -> bool:
    """Whether all is equal but rewards and log-probabilities, whose last digits may differ."""

    def of(outputs: list[RequestOutput]) -> list[Any]:
        return [
            (o.token_ids, o.finish_reason, [(s.start, s.end) for s in o.segments])
            for output in outputs
            for o in output.outputs
        ]

    return of(first) == of(second)


@pytest.fixture(scope="module")
def expected() -> list[RequestOutput]:
    roomy = engine()
    outputs = run(roomy)
    assert roomy.stats()["paths_copied"] > 10
    assert roomy.stats()["preemptions"] == 0
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop", "length"}
    return outputs


def test_copies_share_pages() -> None:
    """Paths with one prefix hold its full pages once: the prompt, and what was copied."""

    def most_pages(ess_threshold: float) -> float:
        one = engine(page_size=2)
        params = dataclasses.replace(PARAMS, ess_threshold=ess_threshold, stop_token_ids=None)
        params = dataclasses.replace(params, beta=0.02, candidates=8, seed=50, ignore_eos=True)
        one.add_request("a", PROMPTS[1], params)
        most = 0.0
        while one.has_unfinished():
            one.step()
            most = max(most, one.stats()["pages_used"])
        assert (one.stats()["paths_copied"] > 0) == (ess_threshold > 0)
        assert nothing_held(one)
        return most

    # With so small a beta one path's prefix becomes that of all.
    assert most_pages(1.0) < 0.5 * most_pages(0.0)


def fewest_pages(page_size: int) -> int:
    """Pages without which the longest prompt is refused."""
    longest = max(len(bpe_tokenizer()(prompt).input_ids) for prompt in PROMPTS)
    pages = -(-(longest - 1) // page_size) + -(-PARAMS.max_tokens // page_size) + 1
    # With one page fewer there is an error; page 0 is never given out.
    return pages + (0 if PARAMS.segment_length % page_size == 0 else 1)


@pytest.mark.parametrize(
    ("page_size", "prefix_caching", "overlap"),
    [(1, False, True), (5, True, False), (16, True, True), (16, False, False)],
)
def test_same_responses_without_room(
    expected: list[RequestOutput], page_size: int, prefix_caching: bool, overlap: bool
) -> None:
    small = engine(
        page_size=page_size,
        num_pages=fewest_pages(page_size),
        max_rows=5,
        prefix_caching=prefix_caching,
        overlap_scoring=overlap,
    )
    assert same_tokens(run(small), expected)
    assert small.stats()["preemptions"] > 0


def test_alone(expected: list[RequestOutput]) -> None:
    for i, prompt in enumerate(PROMPTS):
        params = dataclasses.replace(PARAMS, seed=50 + i)
        assert same_tokens(engine().generate(prompt, params, use_tqdm=False), expected[i : i + 1])


@pytest.fixture(scope="module")
def others_alone() -> list[RequestOutput]:
    return [engine().generate(PROMPTS[1], params, use_tqdm=False)[0] for params in OTHERS]


@pytest.mark.parametrize(("num_pages", "overlap"), [(600, False), (14, False), (14, True)])
def test_same_responses_among_other_methods(
    expected: list[RequestOutput],
    others_alone: list[RequestOutput],
    num_pages: int,
    overlap: bool,
) -> None:
    mine = [dataclasses.replace(PARAMS, seed=50 + i) for i in range(3)]
    crowded = engine(num_pages=num_pages, max_rows=12, overlap_scoring=overlap)
    prompts = [PROMPTS[0], *[PROMPTS[1]] * 4, *[PROMPTS[1]] * 3, PROMPTS[2]]
    each = [mine[0], *OTHERS[:3], mine[1], *OTHERS[3:], mine[2]]
    outputs = crowded.generate(prompts, each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * 9
    assert nothing_held(crowded)
    assert (crowded.stats()["preemptions"] > 0) == (num_pages < 100)
    assert same_tokens([outputs[0], outputs[4], outputs[8]], expected)
    assert same_tokens(outputs[1:4] + outputs[5:8], others_alone)


@pytest.mark.parametrize(
    ("family", "reward_num_pages"), [("llama", None), ("llama", 14), ("gemma2", 14), ("gpt2", 14)]
)
def test_rewards_after_copies_are_those_of_the_whole_text(
    family: str, reward_num_pages: int | None
) -> None:
    one = engine(family, reward_num_pages=reward_num_pages)
    outputs = run(one)
    assert one.stats()["paths_copied"] > 10
    if reward_num_pages is not None:
        assert one.stats()["rm_evictions"] > 0
    model = reward_model(family, bpe_tokenizer())
    for output in outputs:
        (response,) = output.outputs
        for segment in response.segments:
            ids = output.prompt_token_ids + response.token_ids[: segment.end]
            assert segment.reward == pytest.approx(plain_reward(model, ids), abs=1e-4)
        assert response.reward == response.segments[-1].reward


def test_copies_are_not_scored_again() -> None:
    one = engine()
    run(one, dataclasses.replace(PARAMS, ess_threshold=1.0))
    stats = one.stats()
    assert stats["paths_copied"] > 10
    # Whatever was drawn (padding at an end is not run), each prompt once for all its paths.
    prompts = sum(len(bpe_tokenizer()(prompt).input_ids) for prompt in PROMPTS)
    most = stats["drafted_tokens"] + prompts
    assert most - len(PROMPTS) <= stats["rm_tokens"] <= most


def test_rewards_after_copies_are_what_score_says() -> None:
    """On letters, where the text of a response has the tokens that were drawn."""
    tokenizer = letter_tokenizer()
    one = letter_engine(
        reward_model("llama", tokenizer, pad_token_id=3, bos_token_id=None, vocab_size=4),
        reward_template="plain",
        reward_tokenizer=tokenizer,
    )
    params = dataclasses.replace(LETTERS, max_tokens=6, segment_length=2, candidates=6)
    each = [dataclasses.replace(params, seed=i) for i in range(20)]
    outputs = [o.outputs[0] for o in one.generate([PROMPT] * 20, each, use_tqdm=False)]
    assert one.stats()["paths_copied"] > 10
    whole = [output for output in outputs if output.finish_reason == "length"]
    assert len(whole) > 1
    scores = one.score([PROMPT] * len(whole), [output.text for output in whole])
    assert [output.reward for output in whole] == pytest.approx(scores, abs=1e-4)


def test_each_of_n_responses_has_paths_of_its_own(expected: list[RequestOutput]) -> None:
    one = engine()
    params = dataclasses.replace(PARAMS, seed=50, n=3)
    (output,) = one.generate(PROMPTS[0], params, use_tqdm=False)
    assert nothing_held(one)
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in output.outputs}) == 3
    first = dataclasses.replace(output, outputs=output.outputs[:1])
    assert same_tokens([first], expected[:1])


def test_is_reported_once() -> None:
    one = engine()
    one.add_request("a", PROMPTS[0], dataclasses.replace(PARAMS, seed=50, n=2))
    seen = []
    while one.has_unfinished():
        seen += one.step()
    assert [output.finished for output in seen] == [True]
    assert all_same(seen, one.generate(PROMPTS[0], dataclasses.replace(PARAMS, seed=50, n=2)))
