"""Input lines, output lines, and an output file read back by a resumed run."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stars_fast.outputs import Attempt, CompletionOutput, RequestOutput, Segment
from stars_fast.params import StarsParams
from stars_fast.records import (
    InputRecord,
    LineError,
    error_record,
    parse_line,
    read_done,
    result_record,
    write_record,
)

BASE = StarsParams(target_reward=1.0)


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ({"prompt": "Hello"}, "Hello"),
        ({"prompt_token_ids": [3, 0]}, [3, 0]),
        (
            {"messages": [{"role": "user", "content": ""}]},
            [{"role": "user", "content": ""}],
        ),
    ],
)
def test_the_three_kinds_of_prompt(line: dict[str, Any], prompt: object) -> None:
    record = parse_line(json.dumps(line).encode() + b"\n", 4, BASE)
    assert record == InputRecord(4, None, prompt, BASE)  # type: ignore[arg-type]


def test_id_and_params() -> None:
    raw = b'{"id": "a", "prompt": "x", "params": {"top_k": 3, "stop": ["."], "seed": 9}}'
    record = parse_line(raw, 1, BASE)
    assert record is not None
    assert record.id == "a"
    assert record.params == StarsParams(target_reward=1.0, top_k=3, stop=["."], seed=9)


@pytest.mark.parametrize("raw", [b"", b"\n", b"  \r\n", b"\xef\xbb\xbf\n"])
def test_blank_lines_are_none(raw: bytes) -> None:
    assert parse_line(raw, 1, BASE) is None


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert parse_line(b'\xef\xbb\xbf{"prompt": "x"}\r\n', 1, BASE) is not None


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not JSON"),
        (b"hello", "not JSON"),
        (b'"hello"', 'expected a JSON object, got "hello"'),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "not UTF-8"),
        (b"[" * 100_000, "too deeply"),
        (b'{"prompt": "x", "promt": 1}', "unknown key 'promt'"),
        (b'{"id": 1}', "got none of them"),
        (b'{"prompt": "x", "messages": []}', "got prompt and messages"),
        (b'{"prompt": ""}', "prompt must be text that is not empty"),
        (b'{"prompt": 3}', "prompt must be text"),
        (b'{"prompt_token_ids": []}', "prompt_token_ids must be a list"),
        (b'{"prompt_token_ids": [1, -1]}', "integers of at least 0, got -1"),
        (b'{"prompt_token_ids": [true]}', "integers of at least 0, got true"),
        (b'{"messages": []}', "messages must be a list"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content must be text"),
        (b'{"messages": [{"role": "user", "content": 1}]}', r"messages\[0\].content must be text"),
        (b'{"prompt": "x", "id": 1.5}', "id must be text or an integer"),
        (b'{"prompt": "x", "id": true}', "id must be text or an integer"),
        (b'{"prompt": "x", "params": [1]}', "params must be an object"),
        (b'{"prompt": "x", "params": {"topk": 1}}', "unknown parameter 'topk'"),
        (b'{"prompt": "x", "params": {"max_tokens": 0}}', "max_tokens must be at least 1, got 0"),
        (b'{"prompt": "x", "params": {"beta": NaN}}', "beta must be finite"),
        (b'{"prompt": "x", "params": {"top_k": "3"}}', "top_k must be an integer"),
    ],
)
def test_malformed_lines_are_reported_by_number(raw: bytes, reason: str) -> None:
    with pytest.raises(LineError, match=f"^input line 12: .*{reason}") as caught:
        parse_line(raw, 12, BASE)
    assert caught.value.line == 12
    assert len(str(caught.value)) < 600


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with contextlib.suppress(LineError):
        parse_line(raw, 1, BASE)


REQUEST = InputRecord(2, "b", [{"role": "user", "content": "Hé"}], BASE)
OUTPUT = RequestOutput(
    "2",
    "Hé",
    [5, 6],
    [
        CompletionOutput(
            0,
            "good",
            [7, 8, 9],
            [-0.1, -0.2, -0.3],
            1.5,
            "stop",
            [
                Segment(0, 2, 0.5, 0.75, 3, "test", (Attempt(1, (4, 4), -1.0),)),
                Segment(2, 3, 1.5, math.nan, 20, "fallback"),
            ],
        )
    ],
    finished=True,
)


def test_a_result_record() -> None:
    assert result_record(REQUEST, OUTPUT) == {
        "id": "b",
        "line": 2,
        "prompt": [{"role": "user", "content": "Hé"}],
        "outputs": [
            {
                "index": 0,
                "text": "good",
                "token_ids": [7, 8, 9],
                "reward": 1.5,
                "finish_reason": "stop",
                "segments": [
                    {
                        "start": 0,
                        "end": 2,
                        "reward": 0.5,
                        "threshold": 0.75,
                        "attempts": 3,
                        "accepted": "test",
                        "rejected": [{"number": 1, "token_ids": [4, 4], "reward": -1.0}],
                    },
                    {
                        "start": 2,
                        "end": 3,
                        "reward": 1.5,
                        "threshold": None,
                        "attempts": 20,
                        "accepted": "fallback",
                    },
                ],
            }
        ],
        "error": None,
    }


def test_records_are_one_line_each() -> None:
    stream = io.BytesIO()
    write_record(stream, result_record(REQUEST, OUTPUT))
    write_record(stream, error_record(3, None, "bad\nline"))
    first, second, rest = stream.getvalue().split(b"\n")
    assert json.loads(first) == result_record(REQUEST, OUTPUT)
    assert json.loads(second) == {
        "id": None,
        "line": 3,
        "prompt": None,
        "outputs": [],
        "error": "bad\nline",
    }
    assert rest == b""


def request(line: int) -> InputRecord:
    return InputRecord(line, f"id{line}", f"prompt {line}", BASE)


def result(line: int, error: str | None = None) -> bytes:
    stream = io.BytesIO()
    output = RequestOutput(str(line), None, [1], [CompletionOutput(0, "é" * line)], True, error)
    write_record(stream, result_record(request(line), output))
    return stream.getvalue()


def test_no_file_is_nothing_done(tmp_path: Path) -> None:
    assert len(read_done(tmp_path / "none.jsonl")) == 0


def test_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(3) + result(1))
    done = read_done(path)
    assert len(done) == 2
    assert [done.has(request(line)) for line in (1, 2, 3)] == [True, False, True]
    assert path.read_bytes() == result(3) + result(1)


def test_a_line_torn_anywhere_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    last = result(2)
    for length in range(len(last) - 1):
        path.write_bytes(result(1) + last[:length])
        done = read_done(path)
        assert (done.has(request(1)), done.has(request(2))) == (True, False)
        assert path.read_bytes() == result(1)


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(1) + result(2)[:-1])
    assert len(read_done(path)) == 2
    assert path.read_bytes() == result(1) + result(2)


def test_a_file_with_nothing_but_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(1)[:20])
    assert len(read_done(path)) == 0
    assert path.read_bytes() == b""


def test_errors_are_dropped_to_run_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    stream = io.BytesIO()
    write_record(stream, error_record(4, None, "not JSON"))
    path.write_bytes(result(1) + stream.getvalue() + result(2) + result(3, "failed") + b'{"id"')
    done = read_done(path)
    assert [done.has(request(line)) for line in (1, 2, 3, 4)] == [True, True, False, False]
    assert path.read_bytes() == result(1) + result(2)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("other", [b"{\n", b"[]\n", b'{"id": 1}\n', b'{"prompt": "x"}\n'])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, other: bytes) -> None:
    path = tmp_path / "out.jsonl"
    content = result(1) + other + result(2)[:9]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"out.jsonl, line 2, is not a result"):
        read_done(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "other",
    [InputRecord(1, "id1", "another prompt", BASE), InputRecord(1, None, "prompt 1", BASE)],
)
def test_the_output_of_another_input_is_refused(tmp_path: Path, other: InputRecord) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(1))
    with pytest.raises(ValueError, match="input line 1 with another id or prompt"):
        read_done(path).has(other)
