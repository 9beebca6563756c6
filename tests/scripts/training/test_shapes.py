"""Pictures of shapes: what is in them, what captions get wrong, models that the engine takes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from shapes import (
    QUESTION,
    Thing,
    caption,
    careless,
    gold,
    named,
    scene,
    score,
    seen,
    wrong,
    wrong_objects,
)
from train_shapes import Reader, ShapeSettings, model, processor, train

from stars_fast import Engine, LogRatio, StarsParams

RED, BLUE = Thing("red", "circle"), Thing("blue", "square")


def test_what_is_drawn_is_seen() -> None:
    draw = random.Random(0)
    for _ in range(50):
        one = scene(draw)
        assert seen(one.picture()) == one.things
        assert named(caption(one.things)) == one.things
        assert score(caption(one.things), one.things) == 1.0


def test_mistakes_are_counted() -> None:
    assert wrong_objects("a red circle , a red circle .", [RED, BLUE]) == 1
    assert score("a red circle .", [RED, BLUE]) == 0.5
    assert score("a red circle , a green square .", [RED, BLUE]) == 0.0
    assert score("", [RED]) == 0.0
    draw = random.Random(0)
    things = [scene(draw).things for _ in range(400)]
    slips = [wrong_objects(caption(careless(one, draw, 0.25)), one) for one in things]
    assert sum(slips) / sum(map(len, things)) == pytest.approx(0.25 + 0.25 / 2, abs=0.06)
    pictures = [[scene(random.Random(1)).picture()]]
    text = caption(seen(pictures[0][0]))
    assert gold([""], [text], pictures) == [1.0]
    assert wrong([""], [text + " a black cross ."], pictures) == [1.0]


def test_captions_are_read_as_the_engine_reads_them(tmp_path: Path) -> None:
    settings = ShapeSettings(
        pictures=64, pairs=32, epochs=1, batch_size=16, hidden=32, layers=1, small_hidden=32
    )
    train(settings, tmp_path)
    lm, guide, reference = (str(tmp_path / name) for name in ("lm", "guide", "reference"))
    options = {"page_size": 4, "num_pages": 200, "guide": guide, "guide_reference": reference}
    engine = Engine(lm, LogRatio(guide, reference), reward_num_pages=200, **options)
    one = scene(random.Random(3))
    parts = [{"type": "image", "image": one.picture()}, {"type": "text", "text": QUESTION}]
    prompt = [{"role": "user", "content": parts}]
    reader = Reader()
    assert engine.read(prompt).token_ids == reader.prompt
    params = StarsParams(
        target_reward=1.0,
        segment_length=3,
        max_attempts=2,
        max_tokens=12,
        guide_weight=1.0,
        top_k=0,
    )
    (output,) = engine.generate(prompt, params, use_tqdm=False)
    assert output.error is None
    text = caption(one.things)
    ids = reader.response(text)[:-1]
    with torch.no_grad():
        policy, before = (
            reader.log_probs(type(found).from_pretrained(path).eval(), reader.pixels([one]), [ids])
            for found, path in ((model(32, 1), guide), (model(32, 1), reference))
        )
    (reward,) = engine.score([prompt], [text])
    assert reward == pytest.approx(float(policy - before), abs=1e-4)
    assert processor().tokenizer.decode(ids) == text
