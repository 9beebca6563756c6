"""The least time of a round: what a machine's memory and arithmetic allow, from a model's shapes.

A decode step reads every weight and every cached key and value once, a prefix that candidates share
once for all of them; what it computes may take longer than that. The least time is the larger of
the two, bytes / bandwidth and operations / rate, phase by phase (S. Williams et al., Roofline,
CACM 52(4), 2009). Activations, norms and launches are left out, so nothing can be faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.models.probe import attention_layout


@dataclass(frozen=True)
class Machine:
    """What a machine can do at best.

    Attributes
    ----------
    name
        Of the device.
    bytes_per_second
        Read or written, of large arrays.
    operations_per_second
        Multiplications and additions of large matrix products, in the models' dtype.
    """

    name: str
    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class ModelCost:
    """What a token costs in a model.

    Attributes
    ----------
    weight_bytes
        Of all weights that enter products: read once by a forward pass, however many its tokens.
    kv_bytes
        Keys and values of one token in all layers.
    operations
        Of the products with weights, per token.
    operations_per_key
        Of attention, per token and per key that it sees, in all layers.
    """

    weight_bytes: float
    kv_bytes: float
    operations: float
    operations_per_key: float

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> ModelCost:
        """Costs of a model, which may be on the meta device.

        Parameters
        ----------
        model
            Of linear layers; the embedding of its input, which is looked up, is not counted.
        dtype, kv_dtype
            Of its weights, and of its keys and values; None: as the model has them.
        """
        dtype = dtype or model.dtype
        kv_dtype = kv_dtype or dtype
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        layouts = attention_layout(model)
        kv = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in layouts)
        per_key = sum(2 * x.heads * (x.key_dim + x.value_dim) for x in layouts)
        return cls(
            weight_bytes=weights * dtype.itemsize,
            kv_bytes=kv * kv_dtype.itemsize,
            operations=2 * weights,
            operations_per_key=per_key,
        )


@dataclass(frozen=True)
class Work:
    """What a phase of a round has to do, at the least.

    Attributes
    ----------
    bytes
        To be read and written.
    operations
        To be computed.
    """

    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, machine: Machine) -> float:
        """The larger of the time of the bytes and that of the operations."""
        by_memory = self.bytes / machine.bytes_per_second
        return max(by_memory, self.operations / machine.operations_per_second)


def forward_work(model: ModelCost, tokens: float, prefix_tokens: float, seen_keys: float) -> Work:
    """One forward pass: a decode step, a prefill, or the reward model's look at new segments.

    Parameters
    ----------
    model
        What its tokens cost.
    tokens
        That are run, of all rows.
    prefix_tokens
        Cached tokens that are read; a prefix that rows share counts once.
    seen_keys
        Keys that the tokens attend to, summed over tokens.
    """
    return Work(
        bytes=model.weight_bytes + model.kv_bytes * (prefix_tokens + tokens),
        operations=tokens * model.operations + seen_keys * model.operations_per_key,
    )


def seen_keys(start: npt.NDArray[np.int64], new: npt.NDArray[np.int64]) -> int:
    """Keys that new tokens see, themselves included, summed over all tokens of all rows.

    Parameters
    ----------
    start, new
        Cached tokens before a row's new ones, and the number of those, ``[R]``.
    """
    return int((new * start + new * (new + 1) // 2).sum())


def copy_work(model: ModelCost, slots: float) -> Work:
    """Copies of partly filled pages: `slots` tokens, read and written."""
    return Work(bytes=2 * slots * model.kv_bytes)
