"""The captured step on tensors without data: what it would launch on a GPU, and what it may not.

A step runs on the device "meta", which stands for the GPU, or on fake tensors that say to be on
"cuda", with torch's builds for CUDA: an operator that would wait for the device cannot run there,
and one that mixes devices shows. Kernels only note that they are called.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from stars_fast import ops
from stars_fast.drafting.adjust import Widths
from stars_fast.drafting.captured import _Bucket, _Columns
from stars_fast.drafting.graph import NoWaiting
from stars_fast.drafting.rows import StepNeeds
from stars_fast.kernels.sample import sample
from stars_fast.models import joined, paged
from stars_fast.models.fusion import FusedLayers
from stars_fast.models.kernel_attention import DecodeCapacity
from stars_fast.models.paged import PagedModel
from stars_fast.models.probe import attention_layout
from stars_fast.ops.backend import backend

#: Devices whose tensors need no data here.
DEVICES = ("meta", "cuda") if torch.backends.cuda.is_built() else ("meta",)

#: Operators that launch nothing, beside the views; dropout does in training only.
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "promote_types", "dropout", "device"}
_KERNELS = {
    "attention": ("attention_kernel", "merge_kernel"),
    "pages": ("kv_append_kernel",),
    "sample": ("sample_reduce_kernel", "sample_finish_kernel"),
    "norm": ("rms_norm_kernel", "head_norms_kernel"),
    "gated": ("gated_kernel",),
    "experts": (
        "choose_experts_kernel",
        "order_pairs_kernel",
        "experts_up_kernel",
        "experts_down_kernel",
        "sum_pairs_kernel",
    ),
    "rotary": ("rotate_append_kernel",),
}


@dataclass
class Launches(TorchDispatchMode):
    """Names of what is launched, in order."""

    device: str
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = object.__hash__

    def note(self, name: str, arguments: Any) -> None:
        """Note a launch, whose tensors must lie on the one device."""
        for x in tree_leaves(arguments):
            if isinstance(x, Tensor) and x.device.type != self.device and x.ndim:
                raise AssertionError(f"{name} takes a tensor on {x.device}")
        self.names.append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            self.note(name, (args, kwargs))
        return result

    def per_layer(self) -> list[int]:
        """Launches from one layer's attention to the next one's."""
        at = [i for i, name in enumerate(self.names) if name == "attention_kernel"]
        return [b - a for a, b in itertools.pairwise(at)]


@contextmanager
def _noting(launches: Launches) -> Iterator[None]:
    """Have kernels note their names in place of running."""

    def stand_in(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                assert all(size > 0 for size in grid), (name, grid)
                return lambda *args, **kwargs: launches.note(name, (args, kwargs))

        return Kernel()

    with pytest.MonkeyPatch.context() as patch:
        for module, names in _KERNELS.items():
            for name in names:
                # By name: some modules are hidden behind a function of theirs.
                owner = importlib.import_module(f"stars_fast.kernels.{module}")
                patch.setattr(owner, name, stand_in(name))
        # The operator's own dispatch asks for a form of it for the device.
        patch.setattr(ops, "sample", _sample)
        yield


def _sample(*args: Any, with_entropy: bool) -> tuple[Tensor, ...]:
    return sample(*args)


@contextmanager
def _without_data(device: str) -> Iterator[None]:
    """Have tensors of the device without a driver; a fake GPU's is an H100."""
    if device == "meta":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.cuda, "device", lambda *_: nullcontext())
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        # Fake parameters are of a type of their own, and only plain ones are moved together.
        patch.setattr(joined, "_may_move", lambda tensors: True)
        yield


def captured_step(
    make: Callable[[], PreTrainedModel],
    *,
    device: str = "meta",
    rows: int = 8,
    needs: StepNeeds | None = None,
) -> Launches:
    """Return what one captured step of a model launches.

    Parameters
    ----------
    make
        Returns the model, on the default device.
    device
        One of `DEVICES`.
    rows
        Of the bucket.
    needs
        What the steps look at.
    """
    real = make().eval()
    layouts = attention_layout(real)
    with backend("triton"):
        known = FusedLayers(real, layouts).known
    launches = Launches(device)
    with pytest.MonkeyPatch.context() as patch, _without_data(device):
        with torch.device(device):
            model = make().eval()
        patch.setattr(paged, "attention_layout", lambda model: layouts)
        patch.setattr(
            FusedLayers, "of", classmethod(lambda cls, model, found: cls(model, found, known))
        )
        lm = PagedModel(model, num_pages=64, page_size=16, backend="triton")
        capacity = DecodeCapacity(rows, page_entries=rows * 130, new_tokens=64, prefix_tokens=2048)
        with torch.inference_mode(), _noting(launches), lm.on_backend():
            bucket = _Bucket.make(
                lm,
                capacity,
                lm.decode_tiles(2),
                _Columns(1, Widths(0, 0)).rounded_up(adjusts=False),
                None,
                needs or StepNeeds(),
                None,
                None,
            )
            launches.names.clear()
            with NoWaiting(), launches:
                bucket.graph.run(1)
    return launches
