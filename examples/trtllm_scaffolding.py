"""STARS as a controller of TensorRT-LLM's scaffolding; that needs a GPU, so here it is played."""

import copy
from enum import Enum
from types import SimpleNamespace

from stars_fast import Engine, StarsParams
from stars_fast.core import Schedule, accept_uniform

try:
    from tensorrt_llm.scaffolding import Controller, GenerationTask
except ModuleNotFoundError:
    Controller, GenerationTask = object, SimpleNamespace


class StarsController(Controller):
    """Draws segments by tasks; `reward` may be `RemoteReward(...).score`."""

    WorkerTag = Enum("WorkerTag", {"GENERATION": "generation"})
    clone = copy.copy  # a request each; they share the reward

    def __init__(self, reward, end, length=16, candidates=4, max_tokens=48, **schedule):
        self.reward, self.end, self.length, self.candidates = reward, end, length, candidates
        self.max_tokens, self.task_collections = max_tokens, {}
        self.schedule = Schedule(max_tokens=max_tokens, hard=False, **schedule)

    def process(self, tasks, **_):
        """Yield the candidates of each next segment, which the workers draw side by side."""
        (task,) = tasks
        (start,) = self.reward([task.input_str], [""])
        task.output_str, ids, number = "", [], 0
        while len(ids) < self.max_tokens and ids[-1:] != [self.end]:
            drafts = [copy.copy(task) for _ in range(self.candidates)]
            for i, draft in enumerate(drafts):
                draft.worker_tag, draft.seed = self.WorkerTag.GENERATION, 1000 * number + i
                draft.input_str = task.input_str + task.output_str
                draft.max_tokens = min(self.length, self.max_tokens - len(ids))
            yield drafts
            texts = [task.output_str + draft.output_str for draft in drafts]
            rewards = self.reward([task.input_str] * len(texts), texts)
            taus = [self.schedule.threshold(start, len(ids + d.output_tokens)) for d in drafts]
            uniforms = [accept_uniform(0, len(ids), i, number) for i in range(len(drafts))]
            passed = list(map(self.schedule.accepts, rewards, taus, uniforms))
            best = passed.index(True) if any(passed) else rewards.index(max(rewards))
            task.output_str, ids, number = texts[best], ids + drafts[best].output_tokens, number + 1


engine = Engine.demo(num_pages=200, reward_num_pages=200)
end = engine.tokenizer.eos_token_id
controller = StarsController(engine.score, end, target_reward=2.0, alpha=0.5, beta=0.7).clone()
task = GenerationTask(input_str="The film")
# With the real one: ScaffoldingLlm(controller, {StarsController.WorkerTag.GENERATION: worker}).
for drafts in controller.process([task]):
    for draft in drafts:
        params = StarsParams("vanilla", max_tokens=draft.max_tokens, seed=draft.seed)
        (drawn,) = engine.generate(draft.input_str, params, use_tqdm=False)[0].outputs
        draft.output_str, draft.output_tokens = drawn.text, drawn.token_ids
print(engine.score([task.input_str], [task.output_str]), task.input_str + task.output_str)
