"""What is called of flash-attn and of PyTorch is there under these names.

flash-attn has no wheel for a CPU, so its source is read: that of the installed package, or the
archive that the environment variable STARS_FLASH_ATTN names, or PyPI's, kept in pytest's cache.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import sys
import tarfile
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from stars_fast.models.varlen_forms import Texts, by_flash, by_torch
from stars_fast.ops.attention import AttentionOptions

VERSION = "2.8.3"
_FUNCTION = "flash_attn_varlen_func"
_PYTHON, _CPP = "flash_attn/flash_attn_interface.py", "csrc/flash_attn/flash_api.cpp"


def _archive(folder: Path) -> Path:
    """Return flash-attn's source archive; skip the test where there is none."""
    if named := os.environ.get("STARS_FLASH_ATTN"):
        return Path(named)
    kept = folder / f"flash_attn-{VERSION}.tar.gz"
    if not kept.is_file():
        try:
            index = urllib.request.Request("https://pypi.org/simple/flash-attn/")
            index.add_header("Accept", "application/vnd.pypi.simple.v1+json")
            with urllib.request.urlopen(index, timeout=5) as found:
                (url,) = (x["url"] for x in json.load(found)["files"] if x["filename"] == kept.name)
            with urllib.request.urlopen(url, timeout=20) as found:
                part = kept.with_suffix(".part")
                part.write_bytes(found.read())
                part.replace(kept)
        except OSError as error:
            pytest.skip(f"no source of flash-attn {VERSION} from PyPI: {error}")
    return kept


@pytest.fixture(scope="module")
def sources(pytestconfig: pytest.Config) -> dict[str, str]:
    """Its Python interface, and its C++ one where that is to be had."""
    installed = importlib.util.find_spec("flash_attn")
    if installed is not None and installed.origin is not None:
        text = Path(installed.origin).with_name("flash_attn_interface.py").read_text("utf-8")
        return {_PYTHON: text}
    archive = _archive(pytestconfig.cache.mkdir("flash_attn"))  # type: ignore[union-attr]
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.partition("/")[2]
            if name in (_PYTHON, _CPP):
                held = files.extractfile(member)
                assert held is not None
                found[name] = held.read().decode("utf-8")
    return found


def test_flash_attn_s_function(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, their meaning, and what it returns."""
    tree = ast.parse(sources[_PYTHON])
    (function,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == _FUNCTION)
    names = [x.arg for x in (*function.args.args, *function.args.kwonlyargs)]
    asked: dict[str, object] = {}

    def called(*_: Tensor, **options: object) -> tuple[Tensor, Tensor, None]:
        asked.update(options)
        return torch.zeros(3, 2, 8), torch.zeros(2, 3), None

    package = ModuleType("flash_attn")
    setattr(package, _FUNCTION, called)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    three = [torch.zeros(3, 2, 8)] * 3
    by_flash(*three, Texts.of([3], torch.device("cpu")), AttentionOptions(1.0))
    assert names[:3] == ["q", "k", "v"]
    assert asked.keys() <= set(names[3:])
    (forward,) = (
        item
        for x in tree.body
        if isinstance(x, ast.ClassDef) and x.name == "FlashAttnVarlenFunc"
        for item in x.body
        if isinstance(item, ast.FunctionDef) and item.name == "forward"
    )
    returned = [
        ast.unparse(x.value) for x in ast.walk(forward) if isinstance(x, ast.Return) and x.value
    ]
    assert returned == ["out if not return_softmax else (out, softmax_lse, S_dmask)"]
    text = ast.get_docstring(function) or ""
    assert "softmax_lse [optional, if return_attn_probs=True]: (nheads, total_q_seqlen)" in text
    assert "[i + seqlen_k - seqlen_q - window_size[0], i + seqlen_k" in text


def test_flash_attn_s_kernels(sources: dict[str, str]) -> None:
    """Heads come before tokens in log-sum-exps, and texts of one token have a path of their own."""
    if _CPP not in sources:
        pytest.skip("the installed package has no C++ source")
    body = sources[_CPP].partition("\nmha_varlen_fwd(")[2].partition("\nvoid run_mha_bwd(")[0]
    assert "softmax_lse = torch::empty({num_heads, total_q}" in body
    assert re.search(r"seqlenq_ngroups_swapped = max_seqlen_q == 1 &&", body)
    assert "head_size <= 256" in body
    assert body.count("CHECK_SHAPE(v, total_k, num_heads_k, head_size)") == 1


def test_pytorch_s_function() -> None:
    """On tensors without data; PyTorch's page of it has the log-sum-exps the other way round."""
    query = torch.empty((9, 4, 8), device="meta", dtype=torch.bfloat16)
    key, value = (torch.empty((9, 2, 8), device="meta", dtype=torch.bfloat16) for _ in range(2))
    texts = Texts([5, 4], torch.empty(3, device="meta", dtype=torch.int32))
    with torch.inference_mode():
        out, lse = by_torch(query, key, value, texts, AttentionOptions(0.3, 4))
    assert (out.shape, out.dtype) == ((9, 4, 8), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((4, 9), torch.float32)
