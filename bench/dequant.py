"""Dequantisation of bit-packed weights to bf16: ``python -m bench.dequant``.

`packed6_g64_lqer` has 6-bit codes with scale and zero for every 64 columns and a rank-4 correction, `record_model` all
67 matrices of the record model straight into their banks, `int8_rows` plain codes with a scale a row; the cases named
by a shape have 6-bit codes with a scale a row. The opponents read planes of 4, 2 and 1 bits laid out by column blocks
and need not put the model's matrices into banks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from pgolf.kernels import dequant as family
from pgolf.kernels.dequant import LowRankFactors

PLANES = {4: (4,), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # bits of each plane, the lowest first
ROWS, COLUMNS = 61_952, 512  # as many elements as the record model's banks
RECORD_BANKS = ((22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048))
RECORD_EMBEDDING = (8192, 512)
Tensor = torch.Tensor


class Quantized(NamedTuple):
    """A quantised matrix before any packing: unsigned codes, and what makes weights of them."""

    codes: Tensor  # uint8 [rows, columns]
    bits: int
    scale: Tensor  # float16 [rows, groups]
    zero: Tensor | None  # float16 [rows, groups]; None: half the range of codes
    low_rank: LowRankFactors | None


def random_matrix(
    rows: int, columns: int, device: torch.device, *, bits: int = 6, group: int | None = None, lqer: bool = False
) -> Quantized:
    """Random codes and scales; with a zero where there is a group, with rank-4 int2 and int4 factors if ``lqer``."""
    codes = torch.randint(0 if group else 1, 1 << bits, (rows, columns), device=device, dtype=torch.uint8)
    groups = columns // group if group else 1
    scale = (torch.rand(rows, groups, device=device) * 0.02 + 0.01).half()
    zero = torch.randint(0, 1 << bits, (rows, groups), device=device).half() if group else None
    if not lqer:
        return Quantized(codes, bits, scale, zero, None)
    qA = torch.randint(-2, 2, (rows, 4), device=device, dtype=torch.int8)
    qB = torch.randint(-8, 8, (4, columns), device=device, dtype=torch.int8)
    sB = (torch.rand(4 * columns // 64, device=device) * 0.02 + 0.01).half()
    return Quantized(codes, bits, scale, zero, LowRankFactors(qA, torch.tensor(0.5, device=device).half(), qB, sB))


def weights(q: Quantized, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """(codes - zero) · scale + A B in ``dtype``."""
    zero = q.zero.to(dtype).unsqueeze(2) if q.zero is not None else 1 << (q.bits - 1)
    grouped = codes.to(dtype).view(*q.scale.shape, -1)
    weight = ((grouped - zero) * q.scale.to(dtype).unsqueeze(2)).view(codes.shape)
    if q.low_rank is None:
        return weight
    A = q.low_rank.qA.to(dtype) * q.low_rank.sA.to(dtype)
    B = q.low_rank.qB.to(dtype).view(q.low_rank.sB.numel(), -1) * q.low_rank.sB.to(dtype).unsqueeze(1)
    B = B.view(q.low_rank.qB.shape)
    return weight + sum(A[:, k, None] * B[k] for k in range(A.size(1)))


def pack_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Planes of the codes' bits; a byte holds columns a whole block apart."""
    codes = F.pad(codes, (0, -codes.size(1) % 8))
    planes, shift = [], 0
    for width in PLANES[bits]:
        blocks = ((codes >> shift) & (1 << width) - 1).view(codes.size(0), 8 // width, -1)
        planes.append(sum(blocks[:, i] << i * width for i in range(blocks.size(1))).contiguous())
        shift += width
    return planes


def unpack_planes(planes: Sequence[Tensor], bits: int, columns: int) -> Tensor:
    """The inverse of `pack_planes`, without the padding."""
    codes, shift = 0, 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        shifts = torch.arange(0, 8, width, device=plane.device, dtype=torch.uint8)[:, None]
        blocks = (plane.unsqueeze(1) >> shifts) & (1 << width) - 1
        codes = codes | (blocks.reshape(plane.size(0), -1) << shift)
        shift += width
    return codes[:, :columns]


def dequantize_planes(matrices: Sequence[Quantized], packed: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What the opponents compute, in PyTorch."""
    return [
        weights(q, unpack_planes(planes, q.bits, q.codes.size(1)), torch.float32).to(torch.bfloat16)
        for q, planes in zip(matrices, packed, strict=True)
    ]


def moved_bytes(q: Quantized) -> int:
    """Packed codes, scales, zeros and factors read, bf16 weights written."""
    factors = 0 if q.low_rank is None else sum(factor.nbytes for factor in q.low_rank)
    zeros = 0 if q.zero is None else q.zero.nbytes
    return q.codes.numel() * q.bits // 8 + q.scale.nbytes + zeros + factors + 2 * q.codes.numel()


def build(make: Callable[[torch.device, bool], list[Quantized]], device: torch.device, quick: bool) -> Case:
    """The case of these matrices; smaller ones on a CPU."""
    matrices = make(device, quick or device.type != "cuda")
    packed = [pack_planes(q.codes, q.bits) for q in matrices]
    run = partial(dequantize_planes, matrices)
    providers = {
        "eager": lambda: partial(run, packed),
        "compile": lambda: partial(compiled(run, device), packed),
        "torchao": partial(_torchao, matrices),
        "pgolf": partial(_pgolf, matrices),
    }
    return Case(
        providers, lambda: [weights(q, q.codes, torch.float64) for q in matrices], sum(map(moved_bytes, matrices))
    )


def one(rows: int, columns: int, device: torch.device, small: bool, **format: int | bool) -> list[Quantized]:
    """A single matrix."""
    return [random_matrix(-(-rows // 64) if small else rows, columns, device, **format)]


def record_model(device: torch.device, small: bool, corrected: int = 3) -> list[Quantized]:
    """The record model's embedding and matrices, of which the first ``corrected`` have a rank-4 correction."""
    banks = [(2, rows // 8, columns // 8) for _, rows, columns in RECORD_BANKS] if small else RECORD_BANKS
    shapes = [shape for count, *shape in banks for _ in range(count)]
    embedding = random_matrix(*((64, 64) if small else RECORD_EMBEDDING), device, bits=7, lqer=corrected > 0)
    rest = [random_matrix(*shape, device, lqer=index + 1 < corrected) for index, shape in enumerate(shapes)]
    return [embedding, *rest]


CASES: dict[str, Builder] = {
    "packed6_g64_lqer": partial(build, partial(one, ROWS, COLUMNS, bits=6, group=64, lqer=True)),
    "record_model": partial(build, record_model),
    "packed4_g64": partial(build, partial(one, ROWS, COLUMNS, bits=4, group=64)),
    "int8_rows": partial(build, partial(one, ROWS, COLUMNS, bits=8)),
    **{
        f"{rows}x{columns}": partial(build, partial(one, rows, columns))
        for rows, columns in ((768, 3072), (1024, 4096), (384, 1536), (512, 1280), (130, 70))
    },
}
_WARPS = dict(warps=(2, 4, 8))
_LOW_RANK = dict(_WARPS, rows=(1, 2, 4))
TUNING = {
    "one": Tuning(partial(build, partial(one, ROWS, COLUMNS, bits=6, group=64)), _WARPS),
    "one_low_rank": Tuning(CASES["packed6_g64_lqer"], _LOW_RANK),
    "all": Tuning(partial(build, partial(record_model, corrected=0)), _WARPS),
    "all_low_rank": Tuning(CASES["record_model"], _LOW_RANK),
}


def _pgolf(matrices: Sequence[Quantized]) -> Function:
    def packed(q: Quantized) -> family.QuantizedMatrix:
        if q.zero is None:
            codes = (q.codes.to(torch.int16) - (1 << (q.bits - 1))).to(torch.int8)
            return family.pack(codes, q.bits, q.scale, low_rank=q.low_rank)
        return family.pack(q.codes, q.bits, q.scale, q.zero, q.low_rank)

    if len(matrices) == 1:
        return partial(family.dequantize, packed(matrices[0]), dtype=torch.bfloat16)
    banks: dict[torch.Size, list[Quantized]] = {}
    for q in matrices:
        banks.setdefault(q.codes.shape, []).append(q)
    stored = {
        shape: matrices[0].scale.new_full((len(members), *shape), float("nan"), dtype=torch.bfloat16)
        for shape, members in banks.items()
    }
    places = {shape: iter(bank) for shape, bank in stored.items()}
    outs = [next(places[q.codes.shape]) for q in matrices]
    plan = family.DequantizePlan([packed(q) for q in matrices], outs)

    def run() -> list[Tensor]:
        plan()
        return outs

    return run


def _torchao(matrices: Sequence[Quantized]) -> Function:
    try:
        from torchao.prototype.dtypes.uintx.bitpacking import pack, unpack
    except ImportError:
        from torchao.dtypes.uintx.bitpacking import pack, unpack

    packed = [[q.codes] if q.bits == 8 else pack(q.codes, q.bits, dim=-1) for q in matrices]

    def run() -> list[Tensor]:
        codes = [p[0] if q.bits == 8 else unpack(p, q.bits, dim=-1) for q, p in zip(matrices, packed, strict=True)]
        return [weights(q, c, torch.float32).to(torch.bfloat16) for q, c in zip(matrices, codes, strict=True)]

    return run


if __name__ == "__main__":
    sys.exit(main({"dequant": CASES}, __doc__.splitlines()[0]))
