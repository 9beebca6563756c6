"""A reward model behind HTTP scores as the same function here does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.json_server import Answer, json_server
from helpers.letter_law import letter_engine, reward_model, reward_of

from stars_fast import RemoteReward, StarsParams
from stars_fast.remote import RemoteError

PARAMS = StarsParams(
    segment_length=2, max_tokens=8, target_reward=0.8, top_k=0, temperature=1.0, seed=4
)


class Classifier:
    """Answers as ``/classify`` and ``/pooling`` do, scores of the texts behind a bar."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        self.bodies.append(body)
        scores = [reward_of(text.split("|")[1]) for text in body["input"]]
        if path == "/pooling":
            data = [{"index": i, "data": [[9.0], [score]]} for i, score in enumerate(scores)]
        else:
            data = [{"index": i, "probs": [s], "num_classes": 1} for i, s in enumerate(scores)]
        return 200, {}, {"object": "list", "data": data[::-1]}


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
def test_an_engine_gets_the_same_responses(path: str) -> None:
    local = letter_engine(reward_model).generate(["ab", "c{}a"], PARAMS, use_tqdm=False)
    server = Classifier()
    with json_server(server) as url:
        remote = RemoteReward(url + path, "rm", template="{prompt}|{response}", batch_size=3)
        outputs = letter_engine(remote).generate(["ab", "c{}a"], PARAMS, use_tqdm=False)
        remote.close()
    for output, wanted in zip(outputs, local, strict=True):
        assert output.error is None
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert output.outputs[0].segments == wanted.outputs[0].segments
    assert local[0].outputs[0].segments[0].reward is not None
    assert {body["model"] for body in server.bodies} == {"rm"}
    assert {body["use_activation"] for body in server.bodies} == {False}
    assert max(len(body["input"]) for body in server.bodies) <= 3
    assert any(text.startswith("c{}a|") for body in server.bodies for text in body["input"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "returned 0 scores for 1 texts"),
        (None, "returned no scores for 1 texts"),
        ([{"probs": [0.5, 0.5]}], "2 numbers for a text; a reward model has one label"),
        ([{"probs": ["high"]}], "returned 'high' where a score was due"),
        ([{"embedding": [0.5]}], "returned None where a score was due"),
    ],
)
def test_an_answer_that_is_no_score(data: Any, message: str) -> None:
    with json_server(lambda *_: (200, {}, {"data": data})) as url:
        remote = RemoteReward(url)
        with pytest.raises(RemoteError, match=message):
            remote.score(["ab"], ["c"])
        remote.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"template": "{prompt}"}, "template must have {response} in it, once"),
        ({"activation": "softmax"}, "activation must be 'none' or 'default'"),
    ],
)
def test_bad_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteReward("http://127.0.0.1/classify", **options)
