"""Process rewards: steps of a response, a tag behind each, the scores at the tags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from stars_fast.errors import UnsupportedModelError
from stars_fast.reward_head import Aggregate, RewardHead
from stars_fast.rewards.base import Prompt, ScoreJob
from stars_fast.rewards.reading import Cut, LastToken, Reading
from stars_fast.rewards.split_ids import NO_IDS, Ids
from stars_fast.rewards.text import FramedPrompt, Template, filled
from stars_fast.rewards.tokens import Encoded, RetokenizedText, TokenPrompt, TokenSource
from stars_fast.text.tokenization import TextEncoder, escaped

__all__ = ["AtSteps", "StepTokens", "at_steps", "steps_of"]


def steps_of(text: str, step_text: str) -> tuple[list[str], bool]:
    """Return the steps of a text, and whether the last one has ended.

    A step ends at the step text. White space at its end is dropped, and so are steps of nothing
    else; a text without any step is one that is empty and has not ended.
    """
    *ended, rest = (step.rstrip() for step in text.split(step_text))
    steps = [step for step in ended if step]
    if rest or not steps:
        return [*steps, rest], False
    return steps, True


@dataclass(frozen=True)
class _StepPrompt(TokenPrompt):
    first: TokenPrompt  # as `RetokenizedText` has it
    rendered: FramedPrompt
    known: dict[tuple[bool, str], Ids] = field(default_factory=dict)  # of steps that have ended


class StepTokens(TokenSource):
    """The prompt in its template and the steps of the response, each with its tag behind it.

    A step is tokenised by itself, behind the tag of the one before, and its tag by itself, as those
    do who train on steps, and as tokenizers do around a special token. What the template puts
    behind the response is left out, for nothing reads it. The tag of a step that has not ended is
    read and stays in no cache; of one that has, the part behind ``{score}`` is run with the next.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The reward model's.
    template : Template
        One whose prompts are framed: every one but a callable's.
    head : RewardHead
        Its `step_text` and `step_tag`.

    Raises
    ------
    ValueError
        If the tag has no token to read at.
    """

    needs_text = True

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, head: RewardHead
    ) -> None:
        self._template = template
        self._step_text = head.step_text
        read, tail = head.step_text, ""
        if head.step_tag is not None:
            read, _, tail = head.step_tag.partition("{score}")
        self._encoder = TextEncoder(tokenizer, add_special_tokens=False)
        self._tag = escaped(read + tail)
        self._read = np.array(self._encoder.behind(escaped(read)), np.int64)
        self._tail = np.array(self._encoder.behind(escaped(tail)), np.int64)
        if not len(self._read):
            raise ValueError(
                f"step_tag of reward_head must have a token to read at, got {head.step_tag!r}"
            )
        self._first = RetokenizedText(tokenizer, _Unclosed(template))
        self._added = len(TextEncoder(tokenizer, template.add_special_tokens).tail)

    def bind(self, prompt: Prompt) -> TokenPrompt:
        """Tokenise the prompt, and the tag of an empty step behind it."""
        rendered = filled(self._template, prompt)
        assert isinstance(rendered, FramedPrompt)
        first = self._first.bind(prompt)
        ids = first.empty_ids[: len(first.empty_ids) - self._added]
        empty = np.concatenate((ids, self._read))
        return _StepPrompt(empty, min(first.stem, len(ids)), first=first, rendered=rendered)

    def encode(
        self, prompts: Sequence[TokenPrompt], jobs: Sequence[ScoreJob], committed: Sequence[Ids]
    ) -> list[Encoded | Exception]:
        """Tokenise the steps that are new."""
        cut = []
        for prompt, job in zip(prompts, jobs, strict=True):
            assert isinstance(prompt, _StepPrompt)
            text = prompt.rendered.answer(job.response_text)
            cut.append((prompt, *steps_of(text, self._step_text)))
        new = self._new_ids([(prompt, steps) for prompt, steps, _ in cut])
        encoded: list[Encoded | Exception] = []
        for prompt, steps, ended in cut:
            parts: list[Ids] = []
            places: list[int] = []
            length = 0
            for number, step in enumerate(steps):
                key = number == 0, step
                ids = prompt.known[key] if key in prompt.known else new[id(prompt), key]
                if ended or number < len(steps) - 1:
                    prompt.known[key] = ids
                parts += [ids, self._read] if number == 0 else [self._tail, ids, self._read]
                length += len(ids) + len(self._read) + (len(self._tail) if number else 0)
                places.append(length - 1)
            probe = 0 if ended else len(self._read)
            encoded.append(Encoded(np.concatenate(parts), tuple(places), probe))
        return encoded

    def _new_ids(
        self, texts: Sequence[tuple[_StepPrompt, list[str]]]
    ) -> dict[tuple[int, tuple[bool, str]], Ids]:
        """Return the ids of the steps that are not known, by prompt and step."""
        lacking = {
            (id(prompt), (number == 0, step)): prompt
            for prompt, steps in texts
            for number, step in enumerate(steps)
            if (number == 0, step) not in prompt.known
        }
        firsts = [key for key in lacking if key[1][0]]
        others = [key for key in lacking if not key[1][0]]
        found: dict[tuple[int, tuple[bool, str]], Ids] = {}
        begun = self._first.encode(
            [lacking[key].first for key in firsts],
            [ScoreJob(0, 0, [], step) for _, (_, step) in firsts],
            [NO_IDS] * len(firsts),
        )
        for key, encoded in zip(firsts, begun, strict=True):
            assert isinstance(encoded, Encoded)  # only callables fail
            found[key] = encoded.ids[: len(encoded.ids) - self._added]
        marked = [lacking[key].rendered.special.marked(key[1][1]) for key in others]
        tag = [*self._read.tolist(), *self._tail.tolist()]
        behind = self._encoder.encode([self._tag + step for step in marked])
        for key, step, whole in zip(others, marked, behind, strict=True):
            ids = whole[len(tag) :] if whole[: len(tag)] == tag else self._encoder.behind(step)
            found[key] = np.array(ids, np.int64)
        return found


class _Unclosed:
    """A template without what it puts behind the response."""

    def __init__(self, template: Template) -> None:
        self.add_special_tokens = template.add_special_tokens
        self._template = template

    def bind(self, prompt: Prompt) -> FramedPrompt:
        """Return the prompt's text with nothing behind the response."""
        rendered = self._template.bind(prompt)
        assert isinstance(rendered, FramedPrompt)
        return replace(rendered, suffix="", strip_right=False, after="")


class AtSteps(LastToken):
    """One number from the scores of the steps, each read at its tag when it first runs.

    Parameters
    ----------
    head : Head
        From hidden states to scores [N].
    aggregate : str
        See `RewardHead`.
    """

    def __init__(self, head: LastToken, aggregate: Aggregate) -> None:
        super().__init__(head.head, None)
        self._aggregate = _AGGREGATES[aggregate]

    def cut(self, text: Encoded, prompt: TokenPrompt, committed: Ids) -> Cut:
        """Return all ids, the last of which is the last tag's."""
        ids = text.ids
        return Cut(ids, len(ids) - text.probe, len(ids) - 1, ids[:0], text.places)

    def kept(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores [N, 1], on the host."""
        return self.head(hidden).float().cpu().unsqueeze(1)

    def values(
        self, hidden: torch.Tensor, marked: torch.Tensor, cuts: Sequence[Cut]
    ) -> list[float]:
        """Aggregate the scores of each job."""
        scores = marked[:, 0].double().numpy()
        ends = np.cumsum([len(cut.marks) for cut in cuts])[:-1]
        return [float(self._aggregate(part)) for part in np.split(scores, ends)]


_AGGREGATES: dict[Aggregate, Callable[[NDArray[np.float64]], float]] = {
    "last": lambda scores: scores[-1],
    "min": np.min,
    "prod": np.prod,
    "mean": np.mean,
    "sum": np.sum,
}


def at_steps(reading: Reading, head: RewardHead, name: str) -> AtSteps:
    """Return how a reward that is read at the last token is read at steps.

    Raises
    ------
    UnsupportedModelError
        If it is read elsewhere, too.
    """
    if type(reading) is not LastToken:
        raise UnsupportedModelError(
            f"{name} reads more than the last token, and has no scores of steps: leave out "
            "at='steps' of reward_head"
        )
    return AtSteps(reading, head.aggregate)
