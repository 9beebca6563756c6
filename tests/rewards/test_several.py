"""Several rewards as one scorer: what is shared, what is refused, and whose error it is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.reward_walk import QUESTIONS, Walk, text_prompt
from helpers.tiny_heads import gated
from helpers.tiny_rewards import plain_reward, reward_model
from helpers.tiny_tokenizers import bpe_tokenizer, encoder_tokenizer

from stars_fast import Persona, Reward
from stars_fast.errors import ModelLoadError, RewardError
from stars_fast.rewards import Prompt, ScoreJob, Scorer
from stars_fast.rewards.callable import CallableScorer
from stars_fast.rewards.combine import Combination, CombinedReward
from stars_fast.rewards.load_several import load_rewards
from stars_fast.rewards.several import Part, SeveralScorer

LM = bpe_tokenizer(400)


def load(*rewards: Reward, **options: Any) -> Scorer:
    options = {"num_pages": 200, "page_size": 4, **options}
    return load_rewards(list(rewards), lm_tokenizer=LM, **options)


def walked(scorer: Scorer, seed: int = 3) -> Walk:
    walk = Walk(scorer, LM, seed=seed)
    for request, question in enumerate((QUESTIONS[0], QUESTIONS[1], QUESTIONS[0])):
        walk.start(request, text_prompt(LM, question), 60)
    walk.run(rounds=8)
    return walk


def rewards_in(walk: Walk) -> list[dict[str, float]]:
    found = []
    for item in walk.rounds:
        assert isinstance(item.reward, CombinedReward)
        found.append(item.reward.rewards)
    return found


@pytest.fixture
def two_labels(tmp_path: Path) -> Path:
    model = reward_model("llama", LM, num_labels=2)
    model.save_pretrained(tmp_path / "two")
    LM.save_pretrained(tmp_path / "two")
    return tmp_path / "two"


def test_heads_of_a_directory_run_it_once(two_labels: Path) -> None:
    (two_labels.parent / "link").symlink_to(two_labels)
    rewards = [
        Reward("a", two_labels, label=0),
        Reward("lengths", lambda prompts, responses: [float(len(r)) for r in responses], weight=0),
        Reward("b", str(two_labels.parent / "link"), label=1, weight=-2.0, at_most=0.5),
        Reward("odds", two_labels, label_weights={0: 1, 1: -1}, weight=0),
        Reward("again", two_labels, label=0, weight=0, at_least=-0.5),
    ]
    one, several = load(Reward("a", two_labels, label=0)), load(*rewards)
    alone, walk = walked(one), walked(several)
    first, both = one.stats(), several.stats()
    assert {name: both[name] for name in ("rm_jobs", "rm_tokens", "rm_pages_used")} == {
        name: first[name] for name in ("rm_jobs", "rm_tokens", "rm_pages_used")
    }
    assert both["rm_calls"] - first["rm_calls"] <= len(walk.rounds)  # those of the function
    assert len(several.modules) == 1
    for item, of_one, found in zip(walk.rounds, rewards_in(alone), rewards_in(walk), strict=True):
        assert list(found) == ["a", "lengths", "b", "odds", "again"]
        assert found["a"] == pytest.approx(of_one["a"], abs=1e-6)
        assert found["again"] == found["a"]
        assert found["lengths"] == len(item.job.response_text)
        assert found["odds"] == pytest.approx(found["a"] - found["b"], abs=1e-5)
        assert item.reward == pytest.approx(found["a"] - 2 * found["b"])
        keeps = found["b"] <= 0.5 and found["a"] >= -0.5
        assert isinstance(item.reward, CombinedReward)
        assert item.reward.keeps == keeps
    assert several.take_tokens() == one.take_tokens()


def test_two_models_beside_each_other() -> None:
    models = [reward_model("llama", LM, seed=0), reward_model("gemma2", LM, seed=1)]
    several = load(
        Reward("a", models[0], tokenizer=LM), Reward("b", models[1], tokenizer=LM, weight=0.25)
    )
    walk = walked(several)
    for item, found in zip(walk.rounds, rewards_in(walk), strict=True):
        ids = [*item.prompt.token_ids, *item.job.response_ids]
        assert found["a"] == pytest.approx(plain_reward(models[0], ids), abs=1e-4)
        assert found["b"] == pytest.approx(plain_reward(models[1], ids), abs=1e-4)
    assert several.modules == models
    assert several.stats()["rm_jobs"] == len(walk.rounds)
    assert several.devices == {torch.device("cpu")}


def test_labels_of_an_encoder_run_it_once() -> None:
    tokenizer = encoder_tokenizer()
    model = reward_model("bert", tokenizer, num_labels=2)
    how: dict[str, Any] = {"tokenizer": tokenizer, "template": "{prompt}{response}"}
    several = load(Reward("a", model, label=0, **how), Reward("b", model, label=1, **how))
    prompt = text_prompt(LM, QUESTIONS[0])
    several.start(0, prompt, 20)
    (found,) = several.score([ScoreJob(0, 0, [50, 51], "It is.")])
    assert several.stats()["rm_calls"] == 1
    fields = tokenizer(f"{prompt.text}It is.", return_tensors="pt")
    with torch.no_grad():
        want = model(**fields).logits[0].tolist()
    assert isinstance(found, CombinedReward)
    assert list(found.rewards.values()) == pytest.approx(want, abs=1e-5)


def test_what_reads_other_tokens_shares_the_weights_alone(tmp_path: Path) -> None:
    """A gate reads more than the last token; another template has other tokens."""
    gated("llama", "LlamaForRewardModelWithGating")(tmp_path, bpe_tokenizer(400, chat="llama3"))
    several = load(
        Reward("all", tmp_path),
        Reward("one", tmp_path, label=1),
        Reward("plain", tmp_path, label=1, template="plain"),
        Reward("two", tmp_path, label=2),
    )
    assert len(several.modules) == 1
    prompt = text_prompt(LM, QUESTIONS[0])
    job = ScoreJob(0, 0, [50, 51], "")
    several.start(0, prompt, 20)
    (found,) = several.score([job])
    assert isinstance(found, CombinedReward)
    for reward in (Reward("all", tmp_path), Reward("two", tmp_path, label=2)):
        alone = load(reward)
        alone.start(0, prompt, 20)
        assert found.rewards[reward.name] == pytest.approx(float(alone.score([job])[0]), abs=1e-5)
        assert several.stats()["rm_calls"] == 3 * alone.stats()["rm_calls"]


def test_a_refused_prompt_is_known_to_none_of_them() -> None:
    short = reward_model("llama", LM, max_position_embeddings=40)
    several = load(
        Reward("first", reward_model("llama", LM), tokenizer=LM),
        Reward("short", short, tokenizer=LM),
    )
    with pytest.raises(ValueError, match=r"^reward 'short': the prompt has .* context of 40"):
        several.start(0, text_prompt(LM, QUESTIONS[0]), 100)
    several.start(0, text_prompt(LM, QUESTIONS[0]), 1)  # the first has no request 0 either


def test_an_error_is_its_rewards_and_its_jobs() -> None:
    def picky(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [1 / len(response) for response in responses]

    huge = Reward("huge", lambda prompts, responses: [1e300] * len(prompts), weight=1e300)
    several = load(Reward("a", lambda p, r: [1.0] * len(p)), Reward("picky", picky))
    several.start(0, Prompt("x", [5], None), 5)
    good, bad = several.score([ScoreJob(0, 0, [6], "y"), ScoreJob(0, 1, [7], "")])
    assert good == 2.0
    assert isinstance(bad, RewardError)
    assert str(bad).startswith("'picky': reward function ")
    assert "ZeroDivisionError" in str(bad)
    scorer = load(huge)
    scorer.start(0, Prompt("x", [5], None), 5)
    assert "lower weights" in str(scorer.score([ScoreJob(0, 0, [6], "y")])[0])


@pytest.mark.parametrize("remote", [False, True])
def test_devices_and_servers_run_side_by_side(remote: bool) -> None:
    """Two that say they are on devices, or servers, of their own meet; a third meets nobody."""
    meet = threading.Barrier(2, timeout=20)
    threads: dict[str, int] = {}

    def on(name: str, device: int | None) -> Scorer:
        def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            threads[name] = threading.get_ident()
            assert torch.is_inference_mode_enabled()
            if device is not None:
                meet.wait()
            return [1.0] * len(prompts)

        scorer = CallableScorer(score)
        scorer.remote = remote and device is not None
        scorer.device = None if device is None or remote else torch.device("cuda", device)
        return scorer

    names = {"a": 0, "b": 1, "anywhere": None}
    parts = [Part(on(n, d), (n,), (i,), (0,)) for i, (n, d) in enumerate(names.items())]
    several = SeveralScorer(parts, Combination([Reward(n, len) for n in names], "sum"))
    several.start(0, Prompt("x", [5], None), 5)
    assert several.score([ScoreJob(0, 0, [6], "y")]) == [3.0]
    assert threads["anywhere"] == threads["a"] == threading.get_ident() != threads["b"]
    assert len(several.devices) == (0 if remote else 2)


def ones(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1.0] * len(prompts)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([], {}, r"at least one Reward, got \[\]"),
        (["dir"], {}, r"must be of Reward\(name, model\), got a str"),
        ([Reward("a", ones), Reward("a", len)], {}, "names of rewards must differ, 'a'"),
        ([Reward("a", ones, weight=0)], {}, "weight of at least one Reward"),
        ([Reward("a", Persona(system="x"))], {}, "'a' must not be a Persona"),
        ([Reward("a", ones)], {"template": "plain"}, "reward_template is for one reward model"),
        ([Reward("a", ones)], {"head": "label=1"}, "reward_head is for one reward model"),
        ([Reward("a", ones, label=1)], {}, "^reward 'a': reward_head is for reward models with"),
        ([Reward("a", "no/such", label=1)], {}, "^reward 'a': .*no/such"),
    ],
)
def test_refusals(rewards: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, ModelLoadError), match=message):
        load_rewards(rewards, lm_tokenizer=LM, **options)
