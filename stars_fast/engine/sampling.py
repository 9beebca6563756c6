"""What a request's rows are drawn with, from its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from stars_fast.drafting import segment_ends
from stars_fast.drafting.base import RowSampling
from stars_fast.params import StarsParams
from stars_fast.rewards.base import Prompt

_SEGMENT_ENDS = {
    "length": segment_ends.NONE,
    "clause": segment_ends.CLAUSE,
    "sentence": segment_ends.SENTENCE,
    "step": segment_ends.NONE,  # of a text, not of a token: the round cuts there
}


def row_sampling(
    params: StarsParams,
    stop_token_ids: tuple[int, ...],
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> RowSampling:
    """Return it without what belongs to one response: its counts, its tokens and its grammar."""
    return RowSampling(
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        stop_token_ids,
        entropy_limit=params.entropy_threshold if params.kind.by_entropy else math.inf,
        segment_end=_SEGMENT_ENDS[params.segment_end],
        min_length=params.min_segment_length,
        ranks=params.most_attempts if params.kind.ranked else 0,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple((params.logit_bias or {}).items()),
        bad_words=bad_words,
        min_tokens=params.min_tokens,
        top_logprobs=params.top_logprobs,
        guide_weight=params.guide_weight,
        draft_attempts=params.draft_attempts,
        compares=params.kind.tilts,
        verifies=params.kind.draft == "tokens",
    )


def continued(sampling: RowSampling, drawn: Sequence[int]) -> RowSampling:
    """Return it for a row that has drawn tokens of its segment in earlier rounds."""
    counts = sampling.counts
    if counts is not None:
        counts = dict(counts)
        for token in drawn:
            counts[token] = counts.get(token, 0) + 1
    grammar = sampling.grammar
    if grammar is not None:
        grammar = grammar.fork()
        grammar.advance(drawn)
    return replace(
        sampling,
        min_length=max(0, sampling.min_length - len(drawn)),
        counts=counts,
        drawn=[*sampling.drawn, *drawn] if sampling.bad_words else (),
        grammar=grammar,
    )


def counts_of(params: StarsParams, prompt: Prompt) -> dict[int, int] | None:
    """Return what the penalties have to count before the response begins; see `RowSampling`."""
    if params.repetition_penalty != 1:
        return dict.fromkeys(prompt.token_ids, 0)
    return {} if params.presence_penalty or params.frequency_penalty else None
