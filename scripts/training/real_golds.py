"""Gold scores of real responses that share no list of words: rated words, and a model that reads.

    stars-fast eval ... --gold vader=real_golds:vader --gold reader=real_golds:reader

In this folder, where `real_golds` is found.
`vader` is the compound score of VADER (Hutto and Gilbert, ICWSM 2014), in [-1, 1], from the package
vaderSentiment. `reader` asks another language model, the directory in ``REAL_GOLD_READER``, after
three examples, and is log p(" good") - log p(" bad") of the next word. Neither looks at the prompt.
"""

from __future__ import annotations

import os
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

#: The word that each example ends with is what is asked of the text.
EXAMPLES = (
    "Text: We waited for an hour and nobody cared. I want my money back.\nOpinion: bad\n\n"
    "Text: It does all I hoped for, and my kids adore it.\nOpinion: good\n\n"
    "Text: Half of it was broken when it came, and they never answered.\nOpinion: bad\n\n"
)
_BATCH = 16  # texts a forward pass


def vader(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound score of each response; 0 of an empty one."""
    return [float(_analyzer()(response)["compound"]) for response in responses]


@torch.no_grad()
def reader(prompts: list[str], responses: list[str]) -> list[float]:
    """How much more likely the reader finds " good" than " bad", in nats.

    Raises
    ------
    KeyError
        Without ``REAL_GOLD_READER`` in the environment.
    """
    model, tokenizer, examples = _reader(os.environ["REAL_GOLD_READER"])
    good, bad = (tokenizer.encode(word, add_special_tokens=False)[0] for word in (" good", " bad"))
    texts = [f"Text: {' '.join(text.split())}\nOpinion:" for text in responses]
    rows = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = [0.0] * len(rows)
    for start in range(0, len(rows), _BATCH):
        group = order[start : start + _BATCH]
        ends = torch.tensor([len(rows[i]) - 1 for i in group])
        width = int(ends.max()) + 1
        # Right padding: no real token sees it.
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in group])
        cache = deepcopy(examples)
        cache.batch_repeat_interleave(len(group))
        hidden = model.base_model(input_ids=ids, past_key_values=cache).last_hidden_state
        logits = model.get_output_embeddings()(hidden[torch.arange(len(group)), ends])
        for i, value in zip(group, (logits[:, good] - logits[:, bad]).tolist(), strict=True):
            scores[i] = value
    return scores


@cache
def _analyzer() -> Callable[[str], dict[str, float]]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    scores: Callable[[str], dict[str, float]] = SentimentIntensityAnalyzer().polarity_scores
    return scores


@cache
@torch.no_grad()
def _reader(directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, DynamicCache]:
    """The model, its tokenizer, and keys and values of the examples, which run once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    examples = DynamicCache(config=model.config)
    model.base_model(**tokenizer(EXAMPLES, return_tensors="pt"), past_key_values=examples)
    return model, tokenizer, examples
