"""The number of threads of decode steps: chosen by time, without effect on results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stars_fast import Engine, StarsParams
from stars_fast.models.threads import StepThreads

T = TypeVar("T")


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


class Fixed(StepThreads):
    """Steps on one number of threads."""

    def __init__(self, fixed: int) -> None:
        super().__init__()
        self._fixed = fixed

    def run(self, step: Callable[[], T]) -> T:
        torch.set_num_threads(self._fixed)
        try:
            return step()
        finally:
            torch.set_num_threads(2)


@pytest.mark.parametrize("sampling", [{"top_k": 40}, {"top_k": 0, "top_p": 0.9}, {"min_p": 0.01}])
def test_results_do_not_depend_on_it(sampling: dict[str, Any]) -> None:
    """Bit for bit, or tokens would depend on what else runs on the machine."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    engine = Engine(LlamaForCausalLM(config).eval(), num_pages=256, prefix_caching=False)
    assert engine.loop.model.step_threads is not None
    prompts = [list(range(start, start + 40)) for start in (5, 300, 7000)]
    params = StarsParams(method="vanilla", max_tokens=12, seed=3, top_logprobs=2, **sampling)
    found = []
    for count in (2, 1):
        engine.loop.model.step_threads = Fixed(count)
        outputs = [output.outputs[0] for output in engine.generate(prompts, params)]
        found.append([(one.token_ids, one.logprobs, one.top_logprobs) for one in outputs])
    assert found[0] == found[1]
