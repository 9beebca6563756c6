"""STARS as a rollout of TRL's GRPOTrainer: responses are aligned while they are drawn.

They follow the policy's law tilted by the reward: the policy learns from STARS, as from best-of-n.
The engine runs on the trainer's own weights, as they are at each step.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from stars_fast import Engine, StarsParams, demo

model = AutoModelForCausalLM.from_pretrained(demo.model_dir(), dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
reward_dir = str(demo.reward_model_dir())
engine = Engine(model, reward_dir, tokenizer=tokenizer, num_pages=200, reward_num_pages=200)
params = StarsParams(segment_length=8, max_tokens=24, target_reward=2.0, temperature=1.0, top_k=0)


def rollout(prompts, trainer):
    """Return a response to each prompt; they come repeated, `num_generations` times."""
    trainer.model.eval()
    engine.reset_prefix_cache()  # the weights have changed
    outputs = engine.generate(prompts, params, use_tqdm=False)
    trainer.model.train()
    best = [output.outputs[0] for output in outputs]
    return {
        "prompt_ids": [output.prompt_token_ids for output in outputs],
        "completion_ids": [completion.token_ids for completion in best],
        "logprobs": [completion.logprobs for completion in best],
        "stars_reward": [completion.reward for completion in best],  # for the reward functions
    }


def reward(stars_reward, **_):
    """The engine has scored the responses already."""
    return stars_reward


config = GRPOConfig(
    output_dir=tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=4, num_generations=2,
    max_completion_length=params.max_tokens, learning_rate=1e-4, beta=0.0, logging_steps=1,
    use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
)  # fmt: skip
data = Dataset.from_list([{"prompt": prompt} for prompt in demo.prompts(8)])
trainer = GRPOTrainer(
    model, reward, args=config, train_dataset=data, processing_class=tokenizer, rollout_func=rollout
)
trainer.train()
