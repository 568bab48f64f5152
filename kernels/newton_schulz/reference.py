"""Newton-Schulz in plain PyTorch: the contract of the kernels, and the derivative of the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .polar_express import POLAR_EXPRESS, AnyCoefficients, Coefficients, coefficients_by_step

ROW_NORM_FLOOR = 1e-7


class Settings(NamedTuple):
    """The arguments of `newton_schulz` besides the matrices, in the order in which the operators take them."""

    coefficients: Coefficients  # one tuple a step
    algorithm: str
    dtype: torch.dtype
    norm_scale: float
    eps: float
    row_normalize: bool


def newton_schulz_reference(
    G: torch.Tensor,
    steps: int = 5,
    coefficients: AnyCoefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    row_normalize: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `newton_schulz`, whose arguments it shares, in plain PyTorch, with the arithmetic of PR #1874."""
    tuples = coefficients_by_step(coefficients, steps)
    settings = Settings(tuples, algorithm, dtype or torch.bfloat16, norm_scale, eps, row_normalize)
    X = orthogonalize(G, settings)
    return X.contiguous() if out is None else out.copy_(X)


def banks_reference(banks: Sequence[torch.Tensor], out: Sequence[torch.Tensor], settings: Settings) -> None:
    """Orthogonalise every bank [..., m, n] into its tensor of ``out``."""
    for G, target in zip(banks, out, strict=True):
        target.copy_(orthogonalize(G, settings))


def orthogonalize(G: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Return the orthogonalised matrices of G [..., m, n] in ``settings.dtype``; autograd differentiates it."""
    if not G.numel():
        return G.to(settings.dtype)
    gram = settings.algorithm == "gram"
    storage = torch.float16 if gram and settings.dtype.itemsize == 2 else settings.dtype
    if settings.row_normalize:
        G = G.to(storage)
        G = G / G.float().norm(dim=-1, keepdim=True).clamp_min(ROW_NORM_FLOOR).to(storage)
    # Divide by a power of two first, which changes no bit, so that no square overflows or vanishes.
    _, exponent = torch.frexp(G.detach().abs().amax(dim=(-2, -1), keepdim=True).float())
    power = torch.exp2(-exponent.clamp(min=-126).to(torch.promote_types(G.dtype, torch.float32)))
    X, eps = (G * power).to(storage), (settings.eps * power).to(storage)
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * settings.norm_scale + eps)
    X = (_iterate_gram if gram else _iterate)(X, settings.coefficients).to(settings.dtype)
    return X.mT if tall else X


def gram_segments(steps: int) -> list[range]:
    """List the steps of the Gram form between restarts: the first step, then two at a time."""
    starts = [0, *range(1, steps, 2), steps]
    return [range(begin, end) for begin, end in zip(starts, starts[1:], strict=False)]


def _iterate(X: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    for a, b, c in coefficients:
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X


def _iterate_gram(X: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """Accumulate every product with its addends in float32 or better, and round it once to X's dtype."""

    def rounded(M: torch.Tensor, *, symmetric: bool = True) -> torch.Tensor:
        # Rounding makes a product of symmetric matrices asymmetric: keep one triangle.
        return ((M.triu() + M.triu(1).mT) if symmetric else M).to(X.dtype).to(wide)

    def polynomial(R: torch.Tensor, step: int) -> torch.Tensor:
        a, b, c = coefficients[step]
        return rounded(a * identity + b * R + c * (R @ R))

    wide = torch.promote_types(X.dtype, torch.float32)
    Y, identity = X.to(wide), torch.eye(X.size(-2), dtype=wide, device=X.device)
    for first, *later in gram_segments(len(coefficients)):
        R = rounded(Y @ Y.mT)
        Q = P = polynomial(R, first)
        for step in later:
            R = rounded(rounded(R @ P) @ P)
            P = polynomial(R, step)
            Q = rounded(Q @ P)
        Y = rounded(Q @ Y, symmetric=False)
    return Y.to(X.dtype)
