"""A numeric check that a model computes the same on pages as it does by itself."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stars_fast.config import Attention, Backend
from stars_fast.errors import ModelLoadError
from stars_fast.models.checks import check_architecture, has_lm_head, unsupported
from stars_fast.models.first_layers import first_layers
from stars_fast.models.interface import attention_configs, attention_implementation
from stars_fast.models.machine import release_file_pages
from stars_fast.models.paged import PagedModel
from stars_fast.models.probe import attention_layout
from stars_fast.models.quantize import Int8Linear
from stars_fast.models.sharded import local
from stars_fast.ops.batch import RowBatch

_PAGE_SIZE = 4
_PREFIX, _FORKS, _NEW = 6, 2, 3  # tokens of the prefix, candidates, tokens of each
# Mean absolute difference of a token's results over the standard deviation of the reference.
_TOLERANCE = 1e-4
_LOW_PRECISION_TOLERANCE = 0.1
# Of few layers, which round less and depend less on positions; above it all layers are asked.
_LOW_PRECISION_FEW_LAYERS = 0.03

#: What has been compared in this process and was right: all that is compared but the weights.
_PASSED: set[Hashable] = set()


def _batch(prefix_pages: list[int], start: int, pages: list[list[int]], new: int) -> RowBatch:
    """One group with a prefix of `start` tokens; rows write `new` tokens to their own pages."""
    slots = [[page * _PAGE_SIZE + o for page in row for o in range(_PAGE_SIZE)] for row in pages]
    return RowBatch(
        group_pages=np.array([prefix_pages], dtype=np.int32),
        padding_start=np.full(1, start, dtype=np.int32),
        padding_end=np.full(1, start, dtype=np.int32),
        row_group=np.zeros(len(pages), dtype=np.int32),
        row_start=np.full(len(pages), start, dtype=np.int32),
        new_lengths=np.full(len(pages), new, dtype=np.int32),
        slots=np.array(slots, dtype=np.int64)[:, :new],
    )


@torch.inference_mode()
def check_numbers(
    model: PreTrainedModel, *, backend: Backend = "auto", attention: Attention = "auto"
) -> None:
    """Compare a prefix, a fork into two candidates and their extension with the plain forward.

    A language model is compared by the logits of its decode steps, any other model by the hidden
    states of an extend. Runs a few random tokens, on `backend` and by `attention`, through the
    first layers of the model, of each kind at least one; where these differ, through all of them.
    What has passed is not run again in this process. Weights are looked at in any case. Leaves the
    model and the global random state as they were.

    Raises
    ------
    UnsupportedModelError
        With the architecture and the size of the difference.
    ModelLoadError
        If weights are no numbers.
    """
    check_architecture(model)
    layouts = attention_layout(model)
    short, kinds = first_layers(model, layouts)
    config = model.config.to_json_string(use_diff=False)
    key = (type(model), config, kinds, model.dtype, model.device.type, backend, attention)
    if key not in _PASSED:
        few = _LOW_PRECISION_FEW_LAYERS
        reason = (
            _difference(short, backend, attention, few) if short is not model else "not compared"
        )
        if reason:
            reason = _difference(model, backend, attention, _LOW_PRECISION_TOLERANCE)
        if reason:
            check_weights(model)
            raise unsupported(model, reason)
        _PASSED.add(key)
    check_weights(model)


def _difference(
    model: PreTrainedModel, backend: Backend, attention: Attention, low_precision: float
) -> str:
    """Say by how much the results of a model on pages are wrong; nothing if they are right.

    `low_precision` is the tolerance of less than float32, and of 8-bit weights, which activations
    are rounded for.
    """
    paged = PagedModel(
        model, num_pages=8, page_size=_PAGE_SIZE, backend=backend, attention=attention
    )
    generator = torch.Generator().manual_seed(0)
    count = _PREFIX + _FORKS * _NEW
    # Ids from the middle of the vocabulary: padding and other special tokens lie at its ends.
    low, high = paged.vocab_size // 4, max(paged.vocab_size // 4 + 1, 3 * paged.vocab_size // 4)
    ids = torch.randint(low, high, (count,), generator=generator).to(paged.device)
    prefix, new = ids[:_PREFIX], ids[_PREFIX:].view(_FORKS, _NEW)

    paged.prefill(_batch([], 0, [[1, 2]], _PREFIX), prefix)
    forks = _batch([1, 2], _PREFIX, [[3], [4]], _NEW)
    if not has_lm_head(model):
        got = paged.extend(forks, new.flatten())
    else:
        state = paged.begin_decode(forks)
        got = torch.stack([paged.decode_step(state, j, new[:, j]) for j in range(_NEW)], dim=1)
    whole = torch.cat((prefix.expand(_FORKS, -1), new), dim=1)
    want = _plain_forward(model, whole)[:, _PREFIX:]
    if got.ndim == 2:
        want = want[:, -1]

    differences = (got.float() - want.float()).abs().mean(dim=-1)
    rounds = any(isinstance(module, Int8Linear) for module in model.modules())
    if model.dtype in (torch.float32, torch.float64) and not rounds:
        difference, tolerance = float(differences.max()), _TOLERANCE
    else:
        # Rounding alone may send a token to another expert of a mixture, but not most tokens.
        difference, tolerance = float(differences.median()), low_precision
    spread = float(want.float().std())
    if difference <= tolerance * max(spread, torch.finfo(torch.float32).tiny):
        return ""
    return (
        f"its results differ from its own eager attention by {difference:.3g}, where they spread "
        f"by {spread:.3g}"
    )


def check_weights(model: PreTrainedModel) -> None:
    """Refuse weights that are NaN or infinite.

    Raises
    ------
    ModelLoadError
        With the name of the first such weight, and its row.
    """
    for name, parameter in model.named_parameters():
        weight = local(parameter)
        if weight.is_meta or weight.dtype.itemsize < torch.float16.itemsize:  # of quantised layers
            continue
        # A sum is read at the speed of the memory; in float16 it may be infinite by itself.
        finite = bool(weight.sum().isfinite())
        release_file_pages(weight)  # few rows of an embedding are read again
        if finite:
            continue
        bad = ~torch.isfinite(weight)
        if bad.any():
            first = bad.nonzero()[0].tolist()
            kind = "NaN" if weight[tuple(first)].isnan() else "infinity"
            row = f" row {first[0]}" if weight.ndim > 1 else f" at {first[0]}" if first else ""
            raise ModelLoadError(f"{type(model).__name__}: weights contain {kind}: {name}{row}")


def _plain_forward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a language model, hidden states of any other, by eager attention."""
    module = model if has_lm_head(model) else model.base_model
    with attention_implementation(attention_configs(model), "eager"):
        output = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    result = output[0]
    assert isinstance(result, Tensor)
    return result
