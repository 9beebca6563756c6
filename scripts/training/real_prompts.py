"""What a real chat model is asked in docs/alignment.md: half of it calls for complaints.

    python scripts/training/real_prompts.py > prompts.jsonl
    python scripts/training/real_prompts.py --tuning > tuning.jsonl
    python scripts/training/real_prompts.py --base > openings.jsonl

Each thing is asked about in several ways. The things of the evaluation are none of those that
anything is trained on or tuned with. Settings are tuned with training things that are held out.
A model without a chat template continues openings that ask for the same.
"""

from __future__ import annotations

import argparse
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
#: The same two for a model that continues a text.
OPENINGS = (
    "A short review of {} by a customer:\n\n",
    "A short complaint about {} by a disappointed customer:\n\n",
)
HELD_OUT_EVERY = 8  # training things

_THINGS = json.loads(Path(__file__).with_name("real_things.json").read_text(encoding="utf-8"))
TRAINING_THINGS: list[str] = _THINGS["training"]
EVALUATION_THINGS: list[str] = _THINGS["evaluation"]


def chat(request: str) -> Chat:
    """One message of a user."""
    return [{"role": "user", "content": request}]


def training_chats() -> list[Chat]:
    """Every request about every thing of the training."""
    return [chat(request.format(thing)) for thing in TRAINING_THINGS for request in REQUESTS]


def held_out(number: int) -> bool:
    """Nothing is trained on the training chat of this number."""
    return number // len(REQUESTS) % HELD_OUT_EVERY == 0


def tuning_chats() -> list[Chat]:
    """Every request about the things that are held out: 32 chats."""
    return [messages for number, messages in enumerate(training_chats()) if held_out(number)]


def evaluation_chats() -> list[Chat]:
    """Both requests about every thing of the evaluation, in turn: 128 chats."""
    return [
        chat(request.format(thing))
        for thing in EVALUATION_THINGS
        for request in EVALUATION_REQUESTS
    ]


def evaluation_openings() -> list[str]:
    """The chats of the evaluation as texts to be continued, in the same order."""
    return [opening.format(thing) for thing in EVALUATION_THINGS for opening in OPENINGS]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tuning", action="store_true", help="print the chats for tuning")
    which.add_argument("--base", action="store_true", help="print openings, for a base model")
    arguments = parser.parse_args()
    if arguments.base:
        for opening in evaluation_openings():
            print(json.dumps({"prompt": opening}))
        return
    for messages in tuning_chats() if arguments.tuning else evaluation_chats():
        print(json.dumps({"messages": messages}))


if __name__ == "__main__":
    main()
