"""What the kernels of grouped adapters become on GPUs that need not be there, at the record model's shapes."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels import low_rank as family
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

GROUPS, D = 64, 512
# rows, rank, parts, width
SHAPES = {
    "attention": (131_072, 128, (512, 256, 256), 1088),
    "mlp": (131_072, 128, (512,), 512),
    "head": (3072, 128, (8192,), 8192),
    "rank 256": (131_072, 256, (512, 256, 256), 1088),
    "rank 80": (32_768, 80, (512,), 512),
    "rank 16": (32_768, 16, (512,), 512),
}
# Of sm_90: with 256 threads two programs fit a multiprocessor.
REGISTERS = {"_forward_kernel": 128, "_hidden_kernel": 128, "_input_kernel": 128, "_weights_kernel": 128}
SHARED = 110_000  # bytes, likewise


def compile_all(capability: int, shape: str, dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    """Every kernel of the family; those of the gradients of A and B are two, or one where all constants agree."""
    rows, rank, parts, width = SHAPES[shape]
    x, h = torch.empty(rows, D, dtype=dtype), torch.empty(rows, len(parts) * rank, dtype=dtype)
    A, B = (torch.empty(GROUPS, *sizes, dtype=dtype) for sizes in ((len(parts) * rank, D), (sum(parts), rank)))
    offsets = torch.zeros(GROUPS + 1, dtype=torch.int32)
    with compiling(capability) as kernels:
        y, _ = family._forward(x, A, B, offsets, 1.0, parts, width, True)
        family._backward(x, y, x, A, B, offsets, h, 1.0, parts, True, True, True)
    assert [kernel.name for kernel in kernels] == [*REGISTERS, "_weights_kernel"]
    return kernels


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: str, capability: int) -> None:
    for kernel in compile_all(capability, shape):
        hopper = capability == 90
        limits = dict(registers=REGISTERS[kernel.name], shared=SHARED) if hopper else {}
        check(kernel, matrix_products=hopper, streams=True, **limits)
        assert kernel.count("STG") == kernel.count(r"STG\.E\S*\.128"), "stores narrower than 16 bytes"
        if hopper and shape != "rank 16":
            assert kernel.count("LDGSTS") == kernel.count(r"LDGSTS\.E\S*\.128"), "loads narrower than 16 bytes"


@pytest.mark.parametrize("capability", [80, 90])
def test_float32(capability: int) -> None:
    for kernel in compile_all(capability, "attention", torch.float32):
        check(kernel)


def test_rows_and_groups_are_no_constants() -> None:
    """Another number of either compiles nothing."""
    _, rank, parts, width = SHAPES["mlp"]
    with compiling(90) as kernels:
        for rows, groups in ((131_072, 64), (100_001, 63), (65_537, 1)):
            x, h = torch.empty(rows, D).bfloat16(), torch.empty(rows, rank).bfloat16()
            A, B = torch.empty(groups, rank, D).bfloat16(), torch.empty(groups, *parts, rank).bfloat16()
            offsets = torch.zeros(groups + 1, dtype=torch.int32)
            y, _ = family._forward(x, A, B, offsets, 1.0, parts, width, True)
            family._backward(None, y, x, A, B, offsets, h, 1.0, parts, True, True, True)
    assert len(kernels) == 5
