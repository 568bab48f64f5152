"""Low-rank corrections of quantised matrices (LQER, arXiv 2402.02446)."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.artifact.hessians import DAMPINGS
from pgolf.artifact.quantized import ASYMMETRIC_KEYS, SMALLEST_SCALE, SYMMETRIC_KEYS, largest_code
from pgolf.config import RunConfig
from pgolf.kernels.dequant import LowRankFactors, dequantize

GRID_SHARES = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # 2-bit scales to try, relative to that of the largest element


def low_rank_factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation A B of a residual [rows, columns]: A = U S [rows, rank], B = Vᵀ [rank, columns]."""
    left, singular, right = torch.linalg.svd(residual.float(), full_matrices=False)
    return left[:, :rank] * singular[:rank], right[:rank]


def lqer_pack(A: Tensor, B: Tensor, group: int) -> LowRankFactors:
    """Pack factors as two's-complement codes: A in 2 bits with one scale, B in 4 bits with one for ``group`` elements.

    The scales put the largest magnitude at 1.5 and 7.5, between the ends of the ranges [-2, 1] and [-8, 7]; a largest
    element that is positive is clipped.

    Args:
        A: float [rows, rank]. B: float [rank, columns]. group: a divisor of rank · columns.

    Returns qA int8 [rows, rank], sA float16 [], qB int8 [rank, columns], sB float16 [rank · columns / group].
    Raises ValueError if group does not divide rank · columns.
    """
    if group < 1 or B.numel() % group:
        raise ValueError(f"group must divide the {B.numel()} elements of B, got {group}: use lqer_pack_symmetric")
    return LowRankFactors(*_pack_first(A), *_pack_second(B, group))


def lqer_pack_symmetric(A: Tensor, B: Tensor, bits: int = 4) -> LowRankFactors:
    """Pack factors as codes in ±R, R = 2^(bits-1) - 1, with one scale for each row of each factor.

    Args:
        A: float [rows, rank]. B: float [rank, columns]. bits: 2 to 8.

    Returns qA int8 [rows, rank], sA float16 [rows], qB int8 [rank, columns], sB float16 [rank].
    """
    return LowRankFactors(*_pack_rows(A, bits), *_pack_rows(B, bits))


def fit_low_rank(
    residual: Tensor, hessian: Tensor, rank: int, group: int | None = None, bits: int = 4
) -> LowRankFactors:
    """Fit packed factors to a residual E so that the outputs' error tr((E - A B) H (E - A B)ᵀ) is small.

    The columns of A are the leading left singular vectors of E H^½, the directions in which E changes the outputs most.
    A is rounded with the scale that loses least. B is fitted to the rounded A by least squares, whose solution does not
    depend on H, and rounded. PR #1874 takes the singular vectors of E and rounds A times the singular values, whose one
    scale suits the first column only.

    Args:
        residual: E, float [rows, columns].
        hessian: H, float [columns, columns]. It is damped as in `gptq`.
        rank: of the factors.
        group: elements of B with one scale, as in `lqer_pack`; None packs in ``bits`` as `lqer_pack_symmetric`.
    """
    exact, damped = residual.double(), hessian.double()
    damped = damped + DAMPINGS[0] * damped.diagonal().mean() * torch.eye(len(damped), device=damped.device)
    weighted = exact @ torch.linalg.cholesky(damped)
    directions = _leading_directions(weighted, rank)
    grids = [_pack_rows(directions, bits)] if group is None else [_pack_first(directions, s) for s in GRID_SHARES]
    codes, scale = max(grids, key=lambda grid: _explained(_unpacked(*grid), weighted))
    B = torch.linalg.pinv(_unpacked(codes, scale)) @ exact
    return LowRankFactors(codes, scale, *(_pack_rows(B, bits) if group is None else _pack_second(B, group)))


def outputs_error(residual: Tensor, hessian: Tensor) -> float:
    """Return tr(E H Eᵀ), the squared error of the calibration outputs due to a residual E [rows, columns]."""
    exact = residual.double()
    return float(((exact @ hessian.double()) * exact).sum())


def _leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """Return the left singular vectors [rows, rank] of the largest singular values, from the smaller Gram matrix."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:].flip(1)
    right = torch.linalg.eigh(matrix.T @ matrix)[1][:, -rank:].flip(1)
    return torch.nn.functional.normalize(matrix @ right, dim=0)


def _explained(first: Tensor, weighted: Tensor) -> float:
    """Return the squared norm of ``weighted`` projected on the columns of ``first``; -1 if one of these is zero."""
    if not first.any(dim=0).all():
        return -1.0
    return float((torch.linalg.qr(first)[0].T @ weighted).square().sum())


def _unpacked(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.double() * scale.double().reshape(-1, 1)


def _pack_first(A: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pack A in 2 bits, with ``share`` of the scale that puts its largest element at 1.5."""
    scale = (_largest(A.float().reshape(-1), 1.5).float() * share).half()
    return _codes(A, scale, -2, 1), scale


def _pack_second(B: Tensor, group: int) -> tuple[Tensor, Tensor]:
    grouped = B.float().reshape(-1, group)
    scale = _largest(grouped, 7.5)
    return _codes(grouped, scale[:, None], -8, 7).reshape(B.shape), scale


def _pack_rows(factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    clip_range = largest_code(bits)
    scale = _largest(factor.float(), clip_range)
    return _codes(factor, scale[:, None], -clip_range, clip_range), scale


def _largest(values: Tensor, code: float) -> Tensor:
    """Return the float16 scales that put the largest magnitude of each row at ``code``."""
    return (values.abs().amax(dim=-1) / code).clamp_min(SMALLEST_SCALE).half()


def _codes(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.round(values.float() / scale.float()).clamp_(low, high).to(torch.int8)


def pack_correction(
    residual: Tensor, hessian: Tensor, config: RunConfig
) -> tuple[LowRankFactors, tuple[str, ...], str]:
    """Return a residual's packed factors, the keys of their entries, and the suffix of the meta string."""
    rank, bits = config.lqer_rank, config.lqer_factor_bits
    grouped = config.lqer_asym_enabled and rank * residual.size(1) % config.lqer_asym_group == 0
    group = config.lqer_asym_group if grouped else None
    if config.lqer_weighted:
        factors = fit_low_rank(residual, hessian, rank, group, bits)
    else:
        A, B = low_rank_factors(residual, rank)
        factors = lqer_pack_symmetric(A, B, bits) if group is None else lqer_pack(A, B, group)
    return (factors, ASYMMETRIC_KEYS, "+lqer_asym") if grouped else (factors, SYMMETRIC_KEYS, "+lqer")


def worth_correcting(residual: Tensor, hessian: Tensor, config: RunConfig) -> float:
    """Return the number by which tensors are ranked for a correction.

    With lqer_weighted it is the outputs' error that the correction removes, else the residual's norm.
    """
    if not config.lqer_weighted:
        return torch.linalg.vector_norm(residual).item()
    none = torch.zeros(residual.shape, dtype=torch.int8, device=residual.device)
    correction = dequantize(none, residual.new_ones(len(residual)), pack_correction(residual, hessian, config)[0])
    return outputs_error(residual, hessian) - outputs_error(residual - correction, hessian)
