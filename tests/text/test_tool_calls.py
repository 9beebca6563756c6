"""Calls of tools in the text of a response: the same however it is cut into pieces."""

from __future__ import annotations

import pytest

from stars_fast.text.tool_calls import HermesToolCalls, ToolCallText

F = '{"name": "f", "arguments": {"x": "ä"}}'
CALL = ToolCallText("f", '{"x": "ä"}')
NONE = ToolCallText("f", "{}")


def pieces(text: str, size: int, *, single: bool = False) -> tuple[str, list[ToolCallText]]:
    parser = HermesToolCalls(single=single)
    content, calls = "", []
    for at in range(0, len(text), size):
        more, found = parser.push(text[at : at + size], finished=False)
        content += more
        calls += found
    more, found = parser.push("", finished=True)
    assert parser.count == len([*calls, *found])
    return content + more, calls + found


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Fine.", "Fine.", []),
        (f"<tool_call>\n{F}\n</tool_call>", "", [CALL]),
        (f"Look: <tool_call>{F}</tool_call>\n<tool_call>{F}</tool_call>\n", "Look: ", [CALL] * 2),
        (f"<tool_call>{F}</tool_call> So it is.", "So it is.", [CALL]),
        ('<tool_call>{"name": "f"}', "", [NONE]),
        ("<tool_call>f(1)</tool_call> x", "<tool_call>f(1)</tool_call> x", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
        ("a < b <tool", "a < b <tool", []),
    ],
)
def test_calls(text: str, content: str, calls: list[ToolCallText]) -> None:
    for size in (1, 2, 5, 100):
        assert pieces(text, size) == (content, calls)


def test_text_is_not_held_back() -> None:
    parser = HermesToolCalls()
    assert parser.push("a < b ", finished=False) == ("a < b ", [])
    assert parser.push("<tool", finished=False) == ("", [])
    assert parser.push("s", finished=False) == ("<tools", [])


def test_a_single_call() -> None:
    twice = f"<tool_call>{F}</tool_call>" * 2
    assert pieces(twice, 3, single=True) == ("", [CALL])
