"""Build of the C++ modules: CMake, driven by setuptools. The rest stands in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildCore(build_ext):
    """Runs CMake and lets it put the module where setuptools expects it.

    Environment: ``STARS_CMAKE_ARGS`` is appended to the configure command, as in
    ``STARS_CMAKE_ARGS="-DSTARS_SANITIZE=ON"``.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure and build the target of an extension's name."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "core"
        config = "Debug" if self.debug else "Release"

        # Passed on every run, since the paths of an isolated build are gone at the next one and
        # the build folder may be an older one.
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            f"-DCMAKE_BUILD_TYPE={config}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("STARS_CMAKE_ARGS", ""))

        build = ["cmake", "--build", str(build_dir), "--config", config, "--target"]
        build.append(ext.name.rpartition(".")[2])
        if self.parallel:
            build += ["--parallel", str(self.parallel)]
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)


setup(
    ext_modules=[Extension(f"stars_fast.{name}", sources=[]) for name in ("_core", "_cpu")],
    cmdclass={"build_ext": BuildCore},
)
