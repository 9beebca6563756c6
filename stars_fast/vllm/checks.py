"""Bad ``stars`` of a request, refused where it comes in.

vLLM checks what a request asks for in the process of its HTTP routes, and its scheduler runs in
another: what only that refuses is status 500 to a client. The parts of vLLM that are asked where a
request comes in are logits processors.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import LogitsProcessor

from stars_fast.params import StarsParams
from stars_fast.vllm.extra_args import KEY, params_of
from stars_fast.vllm.options import options_from

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate


class StarsChecks(LogitsProcessor):  # type: ignore[misc, unused-ignore]  # Any without vLLM
    """Has vLLM answer 400 with the reason; changes no logits.

    Beside `StarsScheduler`: ``vllm serve --logits-processors stars_fast.vllm:StarsChecks``.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check what a request asks of us, if it does.

        Raises
        ------
        ValueError
            As the scheduler would refuse it.
        """
        if KEY in (sampling_params.extra_args or {}):
            try:
                params_of(_base(), sampling_params)
            except TypeError as error:
                raise ValueError(str(error)) from error

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Return that greedy requests need not be shown to it."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take no note."""


@functools.cache
def _base() -> StarsParams:
    """Return what the server's options say of all requests."""
    return options_from(os.environ).stars_params()
