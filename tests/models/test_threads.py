"""The number of threads of decode steps: chosen by time, without effect on results."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.attention_cases import random_batch
from transformers import LlamaConfig, LlamaForCausalLM

from stars_fast.models.paged import PagedModel
from stars_fast.models.threads import StepThreads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """Two cores; a step takes as long as it was measured to, alone or beside a busy neighbour."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = False
        self.threads = StepThreads(lambda: self.now)

    def step(self) -> None:
        alone, beside = {2: 7.6, 1: 10.8}, {2: 24.7, 1: 10.6}
        self.now += (beside if self.busy else alone)[torch.get_num_threads()]

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.threads.begin_round()
            for _ in range(16):
                self.threads.run(self.step)


def test_fewer_threads_beside_a_busy_neighbour() -> None:
    machine = Machine()
    machine.run(20)
    assert machine.threads.count == 2
    machine.busy = True
    machine.run(10)
    assert machine.threads.count == 1
    began = machine.now
    machine.run(40)
    assert (machine.now - began) / (40 * 16) < 1.1 * 10.6  # tries cost little
    machine.busy = False
    machine.run(10)
    assert machine.threads.count == 2
    assert torch.get_num_threads() == 2


def test_one_thread_is_left_alone() -> None:
    torch.set_num_threads(1)
    machine = Machine()
    machine.run(20)
    assert machine.threads.count == 1


def test_results_do_not_depend_on_it() -> None:
    """Bit for bit, or tokens would depend on what else runs on the machine."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    paged = PagedModel(model, num_pages=256, page_size=16)
    assert paged._threads is not None
    batch = random_batch(
        np.random.default_rng(0), prefixes=[200, 70, 130], candidates=[7, 5, 9], max_new=4,
        page_size=16, num_pages=256,
    )  # fmt: skip
    for pages in (*paged._pools.k_pages, *paged._pools.v_pages):
        pages.normal_()
    ids = torch.arange(batch.num_rows)
    found = []
    for count in (2, 1):
        torch.set_num_threads(count)
        state = paged.begin_decode(batch)
        found.append([paged.decode_step(state, step, ids) for step in range(4)])
    for two, one in zip(*found, strict=True):
        assert torch.equal(two, one)
