"""An eval from its settings to its record: run what is missing, measure what is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from stars_fast.eval.answers import MATH, MathScores
from stars_fast.eval.attacks import Attack
from stars_fast.eval.datasets import Item
from stars_fast.eval.gold import RewardFunction
from stars_fast.eval.judge import PairJudge, describe
from stars_fast.eval.measure import (
    Rows,
    Saver,
    Scores,
    base_logprob_rows,
    judge_rows,
    score_rows,
    unmeasured,
)
from stars_fast.eval.metrics import Intervals
from stars_fast.eval.models import Models, RewardSource, identity_of
from stars_fast.eval.run import Engines, Failure, Plan, digest, missing, run_missing
from stars_fast.eval.specs import Spec, described
from stars_fast.eval.store import Record, Store, read_json, write_json
from stars_fast.reward_head import RewardHeadLike

if TYPE_CHECKING:
    from stars_fast.engine import Engine

CALIBRATION = "calibration.json"

_BOOTSTRAP_SEED = 0


@dataclass
class Session:
    """A running eval.

    Attributes
    ----------
    folder
        Folder of its files.
    plan
        The plan of the runs.
    store
        Store of the results.
    models
        Sources of the models.
    reference
        Label of the reference.
    gold, gold_name, gold_template
        The gold reward, how the user calls it, and what it reads.
    judge
        The judge; None: no judge.
    accuracy
        Whether to measure which of a preference's responses the rewards prefer.
    tie_margin
        A difference of gold scores of at most this is a tie.
    quantile
        Quantile of unaligned rewards that ``target_reward="auto"`` takes.
    attacks
        Attacks under which each spec is also run.
    harm_below
        An attack succeeds where the gold score is below this.
    say
        Reports progress to the user.
    failed_runs, problems
        Failures so far.
    """

    folder: Path
    plan: Plan
    store: Store
    models: Models
    reference: str
    gold: str | RewardFunction
    gold_name: str
    say: Callable[[str], None]
    gold_template: str | None = None
    judge: PairJudge | None = None
    accuracy: bool = False
    tie_margin: float = 1e-9
    quantile: float = 0.9
    attacks: Sequence[Attack] = ()
    harm_below: float = 0.0
    failed_runs: list[Failure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _accuracies: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bars = sys.stderr.isatty()
        self._engines = Engines(self.models.engine, self._calibrate)

    @property
    def _reference(self) -> Spec:
        return next(spec for spec in self.plan.specs if spec.label == self.reference)

    @property
    def _plans(self) -> list[Plan]:
        """What is run without an attack, and under each."""
        attacked = [
            replace(self.plan, items=attack.on(self.plan.items), attack=attack.name)
            for attack in self.attacks
        ]
        return [self.plan, *attacked]

    @property
    def _answers(self) -> list[str | None]:
        """The answers that the gold score compares with; none if it is another."""
        return [item.answer for item in self.plan.items] if self.gold == MATH else []

    @property
    def _by(self) -> dict[str, str]:
        """What each column of the responses is measured by."""
        names = ["reward_template", "reward_head"]
        if isinstance(self.models.reward_model, list):
            names += ["combine", "combine_stds"]
        read_by = [self.models.options.get(name) for name in names]
        by = {
            "reward": digest([identity_of(self.models.reward_model), *read_by]),
            "gold": digest([identity_of(self.gold), self.gold_template, *self._answers]),
            "base_logprob": digest(identity_of(self.models.model)),
        }
        if self.judge is not None:
            reference = self.plan.fingerprint(self._reference, self.plan.seeds[0])
            by["judge"] = digest([describe(self.judge), reference])
        return by

    # Runs

    def calibrate(self) -> None:
        """Find the targets that specs ask for; each is kept in a file for a run that resumes.

        Raises
        ------
        ValueError, StarsFastError
            As `Engine.calibrate`.
        """
        kept = read_json(self.folder / CALIBRATION)
        targets: dict[str | None, float] = {}
        for rm in dict.fromkeys(spec.rm for spec in self.plan.specs if spec.needs_target):
            name = self._calibration_name(rm)
            if name not in kept:
                self.say("calibrating the target reward on unaligned responses")
                calibration = self._engines.get(None, rm, calibrated=True).calibration
                assert calibration is not None
                kept[name] = {
                    "reward_model": rm,
                    "target_reward": calibration.target_reward,
                    "quantiles": {str(q): r for q, r in calibration.quantiles.items()},
                    "samples": len(calibration.rewards),
                }
                write_json(self.folder / CALIBRATION, kept)
            targets[rm] = float(kept[name]["target_reward"])
            self.say(f"target reward {targets[rm]:.4g}" + (f" of {rm}" if rm else ""))
        self.plan = replace(self.plan, targets=targets)

    def run(self) -> None:
        """Make the runs that are missing."""
        plans = self._plans
        runs = missing(plans, self.store)
        if not runs:
            return
        order = {(plan.named(spec), seed): i for i, (plan, spec, seed) in enumerate(runs)}
        with tqdm(total=len(runs), unit="run", disable=not self._bars, desc="eval") as bar:

            def begun(name: str, seed: int) -> None:
                bar.set_description(f"{name}, seed {seed}", refresh=False)
                bar.update(order[name, seed] - bar.n)
                if not self._bars:
                    self.say(f"running {name}, seed {seed}")

            self.failed_runs += run_missing(
                plans, self.store, self._engines, begun, use_tqdm=self._bars
            )
            bar.update(len(runs) - bar.n)
        self._engines.drop()

    def _calibrate(self, engine: Engine) -> None:
        params = self.plan.specs[0].params
        lengths = [
            spec.params.draft_length for spec in self.plan.specs if spec.params.calibrate_prefixes
        ]
        if lengths:
            params = params.with_method("vanilla", segment_length=min(lengths))
        prompts: list[Any] = [item.prompt for item in self.plan.items]
        engine.calibrate(prompts, self.quantile, params=params, use_tqdm=self._bars)

    def _calibration_name(self, rm: str | None) -> str:
        plan = self.plan
        sampling = described(plan.specs[0])["params"]
        models = [plan.lms[None], plan.rms[rm]]
        return digest([models, self.quantile, sampling, plan.prompts(), plan.identity])

    # Measurements

    def measure(self) -> None:
        """Measure what finished runs lack; a failed measurement is recorded as a problem."""
        with Saver(self.store) as saver:
            for step in (self._rewards, self._golds, self._base_logprobs, self._verdicts):
                try:
                    step(saver)
                except Exception as error:  # noqa: BLE001 - the other measurements are still wanted
                    what = step.__name__.strip("_").replace("_", " ")
                    self.problems.append(f"no {what}: {type(error).__name__}: {error}")

    def _rewards(self, saver: Saver) -> None:
        if self.models.reward_model is not None:
            template, head = map(self.models.options.get, ("reward_template", "reward_head"))
            self._scored("reward", self.models.reward_model, template, saver, head)

    def _golds(self, saver: Saver) -> None:
        self._scored("gold", self.gold, self.gold_template, saver)

    def _scored(
        self,
        column: str,
        source: RewardSource,
        template: str | None,
        saver: Saver,
        head: RewardHeadLike = None,
    ) -> None:
        by = self._by[column]
        lacking = [
            (plan, runs)
            for plan in self._plans
            if (runs := unmeasured(self._runs(plan), column, by))
        ]
        pairs = self.accuracy and any(item.chosen is not None for item in self.plan.items)
        if not lacking and not pairs:
            return
        self.say(f"scoring responses: {column}")
        by_answer = column == "gold" and source == MATH
        scores: Scores = MathScores() if by_answer else self.models.scorer(source, template, head)
        for plan, runs in lacking:
            what = column if plan.attack is None else f"{column} under {plan.attack}"
            bar = tqdm(runs, unit="run", disable=not self._bars, desc=what)
            score_rows(bar, column, by, scores, _by_number(plan), saver, by_answer=by_answer)
        if pairs:
            self._accuracies[column] = self._accuracy(scores)

    def _accuracy(self, scores: Scores) -> Record:
        items = [item for item in self.plan.items if item.chosen is not None]
        prompts = [item.prompt for item in items]
        sides = [
            scores.score(prompts, [side or "" for side in texts])
            for texts in ([item.chosen for item in items], [item.rejected for item in items])
        ]
        values, failed = [], []
        for item, chosen, rejected in zip(items, *sides, strict=True):
            errors = [side for side in (chosen, rejected) if isinstance(side, Exception)]
            if isinstance(chosen, Exception) or isinstance(rejected, Exception):
                failed.append({"number": item.number, "error": str(errors[0])})
            else:
                values.append((1.0 + np.sign(chosen - rejected)) / 2)
        found = Intervals(len(values)).of(np.array(values).reshape(-1, 1))
        nothing = {"mean": None, "low": None, "high": None, "over": 0}
        return {**(found.to_json() if found else nothing), "failed": failed}

    def _base_logprobs(self, saver: Saver) -> None:
        by = self._by["base_logprob"]
        of_others = {spec.lm for spec in self.plan.specs} - {None}
        for lm in sorted(name for name in of_others if name is not None):
            rows = [self._rows(s, seed) for s in self.plan.specs for seed in self.plan.seeds
                    if s.lm == lm]  # fmt: skip
            runs = unmeasured(rows, "base_logprob", by)
            if not runs:
                continue
            self.say(f"log-probabilities of the responses of {lm} under the base model")
            model, tokenizer = self.models.base()
            alike = self.models.same_tokens(lm)
            base_logprob_rows(runs, by, model, tokenizer, alike, _by_number(self.plan), saver)

    def _verdicts(self, saver: Saver) -> None:
        if self.judge is None:
            return
        seed = self.plan.seeds[0]
        reference = self._reference
        theirs = {r["number"]: r for r in self._rows(reference, seed) if r["error"] is None}
        by = self._by["judge"]
        others = [self._rows(spec, seed) for spec in self.plan.specs if spec is not reference]
        runs = unmeasured(others, "judge", by)
        runs = [[row for row in rows if row["number"] in theirs] for rows in runs]
        total = sum(map(len, runs))
        if total:
            self.say(f"asking {self.judge.model} about {total} pairs, in both orders")
            with tqdm(total=total, unit="pair", disable=not self._bars, desc="judge") as bar:
                judge_rows(runs, by, self.judge, theirs, saver, bar.update)

    def _runs(self, plan: Plan) -> list[Rows]:
        names = {plan.fingerprint(s, seed): None for s in plan.specs
                 for seed in plan.seeds}  # fmt: skip
        return [self.store.responses[name] for name in names if name in self.store.responses]

    def _rows(self, spec: Spec, seed: int) -> Rows:
        return self.store.responses.get(self.plan.fingerprint(spec, seed), [])

    # The record

    def record(self, header: Mapping[str, Any], prompts: str) -> Record:
        """Return the record but for its summary.

        Parameters
        ----------
        header
            Origin of the record.
        prompts
            Source of the prompts.
        """
        plan, models = self.plan, self.models
        settings = {
            "models": {
                "model": models.model,
                "reward_model": _shown(models.reward_model),
                "lm": dict(models.lms),
                "rm": {name: _shown(source) for name, source in models.rms.items()},
                **plan.identity,
            },
            "prompts": prompts,
            "numbers": [item.number for item in plan.items],
            "seeds": list(plan.seeds),
            "reference": self.reference,
            "gold": self.gold_name,
            "tie_margin": self.tie_margin,
            "bootstrap_seed": _BOOTSTRAP_SEED,
            "target": plan.targets.get(None),
            "targets": {name: target for name, target in plan.targets.items() if name},
            "calibration_quantile": self.quantile,
            "judge": None if self.judge is None else describe(self.judge),
            "measured_by": self._by,
            "specs": [{**described(spec), "runs": _run_names(plan, spec)} for spec in plan.specs],
            **self._attack_settings(),
        }
        return {
            "header": dict(header),
            "settings": settings,
            "failed_runs": [asdict(failure) for failure in self.failed_runs],
            "problems": self.problems,
            "accuracy": self._accuracies,
        }

    def _attack_settings(self) -> Record:
        if not self.attacks:
            return {}
        attacks = [
            {**asdict(attack), "runs": [_run_names(plan, spec) for spec in plan.specs]}
            for attack, plan in zip(self.attacks, self._plans[1:], strict=True)
        ]
        return {"harm_below": self.harm_below, "attacks": attacks}


def _run_names(plan: Plan, spec: Spec) -> dict[str, str]:
    return {str(seed): plan.fingerprint(spec, seed) for seed in plan.seeds}


def _by_number(plan: Plan) -> dict[int, Item]:
    return {item.number: item for item in plan.items}


def _shown(source: RewardSource | None) -> Any:  # noqa: ANN401 - JSON
    if isinstance(source, list):
        return [repr(one) for one in source]
    return None if source is None else str(identity_of(source)[0])
