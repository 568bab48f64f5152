"""Dequantisation: integer codes and scales, with an optional low-rank correction, to weights.

    W = q · scale + A B,    A = qA · sA  [rows, rank],    B = qB · sB  [rank, columns]

A row of codes has one scale, or one for every group of columns. The correction (LQER, arXiv 2402.02446) is a rank-4
approximation of what rounding lost; its factors are quantised themselves. Two packings of them occur in the artifact
of parameter-golf PR #1874 and are told apart by the shapes of their scales:

    asymmetric  qA in [-2, 1] with one sA; qB in [-8, 7] with one sB for every group of the flattened qB
    symmetric   qA and qB in [-7, 7] with one scale a row

The arithmetic is float32 and fixed to the last bit: q · scale is rounded once; A B is accumulated over the rank in
ascending order by fused multiply-adds that start at zero; the sum is rounded to float32 and then to the output's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._launch import select


class LowRankFactors(NamedTuple):
    """Quantised factors of a low-rank correction.

    qA: int8 [rows, rank]. sA: float16 or float32, one element [] or one a row [rows].
    qB: int8 [rank, columns]. sB: float16 or float32 [n], one for every rank · columns / n elements of the flattened qB.
    """

    qA: torch.Tensor
    sA: torch.Tensor
    qB: torch.Tensor
    sB: torch.Tensor


def dequantize_reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    low_rank: LowRankFactors | None = None,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Plain PyTorch; the contract of `dequantize`, whose arguments it shares."""
    weight = _scaled(q, scale.reshape(-1))
    if low_rank is not None:
        qA, sA, qB, sB = low_rank
        weight = weight + _fused_product(_scaled(qA, sA.reshape(-1)), _scaled(qB, sB))
    if out is not None:
        return out.copy_(weight)
    return weight if dtype is None else weight.to(dtype)


def _scaled(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes times scales in float32; every scale serves an equal run of the flattened codes."""
    if q.numel() == 0:
        return q.float()
    return (q.reshape(scales.numel(), -1).float() * scales.float().unsqueeze(1)).reshape(q.shape)


def _fused_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B by float32 fused multiply-adds. Float64 holds each product exactly, so no setting (TF32) can change them."""
    product = torch.zeros(A.size(0), B.size(1), device=A.device)
    for k in range(A.size(1)):
        product = torch.addcmul(product.double(), A[:, k, None].double(), B[k].double()).float()
    return product


_DEQUANTIZE = {"reference": dequantize_reference}


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    low_rank: LowRankFactors | None = None,
    *,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Weights from codes: q · scale, plus the low-rank correction if there is one.

    Args:
        q: int8 [rows, columns].
        scale: float16 or float32, [rows] or [rows, groups]; group g serves columns/groups columns from
            g · columns/groups on.
        low_rank: factors of the correction, in either packing.
        out: [rows, columns] of any floating dtype, written in place of a new tensor.
        dtype: dtype of a new tensor; float32 unless given. With ``out`` it must be left out or be out's dtype.

    Returns [rows, columns]. Raises ValueError or TypeError naming the argument with the wrong shape, dtype or device.
    """
    _check(q, scale, out, dtype)
    if low_rank is not None:
        _check_low_rank(q, low_rank)
    return select("dequantize", _DEQUANTIZE, q)(q, scale, low_rank, out=out, dtype=dtype)


def _check(q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None, dtype: torch.dtype | None) -> None:
    _check_codes("q", q)
    _check_scales("scale", scale, q)
    rows, columns = q.shape
    groups = scale.size(1) if scale.ndim == 2 else 1
    if scale.ndim not in (1, 2) or scale.size(0) != rows or groups == 0 or columns % groups:
        raise ValueError(
            f"scale must be [{rows}] or [{rows}, groups] with groups dividing {columns} columns, "
            f"got {list(scale.shape)}"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    if out is None:
        return
    if out.shape != q.shape or not out.is_floating_point() or out.device != q.device:
        raise ValueError(
            f"out must be a floating {[rows, columns]} tensor on {q.device}, got {out.dtype} {list(out.shape)} "
            f"on {out.device}"
        )
    if dtype not in (None, out.dtype):
        raise TypeError(f"dtype {dtype} contradicts out, which is {out.dtype}: give one of them")


def _check_low_rank(q: torch.Tensor, low_rank: LowRankFactors) -> None:
    qA, sA, qB, sB = low_rank
    rows, columns = q.shape
    for name, codes in (("qA", qA), ("qB", qB)):
        _check_codes(f"low_rank.{name}", codes)
    for name, scales in (("sA", sA), ("sB", sB)):
        _check_scales(f"low_rank.{name}", scales, q)
    if qA.size(0) != rows or qB.size(1) != columns or qA.size(1) != qB.size(0):
        raise ValueError(
            f"low_rank.qA and low_rank.qB must be [{rows}, rank] and [rank, {columns}], got {list(qA.shape)} "
            f"and {list(qB.shape)}"
        )
    if sA.shape not in ((), (rows,)):
        raise ValueError(f"low_rank.sA must be one element [] or one a row [{rows}], got {list(sA.shape)}")
    if sB.ndim != 1 or sB.numel() == 0 or qB.numel() % sB.numel():
        raise ValueError(
            f"low_rank.sB must be [n] with n dividing the {qB.numel()} elements of low_rank.qB, got {list(sB.shape)}"
        )


def _check_codes(name: str, codes: torch.Tensor) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(f"{name} must be int8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {list(codes.shape)}")


def _check_scales(name: str, scales: torch.Tensor, q: torch.Tensor) -> None:
    if scales.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"{name} must be float16 or float32, got {scales.dtype}")
    if scales.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {scales.device}")


__all__ = ["LowRankFactors", "dequantize", "dequantize_reference"]
