"""LiteLLM's proxy in front of the server, and OpenAI's client in front of the proxy."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.client_programs import program
from helpers.server_process import free_port, other_server

openai = pytest.importorskip("openai", reason="needs openai, of the extra test")

TURN = {"role": "user", "content": "The film"}


@pytest.fixture(scope="module")
def proxy(served: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run the proxy; yields a client of it, for the model "aligned"."""
    command = [program("litellm")]
    folder = tmp_path_factory.mktemp("proxy")
    behind = {
        "model": f"openai/{served.model}",
        "api_base": f"{served.url}/v1",
        "api_key": "none",
    }
    models = [{"model_name": "aligned", "litellm_params": behind}]
    (folder / "config.yaml").write_text(json.dumps({"model_list": models}))  # JSON is YAML
    port = free_port()
    key = f"sk-{secrets.token_hex(24)}"
    command += ["--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    secret = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (
        other_server(command, folder / "log", port, **secret) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120) as client,
    ):
        yield client


def test_chats_streams_and_responses_come_through(proxy: Any) -> None:
    options: dict[str, Any] = {"model": "aligned", "messages": [TURN], "max_tokens": 12, "seed": 7}
    answer = proxy.chat.completions.create(**options)
    message = answer.choices[0].message
    assert message.content
    chunks = list(
        proxy.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == message.content
    longer = proxy.chat.completions.create(**options | {"messages": [TURN, message, TURN]})
    assert longer.usage.prompt_tokens > answer.usage.prompt_tokens
    response = proxy.responses.create(model="aligned", input="The film", max_output_tokens=16)
    assert response.output_text


def test_what_is_refused_closes_nothing(proxy: Any) -> None:
    """A 404 would make the proxy send nothing to this server for a while."""
    options: dict[str, Any] = {"model": "aligned", "messages": [TURN], "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="temperature"):
        proxy.chat.completions.create(**options, temperature=-1)
    assert proxy.chat.completions.create(**options).choices[0].finish_reason
