"""The work of Newton-Schulz on a GPU, listed as tile tasks in topological order for the kernel.

A task is a record of 32-bit integers. It computes row norms of a matrix, a tile of its normalisation into the
workspace, or a tile of a product. Offsets into the workspace count blocks of ALIGN elements, so that they fit into 32
bits and the compiler knows their alignment. Every matrix goes through levels. A task of one level needs all tasks of
its matrix on earlier levels, and carries their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from ..common.compiling import constexpr
from ..common.launch import launch_parameters, multiprocessors
from .polar_express import Coefficients
from .reference import gram_segments

ALIGN, TASK = constexpr(16), constexpr(32)
(
    KIND,
    MATRIX,
    NEEDED,
    A,
    B,
    DEPTH,
    LD_A,
    LD_B,
    C,
    C_MIRROR,
    LD_C,
    ADDEND,
    CONSTANT,
    LINEAR,
    QUADRATIC,
    IN_BANK,
    ROW,
    COLUMN,
    ROWS,
    COLUMNS,
    NORMS,
) = map(constexpr, range(21))
(UPDATE, MIRROR, DIAGONAL, LAST, TALL, POLYNOMIAL, GRAM, ROW_NORMS, NORMALIZE) = (
    constexpr(1 << bit) for bit in range(9)
)
BANK = constexpr(9)  # from this bit on KIND holds the number of the bank, which a task needs as soon as its kind

Fields = dict[int, np.ndarray | int]  # values by the number of the field, an array for the tasks or one for all


class Product(NamedTuple):
    """One product of a matrix's iteration. Operands are names of its buffers: X0, X1, S0 to S4."""

    kind: int
    a: str
    b: str
    c: str
    polynomial: tuple[float, float, float] = (0.0, 0.0, 1.0)  # (p, q, r) of c = p I + q a + r a b


def product_levels(coefficients: Coefficients, gram: bool) -> list[list[Product]]:
    """List the levels of the iteration. A level reads what earlier levels wrote, and writes nothing that it reads."""
    levels: list[list[Product]] = []
    X, free_X = "X0", "X1"
    steps = range(len(coefficients))
    for segment in gram_segments(len(steps)) if gram else [range(step, step + 1) for step in steps]:
        R, W, P, Q, spare = "S0", "S1", "S2", "S3", "S4"
        levels.append([Product(GRAM, X, X, R)])
        for step in segment:
            first, last = step == segment[0], step == segment[-1]
            polynomial = Q if first else P
            levels.append([Product(POLYNOMIAL, R, R, polynomial, coefficients[step])])
            level = [] if last else [Product(0, R, polynomial, W)]
            if not first:
                level.append(Product(0, Q, P, spare))
                Q, spare = spare, Q
            if level:
                levels.append(level)
            if not last:
                levels.append([Product(0, W, polynomial, R)])
        levels.append([Product(UPDATE, Q, X, free_X)])
        X, free_X = free_X, X
    levels[-1] = [levels[-1][0]._replace(kind=UPDATE | LAST)]
    return levels


class Plan(NamedTuple):
    """Everything that stays the same from call to call for banks of these shapes."""

    tasks: torch.Tensor  # on the device
    matrices: int
    rows: int  # float32 elements of the scratch memory: a number for every matrix, then the norms of all rows
    workspace: int  # elements
    parameters: dict[str, int]
    even: bool  # the rows of every bank begin at multiples of 16 elements
    masked: bool  # some matrices do not fill their tiles


def _padded(size: int, block: int) -> int:
    """Round a size up to a multiple of ``block``."""
    return -(-size // block) * block


def _points(*axes: range) -> list[np.ndarray]:
    """Return the coordinates of all points of a grid, one array an axis, the last axis fastest."""
    return [axis.reshape(-1) for axis in np.meshgrid(*(np.asarray(axis, np.int64) for axis in axes), indexing="ij")]


def _tasks(fields: Fields) -> np.ndarray:
    """Return records [tasks, TASK] with these fields."""
    table = np.zeros((max(np.size(values) for values in fields.values()), int(TASK)), np.int32)
    for field, values in fields.items():
        if np.max(values, initial=0) > np.iinfo(np.int32).max:
            raise ValueError("newton_schulz: the banks need a workspace of over 2**35 elements; give fewer at once")
        table[:, field] = values
    return table


class Stack(NamedTuple):
    """All matrices of one shape in the workspace, wide and padded: each has two buffers M x N and five M x M."""

    places: np.ndarray  # [matrices, 2]: the number of each one's bank, and its own in this bank
    shape: tuple[int, int]
    padded: tuple[int, int]
    first_matrix: int
    first_row: int
    start: int

    @property
    def tall(self) -> int:
        """The bit TALL for tall matrices, else 0."""
        return int(TALL) if self.shape[0] > self.shape[1] else 0

    @property
    def size(self) -> int:
        """Elements of the workspace for each matrix."""
        return self.buffer("S5")

    def buffer(self, name: str) -> int:
        """Return where a buffer of a matrix begins, in elements from the matrix's first."""
        M, N = self.padded
        number = int(name[1])
        return number * M * N if name[0] == "X" else 2 * M * N + number * M * M

    def _records(self, matrix: np.ndarray, kind: int | np.ndarray, fields: Fields) -> np.ndarray:
        """Return records with these fields and those of all kinds; ``matrix`` counts from the stack's first."""
        bank, in_bank = self.places[matrix].T
        kind = kind | self.tall | bank << int(BANK)
        return _tasks({KIND: kind, MATRIX: self.first_matrix + matrix, IN_BANK: in_bank, **fields})

    def _source_fields(self, matrix: np.ndarray) -> Fields:
        rows, columns = self.shape
        return {ROWS: rows, COLUMNS: columns, NORMS: self.first_row + matrix * rows}

    def row_norm_tasks(self, block: int) -> np.ndarray:
        """Return the tasks of row norms, ``block`` rows each."""
        matrix, row = _points(range(len(self.places)), range(0, self.shape[0], block))
        return self._records(matrix, int(ROW_NORMS), {ROW: row, **self._source_fields(matrix)})

    def normalize_tasks(self, block: int) -> np.ndarray:
        """Return the tasks of normalisation, tiles of ``block`` by ``block``."""
        M, N = self.padded
        height, width = (N, M) if self.tall else (M, N)
        matrix, row, column = _points(range(len(self.places)), range(0, height, block), range(0, width, block))
        return self._records(
            matrix,
            int(NORMALIZE),
            {
                ROW: row,
                COLUMN: column,
                A: (self.start + matrix * self.size) // int(ALIGN),
                LD_A: N // int(ALIGN),
                **self._source_fields(matrix),
            },
        )

    def product_tasks(self, product: Product, parameters: dict[str, int], *, whole: bool = False) -> np.ndarray:
        """Return the tiles of one product of every matrix: of a symmetric product one triangle, or ``whole`` all."""
        (M, N), tile = self.padded, parameters["tile"]
        update, gram = (bool(int(product.kind) & int(kind)) for kind in (UPDATE, GRAM))
        width = parameters["columns"] if update else tile
        matrix, row, column = _points(range(len(self.places)), range(0, M, tile), range(0, N if update else M, width))
        kind: np.ndarray | int = int(product.kind)
        if not (whole or update):
            matrix, row, column = (axis[row <= column] for axis in (matrix, row, column))
            diagonal = 0 if product.a == product.b else int(DIAGONAL)  # a square needs no symmetrisation
            kind = kind + np.where(row < column, int(MIRROR), diagonal)
        ld_a, ld_b, ld_c = (N, N, M) if gram else (M, N, N) if update else (M, M, M)
        start = self.start + matrix * self.size
        a, b, c = (start + self.buffer(name) for name in (product.a, product.b, product.c))
        place = row * ld_c + column
        blocks = {
            A: a + row * ld_a,
            B: b + (column if update else column * ld_b),
            LD_A: ld_a,
            LD_B: ld_b,
            LD_C: ld_c,
            C: c + place,
            C_MIRROR: c + column * ld_c + row,
            ADDEND: a + place,
        }
        factors = dict(zip((CONSTANT, LINEAR, QUADRATIC), product.polynomial, strict=True))
        return self._records(
            matrix,
            kind,
            {
                DEPTH: (N if gram else M) // parameters["depth"],
                ROW: row,
                COLUMN: column,
                ROWS: min(self.shape),
                COLUMNS: max(self.shape),
                **{field: values // int(ALIGN) for field, values in blocks.items()},
                **{field: int(np.float32(value).view(np.int32)) for field, value in factors.items()},
            },
        )

    def levels(self, coefficients: Coefficients, algorithm: str, parameters: dict[str, int]) -> Iterator[np.ndarray]:
        """Yield the tasks of all levels, one table each."""
        yield self.row_norm_tasks(parameters["norm_rows"])
        yield self.normalize_tasks(parameters["tile"])
        short, long = sorted(self.shape)
        gram = algorithm == "gram" or (algorithm == "auto" and 2 * long >= 3 * short)
        for level in product_levels(coefficients, gram):
            whole = algorithm == "standard"
            yield np.concatenate([self.product_tasks(product, parameters, whole=whole) for product in level])


@cache  # a captured graph reads the tables, so none may be freed
def plan(
    shapes: tuple[tuple[int, int, int], ...], algorithm: str, coefficients: Coefficients, device: torch.device
) -> Plan:
    """Return the tasks for banks of (matrices, rows, columns), which are copied to the device once.

    Matrices of equal shape are one stack, whichever banks hold them. All advance at one pace, except that with the
    launch parameter ``stagger`` a stack's last matrix starts so many hundredths of its own time later than its first.
    Then less data is in use at a time, so more of it stays in the L2 cache. At each point of time the largest matrices
    come first.
    """
    tiles = sum(count * (_padded(min(shape), 128) // 128) ** 2 for count, *shape in shapes) // 2
    case = "large" if tiles >= multiprocessors(device) else "small"
    if any(size % 128 for _, *shape in shapes for size in shape):
        case = "odd"  # smaller tiles: less padding
    parameters = launch_parameters("newton_schulz", case, device)
    tile, width, depth = (parameters[name] for name in ("tile", "columns", "depth"))
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for bank, (count, height, columns) in enumerate(shapes):
        places.setdefault((height, columns), []).extend((bank, matrix) for matrix in range(count))
    tables, times, sizes, masked = [], [], [], False
    matrices = sum(count for count, *_ in shapes)
    rows, start, first_matrix = matrices, 0, 0  # the scratch memory begins with a number for every matrix
    for shape, of_shape in places.items():
        short, long = sorted(shape)
        count, padded = len(of_shape), (_padded(short, max(tile, depth)), _padded(long, max(tile, width, depth)))
        masked = masked or padded != (short, long)
        stack = Stack(np.array(of_shape), shape, padded, first_matrix, rows, start)
        levels = list(stack.levels(coefficients, algorithm, parameters))
        needed = 0
        for position, table in enumerate(levels):
            table[:, NEEDED] = needed
            needed += len(table) // count
            tables.append(table)
            late = parameters["stagger"] / 100 * (table[:, MATRIX] - first_matrix) / count
            times.append(position / len(levels) + late)
            sizes.append(np.full(len(table), padded[0] * padded[1]))
        rows, start, first_matrix = rows + count * shape[0], start + count * stack.size, first_matrix + count
    order = np.lexsort((-np.concatenate(sizes), np.concatenate(times)))  # stable: levels stay in order
    tasks = torch.from_numpy(np.concatenate(tables)[order]).to(device)
    even = all(columns % 16 == 0 for *_, columns in shapes)
    return Plan(tasks, matrices, rows, start, parameters, even, masked)
