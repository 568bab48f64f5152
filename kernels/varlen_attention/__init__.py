"""Attention over segments of a packed token stream, with grouped key/value heads, windows and a cap on scores.

    o_i = Σ_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   lse_i = ln Σ_j exp(s_ij)
    s_ij = scale q_i · k_j, or with a softcap c: c tanh(scale q_i · k_j / c)

over the keys j of i's segment from i' - left to i' + right, with i' = i + keys - queries of the segment: its last query
is in its last key's place. -1 is unlimited; ``causal`` is right = 0.

q, o [T, H, D]; k, v [T, K, D] with H a multiple of K; query head h reads key head h // (H // K); lse [H, T].
``cu_seqlens``, int32 [S + 1], are the segments' boundaries, ascending from 0 to at most T; equal neighbours are an
empty segment. With ``cu_seqlens_k``, k and v have a length and boundaries of their own.

o, lse and all gradients of tokens in no segment are zero. A token of a segment that attends to no key has o = 0, and
lse = -inf, whose gradient is ignored. On a CPU boundaries that do not ascend from 0 to at most T raise an error. On a
GPU, which would have to be waited for, they are clamped to 0 .. T, and if any descend there are no segments.

Tiles. A program's tile holds the queries of a piece of one segment for all heads that share a key head: keys are read
once for these heads, and their gradients need no further sum. Tiles start at their segment's start, so that only tiles
on the diagonal need a mask. Segment s, from 0, owns the tiles from ``cu_seqlens[s] // size + s + 1`` on; these are
enough for it and known without a sum over segments. With the tiles before and behind the segments there are
T // size + S + 2. `attention_tiles` sorts them by their segment's length: the programs that start last are then short,
and few have nothing to do. A program goes over those tiles of the other side only that a window of its own reaches.

Kernels. Forward is one kernel. With the launch parameter ``plain`` it does not subtract the maximum of the scores; the
comparisons and the rescaling of sums for it are a quarter of the instructions. A row whose largest score is from -40 to
90 to the base 2 does not need it; a tile whose sums indicate other scores is computed again. Backward is one kernel for
dq, which also computes delta = Σ do o - dlse, and one for dk and dv. Each recomputes the probabilities from the base 2
logarithm lse: two products more than a single kernel, which would have to accumulate dq in memory. `triton` also
computes the operations that `gated_attention` applies to o: tiles hold whole rows of o, and tiles of dq hold all heads
of a group.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from ..common.backend import select
from .reference import varlen_attention_reference
from .segments import attention_tiles, check_segments
from .triton import varlen_attention_triton

__all__ = ["attention_tiles", "varlen_attention", "varlen_attention_reference"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_IMPLEMENTATIONS = {"reference": varlen_attention_reference, "triton": varlen_attention_triton}


def _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [T, heads, D], got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if cu_seqlens_k is None and q.size(0) != k.size(0) or q.size(2) != k.size(2):
        tokens = q.size(0) if cu_seqlens_k is None else "tokens"
        raise ValueError(f"k must be [{tokens}, heads, {q.size(2)}] as q is, got {tuple(k.shape)}")
    if not k.size(1) or q.size(1) % k.size(1):
        raise ValueError(f"q's {q.size(1)} heads must be a multiple of the {k.size(1)} of k and v")
    tensors = dict(k=k, v=v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    for name, x in tensors.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if max_seqlen < (q.size(0) > 0):
        raise ValueError(f"max_seqlen must be at least the longest segment, got {max_seqlen}")
    check_segments(cu_seqlens, q.size(0), max_seqlen, whole=False)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k belong together: pass both, or neither where they are q's")
    if cu_seqlens_k is not None:
        if cu_seqlens_k.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_k must be {tuple(cu_seqlens.shape)} as cu_seqlens, got {tuple(cu_seqlens_k.shape)}"
            )
        names = "cu_seqlens_k", "max_seqlen_k"
        check_segments(cu_seqlens_k, k.size(0), max_seqlen_k, whole=False, names=names)


@overload
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softcap: float = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def varlen_attention(
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
    """Compute attention, softmax(scale q kᵀ) v, of each token on its segment, up to itself if ``causal``.

    The module's docstring gives the formula. q, k and v have one dtype, bfloat16, float16, float32 or float64, and may
    be strided. Differentiable once in all three. Products of 16-bit inputs round probabilities to their dtype and sum
    in float32. Kernels take heads of at most 256 columns, padded to a power of two; float64 always takes the reference.
    There is no dropout and no ALiBi. Options have the names and masks of FlashAttention's ``flash_attn_varlen_func``,
    from version 2.1 on.

    Args:
        q: [T, H, D].
        k, v: [T, K, D], or [any length, K, D] with ``cu_seqlens_k``.
        cu_seqlens: int32 [S + 1], boundaries of the segments, ascending from 0 to at most T.
        max_seqlen: at least the length of the longest segment.
        scale: 1 / √D by default.
        causal: whether a token attends to no later one; the right side of ``window_size`` is then ignored.
        window_size: (left, right), to how many keys before and behind its own place a query attends, -1 for all.
            Kernels skip what lies outside.
        softcap: c of c tanh(s / c), which bounds scores s; 0 for none.
        cu_seqlens_k, max_seqlen_k: int32 [S + 1] and the longest segment, of the keys; both or neither. None: q's.
        return_lse: whether to return lse too, in natural logarithms as torch's ``varlen_attn`` does; differentiable.

    Returns o [T, H, D], or (o, lse) with lse [H, T] in float32, in float64 for float64. Raises ValueError for a wrong
    shape, device or value and, for tensors on a CPU, for wrong boundaries or a maximum below the longest segment;
    TypeError for a wrong dtype. On a GPU and in compiled code boundaries are not checked: wrong ones count as the
    module's docstring says, kernels ignore the maxima, and the reference leaves out what lies beyond them.
    """
    if cu_seqlens_k is cu_seqlens:
        cu_seqlens_k = max_seqlen_k = None
    _check(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size must be (left, right), each from 0 or -1 for all, got {window_size}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or 0 for none, got {softcap}")
    chosen = select("varlen_attention", _IMPLEMENTATIONS, q)
    if q.dtype == torch.float64:
        chosen = varlen_attention_reference
    return chosen(
        q,
        k,
        v,
        cu_seqlens,
        max_seqlen,
        scale,
        causal=causal,
        window_size=window_size,
        softcap=float(softcap),
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max_seqlen_k,
        return_lse=return_lse,
    )
