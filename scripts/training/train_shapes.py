r"""TITA on pictures of shapes: a careless model, and a small one that prefers right captions.

    python scripts/training/train_shapes.py --out DIR

Three models from scratch, of LLaVA's class: ``DIR/lm`` learns captions some of which are wrong, so
it makes mistakes; ``DIR/reference``, a smaller one, learns the same; ``DIR/guide`` starts from that
and learns by DPO (arXiv 2305.18290) which of two captions a judge prefers. The log-ratio of these
two is the reward of TITA (arXiv 2510.21794): of tokens with a guide, of segments with STARS.

    stars-fast eval --model DIR/lm --guide DIR/guide --guide-reference DIR/reference \
        --log-ratio DIR/guide,DIR/reference ...

The judge prefers the caption with the higher `shapes.score` with probability sigmoid(sharpness d).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_demo_models import epochs, fit
from settings_flags import parser_of, settings_of
from shapes import COLOURS, QUESTION, SHAPES, SIDE, Scene, caption, careless, scene, score
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

_PATCH = 8
_PLACES = (SIDE // _PATCH) ** 2
_IMAGE, _END, _PAD = "<image>", "</s>", "<pad>"
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} :"
)


@dataclass(frozen=True)
class ShapeSettings:
    """What is trained.

    Attributes
    ----------
    seed
        Of the pictures, the mistakes, the judge and the weights.
    pictures, pairs
        Captions learned from, and pairs preferred.
    mistakes
        Rate at which an object is named wrongly.
    hidden, layers, small_hidden, small_layers
        Of the language model, and of guide and reference.
    batch_size, rate, epochs
        Captions a step, peak learning rate, passes.
    dpo_rate, beta
        Of DPO.
    sharpness
        Of the judge.
    """

    seed: int = 0
    pictures: int = 24_000
    pairs: int = 8_000
    mistakes: float = 0.25
    hidden: int = 96
    layers: int = 3
    small_hidden: int = 64
    small_layers: int = 2
    batch_size: int = 48
    rate: float = 2e-3
    epochs: int = 3
    dpo_rate: float = 3e-4
    beta: float = 0.3
    sharpness: float = 5.0


def tokenizer() -> PreTrainedTokenizerFast:
    """Words."""
    words = [_PAD, _END, _IMAGE, *COLOURS, *SHAPES, "a", ",", ".", ":", *QUESTION.split()]
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token=_PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token=_PAD, eos_token=_END, unk_token=_PAD
    )
    made.add_tokens([_IMAGE], special_tokens=True)
    made.chat_template = _TEMPLATE
    return made


def processor() -> LlavaProcessor:
    """What reads pictures and chats."""
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False, do_convert_rgb=True)
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def model(hidden: int, layers: int) -> LlavaForConditionalGeneration:
    """A new model."""
    heads = hidden // 16
    words = tokenizer()
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**shape, image_size=SIDE, patch_size=_PATCH),
            text_config=LlamaConfig(
                **shape,
                num_key_value_heads=heads,
                vocab_size=len(words),
                max_position_embeddings=128,
                eos_token_id=words.eos_token_id,
                bos_token_id=None,
                pad_token_id=words.pad_token_id,
            ),
            image_token_id=words.convert_tokens_to_ids(_IMAGE),
            vision_feature_layer=-1,
        )
    )


class Reader:
    """Batches of pictures with captions, as the model reads them."""

    def __init__(self) -> None:
        self._processor = processor()
        words = self._processor.tokenizer
        self.pad = int(words.pad_token_id)
        ids = words(f"{_IMAGE} " * _PLACES + f"{QUESTION} :")["input_ids"]
        self.prompt = list(ids)
        self._words = words

    def pixels(self, scenes: Sequence[Scene]) -> Tensor:
        """Pictures float32 ``[N, 3, side, side]``."""
        pictures = [one.picture() for one in scenes]
        read = self._processor.image_processor(pictures, return_tensors="pt")
        found: Tensor = read["pixel_values"]
        return found

    def response(self, text: str) -> list[int]:
        """A caption's ids and the end."""
        return [*self._words(text)["input_ids"], int(self._words.eos_token_id)]

    def log_probs(
        self, of: LlavaForConditionalGeneration, pixels: Tensor, responses: Sequence[list[int]]
    ) -> Tensor:
        """Log-probability of each response to its picture, ``[N]``."""
        width = max(map(len, responses))
        rows = [self.prompt + ids + [self.pad] * (width - len(ids)) for ids in responses]
        ids = torch.tensor(rows)
        # Right padding: no real token sees it.
        logits = of(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        wanted = ids[:, len(self.prompt) :]
        losses = cross_entropy(
            logits[:, len(self.prompt) - 1 : -1].transpose(1, 2),
            wanted,
            ignore_index=self.pad,
            reduction="none",
        )
        return -losses.sum(1)


def learn_captions(
    settings: ShapeSettings, hidden: int, layers: int, name: str
) -> LlavaForConditionalGeneration:
    """Train a model on careless captions."""
    draw = random.Random(f"captions {settings.seed}")
    reader = Reader()
    scenes = [scene(draw) for _ in range(settings.pictures)]
    texts = [caption(careless(one.things, draw, settings.mistakes)) for one in scenes]
    responses = [reader.response(text) for text in texts]
    torch.manual_seed(settings.seed)
    made = model(hidden, layers)

    def loss_of(group: list[int]) -> Tensor:
        pixels = reader.pixels([scenes[i] for i in group])
        part = [responses[i] for i in group]
        return -reader.log_probs(made, pixels, part).sum() / sum(map(len, part))

    rng = np.random.default_rng(settings.seed)
    groups = epochs([len(ids) for ids in responses], settings.epochs, settings.batch_size, rng)
    fit(made, groups, loss_of, settings.rate, name)
    return made.eval()


def prefer(
    settings: ShapeSettings, reference: LlavaForConditionalGeneration
) -> LlavaForConditionalGeneration:
    """Train a copy of a model by DPO on pairs of captions."""
    draw = random.Random(f"pairs {settings.seed}")
    reader = Reader()
    scenes, chosen, rejected = [], [], []
    while len(scenes) < settings.pairs:
        one = scene(draw)
        texts = [caption(careless(one.things, draw, 0.5)) for _ in range(2)]
        gain = score(texts[0], one.things) - score(texts[1], one.things)
        if texts[0] == texts[1]:
            continue
        if draw.random() > 1.0 / (1.0 + math.exp(-settings.sharpness * gain)):
            texts.reverse()
        scenes.append(one)
        chosen.append(reader.response(texts[0]))
        rejected.append(reader.response(texts[1]))
    made = model(settings.small_hidden, settings.small_layers)
    made.load_state_dict(reference.state_dict())

    def gains(of: LlavaForConditionalGeneration, pixels: Tensor, group: list[int]) -> Tensor:
        both = [[chosen[i] for i in group], [rejected[i] for i in group]]
        first, second = (reader.log_probs(of, pixels, part) for part in both)
        return first - second

    def loss_of(group: list[int]) -> Tensor:
        pixels = reader.pixels([scenes[i] for i in group])
        with torch.no_grad():
            before = gains(reference, pixels, group)
        return -logsigmoid(settings.beta * (gains(made, pixels, group) - before)).mean()

    rng = np.random.default_rng(settings.seed)
    groups = epochs([len(ids) for ids in chosen], 1, settings.batch_size // 2, rng)
    fit(made, groups, loss_of, settings.dpo_rate, "preferences")
    return made.eval()


def train(settings: ShapeSettings, out: Path) -> None:
    """Train and write all three models."""
    reference = learn_captions(settings, settings.small_hidden, settings.small_layers, "reference")
    made: dict[str, Any] = {
        "lm": learn_captions(settings, settings.hidden, settings.layers, "language model"),
        "reference": reference,
        "guide": prefer(settings, reference),
    }
    for name, one in made.items():
        one.save_pretrained(out / name)
        processor().save_pretrained(out / name)


def main() -> None:
    """Command line."""
    arguments = parser_of(__doc__, ShapeSettings).parse_args()
    start = time.perf_counter()
    train(settings_of(ShapeSettings, arguments), arguments.out)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
