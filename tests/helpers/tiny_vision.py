"""Small random models that see images, of the real classes, with processors and pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor

from stars_fast.models.processor import images_only

#: What the chat template writes for an image, by model type; the processor makes its tokens of it.
MARKS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<ctx>",
    "gemma3": "<start>",
    "smolvlm": "<image>",
    "idefics3": "<image>",
}
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ ' ' + part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %} w9 w8"
)
_SIDE = 16  # pixels of an image or a tile, in patches of 4
_SIZE = {"height": _SIDE, "width": _SIDE}
_GRID = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
_WORDS = 200


def picture(width: int, height: int, colour: tuple[int, int, int], dots: int) -> Image.Image:
    """Return a picture of coloured dots."""
    drawn = Image.new("RGB", (width, height), colour)
    pen = ImageDraw.Draw(drawn)
    for n in range(dots):
        pen.ellipse((5 * n, 3 * n, 5 * n + 8, 3 * n + 8), fill=(40 * n % 256, 90 * n % 256, 200))
    return drawn


#: Upright, wide, and of the size that models read.
PICTURES = (
    picture(20, 30, (200, 10, 10), 2),
    picture(40, 16, (0, 10, 200), 3),
    picture(_SIDE, _SIDE, (20, 200, 10), 1),
)


@dataclass
class Given:
    """What is given as an image, though it may be a text."""

    value: object


def chat(*parts: object) -> list[dict[str, Any]]:
    """Return a message of texts and images."""
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "image"
        content.append({"type": kind, kind: part.value if isinstance(part, Given) else part})
    return [{"role": "user", "content": content}]


def model_inputs(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """Return what a model's own forward takes of a chat."""
    parts = messages[0]["content"]
    pictures = [part["image"] for part in parts if part["type"] == "image"]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    return processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt")


def logits_of(model: Any, processor: Any, messages: list[dict[str, Any]], new: list[int]) -> Tensor:
    """Return the logits ``[len(new), vocab]`` behind which each of these tokens stands."""
    given = model_inputs(processor, messages)
    width = given["input_ids"].shape
    for name, value in given.items():
        if value.shape == width:
            more = {"input_ids": new, "attention_mask": [1] * len(new)}.get(name, [0] * len(new))
            given[name] = torch.cat((value, torch.tensor([more])), dim=1)
    with torch.inference_mode():
        logits: Tensor = model(**given).logits[0, width[1] - 1 : -1]
    return logits


def other_weights(model: Any) -> Any:
    """Return a copy of a model with weights a little off."""
    torch.manual_seed(1)
    made = copy.deepcopy(model)
    for weight in made.parameters():
        weight.data += 0.1 * weight.data.std() * torch.randn_like(weight) if weight.ndim > 1 else 0
    return made


def greedy(
    model: Any, processor: Any, messages: list[dict[str, Any]], tokens: int
) -> tuple[list[int], list[int], Tensor]:
    """Return the prompt's ids, what `generate` continues them with, and their log-probabilities."""
    given = model_inputs(processor, messages)
    made = model.generate(
        **given,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    prompt = given["input_ids"][0].tolist()
    new = made.sequences[0, len(prompt) :]
    logprobs = torch.stack(made.logits)[:, 0].log_softmax(-1).gather(1, new[:, None])[:, 0]
    return prompt, new.tolist(), logprobs


def tiny_vision(kind: str, **text: Any) -> tuple[Any, Any]:
    """Return a model of a type and its processor; `text`: changes of the language model."""
    tokenizer = _tokenizer(kind)
    tokenizer.chat_template = _TEMPLATE.replace("MARK", MARKS[kind])
    processor = _processor(kind, tokenizer)
    torch.manual_seed(0)
    model = _model(kind, tokenizer, text).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.any() and weight.ndim > 1:
                weight.normal_()  # Gemma 3's projection begins as zeros
            elif weight.ndim > 1:
                weight.mul_(4 if "vision" in name or "visual" in name else 3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, processor


def _tokenizer(kind: str) -> Any:
    special = [*_specials(kind)]
    words = [*(f"w{n}" for n in range(_WORDS)), "\n", "\n\n"]
    vocab = {word: n for n, word in enumerate([*words, "</s>", *special])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    names = {
        "internvl": {
            "start_image_token": "<start>",
            "end_image_token": "<end>",
            "context_image_token": "<ctx>",
            "video_token": "<vid>",
        },
        "gemma3": {"image_token": "<soft>", "boi_token": "<start>", "eoi_token": "<end>"},
    }
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="w0",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=names.get(kind),
    )
    made.add_tokens(special, special_tokens=True)
    return made


@cache
def _specials(kind: str) -> tuple[str, ...]:
    if kind.startswith("qwen"):
        return "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
    if kind == "internvl":
        return "<ctx>", "<vid>", "<start>", "<end>"
    if kind == "gemma3":
        return "<soft>", "<start>", "<end>"
    if kind in ("smolvlm", "idefics3"):
        tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
        return "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles
    return "<image>", "<video>"


def _processor(kind: str, tokenizer: Any) -> Any:
    def make(name: str, reader: str, options: dict[str, Any], **more: Any) -> Any:
        images = getattr(transformers, reader)(**options)
        return images_only(getattr(transformers, name))(images, tokenizer, **more)

    if kind == "llava":
        options: dict[str, Any] = {"size": {"shortest_edge": _SIDE}, "crop_size": _SIZE}
        return make(
            "LlavaProcessor",
            "LlavaImageProcessorPil",
            options,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if kind == "llava_next":
        options = {"size": {"shortest_edge": _SIDE}, "crop_size": _SIZE}
        return make(
            "LlavaNextProcessor",
            "LlavaNextImageProcessorPil",
            options | {"image_grid_pinpoints": _GRID},
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if kind == "llava_onevision":
        return make(
            "LlavaOnevisionProcessor",
            "LlavaOnevisionImageProcessorPil",
            {"size": _SIZE, "image_grid_pinpoints": _GRID},
            num_image_tokens=16,
            vision_feature_select_strategy="full",
        )
    if kind.startswith("qwen"):
        options = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
        name = "Qwen2_5_VLProcessor" if kind == "qwen2_5_vl" else "Qwen3VLProcessor"
        return make(name, "Qwen2VLImageProcessorPil", options)
    if kind == "internvl":
        options = {"size": _SIZE, "min_patches": 1, "max_patches": 3}
        return make("InternVLProcessor", "GotOcr2ImageProcessorPil", options, image_seq_length=4)
    if kind == "gemma3":
        return make(
            "Gemma3Processor", "Gemma3ImageProcessorPil", {"size": _SIZE}, image_seq_length=4
        )
    options = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": _SIDE}}
    name = "SmolVLM" if kind == "smolvlm" else "Idefics3"
    if "torchvision" in getattr(getattr(transformers, f"{name}ImageProcessorPil"), "_backends", ()):
        pytest.importorskip("torchvision")  # transformers 5.17 has no such processor without it
    return make(f"{name}Processor", f"{name}ImageProcessorPil", options, image_seq_len=4)


def _model(kind: str, tokenizer: Any, changes: dict[str, Any]) -> Any:
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **changes,
    }
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": 4,
    }
    place = tokenizer.convert_tokens_to_ids(_specials(kind)[0])
    t = transformers
    if kind == "llava":
        return t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**vision),
                text_config=t.LlamaConfig(**text),
                image_token_id=place,
            )
        )
    if kind == "llava_next":
        return t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(
                vision_config=t.CLIPVisionConfig(**vision),
                text_config=t.MistralConfig(**text),
                image_token_id=place,
                image_grid_pinpoints=_GRID,
            )
        )
    if kind == "llava_onevision":
        return t.LlavaOnevisionForConditionalGeneration(
            t.LlavaOnevisionConfig(
                vision_config=t.SiglipVisionConfig(**vision),
                text_config=t.Qwen2Config(**text),
                image_token_id=place,
                video_token_id=place + 1,
                image_grid_pinpoints=_GRID,
            )
        )
    if kind.startswith("qwen"):
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        ids = {
            "image_token_id": place,
            "video_token_id": place + 1,
            "vision_start_token_id": place + 2,
            "vision_end_token_id": place + 3,
        }
        seen = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
        }
        if kind == "qwen2_5_vl":
            seen |= {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
            return t.Qwen2_5_VLForConditionalGeneration(
                t.Qwen2_5_VLConfig(
                    text_config=text | {"rope_parameters": rope}, vision_config=seen, **ids
                )
            )
        rope["mrope_interleaved"] = True
        seen |= {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        return t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(
                text_config=text | {"head_dim": 8, "rope_parameters": rope},
                vision_config=seen,
                **ids,
            )
        )
    if kind == "internvl":
        square = {"image_size": [_SIDE, _SIDE], "patch_size": [4, 4]}
        return t.InternVLForConditionalGeneration(
            t.InternVLConfig(
                vision_config=t.InternVLVisionConfig(**(vision | square)),
                text_config=t.Qwen2Config(**text),
                image_token_id=place,
                image_seq_length=4,
            )
        )
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        text = {"head_dim": 8, "sliding_window": 8, "layer_types": layers} | text
        return t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                vision_config=t.SiglipVisionConfig(**vision),
                text_config=t.Gemma3TextConfig(**text),
                mm_tokens_per_image=4,
                image_token_id=place,
                boi_token_index=place + 1,
                eoi_token_index=place + 2,
            )
        )
    name = "SmolVLM" if kind == "smolvlm" else "Idefics3"
    config = getattr(t, f"{name}Config")(
        vision_config=vision,
        text_config=text | {"model_type": "llama"},
        image_token_id=place,
        scale_factor=2,
        pad_token_id=0,
    )
    return getattr(t, f"{name}ForConditionalGeneration")(config)
