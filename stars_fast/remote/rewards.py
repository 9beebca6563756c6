"""A reward model behind HTTP: vLLM's classification API."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, Literal, TypeAlias

from stars_fast.remote.http import Endpoint, RemoteError

RewardTemplate: TypeAlias = "str | Callable[[str, str], str]"


class RemoteReward:
    """A reward model on a server, for ``reward_model=`` of `RemoteEngine` or `Engine`.

    It requests the scores of texts in the form of vLLM's ``/classify`` and ``/pooling``
    (docs.vllm.ai, "Classification API" and "Pooling API")::

        POST URL {"model": ..., "input": [text, ...], "use_activation": false}
        -> {"data": [{"index": 0, "probs": [score]}, ...]}          # /classify
        -> {"data": [{"index": 0, "data": [score]}, ...]}           # /pooling

    ``vllm serve MODEL --runner pooling`` answers this for a sequence classifier with one label.
    Where a score for each token is returned, ``[[score], ...]``, the last one counts.

    Parameters
    ----------
    url
        The whole address, such as ``http://127.0.0.1:8001/classify``.
    model
        Name of the model on the server; None: left out.
    api_key, timeout, retries
        See `stars_fast.remote.http.Endpoint`.
    template
        The text that is scored: with ``{prompt}`` and ``{response}`` in it, or a callable
        (prompt, response) -> text. Chat models read a chat: write their template here.
    batch_size
        Most texts in one call, at least 1.
    max_concurrency
        Calls under way at once, at least 1.
    activation
        ``"none"``: raw scores, what the model's head returns. ``"default"``: those that the server
        makes of them, a probability as a rule; `use_activation` is not sent.

    Raises
    ------
    ValueError
        For a parameter that is out of range.
    """

    remote = True  # what else scores does not wait for it

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        template: RewardTemplate = "{prompt}{response}",
        batch_size: int = 64,
        max_concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 4,
        activation: Literal["none", "default"] = "none",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if activation not in ("none", "default"):
            raise ValueError(f"activation must be 'none' or 'default', got {activation!r}")
        if not callable(template):
            for name in ("{prompt}", "{response}"):
                if template.count(name) != 1:
                    raise ValueError(f"template must have {name} in it, once, got {template!r}")
        self._endpoint = Endpoint(
            url,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            max_connections=max_concurrency,
        )
        self._template = template
        self._batch_size = batch_size
        self._fixed: dict[str, Any] = {} if model is None else {"model": model}
        if activation == "none":
            self._fixed["use_activation"] = False
        self._threads = futures.ThreadPoolExecutor(max_concurrency, "stars-fast-reward")

    def score(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return the reward of each response; an empty response asks for r(x).

        Raises
        ------
        RemoteError
            A call failed, or the answer is not one score for each text.
        """
        texts = [self._text(p, r) for p, r in zip(prompts, responses, strict=True)]
        batches = [texts[i : i + self._batch_size] for i in range(0, len(texts), self._batch_size)]
        return [reward for part in self._threads.map(self._call, batches) for reward in part]

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._endpoint.close()

    def _text(self, prompt: str, response: str) -> str:
        if callable(self._template):
            return self._template(prompt, response)
        before, behind = self._template.split("{response}")
        # Not str.format: prompts and templates may hold braces of their own.
        return before.replace("{prompt}", prompt) + response + behind.replace("{prompt}", prompt)

    def _call(self, texts: Sequence[str]) -> list[float]:
        answer = self._endpoint.post("", {**self._fixed, "input": list(texts)})
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, list) or len(data) != len(texts):
            found = len(data) if isinstance(data, list) else "no"
            raise RemoteError(f"the reward server returned {found} scores for {len(texts)} texts")
        in_order = sorted(data, key=lambda item: item.get("index", 0))
        return [_score(item) for item in in_order]


def _score(item: dict[str, Any]) -> float:
    value: Any = item.get("probs", item.get("data"))
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[-1]  # a score for each token
    if isinstance(value, list) and len(value) != 1:
        raise RemoteError(
            f"the reward server returned {len(value)} numbers for a text; a reward model has one "
            "label"
        )
    if isinstance(value, list):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RemoteError(f"the reward server returned {value!r:.80} where a score was due")
    return float(value)
