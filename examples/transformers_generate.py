"""STARS from transformers' own generate."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stars_fast.hf
from stars_fast import StarsParams, demo

model = AutoModelForCausalLM.from_pretrained(demo.model_dir()).eval()
tokenizer = AutoTokenizer.from_pretrained(demo.model_dir(), padding_side="left")
inputs = tokenizer(["The film", "This kettle was a gift"], return_tensors="pt", padding=True)
torch.manual_seed(0)
output = model.generate(
    **inputs,
    do_sample=True,
    temperature=0.8,
    top_k=40,
    max_new_tokens=48,
    return_dict_in_generate=True,
    custom_generate=stars_fast.hf.generate,
    reward_model=str(demo.reward_model_dir()),
    stars_params=StarsParams(segment_length=16, target_reward=2.0),
)
texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
for text, completion in zip(texts, output.completions, strict=True):
    print(f"{completion.reward:.2f} {text}")
    print("     ", [(round(s.reward, 2), s.attempts, s.accepted) for s in completion.segments])
