"""Causal attention with grouped key/value heads: one function, two backends.

``varlen`` is PyTorch's FlashAttention over packed segments (CUDA, bfloat16 or float16); ``sdpa`` is
scaled_dot_product_attention, once a segment. Rows without ``cu_seqlens`` are dense and always take SDPA.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from pgolf.config import ConfigError

# torch 2.11 takes fewer key heads without being told; later versions want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def resolve_backend(choice: str, device: torch.device | str) -> str:
    """``auto`` made definite for a device: ``varlen`` on CUDA, ``sdpa`` elsewhere.

    Raises ConfigError where ``varlen`` is asked for without CUDA.
    """
    on_cuda = torch.device(device).type == "cuda"
    if choice == "varlen" and not on_cuda:
        raise ConfigError(f"attention_backend varlen needs CUDA, and the device is {device}; use auto or sdpa")
    return ("varlen" if on_cuda else "sdpa") if choice == "auto" else choice


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int = 0,
    backend: str = "sdpa",
) -> torch.Tensor:
    """softmax(q kᵀ / √D) v over each token's own past, query head h reading key head h // (H / H_kv).

    Args:
        q: [B, T, H, D]. k, v: [B, T, H_kv, D].
        cu_seqlens: int32 boundaries of segments, from 0 to T, repeated values allowed; needs B = 1. None: dense rows.
        max_seqlen: at least the longest segment, tokens (``varlen`` only).
        backend: ``varlen`` or ``sdpa``.

    Returns [B, T, H, D].
    """
    if cu_seqlens is None:
        return _dense(q, k, v)
    if q.size(0) != 1:
        raise ValueError(f"packed attention takes one row, got a batch of {q.size(0)}")
    if backend == "varlen":
        y = varlen_attn(
            q[0], k[0], v[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **_GROUPED
        )
        return y[None]
    bounds = cu_seqlens.tolist()
    spans = [(low, high) for low, high in zip(bounds, bounds[1:], strict=False) if high > low]
    return torch.cat([_dense(q[:, low:high], k[:, low:high], v[:, low:high]) for low, high in spans], dim=1)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return y.transpose(1, 2)
