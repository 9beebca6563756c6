"""The C++ scheduler over a model runner of one's own; here that is transformers' generate."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stars_fast import demo
from stars_fast.core import ROW_KEPT, Scheduler

model = AutoModelForCausalLM.from_pretrained(demo.model_dir()).eval()
tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())


def draw(ids, length):  # a runner with pages finds theirs in plan.prefill and plan.draft
    found = model.generate(torch.tensor([ids]), do_sample=True, max_new_tokens=length)
    return found[0, len(ids) :].tolist()


def reward(ids):  # stands for a reward model
    return sum(tokenizer.decode(ids).count(word) for word in ("good", "great", "lovely"))


scheduler, text, kept = Scheduler(num_pages=512), {0: [], 1: []}, {}
options = {"scored": True, "segment_length": 8, "max_tokens": 24, "max_attempts": 6, "alpha": 1.0}
for i, prompt in enumerate(["The film", "This kettle"]):
    scheduler.add(i, tokenizer(prompt)["input_ids"], target_reward=1.0, seed=i, **options)
while scheduler.has_unfinished:
    plan = scheduler.plan()
    owners, lengths = plan.request.tolist(), plan.draft.new_lengths.tolist()
    rows = [draw(scheduler.tokens(i), n) for i, n in zip(owners, lengths, strict=True)]
    ended = [row[-1] == tokenizer.eos_token_id for row in rows]
    rewards = [reward(text[i] + row) for i, row in zip(owners, rows, strict=True)]
    tokens = np.array([row + [0] * (8 - len(row)) for row in rows])
    decision = scheduler.commit(tokens, [len(row) for row in rows], ended, rewards)
    kept |= {owners[row]: rows[row] for row in np.flatnonzero(decision.outcome == ROW_KEPT)}
    for i, row in zip(decision.request.tolist(), decision.row.tolist(), strict=True):
        text[i] += rows[row] if row >= 0 else kept[i]
print([tokenizer.decode(ids) for ids in text.values()])
