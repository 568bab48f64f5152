"""What dequantisation's kernels become on GPUs that need not be there: registers, accesses, instructions a code."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from pgolf.kernels.common import backend
from pgolf.kernels.dequant import DequantizePlan, PackedFactors, QuantizedMatrix, triton
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

# rows, columns and number of the record model's matrices; the first of them has factors, and so has the embedding
MATRICES = ((512, 512, 22), (256, 512, 22), (2048, 512, 11), (512, 2048, 11))


def matrix(rows, columns, bits=6, *, group=None, zero=False, factors=False, rank=4, whole=True):
    """A matrix of this format, of which no memory is touched."""
    units, groups = -(-rows // 8) * -(-columns // 8), columns // group if group else 1
    words = torch.empty(2 * bits * units, dtype=torch.int32)
    planes = words if bits < 8 else torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, groups, dtype=torch.float16)
    low_rank = None
    if factors:
        rank = rank + -rank % 4
        A, B = torch.empty(-(-rows // 8) * 8, rank), torch.empty(-(-columns // 256), rank, 2, 32, 4)
        low_rank = PackedFactors(A, B)
    return QuantizedMatrix(planes, bits, not zero, rows, columns, scale, scale if zero else None, low_rank, whole)


def record_model() -> list[QuantizedMatrix]:
    matrices = []
    for rows, columns, count in MATRICES:
        matrices += [matrix(rows, columns, factors=not i and rows != 512) for i in range(count)]
    return [*matrices, matrix(8192, 512, bits=7, factors=True)]


# with the registers and the instructions a code that the kernels may take
PACKED = {
    "packed6_g64_lqer": (matrix(61_952, 512, group=64, zero=True, factors=True), 96, 11.5),
    "packed6_g64": (matrix(61_952, 512, group=64, zero=True), 48, 6.0),
    "packed6_rows": (matrix(2048, 512), 48, 5.0),
    "packed6_fraction": (matrix(2048, 512, group=64, zero=True, whole=False), 56, 7.5),
    "packed7_rows": (matrix(8192, 512, bits=7), 48, 7.5),
    "packed4_g64": (matrix(61_952, 512, bits=4, group=64, zero=True), 48, 6.0),
    "int8_rows": (matrix(61_952, 512, bits=8), 48, 6.0),
    "rank 8": (matrix(2048, 512, group=64, zero=True, factors=True, rank=8), 168, 15.5),
}
FOR_OTHERS = ("packed6_g64_lqer", "packed7_rows", "int8_rows")


def check_codes(
    kernel: Compiled, registers: int, instructions: float, constants: dict, formats: int = 1, loads_of_16: bool = True
) -> None:
    """``instructions`` a code, the mean of the formats: a program runs those of its own."""
    check(kernel, registers=registers, shared=0, streams=loads_of_16)
    stores = kernel.count(r"STG\.E\S*\.128")
    narrow = kernel.count(r"STG\.E") - stores
    assert stores and narrow == 0, f"{kernel.name}: {narrow} narrow stores"
    codes = 64 * constants["UNITS"] / (32 * constants["num_warps"]) * formats
    found = len(re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?!NOP)[^;]+;", kernel.sass)) / codes
    limit = instructions * (1.0 if kernel.capability == 90 else 1.25)
    assert found <= limit, f"{kernel.name} on sm_{kernel.capability}: {found:.1f} instructions a code, limit {limit}"


def compile_one(q: QuantizedMatrix, dtype: torch.dtype, capability: int) -> tuple[Compiled, dict]:
    out = torch.empty(q.rows, q.columns, dtype=dtype)
    with compiling(capability) as kernels:
        triton.launch_one(q, out)
    (kernel,) = kernels
    return kernel, triton._constants("one", [triton._item(q, out)])


@pytest.mark.parametrize("name, capability", [*((name, 90) for name in PACKED), *product(FOR_OTHERS, (80, 100))])
def test_one_matrix(name: str, capability: int) -> None:
    q, registers, instructions = PACKED[name]
    kernel, constants = compile_one(q, torch.bfloat16, capability)
    check_codes(kernel, registers, instructions, constants, loads_of_16=q.bits < 8)
    if q.bits == 8:  # its loads are of 8 bytes
        assert kernel.count(r"LDG\.E\S*\.64") == 8 and not kernel.count(r"LDG\.E\S*\.U8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, *_ = PACKED["packed6_g64_lqer"]
    kernel, _ = compile_one(q, dtype, 90)
    check(kernel, registers=200, streams=True)


def test_ragged_rows() -> None:
    kernel, _ = compile_one(matrix(130, 70, factors=True), torch.bfloat16, 90)
    check(kernel, registers=200)


@pytest.mark.parametrize(
    "case, capability",
    [("record model", 90), ("without factors", 90), ("all bits", 90), ("record model", 80), ("record model", 100)],
)
def test_all_matrices(monkeypatch, case: str, capability: int) -> None:
    matrices, registers, instructions = record_model(), 96, 10.5
    assert len(matrices) == 67 and sum(q.low_rank is not None for q in matrices) == 3
    if case == "without factors":
        matrices, registers, instructions = [q._replace(low_rank=None) for q in matrices], 56, 7.0
    elif case == "all bits":
        matrices, registers, instructions = [*matrices, *(matrix(512, 512, bits=bits) for bits in (4, 8))], 96, 8.5
    outs = [torch.empty(q.rows, q.columns, dtype=torch.bfloat16) for q in matrices]
    items = [triton._item(q, out) for q, out in zip(matrices, outs, strict=True)]
    monkeypatch.setattr(backend, "_chosen", "reference")
    DequantizePlan(matrices, outs)  # checks them
    with compiling(capability) as kernels:
        triton.LaunchOfMany(list(zip(matrices, outs, strict=True)))()
    (kernel,) = kernels
    formats = len({item.format for item in items})
    assert formats == {"record model": 3, "without factors": 2, "all bits": 5}[case]
    check_codes(kernel, registers, instructions, triton._constants("all", items), formats=formats)
