"""When ids of one tokenizer may be given to another's model."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tiny_tokenizers import bpe_tokenizer
from tokenizers import AddedToken, normalizers, pre_tokenizers

from stars_fast.rewards.vocabulary import check_vocabulary, same_tokens


def test_same_vocabulary_and_behaviour() -> None:
    tokenizer = bpe_tokenizer()
    assert same_tokens(tokenizer, tokenizer)
    # What is put around a text, and how chats are rendered, is no matter of the vocabulary.
    assert same_tokens(tokenizer, bpe_tokenizer(chat="llama3", adds_bos=False, pad="</s>"))


def test_reward_models_own_padding_token_is_no_difference() -> None:
    own = bpe_tokenizer()
    own.add_special_tokens({"pad_token": "[PAD]"})
    assert same_tokens(bpe_tokenizer(), own)
    assert not same_tokens(own, bpe_tokenizer())  # an id the reward model does not know


def other_size(tokenizer: Any) -> Any:
    return bpe_tokenizer(340)


def lower_case(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def prefix_space(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def single_digits(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return tokenizer


def other_special(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("the", special=True)]})
    return tokenizer


@pytest.mark.parametrize(
    "change", [other_size, lower_case, prefix_space, single_digits, other_special]
)
def test_differences(change: Any) -> None:
    assert not same_tokens(bpe_tokenizer(), change(bpe_tokenizer()))


def test_swapped_ids() -> None:
    class Swapped:
        def __init__(self) -> None:
            self.inner = bpe_tokenizer()

        def get_vocab(self) -> dict[str, int]:
            swap = {100: 101, 101: 100}
            return {token: swap.get(i, i) for token, i in self.inner.get_vocab().items()}

    assert not same_tokens(bpe_tokenizer(), Swapped())  # type: ignore[arg-type]


def test_tokenizer_larger_than_the_model() -> None:
    tokenizer = bpe_tokenizer(400)
    check_vocabulary(tokenizer, 400, pads=True)
    with pytest.raises(ValueError, match=r"400 tokens \(for one, .* is 390\) and the model 390"):
        check_vocabulary(tokenizer, 390, pads=True)


def test_padding_token_beyond_the_model_matters_only_if_fed() -> None:
    tokenizer = bpe_tokenizer(400)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    check_vocabulary(tokenizer, 400, pads=False)
    with pytest.raises(ValueError, match=r"'\[PAD\]' is 400"):
        check_vocabulary(tokenizer, 400, pads=True)
