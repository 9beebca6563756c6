"""A reward function that a test can hold up."""

from __future__ import annotations

import threading


class Gate:
    """Waits where a test says so, and raises for prompts that begin with a letter."""

    def __init__(self, raises_for: str = "c") -> None:
        self.raises_for = raises_for
        self.open = threading.Event()
        self.open.set()
        self.calls = 0

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return self.reward(prompts, responses)

    def reward(self, prompts: list[str], responses: list[str]) -> list[float]:
        self.calls += 1
        assert self.open.wait(20)
        if self.raises_for and any(prompt.startswith(self.raises_for) for prompt in prompts):
            raise RuntimeError("no reward for c")
        return [float(text.count("a") - text.count("b")) / 2 for text in responses]
