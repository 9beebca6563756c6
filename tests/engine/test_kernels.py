"""The engine on the Triton kernels: same tokens, in rounds that fit no bucket and others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer
from transformers import LlamaForCausalLM

from stars_fast import Engine, StarsParams
from stars_fast.drafting import captured
from stars_fast.drafting.captured import CapturedDrafter, bucket_rows, buckets
from stars_fast.drafting.graph import GraphMemory, StepGraph
from stars_fast.outputs import RequestOutput

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = ["The film was slow at first, but", "A terrible kettle"]
PARAMS = StarsParams(
    segment_length=2,
    max_tokens=5,
    max_attempts=4,
    target_reward=2.0,
    beta=0.6,
    candidates=2,
    temperature=1.0,
    top_k=30,
    top_p=0.95,
    ignore_eos=True,
)


def engine(**options: Any) -> Engine:
    tokenizer = bpe_tokenizer()
    settings = {"num_pages": 100, "page_size": 8, "max_rows": 8}
    return Engine(
        # Of one layer: the interpreter is slow.
        small_model(layers=1).to(DEVICE),
        reward_model("llama", tokenizer, num_hidden_layers=1).to(DEVICE),
        tokenizer=tokenizer,
        reward_template="plain",
        reward_tokenizer=tokenizer,
        **(settings | options),
    )


def run(engine: Engine, *changes: dict[str, Any]) -> list[RequestOutput]:
    each = [
        PARAMS.with_method(**{"method": PARAMS.method, "seed": 51 + i, **change})
        for i, change in enumerate(changes or ({}, {}))
    ]
    outputs = engine.generate(PROMPTS[: len(each)], each, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(each)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_same_tokens_as_the_pytorch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """With buckets so small that rounds outgrow them in every way, and copies of half pages."""
    monkeypatch.setattr(captured, "_NEW_TOKENS", 2)
    monkeypatch.setattr(captured, "_PREFIX_TOKENS", 4)
    monkeypatch.setattr(captured, "_STOP_IDS", 1)
    changes: tuple[dict[str, Any], ...] = (
        {"stop_token_ids": [7, 11, 60]},
        {"segment_length": 3, "candidates": 1, "top_p": 1.0, "top_k": 0},
    )
    made = []
    make = captured._Bucket.make
    monkeypatch.setattr(
        captured._Bucket,
        "make",
        lambda *args, **options: made.append(args[1]) or make(*args, **options),
    )
    want = run(engine(backend="pytorch"), *changes)
    triton = engine(backend="triton")
    at_load = len(made)
    got = run(triton, *changes)
    assert tokens(got) == tokens(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            torch.tensor(a.outputs[0].logprobs), torch.tensor(b.outputs[0].logprobs)
        )
        assert [s.attempts for s in a.outputs[0].segments] == [
            s.attempts for s in b.outputs[0].segments
        ]
    assert triton.stats()["page_copies"] > 0
    drafter = triton.loop.drafter
    assert isinstance(drafter, CapturedDrafter)
    assert len(made) > len(drafter.captures)  # some were outgrown
    assert triton.stats()["capture_waits"] == len(made) - at_load
    assert set(drafter.captures.values()) == {DEVICE.type == "cuda"}


def test_a_stop_token_ends_a_row_and_not_its_neighbours() -> None:
    vanilla = {"method": "vanilla", "target_reward": None, "max_tokens": 4, "segment_length": 4}
    stop = tokens(run(engine(backend="pytorch"), vanilla))[0][1]
    stopped = vanilla | {"stop_token_ids": [stop]}
    want = run(engine(backend="pytorch"), stopped, vanilla)
    got = run(engine(backend="triton"), stopped, vanilla)
    assert [output.outputs[0].finish_reason for output in got] == ["stop", "length"]
    assert tokens(got) == tokens(want)
    assert tokens(got)[0][-1] == stop


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_models() -> None:
    """What is compiled is not all of one piece, but it is compiled, and around the kernels."""
    changes = {"max_tokens": 3}
    want = run(engine(backend="pytorch"), changes)
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch({"cpp.simdlen": 1}):  # code that is compiled in less time
        got = run(engine(backend="triton", compile_model=True), changes)
    assert tokens(got) == tokens(want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_float8_pages() -> None:
    """Half the memory; the rounding of 3 bits shows in the log-probabilities, but not much."""
    vanilla = {"method": "vanilla", "target_reward": None, "temperature": 0.0}
    exact = engine(backend="triton")
    rounded = engine(backend="triton", kv_dtype="fp8")
    pages = exact.loop.model._pools.k_pages[0], rounded.loop.model._pools.k_pages[0]
    assert pages[0].nbytes == 4 * pages[1].nbytes
    scales = rounded.loop.model._pools.k_scales[0]
    assert scales is not None
    assert (scales != 1).all()
    a, b = (run(e, vanilla)[0].outputs[0] for e in (exact, rounded))
    # Of the first token, whose context is the same on both sides.
    assert a.logprobs[0] != b.logprobs[0]
    assert abs(a.logprobs[0] - b.logprobs[0]) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend must be one of auto, pytorch, triton, got 'cuda'"),
        ({"kv_dtype": "int8"}, "kv_dtype must be one of auto, fp8, got 'int8'"),
        ({"kv_dtype": "fp8", "backend": "pytorch"}, "kv_dtype='fp8' needs the Triton backend"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(**options)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what a CPU cannot do")
def test_what_needs_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device_timing must be False for a model on cpu"):
        engine(device_timing=True)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' on cpu needs TRITON_INTERPRET=1"):
        engine(backend="triton")


def test_buckets() -> None:
    rows = range(1, 300)
    found = [bucket_rows(n) for n in rows]
    assert all(bucket >= n for n, bucket in zip(rows, found, strict=True))
    small, fine = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64], [80, 96, 112, 128, 144, 160]
    assert sorted(set(found))[:16] == [*small, *fine]
    assert buckets(150) == [*small, *fine]


def test_usual_steps_are_captured_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the memory of graphs: what a GPU would capture; no round waits then."""
    triton = engine(backend="triton", max_rows=10)
    drafter = triton.loop.drafter
    assert isinstance(drafter, CapturedDrafter)
    if DEVICE.type != "cuda":
        drafter.capture(10)
        assert drafter.captures == {}
        monkeypatch.setattr(drafter, "_memory", "some")
        monkeypatch.setattr(captured, "StepGraph", _EagerStep)
        drafter.capture(10)
    assert [key[0] for key in drafter.captures] == [12, 8, 4, 2, 1]
    short = {"method": "vanilla", "target_reward": None, "max_tokens": 1, "segment_length": 1}
    run(triton, short)
    assert triton.stats()["capture_waits"] == 0
    run(triton, {**short, "logit_bias": {5: 1.0}})
    assert triton.stats()["capture_waits"] == 1


def test_steps_are_captured_again_where_another_engine_moves_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One with a compiled model leaves them apart; the other joins those of a product."""
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr(
        "stars_fast.engine.engine.check_numbers", lambda *_, **__: None
    )  # joins, too
    model = LlamaForCausalLM(small_model(layers=1).config).eval().to(DEVICE)  # of no other test
    weight = model.model.layers[0].mlp.up_proj.weight
    apart = Engine(
        model, num_pages=20, page_size=8, max_rows=2, backend="triton", compile_model=True
    )
    short = StarsParams(method="vanilla", max_tokens=1, segment_length=1, seed=3)

    def token_ids(engine: Engine) -> list[int]:
        (output,) = engine.generate([[5, 6]], short, use_tqdm=False)
        return output.outputs[0].token_ids

    want, waits, place = token_ids(apart), apart.stats()["capture_waits"], weight.data_ptr()
    Engine(model, num_pages=20, page_size=8, max_rows=2, backend="triton")
    assert weight.data_ptr() != place
    assert token_ids(apart) == want
    assert apart.stats()["capture_waits"] == waits + 1


class _EagerStep:
    """A step that counts as captured."""

    captured = True

    def __init__(self, step: Callable[[], None], memory: object) -> None:
        assert torch.is_inference_mode_enabled()  # or a graph would hold what gradients ask for
        self._step = step

    def run(self, times: int) -> None:
        for _ in range(times):
            self._step()


def test_a_step_runs_as_often_as_asked() -> None:
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def step() -> None:
        count.add_(1)

    graph = StepGraph(step, GraphMemory(DEVICE) if DEVICE.type == "cuda" else None)
    count.zero_()
    graph.run(5)
    assert count.item() == 5
    assert graph.captured == (DEVICE.type == "cuda")


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    count = torch.zeros((), device=DEVICE)

    def step() -> None:
        count.add_(1 + 0 * count.item())

    graph = StepGraph(step, GraphMemory(DEVICE) if DEVICE.type == "cuda" else None)
    count.zero_()
    graph.run(3)
    assert not graph.captured
    assert count.item() == 3
    assert "without a CUDA graph" in caplog.text


@pytest.mark.gpu
def test_device_timing_adds_up() -> None:
    timed = engine(device_timing=True)
    run(timed)
    seconds = {name: x for name, x in timed.stats().items() if name.startswith("seconds_")}
    assert seconds["seconds_draft"] > 0
    assert all(value >= 0 for value in seconds.values())
