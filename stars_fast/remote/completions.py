"""Calls of ``/completions``: a prompt in, the texts or tokens that continue it out.

A `Route` is a way to draw continuations at a server. OpenAI's is here; the routes that servers have
of their own, for token ids, are in a file each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from stars_fast.params import StarsParams
from stars_fast.remote.http import Endpoint, RemoteError
from stars_fast.remote.servers import Server


@dataclass(frozen=True)
class Choice:
    """One continuation.

    Attributes
    ----------
    text
        Without special tokens.
    finish
        ``"stop"``: a token ended it. ``"length"``: it has as many tokens as were asked for.
    token_ids
        None where the server does not tell them.
    count
        Tokens, as the server counts them; None where it does not say.
    logprobs, top_logprobs
        As `stars_fast.remote.calls.Drawn` has them.
    """

    text: str
    finish: Literal["stop", "length"]
    token_ids: list[int] | None
    count: int | None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)


class Route(Protocol):
    """Draws continuations at a server; calls may come from many threads."""

    def draw(
        self,
        prompt: str | list[int],
        params: StarsParams,
        max_tokens: int,
        *,
        request_id: str,
        n: int = 1,
        seed: int | None = None,
        position: int = 0,
    ) -> list[Choice]:
        """Return `n` continuations of at most `max_tokens` tokens, behind `position` of them.

        Stop texts are not sent: they can begin in one segment and end in the next, which no server
        sees.

        Raises
        ------
        RemoteError
            The call failed, or its answer is not what was asked for.
        """
        ...

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request, here and at the server, without waiting."""
        ...

    def close(self) -> None:
        """Drop what is kept for all."""
        ...


class Completions:
    """Draws continuations at a server of OpenAI's completions; a `Route`.

    Parameters
    ----------
    endpoint
        Where it is.
    server
        What it is.
    model
        Name of the model there.
    with_ids
        Ask for the token ids.
    extra_body
        Put over the body of every call.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        server: Server,
        model: str,
        *,
        with_ids: bool,
        extra_body: Mapping[str, Any],
    ) -> None:
        self._endpoint = endpoint
        self._server = server
        self._model = model
        self._with_ids = with_ids
        self._extra = dict(extra_body)

    def draw(
        self,
        prompt: str | list[int],
        params: StarsParams,
        max_tokens: int,
        *,
        request_id: str = "",
        n: int = 1,
        seed: int | None = None,
        position: int = 0,
    ) -> list[Choice]:
        """Return continuations, see `Route`."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            **self._server.sampling(params, position, max_tokens),
        }
        if n != 1:  # some servers refuse the very name
            body["n"] = n
        if seed is not None:
            body["seed"] = seed
        if self._with_ids:
            body["return_token_ids"] = True
        answer = self._endpoint.post(self._server.path, {**body, **self._extra})
        if not isinstance(answer, dict):
            raise RemoteError(f"the server returned {answer!r:.80} where a completion was due")
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != n:
            raise RemoteError(f"the server returned {_number(choices)} for n={n}")
        count = _usage(answer) if n == 1 else None
        in_order = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [_choice(choice, count) for choice in in_order]

    def forget(self, request_id: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def checked_ids(value: object) -> list[int]:
    """Return token ids.

    Raises
    ------
    RemoteError
        They are something else.
    """
    if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
        raise RemoteError(f"the server returned {value!r:.80} where token ids were due")
    return value


def _number(choices: object) -> str:
    return f"{len(choices)} choices" if isinstance(choices, list) else "no choices"


def _usage(answer: Mapping[str, Any]) -> int | None:
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _choice(choice: Mapping[str, Any], count: int | None) -> Choice:
    text, finish, ids = (choice.get(name) for name in ("text", "finish_reason", "token_ids"))
    if not isinstance(text, str):
        raise RemoteError(f"the server returned {text!r:.80} where a choice's text was due")
    if finish not in ("stop", "length"):
        raise RemoteError(f"the server ended a segment with finish_reason {finish!r}")
    if ids is not None:
        ids = checked_ids(ids)
    return Choice(text, finish, ids, len(ids) if ids is not None else count)
