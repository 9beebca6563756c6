"""Operators on tensors: sampling and what goes with it, page copies, KV appends, paged attention.

Each is one ``torch.library`` custom operator, namespace ``stars_fast``: PyTorch code here, which
is the oracle, and a Triton kernel in `stars_fast.kernels`, which runs on CUDA devices; see
`stars_fast.ops.backend`.
"""

from stars_fast.ops.adjust import adjust_logits
from stars_fast.ops.attention import AttentionOptions, paged_attention
from stars_fast.ops.backend import backend
from stars_fast.ops.batch import RowBatch
from stars_fast.ops.guidance import guide_logits
from stars_fast.ops.pages import copy_pages, kv_append
from stars_fast.ops.philox import philox4x32
from stars_fast.ops.sample import sample
from stars_fast.ops.token_logprobs import token_logprobs
from stars_fast.ops.top_tokens import top_tokens

__all__ = [
    "AttentionOptions",
    "RowBatch",
    "adjust_logits",
    "backend",
    "copy_pages",
    "guide_logits",
    "kv_append",
    "paged_attention",
    "philox4x32",
    "sample",
    "token_logprobs",
    "top_tokens",
]
