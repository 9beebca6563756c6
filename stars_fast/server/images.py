"""Pictures that chats link to, from hosts that the server was told of."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from stars_fast.images import MAX_BYTES, open_image

#: Seconds that a host has for a picture.
_TIMEOUT = 20.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it may lead to a host that nobody allowed."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Return no further request: the redirect is an error."""


async def fetch_images(prompts: Sequence[Any], hosts: Sequence[str]) -> list[Any]:
    """Return chats with the pictures in the place of links to them; others as they are.

    Parameters
    ----------
    prompts
        Of any kind.
    hosts
        Names, or ``name:port``, from which pictures may be fetched.

    Raises
    ------
    ValueError
        A link leads elsewhere, or there is no picture at it.
    """
    return [await _with_images(prompt, hosts) for prompt in prompts]


async def _with_images(prompt: Any, hosts: Sequence[str]) -> Any:  # noqa: ANN401
    if not isinstance(prompt, Mapping):
        return prompt
    messages = []
    for i, message in enumerate(prompt["messages"]):
        content = message.get("content")
        if isinstance(content, list):
            where = f"messages[{i}].content"
            parts = [await _fetched(f"{where}[{j}]", part, hosts) for j, part in enumerate(content)]
            message = {**message, "content": parts}  # noqa: PLW2901
        messages.append(message)
    return {**prompt, "messages": messages}


async def _fetched(where: str, part: Any, hosts: Sequence[str]) -> Any:  # noqa: ANN401
    """Return a part of a message, an image instead of a link to one."""
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return part
    url = (part.get("image_url") or {}).get("url")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return part
    name = f"{where}.image_url.url"
    try:
        split = urlsplit(url)
        host = split.hostname or ""
        known = {host, f"{host}:{split.port}"}
    except ValueError as error:
        raise ValueError(f"{name} is no link: {error}") from None
    if not known & {one.lower() for one in hosts}:
        raise ValueError(f"{name} leads to {host!r}, from which this server fetches no pictures")
    try:
        data = await asyncio.wait_for(asyncio.to_thread(_read, url), _TIMEOUT)
    except asyncio.TimeoutError:
        raise ValueError(f"{name} cannot be fetched: it takes over {_TIMEOUT:g} s") from None
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{name} cannot be fetched: {error}") from None
    return {"type": "image", "image": await asyncio.to_thread(open_image, data, name)}


def _read(url: str) -> bytes:
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(url, timeout=_TIMEOUT) as answer:  # its scheme was looked at
            data: bytes = answer.read(MAX_BYTES + 1)
    except HTTPError as error:
        with error:  # an answer, too
            raise ValueError(str(error)) from None
    return data
