"""What a model says of tokens that another one has drawn, read in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stars_fast.models.logits import LogitHead
from stars_fast.models.paged import PagedModel
from stars_fast.ops.batch import RowBatch

#: Most bytes of the float32 logits of one block of steps.
_LOGIT_BYTES = 64 << 20


class RowsRead:
    """Rows of a round that a model has read; their keys and values are in its pages.

    Parameters
    ----------
    model
        Reads them.
    batch
        The rows; as many tokens of each as are read.
    first_token
        int64 ``[R]``, fed first.
    tokens
        int64 ``[R, L]``, drawn; all but a row's last are fed behind it.
    """

    def __init__(
        self,
        model: PagedModel,
        batch: RowBatch,
        first_token: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
    ) -> None:
        lengths = batch.new_lengths
        fed = np.concatenate((first_token[:, None], tokens), axis=1)
        fed = fed[:, : batch.max_new][np.arange(batch.max_new) < lengths[:, None]]
        ids = torch.from_numpy(np.ascontiguousarray(fed)).to(model.device)
        self._model = model
        # Ids that the model has no embedding for are of other requests, or padding.
        self._hidden = model.extend_all(batch, ids.clamp(max=model.vocab_size - 1))
        self._begins = np.cumsum(lengths, dtype=np.int64) - lengths
        self._last = lengths.astype(np.int64) - 1
        self._steps = batch.max_new

    def logits(self, head: LogitHead) -> Iterator[Tensor]:
        """Return the logits ``[R, V]`` of each step; behind a row's end those of its last."""
        rows = len(self._begins)
        block = max(1, _LOGIT_BYTES // (4 * rows * head.vocab_size))
        for begin in range(0, self._steps, block):
            steps = np.arange(begin, min(begin + block, self._steps))
            at = self._begins + np.minimum(steps[:, None], self._last)
            hidden = self._hidden.index_select(
                0, torch.from_numpy(at.reshape(-1)).to(self._hidden.device)
            )
            with self._model.on_backend():
                yield from head(hidden).view(len(steps), rows, -1)
