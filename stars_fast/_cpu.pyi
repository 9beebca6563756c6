"""Operators of a decode step on a CPU, in float32.

Tensors come as addresses, strides in floats; see `stars_fast.ops.cpu`, the only caller.
"""

from typing import final

import numpy as np
import numpy.typing as npt

def instruction_set() -> str:
    """Return the instruction set whose form runs here: "avx512", "avx2" or "baseline"."""

def norm(
    x: int,
    residual: int,
    weight: int,
    sum: int,
    out: int,
    tokens: int,
    heads: int,
    dim: int,
    x_stride: int,
    residual_stride: int,
    out_stride: int,
    eps: float,
    offset: float,
) -> None:
    """Write x / rms(x) * (weight + offset) over the last dimension.

    With a residual (an address, 0 for none), x + residual is written to `sum` first and takes the
    place of x.
    """

def gated(gate: int, up: int, out: int, tokens: int, dim: int, stride: int, act: int) -> None:
    """Write act(gate) * up; act 0 is SiLU, 1 is GELU by tanh."""

def rotate(
    x: int,
    tokens: int,
    heads: int,
    head_dim: int,
    stride: int,
    cos: int,
    sin: int,
    dim: int,
    interleaved: bool,
) -> None:
    """Turn the first `dim` channels of each head, in place."""

def sample(
    logits: int,
    rows: int,
    vocab_size: int,
    stride: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    seed: int,
    position: int,
    attempt: int,
    stream: int,
    live: int,
    with_entropy: bool,
    token: int,
    logprob: int,
    truncated_logprob: int,
    entropy: int,
    ok: int,
    undecided: int,
) -> None:
    """Draw a token of each live row (all if the address is 0), or say that it is undecided."""

def int8_linear(
    x: int, rows: int, inputs: int, layers: list[tuple[int, int, int, int]], out: int
) -> None:
    """Write the results of layers with 8-bit weights, side by side.

    A layer is its weight, scale and bias (an address, 0 for none), and its outputs; `x` is
    contiguous, with at most 65,536 inputs.
    """

@final
class Round:
    """The rows of a round of decode steps: which prefix each reads, where its new tokens go.

    Parameters
    ----------
    prefix : ndarray
        int32, slots of the groups' prefixes, one group after the other.
    prefix_begin : ndarray
        int64 ``[G + 1]``, where each begins in `prefix`.
    row_group : ndarray
        int32 ``[R]``, the group of each row; rows of a group are adjacent.
    slots : ndarray
        int32 ``[R, L]``, slots of each row's new tokens.
    """

    def __init__(
        self,
        prefix: npt.NDArray[np.int32],
        prefix_begin: npt.NDArray[np.int64],
        row_group: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
    ) -> None: ...
    def attend(
        self,
        step: int,
        query: int,
        key: int,
        value: int,
        out: int,
        k_pages: int,
        v_pages: int,
        sinks: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        query_stride: int,
        key_stride: int,
        value_stride: int,
        scaling: float,
        softcap: float,
        window: int,
        cos: int,
        sin: int,
        rotary_dim: int,
        interleaved: bool,
    ) -> None:
        """Turn queries and keys, store keys and values of token `step` of each row, and attend."""
