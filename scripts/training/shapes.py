"""Pictures of coloured shapes, captions some of which are wrong, and how wrong a caption is.

    python scripts/training/shapes.py --out DIR [--count 128]

writes held-out pictures and ``DIR/prompts.jsonl`` for ``stars-fast eval``. A picture has one to
three objects in its four quarters. What a caption says is known to be right or wrong by
construction: `gold` finds the objects in the pixels.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Sequence

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "cross")
SIDE = 32  # pixels, in quarters of 16
QUESTION = "what is there ?"
_WHITE = (255, 255, 255)
_OBJECT = re.compile(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


@dataclass(frozen=True)
class Thing:
    """An object: a colour and a shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects by quarter, from the upper left to the lower right; None: nothing is there."""

    quarters: tuple[Thing | None, ...]

    @property
    def things(self) -> list[Thing]:
        """The objects, in order."""
        return [thing for thing in self.quarters if thing is not None]

    def picture(self) -> Image.Image:
        """Draw it."""
        drawn = Image.new("RGB", (SIDE, SIDE), _WHITE)
        pen = ImageDraw.Draw(drawn)
        for number, thing in enumerate(self.quarters):
            if thing is not None:
                _draw(pen, thing, 16 * (number % 2), 16 * (number // 2))
        return drawn


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, x: int, y: int) -> None:
    fill, box = COLOURS[thing.colour], (x + 2, y + 2, x + 13, y + 13)
    if thing.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.shape == "square":
        pen.rectangle(box, fill=fill)
    elif thing.shape == "triangle":
        pen.polygon([(x + 7, y + 2), (x + 13, y + 13), (x + 2, y + 13)], fill=fill)
    else:
        pen.rectangle((x + 6, y + 2, x + 9, y + 13), fill=fill)
        pen.rectangle((x + 2, y + 6, x + 13, y + 9), fill=fill)


def scene(draw: random.Random) -> Scene:
    """A scene of one to three different objects."""
    every = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    things: list[Thing | None] = [*draw.sample(every, draw.randint(1, 3))]
    things += [None] * (4 - len(things))
    draw.shuffle(things)
    return Scene(tuple(things))


def caption(things: Sequence[Thing]) -> str:
    """Name objects."""
    return " , ".join(map(str, things)) + " ."


def careless(things: Sequence[Thing], draw: random.Random, rate: float) -> list[Thing]:
    """Objects as somebody names them who is wrong about each at a rate, and may add one."""
    named = [_mistaken(thing, draw) if draw.random() < rate else thing for thing in things]
    if draw.random() < rate:
        named.append(_mistaken(named[-1], draw))
    return named


def _mistaken(thing: Thing, draw: random.Random) -> Thing:
    if draw.random() < 0.5:
        return Thing(draw.choice([c for c in COLOURS if c != thing.colour]), thing.shape)
    return Thing(thing.colour, draw.choice([s for s in SHAPES if s != thing.shape]))


def named(text: str) -> list[Thing]:
    """The objects that a text names."""
    return [Thing(*found) for found in _OBJECT.findall(text)]


def wrong_objects(text: str, things: Sequence[Thing]) -> int:
    """How many objects a text names that are not there; naming one twice is one too many."""
    left = list(things)
    wrong = 0
    for thing in named(text):
        if thing in left:
            left.remove(thing)
        else:
            wrong += 1
    return wrong


def score(text: str, things: Sequence[Thing]) -> float:
    """Right objects less wrong ones, over those that are there: 1 for all and nothing else."""
    wrong = wrong_objects(text, things)
    return (len(named(text)) - 2 * wrong) / len(things)


def seen(picture: Image.Image) -> list[Thing]:
    """The objects of a picture, by its pixels."""
    quarters = []
    for number in range(4):
        x, y = 16 * (number % 2), 16 * (number // 2)
        part = picture.convert("RGB").crop((x, y, x + 16, y + 16))
        for colour in COLOURS:
            for shape in SHAPES:
                thing = Thing(colour, shape)
                drawn = Image.new("RGB", (16, 16), _WHITE)
                _draw(ImageDraw.Draw(drawn), thing, 0, 0)
                if drawn.tobytes() == part.tobytes():
                    quarters.append(thing)
    return quarters


def gold(prompts: list[str], responses: list[str], images: list[list[Image.Image]]) -> list[float]:
    """`score` of each response, for ``--gold shapes:gold``."""
    return [
        score(response, seen(picture))
        for response, (picture,) in zip(responses, images, strict=True)
    ]


def wrong(prompts: list[str], responses: list[str], images: list[list[Image.Image]]) -> list[float]:
    """`wrong_objects` of each response, for ``--gold shapes:wrong``."""
    return [
        float(wrong_objects(response, seen(picture)))
        for response, (picture,) in zip(responses, images, strict=True)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--count", type=int, default=128, help="pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random("held out")
    lines = []
    for number in range(arguments.count):
        path = arguments.out.resolve() / f"{number}.png"
        scene(draw).picture().save(path)
        parts = [{"type": "image", "image": str(path)}, {"type": "text", "text": QUESTION}]
        lines.append(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    (arguments.out / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
