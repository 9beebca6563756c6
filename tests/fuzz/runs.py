"""Drives an engine through the requests of a case, and remembers all it returned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from fuzz.cases import Ask, BadAsk, Case

from stars_fast import CompletionOutput, Engine, RequestOutput
from stars_fast.server.transcript import Transcript

_MOST_ROUNDS = 20_000  # prompts that are run again by the token take thousands


@dataclass
class Stream:
    """What a client gets of one response, piece by piece."""

    transcript: Transcript
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    pieces: int = 0

    def push(self, output: CompletionOutput) -> None:
        delta = self.transcript.advance(output)
        if delta is not None:
            self.text += delta.text
            self.token_ids += delta.token_ids
            self.pieces += 1


@dataclass
class Run:
    """What came of the requests, by their numbers in the case.

    Attributes
    ----------
    stages
        Every output of a request, the last one being its end.
    streams
        By request and response.
    problems
        What went wrong besides.
    """

    stages: dict[int, list[RequestOutput]] = field(default_factory=lambda: defaultdict(list))
    aborted: set[int] = field(default_factory=set)
    streams: dict[tuple[int, int], Stream] = field(default_factory=dict)
    refused_bad: int = 0
    problems: list[str] = field(default_factory=list)


def run_by_steps(case: Case, engine: Engine) -> Run:
    """Add requests as they come, abort those that are to be aborted, step until all is done."""
    run = Run()
    waiting = dict(enumerate(case.asks))
    for step in range(_MOST_ROUNDS):
        for number, ask in list(waiting.items()):
            if ask.arrives <= step:
                _add(engine, number, case, run)
                del waiting[number]
        if step == 0:
            for bad in case.bad:
                _add_bad(engine, bad, run)
        for number, ask in enumerate(case.asks):
            if ask.aborted == step and (output := engine.abort(str(number))) is not None:
                run.aborted.add(number)
                run.stages[number].append(output)
        if engine.has_unfinished():
            for output in engine.step():
                _note(case, output, run)
        elif not waiting:
            break
    else:
        run.problems.append(f"unfinished after {_MOST_ROUNDS} rounds")
    run.problems += what_is_held(engine)
    return run


def _add(engine: Engine, number: int, case: Case, run: Run) -> None:
    ask = case.asks[number]
    try:
        engine.add_request(str(number), ask.prompt, ask.params)
    except (TypeError, ValueError) as error:
        run.problems.append(f"request {number} was refused: {error}")


def _add_bad(engine: Engine, bad: BadAsk, run: Run) -> None:
    try:
        engine.add_request("bad", bad.prompt, bad.params)
    except (TypeError, ValueError) as error:
        run.refused_bad += 1
        if bad.words not in str(error):
            run.problems.append(f"{bad} was refused with another reason: {error}")
    else:
        run.problems.append(f"{bad} was not refused")
        engine.abort("bad")


def _note(case: Case, output: RequestOutput, run: Run) -> None:
    number = int(output.request_id)
    run.stages[number].append(output)
    params = case.asks[number].params
    for response in output.outputs:
        key = (number, response.index)
        if key not in run.streams:
            run.streams[key] = Stream(Transcript(response.index, params.stop_texts))
        run.streams[key].push(response)


def what_is_held(engine: Engine) -> list[str]:
    """What an engine holds though it has nothing to do."""
    stats = engine.stats()
    names = ("pages_used", "rm_pages_used", "requests_running", "requests_waiting")
    return [f"{name} is {stats[name]} at the end" for name in names if stats.get(name)]


def run_at_once(engine: Engine, asks: Mapping[int, Ask]) -> Run:
    """Run requests, by their numbers in the case, in one call."""
    outputs = engine.generate(
        [ask.prompt for ask in asks.values()],
        [ask.params for ask in asks.values()],
        use_tqdm=False,
    )
    stages = {number: [output] for number, output in zip(asks, outputs, strict=True)}
    return Run(stages, problems=what_is_held(engine))
