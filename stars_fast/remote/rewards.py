"""A reward model behind HTTP, in the shapes of vLLM, SGLang and OpenRLHF."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from stars_fast.remote.chat import filled
from stars_fast.remote.http import RemoteError, UnavailableError
from stars_fast.remote.reward_shapes import (
    SHAPES,
    RewardShape,
    ScoredText,
    ShapeName,
    number_of,
    shapes_at,
)
from stars_fast.remote.scorer import RemoteScorer

RewardTemplate: TypeAlias = "str | Callable[[str, str], str]"

_PLAIN = "{prompt}{response}"


#: Statuses by which a server may refuse one text of several. 500: code that raised.
_OF_BODY = frozenset({400, 413, 422, 500})


class _ActivationError(RemoteError):
    """Scores that went through a softmax although they were not to."""


class RemoteReward(RemoteScorer):
    """A reward model on a server, for ``reward_model=`` of `RemoteEngine` or `Engine`.

    Texts are sent in batches, several at once. Where a server refuses a batch or answers what
    cannot be read, its texts are sent one by one, so that only those to blame fail.

    Parameters
    ----------
    url
        The whole address, such as ``http://127.0.0.1:8001/classify``.
    shape
        What the server is asked and how it answers (docs/remote.md); ``"auto"``: as the end of the
        address says, and where that leaves two, as the first call finds.
    model
        Name of the model on the server; None: left out.
    api_key, timeout, retries
        See `stars_fast.remote.http.Endpoint`.
    template
        The text that is scored: with ``{prompt}`` and ``{response}`` in it, or a callable
        (prompt, response) -> text. Chat models read a chat: write their template here.
        ``"vllm-score"`` sends the two as they are, and has none.
    label
        Place of the reward where the server returns several numbers for a text, at least 0; None:
        it returns one.
    batch_size
        Most texts in one call, at least 1.
    max_concurrency
        Calls under way at once, at least 1.
    activation
        ``"none"``: raw scores, what the model's head returns. ``"default"``: those that the server
        makes of them, a probability as a rule. Servers of ``"sglang-classify"`` and ``"openrlhf"``
        are not told.

    Raises
    ------
    ValueError
        A parameter is out of range, or `shape` cannot be told from the address.
    """

    def __init__(
        self,
        url: str,
        shape: ShapeName = "auto",
        *,
        model: str | None = None,
        api_key: str | None = None,
        template: RewardTemplate = _PLAIN,
        label: int | None = None,
        batch_size: int = 64,
        max_concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        activation: Literal["none", "default"] = "none",
    ) -> None:
        if shape not in get_args(ShapeName):
            names = ", ".join(map(repr, get_args(ShapeName)))
            raise ValueError(f"shape must be one of {names}, got {shape!r}")
        if label is not None and label < 0:
            raise ValueError(f"label must be at least 0 or None, got {label}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if activation not in ("none", "default"):
            raise ValueError(f"activation must be 'none' or 'default', got {activation!r}")
        if not callable(template):
            for name in ("{prompt}", "{response}"):
                if template.count(name) != 1:
                    raise ValueError(f"template must have {name} in it, once, got {template!r}")
        super().__init__(
            url,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            max_concurrency=max_concurrency,
        )
        try_shapes = shapes_at(self._endpoint.url) if shape == "auto" else [SHAPES[shape]]
        if template != _PLAIN and not try_shapes[0].has_template:
            raise ValueError(
                f"template is for shapes that send one text: {try_shapes[0].name!r} sends prompt "
                "and response apart"
            )
        self._shapes = try_shapes
        self._finding = asyncio.Lock()
        self._template = template
        self._label = label
        self._batch_size = batch_size
        self._fixed: dict[str, Any] = {} if model is None else {"model": model}
        self._activation = activation
        #: Whether the server is known to make no probabilities of its own.
        self._believed = False

    async def _rewards(
        self, prompts: Sequence[str], responses: Sequence[str], committed: Sequence[str]
    ) -> list[float | Exception]:
        asked = [
            ScoredText(prompt, response, self._text(prompt, response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        size = self._batch_size
        batches = [asked[i : i + size] for i in range(0, len(asked), size)]
        found = await asyncio.gather(*map(self._batch, batches))
        return [reward for rewards in found for reward in rewards]

    def _text(self, prompt: str, response: str) -> str:
        if callable(self._template):
            return self._template(prompt, response)
        return filled(self._template, {"prompt": prompt, "response": response})

    async def _batch(self, asked: Sequence[ScoredText]) -> list[float | Exception]:
        try:
            numbers = await self._numbers(asked)
        except RemoteError as error:
            if len(asked) == 1 or not _is_about_body(error):
                return [error] * len(asked)
            alone = await asyncio.gather(*(self._batch([one]) for one in asked))
            return [reward for (reward,) in alone]
        rewards: list[float | Exception] = []
        for values in numbers:
            try:
                rewards.append(number_of(values, self._label))
            except RemoteError as error:
                rewards.append(error)
        return rewards

    async def _numbers(self, asked: Sequence[ScoredText]) -> list[list[Any]]:
        """Return what the server says of each text."""
        if len(self._shapes) == 1:
            return await self._call(self._shapes[0], asked)
        async with self._finding:
            if len(self._shapes) > 1:
                return await self._find_shape(asked)
        return await self._call(self._shapes[0], asked)

    async def _find_shape(self, asked: Sequence[ScoredText]) -> list[list[Any]]:
        """Call in each shape that the address may have, and keep to the first that is answered."""
        failures = []
        for shape in self._shapes:
            try:
                numbers = await self._call(shape, asked)
            except RemoteError as error:
                if not _is_about_body(error):
                    raise
                failures.append(f"as {shape.name!r}: {error}")
            else:
                self._shapes = [shape]
                return numbers
        raise RemoteError("; ".join(failures))

    async def _call(self, shape: RewardShape, asked: Sequence[ScoredText]) -> list[list[Any]]:
        raw = self._activation == "none"
        numbers = await self._post(shape, asked, use_activation=False if raw else None)
        if shape.has_activation and not self._believed and (raw or len(numbers[0]) == 1):
            if all(map(_adds_to_one, numbers)):
                await self._check_activation(shape, asked[0], numbers[0])
            self._believed = True
        return numbers

    async def _post(
        self, shape: RewardShape, asked: Sequence[ScoredText], *, use_activation: bool | None
    ) -> list[list[Any]]:
        body = {**self._fixed, **shape.body(asked)}
        if shape.has_activation and use_activation is not None:
            body["use_activation"] = use_activation
        return shape.read(await self._endpoint.post("", body), len(asked))

    async def _check_activation(
        self, shape: RewardShape, asked: ScoredText, numbers: list[Any]
    ) -> None:
        """Refuse what a server makes of every score, whatever it is asked.

        Neither sigmoid nor softmax leaves scores as they are: numbers that are the same with and
        without an activation have one.
        """
        (others,) = await self._post(shape, [asked], use_activation=self._activation == "none")
        pairs = zip(others, numbers, strict=False)
        if not _adds_to_one(others) or not all(math.isclose(a, b, abs_tol=1e-3) for a, b in pairs):
            return
        native = f"RemoteReward({_native(self._endpoint.url)!r}, shape='sglang-classify')"
        if len(numbers) == 1:
            raise _ActivationError(
                f"{self._endpoint.url}: the server returned exactly 1.0, with use_activation and "
                "without: a softmax over one class, which is 1 for every text. SGLang's "
                f"/v1/classify does so. Read raw scores from its own route, {native}"
            )
        raise _ActivationError(
            f"{self._endpoint.url}: the server returned probabilities that add up to 1 where raw "
            "scores were asked for, as SGLang's /v1/classify does. Take them as they are with "
            f"activation='default', or read raw scores from its own route, {native}"
        )


def _is_about_body(error: RemoteError) -> bool:
    """Whether another body, of one text or of another shape, might be answered."""
    if isinstance(error, _ActivationError):
        return False
    if error.status is None:
        return not isinstance(error, UnavailableError)
    return error.status in _OF_BODY


def _adds_to_one(values: list[Any]) -> bool:
    """Whether numbers may be a softmax."""
    if not all(type(value) in (int, float) and value >= 0 for value in values):
        return False
    return abs(sum(values) - 1) < 1e-3 if len(values) > 1 else values == [1.0]


def _native(url: str) -> str:
    return url.removesuffix("/v1/classify").removesuffix("/classify") + "/classify"
