"""How many weights a token meets on its way through a model."""

from __future__ import annotations

from transformers import PreTrainedModel


def multiplied_parameters(model: PreTrainedModel) -> int:
    """Return the parameters that a token is multiplied with.

    All but the input embedding, which is only looked up; where it is the output head as well, it
    counts once. In a mixture of experts all experts count, although a token meets few of them.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = head is not None and head.weight is embedding
    # parameters() gives what is tied once.
    return sum(p.numel() for p in model.parameters() if tied or p is not embedding)
