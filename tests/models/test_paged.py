"""Paged attention agrees with eager attention, whatever the history of the pages."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.backends import device_of
from helpers.page_driver import PageDriver, Sequence
from helpers.tiny_architectures import CONFIGS, MAX_LENGTH, WINDOW, tiny_lm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stars_fast.models.paged import PagedModel
from stars_fast.models.pool import page_bytes
from stars_fast.ops.backend import Backend

ROOM = 40  # longest sequence; several windows long


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "pytorch") for name in CONFIGS),
        # What the kernels have to know of: grouped heads, windows, soft caps, sinks.
        *((name, "triton") for name in ("gemma2", "gpt_oss")),
    ],
)
def test_logits_agree_with_eager_attention(name: str, backend: Backend) -> None:
    window, model = WINDOW, tiny_lm(name)
    if backend == "triton":  # the interpreter is slow: a layer of each type, and a shorter window
        window = 3
        mixed = ["sliding_attention", "full_attention"]
        model = tiny_lm(name, num_hidden_layers=2, layer_types=mixed, sliding_window=window)
    model.to(device_of(backend))
    driver = PageDriver(model, page_size=4, num_pages=256, tolerance=1e-5, backend=backend)
    rng = random.Random(name)
    long, short, fresh = Sequence(), Sequence(), Sequence()

    # Prefill, unequal lengths; the longest passes the window several times.
    prompts = [driver.random_tokens(rng, n) for n in (3 * window + 1, 3)]
    rows = driver.extend([(long, [prompts[0]]), (short, [prompts[1]])])
    driver.commit(long, rows[0], 0, len(prompts[0]))
    driver.commit(short, rows[1], 0, 3)
    driver.seal(long)
    # Decode, forked unequally, beside a sequence without any prefix; rows of unequal length.
    candidates = [driver.random_tokens(rng, n) for n in (window + 2, 4, 6)]
    groups = [(long, candidates), (short, [driver.random_tokens(rng, 5)]), (fresh, [[7, 8]])]
    rows = driver.decode(groups)
    driver.commit(long, rows[0], 1, 3)
    driver.commit(short, rows[1], 0, 5)
    driver.commit(fresh, rows[2], None, 0)
    # Roll back and continue differently, on pages that others have used.
    driver.truncate(short, 2)
    driver.truncate(long, 3 * window + 2)
    rows = driver.decode([(long, [[9, 10], [11, 12]]), (short, [[13, 14], [15, 16]])])
    driver.commit(long, rows[0], 1, 2)
    driver.commit(short, rows[1], 0, 1)
    # Extend forks, as a reward model does.
    rows = driver.extend([(long, [[20, 21, 22], [23]]), (short, [[24], [25, 26]])])
    for sequence, candidates_ in zip((long, short), rows, strict=True):
        driver.commit(sequence, candidates_, 0, 1)
    for _ in range(4 if backend == "pytorch" else 0):
        driver.random_step(rng, [long, short, fresh], ROOM)
    assert driver.compared > 30


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 2, 3, 8, 16]),
    name=st.sampled_from(["gemma2", "mistral", "gpt_oss", "gpt2"]),
    num_sequences=st.integers(1, 4),
    steps=st.integers(1, 6),
)
def test_any_mix_of_operations(
    seed: int, page_size: int, name: str, num_sequences: int, steps: int
) -> None:
    driver = PageDriver(
        tiny_lm(name), page_size=page_size, num_pages=8 + 800 // page_size, tolerance=1e-5
    )
    rng = random.Random(seed)
    sequences = [Sequence() for _ in range(num_sequences)]
    for _ in range(steps):
        driver.random_step(rng, sequences, ROOM)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral"])
def test_bfloat16(name: str) -> None:
    # Logits of these models are about 1 in size; bfloat16 keeps 8 bits of each of ~20 operations.
    # No mixtures of experts: rounding alone sends a token to another expert.
    driver = PageDriver(
        tiny_lm(name, dtype=torch.bfloat16), page_size=4, num_pages=256, tolerance=0.15
    )
    rng = random.Random(1)
    sequences = [Sequence(), Sequence()]
    for _ in range(6):
        driver.random_step(rng, sequences, ROOM)


def test_prefixes_of_very_different_length() -> None:
    """Rows go to several tiles and come back in order."""
    model = tiny_lm("llama")
    driver = PageDriver(model, page_size=16, num_pages=256, tolerance=2e-5)
    rng = random.Random(3)
    sequences = []
    for length in (500, 3, 0, 140):
        sequence = Sequence()
        if length:
            rows = driver.extend([(sequence, [driver.random_tokens(rng, length)])])
            driver.commit(sequence, rows[0], 0, length)
        sequences.append(sequence)
    groups = [(s, [driver.random_tokens(rng, 3) for _ in range(n)])
              for s, n in zip(sequences, (2, 1, 3, 1), strict=True)]  # fmt: skip
    for rows, (sequence, _) in zip(driver.decode(groups), groups, strict=True):
        driver.commit(sequence, rows, 0, 2)
    driver.extend(groups)


def test_a_broken_request_leaves_its_neighbours_alone() -> None:
    """NaN in one request's keys and values changes nothing elsewhere."""
    model = tiny_lm("llama")
    driver = PageDriver(model, page_size=4, num_pages=64, tolerance=1e-5)
    rng = random.Random(5)
    healthy, broken = Sequence(), Sequence()
    rows = driver.extend([(s, [driver.random_tokens(rng, 6)]) for s in (healthy, broken)])
    for sequence, row in zip((healthy, broken), rows, strict=True):
        driver.commit(sequence, row, 0, 6)
    driver._poison(broken.pages)
    paged = driver.paged
    for run in ("extend", "decode"):
        forks = [(s, [driver._fork(s, [5, 6])]) for s in (broken, healthy)]
        batch = driver.batch(forks)
        if run == "extend":
            got = paged.extend(batch, torch.tensor([5, 6, 5, 6]))
            want = driver._eager([*healthy.tokens, 5, 6], hidden=True)[-1]
        else:
            state = paged.begin_decode(batch)
            for j in (0, 1):
                got = paged.decode_step(state, j, torch.tensor([5 + j, 5 + j]))
            want = driver._eager([*healthy.tokens, 5, 6], hidden=False)[-1]
        assert got[0].isnan().any()
        torch.testing.assert_close(got[1], want, atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_lm("mistral")
    model.set_attn_implementation("sdpa")
    driver = PageDriver(model, page_size=4, tolerance=1e-5)
    sequence = Sequence()
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        driver.decode([(sequence, [[3, 4, 5]])])
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(input_ids=ids).logits, before)


def test_configured_outputs_do_not_matter() -> None:
    """A model may be configured to return more than logits."""
    model = tiny_lm("qwen2")
    driver = PageDriver(model, page_size=4, tolerance=1e-5)
    model.config.output_hidden_states = True
    rows = driver.extend([(Sequence(), [[3, 4], [5]])])
    assert len(rows[0]) == 2
    driver.decode([(Sequence(), [[3, 4], [5, 6]])])


def test_restored_after_an_error() -> None:
    model = tiny_lm("llama")
    model.set_attn_implementation("sdpa")
    driver = PageDriver(model, page_size=4, tolerance=1e-5)
    batch = driver.batch([(Sequence(), [driver._fork(Sequence(), [3])])])
    with pytest.raises(IndexError):
        driver.paged.prefill(batch, torch.tensor([10**6]))
    assert model.config._attn_implementation == "sdpa"


def test_properties() -> None:
    model = tiny_lm("gemma2", dtype=torch.bfloat16)
    paged = PagedModel(model, num_pages=5, page_size=4)
    assert paged.dtype == torch.bfloat16
    assert paged.device == torch.device("cpu")
    assert paged.num_layers == 3
    assert paged.vocab_size == model.config.vocab_size
    assert paged.max_length == MAX_LENGTH
    # 3 layers, 2 kv heads of 8, keys and values, 2 bytes, 4 tokens
    assert page_bytes(model, 4) == 3 * 2 * 8 * 2 * 2 * 4
    pools = (*paged._pools.k_pages, *paged._pools.v_pages)
    assert sum(p.numel() * 2 for p in pools) == 5 * page_bytes(model, 4)


@pytest.mark.parametrize(
    ("field", "value"), [("num_pages", 1), ("num_pages", 0), ("page_size", 0), ("page_size", -3)]
)
def test_bad_pool_sizes(field: str, value: int) -> None:
    sizes = {"num_pages": 8, "page_size": 4, field: value}
    with pytest.raises(ValueError, match=rf"{field} must be at least .*got {value}"):
        PagedModel(tiny_lm("llama"), **sizes)


def test_a_pool_beyond_the_memory_is_refused() -> None:
    """Its memory is taken when it is written to: no allocation fails."""
    with pytest.raises(ValueError, match=r"num_pages must be at most \d+, which fill the machine"):
        PagedModel(tiny_lm("llama"), num_pages=1 << 40, page_size=16)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        PagedModel(tiny_lm("llama").train(), num_pages=8, page_size=4)


def test_wrong_number_of_ids_and_steps_out_of_range() -> None:
    driver = PageDriver(tiny_lm("llama"), page_size=4, tolerance=1e-5)
    sequence = Sequence()
    batch = driver.batch([(sequence, [driver._fork(sequence, [3, 4])])])
    with pytest.raises(ValueError, match=r"input_ids must have shape \(2,\), got \(3,\)"):
        driver.paged.prefill(batch, torch.tensor([1, 2, 3]))
    state = driver.paged.begin_decode(batch)
    with pytest.raises(ValueError, match=r"j must be in \[0, 2\), got 2"):
        driver.paged.decode_step(state, 2, torch.tensor([1]))


def test_a_round_does_not_read_its_batch_again() -> None:
    """The scheduler may overwrite its arrays once a round has begun."""
    model = tiny_lm("llama")
    driver = PageDriver(model, page_size=4, tolerance=1e-5)
    sequence = Sequence()
    row = driver._fork(sequence, [3, 4])
    batch = driver.batch([(sequence, [row])])
    state = driver.paged.begin_decode(batch)
    for array in (batch.slots, batch.row_start, batch.group_pages, batch.new_lengths):
        array.fill(np.iinfo(np.int32).max)
    for j, token in enumerate(row.tokens):
        got = driver.paged.decode_step(state, j, torch.tensor([token]))
    torch.testing.assert_close(got[0], driver._eager([3, 4], hidden=False)[-1])
