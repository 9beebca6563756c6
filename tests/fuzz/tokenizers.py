"""Tokenizers of every family, trained on the spot and always the same."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any

from helpers.tiny_tokenizers import CHAT_TEMPLATES, SPECIAL, TEXTS, bpe_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

#: Families of language models' tokenizers.
FAMILIES = (
    "byte_level",
    "sentencepiece_first",  # a "▁" before the text
    "sentencepiece_always",  # and behind every special token
    "llama2",  # the "▁" by a normalizer, and no pre-tokenizer
    "word_level",
    "word_piece",
    "sentencepiece_never",  # no "▁" but those of the text
    "unigram",
)

LINES = (
    *TEXTS,
    "El gato se sentó en la alfombra y miró por la ventana: llovía, ¿no?",
    "Der Kessel ist undicht, er klappert, und der Griff brach nach einer Woche ab – schade!",  # noqa: RUF001
    "日本語のテキストもあります。とても良いです！ 中文也可以，谢谢。",  # noqa: RUF001
    "Привет, мир! Это короткий текст; не очень хороший, но ладно.",
    "Emoji: 🙂 🙃 👩‍👩‍👧‍👦 🎉🎉 café naïve — “quotes” … ½",
    "1234 3.14 x = {'a': [1, 2]}  # code END STOP\tthe end.",
)

# Turns without special tokens: the text behind a response is text like any other.
_WORDS = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_TAGS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' + message['content'] | trim + '\n### end\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
CHATS = {**CHAT_TEMPLATES, "words": _WORDS, "tags": _TAGS}

_SPECIAL = (*SPECIAL, "<unk>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BYTE_FALLBACK = frozenset({*FAMILIES[1:4], *FAMILIES[6:]})
_MORE_WITH_BYTES = 100  # tokens, beside the bytes few would be left


def tokenizer(
    family: str,
    size: int,
    *,
    chat: str | None = None,
    adds_bos: bool = True,
    adds_eos: bool = False,
    pad: str | None = "<pad>",
    pairs: bool = False,
    cleans_up: bool = False,
) -> Any:
    """A tokenizer of one of FAMILIES, of about `size` tokens.

    Parameters
    ----------
    chat
        One of CHATS.
    adds_bos, adds_eos
        Put "<s>" before, and "</s>" behind a text.
    pairs
        It can encode two texts, as encoders read them.
    cleans_up
        It takes spaces out before punctuation where it decodes.
    """
    backend = Tokenizer.from_str(_trained(family, size))
    single = " ".join(["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos)
    if single != "$A" or pairs:
        backend.post_processor = processors.TemplateProcessing(
            single=single,
            pair="<s> $A </s> $B:1 </s>:1" if pairs else None,
            special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
        )
    return wrapped(backend, chat=chat, pad=pad, cleans_up=cleans_up)


def wrapped(backend: Tokenizer, *, chat: str | None, pad: str | None, cleans_up: bool) -> Any:
    """The transformers tokenizer around a backend."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        unk_token="<unk>" if backend.token_to_id("<unk>") is not None else None,
        chat_template=CHATS[chat] if chat else None,
        clean_up_tokenization_spaces=cleans_up,
    )


def has_byte_tokens(family: str) -> bool:
    """Whether single bytes of a character may be tokens of their own, written <0x..>."""
    return family in _BYTE_FALLBACK


@cache
def _trained(family: str, size: int) -> str:
    if family == "byte_level":
        backend: str = bpe_tokenizer(size, adds_bos=False).backend_tokenizer.to_str()
        return backend
    if family == "word_level":
        return _train(
            Tokenizer(models.WordLevel(unk_token="<unk>")),
            pre_tokenizers.Whitespace(),
            trainers.WordLevelTrainer(
                vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False
            ),
        ).to_str()
    if family == "word_piece":
        words = _train(
            Tokenizer(models.WordPiece(unk_token="<unk>")),
            pre_tokenizers.BertPreTokenizer(),
            trainers.WordPieceTrainer(
                vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False
            ),
        )
        words.decoder = decoders.WordPiece()
        return words.to_str()
    return _sentencepiece(family, size + _MORE_WITH_BYTES)


def _train(backend: Tokenizer, cuts: Any, trainer: Any) -> Tokenizer:
    backend.pre_tokenizer = cuts
    backend.train_from_iterator(LINES, trainer)
    return backend


def _sentencepiece(family: str, size: int) -> str:
    scheme = family.rpartition("_")[2] if family.startswith("sentencepiece") else "always"
    model: Any = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    kind: Any = trainers.BpeTrainer
    if family == "unigram":
        model, kind = models.Unigram(), partial(trainers.UnigramTrainer, unk_token="<unk>")
    backend = _train(
        Tokenizer(model),
        pre_tokenizers.Metaspace(prepend_scheme=scheme),
        kind(vocab_size=size, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False),
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    fields = json.loads(backend.to_str())
    # The trainer takes the bytes for special tokens, which they are not.
    fields["added_tokens"] = [t for t in fields["added_tokens"] if t["content"] in _SPECIAL]
    if family == "unigram":
        fields["model"]["byte_fallback"] = True
    if family == "llama2":
        fields["pre_tokenizer"] = None
        fields["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
        fields["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        }
    return json.dumps(fields)
