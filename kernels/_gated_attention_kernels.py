"""The four streams around the attention of `gated_attention`, which has the formula; [T, N] is the projection.

A program takes a few tokens with all heads. Offsets into rows are 64-bit.
"""

from __future__ import annotations

import torch

from ._launch import jit, launch_parameters, tl

Tensor = torch.Tensor


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
        u = (1 / tl.maximum(norm, 1e-12))[:, None] * v
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
    K: tl.constexpr, PADDED_K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    EXCLUDE: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
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
    UNUSED: tl.constexpr, PADDING: tl.constexpr, ACC: tl.constexpr,
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
    if UNUSED < N:
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        columns = UNUSED + tl.arange(0, PADDING)
        mask = (tokens < T)[:, None] & (columns < N)[None, :]
        zeros = tl.zeros((TOKENS, PADDING), dprojected.dtype.element_ty)
        tl.store(dprojected + _offsets(tokens, N, 0, columns), zeros, mask=mask)
    dgain = tl.sum(tl.reshape(along, (TOKENS, PADDED_H)), 0)
    heads = tl.arange(0, PADDED_H)
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partials + heads * programs + tl.program_id(0), dgain, mask=heads < H)


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


def prologue(projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, H: int, K: int, D: int, eps: float) -> Tensor:
    """q^ and k^ [T, H + K, D] of projected [T, N]."""
    out = projected.new_empty(projected.size(0), H + K, D)
    grid, settings = _settings("prologue", projected, H, K, D)
    settings |= _angles(cos, sin, projected.size(0))
    with torch.cuda.device_of(projected):  # Triton launches on the current device
        _prologue_kernel[grid](
            projected=projected, gain=q_gain.contiguous(), out=out, EPS=eps, PADDED_H=_ceiling(H), **settings
        )
    return out


def epilogue(o: Tensor, projected: Tensor, H: int, K: int, D: int, exclude_own_value: bool, gated: bool) -> Tensor:
    """y [T, H D] of o [T, H, D] and projected [T, N]."""
    y = o.new_empty(o.size(0), H * D)
    grid, settings = _settings("epilogue", projected, H, K, D)
    with torch.cuda.device_of(projected):
        _epilogue_kernel[grid](
            o=o.contiguous(), projected=projected, y=y, EXCLUDE=exclude_own_value, GATED=gated, **settings
        )
    return y


def epilogue_backward(
    dy: Tensor, o: Tensor, projected: Tensor, H: int, K: int, D: int, exclude_own_value: bool, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(do, delta [H, T], dprojected), of which the logits' columns are set, and v's with exclusion."""
    do, dprojected = o.new_empty(o.shape), projected.new_empty(projected.shape)
    grid, settings = _settings("epilogue_backward", projected, H, K, D)
    delta = o.new_empty(H, o.size(0), dtype=torch.promote_types(o.dtype, torch.float32))
    with torch.cuda.device_of(projected):
        _epilogue_backward_kernel[grid](
            dy=dy.contiguous(), o=o.contiguous(), projected=projected, do=do, delta=delta, dprojected=dprojected,
            N=projected.size(1), EXCLUDE=exclude_own_value, GATED=gated, **settings,
        )  # fmt: skip
    return do, delta, dprojected


def prologue_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor,
    dprojected: Tensor, H: int, K: int, D: int, exclude_own_value: bool, gated: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Fill q's, k's and the padding columns of ``dprojected`` and set v's to dv, or with exclusion add it.

    Returns the gains' gradient. dq, dk, dv [T, heads, D] may be those columns themselves.
    """
    dq, dk, dv = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in (dq, dk, dv))
    grid, settings = _settings("prologue_backward", projected, H, K, D)
    settings |= _angles(cos, sin, projected.size(0))
    unused = (H + 2 * K) * D + H * gated
    partials = projected.new_empty(H, *grid, dtype=torch.promote_types(projected.dtype, torch.float32))
    with torch.cuda.device_of(projected):
        _prologue_backward_kernel[grid](
            dq=dq, dk=dk, dv=dv, projected=projected, gain=q_gain.contiguous(), dprojected=dprojected,
            partials=partials, EPS=eps, N=projected.size(1), STRIDE_Q=dq.stride(0), STRIDE_K=dk.stride(0),
            STRIDE_V=dv.stride(0), PADDED_H=_ceiling(H), EXCLUDE=exclude_own_value,
            MOVE_V=dv.data_ptr() != dprojected[:, (H + K) * D :].data_ptr(), UNUSED=unused,
            PADDING=_ceiling(projected.size(1) - unused), **settings,
        )  # fmt: skip
    return partials.sum(1).to(q_gain.dtype)
