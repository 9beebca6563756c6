"""What the two TRL scripts share.

Seen working: trl 1.16.0, datasets 5.2.0 and accelerate 1.15.0 with torch 2.13.0 and transformers
5.23.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import make_demo_models
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def require_trl() -> None:
    """Check that TRL is installed.

    Raises
    ------
    ModuleNotFoundError
        Saying how to install it.
    """
    if find_spec("trl") is None:
        raise ModuleNotFoundError(
            "trl is not installed: pip install -c constraints.txt '.[train]'", name="trl"
        )


@contextmanager
def training_folder(seed: int, threads: int = 1) -> Iterator[str]:
    """A folder for the trainer, gone afterwards; meanwhile torch is deterministic."""
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    with TemporaryDirectory() as folder:
        try:
            # TRL allocates large buffers in each step; filling them takes longer than the step.
            settings.fill_uninitialized_memory = False
            with make_demo_models.deterministic(
                make_demo_models.Settings(seed=seed, threads=threads)
            ):
                yield folder
        finally:
            settings.fill_uninitialized_memory = filled


def save_trained(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a model as the demo's are written."""
    model.config.use_cache = True  # trainers switch it off
    make_demo_models.save(model, tokenizer, out)


def common_arguments(
    *, seed: int, batch_size: int, rate: float, epochs: float, folder: str
) -> dict[str, Any]:
    """Arguments of either trainer: one CPU process in float32, a cosine, nothing left on disk."""
    return {
        "output_dir": folder,
        "seed": seed,
        "per_device_train_batch_size": batch_size,
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1 it is a share
        "weight_decay": 0.01,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "train_sampling_strategy": "group_by_length",  # half of a batch is padding otherwise
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        "disable_tqdm": False,
    }
