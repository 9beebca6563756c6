"""The random draw of a case: models, an engine that lacks room, and requests of every method."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fuzz.prompts import read_prompt
from fuzz.tokenizers import FAMILIES, LINES
from fuzz.worlds import CONTEXT, REWARD_CONTEXT, World, draw_beside, draw_world
from helpers.tiny_tokenizers import SPECIAL

from stars_fast import StarsParams
from stars_fast.methods import COMMON, METHODS, kind_of

#: Every method, and its forms. Case by case one after the other has the first request.
TURNS: tuple[dict[str, Any], ...] = (
    {"method": "stars", "acceptance": "soft"},
    {"method": "stars", "acceptance": "hard"},
    {"method": "stars", "acceptance": "gibbs"},
    {"method": "vanilla"},
    {"method": "best_of_n"},
    {"method": "rejection"},
    {"method": "cards", "rules": "paper"},
    {"method": "cards", "rules": "public"},
    {"method": "args"},
    {"method": "speculative_rejection"},
    {"method": "smc"},
    {"method": "mara"},
    {"method": "rsd"},
    {"method": "gsi"},
    {"method": "sss"},
    {"method": "persona_judge"},
)
_JUDGED = len(TURNS) - 1
_VANILLA = 3
_DRAFTED = tuple(i for i, turn in enumerate(TURNS) if METHODS[turn["method"]].draft is not None)

_OPENINGS = ("The film was slow", "日本語の", "Привет, мир! ", "line one\nline two", "", "12 x = {")
_STOPS = (
    "the", " ", ".", "ш", "ll", "え", "の", "🙂", "\n", "en", "er", "ing", "a ", ", ", "END", "é",
    " t", "ou", "!", "o", "e",
)  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A request: in which round it comes, and in which it is aborted, if it is."""

    prompt: Any
    params: StarsParams
    arrives: int = 0
    aborted: int | None = None

    def __str__(self) -> str:
        params = self.params
        changed = ", ".join(
            f"{field.name}={getattr(params, field.name)!r}"
            for field in fields(params)
            if getattr(params, field.name) != field.default or field.name == "method"
        )
        return (
            f"prompt={self.prompt!r}, StarsParams({changed}), arrives={self.arrives}, "
            f"aborted={self.aborted}"
        )


@dataclass(frozen=True)
class BadAsk:
    """A request that has to be refused, and words of the reason."""

    prompt: Any
    params: StarsParams
    words: str


@dataclass(frozen=True)
class Case:
    """All of a case.

    Attributes
    ----------
    scarce, roomy
        Options of the engine that runs all requests together, and of the one that runs some alone.
    """

    number: int
    world: World
    asks: list[Ask]
    bad: list[BadAsk]
    scarce: dict[str, Any]
    roomy: dict[str, Any]

    def __str__(self) -> str:
        """All that is needed to run it again."""
        asks = "\n".join(f"  request {i}: {ask}" for i, ask in enumerate(self.asks))
        return (
            f"case {self.number}, again alone:\n"
            f"  pytest tests/fuzz --fuzz-from {self.number} --fuzz-seconds 0\n"
            f"  {self.world}\n  engine: {self.scarce}\n  engine with room: {self.roomy}\n{asks}"
        )


def turn_of(params: StarsParams) -> str:
    """The method, with its form where it has several."""
    for turn in TURNS:
        if all(getattr(params, name) == value for name, value in turn.items()):
            return " ".join(turn.values())
    raise AssertionError(params)


def draw_case(number: int) -> Case:
    """Draw a case; its number says which method and which tokenizer it is sure to have."""
    rng = random.Random(f"case {number}")
    turn = number % len(TURNS)
    world = draw_world(rng, family=FAMILIES[number % len(FAMILIES)], judged=turn == _JUDGED)
    world = draw_beside(rng, world, drafts=turn in _DRAFTED)
    max_rows = rng.choice([1, 2, 3, 5, 8, 16])
    asks: list[Ask] = []
    opening = _draw_text(rng, 40)
    for place in range(rng.randint(2, 5)):
        mine = TURNS[turn if place == 0 else _draw_turn(rng, turn, world)]
        params = _draw_params(rng, world, mine, max_rows)
        prompt = _draw_prompt(rng, world, params)
        if isinstance(prompt, str) and rng.random() < 0.5:
            prompt = opening + prompt  # whose pages are shared
        if asks and rng.random() < 0.25 and _fits(world, asks[-1].prompt, params):
            prompt = asks[-1].prompt
        asks.append(
            Ask(
                prompt,
                params,
                arrives=rng.randint(0, 4) if rng.random() < 0.4 else 0,
                aborted=rng.randint(1, 8) if rng.random() < 0.15 else None,
            )
        )
    scarce = _scarce_options(rng, world, asks, max_rows)
    roomy = {
        "page_size": (page_size := rng.choice([1, 3, 5, 8, 16, 64])),
        "num_pages": max(8, 12000 // page_size),
        "max_rows": 64,
        "prefix_caching": rng.random() < 0.5,
        **_order_of_phases(rng, overlaps=0.2 if turn != _JUDGED else 0.0),
    }
    bad = rng.sample(list(_bad_asks(world, asks[0].params)), 2)
    return Case(number, world, asks, bad, scarce, roomy)


def with_other_candidates(rng: random.Random, ask: Ask) -> Ask:
    """The same request with another number of candidates, where that changes the speed alone."""
    kind = ask.params.kind
    if "candidates" not in kind.parameters or kind.default_candidates is not None:
        return ask
    return replace(ask, params=replace(ask.params, candidates=rng.choice(["auto", 1, 5])))


def _draw_turn(rng: random.Random, first: int, world: World) -> int:
    if first == _JUDGED:
        return rng.choice([_JUDGED, _VANILLA])
    turns = [*range(_JUDGED), 0, 1, 6]
    return rng.choice([i for i in turns if i not in _DRAFTED or world.drafts])


def _draw_text(rng: random.Random, most: int) -> str:
    line = rng.choice(LINES)
    start = rng.randrange(len(line))
    return rng.choice(_OPENINGS) + line[start : start + rng.randint(1, most)]


def _draw_prompt(rng: random.Random, world: World, params: StarsParams) -> Any:
    form = rng.random()
    if world.chat and form < 0.4:
        return _draw_messages(rng, system=_shows_system(world))
    first, last = len(SPECIAL), len(world.tokenizer)
    if form < 0.65:
        begin = [world.tokenizer.bos_token_id] if rng.random() < 0.3 else []
        return begin + [rng.randrange(first, last) for _ in range(rng.randint(1, 40))]
    if form < 0.7 and world.rewards.name == "function":  # as long as can be
        length = CONTEXT - _longest(params) - rng.choice([0, 1, 30])
        return [rng.randrange(first, last) for _ in range(length)]
    return _draw_text(rng, 40)


def _draw_messages(rng: random.Random, *, system: bool) -> list[dict[str, str]]:
    messages = []
    if system and rng.random() < 0.3:
        messages.append({"role": "system", "content": _draw_text(rng, 15)})
    if rng.random() < 0.5:
        messages.append({"role": "user", "content": _draw_text(rng, 15)})
        messages.append({"role": "assistant", "content": _draw_text(rng, 10)})
    messages.append({"role": "user", "content": _draw_text(rng, 20)})
    if rng.random() < 0.2:
        messages.append({"role": "assistant", "content": rng.choice(["Sure", " Well, ", "The"])})
    return messages


def _shows_system(world: World) -> bool:
    templates = [world.tokenizer.chat_template]
    if world.rewards.kind == "chat":
        templates.append(world.rewards.tokenizer.chat_template)
    return not any("System role not supported" in template for template in templates)


def _draw_params(
    rng: random.Random, world: World, turn: dict[str, Any], max_rows: int
) -> StarsParams:
    kind = kind_of(turn["method"], turn.get("acceptance", "soft"))
    own = {*COMMON, *kind.parameters}
    segment_length = rng.choice([1, 2, 3, 7, 8, 16, 40, rng.randint(1, 40)])
    longest = 10 if kind.one_token else 16 if segment_length < 4 else 48  # so many rounds
    vocab_size = world.vocab_size
    drawn: dict[str, Any] = {
        "max_tokens": min(longest, rng.choice([1, 2, 5, 17, 30, 48, rng.randint(1, 48)])),
        "temperature": rng.choice([0, 0.3, 0.8, 1, 1.5, 2]),
        "top_k": rng.choice([0, 0, 1, 5, 40, 300]),
        "top_p": rng.choice([1.0, 1.0, 0.9, 0.5]),
        "min_p": rng.choice([0.0, 0.0, 0.05, 0.3]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.0, 0.8, 1.2, 3.0]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.0, -1.0, 0.5, 2.0]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.0, -0.3, 0.5, 2.0]),
        "logit_bias": _draw_biases(rng, vocab_size),
        "top_logprobs": rng.choice([0, 0, 0, 1, 7, 20]),
        "seed": rng.choice([0, 1, 2**63 + 5, 2**64 - 1, rng.randrange(2**64)]),
        "ignore_eos": rng.random() < 0.3,
        "n": rng.choice([1, 1, 1, 2, 3]),
        "stop": _draw_stop(rng, world),
        "stop_token_ids": None,
        "segment_length": segment_length,
        "segment_end": rng.choice(["length", "length", "clause", "sentence", "step"]),
        "step_text": rng.choice(["\n\n", "e", " t", "ee"]),
        "min_segment_length": rng.choice([1, 2, 4, 6]),
        "target_reward": rng.choice([-1.0, 0.0, 0.5, 1.0, 3.0, "auto", None]),
        "beta": rng.choice([0.05, 0.3, 1.0, 3.0]),
        "alpha": rng.choice([0.0, 0.3, 0.5, 0.5, 1.0]),
        "max_attempts": rng.choice([1, 2, 3, 6, 9]),
        "candidates": rng.choice(["auto", 1, 2, 3, 4, 8]),
        "acceptance": rng.choice(["soft", "hard"]),
        "trace": True,
        "calibrate_prefixes": rng.random() < 0.2,
        "entropy_threshold": rng.choice([0.5, 3.0, 4.5, 5.0, 5.3, 5.5, 5.7]),
        "reward_weight": rng.choice([0.0, 0.5, 1.5]),
        "rejection_rate": rng.choice([0.0, 0.3, 0.5, 0.8]),
        "ess_threshold": rng.choice([0.0, 0.5, 1.0]),
        "guide_weight": rng.choice([0.0, 0.4, 1.0, -0.7]) if world.guides else 0.0,
    }
    if turn["method"] == "gsi":  # whose models are far apart
        drawn["target_reward"] = rng.choice([-80.0, -20.0, -5.0, 0.0])
    drawn["min_tokens"] = rng.choice(
        [0, 0, drawn["max_tokens"], rng.randint(0, drawn["max_tokens"])]
    )
    if rng.random() < 0.4:
        drawn["stop_token_ids"] = rng.sample(range(vocab_size), rng.choice([1, 5, 20]))
    if kind.decides == "paths":
        drawn["candidates"] = rng.randint(1, min(6, max_rows))
    elif turn["method"] == "best_of_n":
        drawn["candidates"] = rng.randint(1, 5)
    if not kind.ranked:  # of which there are as many as tokens
        drawn["attempts_schedule"] = rng.choice(["uniform", "uniform", "decay", "growth"])
        drawn["attempts_rate"] = rng.choice([0.3, 0.7, 0.97])
    mine = {name: value for name, value in drawn.items() if name in own}
    return StarsParams(**{**mine, **turn})


def _draw_biases(rng: random.Random, vocab_size: int) -> dict[int, float] | None:
    if rng.random() < 0.7:
        return None
    tokens = rng.sample(range(vocab_size), rng.choice([1, 3, 30]))
    return {token: rng.choice([-100.0, -2.0, 1.5, 4.0, 100.0]) for token in tokens}


def _draw_stop(rng: random.Random, world: World) -> Any:
    form = rng.random()
    if form < 0.5:
        return [rng.choice(_STOPS) for _ in range(rng.randint(1, 2))]
    if form < 0.65:  # the text of two tokens
        tokens = rng.sample(range(len(SPECIAL), len(world.tokenizer)), 2)
        return world.tokenizer.decode(tokens) or None
    return None


def _longest(params: StarsParams) -> int:
    """Tokens of a response at most."""
    past = params.segment_length - 1 if params.rules == "public" else 0
    return params.max_tokens + past


def _fits(world: World, prompt: Any, params: StarsParams) -> bool:
    return len(read_prompt(world.tokenizer, prompt).token_ids) + _longest(params) <= CONTEXT


def _order_of_phases(rng: random.Random, overlaps: float) -> dict[str, bool]:
    """What runs beside what: one of both with some chance, or neither."""
    overlap = rng.random() < overlaps
    return {"overlap_scoring": overlap, "draft_ahead": not overlap and rng.random() < 0.4}


def _scarce_options(
    rng: random.Random, world: World, asks: Sequence[Ask], max_rows: int
) -> dict[str, Any]:
    """Options of an engine in whose pool the largest request just fits, or little more."""
    page_size = rng.choice([1, 2, 3, 4, 5, 8, 16, 32, 64])

    def pages(tokens: int) -> int:
        return -(-tokens // page_size)

    prompts = [read_prompt(world.tokenizer, ask.prompt) for ask in asks]
    needed = max(
        pages(len(prompt.token_ids) - 1)
        + pages(_longest(ask.params))
        + (page_size > 1)  # a segment that begins inside a page holds it twice
        for prompt, ask in zip(prompts, asks, strict=True)
    )
    rewards = world.rewards
    most = max(len(prompt.token_ids) for prompt in prompts)
    options = {
        "page_size": page_size,
        "num_pages": max(2, 1 + int(needed * rng.choice([1.0, 1.0, 1.3, 2.0, 4.0]))),
        "max_rows": max_rows,
        "max_prefill_tokens": rng.choice([1, 7, 16, 64, 8192] if most < 100 else [64, 8192]),
        "prefix_caching": rng.random() < 0.6,
        **_order_of_phases(rng, overlaps=0.4 if rewards.name != "persona" else 0.0),
    }
    if rewards.shared:
        tokens = max(
            sum(map(len, rewards.frame(prompt))) + _longest(ask.params)
            for prompt, ask in zip(prompts, asks, strict=True)
        )
        options["reward_num_pages"] = 1 + int(pages(tokens) * rng.choice([1.0, 1.0, 1.5, 4.0]))
    elif rewards.name == "persona" or (rewards.kind is not None and not rewards.encoder):
        options["reward_num_pages"] = 1 + int(pages(REWARD_CONTEXT) * rng.choice([1.0, 2.0]))
    return options


def _bad_asks(world: World, params: StarsParams) -> Iterator[BadAsk]:
    for prompt, words in (
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([0, 10**9], "out of range"),
        ([1, -1], "out of range"),
        ([1, True], "must be an integer"),
        (["x"], "must be an integer"),
        (5, "prompt must be text"),
        ([{"role": "user"}], "messages[0].content must be"),
        ([{"role": "user", "content": 5}], "messages[0].content must be"),
        ([1] * CONTEXT, "does not fit the model's context"),
    ):
        yield BadAsk(prompt, params, words)
    yield BadAsk("a", replace(params, stop_token_ids=[10**6]), "stop_token_ids must be in")
    judged = world.rewards.name == "persona"
    other = StarsParams(method="stars" if judged else "persona_judge")
    yield BadAsk("a", other, "go together")
    if not world.chat:
        yield BadAsk([{"role": "user", "content": "a"}], params, "no chat template")
