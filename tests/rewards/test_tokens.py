"""Ids of jobs: special tokens, BOS, and the part of a text that need not be tokenised again."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz.tokenizers import ALL_FAMILIES, tokenizer
from helpers.tiny_tokenizers import CHAT_TEMPLATES, TEXTS, bpe_tokenizer
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from stars_fast.rewards import Prompt, ScoreJob
from stars_fast.rewards.split_ids import NO_IDS, common_length
from stars_fast.rewards.text import make_template
from stars_fast.rewards.tokens import Encoded, RetokenizedText, SharedTokens, behind_committed
from stars_fast.text.tokenization import TextEncoder

PROMPT = Prompt("What is rice?", bpe_tokenizer()("What is rice?")["input_ids"], None)


def job(ids: list[int], text: str) -> ScoreJob:
    return ScoreJob(0, 0, ids, text)


def test_common_length() -> None:
    ids = np.arange(5)
    assert common_length(ids, np.arange(3)) == 3
    assert common_length(ids, np.array([0, 1, 9, 3])) == 2
    assert common_length(ids, np.array([], dtype=np.int64)) == 0


def test_text_with_bos_gets_no_second_one() -> None:
    tokenizer = bpe_tokenizer()
    encoder = TextEncoder(tokenizer, add_special_tokens=True)
    bare, with_bos = encoder.encode(["It costs", "<s>It costs"])
    assert bare == with_bos == tokenizer("It costs")["input_ids"]
    without = TextEncoder(tokenizer, add_special_tokens=False)
    assert without.encode(["<s>It costs"])[0] == bare


def test_tokenizer_that_adds_eos() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    source = SharedTokens(
        tokenizer, make_template("{prompt}|{response}", tokenizer, pairs=False), 400
    )
    bound = source.bind(PROMPT)
    assert bound.tail == 1
    (text,) = source.encode([bound], [job([50, 51], "")], [NO_IDS])
    assert isinstance(text, Encoded)
    before = tokenizer("What is rice?|")["input_ids"]
    assert text.ids.tolist() == [*before[:-1], 50, 51, 1]


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("behind", ["\n###", " ### end", "</s>\n", "|", ".", "\n\nQ: what?", ""])
def test_ids_are_those_of_the_template_s_text(family: str, behind: str) -> None:
    """Nothing comes between the response and what the template puts behind it."""
    tok = tokenizer(family, 520)
    template = "Q: {prompt}\nA:{response}" + behind
    source = SharedTokens(tok, make_template(template, tok, pairs=False), len(tok))
    before = tok("Q: What is rice?\nA:")["input_ids"]
    for text in (" The film", " It is bad"):
        whole = tok(f"Q: What is rice?\nA:{text}{behind}")["input_ids"]
        response = tok(f"Q: What is rice?\nA:{text}")["input_ids"][len(before) :]
        (encoded,) = source.encode([source.bind(PROMPT)], [job(response, "")], [NO_IDS])
        assert isinstance(encoded, Encoded)
        assert encoded.ids.tolist() == whole


@pytest.mark.parametrize("chat", [*CHAT_TEMPLATES, "words"])
@pytest.mark.parametrize("messages", [1, 3])
def test_only_the_text_behind_the_last_special_token_is_tokenised(chat: str, messages: int) -> None:
    tokenizer = bpe_tokenizer(400, chat=chat if chat in CHAT_TEMPLATES else None)
    if chat == "words":  # ordinary text before the response, with which it may merge
        tokenizer.chat_template = (
            "{% for m in messages %}<s>The cam{{ m['content'] }}</s>{% endfor %}"
        )
    question = {"role": "user", "content": TEXTS[0]}
    answer = {"role": "assistant", "content": TEXTS[1]}
    conversation = [question, answer, question][:messages]
    source = RetokenizedText(tokenizer, make_template("chat", tokenizer, pairs=False))
    bound = source.bind(Prompt("", [1], conversation))
    seen = []
    tokenize = source._encoder.encode

    def recorded(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return tokenize(texts)

    source._encoder.encode = recorded  # type: ignore[method-assign, assignment]
    responses = ["", "a", "era", "\n\nYes", " <|im_end no", "naïve 日本 🙂", *TEXTS]
    jobs = [job([9], text) for text in responses]
    encoded = source.encode([bound] * len(jobs), jobs, [NO_IDS] * len(jobs))
    for response, text in zip(responses, encoded, strict=True):
        whole = tokenizer.apply_chat_template([*conversation, {**answer, "content": response}])
        assert isinstance(text, Encoded)
        assert text.ids.tolist() == whole["input_ids"]
    assert all(
        len(text) < len(response) + 40 for text, response in zip(seen, responses, strict=True)
    )


def test_template_function_that_raises_fails_its_job_alone() -> None:
    tokenizer = bpe_tokenizer(340)

    def template(prompt: str, response: str) -> str:
        if "no" in response:
            raise KeyError("no")
        return prompt + response

    source = RetokenizedText(tokenizer, make_template(template, tokenizer, pairs=False))
    bound = source.bind(PROMPT)
    good, bad = source.encode([bound] * 2, [job([9], "yes"), job([9], "no")], [NO_IDS] * 2)
    assert isinstance(bad, ValueError)
    assert "reward_template raised KeyError: 'no'" in str(bad)
    assert isinstance(good, Encoded)
    assert good.ids.tolist() == tokenizer("What is rice?yes")["input_ids"]


def test_small_vocabularies() -> None:
    # No "a" in it, and unknown letters give nothing.
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, ".": 2, "x": 3}, []))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), True)
    assert (encoder.head, encoder.tail) == ([0], [1])
    assert encoder.encode(["x"])[0] == [0, 3, 1]


def test_what_is_committed_is_told_apart() -> None:
    prompt, begun = np.arange(4), np.array([7, 8])
    whole = [*prompt, *begun, 9]
    split = ScoreJob(0, 0, np.array([9]), "", begun)
    for committed in (whole[:6], whole[:5], whole[:4], whole[:3], []):
        ids = np.array(committed, np.int64)
        shared, rest = behind_committed(prompt, split, ids)
        assert shared is ids
        assert [*shared, *rest] == whole
    # Where a job does not say so, or has nothing new, it is seen by nobody.
    for job_of, committed in (
        (ScoreJob(0, 0, [7, 8, 9], ""), whole[:6]),
        (ScoreJob(0, 0, [], "", np.array([7, 8, 9])), whole),
    ):
        shared, rest = behind_committed(prompt, job_of, np.array(committed))
        assert not len(shared)
        assert rest.tolist() == whole
