"""Device code of `stars_fast.kernels.attention`.

Scores are kept in base 2 (``exp2`` is one instruction), as is every log-sum-exp. Softmax is the
online one of FlashAttention-2, arXiv 2307.08691, section 3.1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stars_fast.kernels.rounding import INTERPRETED, rounded

LOG2E = tl.constexpr(1.4426950408889634)
# The running maximum starts finite, so that masked scores, -inf, never meet another -inf.
_NO_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))  # in (0, 1]: no overflow on either side
    y = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -y, y)


@triton.jit
def _load_block(  # type: ignore[no-untyped-def]
    base,
    slot,
    valid,
    dtype: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E4M3_BITS: tl.constexpr,
):
    """Keys or values ``[BLOCK_N, BLOCK_D]`` of some slots and one KV head, in `dtype`."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if BLOCK_D != DIM:
        mask = mask & (d < DIM)[None, :]
    x = tl.load(base + slot[:, None] * SLOT_STRIDE + d[None, :], mask=mask, other=0.0)
    if E4M3_BITS:
        # A byte's exponent and mantissa fit float16's; the exponents' biases differ by 8.
        wide = x.to(tl.int16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        x = bits.to(tl.float16, bitcast=True) * 256.0
    return x.to(dtype)


@triton.jit
def _prefix_pages(  # type: ignore[no-untyped-def]
    table, at_key, end, padding, gap, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Pages of a block of a prefix's keys, and the keys' places in the prefix; 0 past its end."""
    position = at_key + tl.arange(0, BLOCK_N)
    place = position + tl.where(position >= padding, gap, 0)
    return tl.load(table + place // PAGE_SIZE, mask=position < end, other=0), place


@triton.jit
def _own_slots(  # type: ignore[no-untyped-def]
    slots_ptr,
    slots_stride,
    row_query_ptr,
    query_own_ptr,
    at_key,
    first_row,
    end_row,
    width,
    span,
    shift,
    BLOCK_N: tl.constexpr,
):
    """Slots of a block of the rows' own keys; 0, on the null page, where there is no key."""
    n = tl.arange(0, BLOCK_N)
    key_row = first_row + at_key // width + (n >> shift)
    j = at_key % width + (n & (span - 1))
    valid = (key_row < end_row) & (j < slots_stride)
    # Slots past a row's last query may be unwritten, and those past its end are null.
    last = tl.load(row_query_ptr + key_row, mask=valid, other=0)
    valid = valid & (j <= tl.load(query_own_ptr + last, mask=valid, other=-1))
    return tl.load(slots_ptr + key_row.to(tl.int64) * slots_stride + j, mask=valid, other=0)


@triton.jit
def _attend_block(  # type: ignore[no-untyped-def]
    query,
    k_base,
    v_base,
    slot,
    valid,
    seen,
    score_scale,
    cap,
    top,
    total,
    acc,
    dtype: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    E4M3_BITS: tl.constexpr,
):
    """Add a block of keys to the running maximum, sum of weights and weighted sum of values."""
    key = _load_block(k_base, slot, valid, dtype, KEY_STRIDE, KEY_DIM, BLOCK_DK, E4M3_BITS)
    if INTERPRETED:
        key = key.to(tl.float32)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * score_scale
    if SOFTCAP:
        score = cap * _tanh(score)
    score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weight, 1)
    value = _load_block(v_base, slot, valid, dtype, VALUE_STRIDE, VALUE_DIM, BLOCK_DV, E4M3_BITS)
    weight = rounded(weight, dtype)
    if INTERPRETED:
        weight = weight.to(tl.float32)
        value = value.to(tl.float32)
    acc = tl.dot(weight, value, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    query_ptr,  # [T, heads, KEY_DIM], last stride 1
    k_ptr,  # [pages, PAGE_SIZE, KV_HEADS, KEY_DIM], contiguous
    v_ptr,  # [pages, PAGE_SIZE, KV_HEADS, VALUE_DIM], contiguous
    out_ptr,  # [T, heads, VALUE_DIM], contiguous
    partial_ptr,  # float32 [partials, heads, VALUE_DIM]
    lse_ptr,  # float32 [partials, heads]
    items_ptr,  # int32 [W, 8]
    num_items_ptr,  # int32 [1]
    group_pages_ptr,  # int32, all page tables
    page_offset_ptr,  # int32 [G], where each group's table begins
    padding_start_ptr,  # int32 [G]
    padding_end_ptr,  # int32 [G]
    row_start_ptr,  # int32 [R]
    row_query_ptr,  # int32 [R]
    slots_ptr,  # int64 [R, slots_stride]
    query_row_ptr,  # int32 [T]
    query_own_ptr,  # int32 [T]
    sinks_ptr,  # [heads] or unused
    k_scale_ptr,  # float32 [KV_HEADS] or unused
    v_scale_ptr,  # float32 [KV_HEADS] or unused
    query_stride,
    head_stride,
    slots_stride,
    score_scale,
    cap,
    window,
    PAGE_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    TILE_QUERIES: tl.constexpr,  # of a full tile of the plan
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    E4M3_BITS: tl.constexpr,
):
    """Each program takes every P-th (item, part of its queries, KV head, chunk of its heads)."""
    HEADS: tl.constexpr = KV_HEADS * HEADS_PER_KV
    CHUNK: tl.constexpr = min(HEADS_PER_KV, BLOCK_M)
    CHUNKS: tl.constexpr = (HEADS_PER_KV + CHUNK - 1) // CHUNK
    BLOCK_Q: tl.constexpr = BLOCK_M // CHUNK
    PARTS: tl.constexpr = (TILE_QUERIES + BLOCK_Q - 1) // BLOCK_Q
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    n = tl.arange(0, BLOCK_N)
    dk = tl.arange(0, BLOCK_DK)
    dv = tl.arange(0, BLOCK_DV)
    work = tl.load(num_items_ptr) * (PARTS * KV_HEADS * CHUNKS)
    for w in range(tl.program_id(0), work, tl.num_programs(0)):
        item = items_ptr + w // (PARTS * KV_HEADS * CHUNKS) * 8
        kv_head = w // CHUNKS % KV_HEADS
        group = tl.load(item)
        first_query = tl.load(item + 1)
        num_queries = tl.load(item + 2)
        first_row = tl.load(item + 3)
        end_row = tl.load(item + 4)
        begin = tl.load(item + 5)
        end = tl.load(item + 6)
        partial = tl.load(item + 7)
        if PARTS > 1:
            done = w // (KV_HEADS * CHUNKS) % PARTS * BLOCK_Q
            first_query += done
            num_queries -= done
            partial = tl.where(partial >= 0, partial + done, -1)
            end = tl.where(num_queries > 0, end, begin)
            end_row = tl.where(num_queries > 0, end_row, first_row)

        m = tl.arange(0, BLOCK_M)
        chunk_head = w % CHUNKS * CHUNK + m % CHUNK
        live = (m // CHUNK < tl.minimum(num_queries, BLOCK_Q)) & (chunk_head < HEADS_PER_KV)
        head = kv_head * HEADS_PER_KV + chunk_head
        packed = first_query + m // CHUNK
        row = tl.load(query_row_ptr + packed, mask=live, other=-1)
        own = tl.load(query_own_ptr + packed, mask=live, other=0)
        longest = tl.max(own) + 1
        shortest = tl.min(tl.where(live, own, longest))
        start = tl.load(row_start_ptr + first_row)

        mask = live[:, None]
        if BLOCK_DK != KEY_DIM:
            mask = mask & (dk < KEY_DIM)[None, :]
        at = packed.to(tl.int64) * query_stride + head.to(tl.int64) * head_stride
        query = tl.load(query_ptr + at[:, None] + dk[None, :], mask=mask, other=0.0)
        if INTERPRETED:
            query = query.to(tl.float32)
        k_base = k_ptr + kv_head * KEY_DIM
        v_base = v_ptr + kv_head * VALUE_DIM
        scale = score_scale
        if SCALED:
            scale = score_scale * tl.load(k_scale_ptr + kv_head)
        top = tl.full([BLOCK_M], _NO_SCORE, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

        # Both loops keep neither a second accumulator nor what is cheap to work out again: without
        # these options registers spill (Blackwell; 64 rows before Hopper).
        # The prefix: every query sees all of it, but for the window.
        table = group_pages_ptr + tl.load(page_offset_ptr + group)
        padding = tl.load(padding_start_ptr + group)
        gap = tl.load(padding_end_ptr + group) - padding
        low = begin
        if WINDOWED:
            unseen = tl.maximum(start + shortest - window + 1 - begin, 0)
            low = begin + unseen // BLOCK_N * BLOCK_N
        # Pages are read a block ahead: what Triton's pipeline holds is then keys and values alone.
        page, place = _prefix_pages(table, low, end, padding, gap, PAGE_SIZE, BLOCK_N)
        for at_key in tl.range(
            low, end, BLOCK_N, disallow_acc_multi_buffer=True, disable_licm=True
        ):
            slot = page.to(tl.int64) * PAGE_SIZE + place % PAGE_SIZE
            page, place = _prefix_pages(
                table, at_key + BLOCK_N, end, padding, gap, PAGE_SIZE, BLOCK_N
            )
            position = at_key + n
            valid = position < end
            seen = valid[None, :]
            if WINDOWED:
                seen = seen & (position[None, :] > (start + own - window)[:, None])
            top, total, acc = _attend_block(
                query, k_base, v_base, slot, valid, seen, scale, cap, top, total, acc, dtype,
                KV_HEADS * KEY_DIM, KV_HEADS * VALUE_DIM, KEY_DIM, VALUE_DIM, BLOCK_DK, BLOCK_DV,
                SOFTCAP, E4M3_BITS,
            )  # fmt: skip

        # The rows' own tokens, each row's from a multiple of a power of two: where a row stands in
        # its tile then changes neither which keys share a block nor the order of their sums.
        rows = end_row - first_row
        span = 1  # of one row in a block, 1 << shift
        shift = 0
        for _ in tl.static_range(7):
            doubles = (span < longest) & (span < BLOCK_N)
            span = tl.where(doubles, span * 2, span)
            shift = tl.where(doubles, shift + 1, shift)
        width = (longest + span - 1) // span * span
        # A query sees these of all the tile's own tokens, counted from its first row's first.
        newest = (row - first_row) * width + own
        oldest = newest - own
        if WINDOWED:
            oldest += tl.maximum(own - window + 1, 0)
        low = 0
        if WINDOWED:
            unseen = tl.maximum(shortest - window + 1, 0)
            low = tl.where(rows == 1, unseen // BLOCK_N * BLOCK_N, 0)
        own_slot = _own_slots(
            slots_ptr, slots_stride, row_query_ptr, query_own_ptr, low, first_row, end_row, width,
            span, shift, BLOCK_N,
        )  # fmt: skip
        for at_key in tl.range(
            low, rows * width, BLOCK_N, disallow_acc_multi_buffer=True, disable_licm=True
        ):
            slot = own_slot
            own_slot = _own_slots(
                slots_ptr, slots_stride, row_query_ptr, query_own_ptr, at_key + BLOCK_N, first_row,
                end_row, width, span, shift, BLOCK_N,
            )  # fmt: skip
            valid = slot >= PAGE_SIZE
            column = (at_key + n)[None, :]
            seen = (column >= oldest[:, None]) & (column <= newest[:, None])
            top, total, acc = _attend_block(
                query, k_base, v_base, slot, valid, seen, scale, cap, top, total, acc, dtype,
                KV_HEADS * KEY_DIM, KV_HEADS * VALUE_DIM, KEY_DIM, VALUE_DIM, BLOCK_DK, BLOCK_DV,
                SOFTCAP, E4M3_BITS,
            )  # fmt: skip

        # Recomputed, from an m that only we know to be the same: the registers that would
        # hold it through the loops are needed there.
        m = tl.arange(0, BLOCK_M) + tl.minimum(tl.load(item + 2), 0)
        chunk_head = w % CHUNKS * CHUNK + m % CHUNK
        live = (m // CHUNK < tl.minimum(num_queries, BLOCK_Q)) & (chunk_head < HEADS_PER_KV)
        head = kv_head * HEADS_PER_KV + chunk_head
        mask = live[:, None]
        if BLOCK_DV != VALUE_DIM:
            mask = mask & (dv < VALUE_DIM)[None, :]
        if SCALED:
            acc *= tl.load(v_scale_ptr + kv_head)
        if partial >= 0:
            some = total > 0
            norm = tl.where(some, total, 1.0)
            lse = tl.where(some, top + tl.log2(norm), float("-inf"))
            to = (partial + m // CHUNK).to(tl.int64) * HEADS + head
            tl.store(lse_ptr + to, lse, mask=live)
            # The merge reads no partial that saw nothing.
            element = to[:, None] * VALUE_DIM + dv[None, :]
            tl.store(partial_ptr + element, acc * (1.0 / norm)[:, None], mask=mask & some[:, None])
        else:
            if SINKS:
                sink = tl.load(sinks_ptr + head, mask=live, other=0).to(tl.float32) * LOG2E
                new_top = tl.maximum(top, sink)
                decay = tl.exp2(top - new_top)
                total = total * decay + tl.exp2(sink - new_top)
                acc *= decay[:, None]
            norm = tl.where(total > 0, total, 1.0)
            to = (first_query + m // CHUNK).to(tl.int64) * HEADS + head
            element = to[:, None] * VALUE_DIM + dv[None, :]
            result = rounded(acc * (1.0 / norm)[:, None], dtype)
            tl.store(out_ptr + element, result, mask=mask)


@triton.jit(do_not_specialize=["own_lse_stride"])
def merge_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # float32 [partials, HEADS, VALUE_DIM]
    lse_ptr,  # float32 [partials, HEADS]
    out_ptr,  # [T, HEADS, VALUE_DIM], contiguous
    merges_ptr,  # int32 [X, 4]
    num_merges_ptr,  # int32 [1]
    sinks_ptr,  # [HEADS] or unused
    own_ptr,  # [T, HEADS, VALUE_DIM], contiguous, or unused
    own_lse_ptr,  # float32 [HEADS, own_lse_stride], natural, or unused
    own_lse_stride,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SINKS: tl.constexpr,
    OWN: tl.constexpr,
):
    """Each program takes every P-th (query, head) and weighs its partials by log-sum-exp.

    With OWN, there is one part more.
    """
    d = tl.arange(0, BLOCK_DV)
    work = tl.load(num_merges_ptr) * HEADS
    for w in range(tl.program_id(0), work, tl.num_programs(0)):
        entry = merges_ptr + w // HEADS * 4
        head = w % HEADS
        query = tl.load(entry)
        first = tl.load(entry + 1)
        count = tl.load(entry + 2)
        stride = tl.load(entry + 3)
        top = _NO_SCORE
        if SINKS:
            top = tl.maximum(top, tl.load(sinks_ptr + head).to(tl.float32) * LOG2E)
        total = 0.0
        acc = tl.zeros([BLOCK_DV], tl.float32)
        for at_split in range(0, count, BLOCK_S):
            split = at_split + tl.arange(0, BLOCK_S)
            at = (first + split * stride).to(tl.int64) * HEADS + head
            lse = tl.load(lse_ptr + at, mask=split < count, other=float("-inf"))
            mask = (lse > float("-inf"))[:, None] & (d < VALUE_DIM)[None, :]
            at = at[:, None] * VALUE_DIM + d[None, :]
            partial = tl.load(partial_ptr + at, mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(lse, 0))
            decay = tl.exp2(top - new_top)
            weight = tl.exp2(lse - new_top)
            total = total * decay + tl.sum(weight, 0)
            acc = acc * decay + tl.sum(weight[:, None] * partial, 0)
            top = new_top
        if SINKS:
            total += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E - top)
        to = (query.to(tl.int64) * HEADS + head) * VALUE_DIM + d
        if OWN:
            own = tl.load(own_lse_ptr + head.to(tl.int64) * own_lse_stride + query) * LOG2E
            new_top = tl.maximum(top, own)
            decay = tl.exp2(top - new_top)
            weight = tl.exp2(own - new_top)
            part = tl.load(own_ptr + to, mask=d < VALUE_DIM, other=0.0).to(tl.float32)
            total = total * decay + weight
            acc = acc * decay + weight * part
        total = tl.where(total > 0, total, 1.0)
        result = rounded(acc / total, out_ptr.dtype.element_ty)
        tl.store(out_ptr + to, result, mask=d < VALUE_DIM)
