"""The sums of programs' parts."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.common.partial_sums import partial_sums

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA or the interpreter")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count, width", [(1, 1), (3, 8), (256, 16), (1025, 6), (2000, 70)])
def test_sums_of_rows(count: int, width: int, dtype: torch.dtype, transposed: bool) -> None:
    """Beside other columns, which are left alone, into a new tensor or a given one."""
    parts = torch.randn(count, width, device=DEVICE, dtype=dtype)
    given = parts.t().contiguous().t() if transposed else torch.cat([parts, parts], 1)[:, :width]
    exact = parts.double().sum(0)
    out = torch.full((width + 2,), 7.0, device=DEVICE, dtype=dtype)
    assert torch.equal(partial_sums(given, out[1:-1]), partial_sums(given))
    assert out[0] == out[-1] == 7
    bound = torch.finfo(dtype).eps * parts.double().abs().sum(0)
    assert ((out[1:-1].double() - exact).abs() <= bound).all()
