"""What SmearGate's kernels become on GPUs that need not be there: registers, shared memory, accesses."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.smear_gate import RMS_EPS, triton
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import check, compiling

TOKENS, VOCABULARY = 98_304, 8192  # the record's micro-step
REGISTERS = {
    "_forward_kernel": 72,
    "_backward_kernel": 136,
    "_prepare_kernel": 40,
    "_table_gradient_kernel": 152,
    "_join_segments_kernel": 64,
}
OTHER_WIDTHS_REGISTERS = REGISTERS | {"_table_gradient_kernel": 160}  # 157 at a width of 768
ATOMIC_REGISTERS = 168  # of the backward with atomics
STARTS_REGISTERS = {"_forward_kernel": 72, "_backward_kernel": 168, "_prepare_kernel": 40}  # the others see no starts
SHARED = 20 << 10
STARTS = r"(LDG|LDGSTS)\.E\S*U8"  # their loads


def launch(dtype: torch.dtype, width: int = 512, bos_id: int | None = 1, starts: torch.Tensor | None = None) -> None:
    """Every kernel of the family in its shipped configuration."""
    x, table = torch.empty(1, TOKENS, width, dtype=dtype), torch.empty(VOCABULARY, width, dtype=dtype)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    gate = torch.empty(1, 12), torch.empty(1), bos_id
    triton._smear_gate(x, ids, *gate, starts)
    triton._smear_gate_backward(x, x, ids, *gate, starts)
    triton._embed_smear_norm(ids, table, *gate, RMS_EPS, True, starts)
    for deterministic in (True, False):
        triton._embed_smear_norm_backward(x, ids, table, *gate, RMS_EPS, deterministic, starts)


@pytest.mark.parametrize(
    "capability, dtype", [(90, torch.bfloat16), (90, torch.float32), (80, torch.bfloat16), (100, torch.float32)]
)
def test_record_model(capability: int, dtype: torch.dtype) -> None:
    with compiling(capability) as kernels:
        launch(dtype)
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
        registers = ATOMIC_REGISTERS if atomic else REGISTERS[kernel.name]
        walks = kernel.name not in ("_prepare_kernel", "_join_segments_kernel")
        check(kernel, registers=registers, shared=SHARED, streams=walks and not atomic)
        assert not kernel.count(STARTS), f"{kernel.name}: loads of starts, and there are none"
        if walks:  # rows on their way while others are worked on
            assert kernel.count(r"LDGSTS\.E\S*\.128") >= 2, f"{kernel.name}: no asynchronous copies of 16 bytes"
        if atomic and capability >= 90:
            assert kernel.count(r"REDG\.E\.ADD\.F32x4"), f"{kernel.name}: atomics of less than 16 bytes"
        if kernel.name == "_table_gradient_kernel" and (capability, dtype) == (90, torch.bfloat16):
            assert kernel.registers <= 128 and kernel.shared_bytes <= 13 << 10  # 16 programs an SM
            assert kernel.count("REDUX") >= 5 and kernel.count("SHFL") <= 48  # the lists' integers in one instruction


@pytest.mark.parametrize("width, bos_id", [(1024, None), (768, 1)])
def test_other_widths(width: int, bos_id: int | None) -> None:
    with compiling(90) as kernels:
        launch(torch.bfloat16, width, bos_id)
    for kernel in kernels:
        atomic = kernel.count(r"REDG?\.E") > 0
        registers = ATOMIC_REGISTERS if atomic else OTHER_WIDTHS_REGISTERS[kernel.name]
        walks = kernel.name not in ("_prepare_kernel", "_join_segments_kernel")
        check(kernel, registers=registers, shared=SHARED, streams=walks and not atomic)


@pytest.mark.parametrize("capability", [80, 90])
def test_starts_take_one_load_a_token(capability: int) -> None:
    with compiling(capability) as kernels:
        launch(torch.bfloat16, starts=torch.zeros(1, TOKENS, dtype=torch.bool))
    kernels = [kernel for kernel in kernels if kernel.name in STARTS_REGISTERS]
    assert len(kernels) == 5
    for kernel in kernels:
        check(kernel, registers=STARTS_REGISTERS[kernel.name], shared=SHARED)
        assert kernel.count(STARTS), kernel.name
