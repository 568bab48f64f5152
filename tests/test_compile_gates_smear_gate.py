"""What SmearGate's kernels become on GPUs that need not be there: registers, spills, widths of loads and stores."""

from __future__ import annotations

import os
import sys

import pytest
import torch

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles for GPUs here on Linux, and not in the interpreter", allow_module_level=True)

from pgolf.kernels import smear_gate as family
from tests.gates import check, compiling

TOKENS, VOCABULARY = 98_304, 8192  # the record's micro-step
REGISTERS = {"_forward_kernel": 72, "_backward_kernel": 136, "_sum_segments_kernel": 64, "_join_segments_kernel": 80}
ATOMIC_REGISTERS = 168


def launches(dtype: torch.dtype, width: int, bos_id: int | None):
    """Every kernel of the family in its shipped configuration."""
    x, table = torch.empty(1, TOKENS, width, dtype=dtype), torch.empty(VOCABULARY, width, dtype=dtype)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    gate = torch.empty(1, 12), torch.empty(1), bos_id
    family._smear_gate_triton(x, ids, *gate)
    family._smear_gate_backward_triton(x, x, ids, *gate)
    family._embed_smear_norm_triton(ids, table, *gate, family.RMS_EPS, True)
    for deterministic in (True, False):
        family._embed_smear_norm_backward_triton(x, ids, table, *gate, family.RMS_EPS, deterministic)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_record_shape(capability: int, dtype: torch.dtype) -> None:
    with compiling(capability) as kernels:
        launches(dtype, 512, 1)
    names = [kernel.name for kernel in kernels]
    assert {name: names.count(name) for name in names} == {
        "_forward_kernel": 2, "_backward_kernel": 3, "_sum_segments_kernel": 1, "_join_segments_kernel": 1,
    }  # fmt: skip
    for kernel in kernels:
        atomic = kernel.count("RED") > 0
        registers = ATOMIC_REGISTERS if atomic else REGISTERS[kernel.name]
        check(kernel, registers=registers, shared=11 << 10, streams=not atomic)
        if "segments" not in kernel.name:  # rows on their way while others are worked on
            assert kernel.count(r"LDGSTS\.E\S*\.128") >= 2, f"{kernel.name}: no asynchronous copies of 16 bytes"
        if atomic and capability >= 90:
            assert kernel.count(r"REDG\.E\.ADD\.F32x4"), f"{kernel.name}: atomics of less than 16 bytes"


@pytest.mark.parametrize("width, bos_id", [(1024, None), (768, 1)])
def test_other_widths(width: int, bos_id: int | None) -> None:
    with compiling(90) as kernels:
        launches(torch.bfloat16, width, bos_id)
    for kernel in kernels:
        atomic = kernel.count("RED") > 0
        registers = ATOMIC_REGISTERS if atomic else REGISTERS[kernel.name]
        check(kernel, registers=registers, shared=11 << 10, streams=not atomic)
