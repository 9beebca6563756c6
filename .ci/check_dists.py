"""Checks that an sdist and a wheel of this checkout hold what they must, and nothing foreign.

Usage: python .ci/check_dists.py DIST_DIR, from the root of the checkout.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

COMPILED = re.compile(r"stars_fast/_(core|cpu)\.")
IN_SDIST = ("csrc", "kernels", "stars_fast", "tests", "benchmarks", "docs", "examples", "scripts")
TOP_LEVEL = {
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}


def sources(folder: str) -> set[str]:
    """Paths of the files of a folder of the checkout, less what builds and runs leave there."""
    left_behind = {".pyc", ".so"}
    return {
        path.as_posix()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix not in left_behind
    }


def main(dist: Path) -> int:
    """Print what is missing or foreign; 0 if nothing is."""
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        members = (name.partition("/")[2] for name in archive.getnames())
        in_sdist = set(members)
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())

    expected_sdist = TOP_LEVEL.union(*map(sources, IN_SDIST))
    mapped = {name for name in sources("kernels") | sources("benchmarks") if name.endswith(".py")}
    expected_wheel = sources("stars_fast") | {f"stars_fast/{name}" for name in mapped}
    package = {name for name in in_wheel if ".dist-info/" not in name}
    compiled = {name for name in package if not name.endswith("pyi") and COMPILED.match(name)}

    problems = [f"{sdist.name} lacks {name}" for name in sorted(expected_sdist - in_sdist)]
    problems += [f"{wheel.name} lacks {name}" for name in sorted(expected_wheel - package)]
    problems += [
        f"{wheel.name} holds {name}" for name in sorted(package - expected_wheel - compiled)
    ]
    if len(compiled) != 2:
        problems.append(f"{wheel.name} holds {len(compiled)} compiled modules, not two")
    print("\n".join(problems) or f"{sdist.name} and {wheel.name} are complete")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
