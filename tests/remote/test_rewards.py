"""A reward model behind HTTP scores as the same function here does, whatever server it is on."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.json_server import Answer, json_server
from helpers.letter_law import letter_engine, reward_model, reward_of

from stars_fast import RemoteReward, StarsParams
from stars_fast.remote import RemoteError, http
from stars_fast.remote.reward_shapes import SHAPES

PARAMS = StarsParams(
    segment_length=2, max_tokens=8, target_reward=0.8, top_k=0, temperature=1.0, seed=4
)
AT_ONCE = {"Retry-After": "0"}
TEMPLATE = "{prompt}|{response}"


def scores_of(texts: list[str]) -> list[float]:
    return [reward_of(text.split("|")[1]) for text in texts]


def listed(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """An answer in the form of OpenAI's lists, in reverse order; `index` tells the places."""
    return {"object": "list", "data": [{"index": i, **e} for i, e in enumerate(entries)][::-1]}


def vllm_classify(body: dict[str, Any]) -> object:
    return listed(
        [{"label": "LABEL_0", "probs": [s], "num_classes": 1} for s in scores_of(body["input"])]
    )


def vllm_pooling(body: dict[str, Any]) -> object:
    return listed(
        [{"object": "pooling", "data": [[9.0], [s]]} for s in scores_of(body["input"])]  # by token
    )


def vllm_score(body: dict[str, Any]) -> object:
    assert len(body["text_1"]) == len(body["text_2"])
    return listed([{"object": "score", "score": reward_of(text)} for text in body["text_2"]])


def sglang_classify(body: dict[str, Any]) -> object:
    return [
        {"embedding": [score], "meta_info": {"id": "7f", "prompt_tokens": 3, "e2e_latency": 0.1}}
        for score in scores_of(body["text"])
    ]


def openrlhf(body: dict[str, Any]) -> object:
    scores = scores_of(body["query"])
    assert len(body["prompts"]) == len(body["labels"]) == len(scores)
    return {"rewards": scores, "scores": scores, "extra_logs": {"dummy_scores": scores}}


#: By the name of its shape, a server's path and how it answers.
SERVERS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "vllm-classify": ("/classify", vllm_classify),
    "vllm-pooling": ("/pooling", vllm_pooling),
    "vllm-score": ("/score", vllm_score),
    "sglang-classify": ("/classify", sglang_classify),
    "openrlhf": ("/get_reward", openrlhf),
}


class Server:
    """Answers in one shape, and bodies of any other with status 400."""

    def __init__(self, answer: Callable[[dict[str, Any]], object]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}

    def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        self.headers = headers
        try:
            answer = self.answer(body)
        except KeyError as error:
            return 400, {}, {"error": {"message": f"{error} is missing"}}
        self.bodies.append(body)
        return 200, {}, answer


def test_every_shape_is_tested() -> None:
    assert set(SERVERS) == set(SHAPES)


@pytest.mark.parametrize("shape", SERVERS)
def test_an_engine_gets_the_same_responses(shape: Any) -> None:
    local = letter_engine(reward_model).generate(["ab", "c{}a"], PARAMS, use_tqdm=False)
    path, answer = SERVERS[shape]
    server = Server(answer)
    options = {"template": TEMPLATE} if SHAPES[shape].has_template else {}
    with json_server(server) as url:
        remote = RemoteReward(url + path, model="rm", api_key="secret", batch_size=3, **options)
        outputs = letter_engine(remote).generate(["ab", "c{}a"], PARAMS, use_tqdm=False)
        remote.close()
    for output, wanted in zip(outputs, local, strict=True):
        assert output.error is None
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert output.outputs[0].segments == wanted.outputs[0].segments
    assert local[0].outputs[0].segments[0].reward is not None
    assert {body["model"] for body in server.bodies} == {"rm"}
    assert server.headers["Authorization"] == "Bearer secret"
    activation = {False} if SHAPES[shape].has_activation else {None}
    assert {body.get("use_activation") for body in server.bodies} == activation
    texts = [next(v for v in body.values() if isinstance(v, list)) for body in server.bodies]
    assert max(map(len, texts)) <= 3
    assert any(text.startswith("c{}a") for batch in texts for text in batch)


@pytest.mark.parametrize(
    ("shape", "answer", "message"),
    [
        ("vllm-classify", {"data": []}, "returned 0 scores for 1 texts"),
        ("vllm-classify", {"error": "x"}, "the answer is not one of 'vllm-classify'"),
        ("vllm-classify", {"data": [{"probs": [0.5, 0.7]}]}, "returned 2 numbers for a text; labe"),
        ("vllm-classify", {"data": [{"probs": ["high"]}]}, "returned 'high' where a score was due"),
        ("vllm-classify", {"data": [{"embedding": [0.5]}]}, "has no 'probs'"),
        ("vllm-classify", {"data": [{"index": 1, "probs": [1]}]}, r"entries with index \[1\] for"),
        ("vllm-pooling", {"data": ["AAAA"]}, "has no 'data'"),
        ("vllm-score", {"data": [{"score": True}]}, "returned True where a score was due"),
        ("sglang-classify", {"embedding": [1.0]}, "the answer is not one of 'sglang-classify'"),
        ("sglang-classify", [{"embedding": [math.nan]}], "returned nan where a score was due"),
        ("openrlhf", {"rewards": 10**400}, "returned 10{79} where a score was due"),
        ("openrlhf", {"rewards": [0.1, 0.2]}, "returned 2 scores for 1 texts"),
        ("openrlhf", {"rewards": None}, "the answer is not one of 'openrlhf'"),
    ],
)
def test_an_answer_that_is_no_score(shape: Any, answer: Any, message: str) -> None:
    with json_server(lambda *_: (200, {}, answer)) as url:
        remote = RemoteReward(url, shape)
        with pytest.raises(RemoteError, match=message):
            remote.score(["ab"], ["c"])
        remote.close()


def test_other_forms_of_the_same() -> None:
    answers = [
        ("openrlhf", {"rewards": 0.5}, {}),
        ("openrlhf", {"scores": [[0.5]]}, {}),
        ("vllm-classify", {"data": [{"probs": [0.1, 0.5, 0.9]}]}, {"label": 1}),
        ("vllm-score", {"data": [{"score": 0.5}]}, {}),
    ]
    for shape, answer, options in answers:
        with json_server(lambda *_, answer=answer: (200, {}, answer)) as url:
            remote = RemoteReward(url, shape, **options)  # type: ignore[arg-type]
            assert remote.score(["ab"], ["c"]) == [0.5]
            assert remote.score([], []) == []
            remote.close()


class Softmax:
    """SGLang's /v1/classify over so many classes; it knows no use_activation."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        entries = []
        for text in body["input"]:
            powers = [math.exp(reward_of(text) * label) for label in range(self.classes)]
            rounding = 1e-6 * len(body["input"]) if self.classes > 1 else 0  # differs by batch
            probs = [power / sum(powers) + rounding for power in powers]
            entries.append({"label": "Default", "probs": probs, "num_classes": self.classes})
        return 200, {}, listed(entries)


class TestSoftmax:
    @pytest.mark.parametrize("activation", ["none", "default"])
    def test_over_one_class_is_refused(self, activation: Any) -> None:
        with json_server(Softmax(1)) as url:
            remote = RemoteReward(f"{url}/v1/classify", activation=activation)
            for texts in (["a"], ["a", "b"]):
                with pytest.raises(RemoteError, match="a softmax over one class") as caught:
                    remote.score([""] * len(texts), texts)
            remote.close()
        assert f"RemoteReward('{url}/classify', shape='sglang-classify')" in str(caught.value)

    def test_over_several_is_refused_where_raw_scores_were_asked_for(self) -> None:
        with json_server(Softmax(2)) as url:
            raw = RemoteReward(f"{url}/v1/classify", label=1)
            with pytest.raises(RemoteError, match="probabilities that add up to 1"):
                raw.score(["", ""], ["a", "b"])
            raw.close()
            taken = RemoteReward(f"{url}/v1/classify", label=1, activation="default")
            (found,) = taken.score([""], ["a"])
            taken.close()
        assert found == pytest.approx(1 / (1 + math.exp(-reward_of("a"))), abs=1e-5)

    def test_a_reward_of_one_is_no_softmax(self) -> None:
        bodies: list[dict[str, Any]] = []

        def server(path: str, body: Any, headers: dict[str, str]) -> Answer:
            bodies.append(body)
            score = 1 / (1 + math.exp(-1)) if body["use_activation"] else 1.0
            return 200, {}, listed([{"probs": [score]}] * len(body["input"]))

        with json_server(server) as url:
            remote = RemoteReward(f"{url}/classify")
            assert remote.score(["", ""], ["a", "b"]) == [1.0, 1.0]
            assert remote.score([""], ["a"]) == [1.0]
            remote.close()
        assert [body["use_activation"] for body in bodies] == [False, True, False]


class TestFailures:
    def test_a_bad_text_harms_no_other(self) -> None:
        def server(path: str, body: Any, headers: dict[str, str]) -> Answer:
            if any("z" in text for text in body["input"]):
                return 400, {}, {"error": {"message": "z cannot be scored"}}
            found = [math.nan if "n" in text else float(len(text)) for text in body["input"]]
            return 200, {}, listed([{"probs": [score]} for score in found])

        with json_server(server) as url:
            remote = RemoteReward(f"{url}/classify", "vllm-classify")
            engine = letter_engine(remote)
            with pytest.raises(Exception, match="response 1: .*status 400: z cannot be scored"):
                engine.score(["a"] * 3, ["b", "z", "bb"])
            with pytest.raises(Exception, match="response 2: .*returned nan where"):
                engine.score(["a"] * 3, ["b", "bb", "n"])
            outputs = engine.generate(["ab", "z"], PARAMS, use_tqdm=False)
            remote.close()
        assert outputs[0].error is None
        assert "z cannot be scored" in str(outputs[1].error)

    def test_a_server_that_is_down_is_asked_once_for_each_batch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http, "_FIRST_WAIT", 0.01)
        asked = []

        def server(path: str, body: Any, headers: dict[str, str]) -> Answer:
            asked.append(body)
            return 503, AT_ONCE, {"detail": "loading"}

        with json_server(server) as url:
            remote = RemoteReward(f"{url}/classify", batch_size=2, retries=1)
            outputs = letter_engine(remote).generate(["ab", "cd"], PARAMS, use_tqdm=False)
            assert remote.stats() == {"http_calls": 2, "http_retries": 1}
            remote.close()
        assert all("status 503: loading (2 times)" in str(output.error) for output in outputs)
        assert len(asked) == 2

    def test_a_server_that_hangs_is_left_at_the_deadline(self) -> None:
        hangs, answered = threading.Event(), threading.Event()

        def server(path: str, body: Any, headers: dict[str, str]) -> Answer:
            if not hangs.is_set():
                hangs.set()
                answered.wait(30)
            return 200, {}, vllm_classify(body)

        with json_server(server) as url:
            # One call at a time: the next one needs what the hanging one holds.
            remote = RemoteReward(
                f"{url}/classify", "vllm-classify", template=TEMPLATE, max_concurrency=1
            )
            engine = letter_engine(remote, reward_timeout=0.5)
            with pytest.raises(Exception, match=r"did not return within 0\.5 s"):
                engine.score(["a"], ["b"])
            assert engine.score(["a"], ["b"]) == [reward_of("b")]
            remote.close()
            answered.set()

    def test_after_close(self) -> None:
        remote = RemoteReward("http://127.0.0.1/classify")
        remote.close()
        with pytest.raises(RemoteError, match="the RemoteReward was closed"):
            remote.score(["a"], ["b"])


def test_batches_are_scored_at_once() -> None:
    both = threading.Barrier(2)
    most, now, lock = 0, 0, threading.Lock()

    def server(path: str, body: Any, headers: dict[str, str]) -> Answer:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        both.wait(20)
        with lock:
            now -= 1
        return 200, {}, vllm_classify(body)

    with json_server(server) as url:
        remote = RemoteReward(
            f"{url}/classify", "vllm-classify", template=TEMPLATE, batch_size=1, max_concurrency=2
        )
        assert remote.score([""] * 4, list("abcd")) == [reward_of(letter) for letter in "abcd"]
        remote.close()
    assert most == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1/classify"}, "url must be an address such as"),
        ({"url": "http://127.0.0.1"}, "url must end in one of /classify, /get_reward, /pooling"),
        ({"shape": "vllm"}, "shape must be one of 'auto', 'vllm-classify'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"label": -1}, "label must be at least 0 or None"),
        ({"template": "{prompt}"}, "template must have {response} in it, once"),
        ({"shape": "vllm-score", "template": TEMPLATE}, "template is for shapes that send one"),
        ({"activation": "softmax"}, "activation must be 'none' or 'default'"),
    ],
)
def test_bad_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteReward(**({"url": "http://127.0.0.1/classify"} | options))
