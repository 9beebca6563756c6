"""Where requests come from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stars_fast.cli.lines import PipeLines, ReadLine, Requests, opened_input
from stars_fast.params import StarsParams
from stars_fast.records import InputRecord, LineError
from stars_fast.seeds import derive_seed

BASE = StarsParams(target_reward=1.0)


def line(text: str, **params: object) -> bytes:
    return json.dumps({"prompt": text, "params": params}).encode() + b"\n"


def of(*lines: bytes) -> ReadLine:
    rest = iter(lines)
    return lambda wait: next(rest, b"")


def everything(requests: Requests) -> list[InputRecord | LineError]:
    items = []
    while (item := requests.take(wait=True)) is not None:
        items.append(item)
    assert requests.ended
    return items


@contextmanager
def pipe() -> Iterator[tuple[PipeLines, int]]:
    reader, writer = os.pipe()
    try:
        yield PipeLines(reader), writer
    finally:
        os.close(reader)


def test_a_pipe_gives_lines_as_they_come() -> None:
    with pipe() as (read_line, writer):
        assert read_line(False) is None
        os.write(writer, b"one\ntwo\nthr")
        assert read_line(False) == b"one\n"
        assert read_line(True) == b"two\n"
        assert read_line(False) is None
        os.write(writer, b"ee\n\nlast")
        assert read_line(False) == b"three\n"
        assert read_line(False) == b"\n"
        assert read_line(False) is None
        os.close(writer)
        assert read_line(False) == b"last"
        assert read_line(False) == b""
        assert read_line(True) == b""


def test_a_line_longer_than_a_pipe_holds(tmp_path: Path) -> None:
    long = b"x" * 300_000 + b"\n"
    path = tmp_path / "long"
    path.write_bytes(long + b"y\n")
    with path.open("rb") as file:
        read_line = PipeLines(file.fileno())
        assert [read_line(True) for _ in range(3)] == [long, b"y\n", b""]


def test_a_file_and_prompts_give_the_same_requests(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a\\nb"}\n{"prompt": "c"}\n')
    with opened_input(path, []) as read_line:
        from_file = everything(Requests(read_line, BASE, 0))
    with opened_input(None, ["a\nb", "c"]) as read_line:
        assert everything(Requests(read_line, BASE, 0)) == from_file
    assert [item.prompt for item in from_file if isinstance(item, InputRecord)] == ["a\nb", "c"]


def test_lines_are_counted_as_in_an_editor() -> None:
    items = everything(Requests(of(b"\n", line("a"), b"  \n", b"oops\n", line("b")), BASE, 0))
    assert [item.line for item in items] == [2, 4, 5]
    assert [isinstance(item, LineError) for item in items] == [False, True, False]


def test_seeds_follow_from_the_run_and_the_line_alone() -> None:
    first = everything(Requests(of(line("a"), line("b", seed=7), line("a")), BASE, 0))
    again = everything(Requests(of(line("z"), line("z"), line("z")), BASE, 0))
    other = everything(Requests(of(line("a")), BASE, 1))
    seeds = [item.params.seed for item in first if isinstance(item, InputRecord)]
    assert seeds == [derive_seed(0, 1), 7, derive_seed(0, 3)]
    assert isinstance(again[2], InputRecord)
    assert again[2].params.seed == seeds[2]
    assert isinstance(other[0], InputRecord)
    assert other[0].params.seed not in seeds


def test_peeked_requests_stay() -> None:
    lines = (line("a"), b"oops\n", line("b"), line("c"))
    requests = Requests(of(*lines), BASE, 0)
    assert [item.prompt for item in requests.peek(2)] == ["a", "b"]
    assert not requests.ended
    # As text: an error has no equality of its own.
    assert [str(item) for item in everything(requests)] == [
        str(item) for item in everything(Requests(of(*lines), BASE, 0))
    ]
    requests = Requests(of(*lines), BASE, 0)
    assert len(requests.peek(100)) == 3
    assert not requests.ended
    assert len(everything(requests)) == 4


def test_nothing_yet_is_not_the_end() -> None:
    answers = iter([None, b"\n", None, line("a"), b""])
    requests = Requests(lambda wait: next(answers), BASE, 0)
    assert requests.take(wait=False) is None
    assert not requests.ended
    assert requests.take(wait=False) is None
    assert not requests.ended
    assert isinstance(requests.take(wait=False), InputRecord)
    assert requests.take(wait=False) is None
    assert requests.ended


def test_stop_drops_what_was_peeked() -> None:
    requests = Requests(of(line("a"), line("b")), BASE, 0)
    requests.peek(1)
    requests.stop()
    assert requests.ended
    assert requests.take(wait=True) is None


@pytest.mark.parametrize("target", [None, "auto"])
def test_a_line_can_ask_for_the_calibrated_target_only_if_there_is_one(target: object) -> None:
    (item,) = everything(Requests(of(line("a", target_reward=target)), BASE, 0))
    assert isinstance(item, LineError)
    assert "--target-reward auto" in str(item)
    calibrating = StarsParams(target_reward="auto")
    (item,) = everything(Requests(of(line("a", target_reward=target)), calibrating, 0))
    assert isinstance(item, InputRecord)
    for base in (BASE, calibrating):
        (item,) = everything(Requests(of(line("a", method="vanilla")), base, 0))
        assert isinstance(item, InputRecord)


def test_pictures_stand_before_each_prompt() -> None:
    with opened_input(None, ["Which cat?", "Why?"], ["a.png", "b.png"]) as read_line:
        records = everything(Requests(read_line, BASE, 0))
    parts = [record.prompt[0]["content"] for record in records]  # type: ignore[union-attr, index]
    images = [{"type": "image", "image": name} for name in ("a.png", "b.png")]
    texts = [{"type": "text", "text": text} for text in ("Which cat?", "Why?")]
    assert parts == [[*images, text] for text in texts]
