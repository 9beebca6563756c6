"""A character that a segment ends within is completed, not broken.

The server here tells a fixed story, whose tokens are its bytes: `max_tokens` of them behind the
prompt, which has to be a beginning of the story.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.json_server import Answer, json_server

from stars_fast import RemoteEngine, StarsParams

STORY = "Zo\u00eb \u2014 na\u00efve \U0001f600 \u4f60\u597d, caf\u00e9!".encode()
OPENING = "Zo"


class Teller:
    """Tells what follows the prompt; bytes that are no text are decoded as servers do."""

    def __init__(self, story: bytes) -> None:
        self.story = story
        self.seeds: list[int] = []

    def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        told = body["prompt"].encode()
        assert self.story.startswith(told), body["prompt"]
        self.seeds.append(body["seed"])
        part = self.story[len(told) :][: body["max_tokens"]]
        ended = len(part) < body["max_tokens"]
        choice = {
            "index": 0,
            "text": part.decode(errors="replace"),
            "finish_reason": "stop" if ended else "length",
        }
        usage = {"completion_tokens": len(part) + ended}
        return 200, {}, {"choices": [choice], "usage": usage}


def tell(story: bytes, params: StarsParams) -> tuple[Any, Teller, dict[str, float]]:
    teller = Teller(story)
    with (
        json_server(teller) as url,
        RemoteEngine(url, "story", server="vllm", reward_model=lengths) as engine,
    ):
        (output,) = engine.generate(OPENING, params, use_tqdm=False)
        return output, teller, engine.stats()


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 100])
def test_the_story_is_told_whole(length: int) -> None:
    params = StarsParams(segment_length=length, max_tokens=100, target_reward=0.0, beta=1e3)
    output, _, stats = tell(STORY, params)
    assert output.error is None
    assert OPENING + output.outputs[0].text == STORY.decode()
    assert output.outputs[0].finish_reason == "stop"
    assert stats["cut_characters"] == 0
    # Rewards are those of whole characters.
    rewards = [segment.reward for segment in output.outputs[0].segments]
    assert rewards[-1] == len(STORY.decode()) - len(OPENING)


def test_a_longer_draw_has_the_seed_of_the_shorter() -> None:
    params = StarsParams(method="vanilla", segment_length=1, max_tokens=2)
    output, teller, _ = tell(STORY, params)
    assert output.outputs[0].text == "\u00eb "
    first, longer, second = teller.seeds
    assert first == longer != second


def test_bytes_that_are_no_character_are_left_out_and_counted() -> None:
    class Broken(Teller):
        """Never completes what begins with the byte F0."""

        def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
            text = "ab\ufffd" if body["max_tokens"] >= 3 and body["prompt"] == OPENING else "c"
            choice = {"index": 0, "text": text, "finish_reason": "length"}
            return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 3}}

    params = StarsParams(method="vanilla", segment_length=3, max_tokens=6)
    with json_server(Broken(b"")) as url, RemoteEngine(url, "m", server="vllm") as engine:
        (output,) = engine.generate(OPENING, params, use_tqdm=False)
        assert output.outputs[0].text == "abc"
        assert engine.stats()["cut_characters"] == 1


@pytest.mark.parametrize("length", [2, 3, 100])
def test_a_stop_text_is_found_across_segments(length: int) -> None:
    params = StarsParams(
        method="vanilla", segment_length=length, max_tokens=100, stop=["ve \U0001f600"]
    )
    output, _, _ = tell(STORY, params)
    assert OPENING + output.outputs[0].text == "Zo\u00eb \u2014 na\u00ef"
    assert output.outputs[0].finish_reason == "stop"
