"""One engine on several processes: torchrun --nproc-per-node 2 examples/tensor_parallel.py."""

from stars_fast import Engine, StarsParams

engine = Engine.demo(tensor_parallel=True)  # with one process, an engine like any other
params = StarsParams(segment_length=16, target_reward=2.0, seed=0)

# Every process makes the same calls and gets the same outputs.
outputs = engine.generate(["The film", "This kettle was a gift"], params, use_tqdm=False)
if engine.rank == 0:
    for output in outputs:
        print(f"{output.outputs[0].reward:.2f} {output.prompt}{output.outputs[0].text}")

# Or one of them knows what is to be done, as a server does, and the others do it with it.
if engine.rank == 0:
    with engine.lead():
        engine.add_request("one", "The ending", params)
        while engine.has_unfinished():
            for output in engine.step():
                segments = output.outputs[0].segments
                print([(round(s.reward, 2), s.attempts, s.accepted) for s in segments])
else:
    engine.follow()
