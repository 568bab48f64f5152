"""Dequantisation on a GPU: kernels and launches for one matrix, or for many in one launch.

A thread takes a unit of 8 rows by 8 columns. It loads the unit's words, 16 bytes at a time, then computes row by row.
For a 16-bit dtype a row is a store of 16 bytes, and a warp's stores are contiguous. The format of a matrix is compiled
in. The launch of many matrices has the code of every format, and a program branches to the one of its matrix. The
exported program leaves this file out and takes the reference, once per evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters
from .matrix import QuantizedMatrix
from .packing import packed_factors

# The bits of a code are brought to position p of a word and get the exponent that makes the word the float32 number
# 2^(23-p) + code. The addend of the product subtracts the power, which is exact for 16-bit scales if p is 11 or more.
# Codes of 4 and 6 bits have two positions, 12 and 16 or 11 and 17, so that one rotation of the word serves two codes.
# Codes of 7 and 8 bits have one position, 11 or 15.
ONE = 0x3F800000  # float32 1.0, for exponents: an argument, since a constant would cost an instruction for every code


@jit
def _divided(n, factor, shift):
    """Return n // d for 0 <= n < 2^31, from the factor and shift that `_reciprocal` gives for d."""
    return (tl.umulhi((n * 2).to(tl.uint32), factor.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@jit
def _right(words, by):
    """Return words rotated to the right."""
    return (words >> by) | (words << ((32 - by) & 31))


@jit
def _four(values, UNITS: tl.constexpr):
    """Return the four columns of [UNITS, 4]."""
    even, odd = tl.split(tl.reshape(values, UNITS, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@jit
def _code(words, MASK: tl.constexpr, POSITION: tl.constexpr, one):
    """Return the bits of the float32 number 2^(23-POSITION) + code."""
    return words & (MASK << POSITION) | one + ((23 - POSITION) << 23)


@jit
def _plane_words(planes, units, unit, mask, BITS: tl.constexpr, UNITS: tl.constexpr):
    """Load the words of units, each [UNITS].

    4 bits: one word for each of 8 rows. 6 bits: three words for every two rows, in the order of the words. 7 bits: the
    same, and one word for every four rows.
    """
    planes, plane = planes.to(tl.pointer_type(tl.uint32)), units.to(tl.int64) * 4
    at = unit.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = _four(tl.load(planes + at, mask=mask), UNITS) + _four(tl.load(planes + plane + at, mask=mask), UNITS)
    if BITS > 4:
        words = words + _four(tl.load(planes + plane * 2 + at, mask=mask), UNITS)
    if BITS == 7:
        at = unit.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
        words = words + tl.split(tl.load(planes + plane * 3 + at, mask=mask))
    return words


@jit
def _byte_words(planes, at, columns, rows_left, inside, offset, ALIGNED: tl.constexpr):
    """Load codes of 8 bits plus ``offset``: 16 words [UNITS], two for each row; not ALIGNED: 8 rows [UNITS, 8]."""
    words: tl.tuple = ()
    for row in tl.static_range(8):
        if ALIGNED:
            pairs = (planes + (at + row * columns)).to(tl.pointer_type(tl.uint32))[:, None] + tl.arange(0, 2)[None, :]
            first, second = tl.split(tl.load(pairs))
            flip = offset.to(tl.uint32) * 0x01010101  # flips all sign bits, or none
            words = words + (first ^ flip, second ^ flip)
        else:
            bytes = planes + (at + row * columns)[:, None] + tl.arange(0, 8)[None, :]
            codes = tl.load(bytes, mask=(row < rows_left)[:, None] & inside).to(tl.uint32)
            words = words + (codes ^ offset.to(tl.uint32),)
    return words


@jit
def _row_of_nibbles(words, one, ROW: tl.constexpr):
    """Return a row of 4-bit codes for `_row`: numbers from `_code`, and which of them are at the second position."""
    b = tl.arange(0, 8)[None, :]
    word = _right(words[ROW][:, None], b // 2 * 8)
    return tl.where(b % 2 == 1, _code(word, 15, 16, one), _code(word, 15, 12, one)), b % 2 == 1


@jit
def _row_of_sixes(words, one, BITS: tl.constexpr, ROW: tl.constexpr):
    """Return a row of codes of 6 bits, or of 7 with one more bit from another plane; as `_row_of_nibbles`."""
    b = tl.arange(0, 8)[None, :]
    field = ROW % 2 * 8 + b  # the 16th code has two bits in each of three words
    x, y, z = words[ROW // 2], words[4 + ROW // 2], words[8 + ROW // 2]
    word = tl.where(field < 5, x[:, None], tl.where(field < 10, y[:, None], z[:, None]))
    place = field % 5
    if BITS == 6:
        second = (place % 3 == 1) | (field == 15)
        word = _right(word, tl.where(place < 2, 0, tl.where(place == 2, 12, 20)))
        codes = tl.where(second, _code(word, 63, 17, one), _code(word, 63, 11, one))
        if ROW % 2 == 1:
            rest = _code(_right(x, 12), 3, 17, one) ^ (_right(y, 10) & (3 << 19))
            codes = tl.where(b == 7, (rest ^ (_right(z, 8) & (3 << 21)))[:, None], codes)
    else:
        second = b < 0
        codes = _code(_right(word, tl.where(place < 3, place * 6, place * 6 + 2)), 63, 11, one)
        if ROW % 2 == 1:
            rest = _code(_right(x, 18), 3, 11, one) ^ (_right(y, 16) & (3 << 13))
            codes = tl.where(b == 7, (rest ^ (_right(z, 14) & (3 << 15)))[:, None], codes)
        # With "or" the compiler would reorder and need a third instruction for every code.
        codes ^= _right(words[12 + ROW // 4][:, None], (ROW % 4 * 8 + b + 15) & 31) & (1 << 17)
    return codes, second


@jit
def _row_of_bytes(words, one, ALIGNED: tl.constexpr, ROW: tl.constexpr):
    """Return a row of 8-bit codes; as `_row_of_nibbles`."""
    b = tl.arange(0, 8)[None, :]
    if ALIGNED:
        word = tl.where(b < 4, words[2 * ROW][:, None], words[2 * ROW + 1][:, None])
        codes = _code(_right(word, (b % 4 * 8 + 17) & 31), 255, 15, one)
    else:
        codes = _code(words[ROW] << 15, 255, 15, one)
    return codes, b < 0


@jit
def _row(
    words,
    scales,
    zeros,
    rows_A,
    columns_B,
    offset,
    one,
    FORMATS: tl.constexpr,
    NUMBER: tl.constexpr,
    ROW: tl.constexpr,
):
    """Return the weights of a row of the units, float32 [UNITS, 8]."""
    BITS: tl.constexpr = FORMATS[NUMBER][0]
    ZERO: tl.constexpr = FORMATS[NUMBER][2]
    WHOLE: tl.constexpr = FORMATS[NUMBER][3]
    RANK: tl.constexpr = FORMATS[NUMBER][4]
    FIRST: tl.constexpr = 1 << (8 if BITS == 8 else 11 if BITS == 4 else 12)  # 2^(23-p)
    SECOND: tl.constexpr = 1 << (7 if BITS == 4 else 6 if BITS == 6 else 0)
    if BITS == 4:
        codes, second = _row_of_nibbles(words, one, ROW)
    elif BITS == 8:
        codes, second = _row_of_bytes(words, one, FORMATS[NUMBER][5], ROW)
    else:
        codes, second = _row_of_sixes(words, one, BITS, ROW)
    w, s = codes.to(tl.float32, bitcast=True), scales[ROW].to(tl.float32)
    least = (offset + FIRST).to(tl.float32)
    if WHOLE:
        addend = -least * s
        if ZERO:
            addend = (-least - zeros[ROW].to(tl.float32)) * s
        other = tl.fma(s, FIRST - SECOND, addend)
        w = tl.fma(w, s[:, None], tl.where(second, other[:, None], addend[:, None]))
    else:
        w -= tl.where(second, (offset + SECOND).to(tl.float32), least)
        if ZERO:
            w -= zeros[ROW].to(tl.float32)[:, None]
        w *= s[:, None]
    if RANK:
        product = rows_A[ROW * RANK][:, None] * columns_B[0]
        for k in tl.static_range(1, RANK):
            product = tl.fma(rows_A[ROW * RANK + k][:, None], columns_B[k], product)
        w += product
    return w


@jit
def _dequantize_tile(
    planes,
    scale,
    zero,
    A,
    B,
    out,
    rows,
    columns,
    groups,
    stride,
    offset,
    across_factor,
    across_shift,
    group_factor,
    group_shift,
    tile,
    one,
    FORMATS: tl.constexpr,
    NUMBER: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write tile ``tile``: UNITS units, counted along the columns, then down.

    offset: the least code, negated. across_…, group_…: reciprocals of the units in a row and in a group's row. ROWS:
    where there are factors, the scale and factors of a row are loaded this many rows ahead, which hides latency and
    takes registers.
    """
    BITS: tl.constexpr = FORMATS[NUMBER][0]
    GROUPED: tl.constexpr = FORMATS[NUMBER][1]
    ZERO: tl.constexpr = FORMATS[NUMBER][2]
    RANK: tl.constexpr = FORMATS[NUMBER][4]
    ALIGNED: tl.constexpr = FORMATS[NUMBER][5]
    AHEAD: tl.constexpr = ROWS if RANK else 8
    eight, four = tl.arange(0, 8)[None, :], tl.arange(0, 4)[None, :]
    across = (columns + 7) >> 3
    units = ((rows + 7) >> 3) * across
    unit = tile * UNITS + tl.arange(0, UNITS)
    live = unit < units
    if ALIGNED:  # no masks: programs past the end repeat the last unit
        unit = tl.minimum(unit, units - 1)
        columns, stride = (columns >> 3) << 3, (stride >> 3) << 3  # tells the compiler that 8 divides them
    columns, stride = columns.to(tl.int64), stride.to(tl.int64)
    down = _divided(unit, across_factor, across_shift)
    block = unit - down * across
    rows_left = tl.where(live, rows - down * 8, 0)
    top = down.to(tl.int64) * 8  # first row of a unit; offsets take 64 bits
    inside = block[:, None] * 8 + eight < columns
    out += (top * stride + block * 8)[:, None] + eight
    group = top
    if GROUPED:
        group = top * groups + _divided(block, group_factor, group_shift)
    scale += group
    if ZERO:
        zero += group
    if BITS == 8:
        planes = planes.to(tl.pointer_type(tl.uint8))
        words = _byte_words(planes, top * columns + block * 8, columns, rows_left, inside, offset, ALIGNED)
    else:
        words = _plane_words(planes, units, unit, None if ALIGNED else live[:, None], BITS, UNITS)
    columns_B: tl.tuple = ()
    if RANK:
        A += (top * RANK)[:, None] + four
        B += (block // 32 * (256 * RANK) + block % 32 * 4)[:, None] + four
        for k in tl.static_range(RANK):
            mask = None if ALIGNED else live[:, None]
            halves = tl.join(tl.load(B + 256 * k, mask=mask), tl.load(B + 256 * k + 128, mask=mask))
            columns_B = columns_B + (tl.reshape(tl.permute(halves, (0, 2, 1)), UNITS, 8),)
    scales: tl.tuple = ()
    zeros: tl.tuple = ()
    rows_A: tl.tuple = ()
    for step in tl.static_range(8 + AHEAD):
        if step < 8:
            at = step * groups if GROUPED else step
            mask, mask_A = (None, None) if ALIGNED else (step < rows_left, (step < rows_left)[:, None])
            scales = scales + (tl.load(scale + at, mask=mask),)
            if ZERO:
                zeros = zeros + (tl.load(zero + at, mask=mask),)
            for k in tl.static_range(0, RANK, 4):
                rows_A = rows_A + _four(tl.load(A + (step * RANK + k), mask=mask_A), UNITS)
        if step >= AHEAD:
            w = _row(words, scales, zeros, rows_A, columns_B, offset, one, FORMATS, NUMBER, step - AHEAD)
            mask = None if ALIGNED else (step - AHEAD < rows_left)[:, None] & inside
            tl.store(out + (step - AHEAD) * stride, w.to(out.dtype.element_ty), mask=mask)


# Sizes on which Triton must not specialise: no value is worth another compilation.
SIZES = (
    "rows",
    "columns",
    "groups",
    "stride",
    "offset",
    "across_factor",
    "across_shift",
    "group_factor",
    "group_shift",
)


@jit(do_not_specialize=SIZES)
def _dequantize_one(
    planes,
    scale,
    zero,
    A,
    B,
    out,
    rows,
    columns,
    groups,
    stride,
    offset,
    across_factor,
    across_shift,
    group_factor,
    group_shift,
    one,
    FORMATS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write one matrix."""
    _dequantize_tile(
        planes,
        scale,
        zero,
        A,
        B,
        out,
        rows,
        columns,
        groups,
        stride,
        offset,
        across_factor,
        across_shift,
        group_factor,
        group_shift,
        tl.program_id(0),
        one,
        FORMATS,
        0,
        UNITS,
        ROWS,
    )


@jit
def _multiple(distance, OF: tl.constexpr, FORMATS: tl.constexpr, NUMBER: tl.constexpr):
    """Return a distance, and where the format is aligned tell the compiler that it is a multiple of OF."""
    return tl.multiple_of(distance & -OF, OF) if FORMATS[NUMBER][5] else distance


@jit
def _dequantize_many(
    planes,
    scale,
    zero,
    A,
    B,
    out,
    table,
    tiles,
    one,
    FORMATS: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write many matrices.

    table: int64 [matrices, 16], distances in elements from the given tensors (in bytes for planes), then sizes in the
    order of `_dequantize_tile`, then the number of the format. tiles: int32 [programs, 2], a matrix and its tile.
    """
    tile = tiles + 2 * tl.program_id(0)
    row = table + 16 * tl.load(tile)
    tile, kind = tl.load(tile + 1), tl.load(row + 15)
    planes_at, scale_at, out_at = tl.load(row), tl.load(row + 1), tl.load(row + 5)
    rows, columns, groups = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)
    stride, offset = tl.load(row + 9), tl.load(row + 10).to(tl.int32)
    across_factor, across_shift = tl.load(row + 11), tl.load(row + 12)
    group_factor, group_shift = tl.load(row + 13), tl.load(row + 14)
    for number in tl.static_range(len(FORMATS)):
        if kind == number:
            _dequantize_tile(
                planes.to(tl.pointer_type(tl.uint8)) + _multiple(planes_at, 16, FORMATS, number),
                scale + scale_at,
                zero + tl.load(row + 2) if FORMATS[number][2] else None,
                A + _multiple(tl.load(row + 3), 4, FORMATS, number) if FORMATS[number][4] else None,
                B + _multiple(tl.load(row + 4), 4, FORMATS, number) if FORMATS[number][4] else None,
                out + _multiple(out_at, 8, FORMATS, number),
                rows,
                columns,
                groups,
                stride,
                offset,
                across_factor,
                across_shift,
                group_factor,
                group_shift,
                tile,
                one,
                FORMATS,
                number,
                UNITS,
                ROWS,
            )


class _Item(NamedTuple):
    """A matrix as the kernels take it."""

    # planes, scale, zero, A, B, out
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]
    sizes: tuple[int, int, int, int, int]  # rows, columns, groups, stride, offset
    # bits; whether there are groups and zeros; whether products are exact; the rank; whether vectors of 8 columns and
    # of 8 rows are whole and lie at addresses of 16 bytes
    format: tuple[int, bool, bool, bool, int, bool]


def _item(q: QuantizedMatrix, out: Tensor) -> _Item:
    """Return the matrix as the kernels take it; the rows of ``out`` are contiguous."""
    A, B = (None, None) if q.low_rank is None else packed_factors(q)
    scale, zero = q.scale.contiguous(), q.zero if q.zero is None else q.zero.contiguous()
    vectors = [(q.planes, 16), (out, 8 * out.element_size()), *((t, 16) for t in (A, B) if t is not None)]
    aligned = q.rows % 8 == q.columns % 8 == out.stride(0) % 8 == 0
    aligned = aligned and all(t.data_ptr() % size == 0 for t, size in vectors)
    groups = scale.numel() // q.rows
    sizes = (q.rows, q.columns, groups, out.stride(0), 1 << q.bits - 1 if q.signed else 0)
    kind = (q.bits, groups > 1, zero is not None, q.whole, 0 if A is None else A.size(1), aligned)
    return _Item((q.planes, scale, zero, A, B, out), sizes, kind)


def _units(item: _Item) -> int:
    return -(-item.sizes[0] // 8) * -(-item.sizes[1] // 8)


def _reciprocal(divisor: int) -> tuple[int, int]:
    """Return factor in [2^31, 2^32) and shift with n // divisor == (2 n factor >> 32) >> shift for 0 <= n < 2^31."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << 31 + shift) // divisor), shift


def _numbers(item: _Item) -> tuple[int, ...]:
    """Return sizes and reciprocals, in the kernels' order."""
    _, columns, groups, *_ = item.sizes
    return *item.sizes, *_reciprocal(-(-columns // 8)), *_reciprocal(max(columns // groups // 8, 1))


def _constants(case: str, items: Sequence[_Item]) -> dict[str, int]:
    """Return launch parameters: ``warps`` of a program, a unit for each thread, and how many ``rows`` to load ahead.

    Unaligned matrices need more registers, and two threads take a unit.
    """
    rank, aligned = max(item.format[4] for item in items), all(item.format[5] for item in items)
    measured = launch_parameters("dequant", f"{case}_low_rank" if rank else case, items[0].tensors[0].device)
    return dict(
        UNITS=(32 if aligned else 16) * measured["warps"],
        ROWS=measured.get("rows", 8),
        num_warps=measured["warps"],
        enable_fp_fusion=False,
    )


def launch_one(q: QuantizedMatrix, out: Tensor) -> None:
    """Write the weights of one matrix in one launch, into ``out`` with any strides."""
    dense = out if out.stride(1) == 1 or q.columns == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    item = _item(q, dense)
    constants = _constants("one", [item])
    grid = (-(-_units(item) // constants["UNITS"]),)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _dequantize_one[grid](*item.tensors, *_numbers(item), ONE, FORMATS=(item.format,), **constants)
    if dense is not out:
        out.copy_(dense)


class LaunchOfMany:
    """One launch that writes the weights of all pairs of a matrix and its ``out``; a call is the launch and no copy.

    The scales have one dtype, and so have the outs, whose rows are contiguous. The launch keeps all tensors alive.
    """

    def __init__(self, pairs: Sequence[tuple[QuantizedMatrix, Tensor]]) -> None:
        items = [_item(q, out) for q, out in pairs]
        items.sort(key=lambda item: -item.format[4])  # the slowest matrices first, so that none is left at the end
        self._items, self._outs = items, [item.tensors[-1] for item in items]
        constants, formats = _constants("all", items), tuple(dict.fromkeys(item.format for item in items))
        # Distances from one aligned tensor to another are multiples; distances from any other tensor are not.
        aligned_first = (item.tensors for item in sorted(items, key=lambda item: not item.format[5]))
        anchors = [next((t for t in each if t is not None), None) for each in zip(*aligned_first, strict=True)]
        sizes = [1, *(1 if t is None else t.element_size() for t in anchors[1:])]  # distances of planes are in bytes
        rows, tiles = [], []
        for number, item in enumerate(items):
            distances = [
                0 if tensor is None or anchor is None else (tensor.data_ptr() - anchor.data_ptr()) // size
                for tensor, anchor, size in zip(item.tensors, anchors, sizes, strict=True)
            ]
            rows.append([*distances, *_numbers(item), formats.index(item.format)])
            tile = torch.arange(-(-_units(item) // constants["UNITS"]), dtype=torch.int32)
            tiles.append(torch.stack([torch.full_like(tile, number), tile], 1))
        device = self._outs[0].device
        table, places = torch.tensor(rows, dtype=torch.int64).to(device), torch.cat(tiles).to(device)
        kernel = _dequantize_many[(len(places),)]
        self._launch = partial(kernel, *anchors, table, places, ONE, FORMATS=formats, **constants)

    def __call__(self) -> None:
        """Write all weights."""
        torch.autograd.graph.increment_version(self._outs)
        with torch.cuda.device_of(self._outs[0]):  # Triton launches on the current device
            self._launch()
