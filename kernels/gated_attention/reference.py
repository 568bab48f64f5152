"""The references of `gated_attention` in PyTorch: prologue, attention by PyTorch's kernels, epilogue, and the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ..common import RMS_EPS
from ..varlen_attention.segments import check_bounds, segment_bounds

Tensor = torch.Tensor
# PyTorch 2.11 accepts fewer key heads than query heads as such; later versions require the option.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}  # compared as versions


def flash_takes(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether PyTorch's FlashAttention supports this head dimension and dtype on the device."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.device(device).type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256


def default_head_dim(weight: Tensor, H: int, K: int, gated: bool) -> int:
    """Return the largest D for which ``weight`` has the rows of H query, K key and K value heads, and of H gates."""
    return (weight.size(0) - H * gated) // max(H + 2 * K, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def prologue_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, eps: float = RMS_EPS
) -> tuple[Tensor, Tensor]:
    """Return (q^, k^) from q [B, T, H, D] and k [B, T, K, D]; the formula is that of `gated_attention`."""
    q, k = (_rotate(F.rms_norm(x, (x.size(-1),), eps=eps), cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))
    return q * q_gain[:, None].to(q.dtype), k


def offset_keys_reference(k: Tensor, half: int, cu_seqlens: Tensor | None) -> Tensor:
    """Return k [B, T, K, D] with the dimensions from 2 ``half`` on taken from the previous token of the segment.

    The first token of a segment, or of a row without ``cu_seqlens``, keeps its own.
    """
    starts = torch.zeros(k.size(1) + 1, dtype=torch.bool, device=k.device)
    starts[0] = True
    if cu_seqlens is not None:
        starts = starts.index_fill(0, segment_bounds(cu_seqlens, k.size(1)), True)
    previous = torch.cat([k[:, :1], k[:, :-1]], dim=1)
    late = torch.where(starts[:-1, None, None], k, previous)
    return torch.cat([k[..., : 2 * half], late[..., 2 * half :]], dim=-1)


def epilogue_reference(o: Tensor, v: Tensor, logits: Tensor | None, exclude_own_value: bool) -> Tensor:
    """Return y [B, T, H, D] from o [B, T, H, D], v [B, T, K, D] and the gates' logits [B, T, H]."""
    if exclude_own_value:
        u = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
        grouped = o.unflatten(2, (v.size(2), -1))
        o = (grouped - (grouped * u).sum(-1, keepdim=True) * u).flatten(2, 3)
    return o if logits is None else o * (2 * torch.sigmoid(logits))[..., None]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention of q [B, T, H, D] on k, v [B, L, K, D], causal or by a boolean mask [T, L]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_keys: Tensor | None = None,
    max_keys: int | None = None,
    window_size: tuple[int, int] = (-1, 0),
) -> Tensor:
    """Compute causal attention of q [T, H, D] on k, v [T, K, D] in segments by PyTorch's FlashAttention.

    ``cu_seqlens``, ``max_seqlen`` and ``window_size`` are those of `varlen_attention`. With ``cu_keys`` and
    ``max_keys``, given both or neither, a segment has more keys than queries; the queries are its last tokens.
    """
    from torch.nn.attention.varlen import varlen_attn  # here, as it imports the compiler, which takes seconds

    if cu_keys is None or max_keys is None:
        cu_keys, max_keys = cu_seqlens, max_seqlen
    o = varlen_attn(q, k, v, cu_seqlens, cu_keys, max_seqlen, max_keys, window_size=window_size, **_GROUPED)
    assert isinstance(o, Tensor)
    return o


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, core: str = "auto"
) -> Tensor:
    """Compute causal attention of q [B, T, H, D] on k, v [B, T, K, D] in each row, or in the segments of a single row.

    ``cu_seqlens`` and ``max_seqlen`` are those of `varlen_attention`, or None and ignored. Segments take PyTorch's
    FlashAttention where `flash_takes` allows and ``core`` is not ``sdpa``, else scaled_dot_product_attention for each.
    """
    if not torch.compiler.is_compiling() and (v.stride(1) % 8 or v.storage_offset() % 8):
        v = v.contiguous()  # PyTorch's kernels read 16 bytes at a time, also from addresses that are no multiple
    if cu_seqlens is None:
        return dense_attention(q, k, v)
    if core != "sdpa" and flash_takes(q.device, q.dtype, q.size(-1)):
        return flash_attention(q[0], k[0], v[0], cu_seqlens, max_seqlen)[None]
    if torch.compiler.is_compiling():  # the compiler cannot read the segments' lengths
        positions = torch.arange(q.size(1), device=q.device)
        segments = torch.searchsorted(segment_bounds(cu_seqlens, q.size(1)), positions, right=True)
        o = dense_attention(q, k, v, (segments[:, None] == segments) & (positions[:, None] >= positions))
        return torch.where(((segments > 0) & (segments < cu_seqlens.numel()))[:, None, None], o, 0)
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, q.size(1), max_seqlen)
    parts = [dense_attention(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in pairwise(bounds) if b > a]
    return torch.cat(parts, dim=1) if parts else q


def gated_attention_reference(
    n: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    num_heads: int,
    num_kv_heads: int,
    *,
    exclude_own_value: bool,
    gated: bool,
    key_offset: bool = False,
    head_dim: int | None = None,
    gate_width: int | None = None,
    update: Tensor | None = None,
    eps: float = RMS_EPS,
    core: str = "auto",
    tiles: Tensor | None = None,
    first_queries: Tensor | None = None,
) -> Tensor:
    """Compute `gated_attention` with PyTorch's operators, with the same arguments and result; tiles are ignored.

    With the core ``sdpa`` it does not use FlashAttention.
    """
    H, K = num_heads, num_kv_heads
    D = default_head_dim(weight, H, K, gated) if head_dim is None else head_dim
    projected = F.linear(n, weight)
    if update is not None:
        projected = projected + F.pad(update, (0, projected.size(-1) - update.size(-1)))
    whole = projected if n.ndim == 3 else projected[None]
    q, k, v, rest = whole.split([H * D, K * D, K * D, whole.size(-1) - (H + 2 * K) * D], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    q, k = prologue_reference(q, k, cos, sin, q_gain, eps)
    if key_offset:
        k = offset_keys_reference(k, cos.size(-1), cu_seqlens)
    o = attention_reference(q, k, v, cu_seqlens, max_seqlen, core)
    y = epilogue_reference(o, v, rest[..., :H] if gated else None, exclude_own_value).flatten(2)
    if first_queries is not None:
        assert cu_seqlens is not None
        positions, bounds = torch.arange(y.size(1), device=y.device), segment_bounds(cu_seqlens, y.size(1))
        segments = (torch.searchsorted(bounds, positions, right=True) - 1).clamp(0, len(first_queries) - 1)
        y = torch.where((positions - bounds[segments] >= first_queries[segments])[:, None], y, 0)
    return y if n.ndim == 3 else y[0]
