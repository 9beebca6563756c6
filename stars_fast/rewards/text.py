"""The text that a reward model reads: templates around a prompt and its response.

A template turns (prompt, response) into one text. The reward of the prompt alone, r(x), is the same
template with an empty response. Choices:

``"chat"``
    The reward model tokenizer's chat template, with the response as the assistant's last message.
    A prompt that came as messages keeps them; a prompt that came as text or token ids becomes one
    user message; a prompt whose last message is the assistant's has the response appended to that
    message. The template is rendered once per prompt around a stand-in for the response, which
    gives a prefix and a suffix; white space around the response is stripped if the template strips
    it. No tokens are added to those of the template.
``"plain"``
    ``"{prompt}{response}"`` with the prompt as the language model reads it.
a string with ``{prompt}`` and ``{response}``
    Both are put in verbatim; other braces stay as they are. Here the prompt is the content of the
    message if it came as one message, and the text that the language model reads otherwise.
``"pair"``
    Two texts for encoders that were trained on (prompt, response) pairs; the prompt as above.
a callable
    ``f(prompt: str, response: str)``, or ``f(messages)`` with one parameter, which gets the chat
    messages with the response as the last one. It returns the text, or messages for the chat
    template.
``None``
    ``"chat"`` if the reward model's tokenizer has a chat template; else ``"pair"`` for
    encoders and ``"plain"`` for all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from transformers import PreTrainedTokenizerBase

from stars_fast.config import TemplateLike
from stars_fast.rewards.base import Prompt
from stars_fast.text.tokenization import SpecialTokens, escaped

__all__ = ["AnswerTemplate", "CallableTemplate", "ChatTemplate", "FramedPrompt", "Template"]
__all__ += ["FormatTemplate", "PairTemplate", "PlainTemplate", "RenderedPrompt", "make_template"]
__all__ += ["answer", "bare_text", "conversation", "filled", "marked_text"]

Messages: TypeAlias = "list[dict[str, Any]]"
_UNMARKED = SpecialTokens(None)


class RenderedPrompt(Protocol):
    """A template with its prompt filled in."""

    def text(self, response: str) -> str | tuple[str, str]:
        """Return the text or pair of texts to score, marked, see `stars_fast.text.tokenization`."""
        ...


@dataclass(frozen=True)
class FramedPrompt:
    """A prompt whose text stands in one piece before and behind the response.

    Parameters
    ----------
    prefix, suffix : str
        What stands before and behind the response.
    strip_left, strip_right : bool
        Whether white space at that end of the response is dropped.
    special : SpecialTokens
        Those that are text in a response.
    after : str
        Only what follows this text in a response is read, see `RewardHead`; empty: all of it.
    """

    prefix: str
    suffix: str
    strip_left: bool = False
    strip_right: bool = False
    special: SpecialTokens = _UNMARKED
    after: str = ""

    def answer(self, response: str) -> str:
        """Return what of a response is read."""
        return answer(response, self.after)

    def text(self, response: str) -> str:
        """Return prefix + response + suffix."""
        response = self.answer(response)
        if self.strip_left:
            response = response.lstrip()
        if self.strip_right:
            response = response.rstrip()
        return f"{self.prefix}{self.special.marked(response)}{self.suffix}"


@dataclass(frozen=True)
class PairedPrompt:
    """A prompt that is the first text of a pair."""

    prompt: str
    special: SpecialTokens
    after: str = ""

    def text(self, response: str) -> tuple[str, str]:
        """Return (prompt, response)."""
        return self.prompt, self.special.marked(answer(response, self.after))


@dataclass(frozen=True)
class CalledPrompt:
    """A prompt whose text a user's function writes."""

    function: Callable[[str], str]
    after: str = ""

    def text(self, response: str) -> str:
        """Return what the function makes of the response."""
        return self.function(answer(response, self.after))


def answer(response: str, after: str) -> str:
    """Return what follows a text, without white space before it; nothing while it has not come."""
    return response.partition(after)[2].lstrip() if after else response


class Template(Protocol):
    """A way to put prompts into text."""

    add_special_tokens: bool
    """Whether the tokenizer adds the tokens it puts around a text (BOS, EOS, CLS, SEP)."""

    def bind(self, prompt: Prompt) -> RenderedPrompt:
        """Fill in the prompt; ValueError if it does not go into the template."""
        ...


class PlainTemplate:
    """Prompt and response as they are, one after the other."""

    add_special_tokens = True

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special

    def bind(self, prompt: Prompt) -> FramedPrompt:
        """Return the prompt's text with nothing behind the response."""
        text = self._special.marked(prompt.text, control=prompt.control)
        return FramedPrompt(text, "", special=self._special)


class FormatTemplate:
    """A string with ``{prompt}`` and ``{response}``.

    Raises
    ------
    ValueError
        If the string lacks one of them or has ``{response}`` more than once.
    """

    add_special_tokens = True

    def __init__(self, template: str, special: SpecialTokens) -> None:
        if template.count("{response}") != 1 or "{prompt}" not in template:
            raise ValueError(
                "reward_template must be None, 'chat', 'plain', 'pair', a callable, or a string "
                f"with {{prompt}} and one {{response}}, got {template!r}"
            )
        self._before, self._behind = escaped(template).split("{response}")
        self._special = special

    def bind(self, prompt: Prompt) -> FramedPrompt:
        """Return the string with the prompt put in."""
        text = marked_text(prompt, self._special)
        return FramedPrompt(
            self._before.replace("{prompt}", text),
            self._behind.replace("{prompt}", text),
            special=self._special,
        )


class PairTemplate:
    """Prompt and response as two texts of an encoder's pair."""

    add_special_tokens = True

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special

    def bind(self, prompt: Prompt) -> PairedPrompt:
        """Return the prompt as the first text."""
        return PairedPrompt(marked_text(prompt, self._special), self._special)


class ChatTemplate:
    """The chat template of the reward model's tokenizer, read around a stand-in response.

    Raises
    ------
    ValueError
        If the tokenizer has no chat template, or one that does not show the assistant's message
        exactly once.
    """

    add_special_tokens = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> None:
        self._special = special
        if not tokenizer.chat_template:
            raise ValueError(
                "reward_template='chat' needs a chat template, and the reward model's tokenizer "
                "has none: pass 'plain', a string with {prompt} and {response}, or a callable"
            )
        self._tokenizer = tokenizer
        # White space around the stand-in shows whether the template strips its messages.
        question = [{"role": "user", "content": "a"}]
        bare = self._split(question, "", "{}")
        spaced = self._split(question, "", " {} ")
        self._strip_left = bare[0] == spaced[0]
        self._strip_right = bare[1] == spaced[1]

    def bind(self, prompt: Prompt) -> FramedPrompt:
        """Render the prompt's messages around the stand-in."""
        if prompt.messages is None:
            text, opening = marked_text(prompt, self._special), ""
            messages: Messages = [{"role": "user", "content": text}]
        else:
            messages, opening = self._special.marked_in(conversation(prompt))
        prefix, suffix = self._split(messages, opening, "{}")
        # An opening of the assistant's message keeps the white space between it and the response.
        strip_left = self._strip_left and not opening
        return FramedPrompt(prefix, suffix, strip_left, self._strip_right, self._special)

    def render(self, messages: Messages) -> str:
        """Render whole messages; ValueError if the template refuses them."""
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"the reward model's chat template refuses messages of roles {roles}: {error}"
            ) from error

    def _split(self, messages: Messages, opening: str, form: str) -> tuple[str, str]:
        """Return what stands before and behind the response, `form` being put around both."""
        stand_in = _stand_in(messages, opening)
        content = form.format(stand_in)
        text = self.render([*messages, {"role": "assistant", "content": opening + content}])
        if text.count(stand_in) != 1:
            raise ValueError(
                "the reward model's chat template shows the assistant's message "
                f"{text.count(stand_in)} times instead of once: pass reward_template as a string "
                "with {prompt} and {response}, or as a callable"
            )
        prefix, suffix = text.split(stand_in)
        return prefix, suffix


class CallableTemplate:
    """A user's function; text that begins with the BOS token does not get a second one.

    Special tokens in a text that it returns are special; in the messages that it returns they are
    text.

    Parameters
    ----------
    function : callable
        `f(prompt, response)` or `f(messages)`; returns text, or messages for the chat template.
    tokenizer : transformers tokenizer
        The reward model's, whose chat template renders returned messages.

    Raises
    ------
    TypeError
        If the function takes neither one nor two positional arguments.
    """

    add_special_tokens = True

    def __init__(
        self,
        function: Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        special: SpecialTokens,
    ) -> None:
        self._function = function
        self._special = special
        self._takes_messages = _positional_count(function) == 1
        self._chat = ChatTemplate(tokenizer, special) if tokenizer.chat_template else None

    def bind(self, prompt: Prompt) -> CalledPrompt:
        """Return the function with its prompt argument filled in."""
        if self._takes_messages:
            messages, opening = conversation(prompt)

            def of_messages(response: str) -> str:
                reply = {"role": "assistant", "content": opening + response}
                return self._write([*messages, reply])

            return CalledPrompt(of_messages)

        text = bare_text(prompt)
        return CalledPrompt(lambda response: self._write(text, response))

    def _write(self, *arguments: Messages | str) -> str:
        """Call the function; ValueError if it raises or returns neither text nor messages."""
        try:
            returned = self._function(*arguments)
        except Exception as error:
            raise ValueError(f"reward_template raised {type(error).__name__}: {error}") from error
        if isinstance(returned, str):
            return escaped(returned)
        if isinstance(returned, list) and self._chat is not None:
            return self._chat.render(self._special.marked_in(returned))
        raise ValueError(
            f"reward_template returned {type(returned).__name__}; it must return a str, or a list "
            "of messages where the reward model's tokenizer has a chat template"
        )


class AnswerTemplate:
    """A template that gets of a response only what follows a text, such as ``</think>``.

    A prompt that ends with that text has it behind it: of its responses all is read.
    """

    def __init__(self, template: Template, after: str) -> None:
        self.add_special_tokens = template.add_special_tokens
        self._template = template
        self._after = after

    def bind(self, prompt: Prompt) -> RenderedPrompt:
        """Fill in the prompt."""
        rendered = self._template.bind(prompt)
        assert isinstance(rendered, FramedPrompt | PairedPrompt | CalledPrompt)
        ended = prompt.text.rstrip().endswith(self._after)
        return rendered if ended else replace(rendered, after=self._after)


def make_template(
    template: TemplateLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: bool,
    parse_special: bool = False,
) -> Template:
    """Choose the template that `template` names; see the notes of this module.

    Parameters
    ----------
    template : None, str or callable
        As the user gave it.
    tokenizer : transformers tokenizer
        The reward model's.
    pairs : bool
        Whether the reward model can read two texts, as encoders do.
    parse_special : bool
        Whether special tokens written in prompts and responses are parsed as special.

    Raises
    ------
    ValueError
        If the name is unknown or the template does not fit the reward model.
    TypeError
        If `template` is none of the above.
    """
    special = SpecialTokens(tokenizer, parse=parse_special)
    if template is None:
        template = "chat" if tokenizer.chat_template else "pair" if pairs else "plain"
    if callable(template):
        return CallableTemplate(template, tokenizer, special)
    if not isinstance(template, str):
        raise TypeError(
            f"reward_template must be None, a string or a callable, got {type(template).__name__}"
        )
    if template == "chat":
        return ChatTemplate(tokenizer, special)
    if template == "plain":
        return PlainTemplate(special)
    if template == "pair":
        if not pairs:
            raise ValueError(
                "reward_template='pair' is for bidirectional encoders; this reward model is "
                "causal: pass 'chat', 'plain', a string or a callable"
            )
        return PairTemplate(special)
    return FormatTemplate(template, special)


def filled(template: Template, prompt: Prompt) -> RenderedPrompt:
    """Return a template with its prompt filled in; a text that is whole has none around it.

    Special tokens in such a text are special: it is what a template has written.
    """
    return FramedPrompt(escaped(prompt.text), "") if prompt.whole else template.bind(prompt)


def bare_text(prompt: Prompt) -> str:
    """Return the content of a prompt of one message, the text of any other."""
    if prompt.messages is not None and len(prompt.messages) == 1:
        return str(prompt.messages[0]["content"])
    return prompt.text


def marked_text(prompt: Prompt, special: SpecialTokens) -> str:
    """Return `bare_text`, marked."""
    bare = bare_text(prompt)
    return special.marked(bare, control=prompt.control if bare is prompt.text else ())


def conversation(prompt: Prompt) -> tuple[Messages, str]:
    """Return the messages before the response, and the text that opens the response's message."""
    if prompt.messages is None:
        return [{"role": "user", "content": prompt.text}], ""
    if prompt.messages and prompt.messages[-1]["role"] == "assistant":
        return prompt.messages[:-1], prompt.messages[-1]["content"]
    return list(prompt.messages), ""


def _stand_in(messages: Messages, opening: str) -> str:
    """Return a word that occurs in none of the messages."""
    contents = "\n".join([str(message) for message in messages] + [opening])
    number = 0
    while f"STANDIN{number}" in contents:
        number += 1
    return f"STANDIN{number}"


def _positional_count(function: Callable[..., Any]) -> int:
    """Return 1 or 2: how many arguments a template function takes by position."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in positional and parameter.default is inspect.Parameter.empty
    ]
    if len(required) not in (1, 2):
        raise TypeError(
            "reward_template must take (prompt, response) or (messages), got a callable with "
            f"{len(required)} required positional parameters"
        )
    return len(required)
