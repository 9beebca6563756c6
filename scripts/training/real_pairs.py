"""Responses of a real chat model, and which of two a noisy judge prefers.

    python scripts/training/real_pairs.py --model LM_DIR --out samples.jsonl [--samples 6]

The judge prefers the first of two responses to a prompt with probability
``sigmoid(sharpness * (vader(first) - vader(second)))``: what is trained on its choices knows gold
only through that noise. Prompts are those of `real_prompts.training_chats`; every eighth thing is
held out to check what is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from real_golds import vader
from real_prompts import Chat, held_out, training_chats

from stars_fast import Engine, StarsParams

SHARPNESS = 5.0


@dataclass(frozen=True)
class Response:
    """A response to a training chat.

    Attributes
    ----------
    prompt
        Number of the chat in `real_prompts.training_chats`.
    prompt_ids, ids
        The chat as the language model reads it, and the response's tokens.
    text
        Of the response.
    gold
        VADER's score of it.
    """

    prompt: int
    prompt_ids: list[int]
    ids: list[int]
    text: str
    gold: float

    @property
    def messages(self) -> Chat:
        """The chat."""
        return training_chats()[self.prompt]

    @property
    def held_out(self) -> bool:
        """Nothing is trained on it."""
        return held_out(self.prompt)


@dataclass(frozen=True)
class Preference:
    """Two responses to one chat, of which the judge preferred ``chosen``."""

    chosen: Response
    rejected: Response


def draw(model: str, samples: int, max_tokens: int, seed: int = 0) -> list[Response]:
    """Plain samples of every training chat."""
    params = StarsParams(method="vanilla", n=samples, max_tokens=max_tokens)
    outputs = Engine(model, seed=seed).generate(training_chats(), params)  # type: ignore[arg-type]
    found = [
        (number, output, one) for number, output in enumerate(outputs) for one in output.outputs
    ]
    golds = vader([""] * len(found), [one.text for _, _, one in found])
    return [
        Response(number, list(output.prompt_token_ids), list(one.token_ids), one.text, gold)
        for (number, output, one), gold in zip(found, golds, strict=True)
    ]


def write(responses: Sequence[Response], path: Path) -> None:
    """A line for each."""
    lines = [json.dumps(asdict(response)) for response in responses]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(path: Path) -> list[Response]:
    """What `write` wrote."""
    return [Response(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def preferences(responses: Sequence[Response], seed: int = 0) -> list[Preference]:
    """The judge's choice between every two responses to a chat, chat by chat.

    Equal texts are no pair.
    """
    judge = random.Random(seed)
    pairs: list[Preference] = []
    for _, group in itertools.groupby(responses, key=lambda response: response.prompt):
        for first, second in itertools.combinations(group, 2):
            if first.text == second.text:
                continue
            if judge.random() < 1.0 / (1.0 + math.exp(SHARPNESS * (second.gold - first.gold))):
                pairs.append(Preference(first, second))
            else:
                pairs.append(Preference(second, first))
    return pairs


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="directory of the chat model")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--samples", type=int, default=6, help="responses to a chat")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    responses = draw(arguments.model, arguments.samples, arguments.max_tokens, arguments.seed)
    write(responses, arguments.out)
    golds = [response.gold for response in responses]
    print(f"{len(golds)} responses, mean gold {sum(golds) / len(golds):.3f}")


if __name__ == "__main__":
    main()
