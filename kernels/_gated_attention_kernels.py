"""The projection of `gated_attention`, which has the formula, with q^ and k^ where its product has q and k.

On Hopper, where shapes allow, they are made in the product's epilogue, and the gates' logits by a small kernel, which
reads only the columns of n that gates do. Else a kernel after the whole product makes them in place.
"""

from __future__ import annotations

import torch

from .common import hopper_product as hopper
from .common.compiling import jit, tl
from .common.epilogues import away_from_zero
from .common.launch import launch_parameters

Tensor = torch.Tensor


@jit
def _prologue_kernel(
    projected,
    inverse_rms,
    gain,
    cos,
    sin,
    unit,
    T,
    period,
    EPS: tl.constexpr,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A few tokens' query and key heads, in place; 64-bit offsets of rows."""
    rows = tl.arange(0, TOKENS * PADDED)
    tokens, heads = tl.program_id(0) * TOKENS + rows // PADDED, rows % PADDED
    inside = (tokens < T) & (heads < HEADS)
    columns = tl.arange(0, D)[None, :]
    projected += (tokens.to(tl.int64) * STRIDE + heads * D)[:, None]
    x = tl.load(projected + columns, mask=inside[:, None], other=0)
    strength = tl.where(heads < H, unit * away_from_zero(tl.load(gain + heads, mask=heads < H, other=1)), 1)
    if HALF > 0:
        # Pairs lie in the same or in a neighbour thread: the second load finds them in the L1 cache.
        first = columns < HALF
        turned = inside[:, None] & (columns < 2 * HALF)
        pair = tl.max_contiguous(tl.multiple_of(tl.where(first, columns, columns - HALF), (1, HALF)), (1, HALF))
        other = tl.max_contiguous(tl.multiple_of(tl.where(first, columns + HALF, columns - HALF), (1, HALF)), (1, HALF))
        partner = tl.load(projected + other, mask=turned, other=0)
        index = tokens if period is None else tokens % period
        angles = (index.to(tl.int64) * HALF)[:, None] + pair
        c, s = tl.load(cos + angles, mask=turned, other=1), tl.load(sin + angles, mask=turned, other=0)
        tl.debug_barrier()  # all loads of a row before its stores
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    tl.store(inverse_rms + heads.to(tl.int64) * T + tokens, inverse, mask=inside)
    if HALF > 0:
        across = s.to(tl.float32) * partner.to(tl.float32)
        x = x * c.to(tl.float32) + tl.where(first, across, -across)
    x *= (strength * inverse)[:, None]
    tl.store(projected + columns, x.to(projected.dtype.element_ty), mask=inside[:, None])


def prologue(
    projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, H: int, K: int, D: int, eps: float, unit: float
) -> Tensor:
    """Make unit q^ and k^ of the q and k in projected [T, N], whose rows are contiguous, where they lie.

    Returns their 1 / rms, float32 [H + K, T].
    """
    T, heads, (period, half) = projected.size(0), H + K, cos.shape
    inverse_rms = projected.new_empty(heads, T, dtype=torch.float32)
    tuned = launch_parameters("gated_attention", "prologue", projected.device)
    padded = 1 << (heads - 1).bit_length()
    # No more warps than have 8 elements a thread.
    warps = max(1, min(tuned["warps"], tuned["tokens"] * padded * D // 256))
    with torch.cuda.device_of(projected):  # Triton launches on the current device
        _prologue_kernel[(-(-T // tuned["tokens"]),)](
            projected,
            inverse_rms,
            q_gain.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            unit,
            T,
            None if period == T else period,
            EPS=eps,
            STRIDE=projected.stride(0),
            H=H,
            HEADS=heads,
            PADDED=padded,
            D=D,
            HALF=half,
            TOKENS=tuned["tokens"],
            num_warps=warps,
        )
    return inverse_rms


@jit
def _gate_logits_kernel(
    n,
    weight,
    logits,
    T,
    n_t,
    weight_t,
    logits_t,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_DEPTH: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A few tokens' logits; 64-bit offsets of rows."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, tokens = (tokens < T)[:, None], tokens.to(tl.int64)[:, None]
    depth, columns = tl.arange(0, PADDED_DEPTH)[None, :], tl.arange(0, PADDED_COLUMNS)[:, None]
    x = tl.load(n + tokens * n_t + depth, mask=inside & (depth < DEPTH), other=0)
    w = tl.load(weight + columns * weight_t + depth, mask=(columns < COLUMNS) & (depth < DEPTH), other=0)
    result = tl.dot(x, tl.trans(w))
    columns = tl.arange(0, PADDED_COLUMNS)[None, :]
    logits += tokens * logits_t + columns
    tl.store(logits, result.to(logits.dtype.element_ty), mask=inside & (columns < COLUMNS))


def gate_logits(n: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """n weightᵀ of n [T, depth] and weight [columns, depth], summed in float32, into out [T, columns].

    All are of one dtype with contiguous rows, which may be parts of longer ones. The kernel is for a few columns of 16
    bits: above 128 of either kind, and for other dtypes, PyTorch's product is taken.
    """
    (T, depth), columns = n.shape, weight.size(0)
    if max(depth, columns) > 128 or n.element_size() != 2:
        return torch.mm(n, weight.t(), out=out)
    tuned = launch_parameters("gated_attention", "gate_logits", n.device)
    padded = (max(16, 1 << (size - 1).bit_length()) for size in (depth, columns))
    if T:
        with torch.cuda.device_of(n):  # Triton launches on the current device
            _gate_logits_kernel[(-(-T // tuned["rows"]),)](
                n,
                weight,
                out,
                T,
                n.stride(0),
                weight.stride(0),
                out.stride(0),
                depth,
                columns,
                *padded,
                tuned["rows"],
                num_warps=tuned["warps"],
            )
    return out


def project(
    n: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    H: int,
    K: int,
    D: int,
    eps: float,
    unit: float,
    gate_width: int | None,
    gated: bool,
    update: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """n [T, d] weightᵀ [T, N] with unit q^ and k^ for q and k, and 1 / rms of these, float32 [H + K, T].

    update [T, (H + 2 K) D] is added to the columns of q, k and v first.

    A token's angles are those at its index modulo their number; they are of a power of two of pairs or none.
    """
    projected, width = n.new_empty(n.size(0), weight.size(0)), (H + 2 * K) * D
    stages = launch_parameters("gated_attention", "project", n.device)["ping_pong"]
    if hopper.projects(n, weight[:width], cos, projected, H, K, D, stages):
        inverse_rms = n.new_empty(H + K, n.size(0), dtype=torch.float32)
        angles_and_gain = cos.contiguous(), sin.contiguous(), q_gain.contiguous()
        with torch.cuda.device_of(n):
            hopper.project(n, weight[:width], *angles_and_gain, update, projected, inverse_rms, eps, unit, stages)
        if gated:
            gate_logits(n[:, :gate_width], weight[width:, :gate_width], projected[:, width:])
        return projected, inverse_rms
    torch.mm(n, weight.t(), out=projected)  # `out` keeps autocast away
    if update is not None:
        projected[:, :width] += update
    return projected, prologue(projected, cos, sin, q_gain, H, K, D, eps, unit)
