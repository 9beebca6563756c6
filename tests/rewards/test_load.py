"""What is refused at load, and that the message says what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_rewards import ENCODER_CONFIGS, plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer, encoder_tokenizer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from stars_fast.errors import ModelLoadError, UnsupportedModelError
from stars_fast.rewards import Prompt, ScoreJob, Scorer, load_scorer
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.encoder import EncoderScorer

LM = bpe_tokenizer(400)
PROMPT = Prompt("It costs", LM("It costs")["input_ids"], None)


def saved(folder: Path, model: PreTrainedModel, tokenizer: Any = LM) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def load(source: Any, **options: Any) -> Scorer:
    return load_scorer(source, lm_tokenizer=LM, **{"num_pages": 50, **options})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("as_text", [True, False])
def test_directory(tmp_path: Path, as_text: bool) -> None:
    model = reward_model("llama", LM)
    folder = saved(tmp_path, model)
    scorer = load(str(folder) if as_text else folder)
    assert isinstance(scorer, CausalScorer)
    assert not scorer.needs_text  # the tokenizer is the language model's
    scorer.start(0, PROMPT, 10)
    (reward,) = scorer.score([ScoreJob(0, 0, [50, 51], "")])
    assert reward == pytest.approx(plain_reward(model, [*PROMPT.token_ids, 50, 51]), abs=1e-4)


@pytest.mark.parametrize("family", ENCODER_CONFIGS)
def test_encoder_directory(tmp_path: Path, family: str) -> None:
    tokenizer = encoder_tokenizer()
    scorer = load(saved(tmp_path, reward_model(family, tokenizer), tokenizer))
    assert isinstance(scorer, EncoderScorer)
    assert scorer.needs_text


def test_half_precision_directory(tmp_path: Path) -> None:
    folder = saved(tmp_path, reward_model("llama", LM).to(torch.bfloat16))
    for dtype, tolerance in (("auto", 0.1), (torch.float32, 1e-4)):
        scorer = load(folder, dtype=dtype)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        scorer.start(0, PROMPT, 10)
        (reward,) = scorer.score([ScoreJob(0, 0, [50, 51], "")])
        want = plain_reward(model, [*PROMPT.token_ids, 50, 51])
        assert reward == pytest.approx(want, abs=tolerance)


def test_loaded_model_finds_its_tokenizer_and_is_put_in_eval_mode(tmp_path: Path) -> None:
    folder = saved(tmp_path, reward_model("llama", LM, attention_dropout=0.5))
    model = AutoModelForSequenceClassification.from_pretrained(folder).train()
    scorer = load(model)
    assert not model.training
    assert not scorer.needs_text


def test_model_made_in_memory_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="made in memory.*pass reward_tokenizer"):
        load(reward_model("llama", LM))


def test_language_model_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the language model's tokenizer"):
        load_scorer(reward_model("llama", LM), lm_tokenizer=None, reward_tokenizer=LM)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_damaged_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path, reward_model("llama", LM))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        load(folder)


def test_pickled_weights_only_if_asked_for(tmp_path: Path) -> None:
    model = reward_model("llama", LM)
    folder = saved(tmp_path, model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="allow_pickle=True"):
        load(folder)
    assert isinstance(load(folder, allow_pickle=True), CausalScorer)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "gemma2"])
def test_missing_tokenizer(tmp_path: Path, family: str) -> None:
    # transformers makes up a tokenizer without vocabulary for some families.
    folder = saved(tmp_path, reward_model(family, LM), None)
    with pytest.raises(ModelLoadError, match=r"no tokenizer.*pass reward_tokenizer"):
        load(folder)
    assert isinstance(load(folder, reward_tokenizer=LM), CausalScorer)


@pytest.mark.parametrize("family", ENCODER_CONFIGS)
def test_missing_tokenizer_of_an_encoder(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path, reward_model(family, encoder_tokenizer()), None)
    with pytest.raises(ModelLoadError, match=r"no tokenizer.*pass reward_tokenizer"):
        load(folder)


def test_language_model_as_reward_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    folder = saved(tmp_path, LlamaForCausalLM(config))
    with pytest.raises(UnsupportedModelError, match=r"is a language model \(LlamaForCausalLM\)"):
        load(folder)
    with pytest.raises(UnsupportedModelError, match=r"reward_head=RewardHead\(token="):
        load(LlamaForCausalLM(config).eval(), reward_tokenizer=LM)


def test_head_size(tmp_path: Path) -> None:
    model = reward_model("llama", LM, num_labels=2)
    with pytest.raises(UnsupportedModelError, match=r"2 labels \(LABEL_0, .*RewardHead\(label"):
        load(model, reward_tokenizer=LM)
    with pytest.raises(UnsupportedModelError, match=r"2 labels \(LABEL_0, .*RewardHead\(label"):
        load(saved(tmp_path, model))


def test_head_with_more_weights_than_are_read(tmp_path: Path) -> None:
    model = reward_model("llama", LM)
    model.score = nn.Linear(32, 1, bias=True)
    with pytest.raises(ModelLoadError, match=r"does not read \(score\.bias\)"):
        load(saved(tmp_path, model))
    # Loaded with its bias by the user's own means, it is a linear head like any other.
    scorer = load(model, reward_tokenizer=LM)
    scorer.start(0, PROMPT, 10)
    (reward,) = scorer.score([ScoreJob(0, 0, [50], "")])
    assert reward == pytest.approx(plain_reward(model, [*PROMPT.token_ids, 50]), abs=1e-4)


def test_heads_that_are_no_function_of_the_last_token() -> None:
    class Capped(LlamaForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (torch.tanh(super().forward(*args, **kwargs)[0]),)

    capped = Capped(reward_model("llama", LM).config).eval()
    capped.load_state_dict(reward_model("llama", LM).state_dict())
    with pytest.raises(UnsupportedModelError, match="Capped is not its layer 'score' applied"):
        load(capped, reward_tokenizer=LM)


def test_remote_code(tmp_path: Path) -> None:
    folder = saved(tmp_path, reward_model("llama", LM))
    edit_config(
        folder,
        architectures=["LlamaForRewardModelWithGating"],
        auto_map={"AutoModelForSequenceClassification": "modeling_custom.LlamaWithGating"},
    )
    with pytest.raises(
        UnsupportedModelError,
        match=r"LlamaForRewardModelWithGating, which needs its own remote code: pass as reward_mod",
    ):
        load(folder)


def test_families_without_a_classifier_and_unknown_families(tmp_path: Path) -> None:
    folder = saved(tmp_path, reward_model("llama", LM))
    edit_config(folder, model_type="vit", architectures=["ViTModel"], hidden_size=64)
    with pytest.raises(UnsupportedModelError, match="no sequence classifier of that family"):
        load(folder)
    edit_config(folder, model_type="no_such_family", architectures=["NoSuchModel"])
    with pytest.raises(ModelLoadError, match="no_such_family"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=400, hidden_size=32, n_layer=1, n_head=2), "ALiBi"),
        (
            BartConfig(
                vocab_size=400, d_model=16, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16,
            ),
            "",
        ),
    ],
)  # fmt: skip
def test_architectures_that_cannot_be_paged(config: Any, reason: str) -> None:
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(
        UnsupportedModelError, match=rf"{type(model).__name__}.*{reason}.*pass as reward_model a f"
    ):
        load(model, reward_tokenizer=LM)


def test_tokenizer_that_does_not_fit() -> None:
    model = reward_model("llama", bpe_tokenizer(340))
    with pytest.raises(ValueError, match="400 tokens.*340 embeddings; pass the tokenizer that"):
        load(model, reward_tokenizer=LM)


def test_template_is_checked_at_load() -> None:
    model = reward_model("llama", LM)
    with pytest.raises(ValueError, match="has none: pass 'plain'"):
        load(model, reward_tokenizer=LM, template="chat")
    with pytest.raises(ValueError, match="'pair' is for bidirectional"):
        load(model, reward_tokenizer=LM, template="pair")
    with pytest.raises(ValueError, match="reward_template must be"):
        load(model, reward_tokenizer=LM, template="no fields")


def test_default_pool_holds_rows_of_full_context() -> None:
    scorer = load(reward_model("llama", LM), reward_tokenizer=LM, num_pages=None, max_rows=4)
    assert scorer.stats()["rm_pages_free"] >= 4 * 256 // 16
