"""Dequantisation: integer codes and scales, with an optional low-rank correction, to weights.

    W = (q - zero) · scale + A B,    A = qA · sA  [rows, rank],    B = qB · sB  [rank, columns]

A row of codes has one scale (and zero), or one for every group of columns. The correction (LQER, arXiv 2402.02446)
approximates what rounding lost; its factors are quantised themselves, in the artifact of parameter-golf PR #1874 in one
of two ways, told apart by the shapes of their scales:

    asymmetric  qA in [-2, 1] with one sA; qB in [-8, 7] with one sB for every group of the flattened qB
    symmetric   qA and qB in [-7, 7] with one scale a row

The arithmetic is float32 and fixed to the last bit: q - zero and its product with the scale are rounded one by one;
A B is accumulated over the rank in ascending order by fused multiply-adds that start at zero; the sum is rounded to
float32 and then to the output's dtype. The sign of a zero is left open.

Packed codes of 4, 6 and 7 bits are words for units of 8 rows and 8 columns, laid out so that a GPU's loads take 16
bytes and most codes are used where they lie in a word; codes of 8 bits are their own packing. Packing also multiplies a
correction's factors by their scales, for they are small beside the codes. `DequantizePlan` does all matrices of a model
in one launch, each into its place in a bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common.backend import select
from .common.operators import operator, readable

try:
    from . import _dequant_kernels as kernels
except ImportError:  # the shipped program is without them
    kernels = None

BITS = (4, 6, 7, 8)
# First bits of the fields of a word; a field that reaches the last bit goes on at the first. A row of 8 codes of 4 bits
# is a word; two rows of 6 bits are three, with five codes each and two bits of the 16th code at REST.
NIBBLES, SIXES, REST = (12, 16, 20, 24, 28, 0, 4, 8), (11, 17, 23, 31, 5), 29
MAX_RANK = 8
LARGEST_SCALE = 2.0**100  # products with codes, whose fields are read as up to 2^13, stay numbers of float32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LowRankFactors(NamedTuple):
    """Quantised factors of a low-rank correction. Scales are float16, bfloat16 or float32.

    qA: int8 [rows, rank]. sA: one element [] or one a row [rows].
    qB: int8 [rank, columns]. sB: [n], one for every rank · columns / n elements of the flattened qB.
    """

    qA: Tensor
    sA: Tensor
    qB: Tensor
    sB: Tensor


class PackedFactors(NamedTuple):
    """Factors as kernels read them, float32, filled up with zeros to rank 4 or 8 and to whole units.

    A: [8 · units, rank]. B: [chunks, rank, 2, 32, 4], a chunk being 256 columns: 32 threads load the first four of
    their 8 columns side by side, then the other four.
    """

    A: Tensor
    B: Tensor


class QuantizedMatrix(NamedTuple):
    """A matrix in memory; `pack` makes it.

    planes: int32 words, 2 · bits to a unit; 8 bits: the codes themselves, int8 or uint8 [rows, columns].
    signed: codes lie in [-2^(bits-1), 2^(bits-1)), else in [0, 2^bits).
    whole: every product (q - zero) · scale is exact, because scales have 16 bits and zeros are whole codes.
    The rest is as `pack` takes it, but for the factors.
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


def pack(
    codes: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor | None = None,
    low_rank: LowRankFactors | tuple[Tensor, Tensor] | None = None,
) -> QuantizedMatrix:
    """Pack codes into planes, and a correction's into words. Not for a hot path: it looks at the values.

    Args:
        codes: int8 in [-2^(bits-1), 2^(bits-1)) or uint8 in [0, 2^bits), [rows, columns].
        bits: 4, 6, 7 or 8; 8 takes the codes as they are, without a copy where they are contiguous.
        scale: float16, bfloat16 or float32, of a magnitude below 2^100, [rows] or [rows, groups]: a group is
            ``columns / groups`` columns, a multiple of 16 unless there is one.
        zero: dtype and shape of scale; None is zero.
        low_rank: factors of rank 1 to 8, quantised, or floats (A [rows, rank], B [rank, columns]) of one dtype; they
            are stored as float32 values.

    Raises ValueError or TypeError naming the argument that is wrong, also where one of these numbers is not finite.
    """
    _require(bits in BITS, "bits", bits, "4, 6, 7 or 8")
    q = _as_matrix(codes, scale, zero, low_rank)
    _check_values(q)
    if codes.numel() and bits < 8:
        low, high = (int(end) for end in codes.aminmax())
        least = -(1 << bits - 1) if q.signed else 0
        fine = least <= low and high < least + (1 << bits)
        _require(fine, "codes", f"{low} to {high}", f"in [{least}, {least + (1 << bits)}) for {bits} bits")
    if low_rank is not None:
        q = q._replace(low_rank=_packed_factors(q))
    whole = scale.dtype != torch.float32 and (zero is None or bool(((zero == zero.round()) & (zero.abs() < 256)).all()))
    return q._replace(bits=bits, planes=_pack_planes(codes, bits), whole=whole)


def unpack(q: QuantizedMatrix) -> Tensor:
    """The codes of a packed matrix, int8 or uint8 [rows, columns]: the inverse of `pack`."""
    if q.bits == 8:
        return q.planes
    down, across = -(-q.rows // 8), -(-q.columns // 8)
    words = q.planes.long() & 0xFFFFFFFF
    if q.bits == 4:
        codes = _split(words.view(2, -1, 4).transpose(0, 1), NIBBLES, 15)
    else:
        sixes, tops = words[: 12 * down * across].view(3, -1, 4).permute(1, 2, 0), words[12 * down * across :]
        rest = _split(sixes, (REST,), 3)[..., 0] << 2 * torch.arange(3, device=words.device)
        codes = torch.cat([_split(sixes, SIXES, 63).flatten(2), rest.sum(2, keepdim=True)], 2)
        if q.bits == 7:
            codes = codes.flatten(1) + (_split(tops.view(-1, 2), range(32), 1).flatten(1) << 6)
    codes = codes.reshape(down, across, 8, 8).transpose(1, 2).reshape(8 * down, 8 * across)[: q.rows, : q.columns]
    return (codes - (1 << q.bits - 1)).to(torch.int8) if q.signed else codes.to(torch.uint8)


def _pack_planes(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes.contiguous()
    unsigned = codes.long() + (1 << bits - 1 if codes.dtype == torch.int8 else 0)
    unsigned = F.pad(unsigned, (0, -codes.size(1) % 8, 0, -codes.size(0) % 8))
    down, across = unsigned.size(0) // 8, unsigned.size(1) // 8
    units = unsigned.view(down, 8, across, 8).transpose(1, 2).reshape(down * across, 8, 8)
    if bits == 4:
        return _join(units, NIBBLES).reshape(-1, 2, 4).transpose(0, 1).flatten()
    pairs = (units & 63).reshape(-1, 4, 16)
    rest = (pairs[..., 15:] >> 2 * torch.arange(3, device=codes.device)) & 3
    fields = torch.cat([pairs[..., :15].unflatten(2, (3, 5)), rest[..., None]], 3)
    words = _join(fields, (*SIXES, REST)).permute(2, 0, 1).flatten()
    return words if bits == 6 else torch.cat([words, _join((units >> 6).reshape(-1, 2, 32), range(32)).flatten()])


def _join(fields: Tensor, places: Sequence[int]) -> Tensor:
    """int32 words of the last dimension's fields, each from its place on."""
    words = (fields << torch.tensor(list(places), device=fields.device)).sum(-1)
    return ((words & 0xFFFFFFFF) + (words >> 32)).to(torch.int32)


def _split(words: Tensor, places: Sequence[int], mask: int) -> Tensor:
    """The fields at these places of words in int64."""
    return ((words | words << 32)[..., None] >> torch.tensor(list(places), device=words.device)) & mask


def _packed_factors(q: QuantizedMatrix) -> PackedFactors:
    """The factors in any form as kernels read them."""
    if isinstance(q.low_rank, PackedFactors):
        return q.low_rank
    A, B = (factor.float() for factor in _factor_values(q))
    more = -A.size(1) % 4
    B = F.pad(B, (0, -q.columns % 256, 0, more)).view(A.size(1) + more, -1, 32, 2, 4)
    return PackedFactors(F.pad(A, (0, more, 0, -q.rows % 8)).contiguous(), B.permute(1, 0, 3, 2, 4).contiguous())


def _factor_values(q: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """A and B, floats, from any form of the factors."""
    if isinstance(q.low_rank, PackedFactors):
        A, B = q.low_rank
        return A[: q.rows], B.permute(1, 0, 3, 2, 4).flatten(1)[:, : q.columns]
    if len(q.low_rank) == 2:
        return q.low_rank
    qA, sA, qB, sB = q.low_rank
    return _scaled(qA, sA.reshape(-1)), _scaled(qB, sB)


def dequantize_reference(q: QuantizedMatrix, out: Tensor) -> None:
    """Plain PyTorch, from a packed matrix into ``out``; the contract of the kernels."""
    weight = _scaled(unpack(q), q.scale, q.zero)
    if q.low_rank is not None:
        A, B = _factor_values(q)
        product = torch.zeros_like(weight)
        for k in range(A.size(1)):
            product = _fma(A[:, k, None], B[k], product)
        weight = weight + product
    out.copy_(weight)


def _scaled(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Codes less zero, times scale, in float32; every scale serves an equal run of the flattened codes."""
    runs = q.float().reshape(scale.numel(), -1 if q.numel() else 0)
    runs = runs if zero is None else runs - zero.reshape(-1, 1).float()
    return (runs * scale.reshape(-1, 1).float()).reshape(q.shape)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a · b + c of float32 numbers, rounded once: to odd in float64, which makes the second rounding right."""
    product, c = a.double() * b.double(), c.double()
    total, part = product + c, product + c - c
    error = (c - (total - part)) + (product - part)
    bits = total.view(torch.int64)
    outwards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where((error != 0) & (bits & 1 == 0), bits + outwards, bits).view(torch.float64).float()


def _item(q: QuantizedMatrix, out: Tensor) -> kernels.Item:
    """The matrix as the kernels take it; ``out`` has its rows in one piece."""
    A, B = (None, None) if q.low_rank is None else _packed_factors(q)
    scale, zero = q.scale.contiguous(), q.zero if q.zero is None else q.zero.contiguous()
    vectors = [(q.planes, 16), (out, 8 * out.element_size()), *((t, 16) for t in (A, B) if t is not None)]
    aligned = q.rows % 8 == q.columns % 8 == out.stride(0) % 8 == 0
    aligned = aligned and all(t.data_ptr() % size == 0 for t, size in vectors)
    groups = scale.numel() // q.rows
    sizes = (q.rows, q.columns, groups, out.stride(0), 1 << q.bits - 1 if q.signed else 0)
    kind = (q.bits, groups > 1, zero is not None, q.whole, 0 if A is None else A.size(1), aligned)
    return kernels.Item((q.planes, scale, zero, A, B, out), sizes, kind)


def _launch_one(q: QuantizedMatrix, out: Tensor) -> None:
    """One matrix in one launch, into ``out`` with any strides."""
    dense = out if out.stride(1) == 1 or q.columns == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    kernels.launch_one(_item(q, dense))
    if dense is not out:
        out.copy_(dense)


_DEQUANTIZE = {"reference": dequantize_reference} | ({} if kernels is None else {"triton": _launch_one})


def _dequantize_out(planes, bits, signed, rows, columns, scale, zero, factors, whole, out) -> None:
    if out.numel():
        low_rank = LowRankFactors(*factors) if len(factors) == 4 else tuple(factors) or None
        if len(factors) == 2 and factors[1].ndim == 5:
            low_rank = PackedFactors(*factors)
        q = QuantizedMatrix(planes, bits, signed, rows, columns, scale, zero, low_rank, whole)
        with torch.cuda.device_of(planes):  # Triton launches on the current device
            select("dequantize", _DEQUANTIZE, planes)(q, out)


_write = operator(
    "dequantize_out(Tensor planes, int bits, bool signed, int rows, int columns, Tensor scale, Tensor? zero, "
    "Tensor[] factors, bool whole, Tensor(a!) out) -> ()",
    _dequantize_out,
    lambda *_: None,
    mutates=("out",),
)


def dequantize(
    q: QuantizedMatrix | Tensor,
    scale: Tensor | None = None,
    low_rank: LowRankFactors | tuple[Tensor, Tensor] | None = None,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Weights from a packed matrix or from plain codes: (q - zero) · scale, plus the low-rank correction if any.

    Args:
        q: a matrix from `pack`; or int8 or uint8 codes [rows, columns], which are their own packing.
        scale, low_rank: with plain codes only; as `pack` takes them, whose errors of values are raised on a CPU only:
            on a GPU a scale of 2^100 or more may give infinity or NaN.
        out: [rows, columns], float16, bfloat16, float32 or float64, with any strides, written in place of a new tensor.
        dtype: dtype of a new tensor; float32 unless given. With ``out`` it must be left out or be out's dtype.

    Returns [rows, columns]. There is no derivative: codes have none, and that by the scales is not implemented.
    Raises ValueError or TypeError naming the argument with the wrong shape, dtype or device, or that wants a gradient.
    """
    if isinstance(q, QuantizedMatrix):
        fine = scale is None and low_rank is None
        _require(fine, "scale and low_rank", "one", "left out where q is packed: it has them", TypeError)
        _check_matrix(q, "q.")
    else:
        _require(scale is not None, "scale", None, "given with plain codes", TypeError)
        q = _as_matrix(q, scale, None, low_rank, "q")
        if readable(scale):
            _check_values(q)
    if out is None:
        _require(dtype in (None, *FLOATS), "dtype", dtype, "float16, bfloat16, float32 or float64", TypeError)
        out = torch.empty(q.rows, q.columns, dtype=dtype or torch.float32, device=q.planes.device)
    else:
        _check_out("out", out, q)
        _require(dtype in (None, out.dtype), "dtype", dtype, f"left out or {out.dtype} as out is", TypeError)
    _write(*q[:7], list(q.low_rank or ()), q.whole, out)
    return out


class DequantizePlan:
    """All matrices of a model into their places in one launch.

    Building it copies a table of addresses to the device; a call is the launch and nothing else, and a CUDA graph can
    capture it. Codes and scales may change in place (zeros: to whole codes, if they were), but tensors not be replaced.
    Not for torch.compile, which may do that and gets a RuntimeError. What has gaps in memory is copied.

    Args:
        matrices: from `pack`, on one device, with one dtype of scales; the rest may differ.
        outs: a [rows, columns] tensor of each, as `dequantize` takes them, all of one dtype and with rows in one piece
            (``stride(1) == 1``): matrices of banks, say. They must not overlap.

    Raises ValueError or TypeError naming the matrix and the argument.
    """

    def __init__(self, matrices: Sequence[QuantizedMatrix], outs: Sequence[Tensor]) -> None:
        _require(len(matrices) == len(outs), "outs", len(outs), f"as many as the matrices, {len(matrices)}")
        self._pairs, self._items, self._launch = list(zip(matrices, outs, strict=True)), [], None
        for number, (q, out) in enumerate(self._pairs):
            _check_matrix(q, f"matrices[{number}].")
            _check_out(f"outs[{number}]", out, q)
            fine, got = q.columns <= 1 or out.stride(1) == 1, f"strides {out.stride()}"
            _require(fine, f"outs[{number}]", got, "a matrix with rows in one piece")
            self._items += [_item(q, out)] if out.numel() and kernels is not None else []
        for tensors in zip(*(item.tensors[1:] for item in self._items), strict=True):
            kinds = {(tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}
            wanted = "of one dtype of scales and outs, on one device"
            _require(len(kinds) < 2, "matrices and outs", kinds, wanted)
        if self._items and select("dequantize", _DEQUANTIZE, self._items[0].tensors[0]) is _launch_one:
            self._launch = kernels.launch_all(self._items)

    def __call__(self) -> None:
        """Write all weights."""
        if torch.compiler.is_compiling():  # torch.compiler.disable would load the compiler, which takes seconds
            raise RuntimeError("a DequantizePlan is not for torch.compile: call it outside, or use dequantize")
        if self._launch is not None:
            torch.autograd.graph.increment_version([out for _, out in self._pairs])
            with torch.cuda.device_of(self._pairs[0][1]):
                return self._launch()
        for q, out in self._pairs:
            dequantize_reference(q, out)


def dequantize_all(matrices: Sequence[QuantizedMatrix], outs: Sequence[Tensor]) -> None:
    """One call of a `DequantizePlan` of these arguments; keep the plan to do it again."""
    DequantizePlan(matrices, outs)()


def _require(fine: bool, name: str, value: object, wanted: str, error: type[Exception] = ValueError) -> None:
    if not fine:
        got = f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
        raise error(f"{name} must be {wanted}, got {got}")


def _as_matrix(codes, scale, zero, low_rank, name: str = "codes") -> QuantizedMatrix:
    """Plain codes as a matrix of 8 bits, checked."""
    _require(codes.dtype in (torch.int8, torch.uint8), name, codes, "int8 or uint8", TypeError)
    _require(codes.ndim == 2, name, codes, "a matrix")
    signed, whole = codes.dtype == torch.int8, zero is None and scale.dtype != torch.float32
    q = QuantizedMatrix(codes.contiguous(), 8, signed, *codes.shape, scale, zero, low_rank, whole)
    _check_matrix(q, "")
    return q


def _check_values(q: QuantizedMatrix) -> None:
    for name, values in {"scale": q.scale, "zero": q.zero, **dict(enumerate(q.low_rank or ()))}.items():
        if values is not None and values.is_floating_point() and values.numel():
            largest = float(values.abs().max())  # NaN where there is one
            name = f"low_rank[{name}]" if isinstance(name, int) else name
            _require(largest < LARGEST_SCALE, name, f"a magnitude of {largest:g}", "finite and below 2^100")


def _check_matrix(q: QuantizedMatrix, prefix: str) -> None:
    fine, got = isinstance(q, QuantizedMatrix), type(q).__name__
    _require(fine, prefix.rstrip("."), got, "a QuantizedMatrix from pack", TypeError)
    scale, rows, columns, planes = q.scale, q.rows, q.columns, q.planes
    words = 2 * q.bits * -(-rows // 8) * -(-columns // 8)
    kind = (torch.int32, (words,)) if q.bits < 8 else (torch.int8 if q.signed else torch.uint8, (rows, columns))
    fine = (planes.dtype, planes.shape) == kind and planes.is_contiguous()
    _require(fine, f"{prefix}planes", planes, f"{kind[0]} {list(kind[1])}, contiguous")
    _check_floats(f"{prefix}scale", scale, q)
    groups = scale.size(1) if scale.ndim == 2 else 1
    fine = (groups == 1 or groups > 1 and columns % (16 * groups) == 0) and scale.shape in ((rows,), (rows, groups))
    wanted = f"[{rows}] or [{rows}, groups] with groups dividing {columns} columns into multiples of 16"
    _require(fine, f"{prefix}scale", scale, wanted)
    if q.zero is not None:
        _check_floats(f"{prefix}zero", q.zero, q)
        fine, wanted = (q.zero.shape, q.zero.dtype) == (scale.shape, scale.dtype), f"{scale.dtype} {list(scale.shape)}"
        _require(fine, f"{prefix}zero", q.zero, f"as scale, {wanted}")
    if q.low_rank is not None:
        _check_low_rank(q, f"{prefix}low_rank", planes.device)


def _check_low_rank(q: QuantizedMatrix, name: str, device: torch.device) -> None:
    if isinstance(q.low_rank, PackedFactors):
        A, B = q.low_rank
        rank, units, chunks = A.size(-1), -(-q.rows // 8), -(-q.columns // 256)
        fine = rank in (4, 8) and A.shape == (8 * units, rank) and B.shape == (chunks, rank, 2, 32, 4)
        fine &= all(part.dtype == torch.float32 and part.is_contiguous() for part in q.low_rank)
        _require(fine, name, A, f"as pack made it for {q.rows} rows and {q.columns} columns")
        _check_floats(name, A, q)
        _check_floats(name, B, q)
        return
    if len(q.low_rank) == 2:
        (A, B), first, second = q.low_rank, f"{name}[0]", f"{name}[1]"
        for part, factor in ((first, A), (second, B)):
            _check_floats(part, factor, q)
        _require(A.dtype == B.dtype, second, B, f"{A.dtype} as {first}", TypeError)
    else:
        (A, sA, B, sB), first, second = q.low_rank, f"{name}.qA", f"{name}.qB"
        _check_floats(f"{name}.sA", sA, q)
        _check_floats(f"{name}.sB", sB, q)
        _require(A.device == B.device == device, f"{first} and {second}", A, f"on {device} as the codes")
        _require(A.dtype == B.dtype == torch.int8, f"{first} and {second}", A, "int8", TypeError)
    fine = A.ndim == B.ndim == 2 and (A.size(0), B.size(1), A.size(1)) == (q.rows, q.columns, B.size(0))
    got = f"{list(A.shape)} and {list(B.shape)}"
    _require(fine, f"{first} and {second}", got, f"[{q.rows}, rank] and [rank, {q.columns}]")
    _require(1 <= A.size(1) <= MAX_RANK, first, A, f"of rank 1 to {MAX_RANK}")
    if len(q.low_rank) == 4:
        _require(sA.shape in ((), (q.rows,)), f"{name}.sA", sA, f"one element [] or one a row [{q.rows}]")
        fine = sB.ndim == 1 and sB.numel() > 0 and B.numel() % sB.numel() == 0
        _require(fine, f"{name}.sB", sB, f"[n] with n dividing the {B.numel()} elements of {second}")


def _check_floats(name: str, floats: Tensor, q: QuantizedMatrix) -> None:
    _require(floats.dtype in FLOATS[:3], name, floats, "float16, bfloat16 or float32", TypeError)
    _require(floats.device == q.planes.device, name, floats, f"on {q.planes.device} as the codes")
    wanted = "detached, for dequantize has no derivative"
    _require(not (floats.requires_grad and torch.is_grad_enabled()), name, "requires_grad", wanted)


def _check_out(name: str, out: Tensor, q: QuantizedMatrix) -> None:
    wanted = f"{[q.rows, q.columns]} of float16, bfloat16, float32 or float64 on {q.planes.device}"
    fine = (out.shape, out.device) == ((q.rows, q.columns), q.planes.device) and out.dtype in FLOATS
    _require(fine, name, out, wanted)
    _require(not (out.requires_grad and torch.is_grad_enabled()), name, "requires_grad", "written under no_grad")


__all__ = [
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
