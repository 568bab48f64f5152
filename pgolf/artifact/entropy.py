"""Entropy coding of matrices of codes: interleaved range coders (rANS), Gaussian models, integers only.

A code u on a trellis is written as the k of u = 2 k + z. z is the parity of its state, which the decoder knows from the
codes above it in the column. Without a trellis k is u. The model of k is a Gaussian of one of `CLASSES` variances, four
to an octave: the class that is stored for its row, plus the offset of its column, estimated from the rows above. A k
far outside its model is an escape, whose value is stored separately.

Up to `LANES` coders, one for each column modulo `LANES`, share a stream of 16-bit words. numpy runs them as one vector
(Giesen, arXiv 1402.3392). All numbers are integers, the tables' too, so all machines decode the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import isqrt
from typing import NamedTuple

import numpy as np

from pgolf.kernels.trellis import STATES, trellis

LANES = 512
PRECISION = 15  # bits of a probability
LOWEST = 1 << 16  # least state of a coder, whose states are below 2^32; below it the decoder reads a word of 16 bits
REACH = 128  # k with |k| below this are in the tables
ESCAPE = -REACH
CLASSES = range(-16, 56)  # class c has the variance 2^(c/4) of u
PRIOR = 16  # weight of the prior in rows: before any data a column has the variance of its row's class
REFRESH = 4  # rows between two updates of the columns' offsets
_UNIT = 20  # fractional bits of a column's variance
PRIOR_ENERGY = PRIOR << _UNIT
_POINTS = 8  # points at which the density is computed, in each unit of u
_LOG2_E = 1624330212139199  # log2(e) times 2^50


class EntropyError(ValueError):
    """The words are not a code of matrices with these layouts."""


class Layout(NamedTuple):
    """What a decoder must know of a matrix. row_class: int8 [rows]; states: of the trellis, or 1 without one."""

    rows: int
    columns: int
    row_class: np.ndarray
    states: int
    path_length: int

    def check(self) -> None:
        """Raise EntropyError for a layout that no matrix can have."""
        if self.states not in STATES or self.path_length < 1:
            raise EntropyError(f"there is no trellis of {self.states} states with paths of {self.path_length} rows")
        if not all(c in CLASSES for c in {*self.row_class.tolist()}):
            raise EntropyError(f"its rows have classes outside {CLASSES[0]} to {CLASSES[-1]}")


class Stream(NamedTuple):
    """The code of a list of matrices. words: uint16; states: uint32 [LANES]; escapes: int16."""

    words: np.ndarray
    states: np.ndarray
    escapes: np.ndarray


def row_classes(codes: np.ndarray) -> np.ndarray:
    """Return the class nearest to each row's mean square, int8 [R], for codes [R, C]."""
    mean = np.maximum(np.square(codes.astype(np.float64)).mean(1), 1e-9)
    return np.clip(np.rint(4 * np.log2(mean)), CLASSES[0], CLASSES[-1]).astype(np.int8)


# --- Tables -----------------------------------------------------------------------------------------------------------


def _power(eighths: int) -> int:
    """Return 2^(eighths / 8), rounded down exactly, for ``eighths`` of at least 0."""
    return isqrt(isqrt(isqrt(1 << eighths)))


@cache
def _halving(bits: int) -> list[int]:
    """Return 2^30 times 2^(-1/2), 2^(-1/4), …: one factor for each of ``bits`` bits."""
    root, factors = 1 << 29 + 60, []  # 2^-1 times 2^30, with 60 more bits
    for _ in range(bits):
        root = isqrt(root << 90)
        factors.append(root >> 60)
    return factors


def _densities(variance_class: int) -> np.ndarray:
    """Return 2^30 exp(-x²/2σ²) for x = 1/16, 3/16, …, int64, with σ² = 2^(variance_class / 4)."""
    count = (2 * REACH + 4) * _POINTS
    rate = _LOG2_E * _power(8 * 100 - 2 * variance_class) >> 100 + 9  # log2(e) / (2 σ² 16²), times 2^50
    exponents = [min((2 * i + 1) ** 2 * rate >> 26, 62 << 24) for i in range(count)]
    exponent = np.array(exponents, np.int64)
    value = np.full(count, 1 << 30, np.int64)
    for place, factor in enumerate(_halving(24)):
        value = np.where(exponent >> 23 - place & 1, value * factor >> 30, value)
    return value >> (exponent >> 24)


@cache
def frequencies(kind: int) -> np.ndarray:
    """Return the frequencies of k by class, uint32 [classes, 2 REACH].

    Columns are k = -REACH, …, REACH - 1, of which the first is `ESCAPE`. Each row adds up to 2^PRECISION.

    kind: 0 without a trellis, 1 and 2 for the parities 0 and 1 of u = 2 k + z.
    """
    width, parity = (1, 0) if kind == 0 else (2, kind - 1)
    rows = []
    for variance_class in CLASSES:
        density = _densities(variance_class)
        # The points of u begin at -2 REACH - 4. A cell reaches from half a width below its u to half a width above.
        line = np.concatenate([density[::-1], density])
        ks = np.arange(-REACH + 1, REACH)
        first = (width * ks + parity) * _POINTS - width * _POINTS // 2 + len(density)
        mass = np.concatenate([[0], line.cumsum()])
        share = mass[first + width * _POINTS] - mass[first]
        total, held = int(share.sum()), share > int(share.max()) >> 24
        free = (1 << PRECISION) - 1 - int(held.sum())
        count = np.where(held, 1 + share * free // total, 0)
        count[int(share.argmax())] += (1 << PRECISION) - 1 - int(count.sum())
        rows.append(np.concatenate([[1], count]))
    return np.array(rows, np.uint32)


class _Decoding(NamedTuple):
    """Tables of the decoder: symbol, frequency and offset for each value of a state's low bits, by kind and class."""

    k: np.ndarray
    frequency: np.ndarray
    offset: np.ndarray  # of the low bits from the first value that stands for k


@cache
def _decoding(trellised: bool) -> _Decoding:
    counts = np.concatenate([frequencies(kind) for kind in ((1, 2) if trellised else (0,))])
    k = np.concatenate([np.repeat(np.arange(-REACH, REACH, dtype=np.int16), count) for count in counts])
    frequency = np.concatenate([np.repeat(count, count) for count in counts])
    firsts = np.cumsum(counts, axis=1, dtype=np.uint32) - counts
    starts = np.concatenate([np.repeat(first, count) for first, count in zip(firsts, counts, strict=True)])
    offset = np.tile(np.arange(1 << PRECISION, dtype=np.uint32), len(counts)) - starts
    return _Decoding(k, frequency, offset)


class Columns:
    """Estimates the offsets of a matrix's columns from the codes of the rows so far."""

    MOST = 40  # largest offset of a column from its row's class, up or down
    weights = np.array([_power(8 * _UNIT - 2 * c) for c in CLASSES], np.int64)  # 1 / variance
    thresholds = np.array([_power(8 * _UNIT + 2 * c - 1) for c in range(1 - MOST, 1 + MOST)], np.int64)

    def __init__(self, columns: int) -> None:
        self.energy = np.full(columns, PRIOR_ENERGY, np.int64)
        self.rows = PRIOR

    def classes(self) -> np.ndarray:
        """Return each column's offset from its row's variance class, int64 in [-MOST, MOST]."""
        return np.searchsorted(self.thresholds, self.energy // self.rows, side="right") - self.MOST

    def add(self, codes: np.ndarray, row_class: np.ndarray) -> None:
        """Add rows of codes to the estimates."""
        codes = codes.astype(np.int64)
        self.energy += (codes * codes * self.weights[row_class.astype(np.int64) - CLASSES[0], None]).sum(0)
        self.rows += len(codes)


def _indices(offset: np.ndarray, row_class: np.ndarray) -> np.ndarray:
    """Return the indices in `CLASSES` of the classes of rows of codes, int64 [rows, columns]."""
    return np.clip(offset + row_class.astype(np.int64)[:, None] - CLASSES[0], 0, len(CLASSES) - 1)


# --- Coding -----------------------------------------------------------------------------------------------------------


def encode(matrices: Sequence[tuple[np.ndarray, Layout]]) -> Stream:
    """Encode matrices of codes, int16 [R, C], each with its layout.

    Raises EntropyError for codes that are on no path of their trellis.
    """
    x = np.full(LANES, LOWEST, np.uint64)
    words: list[np.ndarray] = [np.empty(0, np.uint16)]
    prepared = [_symbols(codes, layout) for codes, layout in matrices]
    for _, frequency, start in reversed(prepared):
        rows, columns = start.shape
        for row in range(rows - 1, -1, -1):
            for left in range((columns - 1) // LANES * LANES, -1, -LANES):
                f, lanes = frequency[row, left : left + LANES], x[: min(LANES, columns - left)]
                full = lanes >= f << np.uint64(32 - PRECISION)
                words.append((lanes[full] & np.uint64(0xFFFF)).astype(np.uint16)[::-1])
                lanes[full] >>= np.uint64(16)
                quotient = lanes // f
                lanes += quotient * ((np.uint64(1) << np.uint64(PRECISION)) - f) + start[row, left : left + LANES]
    escapes = np.concatenate([np.empty(0, np.int16), *(escapes for escapes, _, _ in prepared)])
    return Stream(np.concatenate(words)[::-1].copy(), x.astype(np.uint32), escapes)


def _symbols(codes: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the escaped k, int16 in the order of decoding, and each symbol's frequency and start, uint64 [R, C]."""
    codes = codes.astype(np.int64)
    parity = _parities(codes, layout)
    k = (codes - parity) >> 1 if layout.states > 1 else codes
    columns, index = Columns(layout.columns), np.empty(codes.shape, np.int64)
    for row in range(0, layout.rows, REFRESH):
        block = slice(row, row + REFRESH)
        index[block] = _indices(columns.classes(), layout.row_class[block])
        columns.add(codes[block], layout.row_class[block])
    counts = np.stack([frequencies(kind) for kind in ((1, 2) if layout.states > 1 else (0,))])
    starts = np.cumsum(counts, axis=2, dtype=np.uint32) - counts
    symbol = np.where(np.abs(k) < REACH, k, ESCAPE) + REACH
    symbol[counts[parity, index, symbol] == 0] = 0
    found = [table[parity, index, symbol].astype(np.uint64) for table in (counts, starts)]
    return k[symbol == 0].astype(np.int16), found[0], found[1]


def _parities(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """Return the parity of each code's state, int64 [R, C]; zeros without a trellis."""
    parities = np.zeros(codes.shape, np.int64)
    if layout.states == 1:
        return parities
    parity, following = (np.array(table, np.int64) for table in trellis(layout.states))
    for row in range(layout.rows):
        if row % layout.path_length == 0:
            state = np.zeros(layout.columns, np.int64)
        parities[row] = parity[state]
        if ((codes[row] - parities[row]) & 1).any():
            raise EntropyError(f"the codes of row {row} are on no path of a trellis of {layout.states} states")
        state = following[state, (codes[row] - parities[row] >> 1) & 1]
    return parities


def decode(stream: Stream, layouts: Sequence[Layout]) -> list[np.ndarray]:
    """Return the matrices of codes, int16 [R, C], that `encode` was given.

    Raises EntropyError, which may come only after decoding, for words that are not a code of such matrices. The layouts
    bound time and memory.
    """
    x = stream.states.astype(np.uint32)
    words, escapes = np.concatenate([stream.words, np.zeros(LANES, np.uint16)]).astype(np.uint32), stream.escapes
    word = escape = 0
    decoded = []
    for layout in layouts:
        trellised = layout.states > 1
        tables = _decoding(trellised)
        parity, following = (np.array(table, np.int64) for table in trellis(layout.states))
        turned = following.reshape(-1)
        columns = Columns(layout.columns)
        codes = np.empty((layout.rows, layout.columns), np.int32)
        for row in range(layout.rows):
            if row % REFRESH == 0:
                if row:
                    block = slice(row - REFRESH, row)
                    columns.add(codes[block], layout.row_class[block])
                lines = _indices(columns.classes(), layout.row_class[row : row + REFRESH])
            if row % layout.path_length == 0:
                state = np.zeros(layout.columns, np.int64)
            line = lines[row % REFRESH]
            if trellised:
                odd = state & 1
                line += odd * len(CLASSES)
            line <<= PRECISION
            k = codes[row]
            for left in range(0, layout.columns, LANES):
                lanes = x[: min(LANES, layout.columns - left)]
                place = line[left : left + LANES] + (lanes & np.uint32((1 << PRECISION) - 1))
                k[left : left + LANES] = tables.k.take(place)
                lanes >>= np.uint32(PRECISION)
                lanes *= tables.frequency.take(place)
                lanes += tables.offset.take(place)
                low = np.flatnonzero(lanes < LOWEST)
                if word + len(low) > len(stream.words):
                    raise EntropyError("the words end too early")
                lanes[low] = lanes[low] << np.uint32(16) | words[word : word + len(low)]
                word += len(low)
            if (k == ESCAPE).any():
                places = np.flatnonzero(k == ESCAPE)
                if escape + len(places) > len(escapes):
                    raise EntropyError("the escapes end too early")
                k[places] = escapes[escape : escape + len(places)]
                escape += len(places)
            if trellised:
                state = turned.take(2 * state + (k & 1))
                k *= 2
                k += odd
        decoded.append(codes.astype(np.int16))
    if word != len(stream.words) or escape != len(escapes) or (x != LOWEST).any():
        raise EntropyError("words are left over, or the coders do not end where they began")
    return decoded
