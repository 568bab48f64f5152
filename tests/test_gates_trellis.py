"""What the trellis kernel becomes on GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from pgolf.kernels.trellis.triton import trellis_gptq_triton
from tests.gates import check, compiling


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("states", [1, 8, 128])
def test_the_kernel_keeps_within_limits(states: int, capability: int) -> None:
    B, R, C = 2, 512, 64
    with compiling(capability) as kernels:
        trellis_gptq_triton(
            torch.randn(B, R, C),
            torch.eye(C).expand(B, C, C).contiguous(),
            torch.ones(B, R),
            torch.ones(B, C),
            states=states,
            path_length=256,
            shrink=torch.ones(B, R),
        )
    assert kernels
    for kernel in kernels:
        check(kernel, registers=128, shared=4096)
