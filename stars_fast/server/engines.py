"""What the application asks of an engine: of one in this process, or of one in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from stars_fast.engine.streams import RequestStream
from stars_fast.params import StarsParams
from stars_fast.prompts import Prompt, PromptLike, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stars_fast.engine.batches import BatchEngine

T = TypeVar("T")


class ServedEngine(Protocol):
    """`AsyncEngine` is one, and says what each of these does; `EngineClient` is the other."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The language model's."""

    @property
    def max_length(self) -> int | None:
        """The language model's context in tokens."""

    @property
    def has_logprobs(self) -> bool:
        """Whether outputs have the log-probabilities of their tokens."""

    @property
    def accepting(self) -> bool:
        """Whether new requests are accepted if the queue has room."""

    @property
    def healthy(self) -> bool:
        """Whether rounds run, have not kept failing, and none is stuck."""

    @property
    def num_running(self) -> int:
        """Requests in the engine."""

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""

    def stats(self) -> dict[str, float]:
        """Return the counters of `Engine.stats`, a moment old."""

    async def refresh(self) -> None:
        """Have `stats` and the numbers of requests be those of now."""

    def submit(
        self,
        prompt: PromptLike | Prompt,
        params: StarsParams | None = None,
        *,
        timeout: float | None = None,
    ) -> RequestStream:
        """Queue a request and return at once."""

    async def call(self, work: Callable[[BatchEngine], T], timeout: float | None = None) -> T:
        """Do something with the engine between two rounds.

        `work`, and what it returns, can be pickled.
        """

    async def read(
        self, work: Callable[[Reader], T], prompt: object, timeout: float | None = None
    ) -> T:
        """Do something with the engine's reader beside the rounds."""

    async def check_request(
        self, prompt: PromptLike | Prompt, params: StarsParams, timeout: float | None = None
    ) -> Prompt:
        """Read a prompt, and return it if it may be run with the parameters."""

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse further requests, wait for the others, then end."""
