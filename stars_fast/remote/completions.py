"""Calls of ``/completions``: a prompt in, the texts or tokens that continue it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    """

    text: str
    finish: Literal["stop", "length"]
    token_ids: list[int] | None
    count: int | None


class Completions:
    """Draws continuations at a server.

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
            The call failed, or its answer is not that of a completion.
        """
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
        answer = self._endpoint.post("/completions", {**body, **self._extra})
        if not isinstance(answer, dict):
            raise RemoteError(f"the server returned {answer!r:.80} where a completion was due")
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != n:
            raise RemoteError(f"the server returned {_number(choices)} for n={n}")
        count = _usage(answer) if n == 1 else None
        in_order = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [_choice(choice, count) for choice in in_order]


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
    if ids is not None and not (
        isinstance(ids, list) and all(isinstance(token, int) for token in ids)
    ):
        raise RemoteError(f"the server returned {ids!r:.80} where token ids were due")
    return Choice(text, finish, ids, len(ids) if ids is not None else count)
