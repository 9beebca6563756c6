"""Making an engine from a directory, against transformers' `from_pretrained`.

`from_pretrained` maps the weights and reads none of them; the second side has read each once, as
the engine has, which looks for NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stars_fast import Engine, StarsParams
from stars_fast.benchmarks.compare import Compare
from stars_fast.benchmarks.models import (
    ONE_BILLION,
    SMOLLM2_135M,
    TINY,
    Shape,
    id_tokenizer,
    language_model,
)
from stars_fast.models import selfcheck

SHAPES: dict[str, tuple[Shape, torch.dtype]] = {
    "135M": (SMOLLM2_135M, torch.float32),
    "1B": (ONE_BILLION, torch.bfloat16),
    "tiny": (TINY, torch.float32),
}
IDS = [5, 6, 7]


@pytest.mark.sizes("size", full=["135M", "1B"], small=["tiny"])
def test_start_up(compare: Compare, size: str, device: torch.device, tmp_path: Path) -> None:
    """A language model and its tokenizer."""
    shape, dtype = SHAPES[size]
    language_model(shape, dtype=dtype).save_pretrained(tmp_path)
    id_tokenizer(shape).save_pretrained(tmp_path)

    def load() -> Any:  # noqa: ANN401 - a model of transformers
        AutoTokenizer.from_pretrained(tmp_path)
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        return model.to(device)

    @torch.inference_mode()
    def load_and_run() -> int:
        ids = torch.tensor([IDS], device=device)
        return int(load()(input_ids=ids).logits[0, -1].argmax())

    def engine() -> Engine:
        selfcheck._PASSED.clear()  # as in a process of its own
        return Engine(str(tmp_path))

    params = StarsParams(method="vanilla", temperature=0.0, max_tokens=1)
    (output,) = engine().generate([IDS], params, use_tqdm=False)
    assert output.outputs[0].token_ids == [load_and_run()]
    compare(
        engine,
        {"from_pretrained": load, "from_pretrained, one token": load_and_run},
        work={"parameters": sum(x.numel() for x in load().parameters())},
        repeats=5,
        budget=60.0,
    )
