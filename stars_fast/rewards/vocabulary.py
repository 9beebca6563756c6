"""Whether two tokenizers speak of the same tokens, and whether a model knows them.

The usual failure of reward-guided decoding is an IndexError deep in a model, because ids of one
tokenizer were given to a model of another. Both questions are settled here, before anything runs.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

__all__ = ["check_vocabulary", "same_tokens"]

# Where tokenizers with one vocabulary still differ: white space, digits, case, accents, scripts,
# bytes outside the vocabulary.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading, trailing and  double spaces ",
    "line\nbreaks\n\nand\ttabs\r\n",
    "12345 3.14159 1,000,000 0x1F",
    "don't WON'T I'll you're",
    "CamelCase snake_case kebab-case",
    "def f(x):\n    return {'a': [x, x**2]}  # code",
    "naïve café — “quotes” … ﬁ ½ e\u0301",
    "日本語 中文 한국어 Русский العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦 \u200b\ufeff\x00\x7f",
    "###Human: hi ###Assistant:",
    "",
)


def same_tokens(language: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether ids of the language model's tokenizer mean the same to the reward model's.

    True if every token of `language` has the same id in `reward` (which may have more, such as a
    padding token of its own), and both encode and decode a set of probe texts alike. Whether each
    adds BOS or EOS does not matter here.

    Parameters
    ----------
    language, reward : transformers tokenizer
    """
    if language is reward:
        return True
    ids, known = language.get_vocab(), reward.get_vocab()
    if any(known.get(token) != i for token, i in ids.items()):
        return False
    return all(_encode(language, text) == _encode(reward, text) for text in PROBES) and all(
        language.decode(_encode(language, text)) == reward.decode(_encode(reward, text))
        for text in PROBES
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, *, pads: bool) -> None:
    """Refuse a tokenizer that can give ids the model has no embedding for.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        The reward model's.
    rows : int
        Rows of the reward model's input embedding.
    pads : bool
        Whether the padding token is ever fed; if not, its id does not matter.

    Raises
    ------
    ValueError
        Naming both sizes and a token that is out of range.
    """
    unused: set[int | None] = set() if pads else {tokenizer.pad_token_id}
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    beyond = {token: i for token, i in beyond.items() if i not in unused}
    if beyond:
        token, i = min(beyond.items(), key=lambda item: item[1])
        raise ValueError(
            f"the reward model's tokenizer does not fit it: the tokenizer has {len(tokenizer)} "
            f"tokens (for one, {token!r} is {i}) and the model {rows} embeddings; pass the "
            "tokenizer that the reward model was trained with"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
