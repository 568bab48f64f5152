"""Compile gates of the dequantisation kernels: what is shipped, compiled for GPUs that are not there."""

from __future__ import annotations

import os
import re

import pytest
import torch

from pgolf.kernels import _launch, dequant
from pgolf.kernels.dequant import DequantizePlan, LowRankFactors, QuantizedMatrix

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

# rows, columns and number of the record model's matrices; the first of them has factors, and so has the embedding
RECORD = ((512, 512, 22), (256, 512, 22), (2048, 512, 11), (512, 2048, 11))


def matrix(rows, columns, bits=6, *, group=None, zero=False, factors=None, rank=4, dtype=torch.float16, whole=True):
    """A matrix of this format, of which no memory is touched."""
    units, groups = -(-rows // 8) * -(-columns // 8), columns // group if group else 1
    words = torch.empty(2 * sum(dequant.PLANES[bits]) * units, dtype=torch.int32)
    planes = words if bits < 8 else torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, groups, dtype=dtype)
    low_rank = None
    if factors == "packed":
        blocks = -(-columns // 8), rank
        words = torch.empty(rows, dtype=torch.int32), torch.empty(blocks, dtype=torch.int32)
        low_rank = LowRankFactors(words[0], torch.empty(rows), words[1], torch.empty(blocks))
    elif factors is not None:
        low_rank = torch.empty(rows, rank, dtype=factors), torch.empty(rank, columns, dtype=factors)
    return QuantizedMatrix(planes, bits, not zero, rows, columns, scale, scale if zero else None, low_rank, whole)


def record_model() -> list[QuantizedMatrix]:
    matrices = []
    for rows, columns, count in RECORD:
        matrices += [matrix(rows, columns, factors=None if i or rows == 512 else "packed") for i in range(count)]
    return [*matrices, matrix(8192, 512, bits=7, factors="packed")]


ONE = {
    "packed6_g64_lqer": (matrix(61_952, 512, group=64, zero=True, factors="packed"), 168, 20.5),
    "packed6_g64": (matrix(61_952, 512, group=64, zero=True), 64, 10.5),
    "packed6_rows": (matrix(2048, 512), 64, 9.5),
    "packed6_fraction": (matrix(2048, 512, group=64, zero=True, whole=False), 80, 13.0),
    "packed7_rows": (matrix(8192, 512, bits=7), 72, 11.5),
    "packed4_g64": (matrix(61_952, 512, bits=4, group=64, zero=True), 64, 9.0),
    "int8_rows": (matrix(61_952, 512, bits=8), 64, 10.0),
    "float16 factors": (matrix(2048, 512, group=64, zero=True, factors=torch.float16), 168, 20.0),
    "float32 factors": (matrix(2048, 512, group=64, zero=True, factors=torch.float32), 168, 19.5),
}


def gate(kernel: Compiled, registers: int, instructions: float, constants: dict) -> None:
    check(kernel, registers=registers, shared=0, streams=True)
    narrow = kernel.count(r"STG\.E") - kernel.count(r"STG\.E\S*\.128")
    assert narrow == 0, f"{kernel.name}: {narrow} narrow stores"
    codes = 64 * constants["UNITS"] / (32 * constants["num_warps"])
    found = len(re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?!NOP)[^;]+;", kernel.sass)) / codes
    limit = instructions * (1.0 if kernel.capability == 90 else 1.25)
    assert found <= limit, f"{kernel.name} on sm_{kernel.capability}: {found:.1f} instructions a code, limit {limit}"


def compile_one(q: QuantizedMatrix, dtype: torch.dtype, capability: int) -> tuple[Compiled, dict]:
    out = torch.empty(q.rows, q.columns, dtype=dtype)
    with compiling(capability) as kernels:
        dequant._launch_one(q, out)
    (kernel,) = kernels
    return kernel, dequant.kernels._constants("one", [dequant._item(q, out)])


@pytest.mark.parametrize("capability", [90, 80, 100])
@pytest.mark.parametrize("name", ONE)
def test_one_matrix(name, capability):
    q, registers, instructions = ONE[name]
    kernel, constants = compile_one(q, torch.bfloat16, capability)
    if q.bits == 8:  # its loads are of 8 bytes
        assert kernel.count(r"LDG\.E\S*\.64") and not kernel.count(r"LDG\.E\S*\.U8")
        assert kernel.count(r"STG\.E\S*\.128") == 8 and kernel.registers <= registers
        return
    gate(kernel, registers, instructions, constants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype):
    q, *_ = ONE["packed6_g64_lqer"]
    kernel, _ = compile_one(q, dtype, 90)
    check(kernel, registers=200, streams=True)


def test_ragged_rows():
    kernel, _ = compile_one(matrix(130, 70, factors="packed"), torch.bfloat16, 90)
    check(kernel, registers=200)


@pytest.mark.parametrize("capability", [90, 80, 100])
@pytest.mark.parametrize("case", ["record model", "without factors", "all bits"])
def test_all_matrices(case, capability, monkeypatch):
    matrices, registers, instructions = record_model(), 136, 23.0
    assert len(matrices) == 67 and sum(q.low_rank is not None for q in matrices) == 3
    if case == "without factors":
        matrices, registers, instructions = [q._replace(low_rank=None) for q in matrices], 80, 12.5
    elif case == "all bits":
        matrices, registers, instructions = [*matrices, *(matrix(512, 512, bits=bits) for bits in (4, 8))], 168, 28.0
    outs = [torch.empty(q.rows, q.columns, dtype=torch.bfloat16) for q in matrices]
    items = [dequant._item(q, out) for q, out in zip(matrices, outs, strict=True)]
    monkeypatch.setattr(_launch, "_chosen", "reference")
    assert DequantizePlan(matrices, outs)._launch is None
    with compiling(capability) as kernels:
        dequant.kernels.launch_all(items)()
    (kernel,) = kernels
    gate(kernel, registers, instructions, dequant.kernels._constants("all", items))
