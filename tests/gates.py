"""Compile a family's launches for a GPU that is not there, and read registers, spills, memory and instructions off.

    with compiling(90) as kernels:          # every Triton launch in here compiles and runs nothing
        newton_schulz.triton.launch([torch.empty(22, 512, 512, dtype=torch.bfloat16)], ...)
    for kernel in kernels:
        check(kernel, registers=255, matrix_products=True)

The launcher is given CPU tensors of the real shapes, so what is compiled is what would be launched: the shipped
parameters with Triton's own specialisation of arguments. Registers and instructions are those of one compiler: with
another Triton than the kernels were tuned with, tests that compile are skipped.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from pgolf.kernels.common import launch
from pgolf.kernels.newton_schulz import tasks

TUNED_WITH = "3.6"
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


class _Driver:
    """Stands in for a GPU of one compute capability; its number keeps the caches of several apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_interface(self):
        return torch.cuda


@dataclass(frozen=True)
class Compiled:
    """What was compiled and what it uses."""

    name: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    sass: str

    def count(self, instruction: str) -> int:
        """Occurrences of an instruction, given as a regular expression, in the machine code."""
        return len(re.findall(rf"\b{instruction}", self.sass))

    def lost_operands(self) -> list[str]:
        """The products in loops on sm_90 that read registers which hold something else from the second round on.

        They were written before the loop, and later in the loop, but not between its start and the product.
        """
        code, labels = [], {}
        for line in self.sass.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                code.append(instruction[1])
        lost = []
        for end, instruction in enumerate(code):
            back = re.match(r"@!?U?P\d+ BRA `\((\.L_x_\d+)\)", instruction)  # others come from code out of line
            if back is None or labels[back[1]] > end:
                continue
            first = labels[back[1]]
            written = [_written(each) for each in code[first:end]]
            for at, each in enumerate(code[first:end]):
                if product := re.match(r"(?:@!?U?P\d+ )?HGMMA\S+ R\d+, R(\d+), gdesc", each):
                    operand = set(range(int(product[1]), int(product[1]) + 4))
                    if (operand - set().union(*written[:at])) & set().union(*written[at:]):
                        lost.append(each)
        return lost


def _written(instruction: str) -> set[int]:
    """The registers that an instruction of sm_90 writes."""
    found = re.match(r"(?:@!?U?P\d+ )?([A-Z]\S*) (?:U?P[T\d]+, )*R(\d+)\b", instruction)
    if found is None or re.match(r"ST|RED|R2UR|LDGSTS|I?SETP", found[1]):
        return set()
    name, count = found[1], 1
    if columns := re.match(r"HGMMA\.64x(\d+)x", name):
        count = int(columns[1]) // 2
    elif ".128" in name or name.endswith(".4"):
        count = 4
    elif ".64" in name or "WIDE" in name or name.endswith(".2"):
        count = 2
    return set(range(int(found[2]), int(found[2]) + count))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


@cache  # Triton gives one object for all launches with the same constants
def _read(kernel, capability: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        # Disassembling takes as long as compiling, and is kept where Triton keeps what it compiled.
        kept, flags = get_cache_manager(kernel.hash), ("--print-code", "--no-dataflow")
        name = "".join(("nvdisasm", *flags))
        path = kept.get_file(name) or kept.put(_output("nvdisasm", *flags, file.name), name, binary=False)
        sass = Path(path).read_text()
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    return Compiled(kernel.metadata.name, capability, registers, stack, kernel.metadata.shared, sass)


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Compiled]]:
    """Inside, a Triton launch compiles for ``capability`` and is not run; the list fills with what was compiled."""
    if not triton.__version__.startswith(f"{TUNED_WITH}."):
        pytest.skip(f"the limits are those of Triton {TUNED_WITH}, and this is {triton.__version__}")
    compiled, run = set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            compiled.add(kernel.hash)
            kernels.append(_read(kernel, capability))
        return kernel

    kernels: list[Compiled] = []
    JITFunction.run = compile_only
    active = triton.runtime.driver._active  # reading `active` fails where there is no GPU
    triton.runtime.driver.set_active(_Driver(capability))
    chip, launch.chip = launch.chip, lambda device: "h100" if capability == 90 else "default"
    _forget_parameters()
    try:
        yield kernels
    finally:
        triton.runtime.driver._active = active
        JITFunction.run = run
        launch.chip = chip
        _forget_parameters()


def _forget_parameters() -> None:
    launch.launch_parameters.cache_clear()
    tasks.plan.cache_clear()


def check(
    kernel: Compiled,
    *,
    registers: int = 255,
    shared: int | None = None,
    matrix_products: bool = False,
    streams: bool = False,
) -> None:
    """Fail with the kernel's name and the figure where it spills or passes a limit.

    ``matrix_products``: must use the chip's matrix instruction. ``streams``: global loads and stores of 16 bytes.
    """
    where = f"{kernel.name} on sm_{kernel.capability}"
    spills = kernel.count("LDL") + kernel.count("STL")
    assert spills == 0, f"{where}: {spills} spill instructions, {kernel.stack_bytes} bytes of stack"
    assert kernel.registers <= registers, f"{where}: {kernel.registers} registers, limit {registers}"
    lost = kernel.lost_operands() if kernel.capability == 90 else []
    assert not lost, f"{where}: the assembler gives registers of {lost} to others"
    limit = shared or SHARED_LIMITS[kernel.capability]
    assert kernel.shared_bytes <= limit, f"{where}: {kernel.shared_bytes} bytes of shared memory, limit {limit}"
    if matrix_products:
        instruction = MATRIX_INSTRUCTION[kernel.capability]
        assert kernel.count(instruction), f"{where}: no {instruction}"
    if streams:
        loads = kernel.count(r"LDG\.E\S*\.128") + kernel.count(r"LDGSTS\.E\S*\.128")
        stores = kernel.count(r"STG\.E\S*\.128")
        assert loads and stores, f"{where}: {loads} 16-byte loads and {stores} 16-byte stores"
