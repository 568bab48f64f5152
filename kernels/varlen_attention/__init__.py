"""Causal attention over segments of a packed token stream, with grouped key/value heads.

    o_i = Σ_j p_ij v_j,   p_ij = exp(scale q_i · k_j - lse_i),   j <= i in the segment of i

q, o [T, H, D]; k, v [T, K, D] with H a multiple of K; query head h reads key head h // (H // K). ``cu_seqlens``, int32
[S + 1], are the segments' boundaries, ascending from 0 to T; equal neighbours are an empty segment.

On a CPU other boundaries raise an error. On a GPU, which would have to be waited for, they are clamped to 0 .. T, and
if any descend there are no segments. o and all gradients of tokens in no segment are zero.

Tiles. A program's tile holds the queries of a piece of one segment for all heads that share a key head: keys are read
once for these heads, and their gradients need no further sum. Tiles start at their segment's start, so that only tiles
on the diagonal need a mask. Segment s, from 0, owns the tiles from ``cu_seqlens[s] // size + s + 1`` on; these are
enough for it and known without a sum over segments. With the tiles before and behind the segments there are
T // size + S + 2. `attention_tiles` sorts them by their segment's length: the programs that start last are then short,
and few have nothing to do.

Kernels. Forward is one kernel. With the launch parameter ``plain`` it does not subtract the maximum of the scores; the
comparisons and the rescaling of sums for it are a quarter of the instructions. A row whose largest score is from -40 to
90 to the base 2 does not need it; a tile whose sums indicate other scores is computed again. Backward is one kernel for
dq, which also computes delta = Σ do o, and one for dk and dv. Each recomputes the probabilities from the base 2
logarithm lse: two products more than a single kernel, which would have to accumulate dq in memory. `triton` also
computes the operations that `gated_attention` applies to o: tiles hold whole rows of o, and tiles of dq hold all heads
of a group.
"""

from __future__ import annotations

import torch

from ..common.backend import select
from .reference import varlen_attention_reference
from .segments import attention_tiles, check_segments
from .triton import varlen_attention_triton

__all__ = ["attention_tiles", "varlen_attention", "varlen_attention_reference"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WIDEST = 128
_IMPLEMENTATIONS = {"reference": varlen_attention_reference, "triton": varlen_attention_triton}


def _check(q, k, v, cu_seqlens, max_seqlen) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [T, heads, D], got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if (q.size(0), q.size(2)) != (k.size(0), k.size(2)):
        raise ValueError(f"k must be [{q.size(0)}, heads, {q.size(2)}] as q is, got {tuple(k.shape)}")
    if not k.size(1) or q.size(1) % k.size(1):
        raise ValueError(f"q's {q.size(1)} heads must be a multiple of the {k.size(1)} of k and v")
    for name, x in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if max_seqlen < (q.size(0) > 0):
        raise ValueError(f"max_seqlen must be at least the longest segment, got {max_seqlen}")
    check_segments(cu_seqlens, q.size(0), max_seqlen)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute causal attention, softmax(scale q kᵀ) v, of each token on the tokens of its segment up to itself.

    The module's docstring gives the shapes. q, k and v have one dtype, bfloat16, float16, float32 or float64, and may
    be strided. Differentiable once in all three. ``scale`` is 1 / √D by default. ``max_seqlen`` is at least the length
    of the longest segment. Products of 16-bit inputs round probabilities to their dtype and sum in float32. float64
    and D > 128 always take the reference.

    Returns o [T, H, D]. Raises ValueError for a wrong shape or device and, for tensors on a CPU, for wrong values of
    ``cu_seqlens`` or a ``max_seqlen`` below the longest segment; TypeError for a wrong dtype. On a GPU and in compiled
    code values are not checked: wrong boundaries count as the module's docstring says, kernels ignore ``max_seqlen``,
    and the reference returns zeros for tokens of a segment beyond ``max_seqlen``.
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    chosen = select("varlen_attention", _IMPLEMENTATIONS, q)
    if q.dtype == torch.float64 or q.size(-1) > _WIDEST:
        chosen = varlen_attention_reference
    return chosen(q, k, v, cu_seqlens, max_seqlen, scale)
