"""A method is one record: no file outside of stars_fast/methods asks which one a request has."""

from __future__ import annotations

import ast
from pathlib import Path

import stars_fast
from stars_fast.methods import METHODS

HOME = Path(stars_fast.__file__).parent


def constants(node: ast.expr) -> set[object]:
    """The constants of an operand: itself, or the members of a tuple, list or set."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant)}


def test_no_comparison_of_a_method_s_name() -> None:
    found = []
    for path in HOME.rglob("*.py"):
        room = path.relative_to(HOME).parts[0]
        if room in ("methods", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                operands = [node.left, *node.comparators]
                of_method = any(ast.unparse(operand).endswith("method") for operand in operands)
                if of_method and set().union(*map(constants, operands)) & METHODS.keys():
                    found.append(f"{path.relative_to(HOME)}:{node.lineno}: {ast.unparse(node)}")
    assert not found
