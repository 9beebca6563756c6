"""The ids that a reward model should read of a prompt and a response."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from stars_fast.rewards import Prompt

# The ids that a job should be scored on, the response's ids and text given.
Reading = Callable[[Prompt, list[int], str], list[int]]


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    return prompt.messages or [{"role": "user", "content": prompt.text}]


def whole_text(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Reading:
    """The template's text, tokenised as a whole: what other programs feed such a model."""

    def reading(prompt: Prompt, _: list[int], response: str) -> list[int]:
        if tokenizer.chat_template:
            answer = {"role": "assistant", "content": response}
            encoded = tokenizer.apply_chat_template([*messages_of(prompt), answer])
        elif template:
            asked = prompt.messages[0]["content"] if prompt.messages else prompt.text
            encoded = tokenizer(template.format(prompt=asked, response=response))
        else:
            encoded = tokenizer(prompt.text + response)
        return encoded["input_ids"]

    return reading


def response_ids(tokenizer: PreTrainedTokenizerBase, template: str | None) -> Reading:
    """The response's own ids between those of the template."""
    text_ids = whole_text(tokenizer, template)

    def reading(prompt: Prompt, response: list[int], _: str) -> list[int]:
        if not tokenizer.chat_template and not template:
            return [*prompt.token_ids, *response]
        # No template merges with the special token, so it marks the place of the response.
        marked = text_ids(prompt, [], "<pad>")
        place = marked.index(tokenizer.pad_token_id)
        return [*marked[:place], *response, *marked[place + 1 :]]

    return reading
