"""Low-rank adapters, one set for each group of rows: y = residual + scale B (A x), forward and backward.

Several adapters, called parts, read the same x. Part j of n, with rank r and N_j columns, maps a row x_t of group g to

    h_t^(j) = A_g^(j) x_t,   y_t^(j) = scale B_g^(j) h_t^(j)

y_t is the concatenation of the parts' y_t^(j), then zeros up to the width, plus the residual if one is given. The
gradient of the residual is dy; the others are

    dh_t^(j) = scale B_g^(j)ᵀ dy_t^(j),   dx_t = Σ_j A_g^(j)ᵀ dh_t^(j)
    dA_g^(j) = Σ_t dh_t^(j) x_tᵀ,         dB_g^(j) = scale Σ_t dy_t^(j) h_t^(j)ᵀ

with sums over the rows t of group g.

Shapes: x [T, d]; A [G, n r, d], part j has rows j r .. (j + 1) r; B [G, Σ N_j, r], part j has N_j rows; y [T, width].
Rows offsets[g] .. offsets[g + 1] of x belong to group g. Rows before offsets[0] and from offsets[G] on belong to no
group: their y is zero or the residual, and this op adds zero to their gradient.

Kernels: a tile has rows of one group only. Forward is one launch; h stays in registers and is stored only for backward.
Backward is one launch each for dh, dx, dA and dB; gradients that are not needed are not computed. All sums are in fp32,
in a fixed order and without atomics. Segment s of rows (before the groups, each group, behind them) owns the tiles from
begin // size + s on: these are enough for it, and there are T // size + G + 2 in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..common.backend import select
from ..common.operators import readable
from .reference import LowRank, low_rank_reference
from .triton import low_rank_triton

Tensor = torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST_RANK = 256
_INDEX_LIMIT = 2**31  # offsets within a group's A or B have 32 bits
_LOW_RANK = {"reference": low_rank_reference, "triton": low_rank_triton}


def _check(
    x: Tensor, A: Tensor, B: Tensor, offsets: Tensor | None, residual: Tensor | None, parts: Sequence[int], width: int
) -> None:
    for name, tensor in (("x", x), ("A", A), ("B", B), ("residual", residual)):
        if tensor is not None and (tensor.dtype not in _DTYPES or tensor.dtype != x.dtype):
            allowed = "bfloat16, float16, float32 or float64" if tensor is x else f"x's dtype {x.dtype}"
            raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
    if A.ndim != 3 or not A.size(0) or not A.size(2):
        raise ValueError(f"A must be [groups, parts x rank, d] with groups and d >= 1, got shape {tuple(A.shape)}")
    if B.ndim != 3 or B.size(0) != A.size(0) or not 1 <= B.size(2) <= _LARGEST_RANK:
        raise ValueError(
            f"B must be [{A.size(0)}, columns, rank] with rank from 1 to {_LARGEST_RANK}, got shape {tuple(B.shape)}"
        )
    if not parts or min(parts) < 1 or sum(parts) != B.size(1):
        raise ValueError(f"parts must be positive and add up to B's {B.size(1)} columns, got {list(parts)}")
    if A.size(1) != len(parts) * B.size(2):
        raise ValueError(f"A must have {len(parts)} x {B.size(2)} rows a group, parts x rank, got {A.size(1)}")
    if width < B.size(1):
        raise ValueError(f"width must be at least the {B.size(1)} columns of all parts, got {width}")
    if residual is not None and residual.shape != (*x.shape[:-1], width):
        raise ValueError(f"residual must be {[*x.shape[:-1], width]}, y's shape, got {list(residual.shape)}")
    for name, tensor in (("A", A), ("B", B), ("offsets", offsets), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if offsets is None:
        if x.ndim < 2 or x.size(0) != A.size(0) or x.size(-1) != A.size(2):
            expected = f"[{A.size(0)}, ..., {A.size(2)}]"
            raise ValueError(f"x must be {expected} without offsets, a row of it a group, got shape {tuple(x.shape)}")
        return
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.size(0) != 1) or x.size(-1) != A.size(2):
        expected = f"[T, {A.size(2)}] or [1, T, {A.size(2)}]"
        raise ValueError(f"x must be {expected} with offsets, got shape {tuple(x.shape)}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}")
    if offsets.shape != (A.size(0) + 1,):
        raise ValueError(f"offsets must be [{A.size(0) + 1}], groups + 1, got shape {tuple(offsets.shape)}")
    if readable(offsets, x):
        bounds = [0, *offsets.tolist(), x.size(-2)]
        if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"offsets must ascend from 0 or more to x's {x.size(-2)} rows or less, got {bounds[1:-1]}")


def low_rank(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None = None,
    scale: float = 1.0,
    *,
    parts: Sequence[int] | None = None,
    width: int | None = None,
    residual: Tensor | None = None,
) -> LowRank:
    """Apply each group's adapters to the group's rows; see the module's docstring for the formula.

    Differentiable once in x, A, B and the residual. Pass the x of the result to later readers of x: in eager mode the
    kernel that writes dx adds their gradient. Kernels sum in fp32 and round h and dh to x's dtype; float32 does not use
    TF32. float64 takes the reference, which on a GPU waits for ``offsets``.

    Args:
        x: [T, d] or [1, T, d] with ``offsets``, else [G, ..., d], whose row g is group g's; bfloat16, float16, float32
            or float64, as A and B are.
        A: [G, n r, d] with r <= 256; part j has the rows j r to (j + 1) r.
        B: [G, Σ N_j, r], the parts' rows one after the other.
        offsets: int32 [G + 1], ascending from 0 or more to T or less; equal neighbours are a group without rows. Values
            are checked on a CPU only; on a GPU wrong values give wrong results, but no access outside the tensors.
        scale: the factor of B A x.
        parts: N_1 to N_n; by default one part of all columns.
        width: the number of columns of y, by default Σ N_j; further columns are zeros, or the residual's, and their
            gradients are not read.
        residual: [..., width] in x's dtype, added in fp32.

    Returns y [..., width] and x. Raises ValueError for a wrong shape, device or value, TypeError for a wrong dtype.
    """
    parts = tuple(B.shape[1:2]) if parts is None else tuple(parts)
    width = sum(parts) if width is None else width
    _check(x, A, B, offsets, residual, parts, width)
    chosen = select("low_rank", _LOW_RANK, x)
    if x.dtype == torch.float64 or max(A[0].numel(), B[0].numel()) >= _INDEX_LIMIT:
        chosen = low_rank_reference
    return chosen(x, A, B, offsets, residual, float(scale), parts, width)


__all__ = ["LowRank", "low_rank", "low_rank_reference"]
