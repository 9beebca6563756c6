"""Plain sampling by a vLLM for CPUs, in a process of its own, which stands still between turns.

Run as a script, by a Python that need not have stars_fast, it is that process: it reads tasks from
its input, a JSON object ``{"prompts": [[id, ...], ...], "sampling": {...}}`` a line, and writes the
token ids of all responses.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class VllmSampling:
    """A vLLM that draws when it is asked to, and is stopped otherwise; for POSIX systems.

    Parameters
    ----------
    python
        An interpreter that has vLLM.
    model
        Directory of the model, without a tokenizer; it runs in float32.
    threads
        Of its products: they get the first processors of this process.
    log
        File for what it says.
    compiled
        Leave it to compile the model, as it does by default: minutes at the first start.
    """

    def __init__(
        self, python: str, model: Path, threads: int, log: Path, *, compiled: bool = False
    ) -> None:
        processors = sorted(os.sched_getaffinity(0))[:threads]
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
            "HF_HUB_OFFLINE": "1",
        }
        # Its threads are those of the line above, whatever is set for ours.
        kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [python, __file__, str(model), *(["--compiled"] if compiled else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={**kept, **settings},
                start_new_session=True,  # a group, which is stopped as one
            )
        self.version = str(self._answer()["vllm"])
        self._send(signal.SIGSTOP)

    def draw(self, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Return the token ids of the responses, a list each.

        Raises
        ------
        RuntimeError
            If it has ended, with the end of what it said.
        """
        self._send(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            print(json.dumps({"prompts": prompts, "sampling": sampling}), file=self._process.stdin)
            self._process.stdin.flush()
            return self._answer()["tokens"]
        finally:
            self._send(signal.SIGSTOP)

    def close(self) -> None:
        """End it, and the processes that it has begun."""
        self._send(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"vLLM has ended:\n{self._log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _send(self, what: signal.Signals) -> None:
        # The group goes by the number of its first process, which is not waited for before `close`.
        os.killpg(self._process.pid, what)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM says much there

    import vllm

    model = vllm.LLM(
        options.model,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=not options.compiled,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=64,
    )
    print(json.dumps({"vllm": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        params = vllm.SamplingParams(**task["sampling"], detokenize=False, ignore_eos=True)
        asked = [{"prompt_token_ids": ids} for ids in task["prompts"]]
        outputs = model.generate(asked, params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    _main()
