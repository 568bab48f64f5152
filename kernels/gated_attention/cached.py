"""`gated_attention` of tokens that follow on cached ones, for evaluation that feeds a document in pieces."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..common import RMS_EPS
from ..common.operators import readable
from ..varlen_attention.segments import check_bounds, check_segments
from .reference import (
    dense_attention,
    epilogue_reference,
    flash_attention,
    flash_takes,
    offset_keys_reference,
    prologue_reference,
)

Tensor = torch.Tensor


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, and the places of those of the new tokens.

    A stream of L keys holds, for each segment in turn, its cached tokens and then its new tokens.
    """

    keys: Tensor  # [C, K, D], normalised and rotated
    values: Tensor  # [C, K, D]
    sources: Tensor  # int [L], the cache's row for each place in the stream; any row for places of new tokens
    places: Tensor  # int64 [T], each new token's place in the stream
    rows: Tensor  # int64 [T], the cache's row into which each new token is written; rows may repeat
    cu_seqlens: Tensor  # int32 [S + 1], boundaries in the stream
    max_seqlen: int


def cached_gated_attention(
    n: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cache: KVCache,
    num_heads: int,
    num_kv_heads: int,
    *,
    head_dim: int,
    exclude_own_value: bool,
    gated: bool,
    key_offset: bool = False,
    update: Tensor | None = None,
    eps: float = RMS_EPS,
    core: str = "auto",
) -> Tensor:
    """Compute `gated_attention` of tokens n [1, T, d] that follow the tokens in ``cache``, and write them into it.

    A segment's tokens attend to its cached tokens and, causally, to each other. Cached keys are not offset; with
    ``key_offset`` they are at each use. Cached keys and values get no gradient.
    For few new tokens after many cached ones: it uses PyTorch's operators, with FlashAttention where `flash_takes`
    allows and ``core`` is not ``sdpa``, else segment by segment. Other arguments are those of `gated_attention`.

    Returns y [1, T, H D]. Raises ValueError for a wrong shape or dtype of segments and, on a CPU, for wrong values of
    them or of the cache; on a GPU values are not checked.
    """
    _check(n, cu_seqlens, max_seqlen, cache)
    H, K, D = num_heads, num_kv_heads, head_dim
    projected = F.linear(n, weight)
    if update is not None:
        projected = projected + F.pad(update, (0, projected.size(-1) - update.size(-1)))
    q, k, v, rest = projected.split([H * D, K * D, K * D, projected.size(-1) - (H + 2 * K) * D], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    q, k = prologue_reference(q, k, cos, sin, q_gain, eps)
    pairs = (cache.keys, k[0]), (cache.values, v[0])
    keys, values = (kept.index_select(0, cache.sources).index_copy_(0, cache.places, x) for kept, x in pairs)
    if key_offset:
        keys = offset_keys_reference(keys[None], cos.size(-1), cache.cu_seqlens)[0]
    bounds = cu_seqlens, max_seqlen, cache.cu_seqlens, cache.max_seqlen
    if core != "sdpa" and flash_takes(n.device, n.dtype, D):
        o = flash_attention(q[0].contiguous(), keys, values, *bounds)[None]
    else:
        o = _following(q, keys[None], values[None], cu_seqlens, cache.cu_seqlens)
    with torch.no_grad():
        for kept, x in pairs:
            kept.index_copy_(0, cache.rows, x)
    return epilogue_reference(o, v, rest[..., :H] if gated else None, exclude_own_value).flatten(2)


def _following(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor) -> Tensor:
    """Compute causal attention of each segment's last tokens on all of its keys."""
    parts = []
    for (low, high), (first, last) in zip(*(pairwise(cu.tolist()) for cu in (cu_seqlens, cu_keys)), strict=True):
        if high > low:
            seen = torch.ones(high - low, last - first, dtype=torch.bool, device=q.device)
            parts.append(
                dense_attention(
                    q[:, low:high], k[:, first:last], v[:, first:last], seen.tril(last - first - high + low)
                )
            )
    return torch.cat(parts, dim=1) if parts else q


def _check(n: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: KVCache) -> None:
    if n.ndim != 3 or n.size(0) != 1:
        raise ValueError(f"n must be [1, T, d], got shape {tuple(n.shape)}")
    keys, indices = cache.cu_seqlens, (cache.sources, cache.places, cache.rows)
    check_segments(cu_seqlens, n.size(1), max_seqlen)
    if keys.shape != cu_seqlens.shape or keys.dtype != torch.int32:
        raise ValueError(
            f"cache.cu_seqlens must be int32 {list(cu_seqlens.shape)} as cu_seqlens, got {keys.dtype} "
            f"{list(keys.shape)}"
        )
    if not readable(cu_seqlens, keys, *indices):
        return
    capacity, stream = len(cache.keys), len(cache.sources)
    names = "cache.cu_seqlens", "cache.max_seqlen"
    check_bounds(keys.tolist(), min(int(keys[-1]), stream), cache.max_seqlen, names=names)
    if (keys.diff() < cu_seqlens.diff()).any():
        raise ValueError("cache.cu_seqlens must give every segment a place for each of its own tokens at least")
    for name, values, size in zip(("sources", "places", "rows"), indices, (capacity, stream, capacity), strict=True):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise ValueError(f"cache.{name} must be in [0, {size}), got {int(values.min())} to {int(values.max())}")
