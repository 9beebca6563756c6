"""Compiling kernels ahead of time, without a GPU, and reading what they need of one.

Each kernel file lists in `variants` the forms that its launcher can choose; each is compiled for
an architecture by the toolchain that ships with Triton, and the machine code's own record says how
many registers it takes and whether any of them spilled to memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

#: Shared memory that one program may take, bytes by compute capability (CUDA C++ Programming
#: Guide, table of technical specifications per compute capability).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

#: Registers of a thread in kernels that Triton 3.6's ptxas, unless it is told a number, spills some
#: bytes of to fit more threads.
MOST_REGISTERS = 96

#: Compute capabilities that kernels are compiled for.
ARCHITECTURES = tuple(SHARED_LIMIT)

# What the pipeline allocates has no initial value and the shape [buffers, rows, columns], or
# [buffers, rows] of whole numbers for a table; barriers are [buffers, 1].
_BUFFERS = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(?:\d+x\d+x|(?!1x)\d+xi)")


@dataclass(frozen=True)
class Variant:
    """A form of a kernel that a launcher can choose.

    Attributes
    ----------
    name
        Kernel and configuration, for tables.
    kernel
        What ``@triton.jit`` gave.
    signature
        Type of each argument in order, as Triton writes them: ``"*bf16"``, ``"i32"``,
        ``"constexpr"``.
    constexprs
        Value of each argument of type ``"constexpr"``.
    num_warps, num_stages, maxnreg
        As the launcher passes them; the last are the most registers of a thread, None: any number.
    aligned
        Arguments that the launcher's usual input makes divisible by 16.
    capabilities
        Those of `ARCHITECTURES` on which the launcher can choose it.
    min_buffers
        Buffers that each load has at least which its loops take ahead; 0 if it has no such loads.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    aligned: frozenset[str] = frozenset()
    capabilities: tuple[int, ...] = ARCHITECTURES
    min_buffers: int = 0


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled variant takes.

    Attributes
    ----------
    registers
        Per thread.
    local_bytes
        Memory per thread for registers that did not fit and for arrays; 0 is no spill.
    shared_bytes
        Static and dynamic shared memory.
    buffers
        Of each load that Triton's pipeline takes ahead, in the order of the program: with one, it
        waits for what it loads. From Triton's own representation (TTGIR).
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    buffers: tuple[int, ...]


def compile_variant(variant: Variant, capability: int) -> bytes:
    """Return the machine code (cubin) of a variant for a compute capability such as 90.

    Raises
    ------
    RuntimeError
        In a process that runs kernels in Triton's interpreter: nothing is compiled there.
    """
    return bytes(_compile(variant, capability).asm["cubin"])


def resources(variant: Variant, capability: int) -> Resources:
    """Compile a variant and read what it takes; see `compile_variant`."""
    compiled = _compile(variant, capability)
    report = _cuobjdump(bytes(compiled.asm["cubin"]), "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources of {variant.name}: {report}")
    registers, stack, static_shared, local = (int(group) for group in found.groups())
    shared = max(static_shared, int(compiled.metadata.shared))
    buffers = tuple(int(count) for count in _BUFFERS.findall(compiled.asm["ttgir"]))
    return Resources(registers, stack + local, shared, buffers)


def machine_code(variant: Variant, capability: int) -> str:
    """Compile a variant and return its disassembly (SASS)."""
    return _cuobjdump(compile_variant(variant, capability), "-sass")


def _compile(variant: Variant, capability: int) -> CompiledKernel:
    if not isinstance(variant.kernel, triton.JITFunction):
        raise RuntimeError(
            f"{variant.name} cannot be compiled in a process with TRITON_INTERPRET=1"
        )
    names = list(variant.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constexprs,
        attrs=attributes,
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "maxnreg": variant.maxnreg,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), *options, file.name], check=True, capture_output=True, text=True
        )
    return done.stdout
