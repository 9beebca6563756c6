"""What ``stars-fast generate`` does with its input, its output and errors, without models."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from stars_fast.cli import generate, main
from stars_fast.cli.continuation import only_writer
from stars_fast.outputs import Calibration, CompletionOutput, RequestOutput
from stars_fast.params import StarsParams

MODELS = ("--model", "lm", "--reward-model", "rm")


@dataclass
class ScriptedEngine:
    """Does what the words of a prompt say.

    ``"slow"``: five steps instead of one. ``"refuse"``: `add_request` raises ``ValueError``.
    ``"fail"``: finishes with an error. ``"interrupt"``: `step` raises ``KeyboardInterrupt``.
    ``"mute"``: the response has no text.
    The response's tokens are a function of prompt, seed and target.
    """

    running: dict[str, tuple[str, StarsParams, int]] = field(default_factory=dict)
    most: int = 0
    added: list[str] = field(default_factory=list)
    calibrated: list[Sequence[object]] = field(default_factory=list)
    rank: int = 0
    tokenizer: ClassVar[Any] = None

    def lead(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add_request(self, request_id: str, prompt: object, params: StarsParams) -> None:
        text = str(prompt)
        if "refuse" in text:
            raise ValueError(f"prompt is refused: {text}")
        assert request_id not in self.running
        assert params.seed is not None
        assert params.method == "vanilla" or isinstance(params.target_reward, float)
        self.added.append(text)
        self.running[request_id] = (text, params, 5 if "slow" in text else 1)
        self.most = max(self.most, len(self.running))

    def check_request(self, prompt: object, params: StarsParams) -> None:
        if "too long" in str(prompt):
            raise ValueError("prompt of 9 tokens does not fit")

    def step(self) -> list[RequestOutput]:
        outputs = []
        for request_id, (text, params, steps) in list(self.running.items()):
            if "interrupt" in text:
                raise KeyboardInterrupt
            if steps > 1:
                self.running[request_id] = (text, params, steps - 1)
                outputs.append(RequestOutput(request_id, text, [1], [], finished=False))
                continue
            del self.running[request_id]
            tokens = [len(text), hash((params.seed, params.target_reward)) % 1000]
            said = "" if "mute" in text else text.upper()
            completion = CompletionOutput(0, said, tokens, finish_reason="length")
            error = "the reward model raised" if "fail" in text else None
            outputs.append(RequestOutput(request_id, text, [1], [completion], True, error))
        return outputs

    def calibrate(
        self,
        prompts: Sequence[object],
        quantile: float,
        params: StarsParams,
        use_tqdm: bool,
        targets: str,
    ) -> Calibration:
        assert targets == "pooled"
        self.calibrated.append(prompts)
        target = quantile + len(prompts)
        return Calibration(target, {quantile: target}, (target,) * 4 * len(prompts))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    """The engines that were loaded."""
    loaded: list[ScriptedEngine] = []

    def load(args: object) -> ScriptedEngine:
        loaded.append(ScriptedEngine())
        return loaded[-1]

    monkeypatch.setattr(generate, "load_engine", load)
    return loaded


def run(*argv: object, models: Sequence[str] = MODELS) -> int:
    return main(["generate", *models, *map(str, argv)])


def write(path: Path, *prompts: str | bytes) -> Path:
    """An input file; bytes are a line as it is."""
    path.write_bytes(
        b"".join(
            (text if isinstance(text, bytes) else json.dumps({"prompt": text}).encode()) + b"\n"
            for text in prompts
        )
    )
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_line(path: Path) -> dict[int, dict[str, Any]]:
    records = read(path)
    assert len({record["line"] for record in records}) == len(records)
    return {record["line"]: record for record in records}


TARGET = ("--target-reward", "1")


def test_every_line_gets_a_result(tmp_path: Path, engines: list[ScriptedEngine]) -> None:
    source = write(tmp_path / "in", "a", b'{"id": 5, "prompt": "slow"}', b"", "c")
    assert run("--input", source, "--output", tmp_path / "out", *TARGET) == 0
    assert [record["line"] for record in read(tmp_path / "out")] == [1, 4, 2]
    assert [record["id"] for record in read(tmp_path / "out")] == [None, None, 5]
    assert read(tmp_path / "out")[2]["outputs"][0]["text"] == "SLOW"


def test_results_go_to_standard_output(
    engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "a", "--prompt", "b", *TARGET) == 0
    out, err = capfd.readouterr()
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "b"]
    assert err == ""


@pytest.mark.parametrize("argv", [(), ("--input", "-")])
def test_requests_come_from_standard_input(
    argv: tuple[str, ...],
    engines: list[ScriptedEngine],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "a"}\n{"prompt": "b"}')
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(*argv, *TARGET) == 0
    assert len(capfd.readouterr().out.splitlines()) == 2


@pytest.fixture
def deadline() -> Iterator[None]:
    """A test that would wait for ever fails instead."""

    def give_up(*args: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("deadline")
def test_an_answer_comes_before_the_next_question_is_there(
    engines: list[ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that waits for each result must get it."""
    reader, writer = os.pipe()
    questions = [b'{"prompt": "b"}\n', None]
    os.write(writer, b'{"prompt": "a"}\n')

    class Answers(io.BytesIO):
        def write(self, data: Any) -> int:
            question = questions.pop(0)
            if question is None:
                os.close(writer)
            else:
                os.write(writer, question)
            return super().write(data)

    class Standard:
        buffer = Answers()

    with os.fdopen(reader) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr("sys.stdout", Standard())
        assert run(*TARGET) == 0
    assert questions == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_progress_bar(
    tmp_path: Path, engines: list[ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    source = write(tmp_path / "in", "a", "slow", "c")
    out = tmp_path / "out"
    assert run("--input", source, "--output", out, *TARGET) == 0
    assert "3/3" in terminal.getvalue()
    out.write_bytes(out.read_bytes()[:-5])
    terminal.truncate(0)
    assert run("--input", source, "--output", out, "--resume", *TARGET) == 0
    assert "2/3" in terminal.getvalue()
    assert "1/3" not in terminal.getvalue()


def test_requests_in_progress_are_bounded(tmp_path: Path, engines: list[ScriptedEngine]) -> None:
    source = write(tmp_path / "in", *["slow"] * 100)
    assert run("--input", source, "--output", tmp_path / "out", "--max-rows", "4", *TARGET) == 0
    assert len(read(tmp_path / "out")) == 100
    assert engines[0].most == 8


@pytest.mark.parametrize("bad", [b"{", b'{"prompt": "x", "params": {"max_tokens": 0}}'])
def test_a_malformed_line_stops_the_run_before_a_model_is_loaded(
    bad: bytes,
    tmp_path: Path,
    engines: list[ScriptedEngine],
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "in", "a", bad)
    assert run("--input", source, "--output", tmp_path / "out", *TARGET) == 2
    assert engines == []
    assert not (tmp_path / "out").exists()
    assert "stars-fast: error: input line 2: " in capfd.readouterr().err


def test_or_is_recorded(tmp_path: Path, engines: list[ScriptedEngine]) -> None:
    source = write(tmp_path / "in", "a", b"{", b'{"id": 3, "prompt": "refuse"}', "fail", "e")
    out = tmp_path / "out"
    assert run("--input", source, "--output", out, "--on-error", "record", *TARGET) == 0
    records = by_line(out)
    errors = {line: record["error"] for line, record in records.items()}
    assert (errors[1], errors[5]) == (None, None)
    assert errors[2].startswith("not JSON")
    assert errors[3] == "prompt is refused: refuse"
    assert errors[4] == "the reward model raised"
    assert (records[3]["id"], records[3]["prompt"], records[3]["outputs"]) == (3, "refuse", [])
    assert len(records[4]["outputs"]) == 1  # what was committed before the error


@pytest.mark.parametrize(("bad", "code"), [("refuse", 2), ("fail", 1)])
def test_a_request_that_fails_stops_the_run_and_nothing_is_lost(
    bad: str,
    code: int,
    tmp_path: Path,
    engines: list[ScriptedEngine],
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "in", "slow", bad, *["slow"] * 20)
    out = tmp_path / "out"
    assert run("--input", source, "--output", out, "--max-rows", "2", *TARGET) == code
    begun = len(engines[0].added)
    assert begun < 10
    assert len(read(out)) == begun - (bad == "fail")
    assert 2 not in by_line(out)
    err = capfd.readouterr().err
    assert "input line 2: " in err
    assert "finishing what is in progress" in err
    # Once the cause is gone, --resume does the rest.
    assert run("--input", source, "--output", out, "--resume", *TARGET, "--on-error", "record") == 0
    assert by_line(out).keys() == set(range(1, 23))


def test_an_output_is_not_overwritten(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", "a")
    (tmp_path / "out").write_text("mine\n")
    assert run("--input", source, "--output", tmp_path / "out", *TARGET) == 2
    assert engines == []
    assert (tmp_path / "out").read_text() == "mine\n"
    assert "--resume" in capfd.readouterr().err


@pytest.mark.parametrize("cut", [0, 1, 30, 10**9])
def test_an_interrupted_run_is_resumed(
    cut: int,
    tmp_path: Path,
    engines: list[ScriptedEngine],
    capfd: pytest.CaptureFixture[str],
) -> None:
    prompts = ["a", "slow b", "c", "d", "slow e", "f"]
    source = write(tmp_path / "in", *prompts)
    assert run("--input", source, "--output", tmp_path / "whole", *TARGET) == 0
    broken = write(tmp_path / "broken", *prompts[:4], "interrupt", "f")
    out = tmp_path / "out"
    assert run("--input", broken, "--output", out, "--max-rows", "1", *TARGET) == 130
    err = capfd.readouterr().err
    assert f"interrupted; 3 results are in {out}; --resume continues" in err
    content = out.read_bytes()
    out.write_bytes(content[: max(len(content) - cut, 0)])
    before = {line.rstrip(b"\n") for line in content[: max(len(content) - cut, 0)].splitlines()}
    assert run("--input", source, "--output", out, "--resume", *TARGET) == 0
    assert by_line(out) == by_line(tmp_path / "whole")
    # What was done was not done again.
    expected = {0: 3, 1: 3, 30: 4, 10**9: 6}[cut]
    assert len(engines[-1].added) == expected, before


def test_nothing_is_loaded_when_nothing_is_left(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", "a", "b")
    out = tmp_path / "out"
    assert run("--input", source, "--output", out, *TARGET) == 0
    content = out.read_bytes()
    assert run("--input", source, "--output", out, "--resume", *TARGET) == 0
    assert len(engines) == 1
    assert out.read_bytes() == content
    assert "nothing to do" in capfd.readouterr().err


def test_resume_with_another_input_is_refused(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--input", write(tmp_path / "in", "a"), "--output", out, *TARGET) == 0
    other = write(tmp_path / "other", "b")
    assert run("--input", other, "--output", out, "--resume", *TARGET) == 2
    assert "made from another input" in capfd.readouterr().err


def test_calibration_is_the_default_and_is_kept(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a", "b", "c", "d"]
    source = write(tmp_path / "in", *prompts)
    flags = ("--input", source, "--calibration-prompts", "3", "--calibration-quantile", "0.5")
    assert run(*flags, "--output", tmp_path / "whole") == 0
    assert engines[0].calibrated == [["a", "b", "c"]]
    assert "target reward 3.5: the 0.5 quantile of 12 unaligned" in capfd.readouterr().err
    whole = (tmp_path / "whole").read_bytes()
    # A resumed run takes the target from beside the output.
    out = tmp_path / "out"
    out.write_bytes(whole[: len(whole) // 2])
    sidecar = tmp_path / "out.calibration.json"
    sidecar.write_bytes((tmp_path / "whole.calibration.json").read_bytes())
    assert run(*flags, "--output", out, "--resume") == 0
    assert engines[1].calibrated == []
    assert out.read_bytes() == whole
    # Without that file it calibrates again, with the same result.
    out.write_bytes(whole[: len(whole) // 2])
    sidecar.unlink()
    assert run(*flags, "--output", out, "--resume") == 0
    assert engines[2].calibrated == [["a", "b", "c"]]
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--top-p", "0.5"), "top_p 1.0, not 0.5"),
        (("--seed", "1"), "seed 0, not 1"),
        (("--dtype", "bfloat16"), "dtype 'auto', not 'bfloat16'"),
        (("--reward-template", "plain"), "reward_template None, not 'plain'"),
        (("--target-reward", "2"), "target_reward 1.0, not 2.0"),
        (("--stop", "a", "--max-tokens", "5"), "max_tokens 128, not 5; stop None, not ['a']"),
    ],
)
def test_resume_with_other_settings_is_refused(
    tmp_path: Path,
    engines: list[ScriptedEngine],
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    named: str,
) -> None:
    source, out = write(tmp_path / "in", "a", "b"), tmp_path / "out"
    assert run("--input", source, "--output", out, *TARGET) == 0
    half = out.read_bytes()[:-10]
    out.write_bytes(half)
    resumed = ("--input", source, "--output", out, "--resume")
    assert run(*resumed, *TARGET, *flags) == 2
    message = capfd.readouterr().err
    assert f"--resume: {out} was made with {named}: give the same" in message
    assert out.read_bytes() == half
    assert len(engines) == 1
    # What changes no token may change.
    assert run(*resumed, *TARGET, "--max-rows", "3", "--device", "cpu") == 0
    assert len(read(out)) == 2


def test_a_log_ratio_in_place_of_a_reward_model(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in", "a"), tmp_path / "out"
    flags = ("--input", source, "--output", out, *TARGET)
    assert run(*flags, models=("--model", "lm", "--log-ratio", "dpo,sft,beta=0.1")) == 0
    models = ("--model", "lm", "--log-ratio", "dpo,sft")
    assert run(*flags, "--resume", models=models) == 2
    assert "LogRatio(policy='dpo', reference='sft', beta=0.1" in capfd.readouterr().err
    for extra, message in (
        (("--log-ratio", "a,b,c"), "argument --log-ratio: must be POLICY"),
        (("--log-ratio", "a,beta=0"), "argument --log-ratio: beta of a LogRatio must be finite"),
        (("--log-ratio", "a", "--reward-model", "b"), "not allowed with argument"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run("--prompt", "a", models=("--model", "lm", *extra))
        assert message in capfd.readouterr().err


def test_resume_without_settings_says_so(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in", "a"), tmp_path / "out"
    assert run("--input", source, "--output", out, *TARGET) == 0
    kept = tmp_path / "out.settings.json"
    kept.unlink()
    assert run("--input", source, "--output", out, "--resume", *TARGET) == 0
    assert "out.settings.json is missing" in capfd.readouterr().err
    assert kept.exists()


def test_two_runs_do_not_write_one_file(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in", "a"), tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    with only_writer(out):
        for name in ("out", "link"):
            flags = ("--input", source, "--output", tmp_path / name, *TARGET)
            assert run(*flags, "--resume") == run(*flags) == 2
            assert f"{name} is being written by another run" in capfd.readouterr().err
    assert engines == []
    assert run("--input", source, "--output", out, "--resume", *TARGET) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("in", "link", "out", "out.settings.json")
    ]


def test_a_directory_as_output_is_named(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "a", "--output", tmp_path, *TARGET) == 2
    assert f"--output {tmp_path} is a directory" in capfd.readouterr().err


def test_prompts_that_are_too_long_are_found_before_the_first_runs(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", "a", "too long")
    out = tmp_path / "out"
    assert run("--input", source, "--output", out) == 2
    assert "input line 2: prompt of 9 tokens does not fit" in capfd.readouterr().err
    assert engines[0].added == engines[0].calibrated == []
    assert run("--input", source, "--output", out, "--on-error", "record", *TARGET) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("to_file", [True, False])
def test_a_full_disk_is_named_with_what_is_kept(to_file: bool) -> None:
    code = (
        "import sys, test_generate as t; t.generate.load_engine = lambda a: t.ScriptedEngine();"
        "sys.exit(t.main(sys.argv[1:]))"
    )
    argv = ["generate", *MODELS, *TARGET, "--prompt", "a"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code, *argv, *(["--output", "/dev/full"] if to_file else [])],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent, check=False,
        )  # fmt: skip
    name = "/dev/full" if to_file else "standard output"
    rest = "; 0 results are in /dev/full; --resume continues" if to_file else ""
    assert ended.stderr == f"stars-fast: error: {name}: No space left on device{rest}\n"
    assert ended.returncode == 1


def test_closed_standard_streams_are_named(
    engines: list[ScriptedEngine],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert run(*TARGET) == 2
    assert "standard input is closed: give --input FILE" in capfd.readouterr().err
    monkeypatch.setattr("sys.stdout", None)
    assert run("--prompt", "a", *TARGET) == 2
    assert "standard output is closed: give --output FILE" in capfd.readouterr().err


def test_vanilla_needs_neither_target_nor_reward_model(
    tmp_path: Path, engines: list[ScriptedEngine]
) -> None:
    source = write(tmp_path / "in", "a")
    models = ("--model", "lm", "--method", "vanilla")
    assert run("--input", source, "--output", tmp_path / "out", models=models) == 0
    assert engines[0].calibrated == []
    assert not (tmp_path / "out.calibration.json").exists()


def test_chats_of_text_and_a_warning_without_them(
    tmp_path: Path, engines: list[ScriptedEngine], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(ScriptedEngine, "tokenizer", SimpleNamespace(chat_template="{{ x }}"))
    source = write(
        tmp_path / "in", "mute", "b", b'{"messages": [{"role": "user", "content": "c"}]}'
    )
    assert run("--input", source, "--output", tmp_path / "bare", *TARGET) == 0
    err = capfd.readouterr().err
    assert "1 of 2 responses to prompts of bare text are empty" in err
    assert "--chat sends prompts as chat messages" in err
    assert run("--input", source, "--output", tmp_path / "out", *TARGET, "--chat") == 0
    assert "empty" not in capfd.readouterr().err
    chats = [[{"role": "user", "content": text}] for text in ("mute", "b", "c")]
    assert engines[1].added == [str(chat) for chat in chats]
    assert [by_line(tmp_path / "out")[line]["prompt"] for line in (1, 2, 3)] == chats
    assert run("--input", source, "--output", tmp_path / "out", *TARGET, "--resume") == 2
    assert "chat True, not False" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-p", "2"], "top_p must be in"),
        (["--prompt", "a", "--input", "x"], "--prompt and --input"),
        (["--prompt", "a", "--resume"], "--resume needs --output"),
        (["--prompt", "a", "--resume", "--output", "-"], "--resume needs --output"),
        (["--prompt", "a", "--seed", "-1"], "--seed must be"),
        (["--prompt", "a", "--calibration-prompts", "0"], "--calibration-prompts must be"),
        (["--prompt", "a", "--calibration-quantile", "1.5"], "--calibration-quantile must be"),
        (["--prompt", ""], "input line 1: prompt must be text that is not empty"),
        (["--input", "{tmp}/none"], "none"),
        (["--prompt", "a", "--output", "{tmp}/no/out"], "no/out"),
        (["--input", "{tmp}", "--output", "{tmp}/out"], "directory"),
    ],
)
def test_wrong_flags_are_named_before_a_model_is_loaded(
    argv: list[str],
    message: str,
    tmp_path: Path,
    engines: list[ScriptedEngine],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(*[text.replace("{tmp}", str(tmp_path)) for text in argv]) == 2
    assert message in capfd.readouterr().err
    assert engines == []


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("--model", "lm"), "--reward-model is needed for method 'stars'"),
        (("--method", "sss"), "--draft-model is needed for method 'sss'"),
        (("--reward-model", "rm"), "--reward-model needs --model"),
    ],
)
def test_a_missing_model_is_named(
    models: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "a", models=models) == 2
    assert message in capfd.readouterr().err


def test_input_and_output_must_differ(
    tmp_path: Path, engines: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", "a")
    link = tmp_path / "link"
    link.symlink_to(source)
    assert run("--input", source, "--output", link, "--resume", *TARGET) == 2
    assert source.read_text() == '{"prompt": "a"}\n'
    assert "same file" in capfd.readouterr().err


def test_help_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from stars_fast.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["demo", "--help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(argv)
    assert "usage: stars-fast" in capsys.readouterr().out


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err
