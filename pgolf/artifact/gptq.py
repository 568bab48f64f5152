"""GPTQ (arXiv 2210.17323): quantising a matrix to integer codes with a float16 scale for each row."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from pgolf.artifact.hessians import DAMPINGS
from pgolf.artifact.quantized import GROUP_COLUMNS, SMALLEST_SCALE, QuantizeError
from pgolf.model.second_moments import exact_float32_products

BLOCK_COLUMNS = 128  # columns that are rounded before one product corrects the remaining ones
LARGEST_CLIPPED = 0.1  # share of a row's norm that clipping may remove without a warning


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    clip_sigmas: float,
    clip_range: int,
    name: str = "weight",
    fine: Collection[int] = (),
) -> tuple[Tensor, Tensor]:
    """Round a matrix to integer codes so that its products with the calibration inputs change least.

    Rounds columns in the order of decreasing Hessian diagonal. The columns after each one are changed to compensate its
    error, by the Cholesky factor of the inverse Hessian. Columns whose inputs were always zero get codes 0.

    Args:
        weight: float [rows, columns], at least 2 columns, on any device.
        hessian: float [columns, columns], symmetric, on the same device. Its scale has no effect.
        clip_sigmas: the largest code stands for this many standard deviations of a row.
        clip_range: largest code R; codes are in [-R, R].
        name: the weight's name in warnings.
        fine: groups of 64 columns with codes up to 127, which reach as far as R elsewhere (AWQ-lite, parameter-golf
            PR #1908).

    Returns codes int8 [rows, columns] and scales float16 [rows], clip_sigmas · std / R of each row.
    Raises QuantizeError for a wrong shape, a number that is not finite, or a Hessian that no damping makes invertible.
    Warns if the smallest damping was not enough, and if clipping removes much of a row, for example an outlier.
    """
    _check_gptq(weight, hessian, clip_range)
    weight = weight.float()
    scales = _row_scales(weight, clip_sigmas, clip_range)
    _warn_of_clipping(name, weight, scales.float() * clip_range)
    with exact_float32_products():
        factor, order, dead = inverse_factor(hessian, name)
        work = weight.T[order]  # transposed, so that a column is contiguous
        work[dead] = 0
        places = {j for j, column in enumerate(order.tolist()) if column // GROUP_COLUMNS in fine} if fine else set()
        codes = _round_columns(work, factor, scales.float(), clip_range, places)
    in_order = torch.empty_like(codes)
    in_order[order] = codes
    return in_order.T.contiguous(), scales


def _round_columns(work: Tensor, factor: Tensor, scale: Tensor, clip_range: int, fine: set[int]) -> Tensor:
    """Return the codes [columns, rows] of ``work``, the transposed and ordered weight, which is overwritten.

    Those of ``fine`` columns reach 127.
    """
    columns, grids = work.size(0), ((scale, clip_range), (scale * (clip_range / 127), 127))
    codes = torch.empty_like(work, dtype=torch.int8)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        block, errors = work[start:stop], torch.empty_like(work[start:stop])
        within = factor[start:stop, start:stop]
        for j in range(stop - start):
            step, reach = grids[start + j in fine]
            code = torch.round(block[j] / step).clamp_(-reach, reach)
            codes[start + j] = code
            errors[j] = (block[j] - code * step) / within[j, j]
            block[j + 1 :] -= within[j, j + 1 :, None] * errors[j]
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return codes


def _row_scales(weight: Tensor, clip_sigmas: float, clip_range: int) -> Tensor:
    scales = (clip_sigmas * weight.std(dim=1) / clip_range).clamp_min(SMALLEST_SCALE).half()
    if not torch.isfinite(scales).all():
        raise QuantizeError("a row's scale does not fit float16: its weights are too large, training has diverged")
    return scales


def _warn_of_clipping(name: str, weight: Tensor, reach: Tensor) -> None:
    lost = (weight.abs() - reach[:, None]).clamp_min(0)
    shares = (lost.norm(dim=1) / weight.norm(dim=1).clamp_min(SMALLEST_SCALE)).tolist()
    rows = [row for row, share in enumerate(shares) if share > LARGEST_CLIPPED]
    if rows:
        worst = max(rows, key=shares.__getitem__)
        others = f", and {len(rows) - 1} more rows are alike" if len(rows) > 1 else ""
        warnings.warn(
            f"{name}: clipping takes {shares[worst]:.0%} of row {worst}'s norm away, whose outlier of "
            f"{weight[worst].abs().max():.3g} codes reach only up to {reach[worst]:.3g}{others}: raise its clip_sigmas",
            stacklevel=3,
        )


def inverse_factor(hessian: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, with UᵀU = H⁻¹ in the order of decreasing diagonal; the order; the columns without input."""
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered, mean = hessian[order][:, order], diagonal.mean()
    for damping in DAMPINGS:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            if damping != DAMPINGS[0]:
                message = f"the Hessian needed damping {damping:g} instead of {DAMPINGS[0]:g}"
                warnings.warn(f"{name}: {message}", stacklevel=3)
            return factor, order, dead[order]
    raise QuantizeError(
        f"the Hessian is not positive definite even with damping {DAMPINGS[-1]:g} of its mean diagonal {mean:.3g}: "
        "it is no sum of xᵀx; check the calibration"
    )


def _check_gptq(weight: Tensor, hessian: Tensor, clip_range: int) -> None:
    if weight.ndim != 2 or weight.size(1) < 2:
        raise QuantizeError(f"weight must be [rows, columns] with at least 2 columns, got shape {list(weight.shape)}")
    columns = weight.size(1)
    if hessian.shape != (columns, columns):
        raise QuantizeError(f"hessian must be [{columns}, {columns}] like weight's columns, got {list(hessian.shape)}")
    if not 1 <= clip_range <= 127:
        raise QuantizeError(f"clip_range must be from 1 to 127 so that codes fit int8, got {clip_range}")
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not torch.isfinite(tensor).all():
            raise QuantizeError(f"{name} has numbers that are not finite: training or calibration has diverged")
