"""Process rewards: each published format, scored incrementally, against plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reward_walk import QUESTIONS, Round, Walk, chat_prompt, text_prompt
from helpers.tiny_heads import (
    Builder,
    gated,
    language_model,
    linear_head,
    token_classifier,
    two_layers,
)
from helpers.tiny_lm import small_model
from helpers.tiny_rewards import reward_model
from helpers.tiny_tokenizers import bpe_tokenizer, encoder_tokenizer

from stars_fast import Engine, RewardHead, StarsParams
from stars_fast.errors import UnsupportedModelError
from stars_fast.rewards import Prompt, ScoreJob, load_scorer
from stars_fast.rewards.causal import CausalScorer
from stars_fast.rewards.split_ids import NO_IDS
from stars_fast.rewards.steps import steps_of

LM = bpe_tokenizer(400)
#: Thoughts in steps, of blank lines in two tokens each.
WORK = (
    "It costs 12, so.\n\nThe film is 3.\n\n\n\nNot bad \n\nGood value\nfor it. \n\n\nWho knows?\n"
) * 3
PLUS, MINUS = (LM.convert_tokens_to_ids(token) for token in "+-")


def better(logits: torch.Tensor) -> torch.Tensor:
    """p of "+" against "-"."""
    return logits[[PLUS, MINUS]].softmax(0)[0]


@dataclass(frozen=True)
class Format:
    """A published process reward model: its class, and its text as those who made it write it."""

    build: Builder
    head: dict[str, Any]
    text: Callable[[Any, Prompt, list[str]], list[int]]  # the ids up to the last step's score
    template: str | None = None
    chat: str | None = None
    sigmoid: bool = False  # of what `build` gives
    pages: int = 44  # with which some are dropped


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def question(prompt: Prompt) -> str:
    return prompt.messages[0]["content"] if prompt.messages else prompt.text


def qwen(tokenizer: Any, prompt: Prompt, steps: list[str]) -> list[int]:
    answer = {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"}
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    text = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    return ids_of(tokenizer, text.removesuffix("<|im_end|>\n"))


def shepherd(tokenizer: Any, prompt: Prompt, steps: list[str]) -> list[int]:
    text = f"{question(prompt)} " + "".join(f"{step} ки\n" for step in steps)
    return [0, *ids_of(tokenizer, text.removesuffix("\n"))]


ASKED = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
ANSWERED = "+<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"


def rlhflow(tokenizer: Any, prompt: Prompt, steps: list[str]) -> list[int]:
    first = f"<|start_header_id|>user<|end_header_id|>\n\n{question(prompt)} "
    return [0, *ids_of(tokenizer, first + f"{ASKED}{ANSWERED}".join(steps) + ASKED)]


def separated(tokenizer: Any, prompt: Prompt, steps: list[str]) -> list[int]:
    """TRL's and Skywork's: each step by itself, then the separator's ids."""
    ids = [0]
    for number, step in enumerate(steps):
        ids += ids_of(tokenizer, f"{question(prompt)}\n{step}" if not number else step)
        ids += ids_of(tokenizer, "\n")
    return ids


FORMATS = {
    "qwen2.5-math-prm": Format(
        two_layers("score", "qwen2", "Qwen2ForProcessRewardModel", labels=2),
        {"label": 1, "step_tag": "<extra_0>"},
        qwen,
        chat="chatml",
    ),
    "math-shepherd": Format(
        language_model(better, "mistral"),
        {"tokens": ("+", "-"), "step_text": "\n", "step_tag": " ки{score}\n"},
        shepherd,
        template="{prompt} {response}",
    ),
    "rlhflow": Format(
        language_model(better),
        {"tokens": ("+", "-"), "step_tag": f"{ASKED}{{score}}{ANSWERED}"},
        rlhflow,
        template="<|start_header_id|>user<|end_header_id|>\n\n{prompt} {response}",
    ),
    "trl": Format(
        token_classifier,
        {"label": "good", "step_tag": "\n", "activation": "none"},
        separated,
        template="{prompt}\n{response}",
    ),
    "skywork": Format(
        linear_head(
            "v_head.summary", "Qwen2ForPrmModel", bias=True, lm_head=True, family="qwen2"
        ),
        {"step_text": "\n"},
        separated,
        template="{prompt}\n{response}",
        sigmoid=True,
        pages=30,
    ),
}  # fmt: skip
AGGREGATES = {"last": lambda x: x[-1], "min": min, "prod": np.prod, "mean": np.mean, "sum": sum}


@pytest.mark.parametrize(
    ("name", "aggregate"), list(zip(FORMATS, ["min", "prod", "last", "mean", "sum"], strict=True))
)
@pytest.mark.parametrize("spare", [True, False])
def test_rewards(tmp_path: Path, name: str, aggregate: str, spare: bool) -> None:
    """Also where pages are short, so that what was run is dropped and its scores are not."""
    form = FORMATS[name]
    tokenizer = bpe_tokenizer(400, chat=form.chat)
    if name.startswith("qwen"):
        tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
    reference = form.build(tmp_path, tokenizer)
    head = RewardHead(**{"activation": "probability", "at": "steps", "aggregate": aggregate}
                      | form.head)  # fmt: skip
    scorer = load_scorer(
        tmp_path, lm_tokenizer=LM, head=head, template=form.template, reward_tokenizer=tokenizer,
        num_pages=400 if spare else form.pages, page_size=4,
    )  # fmt: skip
    assert isinstance(scorer, CausalScorer)
    walk = Walk(scorer, LM, seed=len(name), segment=12)
    walk.corpus = ids_of(LM, WORK)
    prompts = [text_prompt(LM, QUESTIONS[2]), chat_prompt(LM, "A kettle?")]
    for request in range(6):
        walk.start(request, prompts[request % 2], budget=45)
    walk.run(rounds=8, limit=30)

    def expected(item: Round) -> float:
        pieces = (step.rstrip() for step in item.job.response_text.split(head.step_text))
        steps = [step for step in pieces if step] or [""]
        ends = [form.text(tokenizer, item.prompt, steps[: n + 1]) for n in range(len(steps))]
        scores = [reference(ids) for ids in ends]
        if form.sigmoid:
            scores = torch.tensor(scores).sigmoid().tolist()
        return float(AGGREGATES[aggregate](scores))

    walk.check(expected)
    counts = {len(steps_of(item.job.response_text, head.step_text)[0]) for item in walk.rounds}
    assert max(counts) >= 4
    stats = scorer.stats()
    assert (stats["rm_evictions"] > 0) == (not spare)
    for request in walk.prompts:
        scorer.finish(request)
    assert scorer.stats()["rm_pages_used"] == 0


def test_what_is_read_of_a_text() -> None:
    assert steps_of("", "\n\n") == ([""], False)
    assert steps_of("\n\n \n", "\n\n") == ([""], False)
    assert steps_of("a", "\n\n") == (["a"], False)
    assert steps_of("a.\n", "\n\n") == (["a."], False)
    assert steps_of("\n\na. \n\n", "\n\n") == (["a."], True)
    assert steps_of("a\n\n\n\n\nb c", "\n\n") == (["a", "\nb c"], False)
    assert steps_of("aXbX", "X") == (["a", "b"], True)


def qwen_scorer(folder: Path, **changes: Any) -> Any:
    tokenizer = bpe_tokenizer(400, chat="chatml")
    tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
    FORMATS["qwen2.5-math-prm"].build(folder, tokenizer)
    head = {"label": 1, "activation": "probability", "at": "steps", "step_tag": "<extra_0>"}
    return load_scorer(
        folder, lm_tokenizer=LM, head=RewardHead(**(head | changes)), reward_tokenizer=tokenizer,
        num_pages=200, page_size=4,
    )  # fmt: skip


def job(branch: int, text: str) -> ScoreJob:
    return ScoreJob(0, branch, ids_of(LM, text), text)


def test_a_tag_of_a_step_that_goes_on_leaves_no_trace(tmp_path: Path) -> None:
    """Each round runs what is new and its tag; tags of ended steps are read once."""
    scorer = qwen_scorer(tmp_path, aggregate="min")
    scorer.start(0, text_prompt(LM, QUESTIONS[1]), 80)
    text, runs = "", []
    for branch, piece in enumerate(["It costs", " 12, so.\n", "\nThe film", " is 3.\n\n", "Good"]):
        text += piece
        before = scorer.stats()["rm_tokens"]
        scorer.score([job(branch, text)])
        scorer.accept(0, branch)
        runs.append(scorer.stats()["rm_tokens"] - before - len(ids_of(LM, piece)))
        kept = scorer._texts.committed(0)
        assert (kept[-1] == 400) == text.endswith("\n\n")  # the tag's id
    # One tag each; a step's end is no token here, and its tag is run again if it was dropped.
    assert runs[0] > 40  # the prompt
    assert max(runs[1:]) <= 1
    fresh = qwen_scorer(tmp_path, aggregate="min")
    fresh.start(0, text_prompt(LM, QUESTIONS[1]), 80)
    (whole,) = fresh.score([job(0, text)])
    (again,) = scorer.score([job(9, text)])
    assert again == pytest.approx(whole, abs=1e-5)


def test_a_tag_that_a_response_writes_is_text(tmp_path: Path) -> None:
    scorer = qwen_scorer(tmp_path)
    scorer.start(0, text_prompt(LM, QUESTIONS[2]), 80)
    bound = scorer._prompts[0]
    plain, written = scorer._source.encode(
        [bound] * 2,
        [job(0, "It<extra_0>.\n\nGood<s> <extra_0>"), job(1, "It.\n\nGood")],
        [NO_IDS] * 2,
    )
    for encoded in (plain, written):
        assert [place for place, i in enumerate(encoded.ids) if i == 400] == list(encoded.places)
        assert len(encoded.places) == 2
    assert len(plain.ids) > len(written.ids) + 10


@pytest.mark.parametrize("kind", ["end", "steps", "encoder"])
def test_only_what_follows_a_thought_is_read(tmp_path: Path, kind: str) -> None:
    words = encoder_tokenizer()

    def scorer(**changes: Any) -> Any:
        if kind == "steps":
            return qwen_scorer(tmp_path, **changes)
        tokenizer = words if kind == "encoder" else LM
        model = reward_model("bert" if kind == "encoder" else "llama", tokenizer)
        return load_scorer(
            model, lm_tokenizer=LM, reward_tokenizer=tokenizer, head=RewardHead(**changes)
        )

    thoughts = ["Not bad", "Not</think>", "Not</think>\n\nGood\n\nvalue", "x</think> a</think>"]
    answers = ["", "", "Good\n\nvalue", "a</think>"]
    reads, plain = scorer(after="</think>"), scorer()
    for one in (reads, plain):
        one.start(0, text_prompt(LM, "Is it good?"), 40)
    (empty,) = reads.score([ScoreJob(0, 0, [], "")])
    reads.accept(0, 0)
    got = reads.score([job(n, text) for n, text in enumerate(thoughts, 1)])
    want = [plain.score([job(n, text)])[0] for n, text in enumerate(answers)]
    assert got == pytest.approx(want, abs=1e-5)
    assert got[0] == got[1] == empty
    assert len({round(reward, 4) for reward in got}) == 3
    # Where a chat template has ended the thought, nothing is waited for.
    for one in (reads, plain):
        one.finish(0)
        one.start(0, text_prompt(LM, "Is it good?<think></think>\n\n"), 40)
    (got,), (want,) = (one.score([job(0, "Good value")]) for one in (reads, plain))
    assert got == pytest.approx(want, abs=1e-5)


def test_an_engine_decides_by_steps(tmp_path: Path) -> None:
    """By the number that scoring the whole response gives."""
    qwen_scorer(tmp_path)
    tokenizer = bpe_tokenizer(400, chat="chatml")
    tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
    engine = Engine(
        small_model(), str(tmp_path), tokenizer=LM, reward_tokenizer=tokenizer, num_pages=200,
        reward_head="label=1,activation=probability,at=steps,step_text=e,step_tag=<extra_0>,"
        "aggregate=mean",
    )  # fmt: skip
    params = StarsParams(
        segment_end="step", step_text="e", min_segment_length=1, segment_length=8, max_tokens=30,
        target_reward=0.6, beta=0.1, max_attempts=3, seed=3, logit_bias={ids_of(LM, "e")[0]: 4.0},
        temperature=1.0,
    )  # fmt: skip
    (output,) = engine.generate(["Is it good?"], params, use_tqdm=False)
    (response,) = output.outputs
    assert output.error is None
    assert response.text.count("e") > 2
    (whole,) = engine.score(["Is it good?"], [response.text])
    assert whole == pytest.approx(response.reward, abs=1e-4)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"at": "tags"}, "at of reward_head must be one of end, steps, got 'tags'"),
        ({"at": "steps", "aggregate": "max"}, "aggregate of reward_head must be one of last, min"),
        ({"aggregate": "min"}, "aggregate of reward_head is for at='steps', got 'min'"),
        ({"step_tag": "x"}, "step_tag of reward_head is for at='steps'"),
        ({"at": "steps", "step_tag": ""}, "step_tag of reward_head must be text, not empty"),
        ({"at": "steps", "step_tag": "{score}{score}"}, "must have {score} once"),
        ({"at": "steps", "step_text": None}, "step_text of reward_head must be text"),
        ({"at": "steps", "aggregate": "prod"}, "pass activation='probability'"),
        ({"after": 3}, "after of reward_head must be text"),
        ({"activation": "probability", "label_weights": {"a": 1}}, "is not of label_weights"),
    ],
)
def test_heads_that_make_no_sense(head: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardHead(**head)


def test_what_has_no_steps_is_refused(tmp_path: Path) -> None:
    steps = RewardHead(at="steps")
    words = encoder_tokenizer()
    with pytest.raises(UnsupportedModelError, match="at='steps' .* needs a causal reward model"):
        load_scorer(
            reward_model("bert", words), lm_tokenizer=LM, reward_tokenizer=words, head=steps
        )
    causal = reward_model("llama", LM)
    with pytest.raises(ValueError, match="what a function writes, nobody knows where the steps"):
        load_scorer(
            causal, lm_tokenizer=LM, reward_tokenizer=LM, head=steps, template=lambda p, r: p + r
        )
    with pytest.raises(ValueError, match="must have a token to read at, got '{score}x'"):
        load_scorer(
            causal, lm_tokenizer=LM, reward_tokenizer=LM,
            head=RewardHead(at="steps", step_tag="{score}x"),
        )  # fmt: skip
    with pytest.raises(ValueError, match="after .* has a special token of the language model"):
        load_scorer(
            causal, lm_tokenizer=LM, reward_tokenizer=LM, head=RewardHead(after="<|im_end|>")
        )
    tokenizer = bpe_tokenizer(400, chat="llama3")
    gated("llama", "LlamaForRewardModelWithGating")(tmp_path, tokenizer)
    with pytest.raises(UnsupportedModelError, match="reads more than the last token"):
        load_scorer(tmp_path, lm_tokenizer=LM, head=steps)
    with pytest.raises(UnsupportedModelError, match="pass reward_head"):
        load_scorer(tmp_path, lm_tokenizer=LM, head=RewardHead(activation="probability"))
