"""Prompts: as users and JSON records write them, and as models read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from stars_fast.images import PromptImages, open_image
from stars_fast.text.chats import CHAT_OPTIONS, ChatLike, chat_of, is_chat, render
from stars_fast.text.decoders import prompt_text
from stars_fast.text.image_prompts import ImageReader
from stars_fast.text.surrogates import check_unicode
from stars_fast.text.tokenization import SpecialTokens, TextEncoder, TokenBytes, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A request's prompt in the three forms that reward models read.

    Parameters
    ----------
    text : str
        The prompt as the language model reads it, its chat template applied.
    token_ids : list[int]
        The same as token ids of the language model.
    messages : list[dict[str, Any]] or None
        The chat messages it was made from; None for a prompt given as text or token ids.
    control : tuple[tuple[int, int], ...]
        Begin and end in `text` of the special tokens of a chat template, or of token ids. All
        others were written by a user, and are text.
    whole : bool
        Its text is all that a reward model reads: no template is put around it.
    images : PromptImages or None
        Its pictures. In `text` one word of the chat template stands for each, in `token_ids` as
        many tokens as it takes; `messages` leave them out.
    """

    text: str
    token_ids: list[int]
    messages: list[dict[str, Any]] | None = None
    control: tuple[tuple[int, int], ...] = ()
    whole: bool = False
    images: PromptImages | None = None


#: One prompt: text, token ids, chat messages ({"role": ..., "content": ...}), or an object with
#: ``messages`` and what their template is told (`stars_fast.text.chats.CHAT_OPTIONS`).
PromptLike: TypeAlias = "str | Sequence[int] | ChatLike"


#: Sequences of integers that are text which nobody has decoded, and no token ids.
_BYTES = (bytes, bytearray, memoryview)


def as_prompt_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """Return the prompts as a list: a single text, id list or chat is a list of one.

    Raises
    ------
    TypeError
        If `prompts` is none of the forms a prompt can have.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, _BYTES):
        raise TypeError(
            "prompts must be text, token ids, chat messages or a list of these, "
            f"got {type(prompts).__name__}"
        )
    if prompts and isinstance(prompts[0], Mapping | Integral):
        several = isinstance(prompts[0], Mapping) and "messages" in prompts[0]
        return list(prompts) if several else [prompts]  # type: ignore[arg-type, list-item]
    return list(prompts)  # type: ignore[arg-type]


class Reader(Protocol):
    """Turns prompts into token ids and checks them, as `PromptReader` does."""

    def read(self, prompt: PromptLike | Prompt, max_tokens: int) -> Prompt:
        """Return the prompt, ready to be continued by `max_tokens` tokens."""
        ...

    def response_ids(self, text: str) -> list[int]:
        """Return the ids of a response's text, which stands behind its prompt."""
        ...


class PromptReader:
    """Turns prompts into token ids and checks them.

    Parameters
    ----------
    tokenizer
        The language model's; None if there is none: then prompts must be token ids.
    vocab_size
        Of the language model.
    max_length
        Its context, in tokens; None if it has no limit.
    template_kwargs
        Variables of the chat template, where a chat does not say otherwise.
    parse_special
        Special tokens that are written in prompts and messages are special. Off, they are text.
    images
        Reads the pictures of messages; None: there must be none. A text says why.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        max_length: int | None,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        parse_special: bool = False,
        images: ImageReader | str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._template_kwargs = template_kwargs or {}
        self._special = SpecialTokens(tokenizer, parse=parse_special)
        self._token_bytes: TokenBytes | None = None  # once it is asked for
        if tokenizer is not None:
            self._encoder = TextEncoder(tokenizer, add_special_tokens=True)
            # A chat template writes its own special tokens.
            self._chat_encoder = TextEncoder(tokenizer, add_special_tokens=False)

    def read(self, prompt: PromptLike | Prompt, max_tokens: int) -> Prompt:
        """Return the prompt with its ids, ready to be continued by `max_tokens` tokens.

        One that was read before is checked only.

        Raises
        ------
        ValueError, TypeError
            If it is empty, malformed, holds ids outside the vocabulary, or does not fit the context
            together with `max_tokens`.
        """
        read = prompt if isinstance(prompt, Prompt) else self._parse(prompt, max_tokens)
        self._check(read.token_ids, max_tokens)
        return read

    def response_ids(self, text: str) -> list[int]:
        """Return the ids of a response's text, which stands behind its prompt.

        Without a tokenizer there are none.
        """
        if self._tokenizer is None:
            return []
        return self._chat_encoder.behind(self._special.marked(text))

    def _parse(self, prompt: PromptLike, max_tokens: int) -> Prompt:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt is empty: give text, or token ids such as [bos_token_id]")
            return self._parse_text(prompt, max_tokens)
        if is_chat(prompt):
            return self._parse_chat(prompt, max_tokens)  # type: ignore[arg-type]
        if not isinstance(prompt, Sequence) or isinstance(prompt, _BYTES):
            raise TypeError(
                f"prompt must be text, token ids or chat messages, got {type(prompt).__name__}"
            )
        if not prompt:
            raise ValueError("prompt is empty: it needs at least one token")
        ids = _checked_ids(prompt)
        self._check_range(ids)  # tokenizers fail on ids of more than 32 bits
        text = self._decode(ids)
        return Prompt(text, ids, None, tuple(self._special.find(text)))

    def _parse_text(self, text: str, max_tokens: int) -> Prompt:
        self._need_tokenizer("a text prompt")
        encoder = self._encoder
        check_unicode(text, "prompt")
        self._check_bytes(text, max_tokens)
        # One that begins with the BOS that the tokenizer adds has it once.
        bos = text[: len(text) - len(encoder.single_bos(text))]
        marked = bos + self._special.marked(text[len(bos) :])
        ids = encoder.encode([marked])[0]
        if encoder.tail and ids[-len(encoder.tail) :] == encoder.tail:
            ids = ids[: -len(encoder.tail)]  # the text goes on
        return Prompt(text, ids, None, self._special.unmarked(marked)[1])

    def _parse_chat(self, prompt: ChatLike, max_tokens: int) -> Prompt:
        chat = chat_of(prompt, images=self._images is not None)
        tokenizer = self._need_tokenizer("a chat prompt")
        check_unicode(chat.messages, "messages")
        check_unicode(chat.template_kwargs, "chat_template_kwargs")
        check_unicode(chat.tools, "tools")
        as_text = replace(
            chat,
            messages=self._special.marked_in(chat.messages),
            template_kwargs=self._special.marked_in(chat.template_kwargs),
            tools=self._special.marked_in(chat.tools),
        )
        reader = self._images if isinstance(self._images, ImageReader) else None
        marked = render(as_text, tokenizer, self._template_kwargs, as_parts=reader is not None)
        text, control = self._special.unmarked(marked)
        self._check_bytes(text, max_tokens)
        images = None
        if chat.images or (reader is not None and reader.mark in marked):
            marked, images = self._place_images(marked, chat.images)
        # The template writes its own special tokens.
        ids = self._chat_encoder.encode([marked])[0]
        return Prompt(text, ids, chat.text_messages, control, images=images)

    def _place_images(self, marked: str, given: Sequence[object]) -> tuple[str, PromptImages]:
        """Return a chat's text with the tokens of its pictures, and these."""
        if not isinstance(self._images, ImageReader):
            raise ValueError(f"messages have images: {self._images}")
        pictures = tuple(open_image(one, f"image {i}") for i, one in enumerate(given))
        marked, groups = self._images.place(marked, pictures)
        return marked, PromptImages(pictures, groups)

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        # Whoever tokenises the text again adds its own leading BOS.
        start = 1 if ids[0] == self._tokenizer.bos_token_id else 0
        return prompt_text(self._tokenizer, ids[start:])

    def _need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer: pass Engine(..., tokenizer=...) or ids")
        return self._tokenizer

    def _check(self, ids: list[int], max_tokens: int) -> None:
        if not ids:
            raise ValueError("prompt is empty: it has no tokens after tokenisation")
        self._check_range(ids)
        if self._max_length is not None and len(ids) + max_tokens > self._max_length:
            raise ValueError(
                f"prompt of {len(ids)} tokens with max_tokens={max_tokens} does not fit the "
                f"model's context of {self._max_length} tokens: shorten the prompt or lower "
                "max_tokens"
            )

    def _check_bytes(self, text: str, max_tokens: int) -> None:
        """Refuse a text that no tokenisation fits, before all of it is tokenised."""
        if self._max_length is None or len(text) <= self._max_length:
            return
        if self._token_bytes is None:
            self._token_bytes = token_bytes(self._need_tokenizer("a text prompt"))
        size = self._token_bytes.count(text)
        fits = max(0, self._max_length - max_tokens) * self._token_bytes.most
        if size > fits:
            raise ValueError(
                f"prompt of {size} bytes with max_tokens={max_tokens} does not fit the model's "
                f"context of {self._max_length} tokens, which hold {fits:.0f} bytes at most: "
                "shorten the prompt or lower max_tokens"
            )

    def _check_range(self, ids: list[int]) -> None:
        place = self._images.place_id if isinstance(self._images, ImageReader) else None
        for position, token in enumerate(ids):
            if not 0 <= token < self._vocab_size and token != place:
                raise ValueError(
                    f"prompt token id {token} at position {position} is out of range: "
                    f"must be in [0, {self._vocab_size})"
                )


def _checked_ids(prompt: Sequence[Any]) -> list[int]:
    for position, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(
                f"prompt token id at position {position} must be an integer, got {token!r}"
            )
    return [int(token) for token in prompt]


# In JSON records

PromptValue: TypeAlias = "str | list[int] | list[dict[str, Any]] | dict[str, Any]"

#: A record has one of these.
PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")


def text_of(raw: bytes, *, first: bool) -> str:
    """Decode a line of a file, or all of it; white space around it is left out.

    Parameters
    ----------
    raw
        UTF-8.
    first
        It begins its file: a byte-order mark is no part of it.

    Raises
    ------
    ValueError
        It is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from None


def json_of(text: str) -> object:
    """Read JSON.

    Raises
    ------
    ValueError
        It is not JSON, or holds what is not text.
    """
    try:
        value: object = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    try:
        check_unicode(value)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return value


def prompt_of(record: Mapping[str, object]) -> PromptValue:
    """Read the prompt of a record, which has one of `PROMPT_KEYS`.

    Beside ``messages`` it may have some of `CHAT_OPTIONS`: the prompt is then an object with both.

    Raises
    ------
    ValueError
        It has none or several of the keys, or the value is of the wrong kind.
    """
    given = [key for key in PROMPT_KEYS if key in record]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ValueError(f"expected one of {', '.join(PROMPT_KEYS)}, got {found}")
    prompt = _READERS[given[0]](record[given[0]])
    options = {key: record[key] for key in CHAT_OPTIONS if record.get(key) is not None}
    if not options:
        return prompt
    if given != ["messages"]:
        raise ValueError(f"{next(iter(options))} needs messages, got {given[0]}")
    chat = {"messages": prompt, **options}
    chat_of(chat, images=True)
    return chat


def short(value: object) -> str:
    """Show a JSON value in at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: object) -> PromptValue:
    if not isinstance(value, str) or not value:
        raise ValueError(f"prompt must be text that is not empty, got {short(value)}")
    return value


def _messages(value: object) -> PromptValue:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list that is not empty, got {short(value)}")
    chat_of(value, images=True)
    return value


def _token_ids(value: object) -> PromptValue:
    if not isinstance(value, list) or not value:
        raise ValueError(f"prompt_token_ids must be a list that is not empty, got {short(value)}")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ValueError(f"prompt_token_ids must be integers of at least 0, got {short(token)}")
    return value


_READERS = {"prompt": _text, "messages": _messages, "prompt_token_ids": _token_ids}
