"""Causal models that judge, scored incrementally on paged KV.

Each request owns one cached sequence, the committed text. A job forks it where its own ids
first differ, and only the ids from there on are run; the ids behind the response (the suffix of a
chat template) are run with it and never kept. `PagedTexts` holds these texts; a `Reading` turns
hidden states into a reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from stars_fast._core import OutOfPagesError
from stars_fast.errors import RewardError
from stars_fast.models.paged import PagedModel
from stars_fast.rewards.base import (
    KnownRewards,
    Prompt,
    PromptRewards,
    ScoreJob,
    Scorer,
    finite_reward,
)
from stars_fast.rewards.paged_texts import NO_PAGES, PagedTexts, Row
from stars_fast.rewards.reading import Cut, Reading
from stars_fast.rewards.tokens import TokenPrompt, TokenSource

__all__ = ["CausalScorer"]


class CausalScorer(Scorer):
    """A sequence classifier on a causal backbone, or a language model that judges.

    Requests whose prompts have the same ids share the pages of the prompt, and after a `fork` those
    of committed text.

    When the pool is short, caches are given up as `PagedTexts` says, then the jobs are split over
    several forward passes.

    Numbers that are not finite in one candidate's hidden states may make the rewards of its
    request's other candidates of that pass errors too, never those of another request.

    Parameters
    ----------
    model : PagedModel
        Its `extend_all` returns the hidden states.
    reading : Reading
        Which hidden states are read, and how.
    source : TokenSource
        How prompts and jobs become ids.
    num_pages, page_size : int
        The pool's, as given to `model`.
    max_rows : int
        Most rows of one forward pass.
    max_batch_tokens : int
        Most new tokens of one forward pass, padding counted; a longer prompt is run in pieces, a
        longer row alone.
    """

    def __init__(
        self,
        model: PagedModel,
        reading: Reading,
        source: TokenSource,
        *,
        num_pages: int,
        page_size: int,
        max_rows: int = 256,
        max_batch_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.module = model.model
        self._reading = reading
        self._source = source
        self.needs_text = source.needs_text
        self.device = model.device
        self._context = model.max_length
        self._max_rows = max_rows
        self._max_batch_tokens = max_batch_tokens
        self._texts = PagedTexts(
            model,
            num_pages=num_pages,
            page_size=page_size,
            max_batch_tokens=max_batch_tokens,
            whose=reading.whose,
            kept=reading.kept,
        )
        self._pool_tokens = (num_pages - 1) * page_size  # page 0 is scratch
        self._longest = min(self._context or self._pool_tokens, self._pool_tokens)
        self._prompts: dict[int, TokenPrompt] = {}
        self._prompt_rewards = PromptRewards()
        self._known = KnownRewards()
        self._jobs = 0

    def start(self, request: int, prompt: Prompt, max_response_tokens: int) -> None:
        """Admit a request; see `Scorer.start`."""
        bound = self._source.bind(prompt)
        tokens = len(bound.empty_ids) + max_response_tokens
        if tokens > self._longest:
            raise self._too_long(
                tokens,
                f"the prompt has {len(bound.empty_ids)} tokens {self._reading.form} and up to "
                f"{max_response_tokens} follow",
            )
        prefix = bound.empty_ids[: self._reading.prefix(bound)]
        self._texts.open(request, prefix, self._reading.marks(bound.empty_ids))
        if bound.seen is not None:
            self._texts.see(request, bound.seen)
        self._known.start(request, prefix.tobytes())
        self._prompts[request] = bound

    def score(self, jobs: Sequence[ScoreJob]) -> list[float | Exception]:
        """Run what is new of each job; see `Scorer.score`."""
        self._jobs += len(jobs)
        results: list[float | Exception] = [RewardError("not scored")] * len(jobs)
        prompts = [self._prompts[job.request] for job in jobs]
        rows: list[Row] = []
        prompt_places: dict[bytes, list[int]] = {}
        committed = [self._texts.committed(job.request) for job in jobs]
        texts = self._source.encode(prompts, jobs, committed)
        cut_of, longest = self._reading.cut, self._longest
        for place, text in enumerate(texts):
            if isinstance(text, Exception):
                results[place] = text
                continue
            cut = cut_of(text, prompts[place], committed[place])
            if not isinstance(cut, Cut):
                results[place] = cut
                continue
            if cut.length > longest:
                results[place] = self._too_long(cut.length, f"the text has {cut.length} tokens")
                continue
            job = jobs[place]
            row = Row(place, job.request, job.branch, cut, job.of_prompt)
            if row.is_prompt:
                key = row.ids.tobytes()
                known = self._prompt_rewards.get(key)
                if known is not None:
                    results[place] = known
                    continue
                prompt_places.setdefault(key, []).append(place)
                if len(prompt_places[key]) > 1:
                    continue
            rows.append(row)

        def run(numbers: list[int]) -> list[float | Exception]:
            self._run_all([rows[number] for number in numbers], results)
            return [results[rows[number].place] for number in numbers]

        inputs = [(row.request, self._texts.digest(row)) for row in rows]
        for row, reward in zip(rows, self._known.score(inputs, run), strict=True):
            results[row.place] = reward
            if row.row == NO_PAGES and not isinstance(reward, Exception) and not row.is_prompt:
                self._texts.know(row)

        for key, places in prompt_places.items():
            self._prompt_rewards.put(key, results[places[0]])
            for place in places[1:]:
                results[place] = results[places[0]]
        return results

    def _run_all(self, rows: list[Row], results: list[float | Exception]) -> None:
        """Score rows, in as many passes as they take."""
        if not rows:
            return
        texts = self._texts
        texts.touch(frozenset(row.request for row in rows))
        lacking = texts.lacking(texts.busy)
        texts.set_starts(rows)
        widest = max([row.new for row in rows])
        fit = len(rows) <= self._max_rows and len(rows) * widest <= self._max_batch_tokens
        if fit and not lacking:
            self._run(rows, results, ready=True)  # in any order: the pass puts them in its own
        else:
            for chunk in self._chunks(rows, lacking):
                self._run(chunk, results)
        texts.busy = frozenset()

    def keep(self, request: int, branch: int) -> None:
        """Retain a branch; see `Scorer.keep`."""
        self._texts.keep(request, branch)

    def accept(self, request: int, branch: int) -> None:
        """Append a branch to the cached sequence; see `Scorer.accept`."""
        self._texts.accept(request, branch)

    def fork(self, source: int, target: int) -> None:
        """Share the committed pages of another request; see `Scorer.fork`."""
        self._texts.fork(source, target)

    def prune(self, request: int) -> None:
        """Drop every branch but the kept one."""
        self._texts.prune(request)

    def finish(self, request: int) -> None:
        """Forget the request and free its pages."""
        if self._prompts.pop(request, None) is not None:
            self._texts.close(request)
            self._known.finish(request)

    def take_tokens(self) -> dict[int, int]:
        """Return the tokens run for each request; see `Scorer.take_tokens`."""
        taken, self._texts.tokens = self._texts.tokens, {}
        return taken

    def stats(self) -> dict[str, int]:
        """Return the counters of `Scorer.stats`, evictions, the pool's pages, bytes copied."""
        return {
            "rm_jobs": self._jobs,
            "rm_calls": self._texts.calls,
            "rm_tokens": self._texts.num_tokens,
            "rm_evictions": self._texts.evictions,
            "rm_pages_used": self._texts.pages_used,
            "rm_pages_free": self._texts.pages_free,
            "rm_copied_bytes": self.model.copied_bytes,
        }

    def _too_long(self, tokens: int, what: str) -> ValueError:
        """Return the error of a text that is longer than `_longest`."""
        whose, shorten = self._reading.whose, self._reading.shorten
        if self._context is not None and tokens > self._context:
            return ValueError(
                f"{what}: more than {whose}'s context of {self._context} tokens; shorten "
                f"{shorten} or lower max_tokens"
            )
        return ValueError(
            f"{what}: more than {whose}'s cache of {self._pool_tokens} tokens; raise "
            f"num_pages, shorten {shorten} or lower max_tokens"
        )

    def _chunks(self, rows: list[Row], lacking: set[int]) -> Iterator[list[Row]]:
        """Cut the rows into forward passes: requests kept together, like lengths side by side."""
        longest: dict[int, int] = {}
        for row in rows:
            request, new = row.request, row.new
            if request in lacking:
                new = min(new, row.cut.length - self._texts.restorable(row))  # it will be
            longest[request] = max(longest.get(request, 1), new)
        chunk: list[Row] = []
        for row in sorted(rows, key=lambda row: (longest[row.request], row.request)):
            padded = (len(chunk) + 1) * longest[row.request]
            if chunk and (len(chunk) == self._max_rows or padded > self._max_batch_tokens):
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk

    def _run(
        self, rows: list[Row], results: list[float | Exception], *, ready: bool = False
    ) -> None:
        """Score rows, in several passes if their pages do not fit at once.

        `ready`: what is committed is cached, and their starts are set.
        """
        protected = self._texts.busy if ready else frozenset(row.request for row in rows)
        if not ready:
            self._texts.restore(rows, protected)
            self._texts.set_starts(rows)
        hidden = self._texts.forward(rows, protected)
        if isinstance(hidden, OutOfPagesError) and len(rows) > 1:
            self._run(rows[: len(rows) // 2], results)
            self._run(rows[len(rows) // 2 :], results)
            return
        if isinstance(hidden, OutOfPagesError):
            self._texts.evict(rows[0].request)
            self._texts.set_starts(rows)
            hidden = self._texts.forward(rows, protected)
        assert not isinstance(hidden, OutOfPagesError)  # any text that passed the length check fits
        rewards: list[float] | RewardError
        if isinstance(hidden, RewardError):
            rewards = hidden
        else:
            self._texts.settle(rows)  # beside the device
            if self.on_launch is not None:
                self.on_launch()
            rewards = self._read(rows, hidden)
        if isinstance(rewards, RewardError):
            for row in rows:
                results[row.place] = rewards
            return
        for row, reward in zip(rows, rewards, strict=True):
            results[row.place] = finite_reward(reward)

    def _read(self, rows: list[Row], hidden: torch.Tensor) -> list[float] | RewardError:
        """Return the rewards of rows that have run, from the hidden states [T, hidden]."""
        marks = self._texts.marked(rows)
        cuts = [row.cut for row in rows]
        lengths = np.array([cut.length for cut in cuts])
        counts = lengths - [cut.first for cut in cuts]
        # Read are the last of each row's new ones.
        behind = np.cumsum(lengths - [row.start for row in rows]) - np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(behind, counts)
        try:
            with torch.inference_mode():
                marked = torch.stack(marks) if marks else hidden[:0]
                chosen = torch.from_numpy(places).to(hidden.device)
                read = hidden.index_select(0, chosen)
                return self._reading.values(read, marked, cuts)
        except Exception as error:  # noqa: BLE001 - one bad pass must not end other requests
            return self._texts.unsettle(rows, error)
