"""Any causal transformers model, run on paged keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_fast.models.batch import BatchLike
from stars_fast.models.checks import check_architecture, max_length
from stars_fast.models.decode import DecodeAttention, Workspace
from stars_fast.models.interface import (
    STARS_PAGED,
    LayerAttention,
    attention_configs,
    attention_implementation,
)
from stars_fast.models.linear import OneDnnLinears
from stars_fast.models.probe import LayerLayout, attention_layout
from stars_fast.ops.attention import AttentionPlan, attend, plan_attention
from stars_fast.ops.pages import copy_pages, kv_append


@dataclass(frozen=True)
class DecodeState:
    """A round of decode steps under way, made by `PagedModel.begin_decode`."""

    attention: DecodeAttention
    first_position: Tensor  # int64 [1, R]
    ones: Tensor  # int64 [1, R], an attention mask that hides nothing
    max_new: int


class PagedModel:
    """A causal LM, or a sequence classifier on a causal backbone, on a pool of KV pages.

    The pool is allocated here, once. The model itself is not changed: its attention
    implementation, and on a CPU its linear layers, are switched while a forward runs and restored
    after. One thread at a time may
    use the model, through this object or otherwise.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode, on one device.
    num_pages : int
        Pages of the pool, the null page included, >= 2.
    page_size : int
        Tokens per page, >= 1.

    Raises
    ------
    UnsupportedModelError
        If the architecture cannot run on paged attention.
    ValueError
        If `num_pages` or `page_size` is out of range or the model is in training mode.
    """

    def __init__(self, model: PreTrainedModel, *, num_pages: int, page_size: int) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages must be at least 2 (one is the null page), got {num_pages}"
            )
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        check_architecture(model)
        if model.training:
            raise ValueError("model must be in eval mode: call model.eval() first")
        self.model = model
        self.num_pages = num_pages
        self.page_size = page_size
        self._layouts = attention_layout(model)
        self._configs = attention_configs(model)
        self._k_pages = [self._new_pool(x, x.key_dim) for x in self._layouts]
        self._v_pages = [self._new_pool(x, x.value_dim) for x in self._layouts]
        self._workspace = Workspace()
        self._linears = OneDnnLinears(model)

    def _new_pool(self, layout: LayerLayout, dim: int) -> Tensor:
        shape = (self.num_pages, self.page_size, layout.kv_heads, dim)
        return torch.zeros(shape, dtype=layout.dtype, device=self.model.device)

    @staticmethod
    def page_bytes(model: PreTrainedModel, page_size: int) -> int:
        """KV bytes of one page over all layers, keys and values."""
        check_architecture(model)
        return page_size * sum(
            layer.kv_heads * (layer.key_dim + layer.value_dim) * layer.dtype.itemsize
            for layer in attention_layout(model)
        )

    @property
    def device(self) -> torch.device:
        """Device of the pool and of the model's input."""
        return self._k_pages[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        return self.model.dtype

    @property
    def num_layers(self) -> int:
        """Layers with keys and values."""
        return len(self._layouts)

    @property
    def vocab_size(self) -> int:
        """Token ids of the input are below this."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    @property
    def max_length(self) -> int | None:
        """Longest sequence in tokens; None if the configuration does not say."""
        return max_length(self.model)

    @torch.inference_mode()
    def extend(self, batch: BatchLike, input_ids: Tensor) -> Tensor:
        """Run each row's new tokens after its group's prefix; writes their keys and values.

        Parameters
        ----------
        batch : BatchLike
            Rows to extend.
        input_ids : Tensor
            int64 ``[T]``, the rows' new tokens, row after row.

        Returns
        -------
        Tensor
            ``[R, hidden]``, the backbone's last hidden state at each row's last new token.
        """
        hidden = self.extend_all(batch, input_ids)
        last = np.cumsum(batch.new_lengths, dtype=np.int64) - 1
        return hidden.index_select(0, torch.from_numpy(last).to(self.device))

    @torch.inference_mode()
    def prefill(self, batch: BatchLike, input_ids: Tensor) -> None:
        """`extend` for its keys and values alone."""
        self.extend_all(batch, input_ids)

    @torch.inference_mode()
    def extend_all(self, batch: BatchLike, input_ids: Tensor) -> Tensor:
        """`extend` with the hidden states of all new tokens, ``[T, hidden]``."""
        new, start = batch.new_lengths, batch.row_start
        if input_ids.shape != (batch.num_tokens,):
            raise ValueError(
                f"input_ids must have shape ({batch.num_tokens},), got {tuple(input_ids.shape)}"
            )
        offset = _ragged_arange(new)
        row = np.repeat(np.arange(batch.num_rows), new)
        plan = plan_attention(
            batch.group_pages,
            batch.hole_start,
            batch.hole_end,
            batch.row_group,
            start,
            new,
            new,
            batch.slots,
            page_size=self.page_size,
            device=self.device,
        )
        attention = _ExtendAttention(
            plan,
            self._layouts,
            self._k_pages,
            self._v_pages,
            torch.from_numpy(batch.slots[row, offset]).to(self.device),
        )
        positions = torch.from_numpy(start[row].astype(np.int64) + offset).to(self.device)
        return self._forward(self.model.base_model, input_ids, positions.unsqueeze(0), attention)

    @torch.inference_mode()
    def begin_decode(self, batch: BatchLike) -> DecodeState:
        """Start a round of decode steps; the prefixes are read now, the batch not again later.

        A round begun from this model ends when another begins.
        """
        attention = DecodeAttention(
            batch, self._layouts, self._k_pages, self._v_pages, self._workspace
        )
        start = torch.from_numpy(batch.row_start.astype(np.int64)).to(self.device).unsqueeze(0)
        return DecodeState(attention, start, torch.ones_like(start), batch.max_new)

    @torch.inference_mode()
    def decode_step(self, state: DecodeState, j: int, input_ids: Tensor) -> Tensor:
        """Run each row's j-th new token; writes its keys and values to slot j of the row.

        Parameters
        ----------
        state : DecodeState
            Of the round under way.
        j : int
            Step, from 0; steps run in order.
        input_ids : Tensor
            int64 ``[R]``. Of rows with ``new_lengths <= j`` the result is meaningless.

        Returns
        -------
        Tensor
            Logits ``[R, vocab]`` of the next token, through the whole language model.
        """
        if not 0 <= j < state.max_new:
            raise ValueError(f"j must be in [0, {state.max_new}), got {j}")
        state.attention.begin_step(j)
        return self._forward(
            self.model, input_ids, state.first_position + j, state.attention, state.ones
        )

    @torch.inference_mode()
    def copy_pages(
        self, src: NDArray[np.int32], dst: NDArray[np.int32], count: NDArray[np.int32]
    ) -> None:
        """Copy the first ``count[i]`` tokens of page ``src[i]`` to page ``dst[i]``, all layers."""
        if len(src):
            tensors = (torch.tensor(x, device=self.device) for x in (src, dst, count))
            copy_pages(self._k_pages, self._v_pages, *tensors)

    def _forward(
        self,
        module: nn.Module,
        input_ids: Tensor,
        positions: Tensor,
        attention: LayerAttention,
        ones: Tensor | None = None,
    ) -> Tensor:
        """First output of a forward on packed tokens ``[T]``, without its batch dimension."""
        ids = input_ids.unsqueeze(0)
        with attention_implementation(self._configs, STARS_PAGED), self._linears.active():
            output = module(
                input_ids=ids,
                # Padding is not expressed through the mask; some models ask for one all the same.
                attention_mask=torch.ones_like(ids) if ones is None else ones,
                position_ids=positions,
                use_cache=False,
                stars_attention=attention,
            )
        first = output[0]
        assert isinstance(first, Tensor)
        return first.squeeze(0)


@dataclass
class _ExtendAttention:
    """The `LayerAttention` of one extend."""

    plan: AttentionPlan
    layouts: list[LayerLayout]
    k_pages: list[Tensor]
    v_pages: list[Tensor]
    slots: Tensor  # int64 [T]
    layer: int = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        layer = self.layer
        self.layer += 1
        k_pages, v_pages = self.k_pages[layer], self.v_pages[layer]
        kv_append(k_pages, v_pages, key.to(k_pages.dtype), value.to(v_pages.dtype), self.slots)
        return attend(
            self.plan,
            query,
            k_pages,
            v_pages,
            scaling=scaling,
            window=self.layouts[layer].window,
            softcap=softcap,
            sinks=sinks,
        )


def _ragged_arange(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """``[0 .. lengths[0]-1, 0 .. lengths[1]-1, ...]``, int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
