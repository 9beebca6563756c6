"""The TRL trainers in small: what they are fed, that they learn, and that the engine takes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import train_dpo
import train_sft
import trl_training
from train_dpo import DpoSettings
from train_sft import SftSettings

from stars_fast import Engine, StarsParams, demo

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="trl is not installed: pip install -c constraints.txt '.[train]'",
)
# Warnings are TRL's and its dependencies' here, not ours.
trl_test = pytest.mark.filterwarnings("default")


def test_without_trl_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_training, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -c constraints.txt '\.\[train\]'"):
        trl_training.require_trl()


@needs_trl
@trl_test
def test_trainers_write_models_that_the_engine_takes(tmp_path: Path) -> None:
    settings = SftSettings(pairs=16, batch_size=8, epochs=2.0)
    train_sft.train(settings, tmp_path / "sft")
    train_sft.train(settings, tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("sft", "again")]
    assert weights[0] == weights[1]
    dpo = DpoSettings(model=str(tmp_path / "sft"), pairs=16, batch_size=8, epochs=2.0)
    train_dpo.train(dpo, tmp_path / "dpo")
    texts = []
    for directory in (demo.model_dir(), tmp_path / "sft", tmp_path / "dpo"):
        engine = Engine(directory, demo.reward_model_dir())
        params = StarsParams(method="vanilla", temperature=0.0, max_tokens=8)
        (output,) = engine.generate("Review of the film:", params, use_tqdm=False)
        assert output.error is None
        texts.append(output.outputs[0].logprobs)
    assert texts[0] != texts[1] != texts[2]


@needs_trl
@trl_test
def test_trl_sees_the_tokens_that_the_engine_draws(tmp_path: Path) -> None:
    from datasets import Dataset
    from loading import load_lm
    from preferences import preference_pairs
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    (pair,) = preference_pairs(1)
    model, tokenizer = load_lm(demo.model_dir())
    start = tokenizer(pair.prompt)["input_ids"]
    chosen, rejected = (
        [*tokenizer(review.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for review in (pair.chosen, pair.rejected)
    )
    arguments = trl_training.common_arguments(
        seed=0, batch_size=1, rate=1e-4, epochs=1.0, folder=str(tmp_path)
    )
    rows = [{"prompt": pair.prompt, "completion": pair.chosen.response}]
    sft = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(sft.get_train_dataloader()))
    length = len(start) + len(chosen)
    assert batch["input_ids"][0, :length].tolist() == [*start, *chosen]
    assert batch["labels"][0, :length].tolist() == [-100] * len(start) + chosen
    rows = [
        {
            "prompt": pair.prompt,
            "chosen": pair.chosen.response,
            "rejected": pair.rejected.response,
        }
    ]
    dpo = DPOTrainer(
        model=model,
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    (example,) = dpo.train_dataset
    assert example["prompt_ids"] == start
    assert (example["chosen_ids"], example["rejected_ids"]) == (chosen, rejected)
