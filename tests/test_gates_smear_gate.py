"""What SmearGate's kernels become with the starts of sequences, on GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.smear_gate import RMS_EPS, triton
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

# Of a walk over tokens; _table_gradient_kernel does not see the starts.
REGISTERS = {"_forward_kernel": 72, "_backward_kernel": 168, "_prepare_kernel": 40}


def compile_all(started: bool, capability: int) -> list[Compiled]:
    x, table = torch.empty(1, 4096, 512, dtype=torch.bfloat16), torch.empty(8192, 512, dtype=torch.bfloat16)
    ids, gate = torch.zeros(1, 4096, dtype=torch.long), (torch.empty(1, 12), torch.empty(1), 1)
    starts = torch.zeros(1, 4096, dtype=torch.bool) if started else None
    with compiling(capability) as kernels:
        triton._smear_gate(x, ids, *gate, starts)
        triton._smear_gate_backward(x, x, ids, *gate, starts)
        triton._embed_smear_norm(ids, table, *gate, RMS_EPS, True, starts)
        for deterministic in (True, False):
            arguments = (x, ids, table, *gate, RMS_EPS, deterministic, starts)
            triton._embed_smear_norm_backward(*arguments)
    return [kernel for kernel in kernels if kernel.name in REGISTERS]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_starts_take_one_load_a_token_and_none_takes_none(capability: int) -> None:
    with_starts, without = (compile_all(started, capability) for started in (True, False))
    assert len(with_starts) == len(without) == 5
    for kernel, plain in zip(with_starts, without, strict=True):
        check(kernel, registers=REGISTERS[kernel.name], shared=20 << 10)
        loads = r"(LDG|LDGSTS)\.E\S*U8"
        assert kernel.count(loads) and not plain.count(loads), kernel.name
