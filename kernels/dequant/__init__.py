"""Dequantisation: integer codes and scales, with an optional low-rank correction, to weights.

    W = (q - zero) · scale + A B,    A = qA · sA  [rows, rank],    B = qB · sB  [rank, columns]

A row of codes has one scale (and zero), or one for every group of columns. The correction (LQER, arXiv 2402.02446)
approximates the rounding error. Its factors are quantised themselves, in the artifact of parameter-golf PR #1874 in one
of two ways, which the shapes of their scales tell apart:

    asymmetric  qA in [-2, 1] with one sA; qB in [-8, 7] with one sB for every group of the flattened qB
    symmetric   qA and qB in [-7, 7] with one scale a row

The arithmetic is float32 and fixed to the last bit. The difference q - zero and its product with the scale are rounded
one by one. A B is accumulated over the rank in ascending order by fused multiply-adds that start at zero. The sum is
rounded to float32 and then to the output's dtype. The sign of a zero is unspecified.

Packed codes of 4, 6 and 7 bits are words for units of 8 rows and 8 columns. Their layout lets a GPU load 16 bytes at a
time and use most codes where they lie in a word. Codes of 8 bits are their own packing. Packing also multiplies the
factors of a correction by their scales, since factors are small beside the codes. `DequantizePlan` writes all matrices
of a model in one launch, each into its place in a bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..common.backend import select
from ..common.operators import operator, readable
from .matrix import (
    FLOATS,
    MAX_RANK,
    LowRankFactors,
    PackedFactors,
    QuantizedMatrix,
    as_matrix,
    check_matrix,
    check_out,
    check_values,
    require,
)
from .packing import pack, unpack
from .reference import dequantize_reference

_Pairs = Sequence[tuple[QuantizedMatrix, Tensor]]


def _many_by_reference(pairs: _Pairs) -> Callable[[], None]:
    def run() -> None:
        for q, out in pairs:
            dequantize_reference(q, out)

    return run


_ONE: dict[str, Callable[[QuantizedMatrix, Tensor], None]] = {"reference": dequantize_reference}
_MANY: dict[str, Callable[[_Pairs], Callable[[], None]]] = {"reference": _many_by_reference}
with suppress(ImportError):  # the exported program leaves the kernels out
    from .triton import LaunchOfMany, launch_one

    _ONE["triton"], _MANY["triton"] = launch_one, LaunchOfMany


def dequantize(
    q: QuantizedMatrix | Tensor,
    scale: Tensor | None = None,
    low_rank: LowRankFactors | tuple[Tensor, Tensor] | None = None,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return weights from a packed matrix or plain codes: (q - zero) · scale, plus the low-rank correction if any.

    Args:
        q: a matrix from `pack`, or int8 or uint8 codes [rows, columns], which are their own packing.
        scale: as `pack` takes it, with plain codes only. Its values are checked on a CPU only: on a GPU a scale of
            2^100 or more may give infinity or NaN.
        low_rank: as `pack` takes it, with plain codes only. Its values are checked as those of ``scale`` are.
        out: [rows, columns], float16, bfloat16, float32 or float64, with any strides; takes the weights.
        dtype: dtype of a new tensor, float32 unless given. With ``out`` leave it out, or give the dtype of ``out``.

    Returns [rows, columns]. There is no derivative: codes have none, and that by the scales is not implemented. Raises
    ValueError or TypeError that names the argument with a wrong shape, dtype or device, or that requires a gradient.
    """
    if isinstance(q, QuantizedMatrix):
        alone = scale is None and low_rank is None
        require(alone, "scale and low_rank", "one", "left out where q is packed: it has them", TypeError)
        check_matrix(q, "q.")
    else:
        if scale is None:
            raise TypeError("scale must be given with plain codes, got None")
        q = as_matrix(q, scale, None, low_rank, "q")
        if readable(scale):
            check_values(q)
    if out is None:
        require(dtype in (None, *FLOATS), "dtype", dtype, "float16, bfloat16, float32 or float64", TypeError)
        out = torch.empty(q.rows, q.columns, dtype=dtype or torch.float32, device=q.planes.device)
    else:
        check_out("out", out, q)
        require(dtype in (None, out.dtype), "dtype", dtype, f"left out or {out.dtype} as out is", TypeError)
    _dequantize_op(*q[:7], list(q.low_rank or ()), q.whole, out)
    return out


class DequantizePlan:
    """All matrices of a model, written into their places in one launch.

    Building the plan copies a table of addresses to the device. A call is the launch and nothing else, and a CUDA graph
    can capture it. Codes and scales may change in place (zeros too, to whole codes if they were whole codes), but the
    tensors may not be replaced. Tensors with gaps in memory are copied when the plan is built. torch.compile may
    replace tensors, so a call inside compiled code raises RuntimeError.

    Args:
        matrices: results of `pack`, on one device, with one dtype of scales. Bits, shapes and factors may differ.
        outs: a tensor [rows, columns] for each matrix, as `dequantize` takes it; all of one dtype and with contiguous
            rows (``stride(1) == 1``), such as matrices of banks. They must not overlap.

    Raises ValueError or TypeError that names the matrix and the argument.
    """

    def __init__(self, matrices: Sequence[QuantizedMatrix], outs: Sequence[Tensor]) -> None:
        require(len(matrices) == len(outs), "outs", len(outs), f"as many as the matrices, {len(matrices)}")
        for number, (q, out) in enumerate(zip(matrices, outs, strict=True)):
            check_matrix(q, f"matrices[{number}].")
            check_out(f"outs[{number}]", out, q)
            contiguous, got = q.columns <= 1 or out.stride(1) == 1, f"strides {out.stride()}"
            require(contiguous, f"outs[{number}]", got, "a matrix with rows in one piece")
        pairs = [(q, out) for q, out in zip(matrices, outs, strict=True) if out.numel()]
        for tensors in ([q.scale for q, _ in pairs], [out for _, out in pairs]):
            kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
            require(len(kinds) < 2, "matrices and outs", kinds, "of one dtype of scales and outs, on one device")
        self._run = select("dequantize", _MANY, pairs[0][1])(pairs) if pairs else None

    def __call__(self) -> None:
        """Write all weights."""
        if torch.compiler.is_compiling():  # torch.compiler.disable would load the compiler, which takes seconds
            raise RuntimeError("a DequantizePlan is not for torch.compile: call it outside, or use dequantize")
        if self._run is not None:
            self._run()


def dequantize_all(matrices: Sequence[QuantizedMatrix], outs: Sequence[Tensor]) -> None:
    """Write all weights once; to do it again, keep a `DequantizePlan` of these arguments."""
    DequantizePlan(matrices, outs)()


# The operator chooses the implementation: compilers and tracers see it on every device.


def _dequantize_into(
    planes: Tensor,
    bits: int,
    signed: bool,
    rows: int,
    columns: int,
    scale: Tensor,
    zero: Tensor | None,
    factors: Sequence[Tensor],
    whole: bool,
    out: Tensor,
) -> None:
    if out.numel():
        low_rank: Any = tuple(factors) or None
        if len(factors) == 4:
            low_rank = LowRankFactors(*factors)
        elif len(factors) == 2 and factors[1].ndim == 5:
            low_rank = PackedFactors(*factors)
        q = QuantizedMatrix(planes, bits, signed, rows, columns, scale, zero, low_rank, whole)
        select("dequantize", _ONE, planes)(q, out)


_dequantize_op = operator(
    "dequantize_out(Tensor planes, int bits, bool signed, int rows, int columns, Tensor scale, Tensor? zero, "
    "Tensor[] factors, bool whole, Tensor(a!) out) -> ()",
    _dequantize_into,
    lambda *_: None,
    mutates=("out",),
)

__all__ = [
    "MAX_RANK",
    "DequantizePlan",
    "LowRankFactors",
    "PackedFactors",
    "QuantizedMatrix",
    "dequantize",
    "dequantize_all",
    "dequantize_reference",
    "pack",
    "unpack",
]
