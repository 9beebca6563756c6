"""The limits that an engine's models set for requests."""

from __future__ import annotations

from dataclasses import dataclass

from stars_fast.params import StarsParams
from stars_fast.rewards.base import Scorer


@dataclass(frozen=True)
class Limits:
    """Bounds that parameters are checked against when a request comes.

    Attributes
    ----------
    vocab_size
        Vocabulary size of the language model.
    max_rows
        Most rows of a round.
    has_tokenizer
        Texts can be read.
    scorer
        The reward model; None if there is none.
    judges
        The language model is its own reward model, under another prompt.
    num_tokens
        Tokens that can be drawn; None: `vocab_size`.
    eos_ids
        Tokens that end a response.
    guides
        There is a model that guides.
    drafts
        There is a draft model.
    """

    vocab_size: int
    max_rows: int
    has_tokenizer: bool
    scorer: Scorer | None
    judges: bool = False
    num_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()
    guides: bool = False
    drafts: bool = False

    def check(self, params: StarsParams) -> None:
        """Raise ValueError, naming the parameter, for what the models cannot do."""
        vocab_size = self.vocab_size
        for token in params.stop_token_ids or ():
            if token >= vocab_size:
                raise ValueError(f"stop_token_ids must be in [0, {vocab_size}), got {token}")
        for token in params.logit_bias or ():
            if token >= vocab_size:
                raise ValueError(f"logit_bias must be of tokens in [0, {vocab_size}), got {token}")
        if params.guide_weight and not self.guides:
            raise ValueError(
                f"guide_weight must be 0 on an engine without a guide, got {params.guide_weight}: "
                "pass Engine(..., guide=...)"
            )
        if params.kind.draft is not None and not self.drafts:
            raise ValueError(
                f"method={params.method!r} needs a draft model: pass Engine(..., draft_model=...)"
            )
        if params.stop_texts and not self.has_tokenizer:
            raise ValueError("stop needs a tokenizer: pass Engine(..., tokenizer=...)")
        if params.bad_words and not self.has_tokenizer:
            raise ValueError("bad_words needs a tokenizer: pass Engine(..., tokenizer=...)")
        if params.segment_end != "length" and not self.has_tokenizer:
            raise ValueError(
                f"segment_end={params.segment_end!r} needs a tokenizer: pass Engine(..., "
                "tokenizer=...)"
            )
        if params.kind.ranked and params.most_attempts > self._can_come(params):
            name = "max_attempts" if params.kind.decides == "test" else "candidates"
            by = " by attempts_schedule" if params.attempts_at else ""
            raise ValueError(
                f"{name} must be at most the tokens that can be drawn, {self._can_come(params)}, "
                f"with method={params.method!r}, got {params.most_attempts}{by}"
            )
        if not params.kind.needs_reward:
            return
        if self.scorer is None:
            raise ValueError(
                f"method={params.method!r} needs a reward model: pass Engine(..., reward_model=...)"
            )
        if params.kind.judges != self.judges:
            raise ValueError(
                "method='persona_judge' and Engine(..., reward_model=Persona(...)) go together, "
                f"got method={params.method!r} with {type(self.scorer).__name__}"
            )
        paths = params.num_candidates if params.kind.decides == "paths" else 1
        if paths > self.max_rows:
            raise ValueError(
                f"candidates must be at most max_rows, {self.max_rows}, with method="
                f"{params.method!r}, got {paths}"
            )

    def _can_come(self, params: StarsParams) -> int:
        """Return how many tokens can come next at least."""
        number = self.vocab_size if self.num_tokens is None else self.num_tokens
        number -= 2 * len(params.bad_words or ())  # at most, each in two forms
        if not params.min_tokens:
            return number
        ends = () if params.ignore_eos else self.eos_ids
        return number - len({*ends, *(params.stop_token_ids or ())})
