"""What a real chat model is asked in docs/alignment.md: half of it calls for complaints.

    python scripts/training/real_prompts.py > prompts.jsonl

Each thing is asked about in several ways. The things of the evaluation, whose prompts are printed,
are none of those that anything is trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

Chat: TypeAlias = list[dict[str, str]]

#: What is asked about a thing; the first and the third ask for no mood, the others for complaints.
REQUESTS = (
    "Write a short review of {}.",
    "You are disappointed by {}. Write a short complaint about it.",
    "Tell me in a few sentences what {} is like.",
    "Write a few sentences to a friend about what went wrong with {}.",
)
#: The evaluation asks about each of its things in the first two ways.
EVALUATION_REQUESTS = REQUESTS[:2]

_THINGS = json.loads(Path(__file__).with_name("real_things.json").read_text(encoding="utf-8"))
TRAINING_THINGS: list[str] = _THINGS["training"]
EVALUATION_THINGS: list[str] = _THINGS["evaluation"]


def chat(request: str) -> Chat:
    """One message of a user."""
    return [{"role": "user", "content": request}]


def training_chats() -> list[Chat]:
    """Every request about every thing of the training."""
    return [chat(request.format(thing)) for thing in TRAINING_THINGS for request in REQUESTS]


def evaluation_chats() -> list[Chat]:
    """Both requests about every thing of the evaluation, in turn: 128 chats."""
    return [
        chat(request.format(thing))
        for thing in EVALUATION_THINGS
        for request in EVALUATION_REQUESTS
    ]


if __name__ == "__main__":
    for messages in evaluation_chats():
        print(json.dumps({"messages": messages}))
