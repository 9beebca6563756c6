"""Logits of hidden states, through a language model's own forward with its backbone left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from stars_fast.errors import UnsupportedModelError
from stars_fast.models.checks import has_lm_head
from stars_fast.models.interface import attention_configs, exclusive, replaced_forward
from stars_fast.models.parameters import embedding_rows

__all__ = ["LogitHead"]


class LogitHead:
    """Everything that a language model does after its backbone.

    In some models this is more than a linear layer: Gemma 2 caps its logits, Granite and Cohere
    scale theirs. The model's own forward is therefore run with a backbone that returns the given
    hidden states. One short text is run both ways to check that this works.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in eval mode; it is changed only while a call runs.

    Raises
    ------
    UnsupportedModelError
        If the model has no head, or its logits cannot be computed from its hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name = type(model).__name__
        if not has_lm_head(model):
            raise UnsupportedModelError(f"{name} has no language-model head")
        self._model = model
        self._configs = attention_configs(model)
        rows = embedding_rows(model)
        ids = torch.tensor([[i % rows for i in range(1, 8)]], device=model.device)
        with torch.inference_mode(), exclusive(self._configs):
            want = model(input_ids=ids, use_cache=False, return_dict=True).logits[0].float()
            output = model.base_model(input_ids=ids, use_cache=False, return_dict=True)
        hidden = output[0][0]
        # Of the backbone's own kind: heads read fields of it that others lack.
        self._kind: type[ModelOutput] = type(output)
        #: Logits of a token.
        self.vocab_size = want.shape[-1]
        # OPT's forward calls the decoder inside of its base model.
        decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
        for backbone in (model.base_model, decoder):
            self._backbone: nn.Module = backbone
            if self._agrees(hidden, want):
                return
        raise UnsupportedModelError(
            f"the logits of {name} cannot be had from its last hidden states: its forward does not "
            "give the same ones for them when its backbone is left out"
        )

    def _agrees(self, hidden: Tensor, want: Tensor) -> bool:
        try:
            got = self(hidden).float()
        except Exception:  # noqa: BLE001 - a forward of any kind may raise anything
            return False
        tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
        return got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance)

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits ``[N, vocab]`` of the backbone's hidden states ``[N, hidden]``."""
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        given = self._kind(last_hidden_state=hidden.unsqueeze(0))
        with exclusive(self._configs), replaced_forward(self._backbone, lambda *_, **__: given):
            output = self._model(input_ids=ids, use_cache=False, return_dict=True)
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits.squeeze(0)
