"""Draw one token per row: temperature, top-k, top-p and min-p, then a Gumbel-max draw.

Terms. *Scaled* logits are logits / temperature. The *raw* distribution is the softmax of the
untouched logits, the *truncated* one the softmax of the scaled logits that the filters keep; the
token is drawn from the truncated distribution as the arg max of kept scaled logits plus Gumbel
noise (`stars_fast.ops.philox`), which needs no normalisation.

Every row is computed by a route that its own parameters choose, and by sums whose order its
neighbours cannot change, so a row's result is a function of the row alone. On a CPU, C++ draws a
row unless rounding could make it another token than the code here draws (`csrc/cpu/sample.h`).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from stars_fast.ops import cpu
from stars_fast.ops.backend import uses_triton
from stars_fast.ops.philox import token_noise, token_noise_all

_CHUNK = 32  # entries per chunk of the two-level top-k and of the sums of entropies
_BLOCK = 1 << 21  # logits worked on at a time: what lies between stays near the caches


@torch.library.custom_op("stars_fast::sample", mutates_args=())
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    attempt: Tensor,
    stream: Tensor,
    live: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw one token per row.

    The filters apply in the order temperature, top_k, top_p, min_p with the tie rules of
    transformers' warpers: top-k keeps every entry equal to the k-th; top-p removes from the low
    end of a stable ascending sort, so of equal entries the highest index stays longest; at least
    one entry is kept.

    Parameters
    ----------
    logits : Tensor
        float32, bfloat16 or float16 ``[R, V]``; not changed.
    temperature : Tensor
        float32 ``[R]``, >= 0; 0 takes the arg max, the lowest index of equal entries.
    top_k : Tensor
        int32 ``[R]``, >= 0; 0 is off.
    top_p : Tensor
        float32 ``[R]``, in (0, 1]; 1 is off.
    min_p : Tensor
        float32 ``[R]``, in [0, 1]; 0 is off.
    seed : Tensor
        int64 ``[R]``, the bit pattern of each row's unsigned 64-bit seed.
    position, attempt, stream : Tensor
        int32 or int64 ``[R]``, position in the response, attempt of the segment, and stream: with
        `seed`, all that the noise depends on. No two draws that both count may share all four. A
        loop that draws each position once passes zeros; one that rejects numbers its attempts,
        and takes another stream, the number of the segment, for what it goes on with.
    live : Tensor, optional
        bool ``[R]``; nothing of a row that is not live is read, and its results are token 0, three
        times 0.0, and true.
    with_entropy : bool
        Whether `entropy` is wanted: in PyTorch it takes longer than the draw.

    Returns
    -------
    token : Tensor
        int64 ``[R]``.
    logprob : Tensor
        float32 ``[R]``, log-probability of `token` under the raw distribution.
    truncated_logprob : Tensor
        float32 ``[R]``, under the truncated distribution (0 at temperature 0).
    entropy : Tensor
        float32 ``[R]``, of the raw distribution, in nats; CARDS (arXiv 2406.16306) ends segments
        where it is high. Unspecified without `with_entropy`.
    ok : Tensor
        bool ``[R]``, false where the row holds a NaN, +inf or nothing but -inf; its token is then
        0, its log-probabilities and its entropy are NaN.
    """
    arguments = (logits, temperature, top_k, top_p, min_p, seed, position, attempt, stream)
    if uses_triton(logits.device):
        from stars_fast.kernels import sample as kernel

        return kernel(*arguments, live)
    if cpu.on_vectors(logits.device):
        results, live = _sample_on_vectors(arguments, live, with_entropy=with_entropy)
        if not bool(live.any()):
            return results
    elif live is None or bool(live.all()):
        return _sample_all(arguments, with_entropy=with_entropy)
    else:
        results = _nothing_drawn(logits)
    rows = live.nonzero().squeeze(1)
    drawn = _sample_all(tuple(x[rows] for x in arguments), with_entropy=with_entropy)
    for result, part in zip(results, drawn, strict=True):
        result[rows] = part
    return results


def _sample_on_vectors(
    arguments: tuple[Tensor, ...], live: Tensor | None, *, with_entropy: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Draw what C++ can decide; returns the results, and the rows that it leaves, bool ``[R]``."""
    logits, *columns = arguments
    results = _nothing_drawn(logits)
    draw = functools.partial(cpu.sample, with_entropy=with_entropy)
    if logits.dtype == torch.float32:
        return results, draw(logits, columns, live, results)
    undecided = torch.zeros_like(results[-1])
    block = max(1, _BLOCK // logits.shape[1])
    for first in range(0, len(logits), block):
        part = slice(first, first + block)
        undecided[part] = draw(
            logits[part].to(torch.float32),
            [x[part] for x in columns],
            None if live is None else live[part],
            [x[part] for x in results],
        )
    return results, undecided


def _nothing_drawn(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of rows that are not live."""
    rows, device = logits.shape[0], logits.device
    token = torch.zeros(rows, dtype=torch.int64, device=device)
    numbers = [torch.zeros(rows, device=device) for _ in range(3)]
    ok = torch.ones(rows, dtype=torch.bool, device=device)
    return token, numbers[0], numbers[1], numbers[2], ok


def _sample_all(
    arguments: tuple[Tensor, ...], *, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw rows that are all live, a block of them at a time."""
    rows, vocab_size = arguments[0].shape
    block = max(1, _BLOCK // vocab_size)
    parts = [
        _sample_block(*(x[first : first + block] for x in arguments), with_entropy=with_entropy)
        for first in range(0, max(1, rows), block)
    ]
    if len(parts) == 1:
        return parts[0]
    token, logprob, truncated_logprob, entropy, ok = map(torch.cat, zip(*parts, strict=True))
    return token, logprob, truncated_logprob, entropy, ok


def _sample_block(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    attempt: Tensor,
    stream: Tensor,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = logits.to(torch.float32)
    peak = logits.amax(dim=-1)  # NaN if any entry is, so one test covers NaN, +inf and all -inf
    ok = torch.isfinite(peak)
    every_ok = bool(ok.all())
    if not every_ok:
        logits = torch.where(ok.unsqueeze(1), logits, 0.0)
        peak = torch.where(ok, peak, 0.0)

    token = torch.empty_like(seed)
    truncated_logprob = torch.empty_like(peak)
    # A temperature so small that the division overflows leaves nothing but the arg max either.
    greedy = (temperature == 0) | ~torch.isfinite(peak / temperature)
    by_top_k = ~greedy & (top_k > 0)
    by_top_p = ~greedy & ~by_top_k & (top_p < 1)
    routes = ((greedy, "greedy"), (by_top_k, "top_k"), (by_top_p, "top_p"))
    for chosen, route in (*routes, (~(greedy | by_top_k | by_top_p), "full")):
        if not bool(chosen.any()):
            continue
        rows = slice(None) if bool(chosen.all()) else chosen.nonzero().squeeze(1)
        part = logits[rows]
        if route == "greedy":
            token[rows] = part.argmax(dim=-1)
            truncated_logprob[rows] = 0.0
            continue
        scaled = part / temperature[rows].unsqueeze(1)
        draw = (seed[rows], position[rows], attempt[rows], stream[rows])
        if route == "full":
            drawn, log_p = _draw_full(scaled, min_p[rows], *draw)
        else:
            width = scaled.shape[1]
            limit = top_k[rows].clamp(max=width) if route == "top_k" else None
            drawn, log_p = _draw_sorted(scaled, limit, top_p[rows], min_p[rows], *draw)
        token[rows] = drawn
        truncated_logprob[rows] = log_p

    # log_softmax reduces each row on its own, in an order that the number of rows cannot change.
    log_p = logits.log_softmax(dim=-1)
    logprob = log_p.gather(1, token.unsqueeze(1)).squeeze(1)
    entropy = entropy_of(log_p) if with_entropy else torch.zeros_like(logprob)
    if not every_ok:
        token = torch.where(ok, token, 0)
        logprob = torch.where(ok, logprob, torch.nan)
        truncated_logprob = torch.where(ok, truncated_logprob, torch.nan)
        entropy = torch.where(ok, entropy, torch.nan)
    return token, logprob, truncated_logprob, entropy, ok


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy ``[R]`` of distributions ``[R, V]`` given by their logarithms, which it overwrites.

    In two steps, because PyTorch splits a long sum over threads if it is the only one.
    """
    p = log_p.exp()
    terms = log_p.clamp_(min=torch.finfo(log_p.dtype).min).mul_(p)  # -inf * 0 counts as 0
    chunks = -(-terms.shape[1] // _CHUNK)
    terms = F.pad(terms, (0, -terms.shape[1] % _CHUNK)).view(len(terms), chunks, _CHUNK)
    return terms.sum(dim=-1).sum(dim=-1).neg_()


@sample.register_fake
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    attempt: Tensor,
    stream: Tensor,
    live: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
    )


def _draw_full(
    scaled: Tensor, min_p: Tensor, seed: Tensor, position: Tensor, attempt: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw rows that have neither top-k nor top-p: noise over the vocabulary, no sort."""
    if bool((min_p > 0).any()):
        # In float64, as where entries are sorted.
        relative = (scaled - scaled.amax(dim=-1, keepdim=True)).to(torch.float64).exp_()
        removed = relative < min_p.to(torch.float64).unsqueeze(1)
        scaled = scaled.masked_fill(removed, -torch.inf)
    noise = token_noise_all(seed, position, attempt, stream, scaled.shape[1])
    token = noise.add_(scaled).argmax(dim=-1)
    log_p = scaled.log_softmax(dim=-1).gather(1, token.unsqueeze(1)).squeeze(1)
    return token, log_p


def _draw_sorted(
    scaled: Tensor,
    top_k: Tensor | None,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    attempt: Tensor,
    stream: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw rows with top-k or top-p: sort what may be kept, noise for those entries only.

    The entries that each filter keeps are a prefix of the descending order, and the sums over it
    are running sums, so the width of the sorted part, which the batch decides, changes nothing.
    """
    values, index = _largest(scaled, top_k)
    if top_k is not None and bool((top_p < 1).any()):
        order = index.argsort(dim=-1)
        values, index = _sort_for_top_p(values.gather(1, order), index.gather(1, order))

    weight = (values - values[:, :1]).to(torch.float64).exp_()  # relative to the most probable
    running = weight.cumsum(dim=-1)
    # Descending form of "remove while the ascending cumulative probability <= 1 - top_p".
    before = running - weight
    keep = before < (top_p.to(torch.float64) * running[:, -1]).unsqueeze(1)
    keep |= (top_p >= 1).unsqueeze(1)
    keep &= weight >= min_p.to(torch.float64).unsqueeze(1)
    keep &= values > -torch.inf
    counts = keep.sum(dim=-1, keepdim=True)
    kept_mass = running.gather(1, counts - 1).squeeze(1)
    width = int(counts.max())  # noise for no more than that
    values, index, keep = values[:, :width], index[:, :width], keep[:, :width]

    noisy = values + token_noise(seed, position, attempt, stream, index)
    noisy.masked_fill_(~keep, -torch.inf)
    # The lowest vocabulary index of equal maxima, as an arg max over the vocabulary would take.
    best = noisy == noisy.amax(dim=-1, keepdim=True)
    token, at = torch.where(best, index, scaled.shape[1]).min(dim=-1)
    log_p = weight.gather(1, at.unsqueeze(1)).squeeze(1).log_() - kept_mass.log_()
    return token, log_p.to(torch.float32)


def _largest(scaled: Tensor, top_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The top-k entries of each row, ties with the k-th included, in descending order.

    Parameters
    ----------
    scaled : Tensor
        float32 ``[R, V]``.
    top_k : Tensor or None
        int32 ``[R]`` in [1, V]; None sorts everything, equal entries by descending index.

    Returns
    -------
    values : Tensor
        float32 ``[R, W]``; -inf past a row's own count.
    index : Tensor
        int64 ``[R, W]``.
    """
    if top_k is None:
        return _sort_for_top_p(scaled)
    width = int(top_k.max())
    last = (top_k.to(torch.int64) - 1).unsqueeze(1)
    values, index, rest = _topk(scaled, width)
    threshold = values.gather(1, last).clamp_(min=torch.finfo(scaled.dtype).min)  # never -inf
    if bool((rest >= threshold).any()):  # entries equal to the k-th were left out
        width = int((scaled >= threshold).sum(dim=-1).max())
        values, index = scaled.topk(width, dim=-1)
    return values.masked_fill(values < threshold, -torch.inf), index


def _sort_for_top_p(values: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return values ``[R, W]`` in descending order and their indices, columns if not given.

    It is the reverse of a stable ascending sort: of equal values the last column comes first.
    """
    values, order = values.sort(dim=-1, stable=True)
    values, order = values.flip(-1), order.flip(-1)
    return values, order if index is None else index.gather(1, order)


def _topk(scaled: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.topk`, and ``[R, 1]`` a bound that no entry left out exceeds.

    Over a large vocabulary in two levels: the `width` largest entries lie in the `width` chunks
    with the largest maxima, so that only those chunks are searched entry by entry.
    """
    rows, vocab_size = scaled.shape
    chunks = -(-vocab_size // _CHUNK)
    if chunks <= 2 * width:
        padded = F.pad(scaled, (0, 1), value=-torch.inf)  # for width == vocab_size
        values, index = padded.topk(width + 1, dim=-1)
        return values[:, :width], index[:, :width], values[:, width:]
    padded = scaled
    if vocab_size % _CHUNK:
        padded = F.pad(scaled, (0, -vocab_size % _CHUNK), value=-torch.inf)
    by_chunk = padded.reshape(rows * chunks, _CHUNK)
    maxima, chunk = by_chunk.amax(dim=-1).view(rows, chunks).topk(width + 1, dim=-1)
    first = torch.arange(rows, device=scaled.device).unsqueeze(1) * chunks
    part = by_chunk.index_select(0, (chunk[:, :width] + first).flatten())
    values, at = part.view(rows, width * _CHUNK).topk(width + 1, dim=-1)
    at = at[:, :width]
    index = chunk.gather(1, at // _CHUNK) * _CHUNK + at % _CHUNK
    return values[:, :width], index, torch.maximum(values[:, width:], maxima[:, width:])
