"""An attention sublayer from its normalised input to the input of its output projection, as one op.

A row of projected = n weightᵀ holds, of one token, H query heads, K key heads and K value heads of D columns each, to
which an update is added where there is one, then H gate logits where the op is ``gated``, then padding. Query head h
reads key head j = h // (H / K):

    q^_h = gain_h R(q_h / rms(q_h)),   k^_j = R(k_j / rms(k_j)),   rms(x) = sqrt(mean(x²) + eps)
    o_h = softmax(q^_h k^_jᵀ / sqrt(D)) v_j over the token's own past in its segment
    z_h = o_h - <o_h, u_j> u_j with u = v / max(|v|, 1e-12) where the own value is excluded, else o_h
    y_h = 2 σ(logit_h) z_h where gated, else z_h

R rotates the pairs (i, i + P) of the leading 2 P dimensions by the token's angles, whose cosines and sines are given.

Kernels: the product, whose q and k become q^ and k^ in place, then those of `varlen_attention`, which read q^, k^, v
and logits where they lie and compute what is between o and y, and its backward, on what they have in registers. q and k
are not kept: of g = dq^, and of dk^ likewise with a gain of 1,

    dq = R⁻¹(gain g - q^ <g, q^> / (gain D)) / rms(q),   dgain = Σ <g, q^> / gain

for which kernels take a gain no nearer to zero than ±2⁻²⁴: logits are zero in fp32 all the same. What lies in q's place
is log2(e) / √D q^, whose products with k^ are scores to the base 2. The attention's backward writes the projection's
gradient, two products make those of n and weight of it. Saved are the inputs, the projection with q^ and k^, 1 / rms
[H + K, T], y, <o, u> [H, T] and the logarithms of the softmax's sums (lse).

MB read + written at T = 98,304, H = 8, K = 4, D = 64, d = 512 in bf16: the product 102 + 204, prologue 154 + 156, y
203 + 107; dq with dlogits, do and a part of dv 414 + 260, dk and dv 360 + 101, dn and dweight 509 + 102.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import _gated_attention_kernels as kernels
from . import varlen_attention
from .common import RMS_EPS
from .common.backend import runs_kernels, select
from .common.operators import operator, readable
from .varlen_attention import (
    GROUPS,
    Prologue,
    attention_tiles,
    check_bounds,
    check_segments,
    segment_bounds,
    tiles_shape,
    turns_in_registers,
)

Tensor = torch.Tensor
CORES = "triton", "flash", "sdpa"  # the kernels; PyTorch's FlashAttention; plain PyTorch, segment by segment
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# torch 2.11 takes fewer key heads without being told; later versions want to be told.
_GROUPED = {"enable_gqa": True} if torch.__version__ >= (2, 12) else {}


# --- Reference ---


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def prologue_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, eps: float = RMS_EPS
) -> tuple[Tensor, Tensor]:
    """(q^, k^) of q [B, T, H, D] and k [B, T, K, D]."""
    q, k = (_rotate(F.rms_norm(x, (x.size(-1),), eps=eps), cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))
    return q * q_gain[:, None].to(q.dtype), k


def epilogue_reference(o: Tensor, v: Tensor, logits: Tensor | None, exclude_own_value: bool) -> Tensor:
    """y [B, T, H, D] of o [B, T, H, D], v [B, T, K, D] and the gates' logits [B, T, H]."""
    if exclude_own_value:
        own = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
        grouped = o.unflatten(2, (v.size(2), -1))
        o = (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)
    return o if logits is None else o * (2 * torch.sigmoid(logits))[..., None]


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
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
) -> Tensor:
    """Causal attention of q [T, H, D] on k, v [T, K, D] in segments by PyTorch's FlashAttention.

    With ``cu_keys`` and ``max_keys`` a segment has more keys than queries, which are its last tokens.
    """
    from torch.nn.attention.varlen import varlen_attn  # here, as it loads the compiler, which takes seconds

    cu_keys, max_keys = (cu_seqlens, max_seqlen) if cu_keys is None else (cu_keys, max_keys)
    return varlen_attn(q, k, v, cu_seqlens, cu_keys, max_seqlen, max_keys, window_size=(-1, 0), **_GROUPED)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, core: str = "auto"
) -> Tensor:
    """Causal attention of q [B, T, H, D] on k, v [B, T, K, D] in rows, or in the segments of a single one."""
    if not torch.compiler.is_compiling() and (v.stride(1) % 8 or v.storage_offset() % 8):
        v = v.contiguous()  # PyTorch's kernels read 16 bytes at a time, whatever the address
    if cu_seqlens is None:
        return _dense(q, k, v)
    if core != "sdpa" and flash_takes(q.device, q.dtype, q.size(-1)):
        return flash_attention(q[0], k[0], v[0], cu_seqlens, max_seqlen)[None]
    if torch.compiler.is_compiling():  # the compiler cannot know how long segments are
        positions = torch.arange(q.size(1), device=q.device)
        segments = torch.searchsorted(segment_bounds(cu_seqlens, q.size(1)), positions, right=True)
        o = _dense(q, k, v, (segments[:, None] == segments) & (positions[:, None] >= positions))
        return torch.where(((segments > 0) & (segments < cu_seqlens.numel()))[:, None, None], o, 0)
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, q.size(1), max_seqlen)
    parts = [_dense(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in pairwise(bounds) if b > a]
    return torch.cat(parts, dim=1) if parts else q


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, and where those of the tokens at hand go.

    Segment by segment, a stream of L keys holds a segment's earlier tokens, then its own.
    """

    keys: Tensor  # [C, K, D], normalised and rotated
    values: Tensor  # [C, K, D]
    sources: Tensor  # int [L], the cache's row of each place in the stream; any where an own token comes
    places: Tensor  # int64 [T], each own token's place in the stream
    rows: Tensor  # int64 [T], the cache's row that each own token is written to; any number of them may share one
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
    update: Tensor | None = None,
    eps: float = RMS_EPS,
    core: str = "auto",
) -> Tensor:
    """`gated_attention` of tokens n [1, T, d] that follow on those in ``cache``, into which it then writes them.

    A segment's T tokens see its cached ones and, causally, each other. No gradient reaches what is cached. For few
    tokens after many: PyTorch's operators, its FlashAttention where that can, else segment by segment.

    Raises ValueError for wrong segments and, on a CPU, for values of them or of the cache that do not fit; on a GPU
    FlashAttention takes segments as they are.
    """
    _check_cached(n, cu_seqlens, max_seqlen, cache)
    H, K, D = num_heads, num_kv_heads, head_dim
    projected = F.linear(n, weight)
    if update is not None:
        projected = projected + F.pad(update, (0, projected.size(-1) - update.size(-1)))
    q, k, v, rest = projected.split([H * D, K * D, K * D, projected.size(-1) - (H + 2 * K) * D], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    q, k = prologue_reference(q, k, cos, sin, q_gain, eps)
    pairs = (cache.keys, k[0]), (cache.values, v[0])
    keys, values = (kept.index_select(0, cache.sources).index_copy_(0, cache.places, x) for kept, x in pairs)
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
    """Attention of each segment's last tokens on all of its keys, causal."""
    parts = []
    for (low, high), (first, last) in zip(*(pairwise(cu.tolist()) for cu in (cu_seqlens, cu_keys)), strict=True):
        if high > low:
            seen = torch.ones(high - low, last - first, dtype=torch.bool, device=q.device)
            parts.append(
                _dense(q[:, low:high], k[:, first:last], v[:, first:last], seen.tril(last - first - high + low))
            )
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
    head_dim: int | None = None,
    gate_width: int | None = None,
    update: Tensor | None = None,
    eps: float = RMS_EPS,
    core: str = "auto",
    tiles: Tensor | None = None,
    first_queries: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; the contract of `gated_attention`, whose arguments it shares; ``sdpa`` keeps it from flash."""
    H, K = num_heads, num_kv_heads
    D = _head_dim(weight, H, K, gated) if head_dim is None else head_dim
    projected = F.linear(n, weight)
    if update is not None:
        projected = projected + F.pad(update, (0, projected.size(-1) - update.size(-1)))
    whole = projected if n.ndim == 3 else projected[None]
    q, k, v, rest = whole.split([H * D, K * D, K * D, whole.size(-1) - (H + 2 * K) * D], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    o = attention_reference(*prologue_reference(q, k, cos, sin, q_gain, eps), v, cu_seqlens, max_seqlen, core)
    y = epilogue_reference(o, v, rest[..., :H] if gated else None, exclude_own_value).flatten(2)
    if first_queries is not None:
        positions, bounds = torch.arange(y.size(1), device=y.device), segment_bounds(cu_seqlens, y.size(1))
        segments = (torch.searchsorted(bounds, positions, right=True) - 1).clamp(0, len(first_queries) - 1)
        y = torch.where((positions - bounds[segments] >= first_queries[segments])[:, None], y, 0)
    return y if n.ndim == 3 else y[0]


# --- The op ---


def flash_takes(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> bool:
    """Say whether PyTorch's FlashAttention computes such heads there."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.device(device).type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256


def _kernels_take(dtype: torch.dtype, head_dim: int, group: int, half: int) -> bool:
    fits = head_dim in (16, 32, 64, 128) and group in GROUPS and turns_in_registers(half, head_dim)
    return fits and dtype in (torch.bfloat16, torch.float32)


def resolve_core(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int, group: int = 1, half: int = 0
) -> str:
    """``auto`` made definite: which core computes attention there, with ``group`` = H / K and ``half`` = P.

    Raises ValueError for an unknown name and where ``flash`` is asked for and cannot be had.
    """
    if name not in ("auto", *CORES):
        raise ValueError(f"attention has the cores auto, {', '.join(CORES)}, and {name!r} is none of them")
    flash = flash_takes(device, dtype, head_dim)
    if name == "flash" and not flash:
        raise ValueError(
            f"flash attention needs CUDA, half precision and heads of a multiple of 8 up to 256, and this "
            f"is {device}, {dtype}, {head_dim}; use auto or sdpa"
        )
    if name in ("flash", "sdpa"):
        return name
    fits = _kernels_take(dtype, head_dim, group, half)
    if fits and (name == "triton" or runs_kernels(torch.device(device))):
        return "triton"
    return "flash" if flash else "sdpa"


def _columns(x: Tensor, H: int, K: int, D: int) -> tuple[Tensor, ...]:
    """Views of x [T, N]: H, K and K heads [T, heads, D], H columns of logits."""
    q, k, v, rest = x.split([H * D, K * D, K * D, x.size(1) - (H + 2 * K) * D], dim=1)
    return *(part.unflatten(1, (-1, D)) for part in (q, k, v)), rest[:, :H]


def _gated_attention_triton(
    n: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    tiles: Tensor,
    update: Tensor | None,
    first_queries: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    exclude_own_value: bool,
    gated: bool,
    gate_width: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward needs besides: projected, 1 / rms [H + K, B T], <o, u> and lse [H, B T]."""
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    rows, tokens, d = n.shape
    if not rows * tokens:
        return _fake(n, weight, cos, sin, q_gain, tiles, update, first_queries, *sizes, exclude_own_value)
    update = None if update is None else update.reshape(rows * tokens, -1)
    projected, inverse_rms = kernels.project(
        n.reshape(-1, d), weight, cos, sin, q_gain, *sizes, eps, D**-0.5 * math.log2(math.e), gate_width, gated, update
    )
    q, k, v, logits = _columns(projected, *sizes)
    along = inverse_rms.new_empty(H * exclude_own_value, rows * tokens)
    y, lse = varlen_attention._forward(
        q,
        k,
        v,
        tiles,
        D**-0.5,
        along=along if exclude_own_value else None,
        logits=logits if gated else None,
        base_2=True,
        first_queries=first_queries,
    )
    return y.view(rows, tokens, H * D), projected, inverse_rms, along, lse


def _gated_attention_backward_triton(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    tiles: Tensor,
    y: Tensor,
    projected: Tensor,
    inverse_rms: Tensor,
    along: Tensor,
    lse: Tensor,
    first_queries: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    exclude_own_value: bool,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of projected = n weightᵀ [B T, N] and of q_gain."""
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    dprojected = torch.empty_like(projected)
    if not y.numel():
        return dprojected, q_gain.new_zeros(H)
    dgain = inverse_rms.new_empty(H)
    q, k, v, logits = _columns(projected, *sizes)
    *into, dlogits = _columns(dprojected, *sizes)
    options = dict(logits=logits, dlogits=dlogits) if gated else {}
    varlen_attention._backward(
        dy.reshape(-1, H, D),
        q,
        k,
        v,
        y.view(-1, H, D),
        lse,
        tiles,
        D**-0.5,
        *into,
        along=along if exclude_own_value else None,
        dgain=dgain,
        prologue=Prologue(inverse_rms, q_gain.contiguous(), cos.contiguous(), sin.contiguous()),
        padding=dprojected[:, (H + 2 * K) * D + H * gated :],
        first_queries=first_queries,
        **options,
    )
    return dprojected, dgain.to(q_gain.dtype)


def _fake(
    n, weight, cos, sin, q_gain, tiles, update, first_queries, H, K, D, exclude, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, tokens, _ = n.shape
    small = (n.new_empty(count, rows * tokens, dtype=torch.float32) for count in (H + K, H * exclude, H))
    return n.new_empty(rows, tokens, H * D), n.new_empty(rows * tokens, weight.size(0)), *small


_ARGUMENTS = "int num_heads, int num_kv_heads, int head_dim, bool exclude_own_value, bool gated"
_backward_op = operator(
    "gated_attention_backward(Tensor dy, Tensor cos, Tensor sin, Tensor q_gain, Tensor tiles, Tensor y, "
    f"Tensor projected, Tensor inverse_rms, Tensor along, Tensor lse, Tensor? first_queries, {_ARGUMENTS}) -> "
    "(Tensor, Tensor)",
    _gated_attention_backward_triton,
    lambda dy, cos, sin, q_gain, tiles, y, projected, *_: (torch.empty_like(projected), torch.empty_like(q_gain)),
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output, inputs[7])
    ctx.rest = inputs[8:13]
    ctx.updated = 0 if inputs[6] is None else inputs[6].size(-1)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx, dy: Tensor | None, *_: None):
    if dy is None:
        return (None,) * 15
    n, weight, *saved = ctx.saved_tensors
    dprojected, dgain = _backward_op(dy, *saved, *ctx.rest)
    of_n, of_weight, *_, of_update = ctx.needs_input_grad[:7]
    dn = (dprojected @ weight).view(n.shape) if of_n else None
    dweight = dprojected.t() @ n.reshape(-1, n.size(-1)) if of_weight else None
    dupdate = dprojected[:, : ctx.updated].unflatten(0, n.shape[:-1]) if of_update else None
    return dn, dweight, None, None, dgain, None, dupdate, *(None,) * 8


_op = operator(
    "gated_attention(Tensor n, Tensor weight, Tensor cos, Tensor sin, Tensor q_gain, Tensor tiles, Tensor? update, "
    f"Tensor? first_queries, {_ARGUMENTS}, int? gate_width, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_attention_triton,
    _fake,
    setup_context=_save,
    backward=_gradients,
)


def _triton(
    n,
    weight,
    cos,
    sin,
    q_gain,
    cu_seqlens,
    max_seqlen,
    H,
    K,
    *,
    exclude_own_value,
    gated,
    head_dim,
    gate_width,
    update,
    eps,
    core,
    tiles,
    first_queries,
) -> Tensor:
    whole, update = (x if x is None or x.ndim == 3 else x[None] for x in (n, update))
    if tiles is None:
        rows, tokens, _ = whole.shape
        if cu_seqlens is None:
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=n.device) * tokens
        tiles = attention_tiles(cu_seqlens, rows * tokens, n.dtype, head_dim, H // K)
    y = _op(
        whole,
        weight,
        cos,
        sin,
        q_gain,
        tiles,
        update,
        None if first_queries is None else first_queries.contiguous(),
        H,
        K,
        head_dim,
        exclude_own_value,
        gated,
        gate_width,
        eps,
    )[0]
    return y if n.ndim == 3 else y[0]


_GATED_ATTENTION = {"reference": gated_attention_reference, "triton": _triton}


def _head_dim(weight: Tensor, H: int, K: int, gated: bool) -> int:
    return (weight.size(0) - H * gated) // max(H + 2 * K, 1)


def _check_first_queries(first_queries: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        raise ValueError("first_queries are those of segments, and cu_seqlens is None")
    if first_queries.dtype != torch.int32:
        raise TypeError(f"first_queries must be int32, got {first_queries.dtype}")
    expected, device = (cu_seqlens.numel() - 1,), cu_seqlens.device
    if first_queries.shape != expected or first_queries.device != device:
        raise ValueError(
            f"first_queries must be {expected} on {device}, got {tuple(first_queries.shape)} on {first_queries.device}"
        )
    if not readable(first_queries, cu_seqlens):
        return
    wrong = ((first_queries < 0) | (first_queries > cu_seqlens.diff())).nonzero()
    if len(wrong):
        s = int(wrong[0])
        raise ValueError(
            f"first_queries must be from 0 to the segment's length, got {int(first_queries[s])} for segment {s} of "
            f"{int(cu_seqlens[s + 1] - cu_seqlens[s])}"
        )


def _check_cached(n: Tensor, cu_seqlens: Tensor, max_seqlen: int, cache: KVCache) -> None:
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
    held, stream = len(cache.keys), len(cache.sources)
    check_bounds(keys.tolist(), min(int(keys[-1]), stream), cache.max_seqlen, "cache.")
    if (keys.diff() < cu_seqlens.diff()).any():
        raise ValueError("cache.cu_seqlens must give every segment a place for each of its own tokens at least")
    for name, values, size in zip(("sources", "places", "rows"), indices, (held, stream, held), strict=True):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
            raise ValueError(f"cache.{name} must be in [0, {size}), got {int(values.min())} to {int(values.max())}")


def _check(
    n, weight, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, gated, gate_width, update, tiles, first_queries
) -> None:
    if n.ndim not in (2, 3):
        raise ValueError(f"n must be [T, d] or [B, T, d], got shape {tuple(n.shape)}")
    if weight.ndim != 2 or weight.size(1) != n.size(-1):
        raise ValueError(f"weight must be [N, {n.size(-1)}] for n, got shape {tuple(weight.shape)}")
    if H < 1 or K < 1 or H % K:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {H} and {K}")
    rows, tokens = (H + 2 * K) * D + H * gated, n.size(-2)
    if D < 1 or weight.size(0) < rows:
        raise ValueError(f"weight must have at least {rows} rows for heads of {D}, got {weight.size(0)}")
    if gate_width is not None and not 0 < gate_width <= n.size(-1):
        raise ValueError(f"gate_width must be from 1 to {n.size(-1)}, got {gate_width}")
    if cos.ndim != 2 or cos.size(0) != tokens or 2 * cos.size(1) > D:
        raise ValueError(f"cos must be [{tokens}, at most {D // 2}], got shape {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if q_gain.shape != (H,):
        raise ValueError(f"q_gain must be [{H}], got shape {tuple(q_gain.shape)}")
    if update is not None and update.shape != (*n.shape[:-1], (H + 2 * K) * D):
        raise ValueError(f"update must be {(*n.shape[:-1], (H + 2 * K) * D)}, got shape {tuple(update.shape)}")
    tensors = dict(n=n, weight=weight, update=update, cos=cos, sin=sin, q_gain=q_gain)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        follows = name in ("weight", "update")
        if tensor.dtype not in _DTYPES or (follows and tensor.dtype != n.dtype):
            allowed = f"n's dtype {n.dtype}" if follows else "bfloat16, float16, float32 or float64"
            raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
        if tensor.device != n.device:
            raise ValueError(f"{name} must be on n's device {n.device}, got {tensor.device}")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != n.device:
            raise ValueError(
                f"cu_seqlens must be one-dimensional int32 on {n.device}, got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
            )
        if n.ndim == 3 and n.size(0) != 1:
            raise ValueError(f"n must be one row with cu_seqlens, got {n.size(0)} rows")
        if max_seqlen < 1 and tokens:
            raise ValueError(f"max_seqlen must be the longest segment's length or more, got {max_seqlen}")
        check_segments(cu_seqlens, tokens, max_seqlen)
    if first_queries is not None:
        _check_first_queries(first_queries, cu_seqlens)
    if tiles is None or torch.compiler.is_compiling():  # which would be bound to the shapes and cannot read the tables
        return
    if cu_seqlens is None:
        raise ValueError("tiles are those of cu_seqlens, which is None")
    if tiles.dtype != torch.int32:
        raise TypeError(f"tiles must be int32, got {tiles.dtype}")
    expected = tiles_shape(cu_seqlens, tokens, n.dtype, D, H // K)
    if tiles.shape != expected or tiles.device != n.device:
        raise ValueError(
            f"tiles must be {expected} on {n.device}, as attention_tiles makes them for these arguments, "
            f"got {tuple(tiles.shape)} on {tiles.device}"
        )


def gated_attention(
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
    head_dim: int | None = None,
    gate_width: int | None = None,
    update: Tensor | None = None,
    eps: float = RMS_EPS,
    core: str = "auto",
    tiles: Tensor | None = None,
    first_queries: Tensor | None = None,
) -> Tensor:
    """The attention sublayer up to its output projection; see the module's docstring for the formula.

    Differentiable once in n, weight, q_gain and update.

    Args:
        n: [T, d] or [B, T, d].
        weight: [N, d] in n's dtype, N >= (H + 2 K) D, plus H where gated; more rows are padding. Kernels need N and d
            to be multiples of 16 for their fastest accesses.
        cos, sin: [T, P], 2 P <= D, of the angles by index in a row.
        q_gain: [H], of any floating dtype.
        cu_seqlens: int32 boundaries of segments, from 0 to T, repeated values allowed; needs B = 1. None: each row is
            one causal sequence. On a GPU and in compiled code, where the host does not see wrong ones, they count as in
            `varlen_attention`: y and gradients of tokens in no segment are zero. PyTorch's FlashAttention alone takes
            them as they are.
        max_seqlen: at least the longest segment's length; read only with cu_seqlens.
        head_dim: D; None: as many rows as there are for each head, so that less than H + 2 K are padding.
        gate_width: promises that the gates' rows of ``weight`` are zero from this column on, and that nobody reads the
            gradient of those zeros, which may be anything; None: d.
        update: [.., T, (H + 2 K) D] in n's dtype, added to queries, keys and values: low-rank adapters'.
        core: the attention, of `CORES`; auto: triton where kernels are in use, else flash where it can, else sdpa.
        tiles: `attention_tiles` (cu_seqlens, T, n.dtype, D, H // K), for many calls to share, whatever their
            ``first_queries``; None: made where needed. Kernels trust them: they must be of these arguments.
        first_queries: int32 [S] for cu_seqlens [S + 1], from 0 to the segment's length: its tokens before that index
            are no queries. Their y is zero, and the gradient of y is not read there. All tokens are keys and values.
            Kernels skip tiles without queries. None: all tokens are queries. Values are checked on a CPU only; below 0
            they count as 0, and above the length as that.

    Returns [.., T, H D] in n's dtype. The core triton, which is all of the op in kernels, takes bfloat16 and float32, D
    of 16, 32, 64 or 128, H / K of 1, 2, 4, 8 or 16, and P of zero or a power of two; everything else takes the
    reference. Kernels compute in fp32; a value of a segment that is not finite may reach the segment before it. Raises
    ValueError for a wrong shape, value or device, TypeError for a wrong dtype.
    """
    H, K = num_heads, num_kv_heads
    D = _head_dim(weight, H, K, gated) if head_dim is None else head_dim
    _check(
        n, weight, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, gated, gate_width, update, tiles, first_queries
    )
    core = resolve_core(core, n.device, n.dtype, D, H // K, cos.size(1))
    chosen = select("gated_attention", _GATED_ATTENTION, n) if core == "triton" else gated_attention_reference
    return chosen(
        n,
        weight,
        cos,
        sin,
        q_gain,
        cu_seqlens,
        max_seqlen,
        H,
        K,
        exclude_own_value=exclude_own_value,
        gated=gated,
        head_dim=D,
        gate_width=gate_width,
        update=update,
        eps=eps,
        core=core,
        tiles=tiles,
        first_queries=first_queries,
    )
