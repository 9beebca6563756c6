"""Models of ours on packed weights alone: same numbers, nothing twice, a user's model as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_architectures import tiny_lm
from torch import nn
from transformers import PreTrainedModel

from stars_fast import Engine, StarsParams, demo
from stars_fast.models.machine import release_file_pages
from stars_fast.models.packed import PackedLinear, group_of, ours, pack_model
from stars_fast.models.paged import PagedModel
from stars_fast.models.parameters import multiplied_parameters
from stars_fast.models.selfcheck import check_numbers

IDS = torch.arange(3, 23).view(2, 10)
PARAMS = StarsParams(method="vanilla", max_tokens=8, temperature=0.0)


def linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),  # biases
        ("phi3", {}),  # joined already
        ("opt", {}),  # layers of other names, which are not fused
    ],
    ids=str,
)
@torch.inference_mode()
def test_numbers_and_weights_are_the_same(family: str, changes: dict[str, Any]) -> None:
    model = tiny_lm(family, **changes)
    want, weights = model(IDS).logits, copy.deepcopy(model.state_dict())
    parameters = multiplied_parameters(model)
    ours(model)
    paged = PagedModel(model, num_pages=8, page_size=4)
    paged.pack_weights()
    assert all(isinstance(linear, PackedLinear) for linear in linears(model))
    assert sum(x.numel() for x in model.parameters()) < parameters
    assert multiplied_parameters(model) == parameters
    found = model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    for one in (model, copy.deepcopy(model)):
        torch.testing.assert_close(one(IDS).logits, want, rtol=1e-5, atol=1e-5)
    check_numbers(model)  # on pages, fused
    PagedModel(model, num_pages=8, page_size=4).pack_weights()  # another on the same
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_layers_of_one_input_are_one_product_by_any_order_of_calls() -> None:
    model = tiny_lm("llama")
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    x, y = torch.randn(3, 32), torch.randn(3, 32)
    calls = [(0, x), (1, x), (0, y), (2, y), (2, y), (1, x), (1, y), (0, x)]
    want = [parts[at](given) for at, given in calls]
    ours(model)
    pack_model(model)
    group = group_of(parts)
    assert group is not None
    assert group_of(parts[:2]) is None
    for (at, given), result in zip(calls, want, strict=True):
        torch.testing.assert_close(parts[at](given), result, rtol=1e-5, atol=1e-5)
    together = zip(group.product(x), [part(x) for part in parts], strict=True)
    assert all(torch.equal(one, other) for one, other in together)


def test_a_users_model_keeps_its_weights(tmp_path: Path) -> None:
    model = tiny_lm("llama")
    ours(model)  # until a user gives it
    Engine(model, num_pages=20)
    assert not any(isinstance(linear, PackedLinear) for linear in linears(model))
    model.save_pretrained(tmp_path)
    engine = Engine(str(tmp_path), num_pages=20)
    assert all(isinstance(linear, PackedLinear) for linear in linears(engine._lm.model))
    outputs = [e.generate([[5, 6, 7]], PARAMS, use_tqdm=False) for e in (engine, Engine(model))]
    assert outputs[0][0].outputs[0].token_ids == outputs[1][0].outputs[0].token_ids
    scores = [e.prompt_scores([5, 6, 7, 8]) for e in (engine, Engine(model))]
    assert [s.logprob for s in scores[0][1:]] == pytest.approx([s.logprob for s in scores[1][1:]])


def test_reward_models_and_guides_are_packed() -> None:
    engine = Engine.demo(num_pages=60, reward_num_pages=60, guide=str(demo.model_dir()))
    scorer: Any = engine.loop.scorer
    guided: Any = engine.loop.model
    for model in (scorer.model.model, guided.beside[0].model):
        assert all(isinstance(x, PackedLinear) for x in linears(model.base_model))


def test_file_pages_are_given_back_unless_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    np.arange(1 << 16, dtype=np.float32).tofile(path)

    def mapped() -> torch.Tensor:
        return torch.from_file(str(path), shared=False, size=1 << 16, dtype=torch.float32)

    def present(tensor: torch.Tensor) -> int:
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(8 * (tensor.data_ptr() // 4096))
            pages = np.frombuffer(pagemap.read(8 * (tensor.nbytes // 4096)), np.uint64)
        return int((pages >> 63).sum())

    read, written = mapped(), mapped()
    want = float(read.double().sum())
    written[5000] = -1.0
    assert present(read) > 0
    for tensor in (read, written, torch.ones(1 << 16)):
        release_file_pages(tensor)
    assert present(read) == 0
    assert float(read.double().sum()) == want
    assert written[5000] == -1.0
