"""The route at which a server is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stars_fast.remote.completions import Completions, Route
from stars_fast.remote.http import Endpoint
from stars_fast.remote.llama_cpp import LlamaCompletion
from stars_fast.remote.servers import SERVERS, Server
from stars_fast.remote.sglang import SGLangGenerate
from stars_fast.remote.sglang_sessions import Sessions


def open_route(
    endpoint: Endpoint,
    server: Server,
    model: str,
    *,
    with_ids: bool,
    sessions: bool,
    logprobs: bool,
    bos: int | None,
    extra_body: Mapping[str, Any],
) -> Route:
    """Return the route of a server.

    Parameters
    ----------
    endpoint, server, model, with_ids, extra_body
        See `Completions`.
    sessions, logprobs
        See `RemoteEngine`.
    bos
        The token that begins a text.

    Raises
    ------
    ValueError
        The server has no sessions, or tells no log-probabilities.
    """
    for option, wanted in (("sessions", sessions), ("logprobs", logprobs)):
        if wanted and not getattr(server, option):
            able = [one.name for one in SERVERS.values() if getattr(one.by_tokens, option, False)]
            raise ValueError(
                f"{option} must be False with server={server.name!r}"
                f"{'' if with_ids else ' without tokenizer='}: it needs tokenizer= and server="
                f"{' or '.join(map(repr, able))}"
            )
    if server.path == "/generate":
        kept = Sessions(endpoint, bos) if sessions else None
        return SGLangGenerate(endpoint, server, kept, logprobs=logprobs, extra_body=extra_body)
    if server.path == "/completion":
        return LlamaCompletion(endpoint, server, model, logprobs=logprobs, extra_body=extra_body)
    return Completions(endpoint, server, model, with_ids=with_ids, extra_body=extra_body)
