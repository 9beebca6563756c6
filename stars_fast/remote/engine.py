"""The engine whose language model runs on a server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import SystemRandom
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stars_fast.config import Combine, Quantize, TemplateLike, check_combine
from stars_fast.engine.requests import Request
from stars_fast.models.load import load_tokenizer
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.prompts import PromptReader, Reader
from stars_fast.remote.base import CallEngine, check_options, check_rewards
from stars_fast.remote.caller import CompletionsCaller
from stars_fast.remote.history import History, TextHistory, TokenHistory
from stars_fast.remote.http import Endpoint, RemoteError
from stars_fast.remote.prompts import TextPromptReader
from stars_fast.remote.routes import open_route
from stars_fast.remote.servers import find_server
from stars_fast.reward_head import RewardHeadLike
from stars_fast.rewards.base import Scorer
from stars_fast.rewards.load_several import RewardModelsLike, load_rewards
from stars_fast.text.decoders import Decodes

#: Size of an unknown vocabulary.
_MOST_TOKENS = 2**31


class RemoteEngine(CallEngine):
    """`Engine` with the language model on a server, such as one of OpenAI's completions API.

    The server draws segments, with their length as ``max_tokens``; the scheduler, the accept tests
    and the reward model run locally. Everything else is as in `Engine`: `generate`, `calibrate`,
    `add_request`, `step`, `abort`, `score`, and `AsyncEngine` on top.

    The methods are ``stars`` with each acceptance, ``vanilla``, ``rejection``, ``best_of_n``,
    ``smc`` and ``speculative_rejection``; segments end by length.

    Parameters
    ----------
    base_url
        Address of the API, such as ``http://127.0.0.1:8000/v1``.
    model
        Name of the model on the server; None: the only one that it has.
    reward_model
        As for `Engine`, except a `Persona`; or a `RemoteReward` or a `Judge`.
    server
        Kind of server, one of `SERVERS`; ``"auto"``: as its ``/models`` says.
    tokenizer
        The language model's, or its directory or hub id. With one, and a server that tells the ids
        of tokens (vLLM, SGLang, llama-server, ``stars-fast serve``), a response is known by its
        tokens and has the same law as with `Engine`. Otherwise it is known by its text, which the
        server tokenises again for each segment, and `CompletionOutput.token_ids` stay empty; a
        tokenizer then writes chat messages as text.
    sessions
        Keep the tokens of a request at an SGLang server, so that a call sends only where it
        continues them.
    logprobs
        Ask the server for log-probabilities, and for the `top_logprobs` of parameters. SGLang's are
        those behind the temperature, unless it runs with ``SGLANG_RETURN_ORIGINAL_LOGPROB=1``.
    api_key
        Sent as a bearer token; None: none is sent.
    max_concurrency
        Calls under way at once, at least 1.
    timeout, retries
        Limits of a call, see `stars_fast.remote.http.Endpoint`. A request whose call then fails
        ends with `RequestOutput.error` and affects no other.
    seed
        Each call is sent a seed that follows from this, the request, the segment, the position and
        the attempt, and draws one candidate: runs are repeatable where the server's draws are.
        None: one call draws all candidates of a response (``n``), without a seed, where a response
        is known by its tokens and the request has no seed.
    max_rows
        Most candidates drawn in one round, and most requests that run at once.
    overlap_scoring
        Draw for one half of the requests while the other half is scored on another thread.
    extra_body
        Fields that override the body of every call.
    chat_template_kwargs
        Variables of the tokenizer's chat template, see `Engine`.
    reward_template, reward_head, combine, combine_stds, reward_tokenizer, reward_device,
    reward_num_pages, reward_timeout, reward_quantize, dtype, allow_pickle
        Options of the reward model, see `Engine`; its device defaults to the GPU if there is one.
    parse_special
        See `Engine`. Prompts that are sent as text are tokenised by the server, which may read
        special tokens in them.
    trust_remote_code
        For tokenizers.

    Raises
    ------
    ValueError
        A parameter is out of range, the kind of server cannot be determined, or it has no sessions
        or log-probabilities.
    RemoteError
        The server cannot be asked for its models.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        reward_model: RewardModelsLike | None = None,
        *,
        server: str = "auto",
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        sessions: bool = False,
        logprobs: bool = False,
        api_key: str | None = None,
        max_concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 4,
        seed: int | None = 0,
        max_rows: int = 256,
        overlap_scoring: bool = True,
        extra_body: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reward_template: TemplateLike = None,
        reward_head: RewardHeadLike = None,
        combine: Combine = "sum",
        combine_stds: float = 1.0,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        reward_device: str | torch.device | None = None,
        reward_num_pages: int | None = None,
        reward_timeout: float | None = None,
        reward_quantize: Quantize = "none",
        dtype: str | torch.dtype = "auto",
        parse_special: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        check_options(max_rows, seed, reward_timeout, chat_template_kwargs, reward_quantize, dtype)
        check_combine(combine, combine_stds)
        check_rewards(
            reward_model,
            template=reward_template,
            head=reward_head,
            reward_tokenizer=reward_tokenizer,
        )
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = load_tokenizer(os.fspath(tokenizer), trust_remote_code=trust_remote_code)
        self._endpoint = Endpoint(
            base_url,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            max_connections=max_concurrency,
        )
        try:
            models = _models(self._endpoint) if server == "auto" or model is None else []
            found = find_server(server, models)
            self._server = found if tokenizer is None else found.by_tokens or found
            #: Name of the language model at the server.
            self.model_name = model if model is not None else _only(models)
            scorer: Scorer | None = None
            # By its tokens, or by its text.
            by_tokens = tokenizer is not None and self._server.token_ids
            self._route = open_route(
                self._endpoint,
                self._server,
                self.model_name,
                with_ids=by_tokens,
                sessions=sessions,
                logprobs=logprobs,
                bos=None if tokenizer is None else tokenizer.bos_token_id,
                extra_body=extra_body or {},
            )
            if reward_model is not None:
                scorer = load_rewards(
                    reward_model,
                    combine=combine,
                    combine_stds=combine_stds,
                    lm_tokenizer=tokenizer if by_tokens else None,
                    texts_only=not by_tokens,
                    reward_tokenizer=reward_tokenizer,
                    device=reward_device or ("cuda" if torch.cuda.is_available() else "cpu"),
                    dtype=dtype,
                    template=reward_template,
                    head=reward_head,
                    num_pages=reward_num_pages,
                    max_rows=max_rows,
                    parse_special=parse_special,
                    trust_remote_code=trust_remote_code,
                    allow_pickle=allow_pickle,
                    quantize=reward_quantize,
                    timeout=reward_timeout,
                )
        except BaseException:
            self._endpoint.close()
            raise
        self._history: History
        if by_tokens:
            assert tokenizer is not None
            self._history = TokenHistory(tokenizer)
            reader: Reader = PromptReader(
                tokenizer,
                len(tokenizer),
                None,
                chat_template_kwargs,
                parse_special=parse_special,
            )
            texts: Decodes = tokenizer
        else:
            history = TextHistory(counts_end=self._server.counts_end)
            self._history = history
            reader = TextPromptReader(tokenizer, chat_template_kwargs, parse_special=parse_special)
            texts = history.texts
        self._by_tokens = by_tokens
        self._caller = CompletionsCaller(
            self._route, self._history, max_concurrency=max_concurrency
        )
        end = None if tokenizer is None else tokenizer.eos_token_id
        super().__init__(
            reader,
            self._caller,
            self._history.prompt,
            scorer,
            texts,
            tokenizer=tokenizer,
            eos_ids=() if end is None else (int(end),),
            vocab_size=_MOST_TOKENS,
            seed=SystemRandom().getrandbits(64) if seed is None else seed,
            # A segment that ends within a character is drawn again, with the same seed.
            seeded=seed is not None or not by_tokens or self._server.one_each or sessions,
            max_rows=max_rows,
            overlap_scoring=overlap_scoring,
            rows_at_once=max_concurrency,
            has_logprobs=logprobs,
        )

    def stats(self) -> dict[str, float]:
        """Return counters as `Engine.stats` does.

        The counts of pages belong to no cache; ``lm_calls`` are calls of rounds. In addition:
        ``http_calls`` and ``http_retries`` of the language model's endpoint, and
        ``cut_characters``, segments that lost bytes of an incomplete character.
        """
        return {
            **super().stats(),
            **self._endpoint.stats(),
            "cut_characters": self._caller.cut_characters,
        }

    def close(self) -> None:
        """Close the connections; unfinished requests cannot continue."""
        super().close()
        self._route.close()
        self._endpoint.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resolve(self, params: StarsParams) -> StarsParams:
        """Check the parameters against the server, then as every `CallEngine` does."""
        if params.trace and not self._by_tokens:
            raise ValueError(
                "trace needs token ids: a server that tells them, and RemoteEngine(tokenizer=...)"
            )
        if params.ignore_eos and not self._by_tokens:
            raise ValueError(
                "ignore_eos needs token ids, for texts go on without special tokens: a server that "
                "tells them, and RemoteEngine(tokenizer=...)"
            )
        if params.top_logprobs and not self.has_logprobs:
            raise ValueError(
                "top_logprobs must be 0 with RemoteEngine(logprobs=False), got "
                f"{params.top_logprobs!r}"
            )
        self._server.check(params)
        return super()._resolve(params)

    def _drop(self, request: Request) -> None:
        super()._drop(request)
        self._history.forget(request.request_id)
        self._route.forget(request.request_id)

    def _shown(self, output: RequestOutput) -> RequestOutput:
        """Leave out what is not known, such as ids that stand for texts."""
        output = super()._shown(output)
        if self._by_tokens:
            return output
        texts = [replace(one, token_ids=[]) for one in output.outputs]
        return replace(output, prompt_token_ids=[], outputs=texts)


def _models(endpoint: Endpoint) -> list[dict[str, Any]]:
    answer = endpoint.get("/models")
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise RemoteError(f"{endpoint.url}/models: the answer has no list of models")
    return [model for model in data if isinstance(model, dict)]


def _only(models: Sequence[Mapping[str, Any]]) -> str:
    names = [str(model.get("id")) for model in models]
    if len(names) != 1:
        raise ValueError(
            f"model must be given: the server has {len(names)} models ({', '.join(names[:8])})"
        )
    return names[0]
