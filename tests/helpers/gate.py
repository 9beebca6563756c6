"""A reward function that a test can hold up."""

from __future__ import annotations

import threading


class Gate:
    """Waits where a test says so, and raises for prompts of c."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.calls = 0

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return self.reward(prompts, responses)

    def reward(self, prompts: list[str], responses: list[str]) -> list[float]:
        self.calls += 1
        assert self.open.wait(20)
        if any(prompt.startswith("c") for prompt in prompts):
            raise RuntimeError("no reward for c")
        return [float(text.count("a") - text.count("b")) / 2 for text in responses]
