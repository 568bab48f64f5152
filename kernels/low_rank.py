"""Adapters of low rank, one set for each group of rows: y = residual + scale B (A x), forward and backward.

Several adapters, the parts, read the same x. Of part j of n, with rank r and N_j columns, a row x_t of group g gives

    h_t = A_g^(j) x_t,   y_t^(j) = scale B_g^(j) h_t

and y_t is the parts' y_t^(j) one after the other, then zeros, and added to the residual where one is given, whose
gradient is dy. The other gradients are

    dh_t^(j) = scale B_g^(j)ᵀ dy_t^(j),   dx_t = Σ_j A_g^(j)ᵀ dh_t^(j)
    dA_g^(j) = Σ_t dh_t^(j) x_tᵀ,         dB_g^(j) = scale Σ_t dy_t^(j) h_t^(j)ᵀ

with sums over the rows t of group g.

Shapes: x [T, d]; A [G, n r, d] and B [G, Σ N_j, r], of part j their rows j r .. (j + 1) r and its N_j; y [T, width].
Rows offsets[g] .. offsets[g + 1] belong to group g. Rows before offsets[0] and from offsets[G] on belong to none: their
y is zero or the residual, and what this op adds to their gradient is zero.

Kernels: a tile has rows of one group only. The forward is one launch, in which h does not leave registers but to be
kept for the backward. The backward is one launch for dh, one for dx, one for dA and one for dB; whatever is not needed
is left out. All sums are fp32, in a fixed order and without atomics. Segment s of rows (those before the groups, the
groups, those behind) owns the tiles from begin // size + s: these are enough for it, and T // size + G + 2 in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common.backend import select
from .common.compiling import jit, tl
from .common.launch import launch_parameters, multiprocessors
from .common.operators import _traced, carrying, operator, readable

Tensor = torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST_RANK = 256
_SHORT = 192  # rows of a group, in the mean, below which tiles are smaller
_REACH = 2**31  # offsets within a group's A or B have 32 bits


class LowRank(NamedTuple):
    """What `low_rank` returns."""

    y: Tensor
    x: Tensor  # the argument, for its later readers


def low_rank_reference(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    residual: Tensor | None,
    scale: float,
    parts: Sequence[int],
    width: int,
) -> LowRank:
    """Compute `low_rank` in plain PyTorch, from groups padded to the longest; when traced, to T rows each."""
    groups, rank = A.size(0), B.size(2)
    if offsets is None:
        rows = x.reshape(groups, -1, x.size(-1))
    else:
        flat = x.reshape(-1, x.size(-1))
        bounds = offsets.long().clamp(0, flat.size(0))
        tokens = torch.arange(flat.size(0), device=x.device)
        starts, ends = bounds[:-1], bounds[1:]
        longest = flat.size(0) if _traced((x, offsets)) else max(int((ends - starts).max()), 0)
        places = starts[:, None] + torch.arange(longest, device=x.device)
        valid = (places < ends[:, None])[:, :, None]
        rows = torch.where(valid, flat[places.clamp(max=max(flat.size(0) - 1, 0))], 0) if longest else flat[places]
    h = torch.bmm(rows, A.mT)
    pairs = zip(h.split(rank, dim=2), B.split(list(parts), dim=1), strict=True)
    y = torch.cat([scale * torch.bmm(own, b.mT) for own, b in pairs], dim=2)
    y = F.pad(y, (0, width - y.size(2)))
    if offsets is not None:
        group = torch.searchsorted(bounds, tokens, right=True) - 1
        inside, group = ((group >= 0) & (group < groups))[:, None], group.clamp(0, groups - 1)
        if longest:
            y = torch.where(inside, y[group, (tokens - starts[group]).clamp(0, longest - 1)], 0)
        else:  # no group has a row
            y = y.new_zeros(flat.size(0), width) + 0 * y.sum()
    y = y.reshape(*x.shape[:-1], width)
    return LowRank(y if residual is None else residual + y, x)


@jit
def _bound(offsets, segment, T, G, each):
    """The row at which a segment begins, from 0 to T; segment 0 is before the groups, G + 1 behind them."""
    if offsets is None:
        row = (segment - 1) * each
    else:
        row = tl.load(offsets + segment - 1, mask=(segment > 0) & (segment <= G + 1), other=0)
    return tl.where(segment > G + 1, T, tl.minimum(tl.maximum(row, 0), T))


@jit
def _tile(offsets, slot, T, G, each, SIZE: tl.constexpr):
    """The tile's group, or -1 for none, its first row, and the row behind its group; without rows both are T."""
    CHUNK: tl.constexpr = 128  # segments looked at together
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
    used = (first >= start) & (first < end)  # the former for offsets that descend
    group = tl.where(segment > G, -1, segment - 1)
    return group, tl.where(used, first, T), tl.where(used, end, T)


@jit
def _part(tile, PARTS: tl.constexpr, ALIGNED: tl.constexpr, size):
    """(part, its first column, its columns, the tile's index there) where parts are cut into tiles of a size.

    ALIGNED multiplies, so that the compiler knows that it divides.
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
    """h and y of a tile of rows, and of a part's ``blocks`` of COLUMNS columns.

    ``d`` is D: a loop of a number of rounds that the compiler knows is unrolled, which takes registers.
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
        held = (columns < count)[:, None] & real[None, :] & (group >= 0)
        places, written = rows * WIDTH + first + columns[None, :], inside & (columns < count)[None, :]
        if residual is not None:
            more = tl.load(residual + places, mask=written, other=0)  # on its way while the product is made
        right = tl.load(B + columns[:, None] * RANK + ranks[None, :], mask=held, other=0)
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
    """dh of a tile of rows, of a part's COLUMNS ranks; ``columns`` is TOTAL, see `_forward_kernel`."""
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
    inside, held = rows < end - start, (ranks < RANK) | (RANK % COLUMNS == 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, tl.minimum(count, columns), DEPTH, num_stages=STAGES):
        depth = k + tl.arange(0, DEPTH)
        left = tl.load(dy + rows * dy_stride + depth[None, :], mask=inside & (depth < count)[None, :], other=0)
        right = tl.load(B + depth[:, None] * RANK + ranks, mask=(depth < count)[:, None] & held, other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(dh + rows * (COUNT * RANK) + ranks, (scale * total).to(dh.dtype.element_ty), mask=inside & held)


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
    """dx of a tile of rows and columns, onto what came back from later readers of x: read EARLY, or behind the product.

    RANKS are all parts' together, and so is ``ranks``; see `_forward_kernel`.
    """
    ACROSS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    group, start, end = _tile(offsets, program // ACROSS, T, G, each, ROWS)
    if start >= end:
        return
    A += tl.maximum(group, 0).to(tl.int64) * RANKS * D
    dh += start.to(tl.int64) * RANKS
    rows, columns = tl.arange(0, ROWS)[:, None], program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, held = rows < end - start, (columns < D) | (D % COLUMNS == 0)
    places = start.to(tl.int64) * D + (rows * D + columns)
    if EARLY and dx_next is not None:
        more = tl.load(dx_next + places, mask=inside & held, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, tl.where(group < 0, 0, ranks), DEPTH, num_stages=STAGES):
        depth = k + tl.arange(0, DEPTH)
        deep = (depth < RANKS) | (RANKS % DEPTH == 0)
        left = tl.load(dh + rows * RANKS + depth[None, :], mask=inside & deep[None, :], other=0)
        right = tl.load(A + depth[:, None] * D + columns, mask=deep[:, None] & held, other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if dx_next is not None:
        if not EARLY:
            more = tl.load(dx_next + places, mask=inside & held, other=0)
        total += more.to(tl.float32)
    tl.store(dx + places, total.to(dx.dtype.element_ty), mask=inside & held)


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
    """A tile of out [G, TOTAL, WIDTH]: of part j's columns of left, factor leftᵀ right[:, j WIDTH:][:, :WIDTH]."""
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    group, tile = program // TILES, program % TILES
    part, first, count, index = _part(tile // ACROSS, PARTS, ALIGNED, ROWS)
    start, end = _bound(offsets, group + 1, T, G, each), _bound(offsets, group + 2, T, G, each)
    rows, columns = index * ROWS + tl.arange(0, ROWS), tile % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    held, kept = (rows < count)[None, :], ((columns[None, :] < WIDTH) | (WIDTH % COLUMNS == 0))
    tokens = tl.arange(0, DEPTH)[:, None]
    left += start.to(tl.int64) * left_stride + first
    right += start.to(tl.int64) * right_stride + part * WIDTH
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, end - start, DEPTH, num_stages=STAGES):
        inside = tokens < end - start - k
        at = k + group.to(tl.int64) * 0
        a = tl.load(left + at * left_stride + (tokens * left_stride + rows[None, :]), mask=inside & held, other=0)
        b = tl.load(right + at * right_stride + (tokens * right_stride + columns[None, :]), mask=inside & kept, other=0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    out += (group.to(tl.int64) * TOTAL + first) * WIDTH
    places = rows[:, None] * WIDTH + columns[None, :]
    tl.store(out + places, (factor * total).to(out.dtype.element_ty), mask=(rows < count)[:, None] & kept)


def _columns(parts: Sequence[int]) -> dict:
    """Constants of parts: (first column, columns) of each in units of what divides them, these, the sum of columns."""
    unit = gcd(16, *parts)
    firsts = [sum(parts[:i]) for i in range(len(parts))]
    pairs = tuple((first // unit, part // unit) for first, part in zip(firsts, parts, strict=True))
    return dict(PARTS=pairs, ALIGNED=unit, TOTAL=sum(parts))


def _settings(case: str, x: Tensor, groups: int, rank: int) -> dict:
    """Constants and options of a case's launch."""
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
    """A power of two from 16."""
    return max(16, 1 << (size - 1).bit_length())


def _rows(tensor: Tensor) -> Tensor:
    """[..., d] as [T, d] with contiguous rows, so that offsets in a tile have 32 bits."""
    rows = tensor.reshape(-1, tensor.size(-1))
    return rows if rows.stride(1) == 1 and 0 < rows.stride(0) < 2**22 else rows.contiguous()


def _segments(x: Tensor, groups: int, offsets: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """Kernels' arguments that say where groups are: offsets, and T, G and the rows of each without these."""
    return offsets if offsets is None else offsets.contiguous(), (x.size(0), groups, x.size(0) // groups)


def _forward(
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
    """y, and h for the backward, or where it is not to be kept nothing."""
    y, h = _fake_forward(x, A, B, offsets, residual, scale, parts, width, keep)
    residual = residual if residual is None else residual.contiguous()
    flat, A, B = x.reshape(-1, x.size(-1)).contiguous(), A.contiguous(), B.contiguous()
    (groups, _, d), rank = A.shape, B.size(2)
    settings = _settings("forward", flat, groups, rank)
    offsets, sizes = _segments(flat, groups, offsets)
    rows, columns = settings["ROWS"], settings["COLUMNS"]
    # Where tiles are few each computes h for less of a part's columns.
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
            **_columns(parts),
            **settings,
        )
    return y, h


def _fake_forward(x, A, B, offsets, residual, scale, parts, width, keep):
    return x.new_empty(*x.shape[:-1], width), x.new_empty(*(x.shape[:-1] if keep else (0,)), A.size(1))


def _hidden(dy: Tensor, B: Tensor, offsets: Tensor | None, dh: Tensor, parts: Sequence[int], scale: float) -> None:
    """Write dh [T, n r]."""
    groups, _, rank = B.shape
    settings = _settings("hidden", dh, groups, rank)
    settings["COLUMNS"] = min(settings["COLUMNS"], _padded(rank))
    across = len(parts) * -(-rank // settings["COLUMNS"])
    offsets, sizes = _segments(dh, groups, offsets)
    _hidden_kernel[((dh.size(0) // settings["ROWS"] + groups + 2) * across,)](
        dy, B, offsets, dh, *sizes, sum(parts), dy.stride(0), scale, RANK=rank, **_columns(parts), **settings
    )


def _input(dx_next: Tensor | None, dh: Tensor, A: Tensor, offsets: Tensor | None, dx: Tensor, rank: int) -> None:
    """Write dx, onto ``dx_next`` where there is one."""
    groups, ranks, d = A.shape
    settings = _settings("input", dh, groups, rank)
    offsets, sizes = _segments(dh, groups, offsets)
    tiles = (dh.size(0) // settings["ROWS"] + groups + 2) * -(-d // settings["COLUMNS"])
    # A product of many elements a thread leaves registers for one program a multiprocessor, and then for more.
    settings["EARLY"] = settings["ROWS"] * settings["COLUMNS"] > 2048 * settings["num_warps"]
    _input_kernel[(tiles,)](dx_next, dh, A, offsets, dx, *sizes, ranks, D=d, RANKS=ranks, **settings)


def _weights(
    left: Tensor, right: Tensor, offsets: Tensor | None, out: Tensor, parts: Sequence[int], factor: float, rank: int
) -> None:
    """Write the sums of `_weights_kernel`."""
    groups, _, width = out.shape
    settings = _settings("weights", left, groups, rank)
    if settings["COLUMNS"] > _padded(width):  # the long side of a tile is where ``out`` has more than it
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
        **_columns(parts),
        **settings,
    )


def _backward(
    dx_next: Tensor | None,
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    h: Tensor,
    scale: float,
    parts: Sequence[int],
    need_x: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, onto ``dx_next``, A and B, empty where not needed."""
    dx, dA, dB = _fake_backward(dx_next, dy, x, A, B, offsets, h, scale, parts, need_x, need_A, need_B)
    dy, flat = _rows(dy), x.reshape(-1, x.size(-1)).contiguous()
    ranks, rank = A.size(1), B.size(2)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if need_x or need_A:
            dh = flat.new_empty(flat.size(0), ranks)
            _hidden(dy, B.contiguous(), offsets, dh, parts, scale)
        if need_x:
            _input(dx_next if dx_next is None else dx_next.contiguous(), dh, A.contiguous(), offsets, dx, rank)
        if need_A:
            _weights(dh, flat, offsets, dA, (ranks,), 1.0, rank)
        if need_B:
            _weights(dy, h.reshape(-1, ranks), offsets, dB, parts, scale, rank)
    return dx, dA, dB


def _fake_backward(dx_next, dy, x, A, B, offsets, h, scale, parts, *needs):
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, A, B), needs, strict=True))


_backward_op = operator(
    "low_rank_backward(Tensor? dx_next, Tensor dy, Tensor x, Tensor A, Tensor B, Tensor? offsets, Tensor h, "
    "float scale, int[] parts, bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)",
    _backward,
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
    found = _backward_op(dx_next, dy, *ctx.saved_tensors, ctx.scale, ctx.parts, *needs)
    own = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return *own, None, dy if ctx.needs_input_grad[4] else None, *(None,) * 4


_op = carrying(
    "low_rank(Tensor x, Tensor A, Tensor B, Tensor? offsets, Tensor? residual, float scale, int[] parts, int width, "
    "bool keep) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _save,
    _gradients,
    carried=1,
)


def _low_rank_triton(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    residual: Tensor | None,
    scale: float,
    parts: Sequence[int],
    width: int,
) -> LowRank:
    keep = torch.is_grad_enabled() and B.requires_grad
    y, _, x = _op(x, A, B, offsets, residual, scale, list(parts), width, keep)
    return LowRank(y, x)


_LOW_RANK = {"reference": low_rank_reference, "triton": _low_rank_triton}


def _check(
    x: Tensor, A: Tensor, B: Tensor, offsets: Tensor | None, residual: Tensor | None, parts: Sequence[int], width: int
) -> None:
    for name, tensor in (("x", x), ("A", A), ("B", B), ("residual", residual)):
        if tensor is not None and (tensor.dtype not in _DTYPES or tensor.dtype != x.dtype):
            allowed = "bfloat16, float16, float32 or float64" if tensor is x else f"x's dtype {x.dtype}"
            raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
    if A.ndim != 3 or not A.size(0) or not A.size(2):
        raise ValueError(f"A must be [groups, parts x rank, d] with groups and d >= 1, got shape {tuple(A.shape)}")
    if B.ndim != 3 or B.size(0) != A.size(0) or not 1 <= B.size(2) <= _LARGEST_RANK:
        raise ValueError(
            f"B must be [{A.size(0)}, columns, rank] with rank from 1 to {_LARGEST_RANK}, got shape {tuple(B.shape)}"
        )
    if not parts or min(parts) < 1 or sum(parts) != B.size(1):
        raise ValueError(f"parts must be positive and add up to B's {B.size(1)} columns, got {list(parts)}")
    if A.size(1) != len(parts) * B.size(2):
        raise ValueError(f"A must have {len(parts)} x {B.size(2)} rows a group, parts x rank, got {A.size(1)}")
    if width < B.size(1):
        raise ValueError(f"width must be at least the {B.size(1)} columns of all parts, got {width}")
    if residual is not None and residual.shape != (*x.shape[:-1], width):
        raise ValueError(f"residual must be {[*x.shape[:-1], width]}, y's shape, got {list(residual.shape)}")
    for name, tensor in (("A", A), ("B", B), ("offsets", offsets), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if offsets is None:
        if x.ndim < 2 or x.size(0) != A.size(0) or x.size(-1) != A.size(2):
            wanted = f"[{A.size(0)}, ..., {A.size(2)}]"
            raise ValueError(f"x must be {wanted} without offsets, a row of it a group, got shape {tuple(x.shape)}")
        return
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.size(0) != 1) or x.size(-1) != A.size(2):
        wanted = f"[T, {A.size(2)}] or [1, T, {A.size(2)}]"
        raise ValueError(f"x must be {wanted} with offsets, got shape {tuple(x.shape)}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}")
    if offsets.shape != (A.size(0) + 1,):
        raise ValueError(f"offsets must be [{A.size(0) + 1}], groups + 1, got shape {tuple(offsets.shape)}")
    if readable(offsets, x):
        bounds = [0, *offsets.tolist(), x.size(-2)]
        if any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"offsets must ascend from 0 or more to x's {x.size(-2)} rows or less, got {bounds[1:-1]}")


def low_rank(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None = None,
    scale: float = 1.0,
    *,
    parts: Sequence[int] | None = None,
    width: int | None = None,
    residual: Tensor | None = None,
) -> LowRank:
    """Apply each group's adapters to the group's rows; see the module's docstring for the formula.

    Kernels sum in fp32 and round h and dh to x's dtype; float32 takes no TF32. Differentiable once in x, A, B and the
    residual. The x of the result is the argument, for its later readers: in eager mode their gradient is added within
    the kernel that writes dx. float64 takes the reference, which on a GPU waits for ``offsets``.

    Args:
        x: [T, d] or [1, T, d] with ``offsets``, else [G, ..., d], whose row g is group g's; bfloat16, float16, float32
            or float64, as A and B are.
        A: [G, n r, d], r <= 256; of part j the rows j r to (j + 1) r.
        B: [G, Σ N_j, r], the parts' rows one after the other.
        offsets: int32 [G + 1], ascending from 0 or more to T or less; equal ones are groups without rows. Values are
            checked on a CPU only; others give wrong results on a GPU, where kernels stay within the tensors.
        scale: a number that multiplies B A x.
        parts: N_1 to N_n; one part of all columns by default.
        width: the columns of y, Σ N_j by default; further columns are zeros, or the residual's, and their gradients are
            not read.
        residual: [..., width] as y, in x's dtype; y is added to it in fp32.

    Returns y [..., width] and x. Raises ValueError for a wrong shape, device or value, TypeError for a wrong dtype.
    """
    parts = tuple(B.shape[1:2]) if parts is None else tuple(parts)
    width = sum(parts) if width is None else width
    _check(x, A, B, offsets, residual, parts, width)
    chosen = select("low_rank", _LOW_RANK, x)
    if x.dtype == torch.float64 or max(A[0].numel(), B[0].numel()) >= _REACH:
        chosen = low_rank_reference
    return chosen(x, A, B, offsets, residual, float(scale), parts, width)
