"""Copies and appends write what they should and nothing else, in PyTorch and in Triton."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stars_fast.ops import backend, copy_pages, kv_append

kernels = pytest.importorskip("stars_fast.kernels.pages", reason="Triton is for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["pytorch", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test, on each form of the operators."""
    with backend(request.param):
        yield request.param


def pools(layers: int, dtype: torch.dtype = torch.float32, dim: int = 3) -> list[Tensor]:
    """Layer i has i + 1 heads, so that layers of unequal shape are covered."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn((9, 4, i + 1, dim), generator=generator).to(dtype).to(DEVICE)
        for i in range(layers)
    ]


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dim", [3, 4, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_copy_pages_per_token(dtype: torch.dtype, dim: int) -> None:
    """Tokens of 3 to 2,400 bytes: every width of access, and more than one block."""
    k, v = pools(3, dtype, dim), pools(2, dtype, dim)
    before = [x.clone() for x in (*k, *v)]
    copies = [(1, 5, 2), (1, 6, 4), (3, 7, 0), (8, 2, 1)]
    copy_pages(k, v, *(indices(*column) for column in zip(*copies, strict=True)))
    for now, old in zip((*k, *v), before, strict=True):
        want = bits(old.clone())
        for src, dst, count in copies:
            want[dst, :count] = bits(old)[src, :count]
        assert torch.equal(bits(now), want)


def test_copies_between_pages_beyond_32_bits_of_words() -> None:
    """Offsets within a pool are 64 bits wide: here in bytes, at 1 byte a word."""
    page = 2**20
    pool = torch.empty((2100, page, 1, 1), dtype=torch.uint8, device=DEVICE).view(torch.int8)
    pool[2099, :8], pool[2098, :8] = 7, 0
    copy_pages([pool], [], indices(2099), indices(2098), indices(5))
    assert pool[2098, :8].flatten().tolist() == [7] * 5 + [0] * 3


def test_a_pools_table_is_made_once_and_does_not_hold_the_pools(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    if implementation != "triton":
        pytest.skip("PyTorch needs no table")
    made: list[int] = []
    make = kernels.pool_table

    def counted(pools: tuple[Tensor, ...]) -> kernels.PoolTable:
        made.append(len(pools))
        return make(pools)

    monkeypatch.setattr(kernels, "pool_table", counted)
    k, v = pools(3, dim=5), pools(2, dim=5)
    for target in (5, 6):
        copy_pages(k, v, indices(1), indices(target), indices(4))
        assert torch.equal(k[2][target], k[2][1])
        assert torch.equal(v[1][target], v[1][1])
    copy_pages(v, k, indices(1), indices(7), indices(4))
    copy_pages(k, [], indices(2), indices(8), indices(4))
    assert made == [5, 5, 3]
    assert torch.equal(k[0][8], k[0][2])
    # At the same address, but of another shape: another table.
    halves = [x.view(9, 2, x.shape[2], -1) for x in k]
    copy_pages(halves, [], indices(2), indices(8), indices(2))
    assert made == [5, 5, 3, 3]
    gone = [weakref.ref(x) for x in (*k, *v)]
    del k, v, halves
    gc.collect()
    assert [x() for x in gone] == [None] * 5


def test_no_copies() -> None:
    k = pools(1)
    old = k[0].clone()
    copy_pages(k, [], indices(), indices(), indices())
    assert torch.equal(k[0], old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_append(dtype: torch.dtype) -> None:
    """Keys as they come from a model: float32 or of the pool's dtype, heads before tokens."""
    k, v = pools(2, dtype)[1], pools(2, dtype, dim=5)[1]
    before = k.clone(), v.clone()
    key = torch.arange(24.0, device=DEVICE).view(2, 4, 3).transpose(0, 1)
    value = torch.arange(40.0, device=DEVICE).to(dtype).view(2, 4, 5).transpose(0, 1)
    slots = torch.tensor([5, 0, 35, 0], device=DEVICE)
    kv_append(k, v, key, value, slots)
    written = torch.zeros(36, dtype=torch.bool, device=DEVICE)
    written[slots] = True
    for now, old, new in ((k, before[0], key), (v, before[1], value)):
        flat = now.flatten(0, 1)
        assert torch.equal(flat[[5, 35]], new[[0, 2]].to(dtype))
        assert torch.equal(flat[~written], old.flatten(0, 1)[~written])


def test_append_to_fp8_pages() -> None:
    """Exactly: normal and subnormal numbers, halfway cases, and what lies beyond the type."""
    k, v = (pools(2, torch.float8_e4m3fn, dim)[1] for dim in (512, 16))
    generator = torch.Generator().manual_seed(1)
    key = torch.randn((6, 2, 512), generator=generator)
    key *= 2.0 ** torch.arange(-12, 12).repeat(22)[:512]
    key[0, 0, :256] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    key[0, 0].nan_to_num_(0.0)
    key[1] = key[0, 0] + torch.cat((key[0, 0, 1:], key[0, 0, :1]))  # twice the midpoints
    value = torch.randn((6, 2, 16), generator=generator)
    scales = torch.tensor([1.0, 2.0]), torch.tensor([0.01, 3.0])
    slots = torch.arange(6, 12, device=DEVICE)
    kv_append(k, v, *(x.to(DEVICE) for x in (key, value)), slots, *(x.to(DEVICE) for x in scales))
    for pages, new, scale in ((k, key, scales[0]), (v, value, scales[1])):
        want = (new / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(pages.cpu().flatten(0, 1)[6:12].float(), want.float())


def test_the_kernel_appends_at_slots_beyond_32_bits() -> None:
    pages = torch.empty((2**27 + 1, 1, 1, 16), dtype=torch.uint8, device=DEVICE)
    k = pages.view(torch.float8_e4m3fn)
    key = torch.ones((1, 1, 16), device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    kv_append(k, k, key, key, torch.tensor([2**27], device=DEVICE), one, one)
    assert k[2**27].float().flatten().tolist() == [1.0] * 16


def test_bad_arguments_of_the_kernels_are_named() -> None:
    k = pools(2)
    table = kernels.pool_table(k)
    with pytest.raises(ValueError, match="pools must not be empty"):
        kernels.pool_table([])
    with pytest.raises(ValueError, match=r"pools\[1\] must be \[9, 4"):
        kernels.pool_table([k[0], k[1][:5]])
    with pytest.raises(ValueError, match=r"pools\[0\] must be contiguous"):
        kernels.pool_table([k[1].transpose(2, 3)])
    with pytest.raises(ValueError, match=r"dst must be int32 of shape \[1\]"):
        kernels.copy_pages(table, indices(1), indices(2, 3), indices(1))
    key = torch.zeros((2, 1, 3), device=DEVICE)
    slots = torch.tensor([5, 9], device=DEVICE)
    with pytest.raises(ValueError, match=r"value must have shape \[2, 1, 3\]"):
        kernels.kv_append(k[0], k[0], key, key[:, :, :2], slots)
    with pytest.raises(ValueError, match=r"slots must be int64 of shape \[2\]"):
        kernels.kv_append(k[0], k[0], key, key, slots[:1])
    with pytest.raises(ValueError, match="k_scale and v_scale go together"):
        kernels.kv_append(k[0], k[0], key, key, slots, torch.ones(1))
    with pytest.raises(ValueError, match="k_pages must be contiguous, of"):
        kernels.kv_append(k[0].double(), k[0], key.double(), key, slots)


def test_operators_are_well_formed() -> None:
    k, v = pools(2), pools(2)
    torch.library.opcheck(
        torch.ops.stars_fast.copy_pages.default, (k, v, indices(1), indices(2), indices(3))
    )
    key = torch.zeros((2, 1, 3), device=DEVICE)
    slots = torch.tensor([5, 9], device=DEVICE)
    torch.library.opcheck(torch.ops.stars_fast.kv_append.default, (k[0], v[0], key, key, slots))
