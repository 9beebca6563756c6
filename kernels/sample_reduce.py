"""First kernel of `sample`: one read of the logits, reduced to what the draw needs.

A row is cut into chunks, one program each, and a chunk into *mini-chunks* of 32 entries. Of every
mini-chunk a *bound* is kept, by which the second kernel finds the few that matter to the draw:

- its largest logit; or
- for rows without filters, in which any entry can be drawn, the largest *score* of its entries:
  a little more than scaled logit plus Gumbel noise, without a logarithm. The noise is -log(E) with
  E = -log1p(-u), and u <= E <= 16.64 u for every u that 32 bits give, so that -log2(u) exceeds the
  noise by at most log2(16.64) = 4.06. The bits of a float, read as an integer, are its logarithm
  to base 2 with a straight line between powers of two, too low by at most 0.09. So the winner's
  score is within 4.15 of the largest score, in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stars_fast.kernels.philox import philox4x32_10, token_counter

MINI = tl.constexpr(32)  # entries of a mini-chunk
MINIS = tl.constexpr(128)  # mini-chunks of a chunk
_SCORED = tl.constexpr(32)  # mini-chunks scored at once
PARTIALS = tl.constexpr(4)  # numbers kept of each chunk
LOG2_E = tl.constexpr(1.4426950408889634)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=["masked"])
def sample_reduce_kernel(  # type: ignore[no-untyped-def]
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
    bound_ptr,  # out, float32 [R, splits * MINIS]
    partial_ptr,  # out, float32 [R, PARTIALS, splits]
    vocab_size,
    splits,
):
    """Program (row, split): the bounds of a chunk, and of x - peak over it three sums.

    These are the sum of exponentials, the sum of values times exponentials, and the sum of
    exponentials divided by the temperature, which only rows that are drawn without top-k have.
    """
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    if tl.load(live_ptr + row, mask=masked != 0, other=1) == 0:
        return
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    mini = split * MINIS + tl.arange(0, MINIS)
    index = mini[:, None] * MINI + tl.arange(0, MINI)[None, :]
    row_ptr = logits_ptr + row.to(tl.int64) * logits_stride
    x = tl.load(row_ptr + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)

    bound = tl.max(x, axis=1)
    peak = tl.max(bound, axis=0)
    # NaN and +inf leave NaN in the sum of exponentials, whatever the maxima make of them.
    y = x - tl.where(peak == -float("inf"), 0.0, peak)
    e = tl.exp2(y * LOG2_E)  # cheaper than exp, which takes care of denormal results
    mass = tl.sum(e)
    moment = tl.sum(tl.maximum(y, -_LARGEST) * e)  # -inf counts as -inf * 0 = 0
    scaled_mass = mass
    scores = tl.full((), 0, tl.int32)  # whether the bounds are scores
    if (temperature != 0) & ((top_k <= 0) | (top_k >= vocab_size)):
        z = y * log2_scale(temperature)
        if temperature != 1:
            scaled_mass = tl.sum(tl.exp2(z))
        # A chunk whose peak overflows belongs to a greedy row, which needs its maxima.
        full = (tl.load(top_p_ptr + row) >= 1) & (tl.load(min_p_ptr + row) <= 0)
        full = full & (tl.abs(tl.div_rn(peak, temperature)) < float("inf"))
        scores = full.to(tl.int32)

    bounds_ptr = bound_ptr + row.to(tl.int64) * splits * MINIS
    if scores == 0:
        tl.store(bounds_ptr + mini, bound)
    else:
        counter = token_counter(seed_ptr, position_ptr, attempt_ptr, stream_ptr, row)
        # A few mini-chunks at a time, read again from the cache: the noise of all takes registers
        # that every other row would have to do without.
        for start in range(0, MINIS, _SCORED):
            some = split * MINIS + start + tl.arange(0, _SCORED)
            at = some[:, None] * MINI + tl.arange(0, MINI)[None, :]
            logit = tl.load(row_ptr + at, mask=at < vocab_size, other=-float("inf"))
            scaled = (logit.to(tl.float32) - peak) * log2_scale(temperature)
            tl.store(bounds_ptr + some, _largest_score(scaled, some, counter))

    partial = partial_ptr + row.to(tl.int64) * PARTIALS * splits + split
    tl.store(partial, peak)
    tl.store(partial + splits, mass)
    tl.store(partial + 2 * splits, moment)
    tl.store(partial + 3 * splits, scaled_mass)


@triton.jit
def _largest_score(z, mini, counter):  # type: ignore[no-untyped-def]
    """The largest score of each mini-chunk, of scaled logits ``[_SCORED, MINI]``."""
    c1, c2, c3, k0, k1 = counter
    block = mini[:, None] * (MINI // 4) + tl.arange(0, MINI // 4)[None, :]
    w0, w1, w2, w3 = philox4x32_10(block.to(tl.uint32), c1, c2, c3, k0, k1)
    even, odd = tl.split(tl.reshape(z, [_SCORED, MINI // 4, 2, 2]))
    z0, z2 = tl.split(even)
    z1, z3 = tl.split(odd)
    score = tl.maximum(
        tl.maximum(_score(z0, w0), _score(z1, w1)),
        tl.maximum(_score(z2, w2), _score(z3, w3)),
    )
    return tl.max(score, axis=1)


@triton.jit
def log2_scale(temperature):  # type: ignore[no-untyped-def]
    """What scales a difference of logits, in units of log 2; finite, as 0 must remain 0."""
    return tl.minimum((1.0 / temperature) * LOG2_E, _LARGEST)


@triton.jit
def _score(z, word):  # type: ignore[no-untyped-def]
    """Scaled logit plus a bound on its noise, in units of log 2, up to a constant."""
    bits = (word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    return z - bits.to(tl.float32) * 2.0**-23
