"""What engines have in common whose language model runs in another engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stars_fast import _core
from stars_fast.config import Quantize, check_quantize_name
from stars_fast.engine.batches import BatchEngine
from stars_fast.engine.clock import PhaseClock
from stars_fast.engine.limits import Limits
from stars_fast.engine.loop import PHASES, Loop
from stars_fast.engine.requests import Request
from stars_fast.methods import METHODS
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.prompts import Reader
from stars_fast.remote.calls import CallDrafter, Caller
from stars_fast.rewards.base import Prompt, Scorer
from stars_fast.rewards.load_several import named_rewards
from stars_fast.rewards.persona import Persona
from stars_fast.text.chats import checked_kwargs
from stars_fast.text.decoders import Decodes

#: Those that need no more of a segment than its text and its number of tokens.
BY_TEXT = tuple(method for method, kind in METHODS.items() if kind.by_text)

#: The scheduler counts the pages of a cache that is not here: 16384 tokens a row.
_PAGE_SIZE = 256
_PAGES_PER_ROW = 64

#: Penalties for the tokens of the response, which are counted in each call alone.
_COUNTED_BY_CALL = ("presence_penalty", "frequency_penalty")


class CallEngine(BatchEngine):
    """An engine whose segments are drawn by calls of another one.

    Parameters
    ----------
    reader, seed, eos_ids, tokenizer
        See `BaseEngine`.
    caller
        Makes the calls.
    prompt_of, seeded
        See `CallDrafter`.
    scorer, texts
        See `Loop`.
    vocab_size
        Of the language model.
    max_rows, overlap_scoring
        As `RemoteEngine` has them.
    rows_at_once
        Rows that cost about as much as one.
    has_logprobs
        The calls tell the log-probabilities of their tokens.
    """

    def __init__(
        self,
        reader: Reader,
        caller: Caller,
        prompt_of: Callable[[Prompt, list[int]], str | list[int]],
        scorer: Scorer | None,
        texts: Decodes,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        seed: int,
        seeded: bool,
        max_rows: int,
        overlap_scoring: bool,
        rows_at_once: int,
        has_logprobs: bool,
    ) -> None:
        self._has_logprobs = has_logprobs
        self._drafter = CallDrafter(caller, prompt_of, self._request_of, seeded=seeded)
        scheduler = _core.Scheduler(
            num_pages=1 + _PAGES_PER_ROW * max_rows,
            page_size=_PAGE_SIZE,
            max_rows=max_rows,
            max_prefill_tokens=2**30,
            prefix_caching=False,
            fixed_cost_rows=float(rows_at_once),
            lanes=2 if overlap_scoring else 1,
        )
        loop = Loop(
            _NoPages(),
            self._drafter,
            scheduler,
            scorer,
            texts,
            PhaseClock(PHASES),
            overlap=overlap_scoring,
        )
        limits = Limits(vocab_size, max_rows, tokenizer is not None, scorer)
        super().__init__(reader, loop, limits, tokenizer=tokenizer, eos_ids=eos_ids, seed=seed)

    @property
    def has_logprobs(self) -> bool:
        """Whether outputs have the log-probabilities of their tokens."""
        return self._has_logprobs

    def step(self) -> list[RequestOutput]:
        """Run one round, see `Engine.step`."""
        return [self._shown(output) for output in super().step()]

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request, see `Engine.abort`."""
        output = super().abort(request_id)
        return None if output is None else self._shown(output)

    def interrupt(self, request_id: str) -> None:
        """Let calls of a request fail at once where they can be, see `BaseEngine.interrupt`."""
        self._drafter.interrupt(request_id)

    def close(self) -> None:
        """Make no more calls; unfinished requests cannot continue."""
        self._drafter.close()

    def _request_of(self, handle: int) -> Request:
        return self._owners[handle]

    def _shown(self, output: RequestOutput) -> RequestOutput:
        """Leave out what is not known."""
        if self._has_logprobs:
            return output
        return replace(output, outputs=[replace(one, logprobs=[]) for one in output.outputs])

    def _resolve(self, params: StarsParams) -> StarsParams:
        """Check the parameters against what calls can do, then as `Engine` does."""
        name = type(self).__name__
        if not params.kind.by_text:
            raise ValueError(
                f"method must be one of {', '.join(map(repr, BY_TEXT))} with {name}, got "
                f"{params.method!r}: it needs more of the model than texts"
            )
        if params.segment_end != "length":
            raise ValueError(
                f"segment_end must be 'length' with {name}, got {params.segment_end!r}: a "
                "server ends a segment by its number of tokens"
            )
        for penalty in _COUNTED_BY_CALL:
            value = getattr(params, penalty)
            if value and params.draft_length < params.max_tokens:
                raise ValueError(
                    f"{penalty} must be 0.0 with {name} where a response takes several calls "
                    f"(segments of {params.draft_length} tokens, max_tokens={params.max_tokens}), "
                    f"got {value!r}: a server counts the tokens of its own call"
                )
        if params.guided is not None:
            raise ValueError(
                f"guided must be None with {name}: a call cannot begin in the middle of a grammar, "
                f"got {params.guided!r}"
            )
        if params.bad_words:
            raise ValueError(
                f"bad_words must be None with {name}, whose calls do not see the tokens of those "
                f"before, got {params.bad_words!r}"
            )
        # Stop texts are found in texts, whatever made them.
        return replace(super()._resolve(replace(params, stop=None)), stop=params.stop)


def check_options(
    max_rows: int,
    seed: int | None,
    reward_timeout: float | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    reward_quantize: Quantize,
    dtype: str | torch.dtype,
) -> None:
    """Raise ValueError if an option that all such engines have is out of range."""
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"seed must be None or in [0, 2**64), got {seed}")
    if reward_timeout is not None and not reward_timeout > 0:
        raise ValueError(f"reward_timeout must be above 0 or None, got {reward_timeout}")
    check_quantize_name("reward_quantize", reward_quantize, dtype)
    if chat_template_kwargs is not None:
        checked_kwargs(chat_template_kwargs)


def check_rewards(reward_model: object, **options: object) -> None:
    """Refuse rewards that need the language model here, or that do not go together.

    Raises
    ------
    ValueError, TypeError
        As `named_rewards`, which takes the same options.
    """
    if isinstance(reward_model, Persona):
        raise ValueError("reward_model must not be a Persona: the judging model is not here")
    named_rewards(reward_model, **options)


class _NoPages:
    """What rounds and engine ask of a model on pages, where there are none."""

    model = None
    device = torch.device("cpu")
    copied_bytes = 0

    def copy_pages(self, *_: object) -> None:
        """Do nothing: forks are the server's prefix cache."""

    def prefill(self, *_: object) -> None:
        """Do nothing: the server prefills."""
