"""The fused sampler in a plain PyTorch loop: eight candidates of one segment."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stars_fast import demo
from stars_fast.ops import sample

device = "cuda" if torch.cuda.is_available() else "cpu"  # Triton there, PyTorch here
model = AutoModelForCausalLM.from_pretrained(demo.model_dir()).to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
N, K = 8, 16


def column(value, dtype):
    """A setting of every candidate; they may differ."""
    return torch.full((N,), value, dtype=dtype, device=device)


settings = [
    column(0.8, torch.float32),  # temperature
    column(40, torch.int32),  # top_k
    column(0.95, torch.float32),  # top_p
    column(0.0, torch.float32),  # min_p
    column(7, torch.int64),  # seed of the request
]
attempt, stream = torch.arange(N, device=device), column(0, torch.int64)  # of the first segment
ids, cache, drawn = tokenizer("The film", return_tensors="pt").input_ids.to(device), None, []
ids = ids.expand(N, -1)
with torch.inference_mode():
    for position in range(K):
        out = model(ids, past_key_values=cache, use_cache=True)
        where = column(position, torch.int64)
        token, logprob, *_ = sample(out.logits[:, -1], *settings, where, attempt, stream)
        drawn.append(token)
        ids, cache = token[:, None], out.past_key_values
for text in tokenizer.batch_decode(torch.stack(drawn, dim=1)):
    print(text)
