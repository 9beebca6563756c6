"""Clients of the server: one streaming request as it is seen from outside.

Run as a script, they are in a process of their own, which reads tasks from its input, a JSON object
``{"url": ..., "prompts": [...], "at_once": ...}`` a line, streams its requests at once or one after
the other, and writes how long all took, the seconds to each first chunk, and the texts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Answer:
    """What came back of a request.

    Attributes
    ----------
    status
        Of HTTP; 0 if the connection ended before there was one.
    text
        Of the first choice.
    error
        OpenAI's ``error`` object, of the body or of an event.
    complete
        Whether the answer came to its end: a body, or a stream as far as ``[DONE]``.
    chunks
        Seconds from sending to each chunk of a stream.
    seconds
        From sending to the end.
    tokens
        ``usage.completion_tokens``; 0 if it was not sent.
    prompt_tokens
        ``usage.prompt_tokens``; 0 if it was not sent.
    headers
        Of the response.
    """

    status: int = 0
    text: str = ""
    error: dict[str, Any] | None = None
    complete: bool = False
    chunks: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    headers: dict[str, str] = field(default_factory=dict)


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any] | bytes,
    *,
    request_id: str | None = None,
    leave_after: int | None = None,
) -> Answer:
    """Post to ``/v1/completions`` and read what comes.

    Parameters
    ----------
    session
        Without a timeout of its own.
    url
        The server's.
    body
        A dictionary is sent as JSON, bytes as they are.
    request_id
        Sent as ``X-Request-Id``.
    leave_after
        Close the connection after so many chunks; None: never.
    """
    answer, begun = Answer(), time.perf_counter()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if request_id is not None:
        headers["X-Request-Id"] = request_id
    async with session.post(f"{url}/v1/completions", data=data, headers=headers) as response:
        answer.status = response.status
        answer.headers = dict(response.headers)
        if response.content_type != "text/event-stream":
            found = await response.json()
            answer.error = found.get("error")
            if answer.error is None:
                answer.text = found["choices"][0]["text"]
                _count(answer, found["usage"])
            answer.complete = True
        else:
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    answer.complete = True
                    break
                answer.chunks.append(time.perf_counter() - begun)
                _read(answer, json.loads(line[6:]))
                if leave_after is not None and len(answer.chunks) >= leave_after:
                    response.close()
                    break
    answer.seconds = time.perf_counter() - begun
    return answer


def _read(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = event["error"]
        return
    if event.get("usage"):
        _count(answer, event["usage"])
    for choice in event["choices"]:
        if choice["index"] == 0:
            answer.text += choice["text"]


def _count(answer: Answer, usage: dict[str, Any]) -> None:
    answer.tokens = usage["completion_tokens"]
    answer.prompt_tokens = usage["prompt_tokens"]


def many_connections() -> aiohttp.ClientSession:
    """Return a session that opens as many connections as there are requests, and waits for all."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def read_metrics(text: str) -> dict[str, float]:
    """Return the values of Prometheus's text by their names, labels included."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def _serve_tasks() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        async with many_connections() as session:
            begun = time.perf_counter()
            requests = [
                complete(session, task["url"], {"prompt": prompt, "seed": i, "stream": True})
                for i, prompt in enumerate(task["prompts"])
            ]
            if task["at_once"]:
                answers = await asyncio.gather(*requests)
            else:
                answers = [await request for request in requests]
            seconds = time.perf_counter() - begun
        found = {"seconds": seconds, "firsts": [answer.chunks[0] for answer in answers]}
        print(json.dumps({**found, "texts": [answer.text for answer in answers]}), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve_tasks())
