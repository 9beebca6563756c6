"""Make the demo models: tokenizer, language model and reward model, from generated reviews.

    python scripts/training/make_demo_models.py [--out stars_fast/demo/models]

The tokenizer is a byte-level BPE. The language model learns reviews of either mood, unlabelled. The
reward model starts from the language model and learns pairwise preferences between whole reviews
(Bradley-Terry); the better review by gold score is only preferred with probability
``sigmoid(sharpness * difference)``, so the reward is a noisy view of gold, in units of about
``sharpness`` per gold point. Weights are stored as float16 and computed with as float32.

The same settings, thread count and library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, logsigmoid
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from stars_fast.demo.gold import gold_score
from stars_fast.demo.grammar import Review, reviews

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
# The reward model's reviews: (share, most sentences). Short ones first, as they tell words apart.
CURRICULUM = ((0.25, 1), (0.35, 3), (0.4, None))
EMPTY_SHARE = 0.05  # of the reward model's reviews
POSITIONS = (8, 16, 32, 48, 64, 96)  # response tokens at which the prefix reward is measured


@dataclass(frozen=True)
class Settings:
    """What the models are made with.

    Attributes
    ----------
    seed
        Of the weights, the data order and the preference noise.
    vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, max_length
        Shape of the tokenizer and of both models.
    tokenizer_reviews, lm_reviews, rm_reviews, check_reviews
        Data seen by each stage; every stage reads reviews of its own.
    batch_size, lm_rate, rm_rate
        Reviews per step and peak learning rates.
    comparisons
        Preference pairs that each review of the reward model is in, within its batch.
    sharpness
        Logits of a preference per unit of gold difference.
    threads
        Threads of torch. One, so that the weights do not depend on the number of cores.
    """

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 512
    tokenizer_reviews: int = 4_000
    lm_reviews: int = 24_000
    rm_reviews: int = 28_000
    check_reviews: int = 512
    batch_size: int = 32
    lm_rate: float = 4e-3
    rm_rate: float = 2e-3
    comparisons: int = 16
    sharpness: float = 5.0
    threads: int = 1


@contextmanager
def deterministic(settings: Settings) -> Iterator[None]:
    """Seed torch, allow deterministic kernels only and fix the thread count; restore the latter."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def sample_reviews(
    settings: Settings, stage: int, count: int, max_sentences: int | None = None
) -> list[Review]:
    """``count`` reviews of one stage; stage 0 is the held-out one."""
    seed = 100 * settings.seed + stage
    stream = reviews(seed, held_out=stage == 0, max_sentences=max_sentences)
    return list(itertools.islice(stream, count))


def train_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text survives encode and decode; BOS is put in front, EOS is not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [review.text for review in sample_reviews(settings, 1, settings.tokenizer_reviews)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=settings.max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids with BOS, without EOS."""
    return [list(ids) for ids in tokenizer(list(texts))["input_ids"]]


def padded(rows: Sequence[list[int]]) -> torch.Tensor:
    """Rows of token ids as one int64 tensor [len(rows), longest], padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])


def batches(lengths: Sequence[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Indices in batches of similar length, in random order; leaves out what fills no batch."""
    order = rng.permutation(len(lengths)).tolist()
    result = []
    for start in range(0, len(order), 32 * size):
        pool = sorted(order[start : start + 32 * size], key=lambda i: lengths[i])
        result += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
    return [result[i] for i in rng.permutation(len(result))]


def epochs(
    lengths: Sequence[int], count: int, size: int, rng: np.random.Generator
) -> list[list[int]]:
    """Batches of ``count`` passes over the data."""
    return [group for _ in range(count) for group in batches(lengths, size, rng)]


def fit(
    model: PreTrainedModel,
    groups: Sequence[list[int]],
    loss_of: Callable[[list[int]], torch.Tensor],
    rate: float,
    name: str,
) -> None:
    """One pass of AdamW over ``groups``: short warm-up, then a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = 1 + len(groups) // 30

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / len(groups)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    mean = 0.0
    bar = tqdm(groups, desc=name, unit="step")
    for step, group in enumerate(bar):
        loss = loss_of(group)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{mean:.3f}")


def config_of(settings: Settings) -> LlamaConfig:
    """Configuration shared by both models."""
    return LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.max_length,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
    )


def next_token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token, float32 [rows, width - 1]; 0 at padding."""
    # Right padding needs no attention mask in a causal model: no real token sees it.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=PAD_ID, reduction="none")


def train_lm(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train the language model on whole reviews, each ended by EOS."""
    model = LlamaForCausalLM(config_of(settings))
    texts = [review.text for review in sample_reviews(settings, 2, settings.lm_reviews)]
    rows = [[*ids, EOS_ID] for ids in encode(tokenizer, texts)]
    groups = batches(
        [len(row) for row in rows], settings.batch_size, np.random.default_rng(settings.seed)
    )

    def loss_of(group: list[int]) -> torch.Tensor:
        ids = padded([rows[i] for i in group])
        return next_token_losses(model, ids).sum() / (ids[:, 1:] != PAD_ID).sum()

    fit(model, groups, loss_of, settings.lm_rate, "language model")
    return model


def rewards_of(model: LlamaForSequenceClassification, ids: torch.Tensor) -> torch.Tensor:
    """Rewards of right-padded rows, float32 [rows], read at each row's last real token."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, 0]


def train_rm(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, lm: LlamaForCausalLM
) -> LlamaForSequenceClassification:
    """Train the reward model on noisy preferences between whole reviews of a batch.

    Half of the reviews end with EOS, half without: both occur when it is used.
    """
    config = config_of(settings)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    model.model.load_state_dict(lm.model.state_dict())
    rng = np.random.default_rng(settings.seed + 1)
    data: list[Review] = []
    rows: list[list[int]] = []
    groups: list[list[int]] = []
    for stage, (share, max_sentences) in enumerate(CURRICULUM, start=3):
        count = round(share * settings.rm_reviews)
        part = sample_reviews(settings, stage, count, max_sentences)
        # An opening alone is a review that says nothing: r(x) needs a level too.
        part = [
            replace(review, response="", gold=0.0) if rng.random() < EMPTY_SHARE else review
            for review in part
        ]
        ids = encode(tokenizer, [review.text for review in part])
        ended = [[*row, EOS_ID] if rng.random() < 0.5 else row for row in ids]
        lengths = [len(row) for row in ended]
        groups += [
            [len(data) + i for i in group] for group in batches(lengths, settings.batch_size, rng)
        ]
        data += part
        rows += ended
    gold = torch.tensor([review.gold for review in data])

    def loss_of(group: list[int]) -> torch.Tensor:
        rewards, truth = rewards_of(model, padded([rows[i] for i in group])), gold[group]
        loss = 0.01 * rewards.mean().square()  # fixes the level, which preferences leave open
        for shift in range(1, settings.comparisons + 1):
            wins = torch.sigmoid(settings.sharpness * (truth - truth.roll(shift))).numpy()
            preferred = torch.from_numpy(np.where(rng.random(len(group)) < wins, 1.0, -1.0)).float()
            difference = rewards - rewards.roll(shift)
            loss = loss - logsigmoid(preferred * difference).mean() / settings.comparisons
        return loss

    fit(model, groups, loss_of, settings.rm_rate, "reward model")
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write weights as float16 safetensors; the configuration asks for float32 when loading."""
    model.half()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes for its owner only
    model.float()  # type: ignore[no-untyped-call]


def response_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Sequence[Review]
) -> float:
    """Mean cross-entropy of the response tokens, EOS included, in nats."""
    total, count = 0.0, 0
    starts = [len(ids) for ids in encode(tokenizer, [review.prompt for review in data])]
    rows = [[*ids, EOS_ID] for ids in encode(tokenizer, [review.text for review in data])]
    for row, start in zip(rows, starts, strict=True):
        losses = next_token_losses(model, torch.tensor([row]))[0, start - 1 :]
        total += losses.sum().item()
        count += len(losses)
    return total / count


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson correlation; 0 where one side is constant."""
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


@torch.no_grad()
def report(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    lm: LlamaForCausalLM,
    rm: LlamaForSequenceClassification,
) -> dict[str, float]:
    """Measure both models on held-out reviews."""
    data = sample_reviews(settings, 0, settings.check_reviews)
    rows = encode(tokenizer, [review.text for review in data])
    starts = [len(ids) for ids in encode(tokenizer, [review.prompt for review in data])]
    gold = [review.gold for review in data]
    rewards = [rewards_of(rm, torch.tensor([row])).item() for row in rows]
    first, second = np.array(rewards).reshape(2, -1), np.array(gold).reshape(2, -1)
    figures = {
        "held-out perplexity per response token": math.exp(response_losses(lm, tokenizer, data)),
        "reward spread (standard deviation)": float(np.std(rewards)),
        "reward mean": float(np.mean(rewards)),
        "reward mean of openings alone": float(
            np.mean(
                [
                    rewards_of(rm, torch.tensor([row[:start]])).item()
                    for row, start in zip(rows, starts, strict=True)
                ]
            )
        ),
        "share of pairs ranked as gold ranks them": float(
            np.mean((first[0] > first[1]) == (second[0] > second[1]))
        ),
        "correlation of reward and gold": correlation(rewards, gold),
    }
    for position in POSITIONS:
        long_enough = [i for i, row in enumerate(rows) if len(row) - starts[i] >= position]
        if len(long_enough) < 8:
            break
        prefixes = [rows[i][: starts[i] + position] for i in long_enough]
        partial = [rewards_of(rm, torch.tensor([row])).item() for row in prefixes]
        so_far = [
            gold_score(str(tokenizer.decode(row, skip_special_tokens=True))) for row in prefixes
        ]
        figures[f"correlation of reward and gold so far at {position} tokens"] = correlation(
            partial, so_far
        )
        figures[f"correlation of reward at {position} tokens and final gold"] = correlation(
            partial, [gold[i] for i in long_enough]
        )
    return figures


def make_models(settings: Settings, out: Path) -> dict[str, float]:
    """Train and save everything under ``out``/lm and ``out``/rm; returns what was measured."""
    with deterministic(settings):
        tokenizer = train_tokenizer(settings)
        lm = train_lm(settings, tokenizer)
        rm = train_rm(settings, tokenizer, lm)
        lm.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
        )
        save(lm, tokenizer, out / "lm")
        save(rm, tokenizer, out / "rm")
        return report(settings, tokenizer, lm, rm)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).resolve().parents[2] / "stars_fast" / "demo" / "models"
    parser.add_argument("--out", type=Path, default=default, help="directory of lm/ and rm/")
    for field in fields(Settings):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    start = time.perf_counter()
    figures = make_models(Settings(**arguments), out)
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {out}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
