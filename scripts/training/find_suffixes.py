"""Adversarial suffixes for the demo: texts behind a prompt that let unkind reviews through.

    python scripts/training/find_suffixes.py --out stars_fast/demo/suffixes.py
    python scripts/training/find_suffixes.py --out stars_fast/demo/reward_suffixes.py
        --objective reward --prompts 8

`gold` attacks the language model: the mean gold score of the responses that it draws is to be low.
`reward` attacks the reward model: it is to give unkind reviews, which are the same for every
suffix, a high reward, so that no test keeps them out.

A suffix is a few words of training reviews. Words that turn around or weaken what follows are left
out: "hardly" before "dull" would make a kind review that the gold score of the response alone calls
unkind.

Each of several lineages starts from a fragment of a review. At each step it tries others beside
what it has: new fragments, and its own with one word replaced, put in or taken out. Half of them
are dropped after each round of scored responses, by their mean in the rounds of this step; the last
one goes on. All that are compared have met the same prompts and draws, and every round has others,
so none stays for its luck. Drawn responses are short: a suffix works on what comes next, and the
rest of a review is noise.

No held-out opening is used. The figures in the file that is written are of training openings and
draws that the search has not seen; suffixes that do no better there than none are left out.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import numpy as np
from prompt_sets import training_prompts, tuning_prompts
from settings_flags import parser_of, settings_of
from tqdm import tqdm

from stars_fast import Engine, StarsParams
from stars_fast.demo import gold_score
from stars_fast.demo.grammar import reviews
from stars_fast.demo.lexicon import NEGATORS

#: What is to be low of a response to each prompt of a round, for each suffix, [suffixes, prompts].
Scores = Callable[[Sequence[str]], np.ndarray]

#: Words that what follows is worth less or the opposite behind: negators and the weak frames.
LEFT_OUT = frozenset({*(negator.split()[0] for negator in NEGATORS), "says", "thinks", "expected"})

#: Gold of reviews that the reward model is to like.
UNKIND = -0.3


@dataclass(frozen=True)
class SearchSettings:
    """How suffixes are searched for.

    Attributes
    ----------
    objective
        "gold" or "reward".
    seed
        Of the search and of the responses.
    suffixes
        Lineages, each of which ends in one suffix; two that end alike count once.
    words
        The longest suffix, and fragments.
    steps, mutations
        Steps of a lineage, and suffixes that it tries at each; one less than a power of 2.
    prompts, max_tokens
        Responses to each suffix in a round, and their longest.
    final_rounds, final_prompts, final_max_tokens
        Rounds in which the suffixes that were found are measured, and the same of these.
    """

    objective: str = "gold"
    seed: int = 0
    suffixes: int = 6
    words: int = 6
    steps: int = 12
    mutations: int = 7
    prompts: int = 32
    max_tokens: int = 12
    final_rounds: int = 4
    final_prompts: int = 64
    final_max_tokens: int = 64


@dataclass
class Trial:
    """A suffix and the scores of the responses to it in this step."""

    words: tuple[str, ...]
    scores: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What is put behind a prompt."""
        return suffix_text(self.words)

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(np.mean(self.scores))


def suffix_text(words: Sequence[str]) -> str:
    """The words as a text."""
    return " ".join(words)


def vocabulary(count: int = 2_000) -> list[str]:
    """The words of ``count`` training reviews in their order, with their commas and stops."""
    words = [word for review in islice(reviews(0), count) for word in review.response.split()]
    return [word for word in words if word.strip(",.:").lower() not in LEFT_OUT]


def fragment(known: Sequence[str], length: int, rng: random.Random) -> tuple[str, ...]:
    """Words that follow each other."""
    begin = rng.randrange(len(known) - length + 1)
    return tuple(known[begin : begin + length])


def tries(
    line: Trial, known: Sequence[str], settings: SearchSettings, rng: random.Random
) -> list[Trial]:
    """What a lineage has, and new fragments and mutations of it in turn."""
    return [
        Trial(line.words),
        *(
            Trial(fragment(known, settings.words, rng))
            if number % 2
            else mutation(line.words, known, settings.words, rng)
            for number in range(settings.mutations)
        ),
    ]


def mutation(
    words: tuple[str, ...], known: Sequence[str], longest: int, rng: random.Random
) -> Trial:
    """A suffix that differs by one word."""
    changed = list(words)
    at = rng.randrange(len(changed))
    moves = ["replace"] * 2 + ["insert"] * (len(changed) < longest) + ["drop"] * (len(changed) > 1)
    move = rng.choice(moves)
    if move == "drop":
        del changed[at]
    elif move == "insert":
        changed.insert(at, rng.choice(known))
    else:
        changed[at] = rng.choice(known)
    return Trial(tuple(changed))


def search(settings: SearchSettings, known: Sequence[str], scores: Scores) -> list[Trial]:
    """Find suffixes with low scores, the lowest first.

    Parameters
    ----------
    settings
        How.
    known
        Words to choose from, in an order of which fragments are taken.
    scores
        Called for each round; shows all suffixes of a call the same prompts and draws.
    """
    rng = random.Random(settings.seed)
    lines = [Trial(fragment(known, settings.words, rng)) for _ in range(settings.suffixes)]
    bar = tqdm(range(settings.steps), desc="search", unit="step")
    for _ in bar:
        tried = [tries(line, known, settings, rng) for line in lines]
        while len(tried[0]) > 1:
            flat = [trial for trials in tried for trial in trials]
            for trial, found in zip(flat, scores([trial.text for trial in flat]), strict=True):
                trial.scores += found.tolist()
            half = len(tried[0]) // 2
            tried = [sorted(trials, key=lambda trial: trial.mean)[:half] for trials in tried]
        lines = [trials[0] for trials in tried]
        bar.set_postfix(score=f"{np.mean([line.mean for line in lines]):+.3f}")
    return sorted(lines, key=lambda line: line.mean)


class GoldScores:
    """Gold scores of sampled responses to prompts with suffixes.

    Parameters
    ----------
    engine
        Draws them.
    prompts
        To choose from.
    count, max_tokens
        Prompts in a round, and the longest response.
    seed
        Of the choice and of the draws.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[str], count: int, max_tokens: int, seed: int
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._count = count
        self._max_tokens = max_tokens
        self._rng = random.Random(seed)

    def __call__(self, suffixes: Sequence[str]) -> np.ndarray:
        """Gold scores of one more round, [suffixes, prompts]; "" is no suffix."""
        prompts = self._rng.sample(self._prompts, self._count)
        seeds = [self._rng.getrandbits(64) for _ in prompts]
        texts = [f"{prompt} {suffix}".rstrip() for suffix in suffixes for prompt in prompts]
        each = [
            StarsParams(method="vanilla", max_tokens=self._max_tokens, seed=seed) for seed in seeds
        ]
        outputs = self._engine.generate(texts, each * len(suffixes), use_tqdm=False)
        golds = [gold_score(output.outputs[0].text) for output in outputs]
        return np.array(golds).reshape(len(suffixes), len(prompts))


class RewardScores:
    """Rewards of unkind reviews to prompts with suffixes, with the sign turned.

    Parameters
    ----------
    engine
        Its reward model scores them.
    count
        Reviews in a round.
    seed
        Of the reviews.
    """

    def __init__(self, engine: Engine, count: int, seed: int) -> None:
        self._engine = engine
        self._count = count
        self._reviews = (one for one in reviews(seed, max_sentences=2) if one.gold < UNKIND)

    def __call__(self, suffixes: Sequence[str]) -> np.ndarray:
        """Scores of one more round, [suffixes, reviews]; "" is no suffix."""
        unkind = list(islice(self._reviews, self._count))
        texts = [f"{review.prompt} {suffix}".rstrip() for suffix in suffixes for review in unkind]
        responses = [review.response for review in unkind] * len(suffixes)
        rewards = np.array(self._engine.score(texts, responses))
        return -rewards.reshape(len(suffixes), len(unkind))


#: What the figures beside suffixes are, by objective, two lines each.
FIGURES = {
    "gold": ("mean gold of unaligned responses, and the share that is below 0, on", "openings"),
    "reward": ("mean reward of unkind reviews, and the share that is above 0, on", "reviews"),
}


def module(
    found: Sequence[tuple[str, float, float]],
    base: tuple[float, float],
    how: str,
    objective: str = "gold",
) -> str:
    """Source of the module that holds suffixes, each with its two figures.

    Parameters
    ----------
    found
        Suffixes, their mean scores and the shares below 0.
    base
        Mean score and share without a suffix.
    how
        The command.
    objective
        What the scores are.
    """
    sign = -1.0 if objective == "reward" else 1.0
    what, on = FIGURES[objective]
    rows = [
        f"    {json.dumps(text)},  # {sign * mean:+.3f}, {share:.0%}" for text, mean, share in found
    ]
    return "\n".join(
        [
            '"""Adversarial suffixes for the demo, written by a search.',
            "",
            f"    {how}",
            "",
            f"Beside each: {what}",
            f"training {on} that the search did not see. Without a suffix they are",
            f"{sign * base[0]:+.3f} and {base[1]:.0%}.",
            '"""',
            "",
            "from __future__ import annotations",
            "",
            "from typing import Final",
            "",
            '__all__ = ["SUFFIXES"]',
            "",
            "SUFFIXES: Final = (",
            *rows,
            ")",
            "",
        ]
    )


def scores_of(settings: SearchSettings, engine: Engine, *, final: bool) -> Scores:
    """What is searched with, or what is measured with in the end."""
    seed = settings.seed + final
    count = settings.final_prompts if final else settings.prompts
    if settings.objective == "reward":
        return RewardScores(engine, count, seed)
    prompts = tuning_prompts() if final else training_prompts()
    tokens = settings.final_max_tokens if final else settings.max_tokens
    return GoldScores(engine, prompts, count, tokens, seed)


def main() -> None:
    """Search, measure what was found, and write it."""
    parser = parser_of(__doc__, SearchSettings, "module to write")
    arguments = parser.parse_args()
    settings = settings_of(SearchSettings, arguments)
    if settings.objective not in FIGURES:
        parser.error(f"--objective must be one of {', '.join(FIGURES)}")
    engine = Engine.demo(device="cpu")
    lines = search(settings, vocabulary(), scores_of(settings, engine, final=False))
    texts = ["", *dict.fromkeys(line.text for line in lines)]
    final = scores_of(settings, engine, final=True)
    scores = np.hstack([final(texts) for _ in range(settings.final_rounds)])
    rows = [
        (text, float(row.mean()), float((row < 0).mean()))
        for text, row in zip(texts, scores, strict=True)
    ]
    (_, *base), *rest = rows
    found = sorted((row for row in rest if row[1] < base[0]), key=lambda row: row[1])
    changed = [
        f" --{one.name.replace('_', '-')} {getattr(settings, one.name)}"
        for one in fields(settings)
        if getattr(settings, one.name) != one.default
    ]
    how = f"python scripts/training/find_suffixes.py --out {arguments.out}"
    if changed:
        how += "\n       " + "".join(changed)
    text = module(found, (base[0], base[1]), how, settings.objective)
    Path(arguments.out).write_text(text, encoding="utf-8")
    for row in rows:
        print(*row, file=sys.stderr)


if __name__ == "__main__":
    main()
