"""The kernels of `low_rank`, their launches, and the operator with its derivative."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters, multiprocessors
from ..common.operators import carrying, operator
from .reference import LowRank

Tensor = torch.Tensor
_SHORT = 192  # mean rows per group below which tiles are smaller


@jit
def _bound(offsets, segment, T, G, each):
    """The first row of a segment, clamped to 0 .. T; segment 0 is before the groups, segment G + 1 behind them."""
    if offsets is None:
        row = (segment - 1) * each
    else:
        row = tl.load(offsets + segment - 1, mask=(segment > 0) & (segment <= G + 1), other=0)
    return tl.where(segment > G + 1, T, tl.minimum(tl.maximum(row, 0), T))


@jit
def _tile(offsets, slot, T, G, each, SIZE: tl.constexpr):
    """A tile's group (-1 outside the groups), its first row, and the end of its group; both are T if it is unused."""
    CHUNK: tl.constexpr = 128  # segments read at a time
    low, high = slot * 0, slot * 0 + G + 2
    while high - low > CHUNK:
        middle = (low + high) // 2
        owned = _bound(offsets, middle, T, G, each) // SIZE + middle <= slot
        low, high = tl.where(owned, middle, low), tl.where(owned, high, middle)
    segments = low + tl.arange(0, CHUNK)
    owned = (_bound(offsets, segments, T, G, each) // SIZE + segments <= slot) & (segments < high)
    segment = low + tl.sum(owned.to(tl.int32)) - 1
    start, end = _bound(offsets, segment, T, G, each), _bound(offsets, segment + 1, T, G, each)
    first = start + (slot - start // SIZE - segment) * SIZE
    used = (first >= start) & (first < end)  # the first condition fails if offsets descend
    group = tl.where(segment > G, -1, segment - 1)
    return group, tl.where(used, first, T), tl.where(used, end, T)


@jit
def _part(tile, PARTS: tl.constexpr, ALIGNED: tl.constexpr, size):
    """(part, its first column, its number of columns, the tile's index in it) for parts cut into tiles of one size.

    PARTS are in units of ALIGNED columns: the compiler then knows that ALIGNED divides first and count.
    """
    part, first, count, index = tile * 0, tile * 0, tile * 0, tile * 0
    for i in tl.static_range(len(PARTS)):
        tiles = tl.cdiv(PARTS[i][1] * ALIGNED, size)
        mine = (tile >= 0) & (tile < tiles)
        part, first = tl.where(mine, i, part), tl.where(mine, PARTS[i][0], first)
        count, index = tl.where(mine, PARTS[i][1], count), tl.where(mine, tile, index)
        tile -= tiles
    return part, first * ALIGNED, count * ALIGNED, index


@jit(do_not_specialize=["T", "G", "each", "blocks", "chunks", "d"])
def _forward_kernel(
    x,
    A,
    B,
    offsets,
    residual,
    h,
    y,
    T,
    G,
    each,
    blocks,
    chunks,
    scale,
    d,
    D: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write h and y of a tile of rows, for ``blocks`` blocks of COLUMNS columns of a part.

    ``d`` equals D, but is no constant: the compiler would unroll a loop over D, which takes registers.
    """
    program = tl.program_id(0)
    which = program % chunks
    group, start, end = _tile(offsets, program // chunks, T, G, each, ROWS)
    if start >= end:
        return
    part, first, count, index = _part(which, PARTS, ALIGNED, blocks * COLUMNS)
    begin = index * blocks * COLUMNS
    adapter = tl.maximum(group, 0).to(tl.int64)
    COUNT: tl.constexpr = len(PARTS)
    A += (adapter * COUNT + part) * RANK * D
    B += (adapter * TOTAL + first) * RANK
    x += start.to(tl.int64) * D
    y += start.to(tl.int64) * WIDTH
    if residual is not None:
        residual += start.to(tl.int64) * WIDTH
    rows, ranks = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)
    inside, real = rows < end - start, (ranks < RANK) | (RANK == PADDED)

    total = tl.zeros((ROWS, PADDED), tl.float32)
    for k in tl.range(0, tl.where(group < 0, 0, d), DEPTH, num_stages=STAGES):
        depth = k + tl.arange(0, DEPTH)[None, :]
        deep = (depth < D) | (D % DEPTH == 0)
        left = tl.load(x + rows * D + depth, mask=inside & deep, other=0)
        right = tl.load(A + ranks[:, None] * D + depth, mask=real[:, None] & deep, other=0)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    hidden = total.to(x.dtype.element_ty)
    if h is not None and begin == 0:
        h += (start.to(tl.int64) * COUNT + part) * RANK
        places = rows * (COUNT * RANK) + ranks[None, :]
        tl.store(h + places, hidden, mask=inside & real[None, :])
    for n in tl.range(begin, tl.minimum(begin + blocks * COLUMNS, count), COLUMNS, num_stages=STAGES):
        columns = n + tl.arange(0, COLUMNS)
        valid = (columns < count)[:, None] & real[None, :] & (group >= 0)
        places, written = rows * WIDTH + first + columns[None, :], inside & (columns < count)[None, :]
        if residual is not None:
            more = tl.load(residual + places, mask=written, other=0)  # loads during the product
        right = tl.load(B + columns[:, None] * RANK + ranks[None, :], mask=valid, other=0)
        out = scale * tl.dot(hidden, tl.trans(right), input_precision=PRECISION)
        if residual is not None:
            out += more.to(tl.float32)
        tl.store(y + places, out.to(y.dtype.element_ty), mask=written)
    if TOTAL < WIDTH and which == chunks - 1:
        for n in range(TOTAL, WIDTH, COLUMNS):
            columns = n + tl.arange(0, COLUMNS)[None, :]
            out = tl.zeros((ROWS, COLUMNS), y.dtype.element_ty)
            if residual is not None:
                out = tl.load(residual + rows * WIDTH + columns, mask=inside & (columns < WIDTH), other=0)
            tl.store(y + rows * WIDTH + columns, out, mask=inside & (columns < WIDTH))


@jit(do_not_specialize=["T", "G", "each", "columns"])
def _hidden_kernel(
    dy,
    B,
    offsets,
    dh,
    T,
    G,
    each,
    columns,
    dy_stride,
    scale,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dh of a tile of rows, for COLUMNS ranks of a part; ``columns`` equals TOTAL, as d in `_forward_kernel`."""
    COUNT: tl.constexpr = len(PARTS)
    ACROSS: tl.constexpr = COUNT * ((RANK + COLUMNS - 1) // COLUMNS)
    program = tl.program_id(0)
    group, start, end = _tile(offsets, program // ACROSS, T, G, each, ROWS)
    if (start >= end) | (group < 0):
        return
    which = program % ACROSS
    part, first, count, _ = _part(which % COUNT, PARTS, ALIGNED, 2**30)
    B += (group.to(tl.int64) * TOTAL + first) * RANK
    dy += start.to(tl.int64) * dy_stride + first
    dh += (start.to(tl.int64) * COUNT + part) * RANK
    rows, ranks = tl.arange(0, ROWS)[:, None], which // COUNT * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, valid = rows < end - start, (ranks < RANK) | (RANK % COLUMNS == 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, tl.minimum(count, columns), DEPTH, num_stages=STAGES):
        depth = k + tl.arange(0, DEPTH)
        left = tl.load(dy + rows * dy_stride + depth[None, :], mask=inside & (depth < count)[None, :], other=0)
        right = tl.load(B + depth[:, None] * RANK + ranks, mask=(depth < count)[:, None] & valid, other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(dh + rows * (COUNT * RANK) + ranks, (scale * total).to(dh.dtype.element_ty), mask=inside & valid)


@jit(do_not_specialize=["T", "G", "each", "ranks"])
def _input_kernel(
    dx_next,
    dh,
    A,
    offsets,
    dx,
    T,
    G,
    each,
    ranks,
    D: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dx of a tile of rows and columns, plus dx_next, which is loaded before the product if EARLY, else after it.

    RANKS is the sum of all parts' ranks; ``ranks`` equals RANKS, as d in `_forward_kernel`.
    """
    ACROSS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    group, start, end = _tile(offsets, program // ACROSS, T, G, each, ROWS)
    if start >= end:
        return
    A += tl.maximum(group, 0).to(tl.int64) * RANKS * D
    dh += start.to(tl.int64) * RANKS
    rows, columns = tl.arange(0, ROWS)[:, None], program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, valid = rows < end - start, (columns < D) | (D % COLUMNS == 0)
    places = start.to(tl.int64) * D + (rows * D + columns)
    if EARLY and dx_next is not None:
        more = tl.load(dx_next + places, mask=inside & valid, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, tl.where(group < 0, 0, ranks), DEPTH, num_stages=STAGES):
        depth = k + tl.arange(0, DEPTH)
        deep = (depth < RANKS) | (RANKS % DEPTH == 0)
        left = tl.load(dh + rows * RANKS + depth[None, :], mask=inside & deep[None, :], other=0)
        right = tl.load(A + depth[:, None] * D + columns, mask=deep[:, None] & valid, other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if dx_next is not None:
        if not EARLY:
            more = tl.load(dx_next + places, mask=inside & valid, other=0)
        total += more.to(tl.float32)
    tl.store(dx + places, total.to(dx.dtype.element_ty), mask=inside & valid)


@jit(do_not_specialize=["T", "G", "each"])
def _weights_kernel(
    left,
    right,
    offsets,
    out,
    T,
    G,
    each,
    left_stride,
    right_stride,
    factor,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a tile of out [G, TOTAL, WIDTH]: factor leftᵀ right[:, j WIDTH :][:, :WIDTH] for part j's columns."""
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    group, tile = program // TILES, program % TILES
    part, first, count, index = _part(tile // ACROSS, PARTS, ALIGNED, ROWS)
    start, end = _bound(offsets, group + 1, T, G, each), _bound(offsets, group + 2, T, G, each)
    rows, columns = index * ROWS + tl.arange(0, ROWS), tile % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    valid, kept = (rows < count)[None, :], ((columns[None, :] < WIDTH) | (WIDTH % COLUMNS == 0))
    tokens = tl.arange(0, DEPTH)[:, None]
    left += start.to(tl.int64) * left_stride + first
    right += start.to(tl.int64) * right_stride + part * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, end - start, DEPTH, num_stages=STAGES):
        inside = tokens < end - start - k
        at = k + group.to(tl.int64) * 0
        a = tl.load(left + at * left_stride + (tokens * left_stride + rows[None, :]), mask=inside & valid, other=0)
        b = tl.load(right + at * right_stride + (tokens * right_stride + columns[None, :]), mask=inside & kept, other=0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    out += (group.to(tl.int64) * TOTAL + first) * WIDTH
    places = rows[:, None] * WIDTH + columns[None, :]
    tl.store(out + places, (factor * total).to(out.dtype.element_ty), mask=(rows < count)[:, None] & kept)


# --- Launches ---


def _part_constants(parts: Sequence[int]) -> dict:
    """Return constants: the parts' (first column, columns) in units of a common divisor, the divisor, all columns."""
    unit = gcd(16, *parts)
    firsts = [sum(parts[:i]) for i in range(len(parts))]
    pairs = tuple((first // unit, part // unit) for first, part in zip(firsts, parts, strict=True))
    return dict(PARTS=pairs, ALIGNED=unit, TOTAL=sum(parts))


def _settings(case: str, x: Tensor, groups: int, rank: int) -> dict:
    """Return the constants and options of a case's launch."""
    name = "float32" if x.dtype == torch.float32 else "wide" if rank > 128 else case
    if name not in ("float32", "wide", "weights") and x.size(0) < _SHORT * groups:
        name = "short"
    tuned = launch_parameters("low_rank", name, x.device)
    return dict(
        ROWS=tuned["rows"],
        COLUMNS=tuned["columns"],
        DEPTH=tuned["depth"],
        STAGES=tuned["stages"],
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tuned["warps"],
    )


def _padded(size: int) -> int:
    """Return the smallest power of two that is at least ``size`` and 16."""
    return max(16, 1 << (size - 1).bit_length())


def _rows(tensor: Tensor) -> Tensor:
    """Return [..., d] as [T, d] with contiguous rows and a stride for which offsets in a tile fit in 32 bits."""
    rows = tensor.reshape(-1, tensor.size(-1))
    return rows if rows.stride(1) == 1 and 0 < rows.stride(0) < 2**22 else rows.contiguous()


def _segments(x: Tensor, groups: int, offsets: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """Return the kernels' arguments for the groups: offsets, and (T, G, rows per group if offsets is None)."""
    return offsets if offsets is None else offsets.contiguous(), (x.size(0), groups, x.size(0) // groups)


def low_rank_forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    residual: Tensor | None,
    scale: float,
    parts: Sequence[int],
    width: int,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y, and h for backward, which is empty unless ``keep``."""
    y, h = _fake_forward(x, A, B, offsets, residual, scale, parts, width, keep)
    residual = residual if residual is None else residual.contiguous()
    flat, A, B = x.reshape(-1, x.size(-1)).contiguous(), A.contiguous(), B.contiguous()
    (groups, _, d), rank = A.shape, B.size(2)
    settings = _settings("forward", flat, groups, rank)
    offsets, sizes = _segments(flat, groups, offsets)
    rows, columns = settings["ROWS"], settings["COLUMNS"]
    # If there are few tiles of rows, more programs share the columns of a part; each of them computes h.
    split = -(-4 * multiprocessors(x.device) // (len(parts) * (flat.size(0) // rows + groups)))
    blocks = max(-(-max(parts) // (columns * split)), 4)
    chunks = sum(-(-part // (columns * blocks)) for part in parts)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _forward_kernel[((flat.size(0) // rows + groups + 2) * chunks,)](
            flat,
            A,
            B,
            offsets,
            residual,
            h if keep else None,
            y,
            *sizes,
            blocks,
            chunks,
            scale,
            d,
            D=d,
            RANK=rank,
            WIDTH=width,
            PADDED=_padded(rank),
            **_part_constants(parts),
            **settings,
        )
    return y, h


def _fake_forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    residual: Tensor | None,
    scale: float,
    parts: Sequence[int],
    width: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], width), x.new_empty(*(x.shape[:-1] if keep else (0,)), A.size(1))


def _write_dh(dy: Tensor, B: Tensor, offsets: Tensor | None, dh: Tensor, parts: Sequence[int], scale: float) -> None:
    """Write dh [T, n r]."""
    groups, _, rank = B.shape
    settings = _settings("hidden", dh, groups, rank)
    settings["COLUMNS"] = min(settings["COLUMNS"], _padded(rank))
    across = len(parts) * -(-rank // settings["COLUMNS"])
    offsets, sizes = _segments(dh, groups, offsets)
    _hidden_kernel[((dh.size(0) // settings["ROWS"] + groups + 2) * across,)](
        dy, B, offsets, dh, *sizes, sum(parts), dy.stride(0), scale, RANK=rank, **_part_constants(parts), **settings
    )


def _write_dx(dx_next: Tensor | None, dh: Tensor, A: Tensor, offsets: Tensor | None, dx: Tensor, rank: int) -> None:
    """Write dx, plus ``dx_next`` if given."""
    groups, ranks, d = A.shape
    settings = _settings("input", dh, groups, rank)
    offsets, sizes = _segments(dh, groups, offsets)
    tiles = (dh.size(0) // settings["ROWS"] + groups + 2) * -(-d // settings["COLUMNS"])
    # With many elements per thread registers allow a single program per multiprocessor, which then has some to spare.
    settings["EARLY"] = settings["ROWS"] * settings["COLUMNS"] > 2048 * settings["num_warps"]
    _input_kernel[(tiles,)](dx_next, dh, A, offsets, dx, *sizes, ranks, D=d, RANKS=ranks, **settings)


def _write_dweight(
    left: Tensor, right: Tensor, offsets: Tensor | None, out: Tensor, parts: Sequence[int], factor: float, rank: int
) -> None:
    """Write the sums of `_weights_kernel`."""
    groups, _, width = out.shape
    settings = _settings("weights", left, groups, rank)
    if settings["COLUMNS"] > _padded(width):  # the long side of a tile lies along that of ``out``
        settings["ROWS"], settings["COLUMNS"] = settings["COLUMNS"], settings["ROWS"]
    tiles = sum(-(-part // settings["ROWS"]) for part in parts) * -(-width // settings["COLUMNS"])
    offsets, sizes = _segments(left, groups, offsets)
    _weights_kernel[(groups * tiles,)](
        left,
        right,
        offsets,
        out,
        *sizes,
        left.stride(0),
        right.stride(0),
        factor,
        WIDTH=width,
        TILES=tiles,
        **_part_constants(parts),
        **settings,
    )


def low_rank_backward(
    dx_next: Tensor | None,
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    h: Tensor,
    scale: float,
    parts: Sequence[int],
    need_x: bool = True,
    need_A: bool = True,
    need_B: bool = True,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, plus ``dx_next``, and of A and B, empty if not needed."""
    dx, dA, dB = _fake_backward(dx_next, dy, x, A, B, offsets, h, scale, parts, need_x, need_A, need_B)
    dy, flat = _rows(dy), x.reshape(-1, x.size(-1)).contiguous()
    ranks, rank = A.size(1), B.size(2)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if need_x or need_A:
            dh = flat.new_empty(flat.size(0), ranks)
            _write_dh(dy, B.contiguous(), offsets, dh, parts, scale)
        if need_x:
            _write_dx(dx_next if dx_next is None else dx_next.contiguous(), dh, A.contiguous(), offsets, dx, rank)
        if need_A:
            _write_dweight(dh, flat, offsets, dA, (ranks,), 1.0, rank)
        if need_B:
            _write_dweight(dy, h.reshape(-1, ranks), offsets, dB, parts, scale, rank)
    return dx, dA, dB


def _fake_backward(
    dx_next: Tensor | None,
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    h: Tensor,
    scale: float,
    parts: Sequence[int],
    *needs: bool,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, A, B), needs, strict=True))


# --- Operators and derivatives ---


_backward_op = operator(
    "low_rank_backward(Tensor? dx_next, Tensor dy, Tensor x, Tensor A, Tensor B, Tensor? offsets, Tensor h, "
    "float scale, int[] parts, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)",
    low_rank_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.scale, ctx.parts = inputs[5:7]


@once_differentiable
def _gradients(ctx: Any, dy: Tensor | None, _: Any, dx_next: Tensor | None = None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    if dy is None or not any(needs):
        return dx_next, *(None,) * 3, dy, *(None,) * 4
    results = _backward_op(dx_next, dy, *ctx.saved_tensors, ctx.scale, ctx.parts, *needs)
    gradients = (gradient if need else None for gradient, need in zip(results, needs, strict=True))
    return *gradients, None, dy if ctx.needs_input_grad[4] else None, *(None,) * 4


_op = carrying(
    "low_rank(Tensor x, Tensor A, Tensor B, Tensor? offsets, Tensor? residual, float scale, int[] parts, int width, "
    "bool keep) -> (Tensor, Tensor)",
    low_rank_forward,
    _fake_forward,
    _save,
    _gradients,
    carried=1,
)


def low_rank_triton(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    residual: Tensor | None,
    scale: float,
    parts: Sequence[int],
    width: int,
) -> LowRank:
    """Compute `low_rank` by kernels."""
    keep = torch.is_grad_enabled() and B.requires_grad
    y, _, x = _op(x, A, B, offsets, residual, scale, list(parts), width, keep)
    return LowRank(y, x)
