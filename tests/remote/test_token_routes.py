"""SGLang and llama-server by token ids, against servers that keep to their documented shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from helpers.json_server import json_server
from helpers.letter_law import (
    EOS,
    PROMPT,
    letter_engine,
    model_law,
    p_value,
    reward_model,
    stars_law,
)
from helpers.tiny_lm import letter_tokenizer
from helpers.token_servers import TokenServer, token_server

from stars_fast import RemoteEngine, StarsParams

WAYS = {
    "sglang": ("sglang", {}),
    "sessions": ("sglang", {"sessions": True}),
    "llama.cpp": ("llamacpp", {}),
}
PARAMS = StarsParams(
    segment_length=2, max_tokens=4, max_attempts=3, target_reward=0.5, alpha=0.7, beta=0.3,
    temperature=1.0, top_k=0, candidates=2,
)  # fmt: skip
GREEDY = StarsParams(method="vanilla", temperature=0.0, top_k=0, max_tokens=12, segment_length=3)
PROMPTS = ["ab", "ba", "cab"]


def engine_on(at: TokenServer, **options: Any) -> RemoteEngine:
    options = {"reward_model": reward_model, "tokenizer": letter_tokenizer()} | options
    options = {"max_concurrency": 4} | options
    return RemoteEngine(at.url, **options)


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Iterator[tuple[TokenServer, dict[str, Any]]]:
    owner, options = WAYS[request.param]
    with token_server(owner) as server:
        yield server, options


def test_greedy_segments_are_the_whole_response(way: tuple[TokenServer, dict[str, Any]]) -> None:
    server, options = way
    params = replace(GREEDY, top_logprobs=2)
    here = letter_engine().generate(PROMPTS, params, use_tqdm=False)
    with engine_on(server, logprobs=True, **options) as engine:
        there = engine.generate(PROMPTS, params, use_tqdm=False)
    for one, other in zip(here, there, strict=True):
        assert other.error is None
        wanted, found = one.outputs[0], other.outputs[0]
        assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
        assert found.finish_reason == wanted.finish_reason
        assert found.segments == wanted.segments
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        assert [list(place) for place in found.top_logprobs] == [
            list(place) for place in wanted.top_logprobs
        ]


def test_matches_stars_law(way: tuple[TokenServer, dict[str, Any]]) -> None:
    server, options = way
    with engine_on(server, **options) as engine:
        outputs = engine.generate([PROMPT] * 200, PARAMS, use_tqdm=False)
    counts = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert p_value(counts, stars_law(PARAMS)) > 1e-3
    assert p_value(counts, stars_law(replace(PARAMS, max_attempts=1))) < 1e-3
    assert p_value(counts, model_law(PARAMS.max_tokens)) < 1e-4
    assert server.sessions == {}


def test_draws_depend_on_the_request_alone(way: tuple[TokenServer, dict[str, Any]]) -> None:
    server, options = way
    params = replace(PARAMS, seed=5, max_tokens=8)
    with engine_on(server, **options) as engine:
        first, again = (engine.generate(PROMPTS, params, use_tqdm=False) for _ in range(2))
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in first]


@pytest.mark.parametrize("way", ["sglang"], indirect=True)
def test_without_seeds_one_call_draws_all_candidates(
    way: tuple[TokenServer, dict[str, Any]],
) -> None:
    server, _ = way
    with engine_on(server, seed=None) as engine:
        outputs = engine.generate([PROMPT] * 20, PARAMS, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    sent = [body["sampling_params"] for body in server.bodies["/generate"]]
    assert {one["n"] for one in sent} > {2}
    assert not any("sampling_seed" in one for one in sent)


def test_a_session_is_told_no_token_twice() -> None:
    """Each call but the first sends one token, and continues what a call without sessions does."""
    params = replace(PARAMS, max_tokens=8, method="stars", beta=0.05, candidates=1, n=2, seed=3)
    contexts = []
    for sessions in (False, True):
        with token_server("sglang") as server, engine_on(server, sessions=sessions) as engine:
            outputs = engine.generate(PROMPTS, params, use_tqdm=False)
            assert all(output.error is None for output in outputs)
        contexts.append(sorted(server.contexts))
    assert contexts[0] == contexts[1]
    assert (server.opened, server.sessions) == (len(PROMPTS), {})
    assert len(server.bodies["/close_session"]) == len(PROMPTS)
    bodies = server.bodies["/generate"]
    branches = [body for body in bodies if "rid" in body["session_params"]]
    # The two responses of a request begin at once; whatever comes behind is a branch.
    assert len(bodies) - len(branches) <= 2 * len(PROMPTS)
    assert {len(body["input_ids"]) for body in branches} == {1}
    dropped = {body["session_params"].get("drop_previous_output", False) for body in branches}
    assert dropped == {False, True}  # next segments, and other attempts


def test_a_lost_session_is_opened_again() -> None:
    with token_server("sglang") as server, engine_on(server, sessions=True) as engine:
        wanted = engine.generate([PROMPT], GREEDY, use_tqdm=False)
        engine.add_request("a", PROMPT, GREEDY)
        outputs = engine.step()
        server.sessions.clear()  # as after a restart
        while engine.has_unfinished():
            outputs = engine.step() or outputs
        assert outputs[-1].error is None
        assert outputs[-1].outputs[0].token_ids == wanted[0].outputs[0].token_ids
        assert server.opened == 3
    assert server.sessions == {}


def test_an_end_that_is_only_named_counts() -> None:
    """A version that leaves the end out of `output_ids` names it in `finish_reason`."""
    with token_server("sglang") as server:

        def without_end(path: str, body: Any, headers: dict[str, str]) -> Any:
            status, sent, answer = server.answer(path, body, headers)
            if path == "/generate" and answer["output_ids"][-1:] == [EOS]:
                answer = answer | {"output_ids": answer["output_ids"][:-1]}
            return status, sent, answer

        params = replace(GREEDY, temperature=1.0, seed=1, segment_length=4)
        with engine_on(server) as engine:
            wanted = engine.generate(PROMPTS, params, use_tqdm=False)
        with json_server(without_end) as url:
            server.url = f"{url}/v1"
            with engine_on(server) as engine:
                found = engine.generate(PROMPTS, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in wanted]
    assert any(o.outputs[0].token_ids[-1] == EOS for o in found)


@pytest.mark.parametrize(
    ("owner", "answer", "message"),
    [
        ("sglang", {"text": ""}, "none of SGLang's"),
        (
            "sglang",
            {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "no"}}},
            "aborted the call: no",
        ),
        ("llamacpp", {"content": "a", "tokens": "a"}, "'a' where token ids were due"),
        ("llamacpp", {"content": "a", "tokens": [1], "stop_type": "none"}, "stop_type 'none'"),
    ],
)
def test_an_answer_that_cannot_be_read_fails_its_request(
    owner: str, answer: dict[str, Any], message: str
) -> None:
    with (
        json_server(lambda *_: (200, {}, answer)) as url,
        engine_on(TokenServer(owner, f"{url}/v1"), model="m", server=_name(owner)) as engine,
    ):
        (output,) = engine.generate([PROMPT], GREEDY, use_tqdm=False)
    assert message in str(output.error)


def _name(owner: str) -> str:
    return "llama.cpp" if owner == "llamacpp" else owner


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sessions": True, "server": "llama.cpp"}, "sessions must be False.*server='sglang'"),
        ({"sessions": True, "server": "sglang", "tokenizer": None}, "without tokenizer="),
        ({"logprobs": True, "server": "vllm"}, "logprobs must be False.*'sglang' or 'llama.cpp'"),
    ],
)
def test_what_a_server_has_not_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_on(TokenServer("", "http://127.0.0.1:9/v1"), model="m", **options)


def test_top_logprobs_are_to_be_asked_for() -> None:
    server = TokenServer("", "http://127.0.0.1:9/v1")
    with (
        engine_on(server, model="m", server="sglang") as engine,
        pytest.raises(ValueError, match=r"top_logprobs must be 0 .*logprobs=False.*got 3"),
    ):
        engine.add_request("a", PROMPT, replace(GREEDY, top_logprobs=3))
