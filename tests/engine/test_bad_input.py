"""Bad input gets an error that names it, for that request alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.backends import device_of
from helpers.outputs import all_same
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import Engine, StarsParams

PARAMS = StarsParams(
    segment_length=2, max_tokens=6, max_attempts=3, target_reward=0.0, top_k=0, ignore_eos=True
)


def count_a(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count("a")) - 1.0 for response in responses]


def engine(reward: Any = count_a, **options: Any) -> Engine:
    settings = {"num_pages": 200, "page_size": 4}
    return Engine(letter_model(), reward, tokenizer=letter_tokenizer(), **(settings | options))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("segment_length", 0, ValueError),
        ("segment_length", 2.5, TypeError),
        ("max_tokens", -1, ValueError),
        ("candidates", 0, ValueError),
        ("candidates", "many", TypeError),
        ("max_attempts", 0, ValueError),
        ("entropy_threshold", -0.1, ValueError),
        ("entropy_threshold", float("nan"), ValueError),
        ("min_segment_length", 0, ValueError),
        ("beta", 0.0, ValueError),
        ("beta", -1, ValueError),
        ("alpha", 1.1, ValueError),
        ("temperature", -0.1, ValueError),
        ("temperature", math.nan, ValueError),
        ("top_k", -1, ValueError),
        ("top_p", 0.0, ValueError),
        ("min_p", 2.0, ValueError),
        ("seed", 2**64, ValueError),
        ("seed", "one", TypeError),
        ("n", 0, ValueError),
        ("stop", [""], ValueError),
        ("stop", 5, TypeError),
        ("stop_token_ids", [-1], ValueError),
        ("target_reward", math.inf, ValueError),
        ("target_reward", "high", TypeError),
        ("method", "magic", ValueError),
        ("acceptance", "firm", ValueError),
        ("ignore_eos", "yes", TypeError),
    ],
)
def test_parameter_is_named(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        StarsParams(**{field: value})


def test_unknown_parameter_is_an_error() -> None:
    with pytest.raises(TypeError, match="segment_size"):
        StarsParams(segment_size=3)  # type: ignore[call-arg]


def test_beta_is_free_with_hard_acceptance() -> None:
    assert StarsParams(acceptance="hard", beta=0.0).beta == 0.0


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ("", PARAMS, "empty"),
        ([], PARAMS, "empty"),
        ([0, 99], PARAMS, r"token id 99 at position 1 .* \[0, 4\)"),
        ([0, 1.5], PARAMS, "position 1 must be an integer"),
        ([0] * 600, PARAMS, "600 tokens .* context of 512"),
        ([{"role": "user", "content": "a"}], PARAMS, "chat template"),
        ([{"role": "user"}], PARAMS, r"messages\[0\].content must"),
        ("ab", dataclasses.replace(PARAMS, stop_token_ids=[7]), r"stop_token_ids .* \[0, 4\)"),
        ("ab", dataclasses.replace(PARAMS, target_reward=None), "calibrate"),
        ([0] * 400, PARAMS, "103 pages .* pool has 99"),
    ],
)
def test_bad_request_leaves_its_neighbours_alone(
    prompt: Any, params: StarsParams, named: str
) -> None:
    good = [dataclasses.replace(PARAMS, seed=seed) for seed in (1, 2)]
    alone = engine(num_pages=100).generate(["ab", "ba"], good, use_tqdm=False)
    mixed = engine(num_pages=100).generate(
        ["ab", prompt, "ba"], [good[0], params, good[1]], use_tqdm=False
    )
    assert mixed[1].error is not None
    assert mixed[1].finished
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(mixed[1].error)
    assert all_same([mixed[0], mixed[2]], alone)
    with pytest.raises((ValueError, TypeError), match=named):
        engine(num_pages=100).add_request("x", prompt, params)


class TestFailingRewards:
    """A reward that fails for one prompt ends that request and no other."""

    def outputs(self, reward: Any) -> list[Any]:
        params = [dataclasses.replace(PARAMS, seed=seed) for seed in (1, 2, 3)]
        one = engine(reward)
        outputs = one.generate(["ab", "cc", "ba"], params, use_tqdm=False)
        assert one.stats()["pages_used"] == 0
        return outputs

    def check(self, reward: Any, named: str) -> None:
        good = self.outputs(count_a)
        bad = self.outputs(reward)
        assert bad[1].error is not None
        with pytest.raises(AssertionError, match=named):
            raise AssertionError(bad[1].error)
        assert bad[1].outputs[0].finish_reason == "error"
        assert all_same([bad[0], bad[2]], [good[0], good[2]])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, value: float) -> None:
        def reward(prompts: list[str], responses: list[str]) -> list[float]:
            pairs = zip(prompts, count_a(prompts, responses), strict=True)
            return [value if prompt == "cc" else score for prompt, score in pairs]

        self.check(reward, "finite")

    def test_not_finite_for_a_segment_only(self) -> None:
        def reward(prompts: list[str], responses: list[str]) -> list[float]:
            scores = count_a(prompts, responses)
            rows = zip(prompts, responses, scores, strict=True)
            return [math.nan if p == "cc" and len(r) > 2 else s for p, r, s in rows]

        self.check(reward, "finite")

    def test_raises(self) -> None:
        def reward(prompts: list[str], responses: list[str]) -> list[float]:
            if "cc" in prompts:
                raise RuntimeError("no such judge")
            return count_a(prompts, responses)

        self.check(reward, "no such judge")

    def test_wrong_count_fails_everyone_by_name(self) -> None:
        for output in self.outputs(lambda prompts, responses: [0.0] * (len(prompts) + 1)):
            assert output.error is not None
            assert "returned" in output.error


def test_bad_logits_fail_one_request_and_the_rest_go_on() -> None:
    """A token whose embedding is NaN poisons the requests that hold it and no other."""
    params = [dataclasses.replace(PARAMS, seed=seed, top_k=1) for seed in (1, 2, 3)]
    prompts = [[0, 1], [2, 1], [1, 0]]
    one = engine()
    good = one.generate(prompts, params, use_tqdm=False)
    drawn = {token for i in (0, 2) for token in good[i].outputs[0].token_ids}
    assert 2 not in drawn, "choose another token to poison"
    weights = letter_model().get_input_embeddings().weight
    kept = weights.detach().clone()
    try:
        with torch.no_grad():
            weights[2] = math.nan
        outputs = one.generate(prompts, params, use_tqdm=False)
    finally:
        with torch.no_grad():
            weights.copy_(kept)
    assert "logits at response position 0 are NaN" in (outputs[1].error or "")
    assert outputs[1].outputs[0].finish_reason == "error"
    assert all_same([outputs[0], outputs[2]], [good[0], good[2]])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"page_size": 0}, "page_size"),
        ({"num_pages": 1}, "num_pages"),
        ({"max_rows": 0}, "max_rows"),
        ({"seed": -1}, "seed"),
    ],
)
def test_engine_options_are_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        engine(**options)


def test_methods_that_need_a_reward_model_say_so() -> None:
    plain = engine(reward=None)
    for method in ("stars", "best_of_n"):
        (output,) = plain.generate("ab", PARAMS.with_method(method), use_tqdm=False)
        assert "reward_model" in (output.error or "")
    with pytest.raises(ValueError, match="reward_model"):
        plain.calibrate("ab")
    (output,) = plain.generate("ab", PARAMS.with_method("vanilla"), use_tqdm=False)
    assert output.error is None


@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_a_top_p_that_float32_does_not_hold_keeps_one_token(backend: Any) -> None:
    model = letter_model().to(device_of(backend))
    small = Engine(model, num_pages=50, page_size=4, backend=backend)
    params = StarsParams(method="vanilla", top_k=0, max_tokens=2, ignore_eos=True)
    chosen = [
        small.generate([[0, 1]], dataclasses.replace(params, **change), use_tqdm=False)[0]
        for change in ({"top_p": 1e-60}, {"temperature": 0.0})
    ]
    assert chosen[0].error is None
    assert chosen[0].outputs[0].token_ids == chosen[1].outputs[0].token_ids


@pytest.mark.parametrize("prompts", [b"ab", bytearray(b"ab"), memoryview(b"ab"), 3, None])
def test_prompts_that_are_no_prompts_are_named(prompts: Any) -> None:
    one = engine()
    with pytest.raises(TypeError, match=f"prompts must be .*got {type(prompts).__name__}"):
        one.generate(prompts, PARAMS)
    with pytest.raises(TypeError, match=f"prompt must be .*got {type(prompts).__name__}"):
        one.add_request("a", prompts, PARAMS)


@pytest.mark.parametrize("params", [{"top_k": 0}, {}, "stars", 3, ["stars"], [{}]])
def test_parameters_that_are_none_are_named(params: Any) -> None:
    one = engine()
    with pytest.raises(TypeError, match="params must be StarsParams"):
        one.generate(["ab"], params)
    with pytest.raises(TypeError, match="params must be StarsParams"):
        one.add_request("a", "ab", params)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "foo"),
        ("device", "cuda:99"),
        ("reward_device", "foo"),
        ("dtype", "foo"),
        ("dtype", "int8"),
    ],
)
def test_devices_and_dtypes_are_checked_before_anything_is_loaded(option: str, value: str) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"{option} must be .*got '{value}'"):
        Engine("no/such/model", **options)


def test_failed_requests_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    one = engine()
    one.generate("ab", PARAMS, use_tqdm=False)
    assert caplog.records == []
    one.generate(["ab", "", "ba"], PARAMS, use_tqdm=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "1 of 3 requests failed" in record.getMessage()
    assert "prompt is empty" in record.getMessage()


@pytest.mark.parametrize("top_k", [4, 5, 40])
def test_a_top_k_that_keeps_every_token_is_none(top_k: int) -> None:
    asked = [dataclasses.replace(PARAMS, top_k=k, seed=7) for k in (0, top_k, 1)]
    off, all_of_4, some = (engine().generate(["ab"], one, use_tqdm=False)[0] for one in asked)
    assert all_of_4.outputs == off.outputs
    assert some.outputs != off.outputs
