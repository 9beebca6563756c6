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


def sent_by(name: str, params: StarsParams, position: int = 0) -> dict[str, Any]:
    """The body's sampling parameters, of a call for at most 8 tokens."""
    return SERVERS[name].sampling(params, position, 8)


def test_every_parameter_is_sent() -> None:
    shared = {"temperature": 0.7, "top_p": 0.9}
    own = {
        "top_k": 20, "min_p": 0.1, "ignore_eos": False, "stop_token_ids": [3],
        "repetition_penalty": 1.0,
    }  # fmt: skip
    assert sent_by("vllm", PARAMS) == {**shared, **own}
    assert sent_by("sglang", PARAMS) == {**shared, **own}
    assert sent_by("stars_fast", PARAMS) == {
        **shared,
        "stars": {"method": "vanilla", **own},
    }
    sent = sent_by("transformers", PARAMS)
    assert json.loads(sent.pop("generation_config")) == {
        "do_sample": True, **shared, "top_k": 20, "min_p": 0.1,
        "repetition_penalty": 1.0,
    }  # fmt: skip
    assert sent == {}


def test_penalties_biases_and_a_minimum_are_sent() -> None:
    params = StarsParams(
        method="vanilla", max_tokens=8, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={7: 1.5}, min_tokens=6,
    )  # fmt: skip
    changed = {
        "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {"7": 1.5}, "min_tokens": 6,
    }  # fmt: skip
    assert sent_by("vllm", params).items() >= changed.items()
    assert sent_by("stars_fast", params)["stars"].items() >= changed.items()
    assert sent_by("openai", params).keys() >= {"presence_penalty", "logit_bias"}
    # Of a later call: what is still to come of the minimum, and no more than the call's tokens.
    assert sent_by("vllm", params, 4)["min_tokens"] == 2
    assert "min_tokens" not in sent_by("vllm", params, 6)
    longer = StarsParams(method="vanilla", max_tokens=90, min_tokens=90)
    assert sent_by("vllm", longer, 4)["min_tokens"] == 8


def test_what_is_off_is_said_to_be_off() -> None:
    assert sent_by("vllm", PLAIN)["top_k"] == -1
    assert sent_by("llama.cpp", PLAIN) == {
        "temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0,
    }  # fmt: skip
    assert sent_by("openai", PLAIN) == {"temperature": 0.8, "top_p": 1.0}
    greedy = StarsParams(method="vanilla", temperature=0.0)
    sent = sent_by("transformers", greedy)
    assert json.loads(sent["generation_config"]) == {
        "do_sample": False, "repetition_penalty": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("openai", {"top_k": 40}),
        ("openai", {"top_k": 0, "min_p": 0.1}),
        ("llama.cpp", {"ignore_eos": True}),
        ("transformers", {"stop_token_ids": [1]}),
        ("openai", {"top_k": 0, "repetition_penalty": 1.1}),
        ("openai", {"top_k": 0, "min_tokens": 4}),
        ("llama.cpp", {"frequency_penalty": 0.1}),
        ("transformers", {"logit_bias": {1: 2.0}}),
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
    assert find_server("auto", [{"owned_by": "me"}]).name == "llama-cpp-python"
    assert find_server("auto", [{"owned_by": "llamacpp"}]).name == "llama.cpp"
    assert find_server("sglang", []).name == "sglang"
    for models in ([], [{"owned_by": "acme"}], [{"owned_by": "vllm"}, {"owned_by": "sglang"}]):
        with pytest.raises(ValueError, match="pass server= one of"):
            find_server("auto", models)
