"""Loading a language model, and the errors of directories that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny_architectures import tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.models.files import check_model_directory
from stars_fast.models.load import load_causal_lm, load_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a model and a tokenizer."""
    folder = tmp_path / "lm"
    tiny_lm("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_a_directory(saved: Path) -> None:
    model, tokenizer = load_causal_lm(saved, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer is not None
    assert tokenizer("b a")["input_ids"] == [1, 0]
    want = tiny_lm("llama").state_dict()
    assert all(torch.equal(want[k], v) for k, v in model.state_dict().items())


def test_dtype_and_missing_tokenizer(saved: Path) -> None:
    for path in saved.glob("tokenizer*"):
        path.unlink()
    model, tokenizer = load_causal_lm(str(saved), dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert tokenizer is None


def test_a_tokenizer_alone(saved: Path) -> None:
    assert load_tokenizer(str(saved))("b a")["input_ids"] == [1, 0]
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer of '.*lm': "):
        load_tokenizer(str(saved))


def test_a_loaded_model_is_taken_as_it_is(saved: Path) -> None:
    model = tiny_lm("llama")
    assert load_causal_lm(model) == (model, None)
    assert load_causal_lm(model, dtype="float32", device="cpu")[0] is model
    from_disk = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert load_causal_lm(from_disk)[1] is not None
    with pytest.raises(ValueError, match=r"dtype must be 'auto' or .*float32, got torch\.float16"):
        load_causal_lm(model, dtype=torch.float16)
    with pytest.raises(ValueError, match="device must be None or .* cpu, got meta"):
        load_causal_lm(model, device="meta")
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language-model head"):
        load_causal_lm(model.model)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "a/b/c", "no where", ""])
def test_no_such_directory(name: str) -> None:
    with pytest.raises(ModelLoadError, match="model directory .* does not exist"):
        load_causal_lm(name)


def test_hub_ids_are_not_taken_for_directories() -> None:
    check_model_directory("someone/some-model_1.5")
    check_model_directory("gpt2")


def test_a_file(saved: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a file, not a directory"):
        load_causal_lm(saved / "model.safetensors")


def test_no_configuration(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"lm' has no config\.json"):
        load_causal_lm(saved)


@pytest.mark.parametrize("text", ['{"model_type": "lla', "[]"])
def test_half_a_configuration(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"config\.json' (cannot be read|is not)"):
        load_causal_lm(saved)


def test_unknown_model_type(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ModelLoadError, match="nonesuch"):
        load_causal_lm(saved)


def test_no_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no weights: neither model\.safetensors nor"):
        load_causal_lm(saved)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_weights(saved: Path, cut: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors' is damaged or no safetensors"):
        load_causal_lm(saved)


def test_garbage_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"{{{{")
    with pytest.raises(ModelLoadError, match=r"no safetensors file: .*invalid JSON in header"):
        load_causal_lm(saved)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    tiny_lm("llama").save_pretrained(folder, max_shard_size="20KB")
    load_causal_lm(folder, device="cpu")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (folder / shard).unlink()
    with pytest.raises(ModelLoadError, match=rf"lacks {shard}, which model\.safetensors\.index"):
        load_causal_lm(folder)


def test_missing_tensors(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["num_hidden_layers"] = 4
    config["layer_types"] = None
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"has no weights for model\.layers\.3\..*at random"):
        load_causal_lm(saved)


def test_pickled_weights_only_on_request(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(tiny_lm("llama").state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="allow_pickle=True"):
        load_causal_lm(saved)
    model, _ = load_causal_lm(saved, allow_pickle=True, device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_lm("llama").lm_head.weight)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'t5'.*encoder-decoder"):
        load_causal_lm(tmp_path)


def test_an_encoder(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=61, dim=32, hidden_dim=48, n_layers=1, n_heads=4
    )
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'distilbert'.*no causal language model"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_classifier_is_no_language_model(saved: Path, name: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(UnsupportedModelError, match=f"is a {name}: .*as the reward model"):
        load_causal_lm(saved)


def test_no_bars_off_a_terminal(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()  # commands, run by other tests, disable them
    logging.enable_progress_bar()
    try:
        load_causal_lm(saved)
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled()
    finally:
        if not was_enabled:
            logging.disable_progress_bar()
