"""Running the specs: all prompts of a spec and a seed as one batch, with its responses and cost."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stars_fast.eval.attacks import under
from stars_fast.eval.cost import cost_of
from stars_fast.eval.datasets import Item
from stars_fast.eval.kl import alignment_kl
from stars_fast.eval.specs import Spec, described
from stars_fast.eval.store import Record, Store
from stars_fast.outputs import RequestOutput
from stars_fast.params import StarsParams
from stars_fast.seeds import derive_seed

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
        Value of ``target_reward="auto"``, by the name of the reward model.
    attack
        Name of the attack on the prompts; None: no attack.
    """

    specs: Sequence[Spec]
    items: Sequence[Item]
    seeds: Sequence[int]
    identity: Mapping[str, Any]
    lms: Mapping[str | None, Any]
    rms: Mapping[str | None, Any]
    targets: Mapping[str | None, float] = field(default_factory=dict)
    attack: str | None = None

    def named(self, spec: Spec) -> str:
        """Return what a spec is called here."""
        return spec.label if self.attack is None else under(spec.label, self.attack)

    def params(self, spec: Spec, seed: int, item: Item) -> StarsParams:
        """Return the parameters of a request."""
        changes: dict[str, Any] = {"seed": derive_seed(seed, item.number)}
        if spec.needs_target:
            changes["target_reward"] = self.targets[spec.rm]
        return replace(spec.params, **changes)

    def fingerprint(self, spec: Spec, seed: int) -> str:
        """Return the name of a run: of all that determines its results, but not of its label."""
        params = described(spec)
        for name in ("label", "lm", "rm"):
            del params[name]
        plain = not spec.params.kind.needs_reward
        depends = {
            "params": params,
            "seed": seed,
            "target": self.targets[spec.rm] if spec.needs_target else None,
            "prompts": self.prompts(),
            "lm": self.lms[spec.lm],
            "rm": None if plain else self.rms[spec.rm],
            "identity": self.identity,
        }
        return digest(depends)

    def prompts(self) -> list[Any]:
        """Return the prompts with their numbers, and openings where there are any, JSON values."""
        return [
            [item.number, item.prompt, *([item.opening] if item.opening else [])]
            for item in self.items
        ]


def missing(plans: Sequence[Plan], store: Store) -> list[tuple[Plan, Spec, int]]:
    """Return the runs that are not finished, gathered by their models, the base's first."""
    runs = [(plan, spec, seed) for plan in plans for spec in plan.specs for seed in plan.seeds]
    runs = [run for run in runs if run[0].fingerprint(*run[1:]) not in store.runs]
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
    *,
    use_tqdm: bool,
) -> list[Failure]:
    """Make the runs missing from the store; each is stored as soon as it is finished.

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
            store.add(*_run(plan, spec, seed, engine, use_tqdm=use_tqdm))
        except Exception as error:  # noqa: BLE001 - one spec must not end the others
            failures.append(Failure(plan.named(spec), seed, f"{type(error).__name__}: {error}"))
    return failures


def _run(
    plan: Plan, spec: Spec, seed: int, engine: Engine, *, use_tqdm: bool
) -> tuple[Record, list[Record]]:
    each = [plan.params(spec, seed, item) for item in plan.items]
    prompts: list[Any] = [item.continued for item in plan.items]
    before = engine.stats()
    begun = time.perf_counter()
    outputs = engine.generate(prompts, each, use_tqdm=use_tqdm)
    seconds = time.perf_counter() - begun
    cost = cost_of(
        before,
        engine.stats(),
        # The last token of a prompt is the first that drafting runs.
        prompt_tokens=sum(max(len(output.prompt_token_ids) - 1, 0) for output in outputs),
        parameters=engine.num_parameters(guided=any(params.guide_weight for params in each)),
        seconds=seconds,
    )
    name = plan.fingerprint(spec, seed)
    run = {
        "run": name,
        "spec": spec.label,
        "seed": seed,
        "responses": len(outputs),
        "cost": cost.to_json(),
    }
    attacked = {} if plan.attack is None else {"attack": plan.attack}
    run |= attacked
    shared = {"run": name, "spec": spec.label, "seed": seed, **attacked}
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
