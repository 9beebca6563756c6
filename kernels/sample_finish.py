"""Second kernel of `sample`: from the bounds of a row's mini-chunks to its token.

The filters need the largest entries of a row only, and those lie in the mini-chunks with the
largest bounds. One program per row

1. finds a threshold that every entry which may be kept reaches, and the mini-chunks that reach it;
2. lists the entries of those mini-chunks that reach it;
3. cuts the list by top-k, then by top-p;
4. adds the noise to what is left, less what min-p removes, and takes the arg max.

Floats are compared as integers of the same order (`order_of`), an entry as its value followed by
its index (`_entry_of`), so that bisection is over integers: it ends after as many steps as they
have bits, and it is exact. Probabilities are summed as integers too, in units of 2**-44 of the
most probable entry's, so that no sum depends on an order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stars_fast.kernels.philox import philox4x32_10, token_counter
from stars_fast.kernels.sample_reduce import LOG2_E, MINI, MINIS, PARTIALS, log2_scale

MAX_SPLITS = tl.constexpr(64)  # a power of two
CAPACITY = tl.constexpr(2048)  # entries of the list; a row with more is read again instead
_TILE = tl.constexpr(256)  # entries handled at once
_WIDE = tl.constexpr(512)  # the same where there are more of them
_INDEX_BITS = tl.constexpr(18)
_HIGHEST_INDEX = tl.constexpr((1 << 18) - 1)
_UNIT = tl.constexpr(2.0**44)  # V * _UNIT <= 2**62
_LOWEST = tl.constexpr(-2139095040)  # `order_of` the lowest finite float32; -inf is one less
_NO_ENTRY = tl.constexpr((-2139095040 << 18) - 1)  # below every finite entry, its value is -inf
_SCORE_EXCESS = tl.constexpr(4.2)  # > log2(16.64) + 0.0861, see `sample_reduce`
_FIRST_GUESS = tl.constexpr(64)  # mini-chunks that most often hold what top-p keeps


@triton.jit(do_not_specialize=["masked"])
def sample_finish_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [R, V]
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    attempt_ptr,
    stream_ptr,
    live_ptr,
    masked,  # 0: there is no mask, live_ptr is not read
    bound_ptr,  # float32 [R, splits * MINIS]; then int32, in the order of entries
    partial_ptr,  # float32 [R, PARTIALS, splits]
    mini_ptr,  # scratch, int32 [R, splits * MINIS], the mini-chunks that are looked into
    list_ptr,  # scratch, int64 [R, CAPACITY], the entries that may be kept
    token_ptr,  # out, int64 [R]
    logprob_ptr,  # out, float32 [R], as are the next two
    truncated_logprob_ptr,
    entropy_ptr,
    ok_ptr,  # out, bool [R]
    vocab_size,
    splits,
):
    """Program (row): token, log-probabilities, entropy and whether there was a distribution."""
    row = tl.program_id(0)
    if tl.load(live_ptr + row, mask=masked != 0, other=1) == 0:
        tl.store(token_ptr + row, 0)
        tl.store(logprob_ptr + row, 0.0)
        tl.store(truncated_logprob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(ok_ptr + row, True)
        return

    split = tl.arange(0, MAX_SPLITS)
    inside = split < splits
    partial = partial_ptr + row.to(tl.int64) * PARTIALS * splits
    peaks = tl.load(partial + split, mask=inside, other=-float("inf"))
    peak, mass, entropy, ok = summed(peaks, partial, splits)
    if ok == 0:
        tl.store(token_ptr + row, 0)
        tl.store(logprob_ptr + row, float("nan"))
        tl.store(truncated_logprob_ptr + row, float("nan"))
        tl.store(entropy_ptr + row, float("nan"))
        tl.store(ok_ptr + row, False)
        return

    log_mass = tl.log(mass)
    tl.store(entropy_ptr + row, entropy)
    tl.store(ok_ptr + row, True)

    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    bounds_ptr = bound_ptr + row.to(tl.int64) * splits * MINIS
    temperature = tl.load(temperature_ptr + row)
    scaled_peak = tl.div_rn(peak, tl.where(temperature == 0, 1.0, temperature))
    if (temperature != 0) & (tl.abs(scaled_peak) < float("inf")):
        scaled_masses = tl.load(partial + 3 * splits + split, mask=inside, other=0)
        below = peaks.to(tl.float64) - peak
        scaled_mass = tl.sum(tl.exp(below / temperature) * scaled_masses, axis=0)
        token, log_kept = _draw(
            row_ptr,
            temperature,
            tl.load(top_k_ptr + row),
            tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row),
            token_counter(seed_ptr, position_ptr, attempt_ptr, stream_ptr, row),
            bounds_ptr,
            partial,
            mini_ptr + row.to(tl.int64) * splits * MINIS,
            list_ptr + row.to(tl.int64) * CAPACITY,
            peak,
            scaled_peak,
            scaled_mass,
            vocab_size,
            splits,
        )
        value = tl.load(row_ptr + token).to(tl.float32)
        truncated = (tl.div_rn(value, temperature) - scaled_peak).to(tl.float64) - log_kept
    else:  # temperature 0, or one so small that nothing but the arg max is left
        first = tl.min(tl.where(peaks == peak, split, splits), axis=0) * MINIS
        at = first + tl.arange(0, MINIS)
        mini = tl.min(tl.where(tl.load(bounds_ptr + at) == peak, at, splits * MINIS), axis=0)
        index = mini * MINI + tl.arange(0, MINI)
        x = tl.load(row_ptr + index, mask=index < vocab_size, other=-float("inf"))
        token = tl.min(tl.where(x.to(tl.float32) == peak, index, vocab_size), axis=0)
        value = peak
        truncated = log_mass * 0.0
    tl.store(token_ptr + row, token)
    tl.store(truncated_logprob_ptr + row, truncated)
    tl.store(logprob_ptr + row, (value.to(tl.float64) - peak) - log_mass)


@triton.jit
def summed(peaks, partial, splits):  # type: ignore[no-untyped-def]
    """A row's peak, its float64 mass relative to that, its entropy, and 1 if it is a distribution.

    `peaks` are the first of the row's partial numbers, ``[MAX_SPLITS]``.
    """
    split = tl.arange(0, MAX_SPLITS)
    inside = split < splits
    masses = tl.load(partial + splits + split, mask=inside, other=0)
    is_nan = masses != masses  # noqa: PLR0124 - Triton has no isnan
    peak = tl.max(tl.where(is_nan, -float("inf"), peaks), axis=0)
    bad = (tl.max(is_nan.to(tl.int32), axis=0) != 0) | (peak == -float("inf"))
    peak = tl.where(bad, 0.0, peak)
    moments = tl.load(partial + 2 * splits + split, mask=inside, other=0).to(tl.float64)
    below = peaks.to(tl.float64) - peak  # log of a chunk's share, so that 0 * -inf must be 0
    share = tl.exp(below)
    mass = tl.where(bad, 1.0, tl.sum(share * masses, axis=0))
    shifted = moments + tl.where(below > -float("inf"), below, 0.0) * masses
    entropy = tl.log(mass) - tl.sum(share * shifted, axis=0) / mass
    return peak, mass, entropy, tl.where(bad, 0, 1)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    row_ptr,
    temperature,
    top_k,
    top_p,
    min_p,
    counter,  # of `token_counter`
    bounds_ptr,
    peaks_ptr,
    minis_ptr,
    list_ptr,
    peak,
    scaled_peak,
    scaled_mass,
    vocab_size,
    splits,
):
    """A row's token, and the log of the kept mass relative to the most probable entry's."""
    by_top_k = (top_k > 0) & (top_k < vocab_size)
    by_top_p = top_p < 1
    by_min_p = min_p > 0
    full = (by_top_k | by_top_p | by_min_p) == 0
    log_min_p = tl.log(tl.where(by_min_p, min_p, 1.0).to(tl.float64))
    log_min_p = tl.where(by_min_p, log_min_p, -float("inf"))
    slack = 0.01 + tl.abs(scaled_peak) * 2.0**-20  # more than rounding moves a scaled logit

    orders_ptr = bounds_ptr.to(tl.pointer_type(tl.int32))
    least = tl.full((_WIDE,), 0x7FFFFFFF, tl.int32)
    most = tl.full((_WIDE,), _LOWEST, tl.int32)
    for start in range(0, splits * MINIS, _WIDE):
        at = start + tl.arange(0, _WIDE)
        inside = at < splits * MINIS
        bound = tl.load(bounds_ptr + at, mask=inside, other=-float("inf"))
        if full:
            chunk_peak = tl.load(peaks_ptr + at // MINIS, mask=inside, other=-float("inf"))
            bound += (chunk_peak - peak) * log2_scale(temperature)
        else:
            bound = tl.div_rn(bound, temperature)
        order = order_of(bound)
        least = tl.minimum(least, tl.where(order < _LOWEST, 0x7FFFFFFF, order))  # no -inf
        most = tl.maximum(most, order)
        tl.store(orders_ptr + at, order, mask=inside)
    bounds = (orders_ptr, splits * MINIS)
    lowest = tl.min(least, axis=0)
    highest = tl.max(most, axis=0)
    if full:
        floor = order_of(_float_of(highest) - _SCORE_EXCESS - slack * LOG2_E)
    else:
        floor = order_of((scaled_peak + log_min_p - slack).to(tl.float32))
    floor = tl.maximum(floor, _LOWEST)

    minis = tl.full((), 0, tl.int32)
    found = tl.full((), 0, tl.int32)
    target = _part(top_p, scaled_mass * _UNIT)
    wanted = tl.where(by_top_k, top_k, _FIRST_GUESS)
    searching = tl.full((), 1, tl.int32)
    while searching != 0:
        tl.debug_barrier()  # what was stored is seen, an earlier listing is over
        if by_top_k | by_top_p:
            floor = _floor_of(bounds, wanted, lowest, highest)
        minis = _choose_minis(bounds, floor, minis_ptr)
        tl.debug_barrier()
        if full:
            floor = tl.full((), _LOWEST, tl.int32)  # each of their entries is in the race
        row = (row_ptr, minis_ptr, list_ptr, vocab_size, temperature, floor)
        found, reached = _list(row, minis, scaled_peak)
        # Top-p alone: what reaches the floor may weigh too little. Four times as many then.
        short = by_top_p & (by_top_k == 0) & (reached < target) & (floor > _LOWEST)
        searching = short.to(tl.int32)
        wanted = wanted * 4
    tl.debug_barrier()

    listed = found <= CAPACITY
    row = (row_ptr, minis_ptr, list_ptr, vocab_size, temperature, floor)
    entries = (row, listed, tl.where(listed, found, minis * MINI))
    cut = floor.to(tl.int64) << _INDEX_BITS
    end = (order_of(scaled_peak).to(tl.int64) << _INDEX_BITS) | _HIGHEST_INDEX
    if by_top_k & (found > top_k):
        cut = _cut(entries, top_k.to(tl.int64), cut, end, scaled_peak, True)
    if by_top_p:
        if by_top_k:
            target = _part(top_p, _mass_from(entries, cut, scaled_peak).to(tl.float64))
        cut = _cut(entries, target, cut, end, scaled_peak, False)
    token, kept = _race(entries, cut, log_min_p, counter, scaled_peak)
    log_kept = tl.log(tl.where(full, scaled_mass, kept.to(tl.float64) / _UNIT))
    return token, log_kept


@triton.jit
def order_of(x):  # type: ignore[no-untyped-def]
    """Float32 as int32 of the same order; 0.0 and -0.0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_of(order):  # type: ignore[no-untyped-def]
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _entry_of(x, index):  # type: ignore[no-untyped-def]
    """A value and its index in one int64: by value, and of equal values by index."""
    return (order_of(x).to(tl.int64) << _INDEX_BITS) | index


@triton.jit
def _value_of(entry):  # type: ignore[no-untyped-def]
    return _float_of((entry >> _INDEX_BITS).to(tl.int32))


@triton.jit
def _weight_of(entry, scaled_peak):  # type: ignore[no-untyped-def]
    """Probability relative to the most probable entry, in units of 1 / _UNIT."""
    return (tl.exp(_value_of(entry) - scaled_peak) * _UNIT).to(tl.int64)


@triton.jit
def _part(top_p, mass):  # type: ignore[no-untyped-def]
    """The least whole mass that is top_p of a float64 mass."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * mass), 1.0).to(tl.int64)


@triton.jit
def _floor_of(bounds, wanted, lowest, highest):  # type: ignore[no-untyped-def]
    """A floor that at least `wanted` bounds reach, and few more; the lowest if there are none.

    `wanted` mini-chunks with an entry that reaches the floor are `wanted` such entries: the
    `wanted` largest entries of the row all reach it.
    """
    enough = wanted + tl.maximum(wanted // 2, 16)
    low = lowest.to(tl.int64)
    high = highest.to(tl.int64) + 1
    count = _count_from(bounds, lowest)
    if count < wanted:
        low = tl.full((), _LOWEST, tl.int64)
    while (count > enough) & (high - low > 1):
        middle = (low + high) >> 1
        reach = _count_from(bounds, middle.to(tl.int32))
        if reach >= wanted:
            low = middle
            count = reach
        else:
            high = middle
    return low.to(tl.int32)


@triton.jit
def _count_from(bounds, floor):  # type: ignore[no-untyped-def]
    """The number of bounds that reach the floor."""
    orders_ptr, number = bounds
    count = tl.zeros((_WIDE,), tl.int32)
    for start in range(0, number, _WIDE):
        at = start + tl.arange(0, _WIDE)
        order = tl.load(orders_ptr + at, mask=at < number, other=_LOWEST - 1)
        count += (order >= floor).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _choose_minis(bounds, floor, minis_ptr):  # type: ignore[no-untyped-def]
    """Note the mini-chunks whose bounds reach the floor; their number."""
    orders_ptr, number = bounds
    minis = tl.full((), 0, tl.int32)
    for start in range(0, number, _WIDE):
        at = start + tl.arange(0, _WIDE)
        order = tl.load(orders_ptr + at, mask=at < number, other=_LOWEST - 1)
        reaches = (order >= floor).to(tl.int32)
        tl.store(minis_ptr + minis + tl.cumsum(reaches, axis=0) - 1, at, mask=reaches != 0)
        minis += tl.sum(reaches, axis=0)
    return minis


@triton.jit
def _read(row, at, count):  # type: ignore[no-untyped-def]
    """Entries `at` of the mini-chunks looked into; _NO_ENTRY for those below the floor."""
    row_ptr, minis_ptr, _, vocab_size, temperature, floor = row
    mini = tl.load(minis_ptr + at // MINI, mask=at < count, other=0)
    index = mini * MINI + at % MINI
    inside = (at < count) & (index < vocab_size)
    x = tl.load(row_ptr + index, mask=inside, other=-float("inf")).to(tl.float32)
    entry = _entry_of(tl.div_rn(x, temperature), index)
    return tl.where(inside & (entry >= floor.to(tl.int64) << _INDEX_BITS), entry, _NO_ENTRY)


@triton.jit
def _list(row, minis, scaled_peak):  # type: ignore[no-untyped-def]
    """List the entries that reach the floor, as far as there is room; their number and mass."""
    list_ptr = row[2]
    found = tl.full((), 0, tl.int32)
    mass = tl.zeros((_WIDE,), tl.int64)
    for start in range(0, minis * MINI, _WIDE):
        entry = _read(row, start + tl.arange(0, _WIDE), minis * MINI)
        reaches = (entry > _NO_ENTRY).to(tl.int32)
        slot = found + tl.cumsum(reaches, axis=0) - 1
        tl.store(list_ptr + slot, entry, mask=(reaches != 0) & (slot < CAPACITY))
        found += tl.sum(reaches, axis=0)
        mass += _weight_of(entry, scaled_peak)
    return found, tl.sum(mass, axis=0)


@triton.jit
def _tile(entries, start):  # type: ignore[no-untyped-def]
    """The entries from `start` on, of the list where it holds them all."""
    row, listed, count = entries
    at = start + tl.arange(0, _TILE)
    if listed:
        entry = tl.load(row[2] + at, mask=at < count, other=_NO_ENTRY)
    else:
        entry = _read(row, at, count)
    return entry


@triton.jit
def _mass_from(entries, cut, scaled_peak):  # type: ignore[no-untyped-def]
    """Mass of the entries that reach the cut."""
    mass = tl.zeros((_TILE,), tl.int64)
    for start in range(0, entries[2], _TILE):
        entry = _tile(entries, start)
        mass += tl.where(entry >= cut, _weight_of(entry, scaled_peak), 0)
    return tl.sum(mass, axis=0)


@triton.jit
def _cut(entries, target, low, high, scaled_peak, BY_VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The highest entry in [low, high] such that those from it on sum up to `target`, else `low`.

    By value, each counts for 1 and equal values stand or fall together; else by its mass and
    alone. Every step halves the interval, and moves its end to an entry.
    """
    while low < high:
        middle = (low + high + 1) >> 1
        total = tl.zeros((_TILE,), tl.int64)
        above = tl.full((_TILE,), 0, tl.int64) + high
        below = tl.full((_TILE,), 0, tl.int64) + low
        for start in range(0, entries[2], _TILE):
            entry = _tile(entries, start)
            if BY_VALUE:
                entry = (entry >> _INDEX_BITS) << _INDEX_BITS
                weight = tl.full((_TILE,), 1, tl.int64)
            else:
                weight = _weight_of(entry, scaled_peak)
            reaches = entry >= middle
            total += tl.where(reaches, weight, 0)
            above = tl.where(reaches, tl.minimum(above, entry), above)
            below = tl.where(reaches, below, tl.maximum(below, entry))
        if tl.sum(total, axis=0) >= target:
            low = tl.min(above, axis=0)
        else:
            high = tl.max(below, axis=0)
    return low


@triton.jit
def _race(entries, cut, log_min_p, counter, scaled_peak):  # type: ignore[no-untyped-def]
    """The arg max of value plus noise over what is kept, and the mass of that.

    Of equal maxima the lowest index.
    """
    c1, c2, c3, k0, k1 = counter
    best = tl.full((_TILE,), -float("inf"), tl.float32)
    token = tl.full((_TILE,), 0, tl.int32)
    mass = tl.zeros((_TILE,), tl.int64)
    for start in range(0, entries[2], _TILE):
        entry = _tile(entries, start)
        value = _value_of(entry)
        index = (entry & _HIGHEST_INDEX).to(tl.int32)
        kept = (entry >= cut) & ((value - scaled_peak).to(tl.float64) >= log_min_p)
        mass += tl.where(kept, _weight_of(entry, scaled_peak), 0)
        w0, w1, w2, w3 = philox4x32_10((index >> 2).to(tl.uint32), c1, c2, c3, k0, k1)
        word = tl.where(
            index % 2 == 0, tl.where(index % 4 == 0, w0, w2), tl.where(index % 4 == 1, w1, w3)
        )
        noisy = tl.where(kept, value + gumbel_from_word(word), -float("inf"))
        better = (noisy > best) | ((noisy == best) & (index < token))
        best = tl.where(better, noisy, best)
        token = tl.where(better, index, token)
    first = tl.where(best == tl.max(best, axis=0), token, _HIGHEST_INDEX)
    return tl.min(first, axis=0), tl.sum(mass, axis=0)


@triton.jit
def gumbel_from_word(word):  # type: ignore[no-untyped-def]
    """Standard Gumbel variates from uint32 words, as `stars_fast.ops.philox.gumbel_from_words`.

    E = -log1p(-u) by way of v = 1 - u, whose rounding error u / (1 - v) takes back: small E keeps
    all its digits.
    """
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    v = 1.0 - u
    rounded_off = v == 1.0
    exponential = tl.where(
        rounded_off, u, -tl.log(v) * tl.div_rn(u, tl.where(rounded_off, 1.0, 1.0 - v))
    )
    return -tl.log(exponential)
