"""An eval from its settings to its record: run what is missing, measure what is missing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from stars_fast.errors import StarsFastError
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
from stars_fast.eval.progress import Lines
from stars_fast.eval.run import Engines, Failure, Plan, digest, missing, run_missing
from stars_fast.eval.specs import Spec, described
from stars_fast.eval.store import Record, Store, read_json, write_json
from stars_fast.outputs import TargetKind
from stars_fast.reward_head import RewardHeadLike

if TYPE_CHECKING:
    from stars_fast.engine import Engine

CALIBRATION = "calibration.json"

T = TypeVar("T")

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
    golds
        The gold rewards, by what the user calls them; methods are compared by the first.
    gold_template
        What gold models read.
    judge
        The judge; None: no judge.
    accuracy
        Whether to measure which of a preference's responses the rewards prefer.
    tie_margin
        A difference of gold scores of at most this is a tie.
    quantile, target_kind
        Quantile of unaligned rewards that ``target_reward="auto"`` takes, and of which: see
        `Engine.calibrate`.
    attacks
        Attacks under which each spec is also run.
    harm_below
        An attack succeeds where the gold score is below this.
    say
        Reports progress to the user.
    failed_runs, problems
        Failures so far.
    kinds
        How targets of single prompts were found, by the name of the reward model.
    """

    folder: Path
    plan: Plan
    store: Store
    models: Models
    reference: str
    golds: Mapping[str, str | RewardFunction]
    say: Callable[[str], None]
    gold_template: str | None = None
    judge: PairJudge | None = None
    accuracy: bool = False
    tie_margin: float = 1e-9
    quantile: float = 0.9
    target_kind: TargetKind = "pooled"
    attacks: Sequence[Attack] = ()
    harm_below: float = 0.0
    failed_runs: list[Failure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    kinds: dict[str | None, Record] = field(default_factory=dict)
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
    def _gold_columns(self) -> dict[str, str]:
        """The column of the responses that each gold reward has, by its name."""
        first, *others = self.golds
        return {first: "gold", **{name: f"gold:{name}" for name in others}}

    def _gold_by(self, source: RewardSource) -> str:
        # Answers are compared with, so others are another measure.
        answers = [item.answer for item in self.plan.items] if source == MATH else []
        return digest([identity_of(source), self.gold_template, *answers])

    @property
    def _by(self) -> dict[str, str]:
        """What each column of the responses is measured by."""
        names = ["reward_template", "reward_head"]
        if isinstance(self.models.reward_model, list):
            names += ["combine", "combine_stds"]
        read_by = [self.models.options.get(name) for name in names]
        by = {
            "reward": digest([identity_of(self.models.reward_model), *read_by]),
            "base_logprob": digest(identity_of(self.models.model)),
            **{
                column: self._gold_by(self.golds[name])
                for name, column in self._gold_columns.items()
            },
        }
        if self.judge is not None:
            reference = self.plan.setting(self._reference, self.plan.seeds[0])
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
        targets: dict[str | None, float | Mapping[str, float]] = {}
        mine = self.plan.prompt_digests
        for rm in dict.fromkeys(spec.rm for spec in self.plan.specs if spec.needs_target):
            name = self._calibration_name(rm)
            theirs = kept.get(name, {}).get("prompts", {})
            # With more prompts than before the target stays what it was, and so do the runs.
            more = self.target_kind == "pooled" and theirs.items() <= mine.items()
            if not theirs or not (more or theirs == mine):
                self.say("calibrating the target reward on unaligned responses")
                engine = self._engines.get(None, rm, calibrated=True)
                calibration = engine.calibration
                assert calibration is not None
                kept[name] = {
                    "reward_model": rm,
                    "target_reward": calibration.target_reward,
                    "quantiles": {str(q): r for q, r in calibration.quantiles.items()},
                    "samples": len(calibration.rewards),
                    "prompts": mine,
                }
                if calibration.targets is not None:
                    kept[name] |= {
                        "kind": calibration.targets.kind,
                        "losses": calibration.targets.losses,
                        "prompt_targets": {
                            str(item.number): self._target_of(engine, item)
                            for item in self.plan.items
                        },
                    }
                write_json(self.folder / CALIBRATION, kept)
            found, of_rm = kept[name], f" of {rm}" if rm else ""
            if "prompt_targets" in found:
                targets[rm] = dict(found["prompt_targets"])
                self.kinds[rm] = {name: found[name] for name in ("kind", "losses")}
                self.say(f"target rewards{of_rm} by {found['kind']}")
            else:
                targets[rm] = float(found["target_reward"])
                self.say(f"target reward {targets[rm]:.4g}{of_rm}")
        self.plan = replace(self.plan, targets=targets, budgets=self._budgets(kept))

    def _budgets(self, kept: Record) -> dict[str, Mapping[str, Any]]:
        """Find what the budgets of specs stand for, on these prompts."""
        budgets: dict[str, Mapping[str, Any]] = {}
        for spec in self.plan.specs:
            if spec.params.budget is None:
                continue
            plan, asked = self.plan, described(spec)["params"]
            models = [plan.lms[spec.lm], plan.rms[spec.rm]]
            name = digest(["budget", models, asked, plan.identity, plan.prompt_digests])
            if name not in kept:
                self.say(f"calibrating the budget of {spec.label} on unaligned responses")
                kept[name] = self._within_budget(spec)
                write_json(self.folder / CALIBRATION, kept)
            budgets[spec.label] = {**kept[name], "budget": None}
            chosen = ", ".join(f"{field} {value:.4g}" for field, value in kept[name].items())
            self.say(f"{spec.label}: {chosen}")
        return budgets

    def _within_budget(self, spec: Spec) -> Record:
        engine = self._engines.get(spec.lm, spec.rm)
        before = engine.calibration  # of `target_reward` and `calibrate_prefixes`
        prompts: list[Any] = [item.prompt for item in self.plan.items]
        try:
            engine.calibrate(prompts, self.quantile, params=spec.params, use_tqdm=self._bars)
            found = engine.within_budget(spec.params)
        finally:
            engine.calibration = before
        names = ("target_reward", "max_attempts", "candidates")
        return {name: getattr(found, name) for name in names}

    def _target_of(self, engine: Engine, item: Item) -> float:
        try:
            return engine.target_of(item.prompt)
        except (ValueError, TypeError, StarsFastError):  # its request will be refused, too
            assert engine.calibration is not None
            return engine.calibration.target_reward

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
                plans, self.store, self._engines, begun, self.say, use_tqdm=self._bars
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
        engine.calibrate(
            prompts, self.quantile, params=params, use_tqdm=self._bars, targets=self.target_kind
        )

    def _calibration_name(self, rm: str | None) -> str:
        plan = self.plan
        sampling = described(plan.specs[0])["params"]
        models = [plan.lms[None], plan.rms[rm]]
        kind = [] if self.target_kind == "pooled" else [self.target_kind]
        return digest([models, self.quantile, sampling, plan.identity, *kind])

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
        for name, column in self._gold_columns.items():
            try:
                self._scored(column, self.golds[name], self.gold_template, saver)
            except Exception as error:  # noqa: BLE001 - the other gold rewards are still wanted
                self.problems.append(f"no {column}: {type(error).__name__}: {error}")

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
        by_answer = source == MATH and column in self._gold_columns.values()
        scores: Scores = MathScores() if by_answer else self.models.scorer(source, template, head)
        for plan, runs in lacking:
            what = column if plan.attack is None else f"{column} under {plan.attack}"
            bar = self._counted(runs, "run", f"scoring {what}")
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
            asked = self._counted(range(total), "pair", "judging")
            judge_rows(runs, by, self.judge, theirs, saver, lambda: next(asked, None))

    def _counted(self, things: Collection[T], unit: str, what: str) -> Iterator[T]:
        """Give the things, with a bar on a terminal and lines elsewhere."""
        lines = Lines(self.say, what)
        for done, thing in enumerate(tqdm(things, unit=unit, disable=not self._bars, desc=what)):
            if not self._bars:
                lines.update(functools.partial("{} of {} {}s".format, done, len(things), unit))
            yield thing

    def _runs(self, plan: Plan) -> list[Rows]:
        names = {name: None for spec in plan.specs for seed in plan.seeds
                 for name in plan.parts(spec, seed, self.store)}  # fmt: skip
        return [self.store.responses[name] for name in names]

    def _rows(self, spec: Spec, seed: int) -> Rows:
        names = self.plan.parts(spec, seed, self.store)
        return [row for name in names for row in self.store.responses[name]]

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
            "gold": next(iter(self.golds)),
            "other_golds": {
                name: column for name, column in self._gold_columns.items() if column != "gold"
            },
            "tie_margin": self.tie_margin,
            "bootstrap_seed": _BOOTSTRAP_SEED,
            "target": plan.targets.get(None),
            "targets": {name: target for name, target in plan.targets.items() if name},
            "target_kind": self.kinds.get(None),
            "calibration_quantile": self.quantile,
            "judge": None if self.judge is None else describe(self.judge),
            "measured_by": self._by,
            "specs": [
                {**described(spec), "runs": self._run_names(plan, spec)} for spec in plan.specs
            ],
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
            {**asdict(attack), "runs": [self._run_names(plan, spec) for spec in plan.specs]}
            for attack, plan in zip(self.attacks, self._plans[1:], strict=True)
        ]
        return {"harm_below": self.harm_below, "attacks": attacks}

    def _run_names(self, plan: Plan, spec: Spec) -> dict[str, list[str]]:
        return {str(seed): plan.parts(spec, seed, self.store) for seed in plan.seeds}


def _by_number(plan: Plan) -> dict[int, Item]:
    return {item.number: item for item in plan.items}


def _shown(source: RewardSource | None) -> Any:  # noqa: ANN401 - JSON
    if isinstance(source, list):
        return [repr(one) for one in source]
    return None if source is None else str(identity_of(source)[0])
