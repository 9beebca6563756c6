"""Several heads on one backbone, which runs once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stars_fast.rewards.kinds import Loaded
from stars_fast.rewards.reading import LastToken

__all__ = ["shared"]


def shared(loaded: Sequence[Loaded]) -> Loaded:
    """Return one model whose values are lists, a number for each of several heads.

    Parameters
    ----------
    loaded : sequence of Loaded
        One model with each head; a causal one is read at its last token. A single one is returned
        as it is.
    """
    first = loaded[0]
    if len(loaded) == 1:
        return first
    assert all(one.model is first.model for one in loaded)
    if first.readout is not None:
        readouts = [one.readout for one in loaded if one.readout is not None]

        def readout(logits: Tensor) -> Tensor:
            return torch.stack([read(logits) for read in readouts], dim=1)

        return Loaded(first.model, readout=readout)
    makers = [one.reading for one in loaded if one.reading is not None]

    def reading(tokenizer: PreTrainedTokenizerBase) -> LastToken:
        readings = [make(tokenizer) for make in makers]
        heads = [one.head for one in readings if type(one) is LastToken]
        pads = [one._pad for one in readings if type(one) is LastToken]
        assert len(heads) == len(readings)
        assert len(set(pads)) == 1

        def head(hidden: Tensor) -> Tensor:
            return torch.stack([apply(hidden) for apply in heads], dim=1)

        return LastToken(head, pads[0])

    return Loaded(first.model, reading=reading)
