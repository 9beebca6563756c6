"""Text to ids: what a tokenizer adds by itself, and special tokens that users write.

A special token in the text of a user, of a message or of a response is text: nobody ends a turn by
writing ``<|im_end|>``. Only what a chat template writes, or the operator in a template of rewards,
is a special token. Texts that are to be tokenised say which is which: those written by users are
`marked`, with a character behind the first letter of each special token that is in no text that is
interchanged.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

#: A noncharacter, for use inside of a program (Unicode 23.7). Two of them stand for one in a text.
MARK = "\ufdd0"
_MARKS = re.compile(f"{MARK}({MARK}?)")

_Value = TypeVar("_Value")

#: A text or a pair of texts, marked.
Marked = str | tuple[str, str]


def escaped(text: str) -> str:
    """Return a marked text in which nothing is marked."""
    return text.replace(MARK, MARK + MARK)


def unmarked(text: str) -> str:
    """Return the text that a marked one stands for."""
    return _MARKS.sub(r"\1", text) if MARK in text else text


class SpecialTokens:
    """The special tokens of a tokenizer in texts.

    Parameters
    ----------
    tokenizer
        Of transformers; None knows none.
    parse
        Special tokens in the texts of users are special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, *, parse: bool = False) -> None:
        self.parse = parse
        self._names: frozenset[str] = frozenset()
        if tokenizer is not None:
            added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
            # One of a single letter cannot be marked.
            self._names = frozenset(n for n in {*added, *tokenizer.all_special_tokens} if n[1:])
        # By length and not as one expression: some tokenizers have thousands.
        self._lengths = sorted({len(name) for name in self._names}, reverse=True)
        starts = "".join(sorted(re.escape(name[0]) for name in self._names))
        self._start = re.compile(f"[{starts}]") if starts else None

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield begin and end of each special token that is written in a text."""
        at = 0
        while self._start is not None and (found := self._start.search(text, at)):
            begin = found.start()
            at = begin + 1
            for length in self._lengths:
                if text[begin : begin + length] in self._names:
                    at = begin + length
                    yield begin, at
                    break

    def marked(self, text: str, *, control: Sequence[tuple[int, int]] = ()) -> str:
        """Return a text of a user so that the special tokens in it are text.

        `control`: begin and end of those that are special tokens nevertheless.
        """
        if self.parse:
            return escaped(text)
        parts, at = [], 0
        for begin, end in control:
            parts += [self._marked(text[at:begin]), text[begin:end]]
            at = end
        return "".join([*parts, self._marked(text[at:])])

    def _marked(self, text: str) -> str:
        text = escaped(text)
        # Again, for one may begin within another.
        while found := list(self.find(text)):
            ends = [0, *itertools.chain(*found), len(text)]
            parts = [text[begin:end] for begin, end in itertools.pairwise(ends)]
            text = "".join(p[0] + MARK + p[1:] if n % 2 else p for n, p in enumerate(parts))
        return text

    def unmarked(self, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return what a marked text stands for, and where its special tokens are."""
        plain, spans, at = "", [], 0
        for begin, end in self.find(text):
            plain += unmarked(text[at:begin])
            spans.append((len(plain), len(plain) + end - begin))
            plain += text[begin:end]
            at = end
        return plain + unmarked(text[at:]), tuple(spans)

    def marked_in(self, value: _Value) -> _Value:
        """Return messages, or a part of one, with every text in it marked."""
        changed: object = value
        if isinstance(value, str):
            changed = self.marked(value)
        elif isinstance(value, dict):
            changed = {key: self.marked_in(inner) for key, inner in value.items()}
        elif isinstance(value, list):
            changed = [self.marked_in(inner) for inner in value]
        elif isinstance(value, tuple):
            changed = tuple(self.marked_in(inner) for inner in value)
        return cast("_Value", changed)


class TextEncoder:
    """A tokenizer for marked texts, many at once.

    Text that begins with the BOS token gets no second one where the tokenizer adds its own: prompts
    that a chat template wrote often bring theirs.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    add_special_tokens : bool
        Whether the tokenizer puts its tokens around each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self.add_special_tokens = add_special_tokens
        self.head, self.tail = added_ids(tokenizer) if add_special_tokens else ([], [])
        adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in self.head
        self._bos: str = tokenizer.bos_token if adds_bos else ""

    def single_bos(self, text: str) -> str:
        """Return the text without the BOS that the tokenizer is going to add."""
        return text.removeprefix(self._bos) if self._bos else text

    def fields(self, texts: Sequence[Marked]) -> list[dict[str, list[int]]]:
        """Return ``input_ids`` of each text, never truncated, and what else the tokenizer gives."""
        if not texts:
            return []
        single = [
            self.single_bos(text) if isinstance(text, str) else (self.single_bos(text[0]), text[1])
            for text in texts
        ]
        if not any(map(_is_marked, single)):
            return self._of_batch(single)
        reader = _reader_of(self.tokenizer)
        return [
            reader.fields(text, self.add_special_tokens)
            if _is_marked(text)
            else self._of_batch([text])[0]
            for text in single
        ]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, never truncated."""
        return [fields["input_ids"] for fields in self.fields(texts)]

    def behind(self, text: str) -> list[int]:
        """Return the ids of a text that stands behind another.

        By itself it would begin with a word where the tokenizer puts a space before a text.
        """
        bare = self if not self.add_special_tokens else TextEncoder(self.tokenizer, False)
        if not text:
            return []
        for before in ("a", ".", "1", "A"):  # a small vocabulary may lack some of them
            alone, whole = bare.encode([before, before + text])
            if self.tokenizer.unk_token_id in alone:
                continue  # which both may begin with, and stand for other words
            if alone and whole[: len(alone)] == alone:
                return whole[len(alone) :]
        return bare.encode([text])[0]

    def _of_batch(self, texts: Sequence[Marked]) -> list[dict[str, list[int]]]:
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=self.add_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        names = [name for name in ("input_ids", "token_type_ids") if name in batch]
        return [{name: batch[name][i] for name in names} for i in range(len(texts))]


def _is_marked(text: Marked) -> bool:
    return MARK in text if isinstance(text, str) else any(MARK in part for part in text)


class _MarkedReader:
    """Tokenises marked texts: only the special tokens that are not marked are special."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = SpecialTokens(tokenizer)
        inputs = ("input_ids", "token_type_ids")
        self._names = [n for n in inputs if n in ("input_ids", *tokenizer.model_input_names)]
        self._stand_ins: dict[str, str] = {}
        self._ids: dict[int, int] = {}  # of special tokens, by those of what stands for them
        self._cut_id = -1
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = {*special, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._twin = None if backend is None else _twin_of(backend)
        if self._twin is not None:
            self._add_stand_ins(self._twin)

    def fields(self, text: Marked, add_special_tokens: bool) -> dict[str, list[int]]:
        """Return what the tokenizer gives for a text."""
        parts = (text,) if isinstance(text, str) else text
        if self._twin is None:
            ids = [self._slow_ids(part) for part in parts]
            fields = self._tokenizer.prepare_for_model(
                *ids, add_special_tokens=add_special_tokens, return_attention_mask=False
            )
            return {name: fields[name] for name in self._names if name in fields}
        encoding = self._encoded(self._twin, parts, add_special_tokens, unmarked)
        from_text = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        if any(not added and token in self._special_ids for token, added in from_text):
            # Pieces of a unigram model may be special tokens: they are cut in two.
            encoding = self._encoded(self._twin, parts, add_special_tokens, self._with_cuts)
        # Each look at an attribute of an encoding copies it.
        pairs = zip(encoding.ids, encoding.type_ids, strict=True)
        kept = [(token, kind) for token, kind in pairs if token != self._cut_id]
        found = {
            "input_ids": [self._ids.get(token, token) for token, _ in kept],
            "token_type_ids": [kind for _, kind in kept],
        }
        return {name: found[name] for name in self._names}

    def _encoded(
        self,
        twin: Tokenizer,
        parts: Sequence[str],
        add_special_tokens: bool,
        plain: Callable[[str], str],
    ) -> Encoding:
        first, *pair = (
            "".join(
                self._stand_ins.get(part, part) if special else plain(part)
                for part, special in self._cut(text)
            )
            for text in parts
        )
        return twin.encode(first, pair[0] if pair else None, add_special_tokens=add_special_tokens)

    def _with_cuts(self, text: str) -> str:
        return _MARKS.sub(lambda found: found[1] or self._stand_ins[""], text)

    def _add_stand_ins(self, twin: Tokenizer) -> None:
        from tokenizers import AddedToken

        twin.encode_special_tokens = True  # those that are written are text
        word = secrets.token_hex(8)  # which nobody can write
        cut = f"\ufdd1{word}\ufdd1"  # between two parts of a text
        stand_ins = [AddedToken(cut, normalized=False)]
        names = {"": cut}
        for number, (_, token) in enumerate(added := _added_tokens(twin)):
            if token.special:
                names[token.content] = f"\ufdd1{word}-{number}\ufdd1"
                stand_ins.append(
                    AddedToken(
                        names[token.content],
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=False,
                    )
                )
        twin.add_tokens(stand_ins)  # all at once, as each call costs
        ids = {name: cast("int", twin.token_to_id(stand_in)) for name, stand_in in names.items()}
        self._cut_id = ids[""]
        self._ids = {ids[token.content]: number for number, token in added if token.special}
        self._stand_ins = names

    def _cut(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the parts of a marked text, and whether each is a special token."""
        at = 0
        for begin, end in self._special.find(text):
            yield text[at:begin], False
            yield text[begin:end], True
            at = end
        yield text[at:], False

    def _slow_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part, special in self._cut(text):
            if special:
                ids.append(cast("int", self._tokenizer.convert_tokens_to_ids(part)))
            elif part:
                plain = unmarked(part)
                split = self._tokenizer(plain, add_special_tokens=False, split_special_tokens=True)
                ids += split["input_ids"]
        return ids


_READERS: WeakKeyDictionary[PreTrainedTokenizerBase, _MarkedReader] = WeakKeyDictionary()


def _reader_of(tokenizer: PreTrainedTokenizerBase) -> _MarkedReader:
    if tokenizer not in _READERS:
        _READERS[tokenizer] = _MarkedReader(tokenizer)
    return _READERS[tokenizer]


def _added_tokens(backend: Tokenizer) -> list[tuple[int, Any]]:
    return sorted(backend.get_added_tokens_decoder().items())


def _twin_of(backend: Tokenizer) -> Tokenizer:
    """Return a tokenizer on the same model, whose settings are its own.

    That of transformers is changed by each of its calls, and other threads call it.
    """
    from tokenizers import AddedToken, Tokenizer

    twin = Tokenizer(backend.model)  # shared, not copied
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(backend, name) is not None:
            setattr(twin, name, getattr(backend, name))
    added = _added_tokens(backend)
    for special, group in itertools.groupby(added, key=lambda item: bool(item[1].special)):
        tokens = [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
            )
            for _, token in group
        ]
        (twin.add_special_tokens if special else twin.add_tokens)(tokens)
    if any(twin.token_to_id(token.content) != number for number, token in added):
        twin = copy.deepcopy(backend)
        twin.no_truncation()
        twin.no_padding()
    return twin


def added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and behind a text."""
    for text in ("a", "1", "."):  # a small vocabulary may lack some of them
        bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        full: list[int] = tokenizer(text)["input_ids"]
        for start in range(len(full) if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    return tokenizer("")["input_ids"], []


# How much text a token can stand for


@dataclass(frozen=True)
class TokenBytes:
    """A bound on how much text few tokens can stand for.

    Attributes
    ----------
    most
        Bytes of UTF-8 that one token stands for at most. Infinite where that cannot be told: a
        tokenizer that has no tokens for bytes makes one unknown token of any number of them, or
        none, and a normalizer may take out what it likes.
    silent
        Bytes that give no token.
    strips
        Some tokens take along the white space beside them, however much it is.
    """

    most: float
    silent: bytes = b""
    strips: bool = False

    def count(self, text: str) -> int:
        """Return the bytes of a text that tokens have to stand for."""
        if self.strips:
            text = "".join(text.split())
        return len(text.encode().translate(None, self.silent))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Return what the tokens of a tokenizer can stand for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return TokenBytes(math.inf)
    cuts = _parts_of(backend.pre_tokenizer, "pretokenizers")
    changes = _parts_of(backend.normalizer, "normalizers")
    vocabulary = tokenizer.get_vocab()
    added = [token for _, token in _added_tokens(backend)]
    sizes = [len(token.content.encode()) for token in added]
    own = vocabulary.keys() - {token.content for token in added}
    silent = b""
    if any(cut["type"] == "ByteLevel" for cut in cuts) and type(backend.model).__name__ == "BPE":
        silent = bytes(b for b, letter in enumerate(_byte_letters()) if letter not in vocabulary)
        sizes += map(len, own)
        if silent and changes:
            return TokenBytes(math.inf)  # letters might be changed to some that give no token
    elif getattr(backend.model, "byte_fallback", False) and all(
        f"<0x{byte:02X}>" in vocabulary for byte in range(256)
    ):
        sizes += (len(token.encode()) for token in own)
    else:
        return TokenBytes(math.inf)
    if not all(map(_keeps, cuts)):
        return TokenBytes(math.inf)
    strips = any(token.lstrip or token.rstrip for token in added)
    return TokenBytes(max(sizes) * math.prod(map(_shrinks, changes)), silent, strips)


def _byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies, as GPT-2 has it."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _parts_of(component: Normalizer | PreTokenizer | None, name: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer as they are written in a file."""
    if component is None:
        return []
    try:
        whole = json.loads(component.__getstate__())
    except Exception:  # noqa: BLE001 - one that is written in Python
        return [{"type": "unknown"}]
    return list(whole[name]) if whole["type"] == "Sequence" else [whole]


def _keeps(cut: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer takes out nothing of a text."""
    return cut["type"] in ("ByteLevel", "Metaspace", "Digits") or (
        cut["type"] in ("Split", "Punctuation") and cut["behavior"] != "Removed"
    )


def _shrinks(change: dict[str, Any]) -> float:
    """Return how many bytes may become one in a normalizer."""
    if change["type"] == "Prepend":
        return 1.0
    if change["type"] == "NFC":
        return 9.0  # a letter of three bytes becomes one of one byte, or goes with another two
    if change["type"] == "Replace" and "String" in change["pattern"] and change["content"]:
        return max(1.0, len(change["pattern"]["String"].encode()) / len(change["content"].encode()))
    return math.inf
