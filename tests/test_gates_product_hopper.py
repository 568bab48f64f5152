"""What the Hopper products beside the MLP's become, on a GPU that need not be there."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.common import hopper_product as hopper
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import check, compiling


@pytest.mark.parametrize("updated", [False, True])
def test_project_on_an_h100(updated: bool) -> None:
    tokens, heads, kv_heads = 98_304, 8, 4
    x, weight = torch.empty(tokens, 512).bfloat16(), torch.empty(1024, 512).bfloat16()
    cos, sin, out = (torch.empty(tokens, columns).bfloat16() for columns in (8, 8, 1040))
    update = torch.empty(tokens, 1024).bfloat16() if updated else None
    with compiling(90) as kernels:
        assert hopper.projection_fits(x, weight, cos, out, heads, kv_heads, 64, 6)
        assert not hopper.projection_fits(x, weight, cos[:, :4], out, heads, kv_heads, 64, 6)
        assert not hopper.projection_fits(x, weight, cos, out, heads, kv_heads, 32, 6)
        given = x, weight, cos, sin, torch.empty(heads), update, out, torch.empty(12, tokens)
        hopper.normalised_projection(*given, eps=1e-7, unit=0.18, stages=6)
    (kernel,) = kernels
    check(kernel, registers=168, matrix_products=True)
    assert kernel.count(r"HGMMA\.64x128x16") == kernel.count("HGMMA") == 2 * 2 * 8
    assert kernel.count(r"WARPGROUP\.DEPBAR") == 2 * 3
    # Heads are whole in four lanes: sums by two exchanges, nothing through shared memory, 16 bytes at a time.
    assert kernel.count("SHFL") == 2 * 2 * 8 and kernel.count("STS") <= 2 and not kernel.count("STSM")
    assert kernel.count(r"STG\.E\S*\.128") == 2 * 16 and kernel.count(r"LDG\.E\S*\.128") == 2 * (8 + 16 * updated)
