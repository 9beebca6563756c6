"""docs/rewards.md says of every kind what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from stars_fast import RewardHead
from stars_fast.rewards.head import HEAD_NAMES
from stars_fast.rewards.kinds import KINDS

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, head and rule left out."""
    lines = TEXT.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    found = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_the_table_has_each_kind_in_the_order_of_asking() -> None:
    assert [row[0] for row in rows("Directories and hub ids")] == [kind.name for kind in KINDS]
    assert all(len(row) == 4 and all(row) for row in rows("Directories and hub ids"))


def test_each_way_to_choose_reads_the_same_from_python_and_as_text() -> None:
    said = set()
    for call, text, _ in rows("Which number: `reward_head`"):
        head = eval(f"RewardHead({call.strip('`')})", {"RewardHead": RewardHead})
        assert RewardHead.of(text.strip("`")) == head
        said |= {field.name for field in fields(RewardHead) if f"{field.name}=" in call}
    assert said == {field.name for field in fields(RewardHead)}


def test_names_of_heads() -> None:
    loaded = TEXT.split("## Loaded models\n")[1].split("\n## ")[0].partition("under the name")[2]
    assert tuple(re.findall(r"`(\w+)`", loaded.partition(", your own")[0])) == HEAD_NAMES
