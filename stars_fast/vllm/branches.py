"""Which blocks of vLLM's cache a segment begins on, and which are needed no longer.

branch
    A segment that was or is being drawn, with the tokens before it; its blocks hold their keys and
    values, except those of the last token, which no step has been fed yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class Branch(Protocol):
    """A branch as it is looked at here."""

    @property
    def prefix(self) -> int:
        """Tokens before the segment."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens before the segment and those drawn so far."""
        ...

    @property
    def computed(self) -> int:
        """Leading tokens whose keys and values are in its blocks, or are before the next step."""
        ...


BranchT = TypeVar("BranchT", bound=Branch)


def best_base(branches: Iterable[BranchT], prompt: Sequence[int]) -> tuple[BranchT | None, int]:
    """Return the branch whose blocks hold most of a prompt, and how many of its tokens.

    At most all but the last one, which must be fed for the first token to be drawn. None and 0: no
    branch holds any.
    """
    best, most = None, 0
    for branch in branches:
        held = _held(branch, prompt)
        if held > most:
            best, most = branch, held
    return best, most


def _held(branch: Branch, prompt: Sequence[int]) -> int:
    """Return how many leading tokens of a prompt the blocks hold: to its end, or to the prefix."""
    known = min(len(branch.tokens) - 1, branch.computed, len(prompt) - 1)
    for length in (known, min(branch.prefix, known)):
        if branch.tokens[:length] == prompt[:length]:
            return length
    return 0


def outdated(branches: Iterable[BranchT], prompts: Sequence[Sequence[int]]) -> list[BranchT]:
    """Return the branches that no segment to be drawn now or later begins with.

    One that ends where a prompt ends was accepted. One that began there may still be, as the best
    of the attempts that were rejected.
    """
    return [
        branch
        for branch in branches
        if not any(
            prompt == branch.tokens[: len(prompt)]
            and len(prompt) in (branch.prefix, len(branch.tokens))
            for prompt in prompts
        )
    ]
