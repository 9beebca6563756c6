"""Calls of SGLang's own route, ``/generate``, by token ids.

Source: ``GenerateReqInput`` and ``SamplingParams`` of SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stars_fast.params import StarsParams
from stars_fast.remote.completions import Choice, checked_ids
from stars_fast.remote.http import Endpoint, RemoteError
from stars_fast.remote.servers import Server
from stars_fast.remote.sglang_sessions import Sessions

_BAD_REQUEST = 400


class SGLangGenerate:
    """Draws continuations at an SGLang server; a `Route`.

    Parameters
    ----------
    endpoint, server, extra_body
        See `Completions`.
    sessions
        Where requests are kept at the server; None: every call sends all tokens.
    logprobs
        See `RemoteEngine`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        server: Server,
        sessions: Sessions | None,
        *,
        logprobs: bool,
        extra_body: Mapping[str, Any],
    ) -> None:
        self._endpoint = endpoint
        self._server = server
        self._sessions = sessions
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
        """Return continuations, see `Route`."""
        assert isinstance(prompt, list)
        sampling = self._server.sampling(params, position, max_tokens)
        sampling |= {"max_new_tokens": max_tokens, "n": n}
        if "min_tokens" in sampling:
            sampling["min_new_tokens"] = sampling.pop("min_tokens")
        if seed is not None:
            sampling["sampling_seed"] = seed
        body: dict[str, Any] = {"sampling_params": sampling}
        if self._logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": params.top_logprobs}
        if self._sessions is None or n != 1:
            return self._choices(body | {"input_ids": prompt}, n, params.top_logprobs)[0]
        try:
            beginning = self._sessions.continued(request_id, prompt)
            (choice,), (rid,) = self._choices(body | beginning, 1, params.top_logprobs)
        except RemoteError as error:
            if error.status != _BAD_REQUEST:
                raise
            # The server may have lost the session, by a restart or its time limit.
            self._sessions.forget(request_id)
            return self._choices(body | {"input_ids": prompt}, 1, params.top_logprobs)[0]
        self._sessions.add(request_id, prompt, choice.token_ids or [], rid)
        return [choice]

    def forget(self, request_id: str) -> None:
        """Close the session of a request."""
        if self._sessions is not None:
            self._sessions.forget(request_id)

    def close(self) -> None:
        """Close all sessions."""
        if self._sessions is not None:
            self._sessions.close()

    def _choices(
        self, body: dict[str, Any], n: int, top_logprobs: int
    ) -> tuple[list[Choice], list[str]]:
        """Return what a call draws, and what the server calls each."""
        answer = self._endpoint.post(self._server.path, {**body, **self._extra}, at_root=True)
        answers: list[Any] = answer if isinstance(answer, list) else [answer]
        if len(answers) != n:
            raise RemoteError(f"the server returned {len(answers)} answers for n={n}")
        try:
            told = [_choice(one, self._logprobs, top_logprobs) for one in answers]
            return told, [str(one["meta_info"]["id"]) for one in answers]
        except (KeyError, IndexError, TypeError, ValueError):
            raise RemoteError(f"the answer is none of SGLang's: {answer!r:.200}") from None


def _choice(answer: Mapping[str, Any], logprobs: bool, top_logprobs: int) -> Choice:
    told = answer["meta_info"]
    reason = told["finish_reason"]
    if reason["type"] == "abort":
        # Some versions say so with a status of 200.
        raise RemoteError(f"the server aborted the call: {reason.get('message')}", _BAD_REQUEST)
    if reason["type"] not in ("stop", "length"):
        raise RemoteError(f"the server ended a segment with finish_reason {reason!r:.80}")
    ids = list(checked_ids(answer["output_ids"]))
    end = reason.get("matched")
    if reason["type"] == "stop" and isinstance(end, int) and ids[-1:] != [end]:
        ids.append(end)
    return Choice(
        str(answer.get("text", "")),
        reason["type"],
        ids,
        len(ids),
        [float(one[0]) for one in told["output_token_logprobs"]] if logprobs else [],
        [{int(one[1]): float(one[0]) for one in place} for place in told["output_top_logprobs"]]
        if top_logprobs
        else [],
    )
