"""Compiles Triton kernels ahead of time and reads what ptxas made of them; needs no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Of a block, bytes; sm_86 and 89 have as little as sm_120.
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
INTEGER_MMA = "|".join(
    [
        r"mma\.sync\.aligned\.m16n8k32\.\S*s8\.s8",
        r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
        r"tcgen05\.mma\S*kind::i8",  # of sm_100, since triton 3.9
    ]
)
FLOAT_MMA = {
    80: r"mma\.sync\S*\.f32\.{0}\.{0}\.f32",
    90: r"wgmma\.mma_async\S*\.f32\.{0}\.{0}",
    100: r"tcgen05\.mma\S*kind::f16",
    120: r"mma\.sync\S*\.f32\.{0}\.{0}\.f32",
}


class Resources(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_kernel(
    kernel,
    architecture: int,
    types: dict[str, str],
    constants: dict[str, object],
    options: dict[str, object],
    unaligned: tuple[str, ...] = (),
):
    """Compiles with pointers and sizes that are multiples of 16, as those of real layers are.

    ``types`` of arguments that are not int32; ``unaligned`` arguments may be any number, as those that the kernel does
    not specialize.
    """
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    unaligned += tuple(p.name for p in kernel.params if p.do_not_specialize)
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind != "constexpr" and name not in unaligned
    }
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled, tmp_path: Path, record_property) -> Resources:
    """As ptxas left them in the cubin."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = Resources(registers, spilled, compiled.metadata.shared)
    for name, value in found._asdict().items():
        record_property(name, value)
    return found


def copied_bytes(ptx: str) -> set[int]:
    """Sizes of asynchronous copies to shared memory."""
    return {
        int(size, 0) for size in re.findall(r"cp\.async\.c\S+ \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    }
