"""What is sent to each kind of server."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx, of the extra remote")

from stars_fast import StarsParams
from stars_fast.remote.servers import SERVERS, find_server

PARAMS = StarsParams(
    method="vanilla", temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, stop_token_ids=[3]
)
PLAIN = StarsParams(method="vanilla", top_k=0)


def test_every_parameter_is_sent() -> None:
    shared = {"temperature": 0.7, "top_p": 0.9}
    own = {"top_k": 20, "min_p": 0.1, "ignore_eos": False, "stop_token_ids": [3]}
    assert SERVERS["vllm"].sampling(PARAMS) == {**shared, **own, "repetition_penalty": 1.0}
    assert SERVERS["sglang"].sampling(PARAMS) == {**shared, **own, "repetition_penalty": 1.0}
    assert SERVERS["stars_fast"].sampling(PARAMS) == {
        **shared,
        "stars": {"method": "vanilla", **own},
    }
    sent = SERVERS["transformers"].sampling(PARAMS)
    assert json.loads(sent.pop("generation_config")) == {
        "do_sample": True, **shared, "top_k": 20, "min_p": 0.1,
    }  # fmt: skip
    assert sent == {}


def test_what_is_off_is_said_to_be_off() -> None:
    assert SERVERS["vllm"].sampling(PLAIN)["top_k"] == -1
    assert SERVERS["llama.cpp"].sampling(PLAIN) == {
        "temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0,
    }  # fmt: skip
    assert SERVERS["openai"].sampling(PLAIN) == {"temperature": 0.8, "top_p": 1.0}
    greedy = StarsParams(method="vanilla", temperature=0.0)
    sent = SERVERS["transformers"].sampling(greedy)
    assert json.loads(sent["generation_config"]) == {"do_sample": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openai", {"top_k": 40}),
        ("openai", {"top_k": 0, "min_p": 0.1}),
        ("llama.cpp", {"ignore_eos": True}),
        ("transformers", {"stop_token_ids": [1]}),
    ],
)
def test_a_parameter_that_a_server_does_not_take_is_refused(
    name: str, options: dict[str, Any]
) -> None:
    SERVERS[name].check(PLAIN)
    refused = list(options)[-1]
    with pytest.raises(ValueError, match=f"{refused} must be .* with server='{name}'"):
        SERVERS[name].check(StarsParams(method="vanilla", **options))


def test_a_server_is_known_by_who_owns_its_models() -> None:
    assert find_server("auto", [{"owned_by": "vllm"}, {"owned_by": "vllm"}]).name == "vllm"
    assert find_server("auto", [{"owned_by": "me"}]).name == "llama.cpp"
    assert find_server("sglang", []).name == "sglang"
    for models in ([], [{"owned_by": "acme"}], [{"owned_by": "vllm"}, {"owned_by": "sglang"}]):
        with pytest.raises(ValueError, match="pass server= one of"):
            find_server("auto", models)
