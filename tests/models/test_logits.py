"""Logits from hidden states are those of the whole forward, whatever stands behind the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_architectures import CONFIGS, VOCAB_SIZE, tiny_lm
from transformers import AutoModel, LlamaForCausalLM

from stars_fast.errors import UnsupportedModelError
from stars_fast.models.logits import LogitHead

IDS = torch.tensor([[5, 9, 4, 17, 30, 8, 11, 40, 22]])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_every_architecture(name: str) -> None:
    model = tiny_lm(name)
    head = LogitHead(model)
    assert head.vocab_size == VOCAB_SIZE
    with torch.no_grad():
        want = model(input_ids=IDS).logits[0]
        hidden = model.base_model(input_ids=IDS)[0][0]
    torch.testing.assert_close(head(hidden), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head(hidden[2:5]), want[2:5], atol=1e-6, rtol=1e-5)
    # Some of them do more than a linear layer: that is what the head is for.
    linear = model.get_output_embeddings()(hidden)
    assert torch.allclose(linear, want) != (name in ("gemma2", "granite", "cohere2"))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_lm("opt")
    head = LogitHead(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        head(torch.zeros(3, 24))
        with pytest.raises(RuntimeError):
            head(torch.zeros(3, 23))
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_bfloat16() -> None:
    model = tiny_lm("gemma2", dtype=torch.bfloat16)
    with torch.no_grad():
        want = model(input_ids=IDS).logits[0]
        got = LogitHead(model)(model.base_model(input_ids=IDS)[0][0])
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


def test_heads_that_read_more_than_hidden_states_are_refused() -> None:
    class Biased(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits + input_ids.unsqueeze(-1)
            return output

    plain = tiny_lm("llama")
    model = Biased(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    with pytest.raises(UnsupportedModelError, match="logits of Biased cannot be had from"):
        LogitHead(model)


def test_model_without_a_head_is_refused() -> None:
    model = AutoModel.from_config(CONFIGS["llama"]()).eval()
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language-model head"):
        LogitHead(model)
