"""The pages of causal reward models, as the user asked for them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from stars_fast.config import Attention, Backend, KvDtype
from stars_fast.distributed import Ranks
from stars_fast.models.lora import LoraLayers
from stars_fast.models.paged import PagedModel
from stars_fast.models.pool import default_num_pages

__all__ = ["RM_POOL_SHARE", "RewardPool"]

#: Of the free memory on a GPU, once the language model's pool is there.
RM_POOL_SHARE = 0.6


@dataclass(frozen=True)
class RewardPool:
    """Options for the pages of a causal reward model; `load_scorer` describes them."""

    num_pages: int | None
    gpu_share: float
    page_size: int
    max_rows: int
    backend: Backend
    attention: Attention
    kv_dtype: KvDtype
    compile_model: bool
    ranks: Ranks

    def paged(
        self, model: PreTrainedModel, lora: LoraLayers | None = None, others: int = 0
    ) -> PagedModel:
        """Return the model on pages, as many as fit where none were asked for.

        Parameters
        ----------
        model : PreTrainedModel
        lora : LoraLayers, optional
            See `PagedModel`.
        others : int
            Reward models whose pools come after this one, and are to get as much of a GPU.
        """
        num_pages = self.num_pages
        if num_pages is None:
            num_pages = default_num_pages(
                model,
                page_size=self.page_size,
                max_rows=self.max_rows,
                gpu_share=self.gpu_share / (1 + others),
                kv_dtype=self.kv_dtype,
            )
            num_pages = self.ranks.smallest(num_pages)
        return PagedModel(
            model,
            num_pages=num_pages,
            page_size=self.page_size,
            backend=self.backend,
            attention=self.attention,
            kv_dtype=self.kv_dtype,
            compile_model=self.compile_model,
            ranks=self.ranks,
            lora=lora,
        )
