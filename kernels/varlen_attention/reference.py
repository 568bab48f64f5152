"""The reference of `varlen_attention` in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .segments import segment_bounds


def _padded(x: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    """Return the segments of x [T, heads, D] as a batch [S, heads, longest, D], with zeros behind each."""
    rows = bounds[:-1, None] + torch.arange(longest, device=x.device)
    rows = torch.where(rows < bounds[1:, None], rows, x.size(0))  # the zeros
    return F.pad(x, (0, 0, 0, 0, 0, 1))[rows].transpose(1, 2)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_lengths: torch.Tensor,
    key_lengths: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o [S, H, queries, D] and lse [S, H, queries] of padded segments with H heads each."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = scale * (q.to(wide) @ k.to(wide).mT)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    keys = torch.arange(k.size(2), device=q.device)
    own = torch.arange(q.size(2), device=q.device)[:, None] + (key_lengths - query_lengths)[:, None, None]
    seen = (keys < key_lengths[:, None, None]).expand(-1, q.size(2), -1)
    left, right = window
    if left >= 0:
        seen = seen & (keys >= own - left)
    if right >= 0:
        seen = seen & (keys <= own + right)
    keyless = ~seen.any(-1)[:, None]
    s = s.masked_fill(~(seen[:, None] | keyless[..., None]), -math.inf)  # keyless rows stay finite, for the derivative
    p = s.softmax(-1).masked_fill(keyless[..., None], 0)
    return p.to(v.dtype) @ v, s.logsumexp(-1).masked_fill(keyless, -math.inf)


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `varlen_attention` in plain PyTorch, with the same arguments and result.

    Anything but causal attention of tokens on their own segment holds all scores of the padded segments at once.
    """
    if not q.numel():
        o = q + 0 * (k.sum() + v.sum())
        return (o, o.new_empty(q.size(1), 0, dtype=torch.promote_types(q.dtype, torch.float32))) if return_lse else o
    scale = q.size(-1) ** -0.5 if scale is None else scale
    bounds = key_bounds = segment_bounds(cu_seqlens, q.size(0))
    longest = longest_k = min(max_seqlen, q.size(0))
    if cu_seqlens_k is not None:
        assert max_seqlen_k is not None
        key_bounds, longest_k = segment_bounds(cu_seqlens_k, k.size(0)), max(1, min(max_seqlen_k, k.size(0)))
    pq, pk, pv = _padded(q, bounds, longest), _padded(k, key_bounds, longest_k), _padded(v, key_bounds, longest_k)
    window = window_size[0], 0 if causal else window_size[1]
    lse = None
    if window == (-1, 0) and not softcap and cu_seqlens_k is None and not return_lse:
        o = F.scaled_dot_product_attention(pq, pk, pv, is_causal=True, scale=scale, enable_gqa=True)
    else:
        pk, pv = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (pk, pv))
        o, lse = _attend(pq, pk, pv, bounds.diff(), key_bounds.diff(), scale, window, softcap)
    tokens = torch.arange(q.size(0), device=q.device)
    segment = torch.searchsorted(bounds, tokens, right=True) - 1
    inside, segment = (segment >= 0) & (segment < len(o)), segment.clamp(0, len(o) - 1)
    place = tokens - bounds[segment]
    inside &= place < longest
    place = place.clamp(0, longest - 1)
    o = torch.where(inside[:, None, None], o[segment, :, place], 0)
    if not return_lse:
        return o
    assert lse is not None
    return o, torch.where(inside[:, None], lse[segment, :, place], 0).T.contiguous()
