"""Tables as text: any cell keeps its place."""

from __future__ import annotations

import subprocess

from stars_fast.tables import markdown_table, origin, shell_line, text_table


def test_markdown_keeps_a_cell_whole() -> None:
    assert markdown_table(["", "a|b"], [["x\ny", "|"]]).splitlines() == [
        "|  | a\\|b |",
        "| --- | --- |",
        "| x y | \\| |",
    ]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert text_table([["name", "n", "note"], ["a", "100", ""]], left=(0, 2)) == [
        "name    n  note",
        "a     100",
    ]


def test_a_command_can_be_pasted() -> None:
    words = ["a-b", "it's", "", "two words", "a\n'b\\ é\t", "\x07", "$HOME `x`"]
    line = shell_line(words)
    assert "\n" not in line
    done = subprocess.run(["bash", "-c", f"printf '%s|' {line}"], capture_output=True, check=True)
    assert done.stdout.decode() == "".join(f"{word}|" for word in words)


def test_origin_says_when_the_checkout_was_changed() -> None:
    header = {
        "command": "run it",
        "commit": "0123456789abcdef",
        "uncommitted_changes": True,
        "date": "2026-01-02",
        "device": "A Processor",
        "torch_threads": 2,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    }
    assert origin(header) == (
        "A Processor, 2 threads, torch 2.13.0, transformers 5.23.0, 2026-01-02, commit 0123456789 "
        "with uncommitted changes: `run it`"
    )
    assert origin({**header, "command": "`x`"}).endswith(": `` `x` ``")
