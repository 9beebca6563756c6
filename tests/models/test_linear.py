"""Linear layers through oneDNN: same numbers, fresh weights, an unchanged model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stars_fast.models import linear
from stars_fast.models.linear import OneDnnLinears


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 7, bias=False)).eval()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (1, 33, 24)])
def test_same_numbers(
    model: nn.Sequential, shape: tuple[int, ...], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs:
        monkeypatch.setattr(linear, "_MEMORY_SHARE", 0.0)
    x = torch.randn(shape)
    linears = OneDnnLinears(model)
    assert len(linears._layers) == 2
    with torch.inference_mode():
        expected = model(x)
        with linears.active():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_changed_in_place_are_seen(model: nn.Sequential) -> None:
    linears = OneDnnLinears(model)
    x = torch.randn(3, 24)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        model[2].weight = nn.Parameter(torch.randn(7, 40))
        expected = model(x)
        with linears.active():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_model_is_restored_after_an_error(model: nn.Sequential) -> None:
    linears = OneDnnLinears(model)
    with pytest.raises(RuntimeError), linears.active():
        model(torch.randn(3, 25))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_other_layers_are_left_alone() -> None:
    class Doubled(nn.Linear):
        pass

    mixed = nn.ModuleList(
        [Doubled(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Embedding(3, 4)]
    )
    assert not OneDnnLinears(mixed)._layers


def test_copies_are_made_at_the_first_run_and_shared(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[torch.Size] = []
    pack = torch.ops.mkldnn._reorder_linear_weight

    def counted(weight: torch.Tensor, rows: int) -> torch.Tensor:
        packed.append(weight.shape)
        return pack(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", counted)
    both = [OneDnnLinears(model), OneDnnLinears(model)]
    assert not packed
    with torch.inference_mode():
        for linears in both:
            with linears.active():
                model(torch.randn(3, 24))
    assert packed == [(40, 24), (7, 40)]
