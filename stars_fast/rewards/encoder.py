"""Bidirectional reward models: the whole text, or a pair of texts, in padded batches.

Every token of an encoder sees every other, so a longer response changes all hidden states and
nothing can be kept from one round to the next. What can be saved is padding: texts of like length
are run together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stars_fast.errors import RewardError
from stars_fast.rewards.base import (
    KnownRewards,
    Prompt,
    PromptRewards,
    ScoreJob,
    Scorer,
    digest,
    finite_reward,
)
from stars_fast.rewards.labels import Readout
from stars_fast.rewards.text import RenderedPrompt, Template, filled
from stars_fast.text.tokenization import Marked, TextEncoder

__all__ = ["EncoderScorer", "encoder_context"]


def encoder_context(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the most tokens that the encoder reads at once, or None if it has no such limit."""
    limits = []
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa-like position tables keep the rows up to the padding id for padding.
        embeddings = getattr(model.base_model, "embeddings", None)
        padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
        limits.append(positions - (0 if padding is None else padding + 1))
    if tokenizer.model_max_length < 1 << 30:  # transformers' "no limit" is 1e30
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=None)


class EncoderScorer(Scorer):
    """A sequence classifier on an encoder (such as DeBERTa, BERT, RoBERTa).

    Parameters
    ----------
    model : PreTrainedModel
        The classifier, in eval mode.
    tokenizer : transformers tokenizer
        Its own, with a padding token.
    template : Template
        How prompts and responses become texts or pairs.
    context : int or None
        Most tokens of one text.
    readout : Readout
        From its logits to rewards.
    max_batch_tokens : int
        Most tokens of one forward pass, padding counted; a longer text is run alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        context: int | None,
        readout: Readout,
        max_batch_tokens: int = 16384,
    ) -> None:
        self._model = model
        self.module = model
        self.device = model.device
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = TextEncoder(tokenizer, template.add_special_tokens)
        self._context = context
        self._readout = readout
        self._max_batch_tokens = max_batch_tokens
        self._prompts: dict[int, RenderedPrompt] = {}
        self._prompt_rewards = PromptRewards()
        self._known = KnownRewards()
        self._counts = dict.fromkeys(("rm_jobs", "rm_calls", "rm_tokens"), 0)
        self._tokens: Counter[int] = Counter()  # by request, until they are taken

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Admit a request; see `Scorer.start`."""
        rendered = filled(self._template, prompt)
        empty = self._encoder.fields([rendered.text("")])[0]
        length = len(empty["input_ids"])
        if length == 0:
            raise ValueError("the prompt is empty: the reward model has no token to read")
        self._check_length(
            length + max_response_tokens,
            f"the prompt has {length} tokens in the reward model's template and up to "
            f"{max_response_tokens} follow",
        )
        self._prompts[request] = rendered
        self._known.start(request, _bytes(empty))

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Run the whole text of each job; see `Scorer.score`."""
        self._counts["rm_jobs"] += len(jobs)
        results: list[float | Exception] = [RewardError("not scored")] * len(jobs)
        texts: list[Marked] = []
        places: list[int] = []
        for place, job in enumerate(jobs):
            try:
                texts.append(self._prompts[job.request].text(job.response_text))
            except ValueError as error:
                results[place] = error
            else:
                places.append(place)

        todo: list[tuple[int, dict[str, list[int]]]] = []
        keys: dict[int, tuple[int, ...]] = {}
        for place, fields in zip(places, self._encoder.fields(texts), strict=True):
            length = len(fields["input_ids"])
            try:
                self._check_length(length, f"the text has {length} tokens")
            except ValueError as error:
                results[place] = error
                continue
            if jobs[place].of_prompt:
                keys[place] = tuple(fields["input_ids"])
                known = self._prompt_rewards.get(keys[place])
                if known is not None:
                    results[place] = known
                    continue
            todo.append((place, fields))

        def run(numbers: list[int]) -> list[float | Exception]:
            for batch in self._batches([todo[number] for number in numbers]):
                for (place, fields), reward in zip(batch, self._forward(batch), strict=True):
                    results[place] = reward
                    self._tokens[jobs[place].request] += len(fields["input_ids"])
            return [results[todo[number][0]] for number in numbers]

        inputs = [(jobs[place].request, digest(_bytes(fields))) for place, fields in todo]
        for (place, _), reward in zip(todo, self._known.score(inputs, run), strict=True):
            results[place] = reward
        for place, key in keys.items():
            self._prompt_rewards.put(key, results[place])
        return results

    def finish(self, request: int) -> None:
        """Forget the request."""
        self._prompts.pop(request, None)
        self._known.finish(request)

    def take_tokens(self) -> dict[int, int]:
        """Return the tokens run for each request; see `Scorer.take_tokens`."""
        taken, self._tokens = self._tokens, Counter()
        return taken

    def stats(self) -> dict[str, int]:
        """Return the counters of `Scorer.stats`."""
        return dict(self._counts)

    def _check_length(self, tokens: int, what: str) -> None:
        if self._context is not None and tokens > self._context:
            raise ValueError(
                f"{what}: more than the reward model's context of {self._context} tokens; shorten "
                "the prompt or lower max_tokens"
            )

    def _batches(
        self, todo: list[tuple[int, dict[str, list[int]]]]
    ) -> Iterator[list[tuple[int, dict[str, list[int]]]]]:
        """Cut the texts, the shortest first, into batches of at most max_batch_tokens."""
        batch: list[tuple[int, dict[str, list[int]]]] = []
        for item in sorted(todo, key=lambda item: len(item[1]["input_ids"])):
            if batch and (len(batch) + 1) * len(item[1]["input_ids"]) > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _forward(self, batch: list[tuple[int, dict[str, list[int]]]]) -> list[float | Exception]:
        """Pad on the right, run, and read one reward per text."""
        longest = len(batch[-1][1]["input_ids"])
        fill = {
            "input_ids": self._tokenizer.pad_token_id,
            "token_type_ids": self._tokenizer.pad_token_type_id,
        }
        lengths = [len(fields["input_ids"]) for _, fields in batch]
        inputs = {
            name: torch.tensor(
                [
                    fields[name] + [fill[name]] * (longest - length)
                    for (_, fields), length in zip(batch, lengths, strict=True)
                ]
            )
            for name in batch[0][1]
        }
        inputs["attention_mask"] = torch.tensor(
            [[1] * length + [0] * (longest - length) for length in lengths]
        )
        self._counts["rm_calls"] += 1
        self._counts["rm_tokens"] += sum(lengths)
        try:
            with torch.inference_mode():
                logits = self._model(**{k: v.to(self._model.device) for k, v in inputs.items()})[0]
                rewards = self._readout(logits).tolist()
            return [finite_reward(value) for value in rewards]
        except Exception as error:  # noqa: BLE001 - one bad pass must not end other requests
            failure = RewardError(f"the reward model failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return [failure] * len(batch)


def _bytes(fields: dict[str, list[int]]) -> bytes:
    return np.array(list(fields.values()), np.int64).tobytes()
