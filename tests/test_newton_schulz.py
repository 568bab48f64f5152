"""Newton-Schulz and its coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pgolf.kernels import _launch
from pgolf.kernels.newton_schulz import POLAR_EXPRESS, QUINTIC, newton_schulz, polar_express_coefficients

# The tuples of parameter-golf PR #1344 / #1874 (specification 3.1).
PUBLIC = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def scalar_map(coefficients, sigma: np.ndarray) -> np.ndarray:
    for a, b, c in coefficients:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def test_generator_gives_the_public_tuples() -> None:
    assert np.abs(np.array(POLAR_EXPRESS) - np.array(PUBLIC)).max() < 1e-12


@pytest.mark.parametrize(("steps", "width"), [(3, 0.9), (5, 0.15), (6, 0.05), (8, 0.021), (12, 0.021)])
def test_any_number_of_steps_drives_singular_values_to_one(steps: int, width: float) -> None:
    mapped = scalar_map(polar_express_coefficients(steps), np.geomspace(3e-3, 1, 10_000))
    assert np.abs(mapped - 1).max() < width


def test_fixed_and_polar_bands() -> None:
    sigma = np.geomspace(1e-3, 1, 100_000)
    low, high = (f(scalar_map(POLAR_EXPRESS, sigma)) for f in (np.min, np.max))
    assert (low, high) == (pytest.approx(0.859, abs=1e-3), pytest.approx(1.141, abs=1e-3))
    fixed = scalar_map((QUINTIC,) * 5, sigma)
    assert (fixed.min(), fixed.max()) == (pytest.approx(0.47, abs=1e-2), pytest.approx(1.20, abs=1e-2))


@pytest.mark.parametrize("layout", ["wide", "tall"])
def test_golden(golden, layout: str) -> None:
    G = torch.from_numpy(golden("optim")["ns/in"])
    G = G if layout == "wide" else G.mT
    expected = torch.from_numpy(golden("optim")[f"ns/out_bf16_{layout}"])
    out = newton_schulz(G).float()
    assert (out - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (24, 40), (3, 40, 24), (2, 3, 16, 16), (0, 4, 5)])
def test_fp64_error_is_bounded_by_rounding(device, shape: tuple[int, ...]) -> None:
    G = torch.randn(shape, device=device)
    exact = newton_schulz(G.double(), dtype=torch.float64)
    assert exact.shape == G.shape and exact.dtype == torch.float64
    fp32 = newton_schulz(G, dtype=torch.float32)
    assert (fp32.double() - exact).norm() <= 1e-3 * exact.norm() + 1e-9
    assert newton_schulz(G).dtype == torch.bfloat16


def test_result_is_semi_orthogonal(device) -> None:
    out = newton_schulz(torch.randn(4, 32, 96, device=device), dtype=torch.float32)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.85 and values.max() < 1.15


def test_zero_stays_zero_and_nan_stays_in_its_matrix() -> None:
    G = torch.randn(3, 8, 16)
    G[0] = 0
    G[1, 2, 3] = float("nan")
    out = newton_schulz(G)
    assert (out[0] == 0).all() and out[1].isnan().any() and not out[2].isnan().any()


def test_out_is_written() -> None:
    G = torch.randn(2, 16, 8)
    out = torch.full_like(G, float("nan"), dtype=torch.bfloat16)
    assert newton_schulz(G, out=out) is out
    assert torch.equal(out, newton_schulz(G))


def test_errors_name_the_argument() -> None:
    G = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"G must be \[..., m, n\]"):
        newton_schulz(G[0])
    with pytest.raises(TypeError, match="floating point"):
        newton_schulz(G.long())
    with pytest.raises(ValueError, match="algorithm"):
        newton_schulz(G, algorithm="fast")
    with pytest.raises(ValueError, match="2 tuples for 5 steps"):
        newton_schulz(G, coefficients=(QUINTIC, QUINTIC))
    with pytest.raises(ValueError, match="out must be"):
        newton_schulz(G, out=torch.empty(3, 4))
    with pytest.raises(ValueError, match="at least 1"):
        polar_express_coefficients(0)


def test_choosing_the_backend(monkeypatch) -> None:
    with pytest.raises(ValueError, match="none of them"):
        _launch.set_backend("cuda")
    monkeypatch.setenv("PGOLF_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="PGOLF_KERNELS=reference|need CUDA"):
        newton_schulz(torch.randn(4, 4))
    monkeypatch.setenv("PGOLF_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="PGOLF_KERNELS"):
        newton_schulz(torch.randn(4, 4))
