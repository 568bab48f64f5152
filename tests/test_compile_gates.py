"""What the shipped kernels become on GPUs that need not be there: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re

import pytest
import torch

from pgolf.kernels import dequant, newton_schulz, smear_gate
from pgolf.kernels.common import RMS_EPS, backend, launch
from pgolf.kernels.dequant import DequantizePlan, PackedFactors, QuantizedMatrix
from pgolf.kernels.newton_schulz import POLAR_EXPRESS
from pgolf.kernels.newton_schulz.reference import Settings
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

# --- Newton-Schulz ---


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", ["banks_full", "banks_eighth", "odd"])
def test_newton_schulz(case: str, capability: int) -> None:
    shapes = {
        "banks_full": [(22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)],
        "banks_eighth": [(3, 512, 512), (3, 256, 512), (2, 2048, 512), (2, 512, 2048)],
        "odd": [(1, 70, 130)],
    }[case]
    banks = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    settings = Settings(POLAR_EXPRESS, "auto", torch.float16, norm_scale=1.0, eps=1e-7, row_normalize=True)
    with compiling(capability) as kernels:
        newton_schulz.triton.launch(banks, banks, settings)
    (kernel,) = kernels
    entry = {"banks_full": "large", "banks_eighth": "small", "odd": "odd"}[case]
    parameters = launch.launch_parameters("newton_schulz", entry, banks[0].device)
    check(kernel, matrix_products=True, streams=case != "odd")
    if capability == 90:
        # Three tickets or looks ahead, one wait; the looks and waits forget the SM's cache; one count behind a fence.
        names = "ATOMG.E.ADD", "LDG.E.STRONG.GPU", "CCTL.IVALL", "MEMBAR.ALL.GPU", "REDG.E.ADD"
        assert [kernel.count(name) for name in names] == [3, 1, 2, 1, 1]
        assert (kernel.shared_bytes + 1024) * parameters["programs"] <= 233_472
        assert kernel.registers * 32 * parameters["warps"] * parameters["programs"] <= 65_536


# --- SmearGate ---

TOKENS, VOCABULARY = 98_304, 8192  # the record's micro-step
SMEAR_GATE_REGISTERS = {
    "_forward_kernel": 72,
    "_backward_kernel": 136,
    "_prepare_kernel": 40,
    "_table_gradient_kernel": 152,
    "_join_segments_kernel": 64,
}
OTHER_WIDTHS_REGISTERS = SMEAR_GATE_REGISTERS | {"_table_gradient_kernel": 160}  # 157 at a width of 768
ATOMIC_REGISTERS = 168  # of the backward with atomics
SMEAR_GATE_SHARED = 20 << 10


def launch_smear_gate(dtype: torch.dtype, width: int, bos_id: int | None):
    """Every kernel of the family in its shipped configuration."""
    x, table = torch.empty(1, TOKENS, width, dtype=dtype), torch.empty(VOCABULARY, width, dtype=dtype)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    gate = torch.empty(1, 12), torch.empty(1), bos_id
    smear_gate.triton._smear_gate(x, ids, *gate, None)
    smear_gate.triton._smear_gate_backward(x, x, ids, *gate, None)
    smear_gate.triton._embed_smear_norm(ids, table, *gate, RMS_EPS, True, None)
    for deterministic in (True, False):
        smear_gate.triton._embed_smear_norm_backward(x, ids, table, *gate, RMS_EPS, deterministic, None)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_smear_gate(capability: int, dtype: torch.dtype) -> None:
    with compiling(capability) as kernels:
        launch_smear_gate(dtype, 512, 1)
    names = [kernel.name for kernel in kernels]
    assert {name: names.count(name) for name in names} == {
        "_forward_kernel": 2,
        "_backward_kernel": 2,
        "_prepare_kernel": 1,
        "_table_gradient_kernel": 1,
        "_join_segments_kernel": 1,
    }
    for kernel in kernels:
        atomic = kernel.count(r"REDG?\.E") > 0
        registers = ATOMIC_REGISTERS if atomic else SMEAR_GATE_REGISTERS[kernel.name]
        walks = kernel.name not in ("_prepare_kernel", "_join_segments_kernel")
        check(kernel, registers=registers, shared=SMEAR_GATE_SHARED, streams=walks and not atomic)
        if walks:  # rows on their way while others are worked on
            assert kernel.count(r"LDGSTS\.E\S*\.128") >= 2, f"{kernel.name}: no asynchronous copies of 16 bytes"
        if atomic and capability >= 90:
            assert kernel.count(r"REDG\.E\.ADD\.F32x4"), f"{kernel.name}: atomics of less than 16 bytes"
        if kernel.name == "_table_gradient_kernel" and (capability, dtype) == (90, torch.bfloat16):
            assert kernel.registers <= 128 and kernel.shared_bytes <= 13 << 10  # 16 programs an SM
            assert kernel.count("REDUX") >= 5 and kernel.count("SHFL") <= 48  # the lists' integers in one instruction


@pytest.mark.parametrize("width, bos_id", [(1024, None), (768, 1)])
def test_smear_gate_of_other_widths(width: int, bos_id: int | None) -> None:
    with compiling(90) as kernels:
        launch_smear_gate(torch.bfloat16, width, bos_id)
    for kernel in kernels:
        atomic = kernel.count(r"REDG?\.E") > 0
        registers = ATOMIC_REGISTERS if atomic else OTHER_WIDTHS_REGISTERS[kernel.name]
        walks = kernel.name not in ("_prepare_kernel", "_join_segments_kernel")
        check(kernel, registers=registers, shared=SMEAR_GATE_SHARED, streams=walks and not atomic)


# --- Dequantisation ---

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


def check_dequantisation(
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
        dequant.triton.launch_one(q, out)
    (kernel,) = kernels
    return kernel, dequant.triton._constants("one", [dequant.triton._item(q, out)])


@pytest.mark.parametrize("capability", [90, 80, 100])
@pytest.mark.parametrize("name", PACKED)
def test_dequantisation_of_one_matrix(name, capability):
    q, registers, instructions = PACKED[name]
    kernel, constants = compile_one(q, torch.bfloat16, capability)
    check_dequantisation(kernel, registers, instructions, constants, loads_of_16=q.bits < 8)
    if q.bits == 8:  # its loads are of 8 bytes
        assert kernel.count(r"LDG\.E\S*\.64") == 8 and not kernel.count(r"LDG\.E\S*\.U8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantisation_to_other_dtypes(dtype):
    q, *_ = PACKED["packed6_g64_lqer"]
    kernel, _ = compile_one(q, dtype, 90)
    check(kernel, registers=200, streams=True)


def test_dequantisation_of_ragged_rows():
    kernel, _ = compile_one(matrix(130, 70, factors=True), torch.bfloat16, 90)
    check(kernel, registers=200)


@pytest.mark.parametrize("capability", [90, 80, 100])
@pytest.mark.parametrize("case", ["record model", "without factors", "all bits"])
def test_dequantisation_of_all_matrices(case, capability, monkeypatch):
    matrices, registers, instructions = record_model(), 96, 10.5
    assert len(matrices) == 67 and sum(q.low_rank is not None for q in matrices) == 3
    if case == "without factors":
        matrices, registers, instructions = [q._replace(low_rank=None) for q in matrices], 56, 7.0
    elif case == "all bits":
        matrices, registers, instructions = [*matrices, *(matrix(512, 512, bits=bits) for bits in (4, 8))], 96, 8.5
    outs = [torch.empty(q.rows, q.columns, dtype=torch.bfloat16) for q in matrices]
    items = [dequant.triton._item(q, out) for q, out in zip(matrices, outs, strict=True)]
    monkeypatch.setattr(backend, "_chosen", "reference")
    DequantizePlan(matrices, outs)  # checks them
    with compiling(capability) as kernels:
        dequant.triton.LaunchOfMany(list(zip(matrices, outs, strict=True)))()
    (kernel,) = kernels
    formats = len({item.format for item in items})
    assert formats == {"record model": 3, "without factors": 2, "all bits": 5}[case]
    check_dequantisation(kernel, registers, instructions, dequant.triton._constants("all", items), formats=formats)
