"""What servers take and tell beside OpenAI's parameters.

A parameter that a server does not take is an error before any call, never dropped: it would change
the distribution. Every parameter that a server takes is sent, for its own defaults are others, and
may come from the model's ``generation_config.json``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from stars_fast.params import StarsParams

#: Parameters that not every server takes, with the value that asks for nothing.
_OFF: dict[str, object] = {
    "top_k": 0,
    "min_p": 0.0,
    "ignore_eos": False,
    "stop_token_ids": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "min_tokens": 0,
}

#: Penalties for the tokens of the response, which a server counts in its own call only.
_COUNTED_BY_CALL = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Server:
    """A kind of server.

    Attributes
    ----------
    name
        As `RemoteEngine` takes it.
    takes
        Of the parameters that not every server takes.
    where
        How the parameters beside OpenAI's are sent: in the ``"body"``, in its ``"stars"`` object,
        or as a ``"generation_config"`` of transformers.
    no_top_k
        What stands for no `top_k`.
    extra
        Sent with every call: it turns defaults off that would change the distribution.
    token_ids
        It continues token ids, and tells those that it drew if ``return_token_ids`` asks for them.
    counts_end
        Its ``usage`` counts the end-of-sequence token.
    path
        Where it is called: below the address of the API, or for a route of its own at the root.
    logprobs
        It tells log-probabilities by token id.
    sessions
        It can keep the tokens of a request.
    one_each
        A call draws one continuation.
    by_tokens
        The same server at a route of its own that takes and tells token ids; None: there is none.
    """

    name: str
    takes: frozenset[str]
    where: Literal["body", "stars", "generation_config"] = "body"
    no_top_k: int = 0
    extra: tuple[tuple[str, Any], ...] = ()
    token_ids: bool = False
    counts_end: bool = True
    path: Literal["/completions", "/generate", "/completion"] = "/completions"
    logprobs: bool = False
    sessions: bool = False
    one_each: bool = False
    by_tokens: Server | None = None

    def check(self, params: StarsParams) -> None:
        """Refuse parameters that the server does not take.

        Raises
        ------
        ValueError
            Naming the first of them.
        """
        for name, off in _OFF.items():
            value = getattr(params, name)
            if name not in self.takes and value != off:
                raise ValueError(
                    f"{name} must be {off!r} with server={self.name!r}, which does not take it, "
                    f"got {value!r}"
                )

    def sampling(self, params: StarsParams, position: int, max_tokens: int) -> dict[str, Any]:
        """Return the part of a call's body that says how its tokens are drawn.

        Parameters
        ----------
        params
            Of the request.
        position
            Tokens of the response before those of the call.
        max_tokens
            Tokens of the call at most.
        """
        own: dict[str, Any] = {}
        if "top_k" in self.takes:
            own["top_k"] = params.top_k or self.no_top_k
        if "min_p" in self.takes:
            own["min_p"] = params.min_p
        if "ignore_eos" in self.takes:
            own["ignore_eos"] = params.ignore_eos
        if "stop_token_ids" in self.takes and params.stop_token_ids:
            own["stop_token_ids"] = list(params.stop_token_ids)
        if "repetition_penalty" in self.takes:  # also where it is off, for the model may have one
            own["repetition_penalty"] = params.repetition_penalty
        for name in _COUNTED_BY_CALL:
            if getattr(params, name):
                own[name] = getattr(params, name)
        if params.logit_bias:
            own["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
        if params.min_tokens > position:
            own["min_tokens"] = min(params.min_tokens - position, max_tokens)
        shared = {"temperature": params.temperature, "top_p": params.top_p}
        if self.where == "stars":
            return {**shared, "stars": {"method": "vanilla", **own}}
        if self.where == "generation_config":
            # It replaces the model's own, which may well say that nothing is sampled.
            draws = {"do_sample": True, **shared, **own}
            greedy = {"do_sample": False, "repetition_penalty": params.repetition_penalty}
            return {
                "generation_config": json.dumps(draws if params.temperature else greedy),
                **dict(self.extra),
            }
        return {**shared, **own, **dict(self.extra)}


_ALL = frozenset(_OFF)
_OPENAI = frozenset({"presence_penalty", "frequency_penalty", "logit_bias"})
_LLAMA = frozenset({"top_k", "min_p"})
_NO_PENALTY = (("repeat_penalty", 1.0),)

#: By name.
SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Server("vllm", _ALL, no_top_k=-1, token_ids=True),
        Server(
            "sglang",
            _ALL,
            no_top_k=-1,
            by_tokens=Server(
                "sglang",
                _ALL,
                no_top_k=-1,
                token_ids=True,
                path="/generate",
                logprobs=True,
                sessions=True,
            ),
        ),
        Server(
            "llama.cpp",
            _LLAMA,
            extra=_NO_PENALTY,
            counts_end=False,
            by_tokens=Server(
                "llama.cpp",
                _LLAMA | {"ignore_eos", "logit_bias", "repetition_penalty"},
                token_ids=True,
                path="/completion",
                logprobs=True,
                one_each=True,
            ),
        ),
        Server("llama-cpp-python", _LLAMA, extra=_NO_PENALTY, counts_end=False),
        Server(
            "transformers",
            frozenset({"top_k", "min_p", "repetition_penalty"}),
            where="generation_config",
        ),
        Server("stars_fast", _ALL, where="stars", token_ids=True),
        Server("openai", _OPENAI),
    )
}

#: What the servers' ``/models`` says of who owns a model.
_OWNERS = {
    "vllm": "vllm",
    "sglang": "sglang",
    "llamacpp": "llama.cpp",
    "me": "llama-cpp-python",
    "stars_fast": "stars_fast",
}


def find_server(name: str, models: list[dict[str, Any]]) -> Server:
    """Return the server of a name, or for ``"auto"`` the one that `models` gives away.

    Parameters
    ----------
    name
        One of `SERVERS`, or ``"auto"``.
    models
        The ``data`` of its ``/models``.

    Raises
    ------
    ValueError
        There is no such server, or it cannot be told.
    """
    if name != "auto":
        if name not in SERVERS:
            known = ", ".join(map(repr, SERVERS))
            raise ValueError(f"server must be 'auto' or one of {known}, got {name!r}")
        return SERVERS[name]
    owners = {str(model.get("owned_by")) for model in models}
    found = {_OWNERS[owner] for owner in owners if owner in _OWNERS}
    if len(found) != 1:
        raise ValueError(
            f"server='auto': /models does not tell what the server is (owned_by: "
            f"{', '.join(sorted(owners)) or 'no model'}); pass server= one of "
            f"{', '.join(map(repr, SERVERS))}"
        )
    return SERVERS[found.pop()]
