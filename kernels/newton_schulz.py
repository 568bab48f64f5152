"""Newton-Schulz orthogonalisation with per-step coefficients, for Muon.

For a matrix G the iteration drives all singular values towards 1 and keeps the singular vectors:

    X = G / (norm_scale ‖G‖_F + eps)
    for (a, b, c) in coefficients:   A = X Xᵀ;   B = b A + c A²;   X = a X + B X

so σ goes to a σ + b σ³ + c σ⁵ a step. The Polar Express tuples (Amsel et al., arXiv 2505.16932) are the minimax-optimal
choice for a given number of steps and lower bound on σ; `polar_express_coefficients` computes them. With the defaults
they are the tuples of modded-nanogpt and parameter-golf PR #1344 / #1874 to 1e-12, and map σ in [1e-3, 1] into
[0.859, 1.141].

Shapes: G is [..., m, n]; tall matrices (m > n) are iterated as their transpose.

Algorithms. ``standard`` is the formula above. ``symmetric`` computes one triangle of A and B and mirrors it. ``gram``
(gram-newton-schulz, Dao-AILab 2026) iterates on the small matrix R = X Xᵀ and applies the product Q of the steps'
polynomials to X at the end, 9 m²n + 11 m³ operations instead of 15 m²n + 5 m³ for five steps:

    P = a I + b R + c R²;   Q = Q P;   W = R P;   R = W P

It restarts from X = Q X after the first step and every second one after that, which keeps its error in float16 at half
of that of ``standard`` in bfloat16 at most, at a fifth from 256 rows on. The first polynomial takes large
singular values down from 8 to 0.2 times themselves: in R what rounding leaves of the difference couples large and small
directions, and makes eigenvalues negative, which later steps let grow. Restarting first after three steps, updates in
training had singular values up to 3,000 where momentum has a few large ones; after two, emulated, up to 1.5.

On a GPU all matrices of all banks go through in one launch. It is a list of tasks in topological order: row norms of a
matrix, normalisation, cast and transposition into a zero-padded workspace, and the tiles of all products. Each program
takes tasks by an atomic ticket, waits until the task's matrix has finished the level before, and counts itself
finished. Whatever holds a task depends only on smaller tickets, which are finished or held by programs that come to
them, so there is no deadlock however few programs run, and other streams may hold any part of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from .common.backend import select
from .common.compiling import constexpr, jit, tl
from .common.launch import multiprocessors, odd_addresses
from .common.operators import operator

# isort: off
from ._newton_schulz_tasks import (
    A,
    ADDEND,
    ALIGN,
    B,
    BANK,
    C,
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
    ROWS,
    ROW_NORMS,
    TALL,
    TASK,
    UPDATE,
    plan,
    segments,
)

# isort: on
from ._polar_express import POLAR_EXPRESS, QUINTIC, Coefficients, polar_express_coefficients

ALGORITHMS = ("auto", "standard", "symmetric", "gram")
ROW_NORM_FLOOR = 1e-7
NORM_COLUMNS = constexpr(512)  # of a row at a time
FLOAT16_GROWTH = 2.0**14  # of an entry over all steps, above which float16 could overflow


def _tuples(coefficients: Coefficients, steps: int) -> Coefficients:
    """One tuple a step: POLAR_EXPRESS is generated for the number asked, a single tuple is repeated."""
    if len(coefficients) == steps:
        return tuple(coefficients)
    if coefficients == POLAR_EXPRESS:
        return polar_express_coefficients(steps)
    if len(coefficients) != 1:
        raise ValueError(f"coefficients: {len(coefficients)} tuples for {steps} steps; give one, or one a step")
    return tuple(coefficients) * steps


def newton_schulz_reference(
    G: torch.Tensor,
    steps: int = 5,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    row_normalize: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch; the contract of `newton_schulz`, whose arguments it shares. Arithmetic as in PR #1874."""
    X = _differentiable(
        G, _tuples(coefficients, steps), algorithm, dtype or torch.bfloat16, norm_scale, eps, row_normalize
    )
    return X.contiguous() if out is None else out.copy_(X)


def _differentiable(
    G: torch.Tensor,
    coefficients: Coefficients,
    algorithm: str,
    dtype: torch.dtype,
    norm_scale: float,
    eps: float,
    row_normalize: bool,
) -> torch.Tensor:
    storage = torch.float16 if algorithm == "gram" and dtype.itemsize == 2 else dtype
    if row_normalize:
        G = G.to(storage)
        G = G / G.float().norm(dim=-1, keepdim=True).clamp_min(ROW_NORM_FLOOR).to(storage)
    # Divided by a power of two first, which changes no bit, so that no square overflows or vanishes.
    _, exponent = torch.frexp(G.detach().abs().amax(dim=(-2, -1), keepdim=True).float())
    power = torch.exp2(-exponent.clamp(min=-126).to(torch.promote_types(G.dtype, torch.float32)))
    X, eps = (G * power).to(storage), (eps * power).to(storage)
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * norm_scale + eps)
    X = (_iterate_gram if algorithm == "gram" else _iterate)(X, coefficients).to(dtype)
    return X.mT if tall else X


def _iterate(X: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    for a, b, c in coefficients:
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X


def _iterate_gram(X: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
    """Every product is accumulated in float32 or better with its addends and rounded once to X's dtype."""

    def rounded(M: torch.Tensor, symmetric: bool = True) -> torch.Tensor:
        # Rounding makes a product of symmetric matrices asymmetric: keep one triangle.
        return ((M.triu() + M.triu(1).mT) if symmetric else M).to(X.dtype).to(wide)

    wide = torch.promote_types(X.dtype, torch.float32)
    Y, identity = X.to(wide), torch.eye(X.size(-2), dtype=wide, device=X.device)
    for segment in segments(len(coefficients)):
        R = rounded(Y @ Y.mT)
        for step in segment:
            a, b, c = coefficients[step]
            P = rounded(a * identity + b * R + c * (R @ R))
            Q = P if step == segment[0] else rounded(Q @ P)  # noqa: F821
            if step != segment[-1]:
                R = rounded(rounded(R @ P) @ P)
        Y = rounded(Q @ Y, symmetric=False)
    return Y.to(X.dtype)


@jit
def _bank_offset(addresses, bank, ALIGNED: tl.constexpr):
    """Elements from the first bank to this one; see `odd_addresses`."""
    offset = addresses[0] - addresses[0]
    for index in tl.static_range(1, len(addresses)):
        offset = tl.where(bank == index, (addresses[index] - addresses[0]) // 2, offset)
    return tl.multiple_of(offset, 16) if ALIGNED else offset


@jit(noinline=True)  # out of the way of the products' registers
def _row_norms(G, addresses, task, scratch, BLOCK_ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Euclidean norms of rows, safe from overflow and underflow: ‖row‖ = p ‖row / p‖ with p = max |row|."""
    all_rows, columns = tl.load(task + ROWS), tl.load(task + COLUMNS)
    columns = tl.multiple_of(columns, 16) if ALIGNED else columns
    row = tl.load(task + ROW) + tl.arange(0, BLOCK_ROWS)
    inside = row < all_rows
    place = (tl.load(task + IN_BANK).to(tl.int64) * all_rows + row) * columns
    base = G + _bank_offset(addresses, tl.load(task + BANK), ALIGNED) + place[:, None]
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
    G, addresses, task, scratch, X, norm_scale, eps, BLOCK: tl.constexpr, FLOOR: tl.constexpr, ALIGNED: tl.constexpr
):
    """X = G / ‖G‖_F, rows divided by their norms first if asked, zero-padded and wide; shrink = ‖G‖ / (s ‖G‖ + eps)."""
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
    source = G + _bank_offset(addresses, tl.load(task + BANK), ALIGNED) + place[:, None]
    inside = (rows < all_rows)[:, None] & (column < columns)[None, :]
    values = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if FLOOR > 0:
        row_norms = tl.load(norms + rows, mask=rows < all_rows, other=1.0)
        values = values / tl.maximum(row_norms, FLOOR)[:, None]
    values = (values / tl.where(norm == 0, 1.0, norm)).to(X.dtype.element_ty)
    target, ld = _block(X, task, A), tl.load(task + LD_A).to(tl.int64) * ALIGN
    if tl.load(task + KIND) & TALL:
        tl.store(target + column[:, None] * ld + rows[None, :], tl.trans(values))
    else:
        tl.store(target + rows[:, None] * ld + column[None, :], values)
    tl.store(scratch + tl.load(task + MATRIX), norm / (norm_scale * norm + eps))


@jit
def _block(X, task, FIELD: tl.constexpr):
    """Pointer to the place in the workspace that a field of the task names."""
    return X + tl.load(task + FIELD).to(tl.int64) * ALIGN


@jit
def _factor(task, FIELD: tl.constexpr):
    return tl.load(task + FIELD).to(tl.float32, bitcast=True)


@jit
def _symmetric_tile(X, task, kind, blocks, shrink, TILE: tl.constexpr, DEPTH_BLOCK: tl.constexpr):
    """C = A Bᵀ, or c A Bᵀ + b S + a I; where only one triangle is computed, C's mirror image too."""
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
    if kind & DIAGONAL:  # products are read as their transposes, so rounding must not make them asymmetric
        stored = (0.5 * (stored.to(tl.float32) + tl.trans(stored).to(tl.float32))).to(X.dtype.element_ty)
    tl.store(_block(X, task, C) + place, stored)
    if kind & MIRROR:
        tl.store(_block(X, task, C_MIRROR) + place, tl.trans(stored))


@jit
def _update_tile(
    X,
    out,
    addresses,
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
    """X' = B X; the last one goes to the result, transposed back if the bank is tall."""
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
        target = out + _bank_offset(addresses, tl.load(task + BANK), ALIGNED)
        size = tl.load(task + IN_BANK).to(tl.int64) * rows * columns
        target += size // 16 * 16 if ALIGNED else size  # `multiple_of` would speak of both rows and columns
        if kind & TALL:
            ld = rows // 16 * 16 if ALIGNED else rows
            across = (column.to(tl.int64) * ld)[:, None] + row[None, :]
            wanted = (column < columns)[:, None] & (row < rows)[None, :] if MASKED else None
            tl.store(target + across, tl.trans(result), mask=wanted)
        else:
            ld = columns // 16 * 16 if ALIGNED else columns
            along = (row.to(tl.int64) * ld)[:, None] + column[None, :]
            inside = (row < rows)[:, None] & (column < columns)[None, :] if MASKED else None
            tl.store(target + along, result, mask=inside)
    else:
        place = (row * ld)[:, None] + column[None, :]
        tl.store(_block(X, task, C) + place, tile.to(X.dtype.element_ty))


@jit
def _condition(tasks, ticket, count):
    """A task's matrix, and how many tasks of it must be finished before."""
    task = tasks + tl.minimum(ticket, count - 1).to(tl.int64) * TASK
    return tl.load(task + MATRIX), tl.load(task + NEEDED)


@jit
def _operands(tasks, ticket, count):
    """A task's kind, and where the operands of its product are."""
    task = tasks + tl.minimum(ticket, count - 1).to(tl.int64) * TASK
    blocks = tl.load(task + A), tl.load(task + B), tl.load(task + LD_A), tl.load(task + LD_B), tl.load(task + DEPTH)
    return tl.load(task + KIND), blocks


@jit(do_not_specialize=["count"])
def _tasks_kernel(
    G,
    addresses,
    out,
    targets,
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
    """Takes tasks until there are none. ``sync`` is the next ticket and, by matrix, the number of finished tasks.

    A program holds the ticket of its next task too. What that waits for is loaded at a task's start, and at its end,
    while its stores are on their way, the next one's operands, the ticket after that and how far the matrix is.
    """
    lane = tl.arange(0, LANES)
    ticket = tl.atomic_add(sync, 1, sem="relaxed")
    matrix, needed = _condition(tasks, ticket, count)
    kind, blocks = _operands(tasks, ticket, count)
    # That depends on the record, so that every program takes its first ticket before anyone's second.
    upcoming = tl.atomic_add(sync, 1 + (kind >> 31), sem="relaxed")
    finished = needed * 0
    while ticket < count:
        next_matrix, next_needed = _condition(tasks, upcoming, count)
        while finished < needed:
            finished = tl.atomic_add(sync + 1 + matrix, 0, sem="acquire")
        task = tasks + ticket.to(tl.int64) * TASK
        if kind & UPDATE:
            _update_tile(
                X, out, targets, task, kind, blocks, scratch + matrix, TILE, TILE_COLUMNS, DEPTH_BLOCK, ALIGNED, MASKED
            )
        elif kind & ROW_NORMS:
            _row_norms(G, addresses, task, scratch, NORM_ROWS, ALIGNED)
        elif kind & NORMALIZE:
            _normalize(G, addresses, task, scratch, X, norm_scale, eps, TILE, FLOOR, ALIGNED)
        else:
            _symmetric_tile(X, task, kind, blocks, scratch + matrix, TILE, DEPTH_BLOCK)
        kind, blocks = _operands(tasks, upcoming, count)
        counter = sync + tl.where(lane == 0, 0, 1 + next_matrix)
        fetched = tl.atomic_add(counter, tl.where(lane == 0, 1, 0), mask=lane < 2, sem="acquire")
        tl.debug_barrier()  # every thread's stores come before the count
        tl.atomic_add(sync + 1 + matrix, 1, sem="release")
        ticket, upcoming = upcoming, tl.sum(tl.where(lane == 0, fetched, 0))
        finished = tl.sum(tl.where(lane == 1, fetched, 0))
        matrix, needed = next_matrix, next_needed


def _launch(
    banks: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    coefficients: Coefficients,
    algorithm: str,
    storage: torch.dtype,
    norm_scale: float,
    eps: float,
    row_normalize: bool,
) -> None:
    """The kernel on contiguous banks of one dtype, into contiguous outs of one dtype."""
    device = banks[0].device
    work = plan(tuple((prod(G.shape[:-2]), *G.shape[-2:]) for G in banks), algorithm, coefficients, device)
    parameters = work.parameters
    sources, targets = odd_addresses(banks), odd_addresses(outs)
    aligned = work.even and all(address % 32 == 1 for address in (*sources, *targets))
    tasks = len(work.tasks)
    with torch.cuda.device_of(banks[0]):  # Triton launches on the current device
        X = torch.empty(work.workspace, dtype=storage, device=device)
        scratch = torch.empty(work.rows, dtype=torch.float32, device=device)
        sync = torch.zeros(work.matrices + 1, dtype=torch.int32, device=device)
        _tasks_kernel[(min(tasks, multiprocessors(device) * parameters["programs"]),)](
            banks[0],
            sources,
            outs[0],
            targets,
            work.tasks,
            tasks,
            sync,
            scratch,
            X,
            norm_scale,
            eps,
            TILE=parameters["tile"],
            TILE_COLUMNS=parameters["columns"],
            DEPTH_BLOCK=parameters["depth"],
            NORM_ROWS=parameters["norm_rows"],
            LANES=32 * parameters["warps"],
            FLOOR=ROW_NORM_FLOOR if row_normalize else 0.0,
            ALIGNED=aligned,
            MASKED=work.masked,
            num_warps=parameters["warps"],
            num_stages=parameters["num_stages"],
            maxnreg=parameters["maxnreg"],
        )


def _banks_triton(
    banks: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    coefficients: Coefficients,
    algorithm: str,
    dtype: torch.dtype,
    norm_scale: float,
    eps: float,
    row_normalize: bool,
) -> None:
    storage = torch.float16 if algorithm in ("gram", "auto") else dtype
    if storage == torch.float16 and algorithm == "auto" and prod(abs(a) for a, _, _ in coefficients) > FLOAT16_GROWTH:
        algorithm, storage = "symmetric", torch.bfloat16
    kinds: dict[tuple, list] = {}
    for G, target in zip(banks, out, strict=True):
        if G.numel():
            direct = (
                target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
            )
            kinds.setdefault((G.dtype, target.dtype), []).append((G.contiguous(), direct, target))
    for triples in kinds.values():
        sources, directs, targets = zip(*triples, strict=True)
        _launch(sources, directs, coefficients, algorithm, storage, norm_scale, eps, row_normalize)
        for direct, target in zip(directs, targets, strict=True):
            if direct is not target:
                target.copy_(direct)


def _banks_reference(
    banks: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    coefficients: Coefficients,
    algorithm: str,
    dtype: torch.dtype,
    norm_scale: float,
    eps: float,
    row_normalize: bool,
) -> None:
    for G, target in zip(banks, out, strict=True):
        newton_schulz_reference(
            G,
            len(coefficients),
            coefficients,
            algorithm=algorithm,
            dtype=dtype,
            norm_scale=norm_scale,
            eps=eps,
            row_normalize=row_normalize,
            out=target,
        )


_IMPLEMENTATIONS = {"reference": _banks_reference, "triton": _banks_triton}


def _by_step(coefficients: Sequence[float]) -> Coefficients:
    values = iter(coefficients)
    return tuple(zip(values, values, values, strict=True))


def _run_into(
    banks: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    algorithm: str,
    dtype: torch.dtype,
    norm_scale: float,
    eps: float,
    row_normalize: bool,
) -> None:
    run = select("newton_schulz", _IMPLEMENTATIONS, banks[0]) if dtype.itemsize == 2 else _banks_reference
    run(banks, out, _by_step(coefficients), algorithm, dtype, norm_scale, eps, row_normalize)


def _run(banks: Sequence[torch.Tensor], *settings: object) -> list[torch.Tensor]:
    out = _fake(banks, *settings)
    _run_into(banks, out, *settings)
    return out


def _fake(banks: Sequence[torch.Tensor], *settings: object) -> list[torch.Tensor]:
    return [torch.empty(G.shape, dtype=settings[2], device=G.device) for G in banks]


def _setup_context(ctx, inputs: tuple, output: list[torch.Tensor]) -> None:
    banks, *ctx.settings = inputs
    ctx.save_for_backward(*banks)


def _backward(ctx, gradients: Sequence[torch.Tensor]) -> tuple:
    """The reference's derivative, in float32 or better."""
    coefficients, algorithm, dtype, *rest = ctx.settings
    dtype = torch.float32 if dtype.itemsize == 2 else dtype
    with torch.enable_grad():
        banks = [G.detach().requires_grad_() for G in ctx.saved_tensors]
        outs = [_differentiable(G, _by_step(coefficients), algorithm, dtype, *rest) for G in banks]
    wanted = [gradient.to(dtype) for gradient in gradients]
    return list(torch.autograd.grad(outs, banks, wanted)), *[None] * 6


_SETTINGS = "float[] coefficients, str algorithm, ScalarType dtype, float norm_scale, float eps, bool row_normalize"
_banks_op = operator(
    f"newton_schulz(Tensor[] banks, {_SETTINGS}) -> Tensor[]",
    _run,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_banks_out_op = operator(
    f"newton_schulz_out(Tensor[] banks, Tensor(a!)[] out, {_SETTINGS}) -> ()",
    _run_into,
    lambda *arguments: None,
    mutates=("out",),
)


def newton_schulz_banks(
    banks: Sequence[torch.Tensor],
    steps: int = 5,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    row_normalize: bool = False,
    out: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """`newton_schulz` of several banks at once: on a GPU one launch, whatever their number and shapes.

    ``banks`` and ``out`` are lists of what `newton_schulz` takes, on one device; banks of different dtypes are launched
    dtype by dtype, and no ``out`` may overlap the bank of another. The first call with a list of shapes copies a table
    to the GPU, where it stays: make it before capturing a graph.
    """
    dtype = dtype or torch.bfloat16
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    if out is not None and len(out) != len(banks):
        raise ValueError(f"out must have one tensor for each of the {len(banks)} banks, got {len(out)}")
    for position, G in enumerate(banks):
        if G.ndim < 2 or 0 in G.shape[-2:]:
            raise ValueError(f"G must be [..., m, n] with m, n >= 1, got shape {tuple(G.shape)}")
        if not G.is_floating_point():
            raise TypeError(f"G must be floating point, got {G.dtype}")
        if G.device != banks[0].device:
            raise ValueError(f"banks must be on one device, got {banks[0].device} and {G.device}")
        target = G if out is None else out[position]
        if target.shape != G.shape or target.device != G.device or not target.is_floating_point():
            raise ValueError(
                f"out must be floating point {tuple(G.shape)} on {G.device}, got {target.dtype} "
                f"{tuple(target.shape)} on {target.device}"
            )
    flat = [value for values in _tuples(coefficients, steps) for value in values]
    settings = flat, algorithm, dtype, float(norm_scale), float(eps), row_normalize
    if not banks:
        return []
    if out is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (*banks, *out)):
        raise ValueError("out takes no gradient: leave it out, or call under torch.no_grad()")
    if out is None:
        return _banks_op(list(banks), *settings)
    _banks_out_op(list(banks), list(out), *settings)
    return list(out)


def newton_schulz(
    G: torch.Tensor,
    steps: int = 5,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    row_normalize: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Orthogonalise every matrix of ``G``.

    Args:
        G: [..., m, n] floating point, any m, n >= 1. Norms may be any that float32 holds; with eps > 0 a zero matrix
            stays zero; a NaN fills its own matrix only.
        steps: iterations. With the default coefficients any number has its own optimal tuples.
        coefficients: one (a, b, c) a step, or a single one for all steps.
        algorithm: ``standard``, ``symmetric`` or ``gram`` (see above); ``auto`` is the fastest that is at least as
            accurate as ``standard`` in bfloat16: on a GPU ``gram`` or, for nearly square matrices, ``symmetric``, both
            stored in float16, or all by ``symmetric`` in bfloat16 where coefficients could overflow float16 (those of
            the Polar Express cannot); elsewhere ``standard``.
        dtype: of the result, and of the arithmetic except where the algorithm stores in float16; None is bfloat16.
            float32 and float64 are computed by PyTorch everywhere.
        norm_scale: factor on the Frobenius norm before dividing (1.02 in modded-nanogpt, 1 in PR #1874).
        eps: added to that norm.
        row_normalize: divide each row by its norm first (MuonEq-R).
        out: [..., m, n], takes the result.

    Returns the orthogonalised matrices, [..., m, n], in ``dtype`` (or ``out``). Differentiable, through the reference.
    Raises ValueError or TypeError for a wrong shape, dtype, device, algorithm or number of tuples.
    """
    outs = newton_schulz_banks(
        [G],
        steps,
        coefficients,
        algorithm=algorithm,
        dtype=dtype,
        norm_scale=norm_scale,
        eps=eps,
        row_normalize=row_normalize,
        out=None if out is None else [out],
    )
    return outs[0]


__all__ = [
    "ALGORITHMS",
    "POLAR_EXPRESS",
    "QUINTIC",
    "newton_schulz",
    "newton_schulz_banks",
    "newton_schulz_reference",
    "polar_express_coefficients",
]
