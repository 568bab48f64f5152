"""The work of Newton-Schulz on a GPU as a list of tile tasks in topological order; `newton_schulz` runs it.

A task is a record of 32-bit integers, the same for all three kernels: row norms of the banks, normalisation into the
workspace, products. Offsets into the workspace count blocks of ALIGN elements, so that they fit and the compiler knows
their alignment. Every matrix goes through levels of products; a task of one level needs all of its matrix's tasks of
earlier levels, whose number it carries.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from ._launch import constexpr, launch_parameters, multiprocessors
from ._polar_express import Coefficients

ALIGN, TASK = constexpr(16), constexpr(32)
(KIND, A, B, DEPTH, LD_A, LD_B, C, C_MIRROR, LD_C, ADDEND1, ADDEND2, ALPHA, BETA, GAMMA, MATRIX, NEEDED, BANK,
 IN_BANK, ROW, COLUMN, ROWS, COLUMNS, PARTS) = map(constexpr, range(23))  # fmt: skip
(UPDATE, MIRROR, DIAGONAL, LAST, TALL, FIRST_ADDEND, SECOND_ADDEND, GRAM, PARTIAL, JOINED) = (
    constexpr(1 << bit) for bit in range(10)
)  # fmt: skip
BLOCK = 64  # side of a tile of the normalisation


def segments(steps: int) -> list[range]:
    """The steps of the Gram form between restarts: three, then two at a time."""
    starts = [0, *range(3, steps, 2), steps]
    return [range(begin, end) for begin, end in zip(starts, starts[1:], strict=False)]


class _Product(NamedTuple):
    """One product of a matrix's iteration. Operands are names of its buffers: X0, X1, S0 to S4, P for partial sums."""

    kind: int
    a: str
    b: str
    c: str
    first: str = ""
    second: str = ""
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0


def _levels(coefficients: Coefficients, gram: bool, parts: int = 1) -> list[list[_Product]]:
    """The iteration as levels of products. A level reads what earlier ones wrote, and writes nothing that it reads."""
    levels: list[list[_Product]] = []
    X, free_X = "X0", "X1"
    steps = range(len(coefficients))
    for segment in segments(len(steps)) if gram else [range(step, step + 1) for step in steps]:
        R, W, Z, Q, spare = "S0", "S1", "S2", "S3", "S4"
        q = 1.0
        if parts > 1:
            levels += [[_Product(GRAM | PARTIAL, X, X, "P")], [_Product(GRAM | JOINED, "P", "P", R)]]
        else:
            levels.append([_Product(GRAM, X, X, R)])
        for step in segment:
            a, b, c = coefficients[step]
            levels.append([_Product(FIRST_ADDEND, R, R, Z, R, "", c, b)])
            level = [_Product(FIRST_ADDEND, R, Z, W, R, "", 1.0, a)] if step != segment[-1] else []
            if step == segment[0]:
                Q, Z, q = Z, Q, a
                level = [product._replace(b=Q) for product in level]
            else:
                level.append(_Product(FIRST_ADDEND | SECOND_ADDEND, Q, Z, spare, Q, Z, 1.0, a, q))
                Q, spare, q = spare, Q, q * a
            if level:
                levels.append(level)
            if step != segment[-1]:
                polynomial = Q if step == segment[0] else Z
                levels.append([_Product(FIRST_ADDEND, W, polynomial, R, W, "", 1.0, a)])
        levels.append([_Product(UPDATE, Q, X, free_X, X, "", 1.0, q)])
        X, free_X = free_X, X
    levels[-1] = [levels[-1][0]._replace(kind=UPDATE | LAST)]
    return levels


class Plan(NamedTuple):
    """What does not change from call to call for a list of banks; the tasks lie on the device."""

    row_norm_tasks: torch.Tensor
    normalize_tasks: torch.Tensor
    product_tasks: torch.Tensor
    matrices: int
    rows: int
    workspace: int
    parameters: dict[str, int]
    even: bool  # rows of every bank begin at multiples of 16 elements
    masked: bool  # some matrices do not fill their tiles


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _points(*axes: range) -> list[np.ndarray]:
    """Coordinates of all points of a grid, the last axis fastest."""
    return [axis.reshape(-1) for axis in np.meshgrid(*(np.asarray(axis, np.int64) for axis in axes), indexing="ij")]


def _tasks(fields: dict[int, np.ndarray | int]) -> np.ndarray:
    """Records [tasks, TASK] with these fields."""
    table = np.zeros((max(np.size(values) for values in fields.values()), int(TASK)), np.int32)
    for field, values in fields.items():
        if np.max(values, initial=0) > np.iinfo(np.int32).max:
            raise ValueError("newton_schulz: the banks need a workspace of over 2**35 elements; give fewer at once")
        table[:, field] = values
    return table


class _Bank(NamedTuple):
    """A bank's matrices in the workspace, wide and padded: two buffers M x N and five M x M each.

    Where X Xᵀ is summed in several parts, to keep more programs busy, a float32 buffer of M x M for each part follows.
    """

    index: int
    count: int
    shape: tuple[int, int]
    padded: tuple[int, int]
    parts: int
    first_matrix: int
    first_row: int
    start: int

    @property
    def tall(self) -> int:
        return int(TALL) if self.shape[0] > self.shape[1] else 0

    @property
    def size(self) -> int:
        return self.buffer("P") + (2 * self.parts * self.padded[0] ** 2 if self.parts > 1 else 0)

    def buffer(self, name: str) -> int:
        M, N = self.padded
        number = 5 if name == "P" else int(name[1])
        return number * M * N if name[0] == "X" else 2 * M * N + number * M * M

    def row_norm_tasks(self, block: int) -> np.ndarray:
        rows, columns = self.shape
        (row,) = _points(range(0, self.count * rows, block))
        return _tasks({ROW: row, ROWS: self.count * rows, COLUMNS: columns, C: self.first_row, BANK: self.index})

    def normalize_tasks(self) -> np.ndarray:
        (rows, columns), (M, N) = self.shape, self.padded
        height, width = (N, M) if self.tall else (M, N)
        matrix, row, column = _points(range(self.count), range(0, height, BLOCK), range(0, width, BLOCK))
        return _tasks({
            KIND: self.tall, BANK: self.index, MATRIX: self.first_matrix + matrix, IN_BANK: matrix * rows,
            ROW: row, COLUMN: column, ROWS: rows, COLUMNS: columns, C: self.first_row,
            A: (self.start + matrix * self.size) // int(ALIGN), LD_A: N // int(ALIGN),
        })  # fmt: skip

    def product_tasks(self, product: _Product, needed: int, whole: bool, parameters: dict[str, int]) -> np.ndarray:
        """Tiles of one product of every matrix, of one triangle if it is symmetric and not wanted ``whole``."""
        (M, N), tile = self.padded, parameters["tile"]
        update, gram, partial = (bool(product.kind & kind) for kind in (UPDATE, GRAM, PARTIAL))
        width = parameters["columns"] if update else tile
        parts = self.parts if partial else 1
        tiles = range(self.count), range(0, M, tile), range(0, N if update else M, width), range(parts)
        matrix, row, column, part = _points(*tiles)
        kind = np.full_like(row, int(product.kind) | self.tall)
        if not (whole or update):
            matrix, row, column, part = (axis[row <= column] for axis in (matrix, row, column, part))
            kind = (int(product.kind) | self.tall) + np.where(row < column, int(MIRROR), int(DIAGONAL))
        depth = 0 if product.kind & JOINED else N // parts if gram else M
        start = self.start + matrix * self.size
        sums = start + self.buffer("P") + (row // tile * (M // tile) + column // tile) * 2 * self.parts * tile**2
        ld_a, ld_b, ld_c = (N, N, M) if gram else (M, N, N) if update else (M, M, M)
        a, b, c, first, second = (
            start + self.buffer(name or "X0")
            for name in (product.a, product.b, product.c, product.first, product.second)
        )
        place = row * ld_c + column
        a, b = a + row * ld_a + part * depth, b + (column if update else column * ld_b + part * depth)
        blocks = {
            A: a, B: b, LD_A: ld_a, LD_B: ld_b, LD_C: ld_c,
            C: sums + part * 2 * tile**2 if partial else c + place, C_MIRROR: c + column * ld_c + row,
            ADDEND1: sums if product.kind & JOINED else first + place, ADDEND2: second + place,
        }  # fmt: skip
        factors = {ALPHA: product.alpha, BETA: product.beta, GAMMA: product.gamma}
        return _tasks({
            KIND: kind, MATRIX: self.first_matrix + matrix, NEEDED: needed, DEPTH: depth // parameters["depth"],
            BANK: self.index, IN_BANK: matrix, ROW: row, COLUMN: column, ROWS: min(self.shape),
            COLUMNS: max(self.shape), PARTS: self.parts,
            **{field: values // int(ALIGN) for field, values in blocks.items()},
            **{field: np.float32(value).view(np.int32) for field, value in factors.items()},
        })  # fmt: skip


@cache  # a captured graph reads the tables: none may go
def plan(
    shapes: tuple[tuple[int, int, int], ...], algorithm: str, coefficients: Coefficients, device: torch.device
) -> Plan:
    """The tasks for banks of (matrices, rows, columns), made and copied to the device once."""
    tiles = sum(count * (_padded(min(shape), 128) // 128) ** 2 for count, *shape in shapes) // 2
    case = "large" if tiles >= multiprocessors(device) else "small"
    if any(size % 128 for _, *shape in shapes for size in shape):
        case = "odd"  # smaller tiles: less padding
    parameters = launch_parameters("newton_schulz", case, device)
    tile, width, depth = (parameters[name] for name in ("tile", "columns", "depth"))
    matrices = sum(count for count, *_ in shapes)
    norms, casts, products, masked = [], [], [], False
    rows, start, first_matrix = matrices, 0, 0  # the scratch begins with a number for every matrix
    for index, (count, *shape) in enumerate(shapes):
        short, long = sorted(shape)
        padded = _padded(short, max(tile, depth)), _padded(long, max(tile, width, depth))
        divisors = (part for part in range(parameters["parts"], 0, -1) if padded[1] // depth % part == 0)
        parts = next(part for part in divisors if part == 1 or padded[1] >= part * padded[0])
        bank = _Bank(index, count, tuple(shape), padded, parts, first_matrix, rows, start)
        masked = masked or padded != (short, long)
        norms.append(bank.row_norm_tasks(parameters["norm_rows"]))
        casts.append(bank.normalize_tasks())
        gram = algorithm == "gram" or (algorithm == "auto" and 2 * long >= 3 * short)
        levels = _levels(coefficients, gram, parts)
        needed = 0
        for position, level in enumerate(levels):
            tables = [bank.product_tasks(product, needed, algorithm == "standard", parameters) for product in level]
            needed += sum(map(len, tables)) // count
            # Banks advance at one pace, and within it the one with the most work comes first.
            products += [((position / len(levels), -padded[0] * padded[1]), table) for table in tables]
        rows, start, first_matrix = rows + count * shape[0], start + count * bank.size, first_matrix + count
    norms.append(np.zeros((matrices + 1, int(TASK)), np.int32))  # empty tasks, so that there is one for each counter
    products.sort(key=lambda pair: pair[0])
    tables = norms, casts, [table for _, table in products]
    tensors = [torch.from_numpy(np.concatenate(table)).to(device) for table in tables]
    even = all(columns % 16 == 0 for *_, columns in shapes)
    return Plan(*tensors, matrices, rows, start, parameters, even, masked)
