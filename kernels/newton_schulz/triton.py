"""Newton-Schulz of all banks: one launch writes down where the banks lie, one works through the tasks of `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from ..common.compiling import constexpr, jit, tl
from ..common.launch import multiprocessors, odd_addresses
from .reference import ROW_NORM_FLOOR, Settings
from .tasks import (
    ADDEND,
    ALIGN,
    BANK,
    C_MIRROR,
    COLUMN,
    COLUMNS,
    CONSTANT,
    DEPTH,
    DIAGONAL,
    GRAM,
    IN_BANK,
    KIND,
    LAST,
    LD_A,
    LD_B,
    LD_C,
    LINEAR,
    MATRIX,
    MIRROR,
    NEEDED,
    NORMALIZE,
    NORMS,
    POLYNOMIAL,
    QUADRATIC,
    ROW,
    ROW_NORMS,
    ROWS,
    TALL,
    TASK,
    UPDATE,
    A,
    B,
    C,
    plan,
)

NORM_COLUMNS = constexpr(512)  # columns of a row that `_row_norms` reads at a time
FLOAT16_GROWTH = 2.0**14  # growth of an entry over all steps above which float16 could overflow
PLACED = 64  # banks of a launch of `_place_kernel`, whose arguments may take 4 KiB
SOURCE, TARGET = constexpr(0), constexpr(1)  # columns of the table of distances


@jit(do_not_specialize=["counters"])
def _place_kernel(sources, targets, first_source, first_target, distances, sync, counters, BLOCK: tl.constexpr):
    """Write the distances in elements from the first bank and out to these ones, and zero the counters in ``sync``.

    The addresses, as `odd_addresses` gives them, are arguments: no copy from the host has to be waited for or kept
    alive, and a CUDA graph has them in itself.
    """
    for bank in tl.static_range(len(sources)):
        tl.store(distances + 2 * bank + SOURCE, (sources[bank] - first_source) // 2)
        tl.store(distances + 2 * bank + TARGET, (targets[bank] - first_target) // 2)
    for start in range(0, counters, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(sync + at, 0, mask=at < counters)


@jit
def _distance(distances, kind, SIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the distance in elements from the first bank or out to that of a task of this kind."""
    distance = tl.load(distances + 2 * (kind >> BANK) + SIDE)
    return tl.multiple_of(distance, 16) if ALIGNED else distance


@jit(noinline=True)  # inlined, it would take registers from the products
def _row_norms(G, distances, task, kind, scratch, BLOCK_ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Write Euclidean norms of rows, safe from overflow and underflow: ‖row‖ = p ‖row / p‖ with p = max |row|."""
    all_rows, columns = tl.load(task + ROWS), tl.load(task + COLUMNS)
    columns = tl.multiple_of(columns, 16) if ALIGNED else columns
    row = tl.load(task + ROW) + tl.arange(0, BLOCK_ROWS)
    inside = row < all_rows
    place = (tl.load(task + IN_BANK).to(tl.int64) * all_rows + row) * columns
    base = G + _distance(distances, kind, SOURCE, ALIGNED) + place[:, None]
    peak = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, columns, NORM_COLUMNS):
        column = start + tl.arange(0, NORM_COLUMNS)
        values = tl.load(base + column[None, :], mask=inside[:, None] & (column < columns)[None, :], other=0.0)
        values = tl.abs(values.to(tl.float32))
        higher = tl.maximum(peak, tl.max(values, 1))
        divisor = tl.where(higher > 0, higher, 1.0)
        values = values / divisor[:, None]
        total = total * (peak / divisor) * (peak / divisor) + tl.sum(values * values, 1)
        peak = higher
    tl.store(scratch + tl.load(task + NORMS) + row, peak * tl.sqrt(total), mask=inside)


@jit(noinline=True)
def _normalize(
    G,
    distances,
    task,
    kind,
    scratch,
    X,
    norm_scale,
    eps,
    BLOCK: tl.constexpr,
    FLOOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write a tile of X = G / ‖G‖_F, zero-padded and wide, and the factor ‖G‖ / (norm_scale ‖G‖ + eps).

    FLOOR > 0 divides every row by max(its norm, FLOOR) first.
    """
    all_rows, columns = tl.load(task + ROWS), tl.load(task + COLUMNS)
    columns = tl.multiple_of(columns, 16) if ALIGNED else columns
    norms = scratch + tl.load(task + NORMS)
    peak = tl.zeros([], tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, all_rows, 1024):
        row = start + tl.arange(0, 1024)
        norm = tl.load(norms + row, mask=row < all_rows, other=0.0)
        if FLOOR > 0:
            norm = norm / tl.maximum(norm, FLOOR)
        higher = tl.maximum(peak, tl.max(norm, 0))
        divisor = tl.where(higher > 0, higher, 1.0)
        norm = norm / divisor
        total = total * (peak / divisor) * (peak / divisor) + tl.sum(norm * norm, 0)
        peak = higher
    norm = peak * tl.sqrt(total)
    rows = tl.multiple_of(tl.load(task + ROW), 16) + tl.arange(0, BLOCK)
    column = tl.multiple_of(tl.load(task + COLUMN), 16) + tl.arange(0, BLOCK)
    place = (tl.load(task + IN_BANK).to(tl.int64) * all_rows + rows) * columns
    source = G + _distance(distances, kind, SOURCE, ALIGNED) + place[:, None]
    inside = (rows < all_rows)[:, None] & (column < columns)[None, :]
    values = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if FLOOR > 0:
        row_norms = tl.load(norms + rows, mask=rows < all_rows, other=1.0)
        values = values / tl.maximum(row_norms, FLOOR)[:, None]
    values = (values / tl.where(norm == 0, 1.0, norm)).to(X.dtype.element_ty)
    target, ld = _block(X, task, A), tl.load(task + LD_A).to(tl.int64) * ALIGN
    if kind & TALL:
        tl.store(target + column[:, None] * ld + rows[None, :], tl.trans(values))
    else:
        tl.store(target + rows[:, None] * ld + column[None, :], values)
    tl.store(scratch + tl.load(task + MATRIX), norm / (norm_scale * norm + eps))


@jit
def _block(X, task, FIELD: tl.constexpr):
    """Return a pointer to the block of the workspace whose number is in this field of the task."""
    return X + tl.load(task + FIELD).to(tl.int64) * ALIGN


@jit
def _factor(task, FIELD: tl.constexpr):
    """Return a field of the task that holds a float32."""
    return tl.load(task + FIELD).to(tl.float32, bitcast=True)


@jit
def _symmetric_tile(X, task, kind, blocks, shrink, TILE: tl.constexpr, DEPTH_BLOCK: tl.constexpr):
    """Write a tile of C = A Bᵀ or c A Bᵀ + b S + a I, and its mirror image where one triangle only is computed."""
    row = tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH_BLOCK)
    a = X + blocks[0].to(tl.int64) * ALIGN + (row * (blocks[2] * ALIGN))[:, None] + depth[None, :]
    b = X + blocks[1].to(tl.int64) * ALIGN + (row * (blocks[3] * ALIGN))[:, None] + depth[None, :]
    tile = tl.zeros([TILE, TILE], tl.float32)
    for _ in range(0, blocks[4]):
        tile = tl.dot(tl.load(a), tl.trans(tl.load(b)), tile)
        a += DEPTH_BLOCK
        b += DEPTH_BLOCK
    place = (row * (tl.load(task + LD_C) * ALIGN))[:, None] + row[None, :]
    if kind & GRAM:
        tile = tl.load(shrink) * (tl.load(shrink) * tile)
    if kind & POLYNOMIAL:
        R = tl.load(_block(X, task, ADDEND) + place).to(tl.float32)
        tile = _factor(task, QUADRATIC) * tile + _factor(task, LINEAR) * R
        if tl.load(task + ROW) == tl.load(task + COLUMN):
            tile = tl.where(row[:, None] == row[None, :], tile + _factor(task, CONSTANT), tile)
    stored = tile.to(X.dtype.element_ty)
    if kind & DIAGONAL:  # later products read C as Cᵀ, so rounding must not make it asymmetric
        stored = (0.5 * (stored.to(tl.float32) + tl.trans(stored).to(tl.float32))).to(X.dtype.element_ty)
    tl.store(_block(X, task, C) + place, stored)
    if kind & MIRROR:
        tl.store(_block(X, task, C_MIRROR) + place, tl.trans(stored))


@jit
def _update_tile(
    X,
    out,
    distances,
    task,
    kind,
    blocks,
    shrink,
    TILE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write a tile of X' = B X; the last update goes to the result, transposed back if the bank is tall."""
    row = tl.arange(0, TILE)
    column = tl.arange(0, TILE_COLUMNS)
    depth = tl.arange(0, DEPTH_BLOCK)
    ld = blocks[3] * ALIGN
    a = X + blocks[0].to(tl.int64) * ALIGN + (row * (blocks[2] * ALIGN))[:, None] + depth[None, :]
    b = X + blocks[1].to(tl.int64) * ALIGN + (depth * ld)[:, None] + column[None, :]
    tile = tl.zeros([TILE, TILE_COLUMNS], tl.float32)
    for _ in range(0, blocks[4]):
        tile = tl.dot(tl.load(a), tl.load(b), tile)
        a += DEPTH_BLOCK
        b += DEPTH_BLOCK * ld
    if kind & LAST:
        result = (tl.load(shrink) * tile).to(out.dtype.element_ty)
        rows, columns = tl.load(task + ROWS), tl.load(task + COLUMNS)
        row += tl.multiple_of(tl.load(task + ROW), 16)
        column += tl.multiple_of(tl.load(task + COLUMN), 16)
        target = out + _distance(distances, kind, TARGET, ALIGNED)
        size = tl.load(task + IN_BANK).to(tl.int64) * rows * columns
        target += size // 16 * 16 if ALIGNED else size  # `multiple_of` would be lost in the product
        if kind & TALL:
            ld = rows // 16 * 16 if ALIGNED else rows
            place_T = (column.to(tl.int64) * ld)[:, None] + row[None, :]
            inside_T = (column < columns)[:, None] & (row < rows)[None, :] if MASKED else None
            tl.store(target + place_T, tl.trans(result), mask=inside_T)
        else:
            ld = columns // 16 * 16 if ALIGNED else columns
            place = (row.to(tl.int64) * ld)[:, None] + column[None, :]
            inside = (row < rows)[:, None] & (column < columns)[None, :] if MASKED else None
            tl.store(target + place, result, mask=inside)
    else:
        place = (row * ld)[:, None] + column[None, :]
        tl.store(_block(X, task, C) + place, tile.to(X.dtype.element_ty))


@jit
def _condition(tasks, ticket, count):
    """Return a task's matrix, and how many tasks of this matrix must be finished before."""
    task = tasks + tl.minimum(ticket, count - 1).to(tl.int64) * TASK
    return tl.load(task + MATRIX), tl.load(task + NEEDED)


@jit
def _operands(tasks, ticket, count):
    """Return a task's kind, and the places and leading dimensions of its product's operands."""
    task = tasks + tl.minimum(ticket, count - 1).to(tl.int64) * TASK
    blocks = tl.load(task + A), tl.load(task + B), tl.load(task + LD_A), tl.load(task + LD_B), tl.load(task + DEPTH)
    return tl.load(task + KIND), blocks


@jit(do_not_specialize=["count"])
def _tasks_kernel(
    G,
    out,
    distances,
    tasks,
    count,
    sync,
    scratch,
    X,
    norm_scale,
    eps,
    TILE: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    FLOOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take tasks until there are none. ``sync`` holds the next ticket and, by matrix, the number of finished tasks.

    To hide latency a program also holds the ticket of its next task. At the start of a task it loads what the next task
    waits for. At the end, while the stores are on their way, it loads the next task's operands, takes another ticket
    and looks how far the next task's matrix is.
    """
    lane = tl.arange(0, LANES)
    ticket = tl.atomic_add(sync, 1, sem="relaxed")
    matrix, needed = _condition(tasks, ticket, count)
    kind, blocks = _operands(tasks, ticket, count)
    # The ticket depends on the loaded record, so that every program takes its first ticket before any takes a second.
    upcoming = tl.atomic_add(sync, 1 + (kind >> 31), sem="relaxed")
    finished = needed * 0
    while ticket < count:
        next_matrix, next_needed = _condition(tasks, upcoming, count)
        while finished < needed:
            finished = tl.atomic_add(sync + 1 + matrix, 0, sem="acquire")
        task = tasks + ticket.to(tl.int64) * TASK
        if kind & UPDATE:
            _update_tile(
                X,
                out,
                distances,
                task,
                kind,
                blocks,
                scratch + matrix,
                TILE,
                TILE_COLUMNS,
                DEPTH_BLOCK,
                ALIGNED,
                MASKED,
            )
        elif kind & ROW_NORMS:
            _row_norms(G, distances, task, kind, scratch, NORM_ROWS, ALIGNED)
        elif kind & NORMALIZE:
            _normalize(G, distances, task, kind, scratch, X, norm_scale, eps, TILE, FLOOR, ALIGNED)
        else:
            _symmetric_tile(X, task, kind, blocks, scratch + matrix, TILE, DEPTH_BLOCK)
        kind, blocks = _operands(tasks, upcoming, count)
        counter = sync + tl.where(lane == 0, 0, 1 + next_matrix)
        fetched = tl.atomic_add(counter, tl.where(lane == 0, 1, 0), mask=lane < 2, sem="acquire")
        tl.debug_barrier()  # the stores of all threads precede the count
        tl.atomic_add(sync + 1 + matrix, 1, sem="release")
        ticket, upcoming = upcoming, tl.sum(tl.where(lane == 0, fetched, 0))
        finished = tl.sum(tl.where(lane == 1, fetched, 0))
        matrix, needed = next_matrix, next_needed


def _place(
    sources: tuple[int, ...], targets: tuple[int, ...], counters: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the table of distances [banks, 2] of these odd addresses, and zeroed counters."""
    # Lengths of tuples are powers of two, for each of which the kernel is compiled; the last one fills up.
    length = min(PLACED, 1 << (len(sources) - 1).bit_length())
    chunks = range(0, len(sources), length)
    distances = torch.empty((len(chunks) * length, 2), dtype=torch.int64, device=device)
    sync = torch.empty(counters, dtype=torch.int32, device=device)
    for start in chunks:
        some = (ends[start : start + length] for ends in (sources, targets))
        filled = (ends + ends[-1:] * (length - len(ends)) for ends in some)
        now = counters if start == 0 else 0
        _place_kernel[(1,)](*filled, sources[0], targets[0], distances[start:], sync, now, BLOCK=1024)
    return distances, sync


def launch(banks: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], settings: Settings) -> None:
    """Launch the kernels on contiguous banks of one dtype, into contiguous outs of one dtype.

    ``settings.dtype`` is the dtype of the workspace, bfloat16 or float16.
    """
    device = banks[0].device
    shapes = tuple((prod(G.shape[:-2]), *G.shape[-2:]) for G in banks)
    work = plan(shapes, settings.algorithm, settings.coefficients, device)
    parameters = work.parameters
    sources, targets = odd_addresses(banks), odd_addresses(outs)
    aligned = work.even and all(address % 32 == 1 for address in (*sources, *targets))
    tasks = len(work.tasks)
    with torch.cuda.device_of(banks[0]):  # Triton launches on the current device
        X = torch.empty(work.workspace, dtype=settings.dtype, device=device)
        scratch = torch.empty(work.rows, dtype=torch.float32, device=device)
        distances, sync = _place(sources, targets, work.matrices + 1, device)
        _tasks_kernel[(min(tasks, multiprocessors(device) * parameters["programs"]),)](
            banks[0],
            outs[0],
            distances,
            work.tasks,
            tasks,
            sync,
            scratch,
            X,
            settings.norm_scale,
            settings.eps,
            TILE=parameters["tile"],
            TILE_COLUMNS=parameters["columns"],
            DEPTH_BLOCK=parameters["depth"],
            NORM_ROWS=parameters["norm_rows"],
            LANES=32 * parameters["warps"],
            FLOOR=ROW_NORM_FLOOR if settings.row_normalize else 0.0,
            ALIGNED=aligned,
            MASKED=work.masked,
            num_warps=parameters["warps"],
            num_stages=parameters["num_stages"],
            maxnreg=parameters["maxnreg"],
        )


def banks_triton(banks: Sequence[torch.Tensor], out: Sequence[torch.Tensor], settings: Settings) -> None:
    """Orthogonalise every bank [..., m, n] into its tensor of ``out``, in one launch for every pair of dtypes."""
    growth = prod(abs(a) for a, _, _ in settings.coefficients)
    if settings.algorithm == "auto" and growth > FLOAT16_GROWTH:
        settings = settings._replace(algorithm="symmetric", dtype=torch.bfloat16)
    elif settings.algorithm in ("gram", "auto"):
        settings = settings._replace(dtype=torch.float16)
    launches: dict[tuple[torch.dtype, torch.dtype], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for G, target in zip(banks, out, strict=True):
        if G.numel():
            dense = target
            if not target.is_contiguous():
                dense = torch.empty_like(target, memory_format=torch.contiguous_format)
            launches.setdefault((G.dtype, target.dtype), []).append((G.contiguous(), dense, target))
    for triples in launches.values():
        sources, written, targets = zip(*triples, strict=True)
        launch(sources, written, settings)
        for dense, target in zip(written, targets, strict=True):
            if dense is not target:
                target.copy_(dense)
