"""`StarsScheduler` in the real vLLM, where it is installed; a tiny model, float32 on a CPU.

vLLM's engine is in this process, so that its scheduler can be looked at.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vllm: pip install '.[vllm]'", allow_module_level=True)

from helpers.letter_law import World, next_probs, p_value, reward_model, reward_of, stars_law
from helpers.tiny_lm import letter_model, letter_tokenizer

from stars_fast import StarsParams
from stars_fast.vllm import StarsLLM
from stars_fast.vllm.extra_args import SAMPLING

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD_DIM = 32
BLOCK = 32
WORLD = World(partial(next_probs, head_dim=HEAD_DIM), reward_of)
STARS = StarsParams(
    segment_length=2,
    max_tokens=4,
    max_attempts=3,
    target_reward=0.5,
    alpha=0.7,
    beta=0.3,
    temperature=1.0,
    top_k=0,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("letters")
    letter_model(HEAD_DIM).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    options = {
        "reward_model": {"function": "helpers.letter_law:reward_model"},
        "params": {"target_reward": 0.5},
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
        environment.setenv("STARS_OPTIONS", json.dumps(options))
        from vllm import LLM

        yield LLM(
            str(folder),
            dtype="float32",
            max_model_len=256,
            block_size=BLOCK,
            num_gpu_blocks_override=400,
            max_num_seqs=64,
            enforce_eager=True,
            enable_chunked_prefill=False,
            scheduler_cls="stars_fast.vllm.StarsScheduler",
        )


@pytest.fixture(scope="module", params=["sync", "async"])
def llm(made: Any, request: pytest.FixtureRequest) -> Any:
    """The engine, with steps that wait for each other, or with one scheduled ahead.

    vLLM has no asynchronous scheduling on a CPU, but its worker there keeps the tokens it draws,
    and so a step can be scheduled before those before it have come back.
    """
    from stars_fast.vllm.scheduler import AsyncStarsScheduler, StarsScheduler

    core = made.llm_engine.engine_core.engine_core
    if request.param == "async":
        core.vllm_config.scheduler_config.async_scheduling = True
        before = core.scheduler
        before.shutdown()
        core.scheduler = StarsScheduler(
            core.vllm_config,
            before.kv_cache_config,
            before.structured_output_manager,
            before.block_size,
            hash_block_size=before.hash_block_size,
        )
        core.batch_queue_size = 2
        core.batch_queue = deque(maxlen=2)
        core.step_fn = core.step_with_batch_queue
    assert type(core.scheduler) is (
        AsyncStarsScheduler if request.param == "async" else StarsScheduler
    )
    return made


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: Any) -> int:
    free: int = scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()
    return free


def asked(params: StarsParams, **others: Any) -> Any:
    """vLLM's parameters of a request with these of ours."""
    from vllm import SamplingParams

    values = asdict(params)
    plain = {name: values[name] for name in SAMPLING if values[name] is not None}
    plain |= {name: list(plain[name]) for name in ("stop", "stop_token_ids") if name in plain}
    own = {
        name: values[name]
        for name in (*params.kind.parameters, "method", "segment_length")
        if name not in SAMPLING
    }
    return SamplingParams(**plain | {"extra_args": {"stars": own}} | others)


def ids_of(outputs: Any) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def run(llm: Any, prompts: list[list[int]], params: Any) -> Any:
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


@contextmanager
def scheduled(llm: Any) -> Iterator[list[int]]:
    """The tokens of each step that is scheduled meanwhile."""
    scheduler, found = scheduler_of(llm), []
    schedule = scheduler.schedule

    def spy(*arguments: Any) -> Any:
        output = schedule(*arguments)
        found.append(output.total_num_scheduled_tokens)
        return output

    scheduler.schedule = spy
    try:
        yield found
    finally:
        del scheduler.schedule


def test_matches_the_closed_form(llm: Any) -> None:
    requests = [asked(replace(STARS, candidates=2, seed=seed)) for seed in range(800)]
    outputs = run(llm, [[0, 1]] * len(requests), requests)
    counts = Counter(map(tuple, ids_of(outputs)))
    assert p_value(counts, stars_law(STARS, WORLD)) > 1e-3
    for other in ({"max_attempts": 1}, {"beta": 1.0}, {"target_reward": 1.2}):
        assert p_value(counts, stars_law(replace(STARS, **other), WORLD)) < 1e-3, other


def test_tokens_are_those_of_calls(llm: Any) -> None:
    """The seeds of the attempts follow from request, position and attempt, whatever draws them."""
    params = replace(STARS, segment_length=5, max_tokens=23, max_attempts=6)
    prompts = [[0, 1] * 9, [1], [0, 2, 1] * 11, [0, 1] * 9]
    each = [replace(params, seed=seed, candidates=1 + seed) for seed in range(len(prompts))]
    calls = StarsLLM(llm, reward_model).generate(prompts, each, use_tqdm=False)
    outputs = run(llm, prompts, [asked(one) for one in each])
    for output, call in zip(outputs, calls, strict=True):
        assert list(output.outputs[0].token_ids) == call.outputs[0].token_ids
        assert output.outputs[0].text == call.outputs[0].text.replace("$", "")
        assert output.outputs[0].finish_reason == call.outputs[0].finish_reason


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
@pytest.mark.parametrize("candidates", [1, 3])
def test_no_token_is_computed_twice(llm: Any, length: int, candidates: int) -> None:
    """A prompt is computed but for its last token; each attempt then feeds as many as it draws."""
    params = replace(STARS, segment_length=8, max_tokens=40, max_attempts=6, target_reward=1.2)
    params = replace(params, candidates=candidates, ignore_eos=True, seed=length)
    prompt = [(length + place) % 3 for place in range(length)]
    scheduler_of(llm).reset_prefix_cache()
    free, begun = free_blocks(llm), next(scheduler_of(llm)._numbers)
    with scheduled(llm) as steps:
        (output,) = run(llm, [prompt], asked(params))
    assert len(output.outputs[0].token_ids) == 40
    attempts = next(scheduler_of(llm)._numbers) - begun - 1
    assert attempts >= 5 * candidates + (candidates == 1)  # some were rejected
    assert sum(steps) == length - 1 + 8 * attempts
    assert free_blocks(llm) == free


def test_requests_that_ask_for_nothing_are_as_ever(llm: Any) -> None:
    from vllm import SamplingParams

    plain = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
    prompts = [[0, 1], [1, 0], [2, 2, 0], [0] * 40]
    params = replace(STARS, max_tokens=20, ignore_eos=True, temperature=0.0, segment_length=3)
    vanilla = asked(
        StarsParams("vanilla", 3, temperature=0.0, top_k=0, max_tokens=20, ignore_eos=True)
    )
    whole = run(llm, prompts * 3, [plain] * 4 + [asked(params)] * 4 + [vanilla] * 4)
    assert all(output.outputs[0].logprobs for output in whole[:4])
    assert ids_of(whole[:4]) == ids_of(whole[4:8]) == ids_of(whole[8:])


def test_text_goes_out_by_accepted_segments(llm: Any) -> None:
    engine = llm.llm_engine
    params = asked(replace(STARS, segment_length=6, max_tokens=20, ignore_eos=True, seed=1))
    engine.add_request("one", {"prompt_token_ids": [0, 1]}, params)
    seen = []
    while engine.has_unfinished_requests():
        seen += [len(output.outputs[0].token_ids) for output in engine.step()]
    assert seen == [6, 12, 18, 20]


def test_blocks_are_free_again_after_aborts(llm: Any) -> None:
    free, engine = free_blocks(llm), llm.llm_engine
    params = replace(STARS, segment_length=7, max_tokens=60, ignore_eos=True, candidates=3)
    for number in range(50):
        prompt = {"prompt_token_ids": [number % 3] * (1 + number)}
        engine.add_request(str(number), prompt, asked(replace(params, seed=number)))
    ended: Counter[str] = Counter()
    step = 0
    while engine.has_unfinished_requests():
        ended.update(output.request_id for output in engine.step() if output.finished)
        step += 1
        for number in range(0, 50, 3):
            if step == 1 + number:
                engine.abort_request([str(number)])
    assert ended.keys() >= {str(number) for number in range(50) if number % 3}
    assert set(ended.values()) == {1}
    scheduler = scheduler_of(llm)
    run(llm, [[0]], asked(STARS))  # what was under way in the rounds is over
    assert not scheduler._parents
    assert not scheduler._children
    assert not scheduler.requests
    assert free_blocks(llm) == free


def test_with_few_blocks_the_tokens_are_the_same(llm: Any) -> None:
    """Branches are let go of, and children preempted."""
    params = replace(STARS, segment_length=30, max_tokens=150, max_attempts=6, ignore_eos=True)
    params = replace(params, candidates=3, target_reward=1.2)
    prompts = [[0, 1] * 20, [1, 0] * 30, [2] * 45]
    requests = [asked(replace(params, seed=seed)) for seed in range(3)]
    wanted = ids_of(run(llm, prompts, requests))
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    held = pool.get_new_blocks(free - 12)
    try:
        assert ids_of(run(llm, prompts, requests)) == wanted
    finally:
        pool.free_blocks(held)
    assert pool.get_num_free_blocks() == free


def test_stops(llm: Any) -> None:
    params = replace(STARS, segment_length=5, max_tokens=30, seed=2)
    for changes, reason in (
        ({"stop": "ab"}, "ab"),
        ({"stop_token_ids": [1]}, 1),
        ({}, None),
    ):
        (output,) = run(llm, [[0, 1]], asked(replace(params, **changes)))
        (found,) = output.outputs
        assert (found.finish_reason, found.stop_reason) == ("stop", reason)
        (call,) = StarsLLM(llm, reward_model).generate(
            [[0, 1]], replace(params, **changes), use_tqdm=False
        )
        assert list(found.token_ids) == call.outputs[0].token_ids


@pytest.mark.parametrize(
    ("own", "others", "message"),
    [
        ({"beta": -1}, {}, "beta must be above 0 with soft acceptance, got -1"),
        ({"segment_size": 3}, {}, "unknown field 'segment_size' in stars; the fields are method"),
        ({"temperature": 1.0}, {}, "temperature must be given in the sampling parameters"),
        ({"target_reward": "auto"}, {}, "target_reward must be a number in stars, got 'auto'"),
        ({}, {"logprobs": 2}, "logprobs must be None with stars, got 2"),
        ({}, {"presence_penalty": 0.5}, "presence_penalty must be 0.0 with StarsLLM where"),
        ({"method": "args", "target_reward": None}, {}, "method must be one of"),
        ("{", {}, "stars must be an object or its JSON text"),
        (3, {}, "stars must be an object, got 3"),
    ],
)
def test_an_error_is_of_that_request_alone(
    llm: Any, own: Any, others: dict[str, Any], message: str
) -> None:
    from vllm import SamplingParams

    values = {"max_tokens": 40, "seed": 0, **others}
    bad = SamplingParams(**values, extra_args={"stars": own})
    good = asked(replace(STARS, seed=1))
    outputs = run(llm, [[0, 1]] * 3, [good, bad, good])
    assert outputs[1].outputs[0].finish_reason == "error"
    assert message in outputs[1].outputs[0].stop_reason
    assert ids_of(outputs)[0] == ids_of(outputs)[2] != []


@pytest.mark.usefixtures("made")  # and its options
def test_checks_refuse_it_where_it_comes_in() -> None:
    """As vLLM asks them, in the process of its routes, for status 400."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

    check = partial(validate_logits_processors_parameters, ["stars_fast.vllm:StarsChecks"])
    check(SamplingParams())
    check(asked(STARS))
    for own, message in (
        ({"beta": -1}, "beta must be above 0 with soft acceptance, got -1"),
        (3, "stars must be an object, got 3"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            check(SamplingParams(extra_args={"stars": own}))


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from stars_fast.vllm import scheduler

    monkeypatch.setattr(vllm, "__version__", "0.33.0+cu128")
    with pytest.raises(ImportError, match=r"tested with vLLM 0.32.0 and this is 0.33.0\+cu128"):
        importlib.reload(scheduler)
