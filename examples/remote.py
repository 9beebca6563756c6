"""STARS over a server of completions: it drafts, the scheduler and the reward model are here.

The server at STARS_REMOTE_URL, such as http://127.0.0.1:8000/v1, else one that is started here.
"""

import contextlib
import os
import re
import subprocess
import sys

from stars_fast import RemoteEngine, StarsParams, demo

PROGRAM = "from stars_fast.cli import main; raise SystemExit(main())"


@contextlib.contextmanager
def demo_server():
    """Serve the demo's language model on a free port."""
    command = [sys.executable, "-c", PROGRAM, "serve", "--port", "0", "--num-pages", "400"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)
            yield next(filter(None, found)).group() + "/v1"
        finally:
            process.terminate()


url = os.environ.get("STARS_REMOTE_URL")
with (
    contextlib.nullcontext(url) if url else demo_server() as address,
    RemoteEngine(address, reward_model=str(demo.reward_model_dir())) as engine,
):
    params = StarsParams(segment_length=16, target_reward=2.0, max_tokens=48, seed=1)
    for output in engine.generate(["The film", "This kettle"], params, use_tqdm=False):
        (best,) = output.outputs
        print(f"{best.reward:.2f} {output.prompt}{best.text}")
        print("     ", [(round(s.reward, 2), s.attempts, s.accepted) for s in best.segments])
