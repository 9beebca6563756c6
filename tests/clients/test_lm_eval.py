"""lm-eval's models of servers, on tasks of three questions made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.client_programs import program, run

QUESTIONS = [
    {"question": "The film is", "choices": [" good", " a kettle of it"], "answer": 0},
    {"question": "This kettle was", "choices": [" bad", " very good"], "answer": 1},
    {"question": "I bought a phone", "choices": [" and it broke", "."], "answer": 0},
]
GENERATION = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}


@pytest.fixture
def evaluate(served: Any, tmp_path: Path) -> Any:
    """Run one task; returns the samples that lm-eval logs."""
    command = program("lm_eval")
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "question",
        "target_delimiter": "",
    }

    def run_task(model: str, options: dict[str, Any], fields: dict[str, Any]) -> list[Any]:
        body = {**task, **fields, "task": "made_here"}
        (tmp_path / "made_here.yaml").write_text(json.dumps(body))  # JSON is YAML
        arguments = {"model": served.model, "num_concurrent": 2, "max_retries": 1, **options}
        written = ",".join(f"{name}={value}" for name, value in arguments.items())
        run(
            [command, "run", "--model", model, "--model_args", written, "--tasks", "made_here",
             "--include_path", ".", "--output_path", "out", "--log_samples",
             *(["--apply_chat_template"] if "chat" in model else [])],
            cwd=tmp_path, HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "cache"),
        )  # fmt: skip
        (samples,) = tmp_path.glob("out/**/samples_*.jsonl")
        found = [json.loads(line) for line in samples.read_text().splitlines()]
        return sorted(found, key=lambda sample: int(sample["doc_id"]))

    return run_task


def test_choices_have_the_models_own_likelihoods(evaluate: Any, served: Any) -> None:
    options = {
        "base_url": f"{served.url}/v1/completions",
        "tokenizer": served.folder,
    }
    samples = evaluate(
        "local-completions",
        options,
        {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        },
    )
    for question, sample in zip(QUESTIONS, samples, strict=True):
        for choice, (found,) in zip(question["choices"], sample["resps"], strict=True):
            likelihood, greedy = found
            wanted, most_likely = _likelihood(served.folder, question["question"], choice)
            assert float(likelihood) == pytest.approx(wanted, abs=1e-2)
            assert greedy == str(most_likely)


def _likelihood(folder: Path, prompt: str, text: str) -> tuple[float, bool]:
    """log p(text | prompt) by transformers, and whether greedy decoding would say the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = tokenizer(prompt + text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        rows = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    tokens = ids[0, start:]
    value = rows.gather(1, tokens[:, None]).sum()
    return float(value), bool((rows.argmax(-1) == tokens).all())


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("local-completions", "/v1/completions"),
        ("local-chat-completions", "/v1/chat/completions"),
    ],
)
def test_questions_are_answered(model: str, path: str, evaluate: Any, served: Any) -> None:
    options = {"base_url": served.url + path}
    if "chat" not in model:
        options["tokenizer"] = served.folder
    samples = evaluate(
        model,
        options,
        {
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": GENERATION,
            "metric_list": [{"metric": "exact_match"}],
        },
    )
    answers = [sample["resps"][0][0] for sample in samples]
    assert len(answers) == len(QUESTIONS)
    assert all(isinstance(answer, str) for answer in answers)
    assert any(answers)
