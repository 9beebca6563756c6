"""The Triton kernels on pages of one's own: write, fork, attend. No GPU: Triton's interpreter."""

import os

import torch
from torch.nn.functional import scaled_dot_product_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from stars_fast.core import SequenceCache  # noqa: E402
from stars_fast.kernels import copy_pages, kv_append, paged_attention, pool_table  # noqa: E402
from stars_fast.ops import AttentionOptions  # noqa: E402

PREFIX, FORKS, NEW, HEADS, KV_HEADS, DIM = 21, 3, 4, 4, 2, 32
torch.manual_seed(0)
tokens, heads = PREFIX + FORKS * NEW, (HEADS, KV_HEADS, KV_HEADS)
query, key, value = (torch.randn(tokens, count, DIM, device=device) for count in heads)
pages = [torch.zeros(16, 8, KV_HEADS, DIM, device=device) for _ in range(2)]
cache = SequenceCache(num_pages=16, page_size=8)
cache.open(0)
prompt = cache.branch([0], [1], [0], list(range(PREFIX)), [PREFIX])
kv_append(*pages, key[:PREFIX], value[:PREFIX], torch.tensor(prompt.slots[0], device=device))
cache.promote(1, PREFIX)
rows = cache.branch([0] * FORKS, [1, 2, 3], [PREFIX] * FORKS, [0] * (FORKS * NEW), [NEW] * FORKS)
copies = [torch.tensor(column, device=device) for column in cache.take_copies()]
copy_pages(pool_table(pages), *copies)  # of the last page, which the prefix fills in part
new = torch.tensor(rows.slots, device=device).flatten()
kv_append(*pages, key[PREFIX:], value[PREFIX:], new)
options = AttentionOptions(scaling=DIM**-0.5)
found = paged_attention(query[PREFIX:], *pages, rows, rows.new_lengths, options)
found = found.view(FORKS, NEW, HEADS, DIM)
for fork in range(FORKS):
    seen = [*range(PREFIX), *range(PREFIX + fork * NEW, PREFIX + (fork + 1) * NEW)]
    q, k, v = (x[seen].transpose(0, 1)[None] for x in (query, key, value))
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found[fork], want[0, :, PREFIX:].transpose(0, 1), rtol=0, atol=1e-2)
    print(f"candidate {fork} has the attention that torch computes")
