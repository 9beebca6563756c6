"""Servers of the letter model with the routes that SGLang and llama-server have for token ids.

Written from their documentation and source; SGLang's wheel needs CUDA, and llama-server no pip.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from helpers.json_server import Answer, json_server
from helpers.letter_law import EOS, next_probs
from helpers.tiny_lm import LETTERS


@dataclass
class TokenServer:
    """What a server was asked, and what it keeps.

    Attributes
    ----------
    url
        Its address, as `RemoteEngine` takes it.
    bodies
        By path, in the order in which they came.
    contexts
        The ids that each call continued, as the server has put them together.
    sessions
        SGLang's that are open: by name, what each call began with and what it drew.
    """

    owner: str
    url: str = ""
    bodies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    contexts: list[list[int]] = field(default_factory=list)
    sessions: dict[str, dict[str, tuple[list[int], list[int]]]] = field(default_factory=dict)
    opened: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    _names: Iterator[int] = field(default_factory=itertools.count)

    def answer(self, path: str, body: Any, headers: dict[str, str]) -> Answer:
        """Answer one call."""
        with self.lock:
            self.bodies.setdefault(path, []).append(body)
            try:
                if path == "/v1/models":
                    return 200, {}, {"data": [{"id": "letters", "owned_by": self.owner}]}
                routes = {
                    ("sglang", "/generate"): self._generate,
                    ("sglang", "/open_session"): self._open_session,
                    ("sglang", "/close_session"): self._close_session,
                    ("llamacpp", "/completion"): self._completion,
                }
                return 200, {}, routes[self.owner, path](body)
            except ValueError as error:
                return 400, {}, {"error": {"message": str(error)}}

    def _open_session(self, body: dict[str, Any]) -> str:
        assert isinstance(body["capacity_of_str_len"], int)
        self.opened += 1
        name = f"session-{next(self._names)}"
        self.sessions[name] = {}
        return name

    def _close_session(self, body: dict[str, Any]) -> bytes:
        self.sessions.pop(body["session_id"], None)
        return b""

    def _generate(self, body: dict[str, Any]) -> Any:
        sampling = body["sampling_params"]
        assert not {"seed", "min_tokens"} & sampling.keys()
        if not body["input_ids"]:
            raise ValueError("input_ids cannot be empty.")
        ids = self._context(body["input_ids"], body.get("session_params"))
        answers = []
        for number in range(sampling["n"]):
            drawn, stopped, logprobs, top = draw(
                ids, sampling, sampling["max_new_tokens"], sampling.get("sampling_seed"), number
            )
            told: dict[str, Any] = {
                "id": f"call-{next(self._names)}",
                "finish_reason": {"type": "stop", "matched": EOS}
                if stopped
                else {"type": "length", "length": len(drawn)},
                "prompt_tokens": len(ids),
                "completion_tokens": len(drawn),
            }
            if body.get("return_logprob"):
                told["output_token_logprobs"] = [
                    [value, token, None] for value, token in zip(logprobs, drawn, strict=True)
                ]
                if body["top_logprobs_num"]:
                    told["output_top_logprobs"] = [
                        [[value, token, None] for token, value in place[: body["top_logprobs_num"]]]
                        for place in top
                    ]
            if "session_params" in body:
                self.sessions[body["session_params"]["id"]][told["id"]] = (ids, drawn)
            answers.append({"text": text(drawn), "output_ids": drawn, "meta_info": told})
        self.contexts += [ids]
        return answers if sampling["n"] > 1 else answers[0]

    def _context(self, ids: list[int], params: dict[str, Any] | None) -> list[int]:
        """Put together what a call continues, as `Session.create_req` of SGLang does."""
        if params is None:
            return ids
        if params["id"] not in self.sessions:
            raise ValueError(f"Invalid request: session id {params['id']} does not exist")
        if params.get("rid") is None:
            return ids
        if params["rid"] not in self.sessions[params["id"]]:
            raise ValueError("Invalid request session id")
        origin, drawn = self.sessions[params["id"]][params["rid"]]
        before = origin if params.get("drop_previous_output") else origin + drawn
        return (before[: params["offset"]] if params.get("offset") else before) + ids

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        assert (body["return_tokens"], body["cache_prompt"], body["id_slot"]) == (True, True, -1)
        assert body["samplers"] == ["penalties", "temperature", "top_k", "top_p", "min_p"]
        ids = body["prompt"]
        drawn, stopped, logprobs, top = draw(ids, body, body["n_predict"], body.get("seed"), 0)
        self.contexts += [ids]
        answer: dict[str, Any] = {
            "content": text(drawn), "tokens": drawn, "stop": True, "id_slot": 0,
            "stop_type": "eos" if stopped else "limit", "stopping_word": "", "truncated": False,
        }  # fmt: skip
        if body.get("n_probs"):
            answer["completion_probabilities"] = [
                {
                    "id": token, "token": LETTERS[token], "logprob": value,
                    "top_logprobs": [
                        {"id": one, "token": LETTERS[one], "logprob": likely}
                        for one, likely in place[: body["n_probs"]]
                    ],
                }
                for token, value, place in zip(drawn, logprobs, top, strict=True)
            ]  # fmt: skip
        return answer


def text(ids: list[int]) -> str:
    """The text of drawn ids, without the end."""
    return "".join(LETTERS[token] for token in ids if token != EOS)


def draw(
    ids: list[int], sampling: dict[str, Any], length: int, seed: int | None, number: int
) -> tuple[list[int], bool, list[float], list[list[tuple[int, float]]]]:
    """Draw tokens; the log-probabilities are raw."""
    source = random.Random(None if seed is None else json.dumps([seed, len(ids), number]))
    drawn: list[int] = []
    logprobs, top = [], []
    while len(drawn) < length and drawn[-1:] != [EOS]:
        so_far = (*ids, *drawn)
        raw = next_probs(so_far, 1.0, "")
        if sampling["temperature"] == 0:
            token = max(range(len(raw)), key=raw.__getitem__)
        else:
            weights = next_probs(so_far, sampling["temperature"], "")
            token = source.choices(range(len(raw)), weights)[0]
        drawn.append(token)
        logprobs.append(math.log(raw[token]))
        order = sorted(range(len(raw)), key=raw.__getitem__, reverse=True)
        top.append([(one, math.log(raw[one])) for one in order])
    return drawn, drawn[-1:] == [EOS], logprobs, top


@contextmanager
def token_server(owner: str) -> Iterator[TokenServer]:
    """Run one; `owner` is what its ``/models`` says, ``"sglang"`` or ``"llamacpp"``."""
    server = TokenServer(owner)
    with json_server(server.answer) as url:
        server.url = f"{url}/v1"
        yield server
