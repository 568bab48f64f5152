"""Segments of a packed token stream: what their boundaries mean, and how kernels cut them into tiles."""

from __future__ import annotations

from itertools import pairwise

import torch

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters
from ..common.operators import operator, readable

GROUPS = (1, 2, 4, 8, 16)  # values of H / K for which a tile may hold all query heads of a group


def segment_bounds(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the boundaries, int64, as kernels read them: clamped to 0 .. T; all T (no segments) if any descend."""
    bounds = cu_seqlens.long().clamp(0, tokens)
    return torch.where((bounds.diff() < 0).any(), tokens, bounds)


NAMES = "cu_seqlens", "max_seqlen"  # in messages


def check_segments(
    cu_seqlens: torch.Tensor,
    tokens: int,
    max_seqlen: int | None = None,
    *,
    whole: bool = True,
    names: tuple[str, str] = NAMES,
) -> None:
    """Raise ValueError or TypeError for a wrong shape or dtype of ``cu_seqlens``, and on a CPU for wrong values.

    The other arguments are those of `check_bounds`.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 + (tokens > 0):
        raise ValueError(f"{names[0]} must be [segments + 1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{names[0]} must be int32, got {cu_seqlens.dtype}")
    if readable(cu_seqlens):
        check_bounds(cu_seqlens.tolist(), tokens, max_seqlen, whole=whole, names=names)


def check_bounds(
    bounds: list[int],
    tokens: int,
    max_seqlen: int | None = None,
    *,
    whole: bool = True,
    names: tuple[str, str] = NAMES,
) -> None:
    """Raise ValueError if boundaries do not ascend from 0 to T, or a segment is longer than ``max_seqlen``.

    Unless ``whole``, the last may be less than T. ``names`` are the arguments' in the message.
    """
    if bounds[0] or bounds[-1] > tokens or (whole and bounds[-1] < tokens):
        end = "the number of tokens" if whole else "at most the number of tokens"
        raise ValueError(f"{names[0]} must go from 0 to {end}, {tokens}, got {bounds[0]} to {bounds[-1]}")
    lengths = [end - start for start, end in pairwise(bounds)]
    if min(lengths, default=0) < 0:
        s = next(s for s, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{names[0]} must ascend, got {bounds[s + 1]} after {bounds[s]} at index {s + 1}")
    longest = max(lengths, default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"{names[1]} must be at least the longest segment, {longest}, got {max_seqlen}")


def attention_parameters(
    case: str, dtype: torch.dtype, width: int, group: int, device: torch.device
) -> tuple[dict, int]:
    """Return a case's launch parameters and the number of heads in a tile of queries, a power of two dividing H / K.

    The cases are ``forward``, ``queries`` and ``keys``; ``width`` is D and ``group`` is H / K.
    """
    case = "float32" if dtype == torch.float32 else case
    name = f"{case}_widest" if width > 128 else f"{case}_wide" if width > 64 and case != "float32" else case
    tuned = launch_parameters("varlen_attention", name, device)
    return tuned, min(max(group & -group, 1), tuned["heads"])


def tile_sizes(dtype: torch.dtype, width: int, group: int, device: torch.device) -> tuple[int, ...]:
    """Return the tile sizes in tokens that the kernels use for these arguments, ascending."""
    cases = (attention_parameters(case, dtype, width, group, device) for case in ("forward", "queries", "keys"))
    (forward, of_forward), (queries, of_queries), (keys, _) = cases
    sizes = {forward["rows"] // of_forward, queries["rows"] // of_queries, keys["keys"]}
    if group in GROUPS:
        sizes.add(queries["rows"] // group)
    return tuple(sorted(sizes))


def tiles_shape(
    cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype, width: int, group: int
) -> tuple[int, int, int]:
    """Return the shape of the result of `attention_tiles` for these arguments."""
    sizes = tile_sizes(dtype, width, group, cu_seqlens.device)
    return len(sizes), tokens // sizes[0] + cu_seqlens.size(0) + 1, 4


@jit(do_not_specialize=["S", "T"])
def _attention_bounds_kernel(cu_seqlens, bounds, S, T, CHUNK: tl.constexpr):
    """Write the boundaries [S + 3] of S + 2 parts: tokens before the segments, the segments, tokens behind them.

    Boundaries are clamped to 0 .. T. If any descend there are no segments, and part 0 has all tokens.
    """
    descends = T < 0
    for at in range(0, S, CHUNK):
        s = at + tl.arange(0, CHUNK)
        starts = tl.load(cu_seqlens + s, mask=s < S, other=0)
        ends = tl.load(cu_seqlens + s + 1, mask=s < S, other=0)
        starts, ends = tl.minimum(tl.maximum(starts, 0), T), tl.minimum(tl.maximum(ends, 0), T)
        descends |= tl.max((starts > ends).to(tl.int32), 0) > 0
    for at in range(0, S + 3, CHUNK):
        part = at + tl.arange(0, CHUNK)
        bound = tl.load(cu_seqlens + part - 1, mask=(part > 0) & (part < S + 2), other=0)
        bound = tl.minimum(tl.maximum(bound, 0), T)
        bound = tl.where((part > S + 1) | (descends & (part > 0)), T, bound)
        tl.store(bounds + part, bound, mask=part < S + 3)


@jit(do_not_specialize=["P"])
def _attention_tiles_kernel(bounds, tiles, P, SIZES: tl.constexpr, CHUNK: tl.constexpr):
    """Write tile number ``slot`` of the tiles of one size, which P parts own, to its sorted place.

    Tiles of segments come first, the longest segment's first; then tiles of tokens in no segment, then unused tiles,
    which are zeros. A tile is (first token of its part, length of the part, first token of the tile within the part,
    segment). The length is negated for tokens in no segment: they attend to nothing.
    """
    slot, which = tl.program_id(0), tl.program_id(1)
    size = SIZES[0]
    for i in tl.static_range(1, len(SIZES)):
        size = tl.where(which == i, SIZES[i], size)
    tiles += which * tl.num_programs(0) * 4
    low, high = slot * 0, slot * 0 + P
    while high - low > CHUNK:
        middle = (low + high) // 2
        owned = tl.load(bounds + middle) // size + middle <= slot
        low, high = tl.where(owned, middle, low), tl.where(owned, high, middle)
    p = low + tl.arange(0, CHUNK)
    owned = (tl.load(bounds + p, mask=p < high, other=0) // size + p <= slot) & (p < high)
    part = low + tl.sum(owned.to(tl.int32)) - 1
    start = tl.load(bounds + part)
    length = tl.load(bounds + part + 1) - start
    block = slot - start // size - part
    outside = (part == 0) | (part == P - 1)
    used, before = slot * 0, slot * 0
    for at in range(0, P, CHUNK):
        p = at + tl.arange(0, CHUNK)
        starts = tl.load(bounds + p, mask=p < P, other=0)
        lengths = tl.load(bounds + p + 1, mask=p < P, other=0) - starts
        blocks = (lengths + size - 1) // size
        used += tl.sum(blocks)
        earlier = (lengths > length) | ((lengths == length) & (starts < start)) | outside
        earlier = (earlier & (p > 0) & (p < P - 1)) | (outside & (p < part))
        before += tl.sum(tl.where(earlier, blocks, 0))
    column = tl.arange(0, 4)
    tile = tl.where(column == 0, start, tl.where(column == 1, tl.where(outside, -length, length), block * size))
    tile = tl.where(column == 3, tl.where(outside, 0, part - 1), tile)
    tl.store(tiles + (before + block) * 4 + column, tile, mask=(block * size < length) & (column >= 0))
    tl.store(tiles + slot * 4 + column, column * 0, mask=(slot >= used) & (column >= 0))


def _tiles_triton(cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype, width: int, group: int) -> torch.Tensor:
    tiles = cu_seqlens.new_empty(tiles_shape(cu_seqlens, tokens, dtype, width, group))
    sizes = tile_sizes(dtype, width, group, cu_seqlens.device)
    chunk, segments = 256, cu_seqlens.numel() - 1  # segments that a program reads at a time; their number
    bounds = cu_seqlens.new_empty(segments + 3)
    with torch.cuda.device_of(tiles):  # Triton launches on the current device
        _attention_bounds_kernel[(1,)](cu_seqlens.contiguous(), bounds, segments, tokens, CHUNK=chunk, num_warps=1)
        _attention_tiles_kernel[(tiles.size(1), len(sizes))](
            bounds, tiles, segments + 2, SIZES=sizes, CHUNK=chunk, num_warps=1
        )
    return tiles


# An operator, since a compiler cannot trace the reading of launch parameters from files.
_tiles_op = operator(
    "attention_tiles(Tensor cu_seqlens, SymInt tokens, ScalarType dtype, int width, int group) -> Tensor",
    _tiles_triton,
    lambda cu_seqlens, *arguments: cu_seqlens.new_empty(tiles_shape(cu_seqlens, *arguments)),
)


def attention_tiles(cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype, width: int, group: int) -> torch.Tensor:
    """Return the tiles into which the kernels cut segments, int32 [sizes, T // smallest size + S + 2, 4].

    ``cu_seqlens`` is int32 [S + 1], ``tokens`` is T, ``dtype`` that of q, k and v, ``width`` is D, ``group`` is H / K.
    One result serves all calls with these arguments on one chip, forward and backward. It does not depend on
    ``first_queries``: a tile names its segment, and kernels look the first query up by it.

    Raises ValueError for a wrong shape or, on a CPU, wrong values of ``cu_seqlens``, TypeError for a wrong dtype.
    """
    check_segments(cu_seqlens, tokens, whole=False)
    return _tiles_op(cu_seqlens, tokens, dtype, width, group)


def tiles_of_size(tiles: torch.Tensor, size: int, x: torch.Tensor, group: int) -> torch.Tensor:
    """Return the tiles of one size, [T // size + S + 2, 4], of the result of `attention_tiles` for x [T, heads, D]."""
    tokens, _, width = x.shape
    sizes = tile_sizes(x.dtype, width, group, x.device)
    parts = tiles.size(1) - tokens // sizes[0]
    return tiles[sizes.index(size), : tokens // size + parts].contiguous()
