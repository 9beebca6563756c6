"""README.md, CONTRIBUTING.md and docs/ name only what there is."""

from __future__ import annotations

import argparse
import ast
import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest

from stars_fast import AsyncEngine, Engine, RemoteEngine, RemoteReward, RewardHead, StarsParams
from stars_fast.cli import bench, demo, generate, report, serve
from stars_fast.cli import eval as evaluate

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
CALLS = (AsyncEngine, Engine, RemoteEngine, RemoteReward, RewardHead, StarsParams)

IMPORTS = re.compile(r"^from (stars_fast[\w.]*) import (.+)$", re.MULTILINE)

#: Programs of others, whose flags are theirs.
OTHERS = ("pip", "setup.py", "pytest", "cmake", "ctest", "vllm", "lm_eval", "guidellm", "curl")
OTHERS += ("cibuildwheel",)
#: Flags of others in running text.
FLAGS_OF_OTHERS = {"--shutdown-timeout", "--nproc-per-node", "--enable-deterministic-inference"}
FLAGS_OF_OTHERS |= {  # vLLM's, in docs/stacks.md
    "--api-server-count",
    "--async-scheduling",
    "--block-size",
    "--chat-template",
    "--logprobs-mode",
    "--max-logprobs",
    "--no-enable-chunked-prefill",
    "--logits-processors",
    "--scheduler-cls",
    "--served-model-name",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def code_of(text: str) -> list[str]:
    """Inline code, and the lines of blocks, joined where a shell joins them."""
    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@each_page
def test_files(page: Path) -> None:
    folders = "benchmarks|csrc|docs|examples|kernels|scripts|stars_fast|tests|.ci"
    for name in re.findall(rf"(?<![\w/.(])(?:{folders})/[\w./*-]*[\w*/]", TEXTS[page]):
        if name.endswith("_NAME.py") or name.startswith("stars_fast/_core."):
            continue  # a pattern; compiled
        path = re.sub(r"^stars_fast/(\w+\.h)$", r"csrc/\1", name)  # where it is installed
        assert list(ROOT.glob(path.rstrip("/"))), name


def commands() -> dict[str, set[str]]:
    """The flags of each command of stars-fast."""
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for module in (generate, demo, serve, evaluate, bench, report):
        module.add_command(subparsers)
    return {name: set(sub._option_string_actions) for name, sub in subparsers.choices.items()}


COMMANDS = commands()


def flags_where(code: str) -> set[str] | None:
    """The flags that a piece of code may have; None: those of other programs."""
    words = [word for word in code.split() if not re.match(r"^[A-Z_]+=", word)]
    if any(word in OTHERS for word in words):
        return None
    if found := re.search(r"\bstars-fast\)? (\w+)", code):
        return COMMANDS[found[1]] | FLAGS_OF_OTHERS
    if found := re.search(r"\bpython (?!-)(\S+\.py)", code):
        return script_flags((ROOT / found[1]).parent)
    if words[0] in ("python", "python3", "serve"):
        return None
    scripts = [script_flags(ROOT / name) for name in ("benchmarks", "scripts")]
    return set().union(*COMMANDS.values(), FLAGS_OF_OTHERS, *scripts)


@cache
def script_flags(folder: Path) -> set[str]:
    """The flags of the scripts in a folder: written out, or fields of a dataclass."""
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    flags = {flag for text in texts for flag in re.findall(r"(--[a-z][\w-]*)", text)}
    fields = {name for text in texts for name in re.findall(r"^    (\w+): ", text, re.MULTILINE)}
    return flags | {"--" + name.replace("_", "-") for name in fields}


@each_page
def test_flags(page: Path) -> None:
    for code in code_of(TEXTS[page]):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code.partition(" # ")[0]))
        if named and (known := flags_where(code)) is not None:
            assert named <= known, code


def exists(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            spec = find_spec(module)
        except ModuleNotFoundError:
            continue
        if spec is not None:
            break
    else:
        return False
    rest = parts[count:]
    if not rest:
        return True
    try:
        found: object = import_module(module)
    except ModuleNotFoundError:  # of an extra
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        return rest[0] in {getattr(node, "name", None) for node in tree.body}
    for part in rest:
        try:
            found = getattr(found, part)
        except AttributeError:
            return False
        except ModuleNotFoundError:  # of an extra, imported when it is asked for
            return part in found.__all__
    return True


@each_page
def test_names_of_the_package(page: Path) -> None:
    text = TEXTS[page]
    names = set(re.findall(r"(?<![\w/.])stars_fast(?:\.[A-Za-z_]\w*)+(?![\w/])", text))
    names |= {
        f"{module}.{name.strip()}"
        for module, imported in IMPORTS.findall(text)
        for name in imported.split(",")
    }
    for name in names:
        if not name.endswith((".md", ".py")):
            assert exists(name), name


@each_page
def test_arguments(page: Path) -> None:
    """Of calls in code, without the arguments of calls within them."""
    for call in CALLS:
        known = set(signature(call).parameters)
        within = r"(?:[^()]|\([^()]*\))*"
        for arguments in re.findall(rf"\b{call.__name__}\(({within})\)", TEXTS[page]):
            names = re.findall(r"(?:^|,)\s*(\w+)=", re.sub(r"\([^()]*\)", "", arguments))
            assert set(names) <= known, f"{call.__name__}({arguments})"
