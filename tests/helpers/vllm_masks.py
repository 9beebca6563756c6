"""vLLM's Triton kernel for top-k and top-p in Triton's interpreter, in a process of its own.

    python vllm_masks.py INPUT OUTPUT

INPUT holds ``logits``, ``k`` and ``p`` as `torch.save` writes them; OUTPUT gets the masked logits.

vLLM turns Triton off where no driver is active, so one is said to be, and what comes of that stays
in this process. Its kernel counts rows by `tl.range`, which gives plain integers in the
interpreter: its source is read with that one expression written otherwise.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

_MODULE = "vllm.v1.sample.ops.topk_topp_triton"


def _loaded(folder: Path) -> ModuleType:
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver)  # type: ignore[assignment]
    found = importlib.util.find_spec(_MODULE)
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).read_text("utf-8")
    copy = folder / "topk_topp.py"  # Triton reads a kernel's source from its file
    copy.write_text(text.replace("row_id.to(tl.int64)", "tl.cast(row_id, tl.int64)"), "utf-8")
    spec = importlib.util.spec_from_file_location("topk_topp", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(source: str, target: str) -> None:
    """Mask the logits of a file."""
    import torch

    given = torch.load(source)
    with tempfile.TemporaryDirectory() as folder:
        module = _loaded(Path(folder))
        masked = module.apply_top_k_top_p_triton(given["logits"], given["k"], given["p"])
    torch.save(masked, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
