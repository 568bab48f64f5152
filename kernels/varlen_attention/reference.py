"""The reference of `varlen_attention` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .segments import segment_bounds


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute `varlen_attention` in plain PyTorch, with the same arguments and result."""
    if not q.numel():
        return q + 0 * (k.sum() + v.sum())
    tokens, bounds = torch.arange(q.size(0), device=q.device), segment_bounds(cu_seqlens, q.size(0))
    rows = bounds[:-1, None] + tokens[: min(max_seqlen, q.size(0))]
    valid = (rows < bounds[1:, None])[:, :, None, None]
    rows = rows.clamp(max=q.size(0) - 1)
    pq, pk, pv = (torch.where(valid, x[rows], 0).transpose(1, 2) for x in (q, k, v))  # padded to the longest segment
    o = F.scaled_dot_product_attention(pq, pk, pv, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    segment = torch.searchsorted(bounds, tokens, right=True) - 1
    inside, segment = (segment >= 0) & (segment < len(o)), segment.clamp(0, len(o) - 1)
    place = tokens - bounds[segment]
    inside &= place < o.size(1)
    return torch.where(inside[:, None, None], o[segment, place.clamp(0, o.size(1) - 1)], 0)
