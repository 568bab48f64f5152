"""What the kernels of grouped adapters become on GPUs that need not be there, at the record model's shapes."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.common.launch import launch_parameters
from pgolf.kernels.low_rank import triton as family
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
KERNELS = ("_forward_kernel", "_hidden_kernel", "_input_kernel", "_weights_kernel")


def limits(kernel: Compiled, shape: str) -> dict[str, int]:
    """Registers and shared memory of sm_90 with which two programs fit a multiprocessor.

    A tile of 64 elements a thread has to, and one of 128 needs a multiprocessor of its own.
    """
    rows, rank, _, _ = SHAPES[shape]
    case = "wide" if rank > 128 else kernel.name.removeprefix("_").removesuffix("_kernel")
    if case not in ("wide", "weights") and rows < 192 * GROUPS:
        case = "short"
    tuned = launch_parameters("low_rank", case, torch.device("cpu"))
    columns = max(128, tuned["columns"]) if kernel.name == "_forward_kernel" else tuned["columns"]
    alone = tuned["rows"] * columns > 64 * 32 * tuned["warps"]
    threads = 32 * tuned["warps"]
    return {} if alone else dict(registers=min(255, 65536 // (2 * threads) // 8 * 8), shared=116_000)


def compile_all(capability: int, shape: str, dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    """Every kernel of the family: the forward without and with a residual, the weights' for A and for B."""
    rows, rank, parts, width = SHAPES[shape]
    x, h = torch.empty(rows, D, dtype=dtype), torch.empty(rows, len(parts) * rank, dtype=dtype)
    A, B = (torch.empty(GROUPS, *sizes, dtype=dtype) for sizes in ((len(parts) * rank, D), (sum(parts), rank)))
    offsets = torch.zeros(GROUPS + 1, dtype=torch.int32)
    with compiling(capability) as kernels:
        y, _ = family.low_rank_forward(x, A, B, offsets, None, 1.0, parts, width, keep=True)
        family.low_rank_forward(x, A, B, offsets, y, 1.0, parts, width, keep=True)
        family.low_rank_backward(x, y, x, A, B, offsets, h, 1.0, parts)
    assert [kernel.name for kernel in kernels] == ["_forward_kernel", *KERNELS, "_weights_kernel"]
    return kernels


ON_OTHER_CHIPS = [("attention", 80), ("rank 256", 80), ("rank 16", 80), ("attention", 100), ("head", 100)]


@pytest.mark.parametrize("shape, capability", [*((shape, 90) for shape in SHAPES), *ON_OTHER_CHIPS])
def test_products(shape: str, capability: int) -> None:
    for kernel in compile_all(capability, shape):
        hopper = capability == 90
        check(kernel, matrix_products=hopper, streams=True, **(limits(kernel, shape) if hopper else {}))
        assert kernel.count("STG") == kernel.count(r"STG\.E\S*\.128"), "stores narrower than 16 bytes"
        if hopper and shape != "rank 16":
            assert kernel.count("LDGSTS") == kernel.count(r"LDGSTS\.E\S*\.128"), "loads narrower than 16 bytes"


def test_float32() -> None:
    for kernel in compile_all(90, "attention", torch.float32):
        check(kernel)


def test_rows_and_groups_are_no_constants() -> None:
    """Another number of either compiles nothing."""
    _, rank, parts, width = SHAPES["mlp"]
    with compiling(90) as kernels:
        for rows, groups in ((131_072, 64), (100_001, 63), (65_537, 1)):
            x, h = torch.empty(rows, D).bfloat16(), torch.empty(rows, rank).bfloat16()
            A, B = torch.empty(groups, rank, D).bfloat16(), torch.empty(groups, *parts, rank).bfloat16()
            offsets = torch.zeros(groups + 1, dtype=torch.int32)
            y, _ = family.low_rank_forward(x, A, B, offsets, None, 1.0, parts, width, keep=True)
            family.low_rank_backward(None, y, x, A, B, offsets, h, 1.0, parts)
    assert len(kernels) == 5
