"""The projection of `gated_attention`: its product with q^ and k^ in the place of q and k.

On Hopper, for supported shapes, the product's epilogue computes q^ and k^; a small kernel computes the gates' logits
from the columns of n that the gates read. Otherwise a kernel computes q^ and k^ in place after the whole product.
"""

from __future__ import annotations

import torch

from ..common import hopper_product as hopper
from ..common.compiling import jit, tl
from ..common.epilogues import away_from_zero
from ..common.launch import launch_parameters

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
    """Normalise, rotate and scale the query and key heads of TOKENS tokens in place; row offsets have 64 bits."""
    rows = tl.arange(0, TOKENS * PADDED)
    tokens, heads = tl.program_id(0) * TOKENS + rows // PADDED, rows % PADDED
    inside = (tokens < T) & (heads < HEADS)
    columns = tl.arange(0, D)[None, :]
    projected += (tokens.to(tl.int64) * STRIDE + heads * D)[:, None]
    x = tl.load(projected + columns, mask=inside[:, None], other=0)
    strength = tl.where(heads < H, unit * away_from_zero(tl.load(gain + heads, mask=heads < H, other=1)), 1)
    if HALF > 0:
        # The other dimension of a pair is in the same or a neighbouring thread: a second load hits the L1 cache.
        first = columns < HALF
        turned = inside[:, None] & (columns < 2 * HALF)
        pair = tl.max_contiguous(tl.multiple_of(tl.where(first, columns, columns - HALF), (1, HALF)), (1, HALF))
        partner_column = tl.max_contiguous(
            tl.multiple_of(tl.where(first, columns + HALF, columns - HALF), (1, HALF)), (1, HALF)
        )
        partner = tl.load(projected + partner_column, mask=turned, other=0)
        index = tokens if period is None else tokens % period
        angles = (index.to(tl.int64) * HALF)[:, None] + pair
        c, s = tl.load(cos + angles, mask=turned, other=1), tl.load(sin + angles, mask=turned, other=0)
        tl.debug_barrier()  # all loads of a row precede its stores
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    tl.store(inverse_rms + heads.to(tl.int64) * T + tokens, inverse, mask=inside)
    if HALF > 0:
        across = s.to(tl.float32) * partner.to(tl.float32)
        x = x * c.to(tl.float32) + tl.where(first, across, -across)
    x *= (strength * inverse)[:, None]
    tl.store(projected + columns, x.to(projected.dtype.element_ty), mask=inside[:, None])


def prologue(
    projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, H: int, K: int, D: int, *, eps: float, unit: float
) -> Tensor:
    """Replace q and k in projected [T, N], whose rows are contiguous, by unit q^ and k^.

    Returns 1 / rms of q and k, float32 [H + K, T].
    """
    T, heads, (period, half) = projected.size(0), H + K, cos.shape
    inverse_rms = projected.new_empty(heads, T, dtype=torch.float32)
    tuned = launch_parameters("gated_attention", "prologue", projected.device)
    padded = 1 << (heads - 1).bit_length()
    # No more warps than have 8 elements per thread.
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
    """Write the logits of ROWS tokens; row offsets have 64 bits."""
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
    """Write n weightᵀ of n [T, depth] and weight [columns, depth], summed in float32, into out [T, columns].

    All have one dtype and contiguous rows, which may be parts of longer rows. The kernel supports 16-bit dtypes and up
    to 128 columns and depth; everything else takes PyTorch's product. Returns out.
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
    *,
    eps: float,
    unit: float,
    gate_width: int | None = None,
    gated: bool = False,
    update: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return n weightᵀ [T, N] with unit q^ and k^ in the place of q and k, and 1 / rms of q and k, float32 [H + K, T].

    n is [T, d], weight is [N, d]; ``update`` [T, (H + 2 K) D] is added to q, k and v first. cos and sin are [period,
    P], indexed by the token modulo period; P is zero or a power of two. ``gate_width`` is that of `gated_attention`.
    """
    projected, width = n.new_empty(n.size(0), weight.size(0)), (H + 2 * K) * D
    stages = launch_parameters("gated_attention", "project", n.device)["ping_pong"]
    if hopper.projection_fits(n, weight[:width], cos, projected, H, K, D, stages):
        inverse_rms = n.new_empty(H + K, n.size(0), dtype=torch.float32)
        angles_and_gain = cos.contiguous(), sin.contiguous(), q_gain.contiguous()
        with torch.cuda.device_of(n):
            hopper.normalised_projection(
                n,
                weight[:width],
                *angles_and_gain,
                update,
                projected,
                inverse_rms,
                eps=eps,
                unit=unit,
                stages=stages,
            )
        if gated:
            gate_logits(n[:, :gate_width], weight[width:, :gate_width], projected[:, width:])
        return projected, inverse_rms
    torch.mm(n, weight.t(), out=projected)  # with `out`, autocast does not apply
    if update is not None:
        projected[:, :width] += update
    return projected, prologue(projected, cos, sin, q_gain, H, K, D, eps=eps, unit=unit)
