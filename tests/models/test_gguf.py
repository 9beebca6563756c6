"""A language model from a GGUF file, read by transformers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from stars_fast import Engine, StarsParams, demo
from stars_fast.errors import ModelLoadError
from stars_fast.models.load import load_causal_lm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"needs {package}")
    made = tmp_path_factory.mktemp("gguf")
    script = runpy.run_path(str(ROOT / "scripts" / "demo_gguf.py"))
    script["write"](demo.model_dir(), made / "demo.gguf")
    return made


def test_same_tokens_as_from_the_models_own_files(folder: Path) -> None:
    params = StarsParams(method="vanilla", max_tokens=16, temperature=0)
    prompt = load_causal_lm(demo.model_dir())[1]("The film")["input_ids"]  # type: ignore[misc]
    outputs = [
        Engine(source, gguf_file=file, num_pages=60).generate([prompt], params, use_tqdm=False)[0]
        for source, file in ((str(demo.model_dir()), None), (str(folder), "demo.gguf"))
    ]
    assert outputs[0].error is None
    assert outputs[1].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert outputs[1].outputs[0].text == outputs[0].outputs[0].text


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no file 'other\.gguf'"):
        load_causal_lm(folder, gguf_file="other.gguf")


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stars_fast.models.load.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"'x\.gguf' needs gguf: pip install gguf"):
        load_causal_lm("folder", gguf_file="x.gguf")
