"""Quantised matrices and what must be true of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_RANK = 8
LARGEST_SCALE = 2.0**100  # products with codes, whose fields are read as up to 2^13, stay numbers of float32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LowRankFactors(NamedTuple):
    """Quantised factors of a low-rank correction. Scales are float16, bfloat16 or float32.

    qA: int8 [rows, rank]. sA: one element [], or one for each row [rows].
    qB: int8 [rank, columns]. sB: [n], one for every rank · columns / n elements of the flattened qB.
    """

    qA: Tensor
    sA: Tensor
    qB: Tensor
    sB: Tensor


class PackedFactors(NamedTuple):
    """Factors in the layout that kernels read, float32, padded with zeros to rank 4 or 8 and to whole units.

    A: [8 · units, rank]. B: [chunks, rank, 2, 32, 4], where a chunk is 256 columns: 32 threads load the first four of
    their 8 columns side by side, then the other four.
    """

    A: Tensor
    B: Tensor


class QuantizedMatrix(NamedTuple):
    """A quantised matrix in memory, made by `pack`.

    planes: int32 words, 2 · bits for each unit; for 8 bits the codes themselves, int8 or uint8 [rows, columns].
    signed: codes lie in [-2^(bits-1), 2^(bits-1)), else in [0, 2^bits).
    scale, zero: as `pack` takes them.
    low_rank: factors in any form.
    whole: every product (q - zero) · scale is exact, because scales have 16 bits and zeros are whole codes.
    """

    planes: Tensor
    bits: int
    signed: bool
    rows: int
    columns: int
    scale: Tensor
    zero: Tensor | None = None
    low_rank: PackedFactors | LowRankFactors | tuple[Tensor, Tensor] | None = None
    whole: bool = False


def require(fine: bool, name: str, value: object, expected: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` that names an argument, what it must be and what it is, unless ``fine``."""
    if not fine:
        got = f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
        raise error(f"{name} must be {expected}, got {got}")


def as_matrix(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low_rank: LowRankFactors | tuple[Tensor, Tensor] | None,
    name: str = "codes",
) -> QuantizedMatrix:
    """Return plain codes [rows, columns] as a checked matrix of 8 bits; ``name`` stands for the codes in errors."""
    require(codes.dtype in (torch.int8, torch.uint8), name, codes, "int8 or uint8", TypeError)
    require(codes.ndim == 2, name, codes, "a matrix")
    signed, whole = codes.dtype == torch.int8, zero is None and scale.dtype != torch.float32
    rows, columns = codes.shape
    q = QuantizedMatrix(codes.contiguous(), 8, signed, rows, columns, scale, zero, low_rank, whole)
    check_matrix(q, "")
    return q


def check_values(q: QuantizedMatrix) -> None:
    """Raise ValueError unless scales, zeros and factors are finite and below LARGEST_SCALE."""
    factors = [(f"low_rank[{number}]", factor) for number, factor in enumerate(q.low_rank or ())]
    for name, values in [("scale", q.scale), ("zero", q.zero), *factors]:
        if values is not None and values.is_floating_point() and values.numel():
            largest = float(values.abs().max())  # NaN where there is one
            require(largest < LARGEST_SCALE, name, f"a magnitude of {largest:g}", "finite and below 2^100")


def check_matrix(q: QuantizedMatrix, prefix: str) -> None:
    """Raise ValueError or TypeError for wrong shapes, dtypes or devices; ``prefix`` precedes the fields' names."""
    fine, got = isinstance(q, QuantizedMatrix), type(q).__name__
    require(fine, prefix.rstrip("."), got, "a QuantizedMatrix from pack", TypeError)
    scale, rows, columns, planes = q.scale, q.rows, q.columns, q.planes
    words = 2 * q.bits * -(-rows // 8) * -(-columns // 8)
    kind = (torch.int32, (words,)) if q.bits < 8 else (torch.int8 if q.signed else torch.uint8, (rows, columns))
    fine = (planes.dtype, planes.shape) == kind and planes.is_contiguous()
    require(fine, f"{prefix}planes", planes, f"{kind[0]} {list(kind[1])}, contiguous")
    _check_floats(f"{prefix}scale", scale, q)
    groups = scale.size(1) if scale.ndim == 2 else 1
    fine = (groups == 1 or groups > 1 and columns % (16 * groups) == 0) and scale.shape in ((rows,), (rows, groups))
    expected = f"[{rows}] or [{rows}, groups] with groups dividing {columns} columns into multiples of 16"
    require(fine, f"{prefix}scale", scale, expected)
    if q.zero is not None:
        _check_floats(f"{prefix}zero", q.zero, q)
        fine = (q.zero.shape, q.zero.dtype) == (scale.shape, scale.dtype)
        require(fine, f"{prefix}zero", q.zero, f"as scale, {scale.dtype} {list(scale.shape)}")
    if q.low_rank is not None:
        _check_low_rank(q, f"{prefix}low_rank", planes.device)


def _check_low_rank(q: QuantizedMatrix, name: str, device: torch.device) -> None:
    assert q.low_rank is not None
    if isinstance(q.low_rank, PackedFactors):
        A, B = q.low_rank
        rank, units, chunks = A.size(-1), -(-q.rows // 8), -(-q.columns // 256)
        fine = rank in (4, 8) and A.shape == (8 * units, rank) and B.shape == (chunks, rank, 2, 32, 4)
        fine &= all(part.dtype == torch.float32 and part.is_contiguous() for part in q.low_rank)
        require(fine, name, A, f"as pack made it for {q.rows} rows and {q.columns} columns")
        _check_floats(name, A, q)
        _check_floats(name, B, q)
        return
    if len(q.low_rank) == 2:
        (A, B), first, second = q.low_rank, f"{name}[0]", f"{name}[1]"
        for part, factor in ((first, A), (second, B)):
            _check_floats(part, factor, q)
        require(A.dtype == B.dtype, second, B, f"{A.dtype} as {first}", TypeError)
    else:
        (A, sA, B, sB), first, second = q.low_rank, f"{name}.qA", f"{name}.qB"
        _check_floats(f"{name}.sA", sA, q)
        _check_floats(f"{name}.sB", sB, q)
        require(A.device == B.device == device, f"{first} and {second}", A, f"on {device} as the codes")
        require(A.dtype == B.dtype == torch.int8, f"{first} and {second}", A, "int8", TypeError)
    fine = A.ndim == B.ndim == 2 and (A.size(0), B.size(1), A.size(1)) == (q.rows, q.columns, B.size(0))
    got = f"{list(A.shape)} and {list(B.shape)}"
    require(fine, f"{first} and {second}", got, f"[{q.rows}, rank] and [rank, {q.columns}]")
    require(1 <= A.size(1) <= MAX_RANK, first, A, f"of rank 1 to {MAX_RANK}")
    if len(q.low_rank) == 4:
        require(sA.shape in ((), (q.rows,)), f"{name}.sA", sA, f"one element [] or one a row [{q.rows}]")
        fine = sB.ndim == 1 and sB.numel() > 0 and B.numel() % sB.numel() == 0
        require(fine, f"{name}.sB", sB, f"[n] with n dividing the {B.numel()} elements of {second}")


def _check_floats(name: str, floats: Tensor, q: QuantizedMatrix) -> None:
    require(floats.dtype in FLOATS[:3], name, floats, "float16, bfloat16 or float32", TypeError)
    require(floats.device == q.planes.device, name, floats, f"on {q.planes.device} as the codes")
    expected = "detached, for dequantize has no derivative"
    require(not (floats.requires_grad and torch.is_grad_enabled()), name, "requires_grad", expected)


def check_out(name: str, out: Tensor, q: QuantizedMatrix) -> None:
    """Raise ValueError unless ``out`` can take the weights of ``q``."""
    expected = f"{[q.rows, q.columns]} of float16, bfloat16, float32 or float64 on {q.planes.device}"
    fine = (out.shape, out.device) == ((q.rows, q.columns), q.planes.device) and out.dtype in FLOATS
    require(fine, name, out, expected)
    require(not (out.requires_grad and torch.is_grad_enabled()), name, "requires_grad", "written under no_grad")
