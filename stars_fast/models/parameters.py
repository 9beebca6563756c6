"""A model's weights, counted."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from stars_fast.models.packed import PackedLinear
from stars_fast.models.quantize import Int8Embedding, Int8Module


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many token ids a model knows."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, Int8Embedding):
        return embedding.num_embeddings
    assert isinstance(embedding.weight, Tensor)
    return embedding.weight.shape[0]


def multiplied_parameters(model: PreTrainedModel) -> int:
    """Return the parameters that a token is multiplied with.

    All but the input embedding, which is only looked up; where it is the output head as well, it
    counts once. In a mixture of experts all experts count, although a token meets few of them.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    alone = [m for m in model.modules() if isinstance(m, PackedLinear)]
    tied = head is not None and head not in alone and head.weight is embedding
    packed = {m.weight: m.num_weights for m in model.modules() if isinstance(m, Int8Module)}
    # parameters() gives what is tied once.
    rest = (p for p in model.parameters() if tied or p is not embedding)
    weights = sum(packed.get(p, p.numel()) for p in rest)
    return weights + sum(m.in_features * m.out_features for m in alone)
