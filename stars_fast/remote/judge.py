"""A language model at an OpenAI-compatible endpoint as reward: it is asked for a number."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stars_fast.remote.chat import PATH, choice_of, filled, question
from stars_fast.remote.http import RemoteError
from stars_fast.remote.scorer import RemoteScorer
from stars_fast.rewards.base import PromptRewards

#: Asks about a response by itself.
POINTWISE = """\
Below are a prompt and the beginning of a response to it. Rate the response as far as it goes: how \
helpful, accurate and harmless it is. That it is not finished must not matter.

[Prompt]
{prompt}
[End of prompt]

[Response]
{response}
[End of response]

Answer with one number from {low} (worst) to {high} (best) and nothing else."""

#: Asks whether a response has become better since the last accepted segment.
PAIRWISE = """\
Below are a prompt, the beginning of a response to it, and the same response continued. Rate what \
the continuation adds: whether it makes the response more helpful, accurate and harmless.

[Prompt]
{prompt}
[End of prompt]

[Response so far]
{committed}
[End of response so far]

[Continued response]
{response}
[End of continued response]

Answer with one number from {low} (much worse) to {high} (much better) and nothing else."""

#: Alternatives that are asked for, the most that OpenAI's API returns.
_TOP_LOGPROBS = 20
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w%]|\.\d)")


class Judge(RemoteScorer):
    """A language model that rates responses, for ``reward_model=`` of `Engine` or `RemoteEngine`.

    Each candidate segment is one question, in one message at temperature 0, to
    ``/chat/completions``. A question that fails, or whose answer has no number on the scale, is an
    error of its own request. The same question is asked once.

    Parameters
    ----------
    url
        Address of the API, such as ``http://127.0.0.1:8000/v1``.
    model
        Name of the model on the server.
    prompt
        The question: a text with ``{response}`` in it, and ``{prompt}``, ``{committed}``, ``{low}``
        and ``{high}`` where they are wanted. With ``{committed}``, the text accepted so far, the
        judge compares: whether the longer response improves on it. Where nothing is generated yet,
        r(x), it is then not asked, and the reward is the middle of the scale. `Judge.POINTWISE` and
        `Judge.PAIRWISE` are made for this.
    scale
        The least and the greatest number that the judge may give. The reward is that number.
    read
        ``"text"``: the last number on the scale in the answer. ``"expected"``: the mean of the
        scale's numbers by their probabilities where the answer has that number, as in G-Eval (arXiv
        2303.16634); the server must return ``top_logprobs``, and the scale must lie in 0 to 9, as
        these are one token each.
    api_key, timeout, retries
        See `stars_fast.remote.http.Endpoint`.
    max_concurrency
        Questions under way at once, at least 1.
    cache_size
        Answers that are remembered, at least 0; the least recently used is forgotten first.
    extra_body
        Fields that override the body of each question, such as ``{"max_tokens": 4}``.

    Raises
    ------
    ValueError
        A parameter is out of range.
    """

    POINTWISE = POINTWISE
    PAIRWISE = PAIRWISE

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str = POINTWISE,
        scale: tuple[float, float] = (1, 10),
        *,
        read: Literal["text", "expected"] = "text",
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        max_concurrency: int = 8,
        cache_size: int = 4096,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise ValueError(f"model must be the name of a model, got {model!r}")
        if not isinstance(prompt, str) or "{response}" not in prompt:
            raise ValueError(f"prompt must be text with {{response}} in it, got {prompt!r}")
        self._low, self._high = _checked_scale(scale)
        if read not in ("text", "expected"):
            raise ValueError(f"read must be 'text' or 'expected', got {read!r}")
        if read == "expected" and not 0 <= self._low < self._high <= 9:
            raise ValueError(f"scale must lie in 0 to 9 where read is 'expected', got {scale!r}")
        if cache_size < 0:
            raise ValueError(f"cache_size must be at least 0, got {cache_size}")
        super().__init__(
            url,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            max_concurrency=max_concurrency,
        )
        self._model = model
        self._prompt = prompt
        self.reads_committed = "{committed}" in prompt
        self._fixed: dict[str, Any] = {}
        if read == "expected":
            self._fixed = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        self._fixed |= dict(extra_body or {})
        self._expected = read == "expected"
        self._cache_size = cache_size
        self._known = PromptRewards(cache_size)

    async def _rewards(
        self, prompts: Sequence[str], responses: Sequence[str], committed: Sequence[str]
    ) -> list[float | Exception]:
        calls = map(self._rate, prompts, responses, committed)
        found = await asyncio.gather(*calls, return_exceptions=True)
        rewards: list[float | Exception] = []
        for reward in found:
            if isinstance(reward, BaseException) and not isinstance(reward, RemoteError):
                raise reward
            rewards.append(reward)
        return rewards

    async def _rate(self, prompt: str, response: str, committed: str) -> float:
        if self.reads_committed and not response:
            return (self._low + self._high) / 2
        low, high = f"{self._low:g}", f"{self._high:g}"
        parts = {"prompt": prompt, "response": response, "committed": committed}
        text = filled(self._prompt, {**parts, "low": low, "high": high})
        key = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        known = self._known.get(key)
        if known is not None:
            return known
        answer = await self._endpoint.post(PATH, {**question(self._model, text), **self._fixed})
        content, choice = choice_of(answer)
        number = number_on(content, self._low, self._high)
        rating = self._mean(number, choice) if self._expected else float(number)
        self._known.put(key, rating)
        return rating

    def _mean(self, number: str, choice: Mapping[str, Any]) -> float:
        """Return the mean of the scale's numbers at the token that is the answer's number."""
        try:
            tokens = choice["logprobs"]["content"]
            at = [token for token in tokens if token["token"].strip() == number][-1]
            # A server need not list the token that was drawn; of equal texts the likelier counts.
            tops = [*at["top_logprobs"], at]
            found = {top["token"].strip(): top["logprob"] for top in reversed(tops)}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise RemoteError(
                f"the judge's answer has no top_logprobs of its number {number}, which "
                f"read='expected' needs: {choice!r:.200}"
            ) from None
        ratings = range(math.ceil(self._low), math.floor(self._high) + 1)
        weights = {n: math.exp(found[str(n)]) for n in ratings if str(n) in found}
        total = sum(weights.values())
        if not total > 0:
            raise RemoteError(
                f"the judge's number {number} is none of {ratings[0]} to {ratings[-1]}"
            )
        return sum(n * weight for n, weight in weights.items()) / total


def number_on(answer: str, low: float, high: float) -> str:
    """Return the last number of an answer that is on the scale, as it is written there.

    The scale itself, as in "8/10", "8 out of 10" and "on a scale of 1 to 10", is no answer.

    Raises
    ------
    RemoteError
        There is none.
    """
    ends = re.escape(f"{low:g}"), re.escape(f"{high:g}")
    for of_scale in (r"{0}\s*(?:-|\u2013|to)\s*{1}(?!\w|\.\d)", r"(?:/|out of)\s*{1}(?!\w|\.\d)"):
        answer = re.sub(of_scale.format(*ends), " ", answer)
    numbers = _NUMBER.findall(answer)
    for number in reversed(numbers):
        if low <= float(number) <= high:
            return str(number)
    what = f"no number from {low:g} to {high:g}, but {numbers[-1]}," if numbers else "no number"
    raise RemoteError(f"the judge gave {what} in its answer {answer[:200]!r}")


def _checked_scale(scale: object) -> tuple[float, float]:
    try:
        low, high = map(float, scale)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ValueError(f"scale must be two numbers, got {scale!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"scale must be two numbers, the lower one first, got {scale!r}")
    return low, high
