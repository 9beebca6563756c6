"""The whole distribution of a draw against what `sample` says of the token that it drew."""

from __future__ import annotations

import pytest
import torch

from stars_fast import ops
from stars_fast.ops.truncate import truncated_logprobs


@pytest.mark.parametrize("ties", [False, True])
def test_as_sample_has_it(ties: bool) -> None:
    rows, vocab_size = 240, 61
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn((rows, vocab_size), generator=generator) * 2
    if ties:
        logits = logits.round()

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        index = torch.randint(len(values), (rows,), generator=generator)
        return torch.tensor(values, dtype=dtype)[index]

    filters = (
        column([0.0, 0.5, 1.0, 1.7]),
        column([0, 0, 1, 5, 40, 100], torch.int32),
        column([1.0, 0.9, 0.3]),
        column([0.0, 0.05, 0.4]),
    )
    zeros = torch.zeros(rows, dtype=torch.int64)
    token, _, logprob, _, _ = ops.sample(logits, *filters, torch.arange(rows), *[zeros] * 3)
    found = truncated_logprobs(logits, *filters)
    assert torch.allclose(found.exp().sum(-1), torch.ones(rows, dtype=torch.float64))
    own = found.gather(1, token.unsqueeze(1)).squeeze(1)
    assert torch.allclose(own.float(), logprob, atol=1e-5)


def test_bad_logits_are_nan_in_their_own_row() -> None:
    logits = torch.zeros((4, 5))
    logits[0, 2], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    ones = torch.ones(4)
    found = truncated_logprobs(logits, ones, torch.zeros(4, dtype=torch.int32), ones, 0 * ones)
    assert found.isnan().any(-1).tolist() == [True, True, True, False]
