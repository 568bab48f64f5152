"""Everything of an attention sublayer between its fused input projection and its output projection, as one op.

A row of ``projected`` holds, of one token, H query heads, K key heads and K value heads of D columns each, then H gate
logits where the op is ``gated``, then padding. Query head h reads key head j = h // (H / K):

    q^_h = gain_h R(q_h / rms(q_h)),   k^_j = R(k_j / rms(k_j)),   rms(x) = sqrt(mean(x²) + eps)
    o_h = softmax(q^_h k^_jᵀ / sqrt(D)) v_j over the token's own past in its segment
    z_h = o_h - <o_h, u_j> u_j with u = v / max(|v|, 1e-12) where the own value is excluded, else o_h
    y_h = 2 σ(logit_h) z_h where gated, else z_h

R rotates the pairs (i, i + P) of the leading 2 P dimensions by the token's angles, whose cosines and sines are given.

Kernels: four streams around an attention core (`CORES`), each of one pass and 16-byte accesses; a program takes a few
tokens with all heads. The *prologue* reads q and k and writes q^ and k^ side by side, [T, H + K, D]; the *epilogue*
reads o, v and logits and writes y. The *epilogue's backward* writes do, delta = <do, o>, and of the projection's
gradient the logits', the padding and what the exclusion gives v; the core's backward writes dq^ and dk^ where dq and dk
will be; the *prologue's backward* turns them into these in place, adds the core's dv, and sums the gains' gradient by
programs. Saved are the inputs, q^ and k^, o and the logarithms of the softmax's sums (lse).

Bytes at T = 98,304, H = 8, K = 4, D = 64 in bf16, MB: 151 + 151, 153 + 101, 253 + 157, 403 + 201.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from ._launch import jit, launch_parameters, operator, select, tl
from .smear_gate import RMS_EPS

Tensor = torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# torch 2.11 takes fewer key heads without being told; later versions want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


# --- Reference ---


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def prologue_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, eps: float = RMS_EPS):
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


def _attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    """Causal attention of q [B, T, H, D] on k, v [B, T, K, D] in rows, or in the segments of a single one."""
    if cu_seqlens is None:
        return _dense(q, k, v)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
        return varlen_attn(q[0], k[0], v[0], *bounds, window_size=(-1, 0), **_GROUPED)[None]
    if torch.compiler.is_compiling():  # the compiler cannot know how long segments are
        positions = torch.arange(q.size(1), device=q.device)
        segments = torch.searchsorted(cu_seqlens, positions, right=True)
        return _dense(q, k, v, (segments[:, None] == segments) & (positions[:, None] >= positions))
    parts = [_dense(q[:, low:high], k[:, low:high], v[:, low:high]) for low, high in _segments(cu_seqlens)]
    return torch.cat(parts, dim=1) if parts else q


def _gated_attention_reference(
    projected, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, exclude_own_value, gated, eps, core
) -> Tensor:
    q, k, v, rest = projected.split([H * D, K * D, K * D, projected.size(-1) - (H + 2 * K) * D], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    o = _attention_reference(*prologue_reference(q, k, cos, sin, q_gain, eps), v, cu_seqlens, max_seqlen)
    return epilogue_reference(o, v, rest[..., :H] if gated else None, exclude_own_value).flatten(2)


# --- Attention cores ---


def _segments(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return ((low, high) for low, high in zip(bounds, bounds[1:], strict=False) if high > low)


def _scores(q: Tensor, k: Tensor, v: Tensor, low: int, high: int, scale: float) -> tuple[Tensor, ...]:
    """q, k, v of one segment as [heads, L, D] in at least float32, k and v for each query head, and the scores."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x[low:high].transpose(0, 1).to(accumulate) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(0) // x.size(0), 0) for x in (k, v))
    future = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
    return q, k, v, (scale * q @ k.mT).masked_fill(future, float("-inf"))


def _plain_forward(q, k, v, cu_seqlens, max_seqlen, scale) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.size(1), q.size(0), dtype=torch.promote_types(q.dtype, torch.float32))
    for low, high in _segments(cu_seqlens):
        *_, values, scores = _scores(q, k, v, low, high, scale)
        lse[:, low:high] = scores.logsumexp(-1)
        o[low:high] = (scores.softmax(-1) @ values).transpose(0, 1).to(o.dtype)
    return o, lse


def _plain_backward(do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, delta=None, dq=None, dk=None, dv=None):
    dq, dk, dv = (x.new_empty(x.shape) if out is None else out for x, out in ((q, dq), (k, dk), (v, dv)))
    for low, high in _segments(cu_seqlens):
        span = slice(low, high)
        queries, keys, values, scores = _scores(q, k, v, low, high, scale)
        slope = do[span].transpose(0, 1).to(scores.dtype)
        p = (scores - lse[:, span, None]).exp()
        along = (slope * o[span].transpose(0, 1)).sum(-1) if delta is None else delta[:, span]
        ds = scale * p * (slope @ values.mT - along[..., None])
        for out, whole in ((dq, ds @ keys), (dk, ds.mT @ queries), (dv, p.mT @ slope)):
            out[span] = whole.unflatten(0, (out.size(1), -1)).sum(1).transpose(0, 1).to(out.dtype)
    return dq, dk, dv


def _flash_forward(q, k, v, cu_seqlens, max_seqlen, scale) -> tuple[Tensor, Tensor]:
    v = v if v.stride(0) % 8 == 0 else v.contiguous()
    bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return torch.ops.aten._flash_attention_forward(q, k, v, *bounds, 0.0, True, False, scale=scale)[:2]


def _flash_backward(do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, delta=None, dq=None, dk=None, dv=None):
    v = v if v.stride(0) % 8 == 0 else v.contiguous()
    bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    # Without dropout the state of the random numbers is not read.
    random = torch.empty(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(do, q, k, v, o, lse, *bounds, 0.0, True, *random, scale=scale)


# Forward (q, k, v, cu_seqlens, max_seqlen, scale) -> (o, lse) and backward (do, q, k, v, o, lse, cu_seqlens,
# max_seqlen, scale, delta, dq, dk, dv) -> (dq, dk, dv) of q [T, H, D] and k, v [T, K, D] that may be strided. lse and
# delta are [H, T]. The backward may write into the dq, dk, dv that it gets, or return others.
CORES: dict[str, tuple[Callable, Callable]] = {
    "flash": (_flash_forward, _flash_backward),  # PyTorch's FlashAttention: CUDA, half precision
    "sdpa": (_plain_forward, _plain_backward),  # plain PyTorch, segment by segment; waits for the device
}


def _core(name: str, projected: Tensor, D: int) -> str:
    if name != "auto":
        return name
    half = projected.dtype in (torch.bfloat16, torch.float16)
    return "flash" if projected.is_cuda and half and D % 8 == 0 and D <= 256 else "sdpa"


# --- Kernels ---


@jit
def _tile(T, HEADS: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """Rows of (token, head) of this program: tokens, heads, and which of them there are."""
    rows = tl.arange(0, TOKENS * PADDED)
    tokens = tl.program_id(0) * TOKENS + rows // PADDED
    heads = rows % PADDED
    return tokens, heads, (tokens < T) & (heads < HEADS)


@jit
def _offsets(tokens, STRIDE: tl.constexpr, start, columns):
    """Offsets [rows, columns] of heads that begin at column ``start`` of their token's row."""
    return (tokens.to(tl.int64) * STRIDE + start)[:, None] + columns[None, :]


@jit
def _load_heads(
    x, cos, sin, tokens, start, rows, period, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Heads, the other of each pair's dimensions, cosines and sines: loads alone, so that many are under way."""
    columns = tl.arange(0, BLOCK)
    heads = tl.load(x + _offsets(tokens, STRIDE, start, columns), mask=rows[:, None] & (columns < D)[None, :], other=0)
    # Pairs lie in the same or in a neighbour thread: the second load finds them in the L1 cache.
    turned = rows[:, None] & (columns < 2 * HALF)[None, :]
    pair = tl.where(columns < HALF, columns, columns - HALF)
    other = tl.where(columns < HALF, columns + HALF, columns - HALF)
    pair = tl.max_contiguous(tl.multiple_of(pair, VECTOR), VECTOR)
    other = tl.max_contiguous(tl.multiple_of(other, VECTOR), VECTOR)
    partner = tl.load(x + _offsets(tokens, STRIDE, start, other), mask=turned, other=0)
    if period is not None:
        tokens = tokens % period
    angles = _offsets(tokens, HALF, 0, pair)
    return heads, partner, tl.load(cos + angles, mask=turned, other=1), tl.load(sin + angles, mask=turned, other=0)


@jit
def _turn(loaded, BACK: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr):
    """Rotate what `_load_heads` gave, or rotate it back."""
    x, partner, c, s = loaded
    first = (tl.arange(0, BLOCK) < HALF)[None, :]
    turned = s.to(ACC) * partner.to(ACC)
    return x.to(ACC) * c.to(ACC) + tl.where(first != BACK, turned, -turned)


@jit
def _prologue_kernel(
    projected, cos, sin, gain, out, T, period, EPS: tl.constexpr, STRIDE: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, PADDED_H: tl.constexpr, PADDED_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, VECTOR: tl.constexpr, TOKENS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    q_tokens, q_heads, q_rows = _tile(T, H, PADDED_H, TOKENS)
    k_tokens, k_heads, k_rows = _tile(T, K, PADDED_K, TOKENS)
    q_start, k_start = q_heads * D, (H + k_heads) * D
    q = _load_heads(projected, cos, sin, q_tokens, q_start, q_rows, period, STRIDE, D, BLOCK, HALF, VECTOR)
    k = _load_heads(projected, cos, sin, k_tokens, k_start, k_rows, period, STRIDE, D, BLOCK, HALF, VECTOR)
    strength = tl.load(gain + q_heads, mask=q_rows, other=0).to(ACC)
    columns = tl.arange(0, BLOCK)
    inside = (columns < D)[None, :]
    x = q[0].to(ACC)
    strength *= tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    y = strength[:, None] * _turn(q, False, BLOCK, HALF, ACC)
    at = _offsets(q_tokens, (H + K) * D, q_start, columns)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=q_rows[:, None] & inside)
    x = k[0].to(ACC)
    y = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None] * _turn(k, False, BLOCK, HALF, ACC)
    at = _offsets(k_tokens, (H + K) * D, k_start, columns)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=k_rows[:, None] & inside)


@jit
def _epilogue_kernel(
    o, projected, y, T, STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, EXCLUDE: tl.constexpr, GATED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // K
    tokens, heads, rows = _tile(T, K, PADDED_K, TOKENS)
    columns = tl.arange(0, BLOCK)
    mask = rows[:, None] & (columns < D)[None, :]
    at = _offsets(tokens, H * D, heads * (GROUP * D), columns)
    following = tl.load(o + at, mask=mask, other=0)
    if EXCLUDE:
        v = tl.load(projected + _offsets(tokens, STRIDE, (H + K + heads) * D, columns), mask=mask, other=0).to(ACC)
        norm = tl.sqrt(tl.sum(v * v, 1))
        u = v / tl.maximum(norm, 1e-12)[:, None]
    logits = projected + (tokens.to(tl.int64) * STRIDE + (H + 2 * K) * D + heads * GROUP)
    for g in tl.static_range(GROUP):
        z = following.to(ACC)
        if g + 1 < GROUP:  # on its way before this head's stores
            following = tl.load(o + at + (g + 1) * D, mask=mask, other=0)
        if EXCLUDE:
            z -= tl.sum(z * u, 1)[:, None] * u
        if GATED:
            z *= 2 * tl.sigmoid(tl.load(logits + g, mask=rows, other=0).to(ACC))[:, None]
        tl.store(y + at + g * D, z.to(y.dtype.element_ty), mask=mask)


@jit
def _epilogue_backward_kernel(
    dy, o, projected, do, delta, dprojected, T, STRIDE: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, PADDED_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PADDING: tl.constexpr,
    TOKENS: tl.constexpr, EXCLUDE: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // K
    REST: tl.constexpr = (H + 2 * K) * D
    tokens, heads, rows = _tile(T, K, PADDED_K, TOKENS)
    columns = tl.arange(0, BLOCK)
    mask = rows[:, None] & (columns < D)[None, :]
    at = _offsets(tokens, H * D, heads * (GROUP * D), columns)
    next_x, next_d = tl.load(o + at, mask=mask, other=0), tl.load(dy + at, mask=mask, other=0)
    if EXCLUDE:
        v = tl.load(projected + _offsets(tokens, STRIDE, (H + K + heads) * D, columns), mask=mask, other=0).to(ACC)
        norm = tl.sqrt(tl.sum(v * v, 1))
        inverse = 1 / tl.maximum(norm, 1e-12)
        u = inverse[:, None] * v
        du = tl.zeros_like(u)
        radial = tl.zeros_like(norm)
    logits = projected + (tokens.to(tl.int64) * STRIDE + REST + heads * GROUP)
    dlogits = dprojected + (tokens.to(tl.int64) * N + REST + heads * GROUP)
    for g in tl.static_range(GROUP):
        x, d = next_x.to(ACC), next_d.to(ACC)
        if g + 1 < GROUP:
            next_x = tl.load(o + at + (g + 1) * D, mask=mask, other=0)
            next_d = tl.load(dy + at + (g + 1) * D, mask=mask, other=0)
        slope = tl.sum(d * x, 1)  # <dy, z>
        dx = d
        if EXCLUDE:
            x_along, d_along = tl.sum(x * u, 1), tl.sum(d * u, 1)
            slope -= x_along * d_along
            dx -= d_along[:, None] * u
        if GATED:
            sigma = tl.sigmoid(tl.load(logits + g, mask=rows, other=0).to(ACC))
            dlogit = 2 * sigma * (1 - sigma) * slope
            tl.store(dlogits + g, dlogit.to(dprojected.dtype.element_ty), mask=rows)
            dx *= 2 * sigma[:, None]
            if EXCLUDE:
                d_along *= 2 * sigma
                x_along *= 2 * sigma
        if EXCLUDE:
            du -= d_along[:, None] * x + x_along[:, None] * d
            radial += tl.sum(x * u, 1) * d_along
        rounded = dx.to(do.dtype.element_ty)
        tl.store(do + at + g * D, rounded, mask=mask)
        # Of the rounded gradient, as the core's products are: then the rows of its dS sum to zero.
        row = tl.sum(rounded.to(ACC) * x, 1)
        tl.store(delta + (heads * GROUP + g).to(tl.int64) * T + tokens, row, mask=rows)
    if EXCLUDE:  # u does not turn where the norm is clamped
        dv = inverse[:, None] * (du + tl.where(norm > 1e-12, 2 * radial, 0)[:, None] * u)
        at_v = _offsets(tokens, N, (H + K + heads) * D, columns)
        tl.store(dprojected + at_v, dv.to(dprojected.dtype.element_ty), mask=mask)
    UNUSED: tl.constexpr = REST + H * GATED
    if UNUSED < N:
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        columns = UNUSED + tl.arange(0, PADDING)
        mask = (tokens < T)[:, None] & (columns < N)[None, :]
        zeros = tl.zeros((TOKENS, PADDING), dprojected.dtype.element_ty)
        tl.store(dprojected + _offsets(tokens, N, 0, columns), zeros, mask=mask)


@jit
def _unnormalise(
    x, loaded, strength, BLOCK: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of heads x by that of R(x / rms(x)) strength, and <that gradient, R(x / rms(x))>."""
    x = x.to(ACC)
    e = _turn(loaded, True, BLOCK, HALF, ACC)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    along = scale * tl.sum(e * x, 1)
    return (scale * strength)[:, None] * (e - (scale * along / D)[:, None] * x), along


@jit
def _prologue_backward_kernel(
    dq, dk, dv, projected, cos, sin, gain, dprojected, partials, T, period, EPS: tl.constexpr, STRIDE: tl.constexpr,
    N: tl.constexpr, STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, PADDED_H: tl.constexpr, PADDED_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, VECTOR: tl.constexpr, TOKENS: tl.constexpr, EXCLUDE: tl.constexpr, MOVE_V: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # dq and dk may lie where their results go: a head is stored after a sum over all that was loaded of it.
    q_tokens, q_heads, q_rows = _tile(T, H, PADDED_H, TOKENS)
    k_tokens, k_heads, k_rows = _tile(T, K, PADDED_K, TOKENS)
    columns = tl.arange(0, BLOCK)
    inside = (columns < D)[None, :]
    q_mask, k_mask = q_rows[:, None] & inside, k_rows[:, None] & inside
    q_loaded = _load_heads(dq, cos, sin, q_tokens, q_heads * D, q_rows, period, STRIDE_Q, D, BLOCK, HALF, VECTOR)
    q = tl.load(projected + _offsets(q_tokens, STRIDE, q_heads * D, columns), mask=q_mask, other=0)
    k_loaded = _load_heads(dk, cos, sin, k_tokens, k_heads * D, k_rows, period, STRIDE_K, D, BLOCK, HALF, VECTOR)
    k = tl.load(projected + _offsets(k_tokens, STRIDE, (H + k_heads) * D, columns), mask=k_mask, other=0)
    strength = tl.load(gain + q_heads, mask=q_rows, other=0).to(ACC)
    if MOVE_V:
        v = tl.load(dv + _offsets(k_tokens, STRIDE_V, k_heads * D, columns), mask=k_mask, other=0).to(ACC)
        at_v = dprojected + _offsets(k_tokens, N, (H + K + k_heads) * D, columns)
        if EXCLUDE:
            v += tl.load(at_v, mask=k_mask, other=0).to(ACC)
    dx, along = _unnormalise(q, q_loaded, strength, BLOCK, HALF, EPS, D, ACC)
    at = _offsets(q_tokens, N, q_heads * D, columns)
    tl.store(dprojected + at, dx.to(dprojected.dtype.element_ty), mask=q_mask)
    dx, _ = _unnormalise(k, k_loaded, tl.full((TOKENS * PADDED_K,), 1, ACC), BLOCK, HALF, EPS, D, ACC)
    at = _offsets(k_tokens, N, (H + k_heads) * D, columns)
    tl.store(dprojected + at, dx.to(dprojected.dtype.element_ty), mask=k_mask)
    if MOVE_V:
        tl.store(at_v, v.to(dprojected.dtype.element_ty), mask=k_mask)
    dgain = tl.sum(tl.reshape(along, (TOKENS, PADDED_H)), 0)
    heads = tl.arange(0, PADDED_H)
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partials + heads * programs + tl.program_id(0), dgain, mask=heads < H)


# --- Launches ---


def _ceiling(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _settings(case: str, projected: Tensor, H: int, K: int, D: int) -> tuple[tuple[int], dict]:
    """Grid and constants that all kernels have in common, of ``projected`` [T, N]."""
    tuned = launch_parameters("gated_attention", case, projected.device)
    padded, block = _ceiling(K), _ceiling(D)
    # No more warps than have 8 elements a thread of the smallest tile.
    warps = max(1, min(tuned["warps"], tuned["tokens"] * padded * block // 256))
    accumulate = tl.float64 if projected.dtype == torch.float64 else tl.float32
    return (-(-projected.size(0) // tuned["tokens"]),), dict(
        T=projected.size(0), STRIDE=projected.stride(0), H=H, K=K, PADDED_K=padded, D=D, BLOCK=block,
        TOKENS=tuned["tokens"], ACC=accumulate, num_warps=warps,
    )  # fmt: skip


def _angles(cos: Tensor, sin: Tensor, tokens: int) -> dict:
    """What both prologues need to rotate; a token's angles are those at its index modulo their number."""
    period, half = cos.shape
    return dict(
        cos=cos.contiguous(), sin=sin.contiguous(), period=None if period == tokens else period, HALF=half,
        VECTOR=max(half & -half, 1),
    )  # fmt: skip


def _prologue(projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, H: int, K: int, D: int, eps: float):
    """q^ and k^ [T, H + K, D] of projected [T, N]."""
    out = projected.new_empty(projected.size(0), H + K, D)
    grid, settings = _settings("prologue", projected, H, K, D)
    settings |= _angles(cos, sin, projected.size(0))
    with torch.cuda.device_of(projected):  # Triton launches on the current device
        _prologue_kernel[grid](
            projected=projected, gain=q_gain.contiguous(), out=out, EPS=eps, PADDED_H=_ceiling(H), **settings
        )
    return out


def _epilogue(o: Tensor, projected: Tensor, H: int, K: int, D: int, exclude_own_value: bool, gated: bool) -> Tensor:
    """y [T, H D] of o [T, H, D] and projected [T, N]."""
    y = o.new_empty(o.size(0), H * D)
    grid, settings = _settings("epilogue", projected, H, K, D)
    with torch.cuda.device_of(projected):
        _epilogue_kernel[grid](
            o=o.contiguous(), projected=projected, y=y, EXCLUDE=exclude_own_value, GATED=gated, **settings
        )
    return y


def _epilogue_backward(
    dy: Tensor, o: Tensor, projected: Tensor, H: int, K: int, D: int, exclude_own_value: bool, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(do, delta [H, T], dprojected), of which the logits' and the padding columns are set, and v's with exclusion."""
    do, dprojected = o.new_empty(o.shape), projected.new_empty(projected.shape)
    grid, settings = _settings("epilogue_backward", projected, H, K, D)
    delta = o.new_empty(H, o.size(0), dtype=torch.promote_types(o.dtype, torch.float32))
    width = projected.size(1)
    with torch.cuda.device_of(projected):
        _epilogue_backward_kernel[grid](
            dy=dy.contiguous(), o=o.contiguous(), projected=projected, do=do, delta=delta, dprojected=dprojected,
            N=width, PADDING=_ceiling(width - (H + 2 * K) * D - H * gated), EXCLUDE=exclude_own_value, GATED=gated,
            **settings,
        )  # fmt: skip
    return do, delta, dprojected


def _prologue_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor,
    dprojected: Tensor, H: int, K: int, D: int, exclude_own_value: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Fill q's and k's columns of ``dprojected`` and set v's to dv, or with exclusion add it; the gains' gradient.

    dq, dk, dv [T, heads, D] may be those columns themselves.
    """
    dq, dk, dv = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (dq, dk, dv))
    grid, settings = _settings("prologue_backward", projected, H, K, D)
    settings |= _angles(cos, sin, projected.size(0))
    partials = projected.new_empty(H, *grid, dtype=torch.promote_types(projected.dtype, torch.float32))
    with torch.cuda.device_of(projected):
        _prologue_backward_kernel[grid](
            dq=dq, dk=dk, dv=dv, projected=projected, gain=q_gain.contiguous(), dprojected=dprojected,
            partials=partials, EPS=eps, N=projected.size(1), STRIDE_Q=dq.stride(0), STRIDE_K=dk.stride(0),
            STRIDE_V=dv.stride(0), PADDED_H=_ceiling(H), EXCLUDE=exclude_own_value,
            MOVE_V=dv.data_ptr() != dprojected[:, (H + K) * D :].data_ptr(), **settings,
        )  # fmt: skip
    return partials.sum(1).to(q_gain.dtype)


def _flat(projected: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Tensor, Tensor, int]:
    """Rows [B T, N], contiguous each, the segments' boundaries and the longest segment."""
    rows, tokens, width = projected.shape
    projected = projected.reshape(rows * tokens, width)
    projected = projected if projected.stride(1) == 1 else projected.contiguous()
    if cu_seqlens is not None:
        return projected, cu_seqlens, max_seqlen
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=projected.device) * tokens
    return projected, cu_seqlens, tokens


def _heads(x: Tensor, first: int, count: int, D: int) -> Tensor:
    """``count`` heads of D columns, from the ``first`` on, of x [T, columns]: a view [T, count, D]."""
    return x[:, first * D : (first + count) * D].unflatten(1, (count, D))


def _gated_attention_triton(
    projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, cu_seqlens: Tensor | None, max_seqlen: int,
    num_heads: int, num_kv_heads: int, head_dim: int, exclude_own_value: bool, gated: bool, eps: float, core: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and what the backward needs: q^ and k^ [B T, H + K, D], o [B T, H, D], lse [H, B T]."""
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    rows, tokens, _ = projected.shape
    if not rows * tokens:
        return _fake(projected, cos, sin, q_gain, cu_seqlens, max_seqlen, *sizes)
    flat, cu_seqlens, max_seqlen = _flat(projected, cu_seqlens, max_seqlen)
    qk = _prologue(flat, cos, sin, q_gain, *sizes, eps)
    q, k, v = qk[:, :H], qk[:, H:], _heads(flat, H + K, K, D)
    o, lse = CORES[core][0](q, k, v, cu_seqlens, max_seqlen, D**-0.5)
    y = _epilogue(o, flat, *sizes, exclude_own_value, gated)
    return y.view(rows, tokens, H * D), qk, o, lse


def _gated_attention_backward_triton(
    dy: Tensor, projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, cu_seqlens: Tensor | None, qk: Tensor,
    o: Tensor, lse: Tensor, max_seqlen: int, num_heads: int, num_kv_heads: int, head_dim: int,
    exclude_own_value: bool, gated: bool, eps: float, core: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    if not dy.numel():
        return projected.new_empty(projected.shape), q_gain.new_zeros(q_gain.shape)
    flat, cu_seqlens, max_seqlen = _flat(projected, cu_seqlens, max_seqlen)
    q, k, v = qk[:, :H], qk[:, H:], _heads(flat, H + K, K, D)
    do, delta, dprojected = _epilogue_backward(
        dy.reshape(flat.size(0), H * D), o, flat, *sizes, exclude_own_value, gated
    )
    dq, dk = _heads(dprojected, 0, H, D), _heads(dprojected, H, K, D)
    dv = None if exclude_own_value else _heads(dprojected, H + K, K, D)
    dq, dk, dv = CORES[core][1](do, q, k, v, o, lse, cu_seqlens, max_seqlen, D**-0.5, delta, dq, dk, dv)
    dgain = _prologue_backward(dq, dk, dv, flat, cos, sin, q_gain, dprojected, *sizes, exclude_own_value, eps)
    return dprojected.view(projected.shape), dgain


def _fake(projected, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, *rest) -> tuple[Tensor, ...]:
    rows, tokens, _ = projected.shape
    y, qk, o = (projected.new_empty(s) for s in ((rows, tokens, H * D), (rows * tokens, H + K, D), (rows * tokens, H, D)))
    return y, qk, o, projected.new_empty(H, rows * tokens, dtype=torch.promote_types(projected.dtype, torch.float32))


_ARGUMENTS = "SymInt max_seqlen, int num_heads, int num_kv_heads, int head_dim, bool exclude_own_value, bool gated, "
_ARGUMENTS += "float eps, str core"
_backward_op = operator(
    "gated_attention_backward(Tensor dy, Tensor projected, Tensor cos, Tensor sin, Tensor q_gain, Tensor? cu_seqlens, "
    f"Tensor qk, Tensor o, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _gated_attention_backward_triton,
    lambda dy, projected, cos, sin, q_gain, *rest: (
        projected.new_empty(projected.shape), q_gain.new_empty(q_gain.shape)
    ),
)  # fmt: skip


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.rest = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx, dy: Tensor | None, *_: None):
    if dy is None:
        return (None,) * 13
    dprojected, dgain = _backward_op(dy, *ctx.saved_tensors, *ctx.rest)
    return dprojected, None, None, dgain, *(None,) * 9


_op = operator(
    "gated_attention(Tensor projected, Tensor cos, Tensor sin, Tensor q_gain, Tensor? cu_seqlens, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_attention_triton,
    _fake,
    setup_context=_save,
    backward=_gradients,
)
_GATED_ATTENTION = {"reference": _gated_attention_reference, "triton": lambda *arguments: _op(*arguments)[0]}


def _check(projected, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, gated, core) -> None:
    if H < 1 or K < 1 or H % K:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {H} and {K}")
    columns = (H + 2 * K) * D + H * gated
    if D < 1 or projected.size(-1) < columns:
        raise ValueError(f"projected must have at least {columns} columns for heads of {D}, got {projected.size(-1)}")
    if cos.ndim != 2 or cos.size(0) != projected.size(1) or 2 * cos.size(1) > D:
        raise ValueError(f"cos must be [{projected.size(1)}, at most {D // 2}], got shape {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if q_gain.shape != (H,):
        raise ValueError(f"q_gain must be [{H}], got shape {tuple(q_gain.shape)}")
    for name, tensor in (("projected", projected), ("cos", cos), ("sin", sin), ("q_gain", q_gain)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if tensor.device != projected.device:
            raise ValueError(f"{name} must be on projected's device {projected.device}, got {tensor.device}")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != projected.device:
            raise ValueError(
                f"cu_seqlens must be one-dimensional int32 on {projected.device}, got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
            )
        if projected.size(0) != 1:
            raise ValueError(f"projected must be one row with cu_seqlens, got {projected.size(0)} rows")
        if max_seqlen < 1 and projected.size(1):
            raise ValueError(f"max_seqlen must be the longest segment's length or more, got {max_seqlen}")
    if core not in CORES:
        raise ValueError(f"core must be auto or one of {', '.join(CORES)}, got {core!r}")


def gated_attention(
    projected: Tensor,
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
    eps: float = RMS_EPS,
    core: str = "auto",
) -> Tensor:
    """The attention sublayer between its projections; see the module's docstring for the formula.

    Differentiable once in projected and q_gain.

    Args:
        projected: [T, N] or [B, T, N], N >= (H + 2 K) D, plus H where gated; more columns are padding.
        cos, sin: [T, P], 2 P <= D, of the angles by index in a row.
        q_gain: [H], of any floating dtype; enters in projected's.
        cu_seqlens: int32 boundaries of segments, from 0 to T, repeated values allowed; needs B = 1. None: each row is
            one causal sequence.
        max_seqlen: at least the longest segment's length; read only with cu_seqlens.
        head_dim: D; None: as many columns as there are for each head, so that less than H + 2 K are padding.
        core: the attention inside the kernels, of `CORES`; auto: flash where it can, else sdpa.

    Returns [.., T, H D] in projected's dtype. Kernels compute in fp32, or in fp64 for float64. Raises ValueError for a
    wrong shape, value or device, TypeError for a wrong dtype.
    """
    if projected.ndim not in (2, 3):
        raise ValueError(f"projected must be [T, N] or [B, T, N], got shape {tuple(projected.shape)}")
    if head_dim is None:
        head_dim = (projected.size(-1) - num_heads * gated) // max(num_heads + 2 * num_kv_heads, 1)
    whole = projected if projected.ndim == 3 else projected[None]
    core = _core(core, projected, head_dim)
    _check(whole, cos, sin, q_gain, cu_seqlens, max_seqlen, num_heads, num_kv_heads, head_dim, gated, core)
    y = select("gated_attention", _GATED_ATTENTION, projected)(
        whole, cos, sin, q_gain, cu_seqlens, max_seqlen, num_heads, num_kv_heads, head_dim, exclude_own_value, gated,
        eps, core,
    )  # fmt: skip
    return y if projected.ndim == 3 else y[0]


def gated_attention_reference(
    projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, cu_seqlens: Tensor | None, max_seqlen: int,
    num_heads: int, num_kv_heads: int, *, exclude_own_value: bool, gated: bool, head_dim: int | None = None,
    eps: float = RMS_EPS, core: str = "auto",
) -> Tensor:  # fmt: skip
    """Plain PyTorch; the contract of `gated_attention`, whose arguments it shares; takes no notice of ``core``."""
    if head_dim is None:
        head_dim = (projected.size(-1) - num_heads * gated) // (num_heads + 2 * num_kv_heads)
    whole = projected if projected.ndim == 3 else projected[None]
    y = _gated_attention_reference(
        whole, cos, sin, q_gain, cu_seqlens, max_seqlen, num_heads, num_kv_heads, head_dim, exclude_own_value, gated,
        eps, core,
    )  # fmt: skip
    return y if projected.ndim == 3 else y[0]
