"""Newton-Schulz orthogonalisation with per-step coefficients, for Muon.

For a matrix G the iteration drives all singular values towards 1 and keeps the singular vectors:

    X = G / (norm_scale ‖G‖_F + eps)
    for (a, b, c) in coefficients:   A = X Xᵀ;   B = b A + c A²;   X = a X + B X

so σ goes to a σ + b σ³ + c σ⁵ a step. The Polar Express tuples (Amsel et al., arXiv 2505.16932) are the minimax-optimal
choice for a given number of steps and lower bound on σ; `polar_express_coefficients` computes them. With the defaults
they are the tuples of modded-nanogpt and parameter-golf PR #1344 / #1874 to 1e-12, and map σ in [1e-3, 1] into
[0.859, 1.141].

Shapes: G is [..., m, n]; tall matrices (m > n) are iterated as their transpose.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ._launch import select

Coefficients = tuple[tuple[float, float, float], ...]

QUINTIC: tuple[float, float, float] = (3.4445, -4.775, 2.0315)  # Jordan's fixed tuple (Muon, 2024)
ALGORITHMS = ("auto", "standard")


def _optimal_quintic(low: float, high: float) -> np.ndarray:
    """Odd quintic (a, b, c) that minimises max |1 - p(σ)| on [low, high], by Remez exchange in float64."""
    if low / high > 1 - 5e-6:  # the limit, Padé: the exchange would divide 0 by 0
        return np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
    inner, outer = (3 * low + high) / 4, (low + 3 * high) / 4
    error, previous = np.inf, 0.0
    while abs(error - previous) > 1e-15:
        previous = error
        points = np.array([low, inner, outer, high])
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner, outer = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
        inner, outer = min(inner, outer), max(inner, outer)
    return np.array([a, b, c])


@lru_cache
def polar_express_coefficients(
    steps: int = 5, lower: float = 1e-3, safety: float = 0.02, cushion: float = 0.02
) -> Coefficients:
    """The Polar Express tuples (a, b, c), one a step, for any number of steps.

    ``lower`` bounds the singular values from below. ``safety`` shrinks the argument of every polynomial but the last
    by 1 + safety, so that rounding cannot push a value out of the interval; ``cushion`` bounds the interval's ratio
    from below for the same reason. Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    low, high, tuples = lower, 1.0, []
    powers = np.array([1, 3, 5])
    for step in range(steps):
        abc = _optimal_quintic(max(low, cushion * high), high)
        if cushion * high > low:  # the wider interval is not centred at 1 any more: rescale so that it is
            abc = abc * 2 / (abc @ low**powers + abc @ high**powers)
        if step < steps - 1:
            abc = abc / (1 + safety) ** powers
        tuples.append(tuple(float(value) for value in abc))
        low = float(abc @ low**powers)
        high = 2 - low
    return tuple(tuples)


POLAR_EXPRESS: Coefficients = polar_express_coefficients(5)


def _tuples(coefficients: Coefficients, steps: int) -> Coefficients:
    """One tuple a step: POLAR_EXPRESS is generated for the number asked, a single tuple is repeated."""
    if coefficients is POLAR_EXPRESS or coefficients == POLAR_EXPRESS:
        return polar_express_coefficients(steps)
    if len(coefficients) == 1:
        return tuple(coefficients) * steps
    if len(coefficients) != steps:
        raise ValueError(f"coefficients: {len(coefficients)} tuples for {steps} steps; give one, or one a step")
    return tuple(coefficients)


def newton_schulz_reference(
    G: torch.Tensor,
    steps: int = 5,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch; the contract of `newton_schulz`, whose arguments it shares. Arithmetic as in PR #1874."""
    X = G.to(dtype or torch.bfloat16)
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * norm_scale + eps)
    for a, b, c in _tuples(coefficients, steps):
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    X = X.mT if tall else X
    return X.contiguous() if out is None else out.copy_(X)


_IMPLEMENTATIONS = {"reference": newton_schulz_reference}


def newton_schulz(
    G: torch.Tensor,
    steps: int = 5,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Orthogonalise every matrix of ``G``.

    Args:
        G: [..., m, n] floating point, any m, n >= 1.
        steps: iterations. With the default coefficients any number has its own optimal tuples.
        coefficients: one (a, b, c) a step, or a single one for all steps.
        algorithm: ``standard`` (the formula above) or ``auto``.
        dtype: of the arithmetic and the result; None is bfloat16.
        norm_scale: factor on the Frobenius norm before dividing (1.02 in modded-nanogpt, 1 in PR #1874).
        eps: added to that norm.
        out: [..., m, n], takes the result.

    Returns the orthogonalised matrices, [..., m, n], in ``dtype`` (or ``out``).
    Raises ValueError or TypeError for a wrong shape, dtype, algorithm or number of tuples.
    """
    if G.ndim < 2:
        raise ValueError(f"G must be [..., m, n], got shape {tuple(G.shape)}")
    if not G.is_floating_point():
        raise TypeError(f"G must be floating point, got {G.dtype}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if out is not None and (out.shape != G.shape or out.device != G.device):
        raise ValueError(f"out must be {tuple(G.shape)} on {G.device}, got {tuple(out.shape)} on {out.device}")
    _tuples(coefficients, steps)
    run = select("newton_schulz", _IMPLEMENTATIONS, G)
    return run(G, steps, coefficients, algorithm=algorithm, dtype=dtype, norm_scale=norm_scale, eps=eps, out=out)
