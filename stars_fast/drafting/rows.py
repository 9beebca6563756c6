"""The rows of a round on the device: their sampling parameters, and their tokens so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stars_fast import ops
from stars_fast.drafting.adjust import Adjustments, KnownTokens, Widths
from stars_fast.drafting.base import Draft, RowSampling
from stars_fast.drafting.grammar import GrammarRows
from stars_fast.drafting.plan_rows import RowPlan


@dataclass(frozen=True)
class RowParameters:
    """Sampling parameters of a round's rows, on the device, ``[R]`` each.

    Attributes
    ----------
    temperature, top_p, min_p, entropy_limit
        float32.
    top_k
        int32.
    seed, position, attempt, stream
        int64; `position` is that of the row's first new token in the response.
    lengths
        int64, tokens to draw.
    min_length
        int64, tokens to draw before `entropy_limit` or `segment_end` counts.
    segment_end
        int64, level of `segment_ends` that ends a segment; above all levels where none does.
    ranked
        int64, 1 where attempts are ranks, else 0.
    stop_ids
        int64 ``[R, S]``, padded with -1, which no token is.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    attempt: Tensor
    stream: Tensor
    lengths: Tensor
    entropy_limit: Tensor
    min_length: Tensor
    segment_end: Tensor
    ranked: Tensor
    stop_ids: Tensor

    @classmethod
    def empty(cls, rows: int, stop_ids: int, device: torch.device) -> RowParameters:
        """Rows of no tokens, for `write`."""

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        return cls(
            temperature=column(torch.float32),
            top_k=column(torch.int32),
            top_p=column(torch.float32).fill_(1.0),
            min_p=column(torch.float32),
            seed=column(torch.int64),
            position=column(torch.int64),
            attempt=column(torch.int64),
            stream=column(torch.int64),
            lengths=column(torch.int64),
            entropy_limit=column(torch.float32).fill_(math.inf),
            min_length=column(torch.int64),
            segment_end=column(torch.int64).fill_(_NO_END),
            ranked=column(torch.int64),
            stop_ids=torch.full((rows, stop_ids), -1, dtype=torch.int64, device=device),
        )

    def write(self, plan: RowPlan, sampling: Sequence[RowSampling]) -> None:
        """Store the rows of a round, in one transfer; rows past them get a length of 0."""
        width = len(_COLUMNS) + self.stop_ids.shape[1]
        table = np.zeros((self.lengths.shape[0], width), np.int64)
        table[:, len(_COLUMNS) :] = -1
        rows = len(sampling)
        values: dict[str, npt.NDArray[np.integer]] = {
            "temperature": _bits([s.temperature for s in sampling]),
            "top_k": np.array([s.top_k for s in sampling]),
            "top_p": _bits([max(s.top_p, _LEAST) for s in sampling]),
            "min_p": _bits([s.min_p for s in sampling]),
            "seed": plan.seed,
            "position": plan.position,
            "attempt": plan.attempt,
            "stream": plan.stream,
            "lengths": plan.draft.new_lengths,
            "entropy_limit": _bits([s.entropy_limit for s in sampling]),
            "min_length": np.array([s.min_length for s in sampling]),
            "segment_end": np.array([s.segment_end or _NO_END for s in sampling]),
            "ranked": np.array([s.ranks > 0 for s in sampling]),
        }
        for at, name in enumerate(_COLUMNS):
            table[:rows, at] = values[name]
        for row, s in enumerate(sampling):
            table[row, len(_COLUMNS) : len(_COLUMNS) + len(s.stop_token_ids)] = s.stop_token_ids
        moved = torch.from_numpy(table).to(self.lengths.device)
        for at, name in enumerate(_COLUMNS):
            column = moved[:, at]
            getattr(self, name).copy_(column.view(torch.float64) if name in _FLOATS else column)
        self.stop_ids.copy_(moved[:, len(_COLUMNS) :])


#: Columns of the table that `RowParameters.write` moves, and those of them that are float64 bits.
_COLUMNS = (
    "temperature", "top_k", "top_p", "min_p", "seed", "position", "attempt", "stream",
    "lengths", "entropy_limit", "min_length", "segment_end", "ranked",
)  # fmt: skip
_NO_END = 1 << 30
_LEAST = float(np.finfo(np.float32).tiny)  # smaller ones would be 0, and keep nothing
_FLOATS = frozenset({"temperature", "top_p", "min_p", "entropy_limit"})


def _bits(values: list[float]) -> npt.NDArray[np.int64]:
    return np.array(values, np.float64).view(np.int64)


@dataclass(frozen=True)
class StepNeeds:
    """What the steps of a round look at beside the draws.

    Attributes
    ----------
    ragged
        Rows may have an entropy limit.
    ranks
        Most likely tokens that rows may ask for, 0 if none does.
    ends_early
        Segments may end at clauses or sentences.
    adjusts
        Rows may change their logits.
    top
        Most likely tokens that are kept of each position.
    grammars
        Rows may have a grammar.
    """

    ragged: bool = False
    ranks: int = 0
    ends_early: bool = False
    adjusts: bool = False
    top: int = 0
    grammars: bool = False

    @classmethod
    def of(cls, plan: RowPlan, sampling: Sequence[RowSampling], vocab_size: int) -> StepNeeds:
        """What these rows need."""
        positions = plan.position.tolist()
        top = max(s.top_logprobs for s in sampling)
        return cls(
            ragged=any(s.ragged for s in sampling),
            ranks=most_ranks(sampling, vocab_size),
            ends_early=any(s.segment_end for s in sampling),
            adjusts=any(s.adjusts(at) for s, at in zip(sampling, positions, strict=True)),
            grammars=any(s.grammar is not None for s in sampling),
            top=min(vocab_size, next(most for most in _TOPS if top <= most)),
        )


#: Numbers of most likely tokens, so that few graphs are captured: OpenAI's limits.
_TOPS = (0, 5, 20)


class Progress:
    """Tokens that the rows of a round have drawn so far, on the device.

    Parameters
    ----------
    parameters
        Parameters of the rows.
    max_new
        L, columns of the results.
    needs
        What steps look at.
    segment_ends
        int64 ``[vocab]``, level of each token; None if no row ends early.
    widths
        Columns of the rows' adjustments, if they have any.
    known
        Tokens that can be drawn; None: all.
    vocab_size
        Logits of the model.
    share
        Overwrites a tensor with rank 0's, where several ranks draw the same.
    """

    def __init__(
        self,
        parameters: RowParameters,
        max_new: int,
        needs: StepNeeds,
        vocab_size: int,
        *,
        segment_ends: Tensor | None = None,
        widths: Widths | None = None,
        known: KnownTokens | None = None,
        share: Callable[[Tensor], None] | None = None,
    ) -> None:
        rows, device = parameters.lengths.shape[0], parameters.lengths.device
        self._parameters = parameters
        self._needs = needs
        self._segment_ends = segment_ends
        self._known = known
        self._share = share
        self.adjustments: Adjustments | None = None
        if needs.adjusts:
            assert widths is not None
            words = -(-(vocab_size if known is None else known.count) // 32)
            self.adjustments = Adjustments(
                rows, widths, max_new, words if needs.grammars else 0, device
            )

        def table(dtype: torch.dtype, *depth: int) -> Tensor:
            return torch.zeros((rows, max_new, *depth), dtype=dtype, device=device)

        self._tokens = table(torch.int64)
        self._logprobs = table(torch.float32)
        # Of ranked tokens, where adjustments make them others than the raw ones.
        adjusted = needs.ranks > 0 and (needs.adjusts or known is not None)
        self._adjusted_logprobs = table(torch.float32) if adjusted else None
        self._top_tokens = table(torch.int64, needs.top)
        self._top_logprobs = table(torch.float32, needs.top)
        self._ended_at = torch.zeros(rows, dtype=torch.int64, device=device)
        self._stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self._nan_step = torch.zeros(rows, dtype=torch.int64, device=device)
        self.live = torch.zeros(rows, dtype=torch.bool, device=device)
        self.begin()

    def begin(self) -> None:
        """Start a round, once the parameters are written."""
        self._ended_at.copy_(self._parameters.lengths)
        self._stopped.fill_(False)
        self._nan_step.fill_(-1)
        torch.gt(self._parameters.lengths, 0, out=self.live)

    def grammar_rows(self, sampling: Sequence[RowSampling]) -> GrammarRows | None:
        """Return the grammars of a round's rows, if it has any."""
        if self.adjustments is None or self.adjustments.allowed is None:
            return None
        return GrammarRows([s.grammar for s in sampling], self.adjustments.allowed)

    def draw(self, logits: Tensor, step: Tensor) -> Tensor:
        """Draw the next token of every row that has not ended.

        Parameters
        ----------
        logits
            ``[R, vocab]``.
        step
            int64 ``[R]``, the number of tokens drawn before, the same for every row.

        Returns
        -------
        Tensor
            int64 ``[R]``, the tokens; 0 where a row has ended.
        """
        p = self._parameters
        needs = self._needs
        raw, logits = logits, self.to_draw_from(logits, step)
        token: Tensor
        token, logprob, _, entropy, ok = ops.sample(
            logits,
            p.temperature,
            p.top_k,
            p.top_p,
            p.min_p,
            p.seed,
            p.position + step,
            p.attempt,
            p.stream,
            self.live,
            with_entropy=needs.ragged and logits is raw,
        )
        if needs.ranks:
            likely, its_logprob = likely_tokens(logits, p.attempt, needs.ranks)
            by_rank = (p.ranked > 0) & self.live & ok
            token = torch.where(by_rank, likely, token)
            logprob = torch.where(by_rank, its_logprob, logprob)
        adjusted = logprob
        if needs.top or logits is not raw:
            named = token.unsqueeze(1)
            if needs.top:
                named = torch.cat((named, ops.top_tokens(raw, needs.top)), dim=1)
            named_logprobs, raw_entropy, raw_ok = ops.token_logprobs(raw, named, needs.ragged)
            if logits is not raw:
                logprob, entropy, ok = named_logprobs[:, 0], raw_entropy, ok & raw_ok
            at = step.view(-1, 1, 1).expand(-1, 1, needs.top)
            self._top_tokens.scatter_(1, at, named[:, 1:].unsqueeze(1))
            self._top_logprobs.scatter_(1, at, named_logprobs[:, 1:].unsqueeze(1))
        if self._share is not None:
            drawn = torch.stack((token, *map(_float_bits, (logprob, entropy, adjusted)), ok.long()))
            self._share(drawn)
            token, ok = drawn[0], drawn[4].bool()
            logprob, entropy, adjusted = (x.int().view(torch.float32) for x in drawn[1:4])
        if needs.ragged:
            # The token just drawn is the next segment's, which draws it again.
            ends = self.live & (step >= p.min_length) & (entropy >= p.entropy_limit)
            self._ended_at.copy_(torch.where(ends, step, self._ended_at))
            self.live &= ~ends
        if self.adjustments is not None:
            self.adjustments.record(token, step)
        column = step.unsqueeze(1)
        self._tokens.scatter_(1, column, token.unsqueeze(1))
        self._logprobs.scatter_(1, column, logprob.unsqueeze(1))
        if self._adjusted_logprobs is not None:
            self._adjusted_logprobs.scatter_(1, column, adjusted.unsqueeze(1))
        bad = ~ok & (self._nan_step < 0)
        self._nan_step.copy_(torch.where(bad, step, self._nan_step))
        stops = self.live & (token.unsqueeze(1) == p.stop_ids).any(dim=1)
        self._stopped |= stops
        if self._segment_ends is not None:
            at_end = (self._segment_ends[token] >= p.segment_end) & (step + 1 >= p.min_length)
            stops |= self.live & at_end  # ends the segment, not the response
        self._ended_at.copy_(torch.where(stops, step + 1, self._ended_at))
        torch.gt(self._ended_at, step + 1, out=self.live)
        return token

    def to_draw_from(self, logits: Tensor, step: Tensor) -> Tensor:
        """Return the logits as rows draw from them; themselves, if they are the raw ones."""
        mask = None
        if self._known is not None:
            logits, mask = logits[:, : self._known.count], self._known.mask
        if self.adjustments is not None:
            p = self._parameters
            return self.adjustments.apply(logits, p.position, step, p.stop_ids, mask)
        return logits if mask is None else logits.masked_fill(~mask, -torch.inf)

    def read(self, rows: int, steps: int, ran: int | None = None) -> Draft:
        """Return the first `rows` rows and `steps` columns, in one transfer; `ran`: steps run."""
        top = self._needs.top
        ran = steps if ran is None else ran

        def floats(table: Tensor) -> Tensor:
            return table[:rows, :steps].reshape(rows, -1).view(torch.int32)

        parts = [
            self._tokens[:rows, :steps].to(torch.int32),  # ids are below 2**31
            floats(self._logprobs),
            self._ended_at[:rows, None].to(torch.int32),
            self._stopped[:rows, None].to(torch.int32),
            self._nan_step[:rows, None].to(torch.int32),
        ]
        if top:
            parts += [
                self._top_tokens[:rows, :steps].reshape(rows, -1).to(torch.int32),
                floats(self._top_logprobs),
            ]
        if self._adjusted_logprobs is not None:
            parts.append(floats(self._adjusted_logprobs))
        host = _to_host(torch.cat(parts, dim=1)).numpy()
        ends = np.cumsum([part.shape[1] for part in parts])[:-1]
        tokens, logprobs, lengths, stopped, nan_step, *more = np.split(host, ends, axis=1)

        def as_floats(values: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
            return np.ascontiguousarray(values).view(np.float32)

        adjusted = None if self._adjusted_logprobs is None else as_floats(more[-1])
        unfinished = None
        if ran is not None and ran < steps:
            unfinished = lengths[:, 0] > ran
            lengths = lengths.clip(max=ran)
        return Draft(
            tokens=tokens.astype(np.int64),
            lengths=np.ascontiguousarray(lengths[:, 0]),
            unfinished=unfinished,
            stopped=stopped[:, 0].astype(np.bool_),
            logprobs=as_floats(logprobs),
            nan_step=nan_step[:, 0].astype(np.int64),
            steps=ran,
            row_steps=rows * ran,
            adjusted_logprobs=adjusted,
            top_tokens=more[0].astype(np.int64).reshape(rows, steps, top) if top else None,
            top_logprobs=as_floats(more[1]).reshape(rows, steps, top) if top else None,
        )


def most_stop_ids(sampling: Sequence[RowSampling]) -> int:
    """Return the width that the rows' stop tokens need, at least 1."""
    return max(1, *(len(s.stop_token_ids) for s in sampling))


def most_ranks(sampling: Sequence[RowSampling], vocab_size: int) -> int:
    """Return how many of the most likely tokens the rows need, a power of two, or 0."""
    most = max(s.ranks for s in sampling)
    return min(vocab_size, 1 << (most - 1).bit_length()) if most else 0


def likely_tokens(logits: Tensor, rank: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Return each row's token of a rank, and its raw log-probability.

    Parameters
    ----------
    logits
        ``[R, vocab]``.
    rank
        int64 ``[R]``, 0 for the most likely token; clamped to `ranks` - 1.
    ranks
        At most vocab.

    Returns
    -------
    tuple[Tensor, Tensor]
        int64 ``[R]`` and float32 ``[R]``.
    """
    log_p = logits.float().log_softmax(dim=-1)
    values, tokens = log_p.topk(ranks, dim=-1)
    at = rank.clamp(max=ranks - 1).unsqueeze(1)
    return tokens.gather(1, at).squeeze(1), values.gather(1, at).squeeze(1)


def _float_bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).long()


def _to_host(packed: Tensor) -> Tensor:
    """Copy to the host through pinned memory, where that is a matter."""
    if packed.device.type != "cuda":
        return packed
    host: Tensor = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return host
