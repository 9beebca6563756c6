"""Triton kernels, each beside the launcher that checks its arguments.

The PyTorch form of each operator, in `stars_fast.ops`, is the oracle of its kernel's tests.
Launchers run on the current stream of the current CUDA device, which must be that of their
tensors, and never wait for it: any of them may be captured in a CUDA graph. With
``TRITON_INTERPRET=1`` in the environment they run on the CPU.
"""

# From a checkout's root transformers finds this folder under the name of another package,
# `kernels`, and imports it to see its version.
if __name__ != "kernels":
    from stars_fast.kernels.adjust import adjust_named
    from stars_fast.kernels.attention import attention, paged_attention
    from stars_fast.kernels.attention_plan import AttentionPlan, PlanCapacity
    from stars_fast.kernels.guidance import guide_logits
    from stars_fast.kernels.pages import PoolTable, copy_pages, kv_append, pool_table
    from stars_fast.kernels.philox import philox4x32
    from stars_fast.kernels.sample import sample
    from stars_fast.kernels.token_logprobs import token_logprobs
    from stars_fast.kernels.top_tokens import top_tokens

__all__ = [
    "AttentionPlan",
    "PlanCapacity",
    "PoolTable",
    "adjust_named",
    "attention",
    "copy_pages",
    "guide_logits",
    "kv_append",
    "paged_attention",
    "philox4x32",
    "pool_table",
    "sample",
    "token_logprobs",
    "top_tokens",
]
