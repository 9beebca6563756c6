"""From records to what is reported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from stars_fast.eval.cost import Cost
from stars_fast.eval.plots import draw
from stars_fast.eval.results import failures
from stars_fast.eval.store import Record, Store
from stars_fast.eval.summary import summarise
from stars_fast.eval.tables import report

GOLD = {
    "vanilla": {0: [0.0, 0.2, 0.4], 1: [0.1, 0.3, 0.5]},
    "best_of_n": {0: [0.5, 0.1, 0.4], 1: [0.6, None, 0.7]},
    "sft": {0: [0.0, 0.0, 0.0], 1: [0.0, 0.0, 0.0]},
}


def cost(tokens: int, seconds: float) -> dict[str, Any]:
    counts = dict.fromkeys(Cost.__dataclass_fields__, 0)
    changes = {"lm_tokens": tokens, "lm_parameters": 2, "drafted_tokens": 9, "accepted_tokens": 5}
    changes |= {"row_steps": 12}
    return {**counts, **changes, "attempts": 4, "segments": 2, "seconds": seconds}


def row(label: str, seed: int, number: int, gold: float | None) -> Record:
    on_base = label != "sft"
    found = {
        "run": f"{label}-{seed}", "spec": label, "seed": seed, "number": number, "prompt": "p",
        "text": "t", "token_ids": [number, 7], "finish_reason": "stop" if number > 1 else "length",
        "error": None, "segments": {"count": 2, "attempts": 3, "fallbacks": 1},
        "logprob": -2.0, "base_logprob": -2.0 if on_base else -5.0, "base_tokens": 2,
        "alignment_kl": 0.25 if label == "best_of_n" else 0.0,
        "kl_kind": "upper bound" if label == "best_of_n" else "exact", "kl_reason": "",
        "reward": 1.0, "reward_error": None, "reward_by": "r", "gold": gold, "gold_by": "g",
        "gold_error": None if gold is not None else "no | such\nluck",
    }  # fmt: skip
    return found if on_base else {**found, "same_tokens": True, "base_logprob_by": "x"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    for label, seeds in GOLD.items():
        for seed, golds in seeds.items():
            rows = [row(label, seed, i, gold) for i, gold in enumerate(golds, 1)]
            tokens = {"vanilla": 300, "best_of_n": 900, "sft": 300}[label]
            seconds = (0.5 if label == "sft" else 1.0) + seed
            run = {"run": f"{label}-{seed}", "responses": 3, "cost": cost(tokens, seconds)}
            store.add(run, rows)
    return store


SETTINGS: dict[str, Any] = {
    "models": {"model": "m", "reward_model": "r"},
    "prompts": "demo",
    "numbers": [1, 2, 3],
    "seeds": [0, 1],
    "reference": "vanilla",
    "gold": "demo",
    "tie_margin": 1e-9,
    "bootstrap_seed": 0,
    "target": None,
    "judge": {"model": "j"},
    "measured_by": {"reward": "r", "gold": "g", "judge": "j", "base_logprob": "x"},
    "specs": [
        {
            "label": label,
            "method": "vanilla" if label == "sft" else label,
            "lm": label if label == "sft" else None,
            "rm": None,
            "params": {},
            "runs": {str(seed): f"{label}-{seed}" for seed in (0, 1)},
        }
        for label in GOLD
    ],
}


def test_by_hand(store: Store) -> None:
    vanilla, best, sft = summarise(SETTINGS, store)["specs"]
    assert vanilla["gold"]["mean"] == pytest.approx(0.25)
    # Prompt 2 has one value only.
    assert best["gold"]["mean"] == pytest.approx((0.55 + 0.1 + 0.55) / 3)
    assert best["gold"]["over"] == 5
    assert best["gold_failed"] == [{"number": 2, "seed": 1, "error": "no | such\nluck"}]
    against = best["against_reference"]
    assert against["win"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert against["loss"] == pytest.approx(1 / 3)
    assert against["tie"] == pytest.approx(0.5 / 3)
    assert against["gain"]["mean"] == pytest.approx((0.5 - 0.1 + 0.1) / 3)
    assert vanilla["against_reference"] is None
    assert best["cost"]["relative_flops"] == 3.0
    assert best["cost"]["lm_tokens"] == 300.0
    assert best["cost"]["flops"] == 2 * 2 * 900 / 3
    assert best["cost"]["seconds_per_run"] == 1.5
    assert best["cost"]["discarded_per_rejection"] == 2.0
    assert best["cost"]["row_steps"] == 4.0
    assert best["cost"]["unused_share"] == 0.25
    assert best["cost"]["relative_seconds"] == 1.0
    assert sft["cost"]["relative_seconds"] == pytest.approx(2 / 3)
    assert [spec["on_front"] for spec in (vanilla, best, sft)] == [
        ["flops"], ["flops", "seconds"], ["seconds"],
    ]  # fmt: skip
    assert best["distinct_1"] == pytest.approx(4 / 6)
    assert best["perplexity"] == pytest.approx(math.e)
    assert best["stopped"]["mean"] == pytest.approx(2 / 3)
    assert best["tokens"]["mean"] == 2.0
    assert best["attempts_per_segment"] == 1.5
    assert best["fallback_share"] == 0.5
    assert (best["kl"]["mean"], best["kl"]["kind"]) == (0.25, "upper bound")
    assert (sft["kl"]["mean"], sft["kl"]["kind"]) == (3.0, "estimate")
    assert (vanilla["kl"]["mean"], vanilla["kl"]["kind"]) == (0.0, "exact")


def test_pairs_and_the_reference_agree(store: Store) -> None:
    summary = summarise(SETTINGS, store)
    pairs = {(pair["a"], pair["b"]): pair for pair in summary["pairwise"]}
    assert set(pairs) == {("best_of_n", "vanilla"), ("sft", "vanilla"), ("sft", "best_of_n")}
    best = summary["specs"][1]["against_reference"]
    assert {name: pairs["best_of_n", "vanilla"][name] for name in best} == best


def test_a_run_that_is_missing_leaves_the_others(store: Store) -> None:
    del store.runs["best_of_n-1"]
    _, best, _ = summarise(SETTINGS, store)["specs"]
    assert best["runs"] == 1
    assert best["gold"]["over"] == 3
    for seed in (0, 1):
        store.runs.pop(f"vanilla-{seed}")
    vanilla, best, _ = summarise(SETTINGS, store)["specs"]
    assert vanilla["gold"] is None
    assert best["against_reference"] is None
    assert best["cost"]["relative_flops"] is None


def test_requests_that_failed_are_no_responses(store: Store) -> None:
    store.responses["best_of_n-0"][0]["error"] = "does not fit"
    _, best, _ = summarise(SETTINGS, store)["specs"]
    assert best["responses"] == 5
    assert best["failed"] == [{"number": 1, "seed": 0, "error": "does not fit"}]
    assert best["gold"]["mean"] == pytest.approx((0.6 + 0.1 + 0.55) / 3)


def test_unlike_tokens_have_no_kl(store: Store) -> None:
    for seed in (0, 1):
        for one in store.responses[f"sft-{seed}"]:
            one["same_tokens"] = False
    sft = summarise(SETTINGS, store)["specs"][2]
    assert sft["kl"] == {"reason": "its tokens are not those of the base model"}
    assert sft["perplexity"] == pytest.approx(math.exp(2.5))


def test_the_judge_counts_both_orders(store: Store) -> None:
    verdicts = [[1.0, 1.0], [1.0, 0.0], None]
    for one, verdict in zip(store.responses["best_of_n-0"], verdicts, strict=True):
        one |= {"judge": verdict, "judge_by": "j", "judge_error": None if verdict else "timed out"}
    _, best, sft = summarise(SETTINGS, store)["specs"]
    assert sft["judge"] is None
    judge = best["judge"]
    assert (judge["win"], judge["tie"], judge["loss"]) == (0.5, 0.5, 0.0)
    assert judge["contradictory"] == 0.5
    assert judge["win_rate"]["mean"] == 0.75
    assert [f["number"] for f in judge["failed"]] == [3]


def test_what_another_reward_or_judge_has_measured_does_not_count(store: Store) -> None:
    one, two, three = store.responses["best_of_n-0"]
    one["gold_by"] = "another"
    two["reward_by"] = "another"
    three |= {"judge": [1.0, 1.0], "judge_by": "another", "judge_error": None}
    for seed in (0, 1):
        for row in store.responses[f"sft-{seed}"]:
            row["base_logprob_by"] = "another"
    _, best, sft = summarise(SETTINGS, store)["specs"]
    assert (best["gold"]["over"], best["reward"]["over"], best["judge"]) == (4, 5, None)
    assert sft["perplexity"] is None
    assert sft["kl"] == {"reason": "not measured"}


ATTACKED = {
    "vanilla": {0: [0.3, -0.2, -0.1], 1: [-0.1, -0.3, 0.0]},
    "best_of_n": {0: [0.5, -0.1, 0.4], 1: [0.1, None, 0.2]},
}


@pytest.fixture
def attacked(store: Store) -> dict[str, Any]:
    """Settings with an attack, whose runs are in the store; those of sft have failed."""
    for label, seeds in ATTACKED.items():
        for seed, golds in seeds.items():
            rows = [row(label, seed, i, gold) for i, gold in enumerate(golds, 1)]
            rows = [{**one, "run": f"{label}-{seed}-rude", "attack": "rude"} for one in rows]
            run = {"run": rows[0]["run"], "responses": 3, "cost": cost(300, 1.0)}
            store.add(run, rows)
    names = [{str(seed): f"{label}-{seed}-rude" for seed in (0, 1)} for label in GOLD]
    attack = {"name": "rude", "kind": "prefill", "texts": ["a", "b"], "runs": names}
    return {**SETTINGS, "harm_below": 0.2, "attacks": [attack]}


def test_attack_success_by_hand(store: Store, attacked: dict[str, Any]) -> None:
    summary = summarise(attacked, store)
    cells = {(cell["spec"], cell["attack"]): cell for cell in summary["attacks"]}
    assert list(cells) == [(label, attack) for attack in (None, "rude") for label in GOLD]
    # By prompt: 0.0 and 0.1; 0.2 and 0.3, neither below 0.2; 0.4 and 0.5.
    assert cells["vanilla", None]["success"]["mean"] == pytest.approx(1 / 3)
    assert "added_success" not in cells["vanilla", None]
    rude = cells["vanilla", "rude"]
    assert rude["success"]["mean"] == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert rude["added_success"]["mean"] == pytest.approx((-0.5 + 1.0 + 1.0) / 3)
    assert rude["gold"]["mean"] == pytest.approx((0.1 - 0.25 - 0.05) / 3)
    assert rude["added_gold"]["mean"] == pytest.approx((0.05 - 0.5 - 0.5) / 3)
    assert rude["success"]["low"] < rude["success"]["mean"] < rude["success"]["high"] == 1.0
    # Prompt 2 with seed 1 has no score, neither with the attack nor without.
    best = cells["best_of_n", "rude"]
    assert (best["success"]["over"], best["added_success"]["over"]) == (5, 5)
    assert best["success"]["mean"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert best["added_success"]["mean"] == pytest.approx((0.5 + 0.0 + 0.0) / 3)
    assert best["added_gold"]["mean"] == pytest.approx((-0.25 - 0.2 - 0.25) / 3)
    assert [f["number"] for f in best["gold_failed"]] == [2]
    assert (cells["sft", "rude"]["success"], cells["sft", "rude"]["responses"]) == (None, 0)
    # Nothing else is of the attacked prompts.
    plain = summarise(SETTINGS, store)
    assert {name: summary[name] for name in plain} == plain
    assert "attacks" not in plain


def test_the_report_and_the_plot_of_attacks(
    store: Store, attacked: dict[str, Any], tmp_path: Path
) -> None:
    record = {
        "header": HEADER, "settings": attacked, **summarise(attacked, store), "failed_runs": []
    }  # fmt: skip
    drawn = draw(record, tmp_path / "plots")
    assert [path.name for path in drawn] == [
        "cost_quality.png", "seconds_quality.png", "win_rate.png", "attack_success.png"
    ]  # fmt: skip
    assert drawn[3].read_bytes().startswith(b"\x89PNG")
    text = report(record, [path.name for path in drawn])
    assert "| vanilla | none | 33.3% [" in text
    assert "| vanilla | rude | 83.3% [" in text
    assert "| sft | rude |  |  |  |  |" in text
    assert "a gold score below 0.2;" in text
    assert "rude: an opening of the response, one of 2 in turn." in text
    assert "best_of_n under rude: 5 of 6 responses have a gold." in text
    assert "- best_of_n under rude: gold of record 2, seed 1: no | such luck" in text
    assert failures(record)[-1].startswith("best_of_n under rude: 1 gold scores failed")


HEADER = {
    "versions": {"torch": "2", "transformers": "5"}, "uncommitted_changes": False,
    "device": "CPU", "torch_threads": 1, "date": "today", "commit": "0123456789abcdef",
    "command": "stars-fast eval",
}  # fmt: skip


def test_the_report_and_the_plots(store: Store, tmp_path: Path) -> None:
    record = {
        "header": HEADER, "settings": SETTINGS, **summarise(SETTINGS, store), "problems": ["no x"],
        "failed_runs": [{"label": "smc", "seed": 1, "error": "too large"}], "accuracy": {},
    }  # fmt: skip
    drawn = draw(record, tmp_path / "plots")
    assert [path.name for path in drawn] == [
        "cost_quality.png", "seconds_quality.png", "win_rate.png"
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    text = report(record, [path.name for path in drawn])
    assert "![cost quality](cost_quality.png)" in text
    assert "| best_of_n | +0.400 [" in text
    assert "| 50% / 17% / 33% |" in text
    assert "best_of_n: 5 of 6 responses have a gold." in text
    assert "- best_of_n: gold of record 2, seed 1: no | such luck" in text
    assert "- smc, seed 1: the whole run failed: too large" in text
    assert "commit 0123456789: `stars-fast eval`" in text
    assert "at most 0.25" in text
    assert "Attacks" not in text
    lengths = {line.count("|") for line in text.splitlines() if line.startswith("| sft")}
    assert lengths == {7, 13, 11, 5}
