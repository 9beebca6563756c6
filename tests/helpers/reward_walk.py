"""A stand-in for the engine: random rounds of score, accept, keep, prune and fork on a scorer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from helpers.tiny_tokenizers import TEXTS
from transformers import PreTrainedTokenizerBase

from stars_fast.rewards import Prompt, ScoreJob, Scorer

QUESTIONS = (
    "What is the best way to cook rice?",
    "Write a short review of the new camera in two sentences, and say what it costs.",
    "Is it good?",
)


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """A prompt given as text."""
    return Prompt(text, tokenizer(text)["input_ids"], None)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str, system: str = "") -> Prompt:
    """A prompt given as messages, for a language model with a plain template of its own."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    rendered = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
    return Prompt(rendered, tokenizer(rendered)["input_ids"], messages)


@dataclass
class Round:
    """One scored job: what was asked, and what came back."""

    prompt: Prompt
    committed: list[int]  # response ids that were committed when the job was scored
    job: ScoreJob
    reward: float | Exception


@dataclass
class Walk:
    """Drives a scorer through random rounds over several requests, and records every score."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase  # the language model's
    seed: int = 0
    segment: int = 5
    candidates: int = 3
    rounds: list[Round] = field(default_factory=list)
    next_branch: int = 0
    forks: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.corpus: list[int] = self.tokenizer(" ".join(TEXTS), add_special_tokens=False)[
            "input_ids"
        ]
        self.prompts: dict[int, Prompt] = {}
        self.budgets: dict[int, int] = {}
        self.committed: dict[int, list[int]] = {}
        self.kept: dict[int, tuple[int, list[int]]] = {}

    def start(self, request: int, prompt: Prompt, budget: int = 60) -> None:
        """Admit a request."""
        self.scorer.start(request, prompt, budget)
        self.prompts[request] = prompt
        self.budgets[request] = budget
        self.committed[request] = []

    def text(self, ids: list[int]) -> str:
        """The text of response ids, as the engine decodes it."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def job(self, request: int, ids: list[int]) -> ScoreJob:
        """A job of a fresh branch."""
        self.next_branch += 1
        return ScoreJob(request, self.next_branch, ids, self.text(ids))

    def score(self, jobs: list[ScoreJob]) -> list[float | Exception]:
        """Score and record."""
        rewards = self.scorer.score([self._split(job) for job in jobs])
        assert len(rewards) == len(jobs)
        for job, reward in zip(jobs, rewards, strict=True):
            committed = self.committed[job.request]
            self.rounds.append(Round(self.prompts[job.request], committed, job, reward))
        return rewards

    def _split(self, job: ScoreJob) -> ScoreJob:
        """The same, every other one with what is committed of it told apart, as an engine does."""
        begun = self.committed[job.request]
        if job.branch % 2:
            return job
        assert job.response_ids[: len(begun)] == begun
        return replace(
            job, new_ids=job.new_ids[len(begun) :], committed_ids=np.array(begun, np.int64)
        )

    def draw(self) -> list[int]:
        """A segment: mostly running text cut anywhere, at times arbitrary ids."""
        length = self.random.randint(1, self.segment)
        if self.random.random() < 0.2:
            ordinary = [i for i in self.corpus if i > 20]
            return self.random.choices(ordinary, k=length)
        place = self.random.randrange(len(self.corpus) - length)
        return self.corpus[place : place + length]

    def prompt_round(self) -> None:
        """Score r(x) of every request, as an engine does first."""
        jobs = [self.job(request, []) for request in self.prompts]
        self.score(jobs)
        for job in jobs:
            self.scorer.accept(job.request, job.branch)

    def step(self) -> None:
        """One round: candidates for every request, then a random fate for each request."""
        jobs = {
            request: [
                self.job(request, self.committed[request] + self.draw())
                for _ in range(self.random.randint(1, self.candidates))
            ]
            for request in self.prompts
        }
        self.score([job for batch in jobs.values() for job in batch])
        for request, batch in jobs.items():
            chosen = self.random.choice(batch)
            fate = self.random.random()
            if fate < 0.5:
                self.accept(request, chosen.branch, chosen.response_ids)
            elif fate < 0.8 or request not in self.kept:
                if self.random.random() < 0.7:
                    self.kept[request] = (chosen.branch, chosen.response_ids)
                    self.scorer.keep(request, chosen.branch)
                self.scorer.prune(request)
            else:
                self.accept(request, *self.kept[request])
        self.fork()

    def fork(self) -> None:
        """At times, let a request go on from the committed text of another of its prompt."""
        pairs = [
            (source, target)
            for source, prompt in self.prompts.items()
            for target, other in self.prompts.items()
            if source != target and prompt == other
        ]
        if pairs and self.random.random() < 0.4:
            source, target = self.random.choice(pairs)
            self.scorer.fork(source, target)
            self.committed[target] = self.committed[source]
            self.kept.pop(target, None)
            self.forks += 1

    def accept(self, request: int, branch: int, ids: list[int]) -> None:
        """Commit a branch."""
        self.scorer.accept(request, branch)
        self.committed[request] = ids
        self.kept.pop(request, None)

    def run(self, rounds: int, limit: int = 40) -> None:
        """Rounds of all requests; those whose response has grown to `limit` start again."""
        self.prompt_round()
        for _ in range(rounds):
            self.step()
            for request in [r for r, ids in self.committed.items() if len(ids) > limit]:
                self.restart(request)

    def restart(self, request: int) -> None:
        """Finish a request and admit it anew under another handle."""
        self.scorer.finish(request)
        prompt = self.prompts.pop(request)
        del self.committed[request]
        self.kept.pop(request, None)
        self.start(max([request, *self.prompts]) + 1, prompt, self.budgets[request])

    def check(self, expected: Callable[[Round], float], tolerance: float = 1e-4) -> None:
        """Compare every recorded reward with a reference."""
        assert self.rounds
        for item in self.rounds:
            assert isinstance(item.reward, float), item.reward
            want = expected(item)
            assert abs(item.reward - want) <= tolerance * max(1.0, abs(want)), (
                item.job,
                item.reward,
                want,
            )
