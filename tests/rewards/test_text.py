"""Templates: the text that a reward model reads."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tiny_tokenizers import CHAT_TEMPLATES, bpe_tokenizer, encoder_tokenizer

from stars_fast.rewards import Prompt
from stars_fast.rewards.text import make_template
from stars_fast.text.tokenization import unmarked

USER = {"role": "user", "content": "Is rice good?"}
TEXT_PROMPT = Prompt("Is rice good?", [1, 2], None)
CHAT_PROMPT = Prompt("<lm>Is rice good?</lm>", [1, 2], [USER])
LONG_CHAT = Prompt(
    "<lm>...</lm>", [1], [USER, {"role": "assistant", "content": "Yes."}, {**USER, "content": "?"}]
)
RESPONSES = ("", "Yes", " Yes, and  cheap \n", "<pad>")


def text(template: Any, prompt: Prompt, response: str, chat: str | None = None) -> Any:
    tokenizer = bpe_tokenizer(chat=chat)
    return make_template(template, tokenizer, pairs=False).bind(prompt).text(response)


@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
@pytest.mark.parametrize("prompt", [TEXT_PROMPT, CHAT_PROMPT, LONG_CHAT])
@pytest.mark.parametrize("response", RESPONSES)
def test_chat_equals_the_tokenizers_own_rendering(chat: str, prompt: Prompt, response: str) -> None:
    messages = [*(prompt.messages or [USER]), {"role": "assistant", "content": response}]
    want = bpe_tokenizer(chat=chat).apply_chat_template(messages, tokenize=False)
    assert unmarked(text("chat", prompt, response, chat)) == want
    assert unmarked(text(None, prompt, response, chat)) == want


@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
def test_prompt_that_opens_the_answer(chat: str) -> None:
    opened = Prompt("", [1], [USER, {"role": "assistant", "content": "It is"}])
    want = bpe_tokenizer(chat=chat).apply_chat_template(
        [USER, {"role": "assistant", "content": "It is  good"}], tokenize=False
    )
    assert text("chat", opened, "  good", chat) == want


def test_prompt_that_holds_the_stand_in() -> None:
    prompt = Prompt("", [1], [{"role": "user", "content": "STANDIN0 or STANDIN1?"}])
    got = text("chat", prompt, "neither", "chatml")
    assert got == (
        "<|im_start|>user\nSTANDIN0 or STANDIN1?<|im_end|>\n"
        "<|im_start|>assistant\nneither<|im_end|>\n"
    )


def test_plain_is_the_language_models_text() -> None:
    assert text("plain", CHAT_PROMPT, "Yes") == "<lm>Is rice good?</lm>Yes"
    assert text(None, CHAT_PROMPT, "Yes") == "<lm>Is rice good?</lm>Yes"


def test_string_with_fields() -> None:
    template = '{"q": {prompt}} ###Assistant: {response} {end}'
    want = '{"q": Is rice good?} ###Assistant: {prompt} {response} {end}'
    assert text(template, TEXT_PROMPT, "{prompt} {response}") == want
    assert text(template, CHAT_PROMPT, "{prompt} {response}") == want
    several = text("{prompt}|{response}", LONG_CHAT, "Yes")
    assert several == "<lm>...</lm>|Yes"
    braces = Prompt("a {response} b", [1], None)
    assert text("{prompt}|{response}", braces, "Yes") == "a {response} b|Yes"


def test_callables() -> None:
    assert text(lambda p, r: f"Q: {p} A: {r}", CHAT_PROMPT, "Yes") == "Q: Is rice good? A: Yes"
    assert text(repr, CHAT_PROMPT, "Yes") == repr([USER, {"role": "assistant", "content": "Yes"}])
    terse = {"role": "system", "content": "Be terse."}
    want = bpe_tokenizer(chat="chatml").apply_chat_template(
        [terse, USER, {"role": "assistant", "content": "Yes"}], tokenize=False
    )
    assert text(lambda messages: [terse, *messages], CHAT_PROMPT, "Yes", "chatml") == want

    def with_default(p: str, r: str, sep: str = " ") -> str:
        return p + sep + r

    assert text(with_default, TEXT_PROMPT, "Yes") == "Is rice good? Yes"


def test_callable_that_returns_something_else() -> None:
    with pytest.raises(ValueError, match="returned int"):
        text(lambda p, r: 3, TEXT_PROMPT, "Yes")
    with pytest.raises(ValueError, match="returned list"):
        text(lambda messages: messages, TEXT_PROMPT, "Yes")  # no chat template to render it


def test_encoders_read_pairs() -> None:
    bound = make_template(None, encoder_tokenizer(), pairs=True).bind(CHAT_PROMPT)
    assert bound.text("Yes") == ("Is rice good?", "Yes")


@pytest.mark.parametrize(
    "template", ["chatty", "{prompt}", "{response}", "{prompt}{response}{response}"]
)
def test_unusable_strings(template: str) -> None:
    with pytest.raises(ValueError, match="reward_template must be None, 'chat'"):
        text(template, TEXT_PROMPT, "")


def test_unusable_templates() -> None:
    with pytest.raises(ValueError, match="has none: pass 'plain'"):
        text("chat", TEXT_PROMPT, "")
    with pytest.raises(ValueError, match="'pair' is for bidirectional encoders"):
        text("pair", TEXT_PROMPT, "")
    with pytest.raises(TypeError, match="got int"):
        text(3, TEXT_PROMPT, "")
    with pytest.raises(TypeError, match="0 required positional"):
        text(lambda: "", TEXT_PROMPT, "")
    with pytest.raises(TypeError, match="3 required positional"):
        text(lambda a, b, c: "", TEXT_PROMPT, "")


def test_chat_template_that_refuses_the_messages() -> None:
    prompt = Prompt("", [1], [{"role": "system", "content": "Be brief."}, USER])
    with pytest.raises(ValueError, match=r"roles system, user, assistant: System role not supp"):
        text("chat", prompt, "", "gemma")


def test_chat_template_that_hides_or_repeats_the_answer() -> None:
    for body, count in (("", "0 times"), ("{{ m.content }}{{ m.content }}", "2 times")):
        tokenizer = bpe_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}" + body + "{% endfor %}"
        with pytest.raises(ValueError, match=f"shows the assistant's message {count}"):
            make_template("chat", tokenizer, pairs=False)
