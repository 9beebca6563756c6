"""Running the specs: all prompts of a spec and a seed as one batch, with its responses and cost."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stars_fast.eval.attacks import under
from stars_fast.eval.cost import Cost, cost_of
from stars_fast.eval.datasets import Item
from stars_fast.eval.kl import alignment_kl
from stars_fast.eval.progress import Lines
from stars_fast.eval.specs import Spec, described
from stars_fast.eval.store import Record, Store
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.seeds import derive_seed
from stars_fast.text.chats import empty_answers

if TYPE_CHECKING:
    from stars_fast.engine import Engine


@dataclass(frozen=True)
class Plan:
    """The specs, prompts and seeds to run.

    Attributes
    ----------
    specs
        The reference first.
    items
        The prompts.
    seeds
        Seeds of each spec's runs. A request's seed follows from the run's and the prompt's number
        alone, so all specs meet a prompt with the same draws.
    identity
        Everything else that results depend on, such as the device; JSON values.
    lms, rms
        Identity of each model, by its name; None is the base and its reward model.
    targets
        Value of ``target_reward="auto"``, by the name of the reward model; where prompts have their
        own, by their numbers as text.
    attack
        Name of the attack on the prompts; None: no attack.
    budgets
        What a budget stands for, by the label of its spec: fields of `StarsParams`.
    """

    specs: Sequence[Spec]
    items: Sequence[Item]
    seeds: Sequence[int]
    identity: Mapping[str, Any]
    lms: Mapping[str | None, Any]
    rms: Mapping[str | None, Any]
    targets: Mapping[str | None, float | Mapping[str, float]] = field(default_factory=dict)
    attack: str | None = None
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def named(self, spec: Spec) -> str:
        """Return what a spec is called here."""
        return spec.label if self.attack is None else under(spec.label, self.attack)

    def params(self, spec: Spec, seed: int, item: Item) -> StarsParams:
        """Return the parameters of a request."""
        changes: dict[str, Any] = {"seed": derive_seed(seed, item.number)}
        if spec.needs_target:
            target = self.targets[spec.rm]
            if not isinstance(target, int | float):
                target = target[str(item.number)]
            changes["target_reward"] = target
        changes |= self.budgets.get(spec.label, {})
        return replace(spec.params, **changes)

    def fingerprint(self, spec: Spec, seed: int) -> str:
        """Return the name of a run: of all that determines its results, but not of its label."""
        return digest({**self._depends(spec, seed), "prompts": self.prompts()})

    def _depends(self, spec: Spec, seed: int) -> dict[str, Any]:
        params = described(spec)
        for name in ("label", "lm", "rm"):
            del params[name]
        plain = not spec.params.kind.needs_reward
        return {
            "params": params,
            "seed": seed,
            "target": self.targets[spec.rm] if spec.needs_target else None,
            **({"within": budget} if (budget := self.budgets.get(spec.label)) else {}),
            "lm": self.lms[spec.lm],
            "rm": None if plain else self.rms[spec.rm],
            "identity": self.identity,
        }

    def setting(self, spec: Spec, seed: int) -> str:
        """Return the name of what runs have in common that differ in their prompts alone."""
        return digest(self._depends(spec, seed))

    @cached_property
    def prompt_digests(self) -> dict[str, str]:
        """What tells each prompt from others, by its number as text, as JSON has it."""
        return {str(number): digest(rest) for number, *rest in self.prompts()}

    def parts(self, spec: Spec, seed: int, store: Store) -> list[str]:
        """Return the runs of a store that together have the prompts of a run, or some of them."""
        whole = self.fingerprint(spec, seed)
        if whole in store.runs:
            return [whole]
        setting = self.setting(spec, seed)
        mine = self.prompt_digests.items()
        found: list[str] = []
        covered: set[str] = set()
        for name, run in store.runs.items():
            theirs = run.get("prompts", {})
            fits = theirs.items() <= mine and covered.isdisjoint(theirs)
            if run.get("setting") == setting and fits:
                found.append(name)
                covered |= theirs.keys()
        return found

    def prompts(self) -> list[Any]:
        """Return the prompts with their numbers, and openings where there are any, JSON values."""
        return [
            [item.number, item.prompt, *([item.opening] if item.opening else [])]
            for item in self.items
        ]


def missing(plans: Sequence[Plan], store: Store) -> list[tuple[Plan, Spec, int]]:
    """Return the runs that are not finished, gathered by their models, the base's first.

    Each has a plan of its own, with the prompts that are missing.
    """
    runs = []
    for plan in plans:
        for spec in plan.specs:
            for seed in plan.seeds:
                parts = plan.parts(spec, seed, store)
                there = {row["number"] for name in parts for row in store.responses[name]}
                items = [item for item in plan.items if item.number not in there]
                if items:
                    some = plan if len(items) == len(plan.items) else replace(plan, items=items)
                    runs.append((some, spec, seed))
    return sorted(runs, key=lambda run: (run[1].lm or "", run[1].rm or ""))


class Engines:
    """Engines by the names of their models; one is kept at a time.

    Parameters
    ----------
    load
        Makes the engine of a language model and a reward model.
    calibrate
        Calibrates an engine.
    """

    def __init__(
        self,
        load: Callable[[str | None, str | None], Engine],
        calibrate: Callable[[Engine], object],
    ) -> None:
        self._load = load
        self._calibrate = calibrate
        self._engine: Engine | None = None
        self._models: tuple[str | None, str | None] = (None, None)

    def get(self, lm: str | None, rm: str | None, *, calibrated: bool = False) -> Engine:
        """Return an engine; `calibrated`: after `Engine.calibrate`."""
        if self._engine is None or self._models != (lm, rm):
            self.drop()
            self._engine, self._models = self._load(lm, rm), (lm, rm)
        if calibrated and self._engine.calibration is None:
            self._calibrate(self._engine)
        return self._engine

    def drop(self) -> None:
        """Give back the memory of the engine that is kept."""
        if self._engine is not None:
            import torch

            self._engine = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def digest(value: object) -> str:
    """Return a short name of a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Failure:
    """A run that could not be made.

    Attributes
    ----------
    label, seed
        The run; the label includes its attack.
    error
        The reason.
    """

    label: str
    seed: int
    error: str


def run_missing(
    plans: Sequence[Plan],
    store: Store,
    engines: Engines,
    begun: Callable[[str, int], None],
    say: Callable[[str], None],
    *,
    use_tqdm: bool,
) -> list[Failure]:
    """Make the runs missing from the store; each is stored as soon as it is finished.

    Of a run that fails or is interrupted the finished responses are stored.

    Parameters
    ----------
    plans
        The plans to run.
    store
        Receives the results.
    engines
        Engines to run on.
    begun
        Called before each run with its name and seed.
    say
        Gets warnings, and lines on how far a run is where there is no bar.
    use_tqdm
        Show the engine's progress bar.

    Returns
    -------
    The runs that failed as a whole; they do not affect the others.
    """
    failures = []
    for plan, spec, seed in missing(plans, store):
        begun(plan.named(spec), seed)
        if plan.fingerprint(spec, seed) in store.runs:
            continue  # another label of the same
        try:
            engine = engines.get(spec.lm, spec.rm, calibrated=spec.params.calibrate_prefixes)
            _run(plan, spec, seed, engine, store, say, use_tqdm=use_tqdm)
        except Exception as error:  # noqa: BLE001 - one spec must not end the others
            failures.append(Failure(plan.named(spec), seed, f"{type(error).__name__}: {error}"))
    return failures


def _run(
    plan: Plan,
    spec: Spec,
    seed: int,
    engine: Engine,
    store: Store,
    say: Callable[[str], None],
    *,
    use_tqdm: bool,
) -> None:
    each = [plan.params(spec, seed, item) for item in plan.items]
    name = f"{plan.named(spec)}, seed {seed}"
    lines = Lines(say, name)
    tokens = [0] * len(each)
    finished: dict[int, RequestOutput] = {}

    def heard(place: int, output: RequestOutput) -> None:
        tokens[place] = sum(len(one.token_ids) for one in output.outputs)
        if output.finished:
            finished[place] = output
        if not use_tqdm:
            lines.update(
                lambda: f"{len(finished)} of {len(each)} responses, {sum(tokens):,} tokens"
            )

    before = engine.stats()
    begun = time.perf_counter()
    prompts: list[Any] = [item.continued for item in plan.items]
    try:
        outputs = engine.generate(prompts, each, use_tqdm=use_tqdm, on_output=heard)
        finished = dict(enumerate(outputs))
    finally:  # also of an interruption
        if finished:
            after, seconds = engine.stats(), time.perf_counter() - begun
            places = sorted(finished)
            some = plan
            if len(places) < len(each):
                some = replace(plan, items=[plan.items[place] for place in places])
            there = [finished[place] for place in places]
            cost = cost_of(
                before,
                after,
                # The last token of a prompt is the first that drafting runs.
                prompt_tokens=sum(max(len(one.prompt_token_ids) - 1, 0) for one in there),
                parameters=engine.num_parameters(
                    beside=any(one.guide_weight or one.kind.draft for one in each)
                ),
                seconds=seconds,
            )
            drafted = sum(one.drafted_tokens for one in there)
            if some is not plan and cost.drafted_tokens:
                cost = cost.scaled(drafted / cost.drafted_tokens)
            kept = [each[place] for place in places]
            store.add(*_records(some, spec, seed, there, kept, cost))
    texts = [
        output.outputs[0].text
        for prompt, output in zip(prompts, outputs, strict=True)
        if isinstance(prompt, str) and output.error is None
    ]
    empty = sum(not text.strip() for text in texts)
    note = empty_answers(engine.tokenizer, bare=len(texts), empty=empty)
    if note is not None:
        say(f"warning: {name}: {note}")


def _records(
    plan: Plan,
    spec: Spec,
    seed: int,
    outputs: Sequence[RequestOutput],
    each: Sequence[StarsParams],
    cost: Cost,
) -> tuple[Record, list[Record]]:
    name = plan.fingerprint(spec, seed)
    attacked = {} if plan.attack is None else {"attack": plan.attack}
    shared = {"run": name, "spec": spec.label, "seed": seed, **attacked}
    run = {
        **shared,
        "responses": len(outputs),
        "setting": plan.setting(spec, seed),
        "prompts": plan.prompt_digests,
        "cost": cost.to_json(),
    }
    rows = [
        {**shared, **_row(item, output, params, spec)}
        for item, output, params in zip(plan.items, outputs, each, strict=True)
    ]
    return run, rows


def _row(item: Item, output: RequestOutput, params: StarsParams, spec: Spec) -> Record:
    """Return what is known of a response before anything else measures it."""
    completion = output.outputs[0]
    kl = alignment_kl(params, completion.segments)
    total = math.fsum(completion.logprobs)
    logprob = total if math.isfinite(total) else None  # JSON has no infinity
    on_base = spec.lm is None
    return {
        "number": item.number,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        **({"opening": item.opening} if item.opening else {}),
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "error": output.error,
        "segments": {
            "count": len(completion.segments),
            "attempts": sum(segment.attempts for segment in completion.segments),
            "fallbacks": sum(segment.accepted == "fallback" for segment in completion.segments),
        },
        "logprob": logprob,
        "base_logprob": logprob if on_base else None,
        "base_tokens": len(completion.token_ids) if on_base else None,
        "alignment_kl": kl.value,
        "kl_kind": kl.kind,
        "kl_reason": kl.reason,
    }
