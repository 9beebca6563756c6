"""What the server says of itself (OpenAPI), and that it keeps to it whatever it is sent.

``STARS_FAST_EXAMPLES=2000`` sends that many requests to each operation.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai", "schemathesis"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras server and test")

import httpx  # noqa: E402
import schemathesis  # noqa: E402
import schemathesis.specs.openapi.schemas  # noqa: E402 - later, beside threads that import as well
from helpers.params import owner  # noqa: E402
from helpers.serving import PARAMS, Gate, Served, serving, until  # noqa: E402
from helpers.tiny_lm import small_model  # noqa: E402
from helpers.tiny_tokenizers import bpe_tokenizer  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from stars_fast import Engine, StarsParams  # noqa: E402
from stars_fast.params import Method  # noqa: E402
from stars_fast.server import ServerSettings, chat, completions  # noqa: E402
from stars_fast.server.guard import asks_for_key  # noqa: E402
from stars_fast.server.openapi import RANGES, stars_schema  # noqa: E402

EXAMPLES = int(os.environ.get("STARS_FAST_EXAMPLES", "40"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
#: Where a body may ask for more work than a test has time for.
LIMITS = {"max_tokens": 8, "max_completion_tokens": 8, "n": 2, "candidates": 3, "max_attempts": 3}
#: What nearly no value of is an error.
PLAIN = {
    "model", "prompt", "messages", "input", "text_1", "text_2", "tokens", "temperature", "top_p",
    "seed", "stream", "stars",
}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    gate = Gate(raises_for="")  # whatever prompts are made
    engine = Engine(small_model(), gate, tokenizer=bpe_tokenizer(chat="chatml"), num_pages=400)
    few = ServerSettings("bytes", PARAMS, max_choices=4, max_body_bytes=20_000)
    with serving(engine, gate, few, max_prompt_tokens=200) as served:
        yield served
        until(served.idle)


@pytest.fixture(scope="module")
def description(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def within_limits(value: Any) -> Any:
    """A body that asks for little, where it asks for something that is no error."""
    if not isinstance(value, dict):
        return value
    cut = {}
    for name, item in value.items():
        limit = LIMITS.get(name)
        whole = isinstance(item, int) and not isinstance(item, bool)
        cut[name] = min(item, limit) if limit and whole else within_limits(item)
        if name == "repetition_penalty" and isinstance(item, float):
            cut[name] = max(item, 1e-3)  # a smaller one makes logits infinite
    return cut


def requests_of(operation: Any, mode: str) -> Any:
    return operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        ("POST", COMPLETIONS, "positive"),
        ("POST", COMPLETIONS, "negative"),
        ("POST", CHAT, "positive"),
        ("POST", CHAT, "negative"),
        ("POST", "/v1/responses", "positive"),
        ("POST", "/v1/responses", "negative"),
        ("POST", "/tokenize", "positive"),
        ("POST", "/detokenize", "positive"),
        ("POST", "/detokenize", "negative"),
        ("POST", "/classify", "positive"),
        ("POST", "/pooling", "negative"),
        ("POST", "/score", "positive"),
        ("GET", "/v1/models", "positive"),
        ("GET", "/v1/models/{name}", "positive"),
        ("GET", "/health", "positive"),
        ("GET", "/ready", "positive"),
        ("GET", "/ping", "positive"),
        ("GET", "/version", "positive"),
        ("GET", "/metrics", "positive"),
    ],
)
def test_every_answer_is_as_described(description: Any, method: str, path: str, mode: str) -> None:
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=requests_of(description[path][method], mode),
        given_model=st.booleans(),
        given_stars=st.booleans(),
        given_more=st.booleans(),
    )
    def run(case: Any, given_model: bool, given_stars: bool, given_more: bool) -> None:
        if isinstance(case.body, dict):
            case.body = within_limits(case.body)
            # Else nearly every request would fail on the first of many things.
            for name, keep in (("model", given_model), ("stars", given_stars)):
                if not keep and mode == "positive":
                    case.body.pop(name, None)
            if not given_more and mode == "positive":
                case.body = {k: v for k, v in case.body.items() if k in PLAIN}
                if "input" in case.body:
                    case.body.pop("messages", None)
                for message in case.body.get("messages") or []:
                    message.pop("tool_calls", None)  # the template has no place for them
        statuses.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

    run()
    if mode == "positive" and "{" not in path:
        assert 200 in statuses
    if mode == "negative":
        assert 400 in statuses


def test_schemathesis_by_itself_in_all_modes(served: Served, tmp_path: Path) -> None:
    """Every check but one, the values at each border and beyond, for the cheap operations.

    With ``STARS_FAST_EXAMPLES`` for all of them, and that many at random. What is left out asks
    that all that fits the description is answered, which knows nothing of a model's context or of
    parameters together.
    """
    cheap = ("--include-path-regex", "^/(detokenize|score|health|v1/models)$")
    much = ("--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
        *("--mode", "all", "--generation-deterministic", "--request-timeout", "60"),
        *("--exclude-checks", "positive_data_acceptance", "--warnings", "off", "--no-color"),
        *(much if "STARS_FAST_EXAMPLES" in os.environ else ("--phases", "coverage", *cheap)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None
    assert int(found[1]) > 20


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses", "/tokenize", "/classify"])
def test_what_must_hold_something_is_described_so(description: Any, path: str) -> None:
    names = {"prompt", "messages", "input", "text_1"}
    schema = description.raw_schema
    content = schema["paths"][path]["post"]["requestBody"]["content"]
    body = schema["components"]["schemas"][content["application/json"]["schema"]["$ref"][21:]]
    found = {n: one for n, one in body["properties"].items() if n in names}
    assert found
    for one in found.values():
        assert "minLength" in str(one) or "minItems" in str(one)


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "whole", "chunk"),
    [
        (COMPLETIONS, completions.CompletionAnswer, completions.CompletionChunk),
        (CHAT, chat.ChatAnswer, chat.ChatChunk),
    ],
)
def test_nothing_is_sent_that_is_not_described(
    served: Served, path: str, whole: type[BaseModel], chunk: type[BaseModel], stream: bool,
    logprobs: bool,
) -> None:  # fmt: skip
    prompt = {"prompt": "Not bad"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "Not bad"}]}  # type: ignore[dict-item]
    stars = {"trace": True, "target_reward": 9.0, "acceptance": "hard"}
    asked = {True: 0, False: None} if path == COMPLETIONS else {True: True, False: False}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    body = {**prompt, **options, "n": 2, "stream": stream, "logprobs": asked[logprobs]}
    if path == COMPLETIONS:
        body["return_token_ids"] = logprobs
    response = served.post({**body, "stars": stars}, path)
    assert response.status_code == 200
    if not stream:
        found = whole.model_validate_json(response.content, extra="forbid", strict=True)
        assert found.model_dump()["choices"][0]["stars"]["segments"][0]["rejected"]
        return
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [chunk.model_validate_json(line, extra="forbid", strict=True) for line in lines]
    assert len(chunks) == 2 * 3 + 1


@pytest.mark.parametrize("name", RANGES)
def test_described_ranges_are_those_that_are_checked(name: str) -> None:
    def accepted(value: Any) -> bool:
        try:
            StarsParams(**{"method": owner(name), "max_tokens": 2**28 - 1, name: value})
        except ValueError:
            return False
        return True

    bounds = dict(RANGES[name])
    if name in ("stop", "step_text"):
        assert bounds == {"minLength": 1}
        assert accepted("a")
        assert not accepted("")
        return
    whole = name in ("seed", "top_k") or bounds.get("maximum", 0) > 1 or bounds == {"minimum": 1}
    step = 1 if whole else 1e-6
    for key, sign in (("minimum", -1), ("maximum", 1)):
        if key in bounds:
            assert accepted(bounds[key])
            assert not accepted(bounds.pop(key) + sign * step)
    for key, sign in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
        if key in bounds:
            assert not accepted(bounds[key])
            assert accepted(bounds.pop(key) + sign * step)
    assert bounds == {}


def test_every_parameter_is_described() -> None:
    properties = stars_schema()["properties"]
    assert list(properties) == list(StarsParams.__dataclass_fields__)
    assert all(entry["description"] for entry in properties.values())
    assert properties["method"]["enum"] == list(get_args(Method))


@pytest.mark.parametrize(
    "stars",
    [
        *({name: value} for name in ("segment_length", "max_attempts", "candidates", "top_k", "n")
          for value in (2**30 + 1, 2**31, 2**63, 10**400)),
        *({"segment_end": "sentence", "min_segment_length": value} for value in (2**31, 2**64)),
        {"stop_token_ids": [2**64]},
        *({name: 10**400} for name in ("beta", "target_reward", "temperature", "top_p", "alpha")),
        {"seed": 2**64},
    ],
)  # fmt: skip
def test_numbers_too_large_for_the_machine_are_bad_requests(
    served: Served, stars: dict[str, Any]
) -> None:
    for stream in (False, True):
        response = served.post({"prompt": "A", "stream": stream, "stars": stars})
        assert response.status_code == 400
        name = list(stars)[-1]
        assert response.json()["error"]["message"].startswith(f"{name} must be")


def test_numbers_too_small_for_float32_are_taken(served: Served) -> None:
    for name in ("top_p", "temperature", "min_p", "beta"):
        for filters in ({"top_k": 0}, {"top_k": 3}):
            stars = {**filters, "ignore_eos": True, name: 5e-324}
            response = served.post({"prompt": "A", "max_tokens": 4, "stars": stars})
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("ids", [[2**32], [2**63], [2**64], [-1], [3, 10**400]])
def test_prompt_ids_beyond_the_tokenizer_are_bad_requests(served: Served, ids: list[int]) -> None:
    response = served.post({"prompt": ids})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert "is out of range" in response.json()["error"]["message"]


def test_a_chat_that_the_template_refuses_is_a_bad_request() -> None:
    tokenizer = bpe_tokenizer(chat="chatml")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    gate = Gate()
    engine = Engine(small_model(), gate, tokenizer=tokenizer, num_pages=100)
    with serving(engine, gate, ServerSettings("chat", PARAMS)) as served:
        response = served.post({"messages": [{"role": "user", "content": "A"}]}, CHAT)
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]


def test_the_key_and_the_streams_are_described(served: Served) -> None:
    schema = httpx.get(f"{served.url}/openapi.json").json()
    (scheme,) = schema["components"]["securitySchemes"].values()
    assert scheme["scheme"] == "bearer"
    objects = schema["components"]["schemas"]
    assert "HTTPValidationError" not in objects
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert ("security" in operation) == asks_for_key(path)
    content = schema["paths"][CHAT]["post"]["responses"]["200"]["content"]
    event = content["text/event-stream"]["itemSchema"]["properties"]["data"]
    chunk, error = event["anyOf"][0]["contentSchema"]["anyOf"]
    assert chunk["$ref"] == "#/components/schemas/ChatChunk"
    assert error["$ref"] == "#/components/schemas/ErrorAnswer"
    # No reference leads nowhere.
    for name in re.findall(r'"#/components/schemas/(\w+)"', str(schema).replace("'", '"')):
        assert name in objects
