"""Calls of the own route of llama.cpp's ``llama-server``, ``/completion``, by token ids.

Source: ``tools/server/README.md`` of llama.cpp. The server of llama-cpp-python has no such route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from stars_fast.params import StarsParams
from stars_fast.remote.completions import Choice, checked_ids
from stars_fast.remote.http import Endpoint, RemoteError
from stars_fast.remote.servers import Server

#: The samplers, in the order of `StarsParams`; those that are not named are off.
_SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")
#: What would replace them or change one of them.
_FIXED = {"mirostat": 0, "dynatemp_range": 0.0, "min_keep": 0}
_FINISH: dict[str, Literal["stop", "length"]] = {"eos": "stop", "word": "stop", "limit": "length"}


class LlamaCompletion:
    """Draws continuations at a ``llama-server``; a `Route`.

    The server gives a call to the free slot whose last prompt is most like the call's own, and
    reads only what differs (``cache_prompt``): a slot of a call's own would let candidates wait for
    one another.

    Parameters
    ----------
    endpoint, server, model, extra_body
        See `Completions`.
    logprobs
        See `RemoteEngine`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        server: Server,
        model: str,
        *,
        logprobs: bool,
        extra_body: Mapping[str, Any],
    ) -> None:
        self._endpoint = endpoint
        self._server = server
        self._model = model
        self._logprobs = logprobs
        self._extra = dict(extra_body)

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
        """Return the continuation, see `Route`."""
        assert n == 1
        sampling = self._server.sampling(params, position, max_tokens)
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "n_predict": max_tokens,
            "return_tokens": True,
            "cache_prompt": True,
            "id_slot": -1,
            "samplers": _SAMPLERS,
            "repeat_penalty": sampling.pop("repetition_penalty"),
            "repeat_last_n": -1,
            "logit_bias": list(map(list, (params.logit_bias or {}).items())),
            **_FIXED,
            **{name: sampling[name] for name in sampling if name != "logit_bias"},
        }
        if seed is not None:
            body["seed"] = seed
        if self._logprobs:
            body["n_probs"] = max(1, params.top_logprobs)
        answer = self._endpoint.post(self._server.path, {**body, **self._extra}, at_root=True)
        try:
            return [self._choice(answer, params.top_logprobs)]  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError):
            raise RemoteError(f"the answer is none of llama-server's: {answer!r:.200}") from None

    def forget(self, request_id: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def _choice(self, answer: Mapping[str, Any], top_logprobs: int) -> Choice:
        ids = checked_ids(answer["tokens"])
        reason = answer["stop_type"]
        if reason not in _FINISH:
            raise RemoteError(f"the server ended a segment with stop_type {reason!r:.80}")
        places = answer["completion_probabilities"] if self._logprobs else []
        return Choice(
            str(answer["content"]),
            _FINISH[reason],
            ids,
            len(ids),
            [float(place["logprob"]) for place in places],
            [
                {int(one["id"]): float(one["logprob"]) for one in place["top_logprobs"]}
                for place in places
            ]
            if top_logprobs
            else [],
        )
