"""Any causal transformers model, run on paged keys and values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from stars_fast.config import Attention, Backend, KvDtype
from stars_fast.distributed import ALONE, Ranks
from stars_fast.models.block_attention import BlockAttention
from stars_fast.models.checks import check_architecture, max_length
from stars_fast.models.decode import DecodeAttention, Workspace
from stars_fast.models.fusion import FusedLayers
from stars_fast.models.interface import (
    STARS_PAGED,
    LayerAttention,
    attention_configs,
    attention_implementation,
)
from stars_fast.models.kv_scales import ScaleProbe
from stars_fast.models.linear import OneDnnLinears
from stars_fast.models.lora import LoraLayers
from stars_fast.models.native_decode import NativeDecode
from stars_fast.models.packed import pack_model
from stars_fast.models.parameters import embedding_rows
from stars_fast.models.pool import Pools
from stars_fast.models.probe import attention_layout
from stars_fast.models.threads import StepThreads
from stars_fast.models.varlen_forms import choose_attention
from stars_fast.ops.attention import AttentionOptions, AttentionPlan, attend, plan_attention
from stars_fast.ops.backend import backend as choose_backend
from stars_fast.ops.backend import check_backend, uses_triton
from stars_fast.ops.batch import BatchLike
from stars_fast.ops.cpu import runs_on
from stars_fast.ops.fused import Rotary, rotate
from stars_fast.ops.pages import copy_pages, kv_append

if TYPE_CHECKING:
    # Triton is for Linux only.
    from stars_fast.kernels.attention import Tiles
    from stars_fast.models.images import ImageRows
    from stars_fast.models.kernel_attention import DecodeCapacity, KernelDecode

IntArray = NDArray[np.integer[Any]]

_SCALE_TOKENS = 64  # of the text on which float8 scales are measured


@dataclass(frozen=True)
class DecodeState:
    """A round of decode steps under way, made by `PagedModel.begin_decode`."""

    attention: LayerAttention
    begin_step: Callable[[int], None]
    first_position: Tensor  # int64 [1, R]
    last_step: Tensor  # int64 [1, R], of each row's new tokens
    ones: Tensor  # int64 [1, R], an attention mask that hides nothing
    max_new: int


class PagedModel:
    """A causal LM, or a sequence classifier on a causal backbone, on a pool of KV pages.

    The pool is allocated here, once. The model itself is not changed: its attention
    implementation, and on a CPU its linear layers, are switched while a forward runs and restored
    after; `pack_weights` alone changes it. One thread at a time may use the model, through this
    object or otherwise.

    Parameters
    ----------
    model : PreTrainedModel
        In eval mode, on one device.
    num_pages : int
        Pages of the pool, the null page included, >= 2.
    page_size : int
        Tokens per page, >= 1.
    backend : str
        Form of the operators: ``"auto"``, ``"pytorch"`` or ``"triton"``, see
        `stars_fast.ops.backend`.
    attention : str
        Who attends in `extend` and `prefill`: ``"auto"``, ``"triton"``, ``"flash"`` or ``"torch"``,
        see `Engine`.
    kv_dtype : str
        Dtype of the pages: ``"auto"``, that of the model's own keys and values, or ``"fp8"``,
        float8_e4m3fn with a scale per head, for the Triton backend.
    compile_model : bool
        Fuse what lies between the model's matrix products and its attention (norms, rotary
        embeddings, gates) by `torch.compile`; the first passes wait for the compiler.
    ranks : Ranks
        Those that hold the model together, each with the pages of its own KV heads.
    lora : LoraLayers, optional
        An adapter beside layers of the backbone, active in the passes of this object only, so that
        others may run the model without it. Not with `compile_model`.

    Raises
    ------
    UnsupportedModelError
        If the architecture cannot run on paged attention.
    ValueError
        If a number is out of range, `backend`, `attention` or `kv_dtype` is unknown or not
        available for the model on its device, or the model is in training mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_pages: int,
        page_size: int,
        backend: Backend = "auto",
        attention: Attention = "auto",
        kv_dtype: KvDtype = "auto",
        compile_model: bool = False,
        ranks: Ranks = ALONE,
        lora: LoraLayers | None = None,
    ) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages must be at least 2 (one is the null page), got {num_pages}"
            )
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        check_backend(backend)
        if kv_dtype not in get_args(KvDtype):
            raise ValueError(
                f"kv_dtype must be one of {', '.join(get_args(KvDtype))}, got {kv_dtype!r}"
            )
        check_architecture(model)
        if model.training:
            raise ValueError("model must be in eval mode: call model.eval() first")
        if lora is not None and compile_model:
            raise ValueError("compile_model must be False with lora, got True")
        self.model = model
        self._lora = lora
        self.num_pages = num_pages
        self.page_size = page_size
        self._backend: Backend = backend
        with self.on_backend():
            #: Whether operators run as Triton kernels.
            self.on_kernels = uses_triton(model.device)
            #: Whether operators run as C++ on the processor's vectors.
            self.on_vectors = runs_on(next(p for p in model.parameters() if p.is_floating_point()))
        if kv_dtype == "fp8" and not self.on_kernels:
            raise ValueError(
                f"kv_dtype='fp8' needs the Triton backend, which backend={backend!r} is not on "
                f"{model.device}"
            )
        self._configs = attention_configs(model)
        layouts = attention_layout(model)
        self._pools = Pools.allocate(
            layouts,
            num_pages=num_pages,
            page_size=page_size,
            device=model.device,
            kv_dtype=kv_dtype,
        )
        self._chosen = choose_attention(
            attention,
            layouts,
            on_kernels=self.on_kernels,
            device=self.device,
            stored=self.kv_dtype,
        )
        #: Bytes that `copy_pages` has written since the model was made.
        self.copied_bytes = 0
        self._workspace = Workspace()
        self._ranks = ranks
        self._fused: FusedLayers | None = None
        fuses = self.on_vectors or self.on_kernels
        if fuses and not compile_model and ranks.size == 1 and lora is None:
            with self.on_backend():
                self._fused = FusedLayers.of(model, layouts)
        #: Chooses the number of threads of decode steps; None where results depend on it.
        self.step_threads: StepThreads | None = None
        if self._fused is not None and self._fused.whole and NativeDecode.fits(self._pools):
            self.step_threads = StepThreads()
        self._linears = None if compile_model else OneDnnLinears(model)
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        if compile_model:
            self._compiled = {x: torch.compile(x) for x in (model, model.base_model)}
        if kv_dtype == "fp8":
            self._measure_scales()

    @contextlib.contextmanager
    def on_backend(self) -> Iterator[None]:
        """Run operators in the form, and on the device, that the model's do."""
        guard: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.model.device.type == "cuda":
            guard = torch.cuda.device(self.model.device)
        with choose_backend(self._backend), guard:
            yield

    @torch.inference_mode()
    def _measure_scales(self) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (_SCALE_TOKENS,), generator=generator)
        positions = torch.arange(_SCALE_TOKENS, device=self.device).unsqueeze(0)
        self._forward(
            self.model.base_model, ids.to(self.device), positions, ScaleProbe(self._pools)
        )

    def pack_weights(self) -> None:
        """Free what the packed weights of a model of ours were made from; see `pack_model`."""
        if self._linears is None or self.on_kernels or self._ranks.size > 1:
            return
        pack_model(self.model)
        self._linears = OneDnnLinears(self.model)  # of what is left

    @property
    def device(self) -> torch.device:
        """Device of the pool and of the model's input."""
        return self._pools.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        return self.model.dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype of the pages."""
        return self._pools.k_pages[0].dtype

    @property
    def num_layers(self) -> int:
        """Layers with keys and values."""
        return len(self._pools.layouts)

    @property
    def vocab_size(self) -> int:
        """Token ids of the input are below this."""
        return embedding_rows(self.model)

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
    def prefill(self, batch: BatchLike, input_ids: Tensor, images: ImageRows | None = None) -> None:
        """Run `extend` only for its keys and values; of rows with pictures by their features."""
        self.extend_all(batch, input_ids, images)

    def _extend_images(self, batch: BatchLike, images: ImageRows) -> Tensor:
        row, offset = _packed(images.lengths)
        stored = offset < batch.new_lengths[row]
        slots = torch.from_numpy(
            np.where(stored, batch.slots[row, np.minimum(offset, batch.max_new - 1)], 0)
        ).to(self.device)
        places = torch.from_numpy(images.places).to(self.device)
        ids = torch.from_numpy(images.token_ids).to(self.device).masked_fill(places, 0)
        positions = torch.from_numpy(images.positions).to(self.device).unsqueeze(-2)
        decoder: nn.Module = self.model.get_decoder()  # type: ignore[no-untyped-call]
        with self.on_backend():
            embeddings = self.model.get_input_embeddings()(ids)
            deep: dict[str, Any] = {}
            for features in images.features[:1]:
                embeddings[places] = features.rows.to(embeddings.dtype)
                if features.deep:
                    deep["visual_pos_masks"] = places.unsqueeze(0)
                    deep["deepstack_visual_embeds"] = list(features.deep)
            attention = (
                self._extend_attention(batch, slots)
                if images.blocks is None
                else BlockAttention(self._pools, batch, images.lengths, images.blocks, slots)
            )
            inputs = {"inputs_embeds": embeddings.unsqueeze(0), **deep}
            hidden = self._forward(decoder, None, positions, attention, **inputs)
        return hidden if stored.all() else hidden[torch.from_numpy(stored).to(self.device)]

    @torch.inference_mode()
    def extend_all(
        self, batch: BatchLike, input_ids: Tensor, images: ImageRows | None = None
    ) -> Tensor:
        """`extend` with the hidden states of all new tokens, ``[T, hidden]``.

        With `images`, the same tokens and the features of their pictures, `input_ids` are not read.
        """
        if images is not None:
            return self._extend_images(batch, images)
        if input_ids.shape != (batch.num_tokens,):
            raise ValueError(
                f"input_ids must have shape ({batch.num_tokens},), got {tuple(input_ids.shape)}"
            )
        row, offset = _packed(batch.new_lengths)
        slots = torch.from_numpy(batch.slots[row, offset]).to(self.device)
        positions = torch.from_numpy(batch.row_start[row].astype(np.int64) + offset).to(self.device)
        with self.on_backend():
            attention = self._extend_attention(batch, slots)
            return self._forward(
                self.model.base_model, input_ids, positions.unsqueeze(0), attention
            )

    def _extend_attention(self, batch: BatchLike, slots: Tensor) -> LayerAttention:
        if self.on_kernels:
            from stars_fast.models.kernel_attention import extend_attention

            return extend_attention(self._pools, batch, slots, self._chosen)
        plan = plan_attention(
            batch, batch.new_lengths, page_size=self.page_size, device=self.device
        )
        return _ExtendAttention(plan, self._pools, slots)

    @property
    def sums_alike(self) -> bool:
        """Whether a token's logits are the same to the bit wherever the round began."""
        with self.on_backend():
            return not self.on_kernels and NativeDecode.fits(self._pools)

    @torch.inference_mode()
    def begin_decode(self, batch: BatchLike, shift: NDArray[np.int64] | None = None) -> DecodeState:
        """Start a round of decode steps; prefixes are read now, and the batch is not read again.

        A round begun from this model ends when another begins. `shift`: int64 ``[R]``, what
        positions are ahead of their tokens' numbers; None: nothing.
        """
        begins = batch.row_start.astype(np.int64)
        if shift is not None:
            begins += shift
        start = torch.from_numpy(begins).to(self.device).unsqueeze(0)
        last = torch.from_numpy(batch.new_lengths.astype(np.int64) - 1).to(self.device).unsqueeze(0)
        ones = torch.ones_like(start)
        if self.on_kernels:
            from stars_fast.models.kernel_attention import DecodeCapacity

            tiles = self.decode_tiles(-(-batch.num_rows // batch.num_groups))
            decode = self.new_decode(DecodeCapacity.of(batch), tiles)
            decode.write(batch)
            return DecodeState(decode.attention, decode.seek, start, last, ones, batch.max_new)
        pools = self._pools
        attention: NativeDecode | DecodeAttention
        with self.on_backend():
            if NativeDecode.fits(pools):
                attention = NativeDecode(batch, pools)
            else:
                attention = DecodeAttention(
                    batch, pools.layouts, pools.k_pages, pools.v_pages, self._workspace
                )
        return DecodeState(attention, attention.begin_step, start, last, ones, batch.max_new)

    def decode_tiles(self, rows_per_group: int) -> dict[int, Tiles]:
        """Return the tiles for a round with about that many candidates of a request."""
        from stars_fast.models.kernel_attention import tiles_of

        return tiles_of(self._pools, rows_per_group)

    def new_decode(self, capacity: DecodeCapacity, tiles: Mapping[int, Tiles]) -> KernelDecode:
        """Return the attention of decode steps through the kernels; see `KernelDecode`."""
        from stars_fast.models.kernel_attention import KernelDecode

        return KernelDecode(self._pools, capacity, tiles)

    @torch.inference_mode()
    def decode_step(self, state: DecodeState, j: int, input_ids: Tensor) -> Tensor:
        """Run each row's j-th new token; writes its keys and values to slot j of the row.

        Parameters
        ----------
        state : DecodeState
            State of the round under way.
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
        state.begin_step(j)
        # A row that has ended stays where it is: the context may also end there.
        positions = state.first_position + state.last_step.clamp(max=j)
        with self.on_backend():
            return self.forward_decode(input_ids, positions, state.attention, state.ones)

    def forward_decode(
        self, input_ids: Tensor, positions: Tensor, attention: LayerAttention, ones: Tensor
    ) -> Tensor:
        """Run one token of every row, on the backend that is chosen; nothing waits for the device.

        Parameters
        ----------
        input_ids : Tensor
            int64 ``[R]``.
        positions : Tensor
            int64 ``[1, R]``.
        attention : LayerAttention
            Begun for this step.
        ones : Tensor
            int64 ``[1, R]``, an attention mask that hides nothing.

        Returns
        -------
        Tensor
            Logits ``[R, vocab]``.
        """
        return self._forward(self.model, input_ids, positions, attention, ones)

    @torch.inference_mode()
    def copy_pages(
        self, src: NDArray[np.int32], dst: NDArray[np.int32], count: NDArray[np.int32]
    ) -> None:
        """Copy the first ``count[i]`` tokens of page ``src[i]`` to page ``dst[i]``, all layers."""
        if len(src):
            self.copied_bytes += int(count.sum()) * self._pools.token_bytes
            tensors = (torch.tensor(x, device=self.device) for x in (src, dst, count))
            with self.on_backend():
                copy_pages(self._pools.k_pages, self._pools.v_pages, *tensors)

    def _forward(
        self,
        module: nn.Module,
        input_ids: Tensor | None,
        positions: Tensor,
        attention: LayerAttention,
        ones: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """First output of a forward on packed tokens ``[T]``, without its batch dimension."""
        if input_ids is not None:
            inputs["input_ids"] = input_ids.unsqueeze(0)
        if ones is None:
            ones = torch.ones((1, positions.shape[-1]), dtype=torch.int64, device=self.device)
        linears = contextlib.nullcontext() if self._linears is None else self._linears.active()
        fused = contextlib.nullcontext() if self._fused is None else self._fused.active()
        lora = contextlib.nullcontext() if self._lora is None else self._lora.active()
        together = self._ranks.together()
        paged = attention_implementation(self._configs, STARS_PAGED)
        with paged, fused, linears, lora, together:
            output = self._compiled.get(module, module)(
                **inputs,
                # Padding is not expressed through the mask; some models ask for one all the same.
                attention_mask=ones,
                position_ids=positions,
                use_cache=False,
                stars_attention=attention,
            )
        first = output[0]
        assert isinstance(first, Tensor)
        return first.squeeze(0)


@dataclass
class _ExtendAttention:
    """The `LayerAttention` of one extend in PyTorch."""

    plan: AttentionPlan
    pools: Pools
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
        rotary: Rotary | None = None,
    ) -> Tensor:
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        layer = self.layer
        self.layer += 1
        k_pages, v_pages = self.pools.k_pages[layer], self.pools.v_pages[layer]
        kv_append(k_pages, v_pages, key, value, self.slots)
        return attend(
            self.plan,
            query,
            k_pages,
            v_pages,
            AttentionOptions(scaling, self.pools.layouts[layer].window, softcap, sinks),
        )


def _packed(lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Return the row of each token of rows of these lengths, and its number in the row."""
    return np.repeat(np.arange(len(lengths)), lengths), _ragged_arange(lengths)


def _ragged_arange(lengths: IntArray) -> IntArray:
    """``[0 .. lengths[0]-1, 0 .. lengths[1]-1, ...]``, int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
