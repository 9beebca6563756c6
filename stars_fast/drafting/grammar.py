"""Grammars that responses keep to: a JSON schema or a regular expression, by llguidance."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_KEPT = 64  # grammars that are kept compiled
#: Between the tokens of JSON: models that may write spaces without end do.
_SPACE = r" |\n {0,16}"


class GrammarState:
    """Where a response stands in its grammar.

    Parameters
    ----------
    matcher
        llguidance's, which this owns.
    """

    def __init__(self, matcher: Any) -> None:  # noqa: ANN401 - of an optional package
        self._matcher = matcher

    def fork(self) -> GrammarState:
        """Return one that stands there, too, and goes its own way."""
        return GrammarState(self._matcher.deep_copy())

    def become(self, other: GrammarState) -> None:
        """Stand where another stands."""
        self._matcher = other._matcher.deep_copy()

    def advance(self, tokens: Sequence[int]) -> None:
        """Go on by tokens, each of which `allowed` allows in its turn."""
        for token in tokens:
            if self._matcher.is_stopped():
                return  # nothing can follow but an end, and that is no part of the text
            if not self._matcher.consume_token(token):
                raise RuntimeError(f"a grammar refused its own token: {self._matcher.get_error()}")

    def allowed(self, words: npt.NDArray[np.int32]) -> None:
        """Write which tokens can come next, 32 in a word, the first in its lowest bit."""
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        count = min(len(found), len(words))
        words[:count] = found[:count]
        words[count:] = 0


class Grammars:
    """Compiles grammars for a tokenizer.

    Parameters
    ----------
    tokenizer
        The language model's; None if there is none.
    eos_ids
        Tokens that a text can end with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._read: Any = None
        self._compiled: dict[str, Any] = {}

    def start(self, guided: Mapping[str, Any]) -> GrammarState:
        """Return the beginning of a grammar; see `StarsParams.guided`.

        Raises
        ------
        ValueError
            The grammar cannot be read, the tokenizer is none that llguidance knows, there is no
            end-of-sequence token, or llguidance is not installed.
        """
        key = json.dumps(guided, sort_keys=True)
        if key not in self._compiled:
            if len(self._compiled) >= _KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = self._compile(guided)
        return GrammarState(self._compiled[key].deep_copy())

    def _compile(self, guided: Mapping[str, Any]) -> Any:  # noqa: ANN401
        if importlib.util.find_spec("llguidance") is None:
            raise ValueError("guided needs llguidance: pip install 'stars_fast[guided]'")
        from llguidance import LLMatcher

        ((kind, value),) = guided.items()
        if kind == "regex":
            grammar = LLMatcher.grammar_from_regex(value)
        else:
            options: Any = {"whitespace_pattern": _SPACE}
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(value), defaults=options)
        tokens = self._tokens()
        wrong = LLMatcher.validate_grammar(grammar, tokens)
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"guided: {kind} cannot be followed: {matcher.get_error() or wrong}")
        return matcher

    def _tokens(self) -> Any:  # noqa: ANN401
        if self._tokenizer is None:
            raise ValueError("guided needs a tokenizer: pass Engine(..., tokenizer=...)")
        if not self._eos_ids:
            raise ValueError("guided needs an end-of-sequence token, and the model has none")
        if self._read is None:
            from llguidance.hf import from_tokenizer

            tokenizer: Any = self._tokenizer  # a slow one is the error below
            try:
                self._read = from_tokenizer(tokenizer, eos_token=list(self._eos_ids))
            except Exception as error:
                raise ValueError(
                    f"guided: llguidance cannot read the tokenizer: {error}"
                ) from error
        return self._read


class GrammarRows:
    """The grammars of the rows of a round, on their way through its steps.

    Each row goes its own way from where its response stands; nothing has to be taken back.

    Parameters
    ----------
    states
        Of each row; None for a row without a grammar.
    mask
        int32 ``[R, W]``, the words of the rows; changed at every step.
    """

    def __init__(self, states: Sequence[GrammarState | None], mask: Tensor) -> None:
        self._states = {row: state.fork() for row, state in enumerate(states) if state is not None}
        self._mask = mask
        self._words = np.full(mask.shape, -1, np.int32)

    def allow(self) -> None:
        """Put in place what each row may draw next."""
        for row, state in self._states.items():
            state.allowed(self._words[row])
        self._mask.copy_(torch.from_numpy(self._words))

    def advance(self, tokens: Tensor, live: Tensor) -> None:
        """Go on by the token ``[R]`` of every row that draws more; waits for the device."""
        drawn, more = tokens.tolist(), live.tolist()
        for row in list(self._states):
            if more[row]:
                self._states[row].advance([drawn[row]])
            else:
                del self._states[row]
