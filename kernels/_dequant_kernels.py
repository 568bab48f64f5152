"""Dequantisation on a GPU: the kernels of `dequant`, for one matrix or for many in one launch.

A thread takes a unit, 8 rows by 8 columns: two 16-byte loads from the first plane, one from the second, 8 bytes from
the third, and for a 16-bit dtype eight 16-byte stores, contiguous over a warp. The program that is shipped goes without
this file and takes the reference, once per evaluation.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ._launch import jit, launch_parameters, tl

RANKS = (0, 1, 2, 4, 8)  # kernels are compiled for these ranks; a rank between takes the next
ONE = 0x3F800000  # float32 1.0. A code's bits put below its exponent make 1 + code / 2^n with no conversion. Kernels
# get it as an argument: as a constant it would cost an instruction more for every code.


@jit
def _plane_words(planes, units, unit, live, bits, WIDTHS: tl.constexpr):
    """A thread's words of the planes that may be there: [units, 2, 4], [units, 4] and [units, 2]."""
    planes, units, unit = planes.to(tl.pointer_type(tl.uint32)), units.to(tl.int64), unit.to(tl.int64)
    quad = unit[:, None] * 4 + tl.arange(0, 4)[None, :]
    half = tl.arange(0, 2)[None, :, None] * (units * 4)
    first = tl.load(planes + quad[:, None, :] + half, mask=live[:, None, None], other=0)
    second, third = first, first  # not used
    if WIDTHS != 16:
        second = tl.load(planes + units * 8 + quad, mask=live[:, None] & (bits > 4), other=0)
    if WIDTHS & 128:
        pair = unit[:, None] * 2 + tl.arange(0, 2)[None, :]
        third = tl.load(planes + units * 12 + pair, mask=live[:, None] & (bits == 7), other=0)
    return first, second, third


@jit
def _unit_codes(words, one, WIDTHS: tl.constexpr, UNITS: tl.constexpr):
    """1 + q / 256 of codes of 4, 6 or 7 bits as float32 bits [UNITS, 8, 8]."""
    i, j = tl.arange(0, 2)[None, :, None, None], tl.arange(0, 4)[None, None, :, None]
    b = tl.arange(0, 8)[None, None, None, :]
    codes = ((words[0][:, :, :, None] >> 4 * b) & 15) << 15 | one
    if WIDTHS != 16:  # with "or" the compiler would change the order and need a third instruction a code
        codes ^= ((words[1][:, None, :, None] >> 16 * i + 2 * b) & 3) << 19
    if WIDTHS & 128:
        codes ^= ((words[2][:, :, None, None] >> 8 * j + b) & 1) << 21
    return tl.reshape(codes, UNITS, 8, 8)


@jit
def _byte_codes(planes, at, mask, least, one):
    """1 + q / 256 of codes of 8 bits as float32 bits [UNITS, 8, 8]."""
    planes = planes.to(tl.pointer_type(tl.uint8)) + tl.arange(0, 8)[None, None, :]
    codes = tl.load(planes + at[:, :, None], mask=mask, other=0).to(tl.uint32)
    return (codes ^ (least - 256)) << 15 | one  # a signed code's sign bit is turned into 128


@jit
def _nibbles(words, scale, one):
    """Codes in [-8, 7], in the low 4 bits of words, times scales of 16 bits: exact."""
    return tl.fma(((words & 15) << 19 | one).to(tl.float32, bitcast=True), scale * 16, scale * -24)


@jit
def _product(
    A, scale_A, B, scale_B, row, inside, column, live, columns, rank, one, product,
    RANK: tl.constexpr, PACKED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """A B of the units at these rows and columns, from a product of zero."""
    eight = tl.arange(0, 8)
    quads = column[:, None, None] + tl.arange(0, 2)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    if PACKED:
        words_A = tl.load(tl.max_contiguous(A + row, [1, 1]), mask=inside, other=0)
        s_A = tl.load(tl.max_contiguous(scale_A + row, [1, 1]), mask=inside, other=0)
    for k in tl.static_range(RANK):
        there = live & (k < rank)
        if PACKED:
            a = _nibbles(words_A >> 4 * k, s_A, one)
            at = column // 8 * rank + k
            words_B = tl.load(B + at, mask=there, other=0)
            s_B = tl.load(scale_B + at, mask=there, other=0)
            b = _nibbles(words_B[:, None] >> 4 * eight[None, :], s_B[:, None], one)
        else:
            a = tl.load(A + row * rank + k, mask=inside & (k < rank), other=0).to(tl.float32)
            b = tl.load(B + k * columns + quads, mask=there[:, None, None] & (quads < columns), other=0)
            b = tl.reshape(b.to(tl.float32), UNITS, 8)
        product = tl.fma(a[:, :, None], b[:, None, :], product)
    return product


@jit
def _dequantize_tile(
    planes, scale, zero, A, scale_A, B, scale_B, out,
    rows, columns, groups, stride, bits, least, rank, has_zero, tile, one,
    WIDTHS: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr, RANK: tl.constexpr, PACKED: tl.constexpr,
    ALIGNED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Tile ``tile`` (None: the program's number), UNITS units one after the other along the columns, then down.

    least: 256 less the least code. ZERO, RANK: whether there may be zeros, and the largest rank there may be. PACKED:
    factors are codes. ALIGNED: vectors of 8 columns lie at addresses of 16 bytes (8 for codes of 8 bits).
    """
    if tile is None:  # launched for one matrix, of which everything that may be there is
        tile, has_zero = tl.program_id(0), rows > 0
    eight = tl.arange(0, 8)
    if ALIGNED:
        columns, stride = columns // 8 * 8, stride // 8 * 8
    across = (columns + 7) // 8
    units = (rows + 7) // 8 * across
    unit = tile * UNITS + tl.arange(0, UNITS)
    live = unit < units
    down = unit // across
    column = (unit - down * across) * 8
    inside = live[:, None] & (down[:, None] * 8 + eight[None, :] < rows)
    top = down.to(tl.int64) * 8  # first row of a unit; offsets take 64 bits
    eight_rows = eight[None, :].to(tl.int64)
    group = (top * groups + column // (columns // groups))[:, None] + eight_rows * groups
    written = inside[:, :, None]
    if not ALIGNED:
        written &= (column[:, None] + eight[None, :] < columns)[:, None, :]
    # Values of consecutive rows that lie side by side must not give their loads a layout of their own.
    s = tl.load(tl.max_contiguous(scale + group, [1, 1]), mask=inside, other=0).to(tl.float32)
    z = tl.zeros_like(s)
    if ZERO:
        z = tl.load(tl.max_contiguous(zero + group, [1, 1]), mask=inside & has_zero, other=0).to(tl.float32)

    at = (top * columns + column)[:, None] + eight_rows * columns
    if WIDTHS != 256:
        words = _plane_words(planes, units, unit, live & (bits < 8), bits, WIDTHS)
    if RANK:  # before the codes are unpacked, which takes fewer registers
        product = tl.zeros((UNITS, 8, 8), tl.float32)
        if rank > 0:
            product = _product(
                A, scale_A, B, scale_B, top[:, None] + eight_rows, inside, column, live, columns, rank, one,
                product, RANK, PACKED, UNITS,
            )  # fmt: skip
    codes = _byte_codes(planes, at, written, least, one) if WIDTHS == 256 else _unit_codes(words, one, WIDTHS, UNITS)
    if WIDTHS & 256 and WIDTHS != 256:  # noqa: SIM102 (decided when compiling, the next line when running)
        if bits == 8:
            codes = _byte_codes(planes, at, written, least, one)
    code = codes.to(tl.float32, bitcast=True)
    if WHOLE:
        w = tl.fma(code, (s * 256)[:, :, None], ((-1.0 * least - z) * s)[:, :, None])
    else:
        w = (tl.fma(code, 256.0, -1.0 * least) - z[:, :, None]) * s[:, :, None]
    if RANK:
        w += product
    at = (top * stride + column)[:, None] + eight_rows * stride
    tl.store(out + at[:, :, None] + eight[None, None, :], w.to(out.dtype.element_ty), mask=written)


@jit
def _dequantize_tiles(
    planes, scale, zero, A, scale_A, B, scale_B, out, table, tiles, one,
    WIDTHS: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr, RANK: tl.constexpr, PACKED: tl.constexpr,
    ALIGNED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Many matrices. table: int64 [matrices, 16], distances in elements from the tensors given (bytes for planes) and
    sizes, in the order of `_dequantize_tile`; tiles: int32 [programs, 2], the matrix and its tile."""
    EIGHT: tl.constexpr = 8 if ALIGNED else 1  # what the compiler shall know divides a distance
    BYTES: tl.constexpr = 16 if ALIGNED else 1
    tile = tiles + 2 * tl.program_id(0)
    row = table + 16 * tl.load(tile)
    zero = zero + tl.load(row + 2) if ZERO else None
    if RANK:
        A, B = A + tl.load(row + 3), B + tl.load(row + 5) // EIGHT * EIGHT
    if PACKED:
        scale_A, scale_B = scale_A + tl.load(row + 4), scale_B + tl.load(row + 6)
    _dequantize_tile(
        planes.to(tl.pointer_type(tl.uint8)) + tl.load(row) // BYTES * BYTES,
        scale + tl.load(row + 1), zero, A, scale_A, B, scale_B, out + tl.load(row + 7) // EIGHT * EIGHT,
        tl.load(row + 8).to(tl.int32), tl.load(row + 9).to(tl.int32), tl.load(row + 10).to(tl.int32),
        tl.load(row + 11), tl.load(row + 12).to(tl.int32), tl.load(row + 13).to(tl.int32),
        tl.load(row + 14).to(tl.int32), tl.load(row + 15) != 0, tl.load(tile + 1), one,
        WIDTHS, ZERO, WHOLE, RANK, PACKED, ALIGNED, UNITS,
    )  # fmt: skip


# A matrix as the kernels take it. tensors: planes, scale, zero, A, scale_A, B, scale_B, out, some of them None; sizes:
# rows, columns, groups, stride, bits, least, rank; units: int; aligned, whole: bool.
Item = namedtuple("Item", "tensors sizes units aligned whole")


def _constants(case: str, items: Sequence[Item]) -> dict[str, int | bool | None]:
    """What is compiled in: the least that serves all items, and its launch parameters.

    ``units`` to a program, ``warps``, and the most ``registers`` a thread may take, 0 for no limit. Zeros, bytes and
    what is not aligned need more registers: no limit there, and half the units for the last.
    """
    rank = max(item.sizes[6] for item in items)
    measured = launch_parameters("dequant", f"{case}_low_rank" if rank else case, items[0].tensors[0].device)
    widths, zero = sum({1 << item.sizes[4] for item in items}), any(item.tensors[2] is not None for item in items)
    whole, aligned = (all(getattr(item, name) for item in items) for name in ("whole", "aligned"))
    limit = None if zero or widths & 256 or not aligned else measured["registers"] or None
    return dict(
        WIDTHS=widths, ZERO=zero, WHOLE=whole, RANK=next(r for r in RANKS if rank <= r), ALIGNED=aligned,
        PACKED=any(item.tensors[4] is not None for item in items), UNITS=measured["units"] // (1 if aligned else 2),
        num_warps=measured["warps"], maxnreg=limit, enable_fp_fusion=False,
    )  # fmt: skip


def launch_one(item: Item) -> None:
    """One matrix in one launch."""
    constants = _constants("one", [item])
    _dequantize_tile[(-(-item.units // constants["UNITS"]),)](*item.tensors, *item.sizes, None, None, ONE, **constants)


def launch_all(items: Sequence[Item]) -> Callable[[], None]:
    """The launch of all items, whose tensors have the same dtypes; calling it is one launch and no copy."""
    constants = _constants("all", items)
    anchors = [next((t for t in each if t is not None), None) for each in zip(*(i.tensors for i in items), strict=True)]
    sizes = [1, *(1 if t is None else t.element_size() for t in anchors[1:])]  # planes are counted in bytes
    rows, tiles = [], []
    for number, item in enumerate(items):
        operands = zip(item.tensors, anchors, sizes, strict=True)
        distances = [0 if t is None else (t.data_ptr() - anchor.data_ptr()) // size for t, anchor, size in operands]
        rows.append([*distances, *item.sizes, item.tensors[2] is not None])
        tile = torch.arange(-(-item.units // constants["UNITS"]), dtype=torch.int32)
        tiles.append(torch.stack([torch.full_like(tile, number), tile], 1))
    table, places = (t.to(anchors[0].device) for t in (torch.tensor(rows, dtype=torch.int64), torch.cat(tiles)))
    return partial(_dequantize_tiles[(len(places),)], *anchors, table, places, ONE, **constants)
