"""A language model and others beside it, on pages of one numbering."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from stars_fast.models.paged import PagedModel
from stars_fast.ops.batch import BatchLike

if TYPE_CHECKING:
    from stars_fast.models.images import ImageRows


class Lockstep:
    """What rounds ask of a language model on pages, done by it and by those beside it alike.

    All have as many pages of the same size, so that one scheduler's page tables, forks and copies
    are those of every one of them.

    Parameters
    ----------
    lm : PagedModel
        The language model.
    beside : tuple of PagedModel
        On the device of `lm`.
    """

    def __init__(self, lm: PagedModel, beside: tuple[PagedModel, ...]) -> None:
        if any(
            (one.num_pages, one.page_size, one.device) != (lm.num_pages, lm.page_size, lm.device)
            for one in beside
        ):
            raise ValueError("models beside another must have its pages and device")
        self.lm = lm
        #: Those that have pages of their own, in the order given.
        self.beside = beside

    @property
    def model(self) -> PreTrainedModel:
        """The language model itself."""
        return self.lm.model

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.lm.device

    @property
    def copied_bytes(self) -> int:
        """Bytes moved by page copies so far."""
        return sum(one.copied_bytes for one in (self.lm, *self.beside))

    @property
    def max_length(self) -> int | None:
        """The shortest context in tokens; None where none has a limit."""
        known = [one.max_length for one in (self.lm, *self.beside)]
        return min((length for length in known if length is not None), default=None)

    def copy_pages(
        self, src: NDArray[np.int32], dst: NDArray[np.int32], count: NDArray[np.int32]
    ) -> None:
        """Copy pages of every model; see `PagedModel.copy_pages`."""
        for one in (self.lm, *self.beside):
            one.copy_pages(src, dst, count)

    def prefill(self, batch: BatchLike, input_ids: Tensor, images: ImageRows | None = None) -> None:
        """Run prompts in every model, since any request may come to share their pages.

        Where those beside see no pictures, requests that have some do not ask them.
        """
        self.lm.prefill(batch, input_ids, images)
        for number, one in enumerate(self.beside):
            if images is None:
                one.prefill(batch, self.read_by(one, input_ids))
            elif images.num_models > 1:
                one.prefill(batch, input_ids, images.beside(number))
            else:  # a picture's ids are beyond every vocabulary
                one.prefill(batch, input_ids.clamp(max=one.vocab_size - 1))

    def read_by(self, other: PagedModel, input_ids: Tensor) -> Tensor:
        """Return ids that a model can read: what it has no embedding for becomes its last token.

        Such ids are padding of another's vocabulary, or of a request that does not run the model.
        """
        if other.vocab_size >= self.lm.vocab_size:
            return input_ids
        return input_ids.clamp(max=other.vocab_size - 1)
