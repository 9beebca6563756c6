"""OpenAI's Python client: chats that go on, streams, responses, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="needs openai, of the extra test")

TURN = {"role": "user", "content": "The film"}
FIXED: dict[str, Any] = {"max_tokens": 12, "seed": 7}


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as made:
        yield made


def test_a_chat_goes_on_with_our_own_answer(client: Any, served: Any) -> None:
    answer = client.chat.completions.create(model=served.model, messages=[TURN], **FIXED)
    message = answer.choices[0].message
    assert message.content
    texts = set()
    for sent in (
        message,
        message.model_dump(),
        {"role": "assistant", "content": message.content, "name": "me"},
    ):
        history = [{"role": "developer", "content": "Be brief."}, TURN, sent, TURN]
        reply = client.chat.completions.create(model=served.model, messages=history, **FIXED)
        assert reply.usage.prompt_tokens > answer.usage.prompt_tokens
        texts.add(reply.choices[0].message.content)
    assert len(texts) == 1


def test_tools_in_the_history_go_through_the_template(client: Any, served: Any) -> None:
    call = {"name": "look", "arguments": '{"at": "it"}'}
    history = [
        TURN,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "a kettle"},
    ]
    reply = client.chat.completions.create(model=served.model, messages=history, **FIXED)
    short = client.chat.completions.create(model=served.model, messages=[TURN], **FIXED)
    assert reply.usage.prompt_tokens > short.usage.prompt_tokens


def test_a_stream_is_the_answer(client: Any, served: Any) -> None:
    options = {"model": served.model, "messages": [TURN], **FIXED}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_log_probabilities_come_with_the_likeliest_tokens(client: Any, served: Any) -> None:
    answer = client.chat.completions.create(
        model=served.model, messages=[TURN], logprobs=True, top_logprobs=3, temperature=0, **FIXED
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # it is greedy


def test_a_prompt_is_echoed_with_its_log_probabilities(client: Any, served: Any) -> None:
    options: dict[str, Any] = {"model": served.model, "temperature": 0, "logprobs": 2}
    alone = client.completions.create(prompt="The film is", max_tokens=4, **options)
    both = client.completions.create(prompt="The film is", max_tokens=4, echo=True, **options)
    assert both.choices[0].text == "The film is" + alone.choices[0].text
    shown, drawn = both.choices[0].logprobs, alone.choices[0].logprobs
    assert shown.token_logprobs[0] is None
    assert all(value < 0 for value in shown.token_logprobs[1:])
    assert shown.token_logprobs[-4:] == pytest.approx(drawn.token_logprobs, abs=1e-4)
    assert [len(shown.tokens), len(shown.top_logprobs)] == [len(shown.token_logprobs)] * 2


def test_responses_are_the_chat_under_another_address(client: Any, served: Any) -> None:
    chat = client.chat.completions.create(
        model=served.model, messages=[TURN], max_tokens=16, temperature=0
    )
    options = {"model": served.model, "max_output_tokens": 16, "temperature": 0}
    answer = client.responses.create(input="The film", **options)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    events = list(client.responses.create(input="The film", stream=True, **options))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == answer.output_text
    assert events[-1].response.usage == answer.usage
    more = client.responses.create(input=[TURN, *answer.output, TURN], **options)
    assert more.usage.input_tokens > answer.usage.input_tokens


def test_fields_that_ask_for_nothing_change_nothing(client: Any, served: Any) -> None:
    options = {"model": served.model, "messages": [TURN], **FIXED}
    plain = client.chat.completions.create(**options)
    full = client.chat.completions.create(
        **options,
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        metadata={"a": "b"},
        modalities=["text"],
        parallel_tool_calls=True,
        prompt_cache_key="key",
        response_format={"type": "text"},
        safety_identifier="someone",
        service_tier="auto",
        store=False,
        tool_choice="none",
        user="someone",
        extra_body={"repetition_penalty": 1.0, "min_tokens": 0, "skip_special_tokens": True},
    )
    assert full.choices[0].message == plain.choices[0].message


def test_a_method_by_the_models_name(client: Any, served: Any) -> None:
    options = {"messages": [TURN], **FIXED}
    named = client.chat.completions.create(model=f"{served.model}:best_of_n:2", **options)
    stars = {"method": "best_of_n", "candidates": 2}
    given = client.chat.completions.create(
        model=served.model, extra_body={"stars": stars}, **options
    )
    assert named.choices == given.choices
    assert named.usage.discarded_tokens > 0  # those of the response that was not chosen
