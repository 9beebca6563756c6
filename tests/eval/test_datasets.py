"""Prompts and preferences in the layouts that people have."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stars_fast.eval.datasets import Item, RecordError, read_items

CHOSEN = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because."
REJECTED = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: No."
PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_lines_as_generate_reads_them(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    path = lines(
        tmp_path / "in",
        {"prompt": "a", "id": 7},
        {"messages": messages},
        {"prompt_token_ids": [1, 2]},
    )
    path.write_text("\n" + path.read_text())
    items = read_items(path)
    assert items == [Item(2, "a"), Item(3, messages), Item(4, [1, 2])]
    assert read_items(path, limit=2) == items[:2]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_hh_prompts_end_with_the_last_assistant(tmp_path: Path, name: str) -> None:
    text = json.dumps({"chosen": CHOSEN, "rejected": REJECTED}) + "\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert read_items(path) == [Item(1, PROMPT, " Because.", " No.")]


def test_hh_turns_become_messages(tmp_path: Path) -> None:
    path = lines(tmp_path / "in", {"chosen": CHOSEN, "rejected": REJECTED})
    (item,) = read_items(path, chat=True)
    assert item.prompt == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    assert (item.chosen, item.rejected) == (" Because.", " No.")


def test_dialogues_that_part_earlier_are_no_pair(tmp_path: Path) -> None:
    other = REJECTED.replace("Why?", "How?")
    path = lines(tmp_path / "in", {"chosen": CHOSEN, "rejected": other})
    assert read_items(path) == [Item(1, PROMPT)]


def test_preferences_with_a_prompt_apart(tmp_path: Path) -> None:
    path = lines(tmp_path / "in", {"prompt": "p", "chosen": "good", "rejected": "bad"})
    assert read_items(path) == [Item(1, "p", "good", "bad")]


def test_alpaca_eval_as_a_list(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    record = {"instruction": "Do it", "output": "Done", "generator": "x", "dataset": "y"}
    path.write_text(json.dumps([record, record], indent=2))
    assert read_items(path) == [Item(1, "Do it"), Item(2, "Do it")]
    (item,) = read_items(path, chat=True, limit=1)
    assert item.prompt == [{"role": "user", "content": "Do it"}]


def test_answers(tmp_path: Path) -> None:
    records = [{"prompt": "1/2?", "answer": "0.5"}, {"prompt": "6 * 7?", "answer": 42}]
    path = lines(tmp_path / "in", *records)
    assert [item.answer for item in read_items(path, chat=True)] == ["0.5", "42"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no record"),
        ("{", "record 1: not JSON"),
        ("[1,", "not JSON"),
        ("[1]", "record 1: expected a JSON object, got 1"),
        (
            '{"text": "x"}',
            "record 1: its keys, text, are those of no layout; the layouts are jsonl",
        ),
        ('{"prompt": "x"}\n{"prompt": ""}', "record 2: prompt must be text that is not empty"),
        ('{"prompt": "x", "params": {}}', "unknown key 'params'.*belong to the methods"),
        ('{"prompt": "x", "answer": true}', "answer must be text or a number, got true"),
        ('{"prompt": "x", "answer": " "}', "answer must be text or a number"),
        ('{"chosen": "x", "rejected": "y"}', "record 1: chosen has no turn"),
        ('{"chosen": "x"}', "record 1: rejected must be text, got null"),
        ('{"instruction": ""}', "record 1: instruction is empty"),
        ('{"instruction": "x"}\n{"prompt": "y"}', "record 2: instruction must be text"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "in"
    path.write_text(text)
    with pytest.raises(RecordError, match=message):
        read_items(path)


def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    whole = gzip.compress(b'{"prompt": "x"}\n' * 100)
    for content in (whole[:-12], b"plain", whole[:12] + b"~" * 20):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="in.jsonl.gz is not a whole gzip file"):
            read_items(path)
