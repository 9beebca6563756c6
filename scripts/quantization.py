"""What 8-bit weights cost in quality: perplexity, agreement of the likeliest tokens, bytes.

    python scripts/quantization.py docs/methods.md MODEL_DIR ...

prints a row of docs/quantization.md for each model. The text is cut into windows; at every token
but a window's first, both models are asked for the next one.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from stars_fast.config import Quantize
from stars_fast.models.linear import OneDnnLinears
from stars_fast.models.load import load_causal_lm


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def log_probs(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the log-probabilities ``[W, L - 1, vocab]`` of what follows each token."""
    with OneDnnLinears(model).active():
        logits = torch.cat([model(window, use_cache=False).logits for window in windows.split(1)])
    return F.log_softmax(logits[:, :-1].float(), dim=-1)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    args = parser.parse_args()
    for name in args.models:
        found: dict[Quantize, Tensor] = {}
        sizes, seconds = [], []
        windows = torch.empty(0)
        for quantize in ("none", "int8"):
            began = time.perf_counter()
            dtype = "float32" if quantize == "none" else "auto"
            model, tokenizer = load_causal_lm(name, dtype=dtype, device="cpu", quantize=quantize)
            seconds.append(time.perf_counter() - began)
            assert tokenizer is not None
            count = args.windows * args.length
            ids = tokenizer(args.text.read_text(), add_special_tokens=False)["input_ids"][:count]
            windows = torch.tensor(ids).view(args.windows, args.length)
            found[quantize] = log_probs(model, windows)
            sizes.append(weight_bytes(model) / 1e6)
        exact, rounded = found["none"], found["int8"]
        targets = windows[:, 1:].unsqueeze(-1)
        perplexities = [math.exp(-float(x.gather(-1, targets).mean())) for x in (exact, rounded)]
        agree = float((exact.argmax(-1) == rounded.argmax(-1)).float().mean())
        divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
        print(
            f"| {Path(name).name} | {sizes[0]:.0f} | {sizes[1]:.0f} | {perplexities[0]:.2f} | "
            f"{perplexities[1]:.2f} | {100 * agree:.1f} % | {divergence:.4f} | "
            f"{seconds[0]:.1f} | {seconds[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
