"""From scoring jobs to the token ids that a causal reward model reads.

Two ways. Where the reward model has the language model's tokenizer, the response ids are used
as they are, between the template's ids: nothing is tokenised twice, and what the reward model
reads is what the language model wrote. Otherwise the whole text is tokenised again for
every job, since a new segment may change the last tokens of the text before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from stars_fast.models.images import ImageEncoder, SeenPrompt
from stars_fast.rewards.base import Prompt, ScoreJob
from stars_fast.rewards.split_ids import NO_IDS, Ids, SplitIds, common_length, no_ids
from stars_fast.rewards.text import FramedPrompt, PlainTemplate, RenderedPrompt, Template, filled
from stars_fast.text.tokenization import MARK, TextEncoder

__all__ = ["Encoded", "RetokenizedText", "SharedTokens", "TokenPrompt", "TokenSource"]
__all__ += ["special_ids"]


@dataclass(frozen=True)
class TokenPrompt:
    """What is known of a request's tokens before any response.

    Parameters
    ----------
    empty_ids : int64 [N]
        The ids of r(x), the template with an empty response.
    stem : int
        How many of them every response is expected to share: those before the response.
    seen : SeenPrompt or None
        The prompt with its images encoded, where the reward model sees them: the first ids of
        `empty_ids` are its `scheduler_ids`.
    """

    empty_ids: Ids
    stem: int
    seen: SeenPrompt | None = field(default=None, kw_only=True)

    @property
    def tail(self) -> int:
        """Number of ids behind the response: run for every job, kept for none."""
        return len(self.empty_ids) - self.stem


@dataclass(slots=True)
class Encoded(SplitIds):
    """What is read of a job.

    Parameters
    ----------
    rest : int64 [M]
        Its ids behind `shared`, at least one.
    places : tuple of int
        Indices of the ids at which steps are read, the last id's the last; none without steps.
    probe : int
        How many ids at the end stay in no cache, beside what stands behind the response.
    shared : int64 [N]
        Its first ids: the committed ones, if it is known to continue these, or none.
    """

    rest: Ids
    places: tuple[int, ...] = ()
    probe: int = 0
    shared: Ids = field(default_factory=no_ids)


class TokenSource(ABC):
    """Turns prompts and jobs into ids of the reward model."""

    needs_text: bool
    """Whether the response's text is read, not its ids."""

    @abstractmethod
    def bind(self, prompt: Prompt) -> TokenPrompt:
        """Return the prompt's part; ValueError if it gives no text or no tokens."""

    @abstractmethod
    def encode(
        self, prompts: Sequence[TokenPrompt], jobs: Sequence[ScoreJob], committed: Sequence[Ids]
    ) -> list[Encoded | Exception]:
        """Return the ids of each job, or its error.

        Parameters
        ----------
        prompts : sequence of TokenPrompt
            What `bind` gave for each job.
        jobs : sequence of ScoreJob
        committed : sequence of int64 [N]
            What the cached sequence of each job's request should hold: nothing else can be shared.
        """


def behind_committed(prefix: Ids, job: ScoreJob, committed: Ids) -> tuple[Ids, Ids]:
    """Return prefix and response ids in two parts: the committed ones, or none, and the others.

    `committed`: of the request, if it has that prefix; a job's `committed_ids` agree with it.
    """
    new = np.asarray(job.new_ids, np.int64)
    begun = job.committed_ids
    lacking = len(prefix) + len(begun) - len(committed)  # ids before the new ones
    if lacking == 0 and len(new):
        return committed, new
    if lacking <= 0:
        return NO_IDS, np.concatenate((prefix, begun, new))
    if lacking > len(begun):
        begun = np.concatenate((prefix, begun))
    return committed, np.concatenate((begun[len(begun) - lacking :], new))


@dataclass(frozen=True)
class _SharedPrompt(TokenPrompt):
    prefix: Ids
    suffix: Ids


class SharedTokens(TokenSource):
    """Response ids as the language model wrote them, between the template's own ids.

    With the plain template the prompt's ids are the language model's too. Special tokens at the end
    of a response (EOS, an end-of-turn token) are left out where the template closes the turn
    itself.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The reward model's, known to agree with the language model's.
    template : Template
        One whose prompts are framed: every one but a callable's.
    vocab_size : int
        Rows of the reward model's embedding; higher ids are an error of their job.
    images : ImageEncoder or None
        The reward model's, which then reads prompts with images as the language model does,
        whatever the template. None: it reads them without.
    """

    needs_text = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        vocab_size: int,
        images: ImageEncoder | None = None,
    ) -> None:
        self._images = images
        self._template = template
        self._vocab_size = vocab_size
        self._encoder = TextEncoder(tokenizer, add_special_tokens=False)
        around = TextEncoder(tokenizer, template.add_special_tokens)
        self._head, self._tail, self._single_bos = around.head, around.tail, around.single_bos
        self._special = special_ids(tokenizer)

    def bind(self, prompt: Prompt) -> TokenPrompt:
        """Return the ids around the response."""
        seen = None
        if prompt.images is not None and self._images is not None:
            seen = self._images.see(prompt)
            prefix, suffix = seen.scheduler_ids.tolist(), self._tail
        elif isinstance(self._template, PlainTemplate) and not prompt.whole:
            prefix, suffix = prompt.token_ids, self._tail
            self._check(np.asarray(prefix, dtype=np.int64), "prompt_token_ids")
        else:
            framed = filled(self._template, prompt)
            assert isinstance(framed, FramedPrompt)
            (before,) = self._encoder.encode([self._single_bos(framed.prefix)])
            prefix = [*self._head, *before]
            suffix = [*self._encoder.behind(framed.suffix), *self._tail]
        empty = np.array([*prefix, *suffix], dtype=np.int64)
        if not len(empty):
            raise ValueError("the prompt is empty: the reward model has no token to read")
        stem = len(prefix)
        return _SharedPrompt(empty, stem, prefix=empty[:stem], suffix=empty[stem:], seen=seen)

    def encode(
        self, prompts: Sequence[TokenPrompt], jobs: Sequence[ScoreJob], committed: Sequence[Ids]
    ) -> list[Encoded | Exception]:
        """Return prefix, response and suffix ids of each job."""
        encoded: list[Encoded | Exception] = []
        known = not jobs or self._knows(np.concatenate([job.new_ids for job in jobs]))
        for prompt, job, ids in zip(prompts, jobs, committed, strict=True):
            assert isinstance(prompt, _SharedPrompt)
            if not known:
                try:
                    self._check(np.asarray(job.new_ids, np.int64), "response_ids")
                except ValueError as error:
                    encoded.append(error)
                    continue
            if not len(prompt.suffix):
                shared, rest = behind_committed(prompt.prefix, job, ids)
            elif len(job.new_ids) and int(job.new_ids[-1]) not in self._special:
                shared, rest = behind_committed(prompt.prefix, job, ids)
                rest = np.concatenate((rest, prompt.suffix))
            else:
                response = self._without_special(np.asarray(job.response_ids, np.int64))
                shared, rest = NO_IDS, np.concatenate((prompt.prefix, response, prompt.suffix))
            encoded.append(Encoded(rest, shared=shared))
        return encoded

    def _without_special(self, response: Ids) -> Ids:
        end = len(response)
        while end and int(response[end - 1]) in self._special:
            end -= 1
        return response[:end]

    def _knows(self, ids: Ids) -> bool:
        return not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size

    def _check(self, ids: Ids, name: str) -> None:
        if not self._knows(ids):
            raise ValueError(
                f"{name} must lie in [0, {self._vocab_size}), the reward model's vocabulary, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )


@dataclass(frozen=True)
class _TextPrompt(TokenPrompt):
    rendered: RenderedPrompt
    # Up to the last special token before the response, ids and text do not depend on what follows.
    fixed_ids: int
    fixed_text: int


class RetokenizedText(TokenSource):
    """The template's text, tokenised again for each job; one call tokenises all jobs.

    Tokenizers cut text at special tokens before anything else, so where a chat template has one
    before the response, only the text from there on is tokenised again; the ids are the same.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The reward model's.
    template : Template
        Any but a pair.
    """

    needs_text = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self._template = template
        self._encoder = TextEncoder(tokenizer, template.add_special_tokens)
        self._special = special_ids(tokenizer)

    def bind(self, prompt: Prompt) -> TokenPrompt:
        """Tokenise the template with an empty and with a short response."""
        rendered = filled(self._template, prompt)
        texts = [_whole_text(rendered, response) for response in ("", "a")]
        empty, probe = self._encode(texts)
        if not len(empty):
            raise ValueError("the prompt is empty: the reward model has no token to read")
        stem = common_length(empty, probe)
        fixed_ids, fixed_text = self._fixed_part(rendered, texts[0], stem)
        bound = _TextPrompt(
            empty, stem, rendered=rendered, fixed_ids=fixed_ids, fixed_text=fixed_text
        )
        rest = self._encode([texts[1][fixed_text:]])[0]
        if fixed_ids and not np.array_equal(self._join(bound, rest), probe):
            return _TextPrompt(empty, stem, rendered=rendered, fixed_ids=0, fixed_text=0)
        return bound

    def encode(
        self, prompts: Sequence[TokenPrompt], jobs: Sequence[ScoreJob], committed: Sequence[Ids]
    ) -> list[Encoded | Exception]:
        """Render and tokenise each job."""
        encoded: list[Encoded | Exception] = []
        texts: list[str] = []
        places: list[int] = []
        for prompt, job in zip(prompts, jobs, strict=True):
            assert isinstance(prompt, _TextPrompt)
            try:
                text = _whole_text(prompt.rendered, job.response_text)
            except ValueError as error:
                encoded.append(error)
                continue
            places.append(len(encoded))
            texts.append(text[prompt.fixed_text :])
            encoded.append(Encoded(prompt.empty_ids))
        for place, ids in zip(places, self._encode(texts), strict=True):
            prompt = prompts[place]
            assert isinstance(prompt, _TextPrompt)
            encoded[place] = Encoded(self._join(prompt, ids))
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.asarray(ids, dtype=np.int64) for ids in self._encoder.encode(texts)]

    @staticmethod
    def _join(prompt: _TextPrompt, rest: Ids) -> Ids:
        if not prompt.fixed_ids:
            return rest
        return np.concatenate((prompt.empty_ids[: prompt.fixed_ids], rest))

    def _fixed_part(self, rendered: RenderedPrompt, text: str, stem: int) -> tuple[int, int]:
        """Return how many ids and characters stand before the last special token of the prefix."""
        tokenizer = self._encoder.tokenizer
        fixed = isinstance(rendered, FramedPrompt) and not self._encoder.add_special_tokens
        if not (fixed and tokenizer.is_fast) or MARK in text:
            return 0, 0
        assert isinstance(rendered, FramedPrompt)
        batch = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = batch["input_ids"], batch["offset_mapping"]
        for i in range(stem - 1, 0, -1):
            if ids[i] in self._special and offsets[i][1] <= len(rendered.prefix):
                return i, int(offsets[i][0])
        return 0, 0


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of tokens that stand for no text: BOS, EOS, end of turn and the like."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id})


def _whole_text(rendered: RenderedPrompt, response: str) -> str:
    text = rendered.text(response)
    assert isinstance(text, str)  # pairs are for encoders, and refused before
    return text
