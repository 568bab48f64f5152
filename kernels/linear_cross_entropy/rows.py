"""The kernel of the cross-entropy: it reads rows of logits, and writes their losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters

ROW_ELEMENTS = 16_384  # the longest row that a program keeps in registers; longer ones it reads again, in blocks
LARGEST_FIXED_CAP = 40.0  # exp(-2 cap) is a normal number of fp32


class Terms(NamedTuple):
    """The terms of a loss besides z and the target; the defaults give the plain softmax cross-entropy.

    A softcap of two numbers has the cap of z > 0 first, and that of other z second.
    """

    softcap: float | Sequence[float] | None = None
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    bias: Tensor | None = None
    weight: Tensor | None = None


@jit
def _load(pointer, start, columns, inside):
    """Return elements in fp32, zero outside; ``columns`` is a block, or one number where ``inside`` is None."""
    if inside is None:
        elements = tl.load(pointer + start + columns)
    else:
        elements = tl.load(pointer + start + columns, mask=inside, other=0)
    return elements.to(tl.float32)


@jit
def _stretched(r, factor, CENTRED: tl.constexpr):
    """Return r with its distance from the r of z = 0 multiplied by ``factor`` where z is negative."""
    middle: tl.constexpr = 0.0 if CENTRED else 0.5
    return tl.where(r > middle, middle + (r - middle) * factor, r)


@jit
def _falling_logit(z, bias, start, columns, inside, scale, ratio, CAPPED: tl.constexpr, CENTRED: tl.constexpr):
    """Return r with logit = -2 cap r + const, so that r falls as the logit rises.

    Without a cap r = -z, and 2 cap stands for 1. With one r = 1 / (1 + exp(2 z / cap)), computed by one exponential and
    one reciprocal root, and the constant is cap. CENTRED returns r - 1/2 to fp32's precision, for which the constant is
    0. Near 0 that takes a series: the minimax polynomial of -tanh(z / cap) / 2 for |z / cap| < 1/2, with a relative
    error of 2e-8. ``ratio`` is the cap of negative z over cap, which is that of the other z. It scales the distance of
    r from the r of z = 0, so that the formula holds for all z.
    """
    # The order of the addresses' sum decides how many registers ptxas takes: without a cap the other order spills.
    x = _load(z, start, columns, inside) if CAPPED else _load(z, 0, start + columns, inside)
    if bias is not None:
        x += _load(bias, start, columns, inside)
    if CAPPED:
        x *= scale if ratio is None else tl.where(x < 0, scale / ratio, scale)
        root = tl.rsqrt(1 + tl.exp2(x))
        r = root * root
        if CENTRED:
            y = x * x
            series = -3.3312521e-4 + y * (1.5911184e-5 - y * 6.1805992e-7)
            series = x * (-0.17328679 + y * (6.93795876e-3 + y * series))
            r = tl.where(tl.abs(x) < 1.442695, series, r - 0.5)
        if ratio is not None:
            r = _stretched(r, ratio, CENTRED)
    else:
        r = -x
    return r


@jit
def _slope(r, ratio, CAPPED: tl.constexpr, CENTRED: tl.constexpr):
    """Return a quarter of the logit's derivative over z, (1 - tanh²) / 4, from the r of `_falling_logit`."""
    if ratio is not None:
        r = _stretched(r, 1 / ratio, CENTRED)
    return 0.25 if not CAPPED else 0.25 - r * r if CENTRED else r - r * r


@jit
def _weight(weights, start, columns, inside):
    """Return the classes' weights, or 1 where ``weights`` is None; 0 outside."""
    return tl.where(inside, 1.0, 0.0) if weights is None else _load(weights, start, columns, inside)


@jit
def _cross_entropy_kernel(
    z,
    gradient,
    targets,
    losses,
    stride,
    gradient_stride,
    cap,
    scale,
    slope,
    ratio,
    bias,
    weights,
    smoothing,
    square_scale,
    z_losses,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    SHIFTED: tl.constexpr,
    IGNORED: tl.constexpr,
):
    """Write the losses of rows of z, and dz into ``gradient``, which may be z.

    ``scale`` is 2 / cap and ``slope`` is -2 cap, both times log2(e). Where SHIFTED, the softmax subtracts its maximum.
    Arguments that are None have no effect: ``ratio``, the cap of negative z over ``cap``; ``bias``; class ``weights``;
    label ``smoothing``; ``square_scale`` of lse²; ``z_losses``, which receives that term.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    if IGNORED is not None:
        known &= target != IGNORED
    place = tl.where(known, target, 0)
    r_target = _falling_logit(z, bias, 0, place, None, scale, ratio, CAPPED, SHIFTED)
    least = 0.0  # r of the largest logit; 0, the r of the cap, where the cap can stand in for the maximum
    most: tl.constexpr = 1.0 if CAPPED and ratio is None else float("inf")
    if V <= BLOCK:
        inside = (columns < V) | (V == BLOCK)
        r = _falling_logit(z, bias, 0, columns, inside, scale, ratio, CAPPED, SHIFTED)
        if SHIFTED:
            least = tl.min(tl.where(inside, r, most))
        power = tl.where(inside, tl.exp2((r - least) * slope), 0)
        total = tl.sum(power)
        if smoothing is not None:
            weight = _weight(weights, 0, columns, inside)
            weight_sum = tl.sum(weight)
            spread = tl.sum(tl.where(inside, weight * (r - least), 0))
    else:
        sums = tl.zeros((BLOCK,), tl.float32)
        spreads = tl.zeros((BLOCK,), tl.float32)
        weight_sums = tl.zeros((BLOCK,), tl.float32)
        if SHIFTED:
            lowest = tl.full((BLOCK,), most, tl.float32)
            for start in range(0, V, BLOCK):
                inside = (start + columns < V) | (V % BLOCK == 0)
                r = _falling_logit(z, bias, start, columns, inside, scale, ratio, CAPPED, SHIFTED)
                lowest = tl.minimum(lowest, tl.where(inside, r, most))
            least = tl.min(lowest)
        for start in range(0, V, BLOCK):
            inside = (start + columns < V) | (V % BLOCK == 0)
            r = _falling_logit(z, bias, start, columns, inside, scale, ratio, CAPPED, SHIFTED)
            sums += tl.where(inside, tl.exp2((r - least) * slope), 0)
            if smoothing is not None:
                weight = _weight(weights, start, columns, inside)
                weight_sums += weight
                spreads += tl.where(inside, weight * (r - least), 0)
        total = tl.sum(sums)
        if smoothing is not None:
            weight_sum, spread = tl.sum(weight_sums), tl.sum(spreads)
    lost = float("nan") if IGNORED is None else tl.where(target == IGNORED, 0.0, float("nan"))  # where not ``known``
    # The loss's derivative over logit v is factor softmax_v - rest weight_v, and at the target -own besides.
    log_total = tl.log(total)
    loss = log_total + 2 * cap * (r_target - least)
    own = 1.0
    if weights is not None:
        own = _load(weights, 0, place, None)
    target_weight = own
    if smoothing is not None:
        own *= 1 - smoothing
        rest = smoothing / V
        loss = own * loss + rest * (weight_sum * log_total + 2 * cap * spread)
        factor = own + rest * weight_sum
        own += rest * target_weight
    else:
        factor = own
        if weights is not None:
            loss *= own
    if square_scale is not None:
        lse = log_total - 2 * cap * least
        if CAPPED and not SHIFTED:
            lse += cap
        z_loss = square_scale * lse * lse
        loss += z_loss
        factor += 2 * square_scale * lse
        if z_losses is not None:
            tl.store(z_losses + row, tl.where(known, z_loss, lost))
    tl.store(losses + row, tl.where(known, loss, lost))
    if gradient is not None:
        gradient += row * gradient_stride
        share = tl.where(known, 4 * factor / total, 0)
        if smoothing is not None:
            rest_share = tl.where(known, 4 * rest, 0)
        if V <= BLOCK:
            dz = power * _slope(r, ratio, CAPPED, SHIFTED) * share
            if smoothing is not None:
                dz -= weight * _slope(r, ratio, CAPPED, SHIFTED) * rest_share
            tl.store(gradient + columns, dz.to(gradient.dtype.element_ty), mask=inside)
        else:
            for start in range(0, V, BLOCK):
                inside = (start + columns < V) | (V % BLOCK == 0)
                r = _falling_logit(z, bias, start, columns, inside, scale, ratio, CAPPED, SHIFTED)
                dz = tl.exp2((r - least) * slope) * _slope(r, ratio, CAPPED, SHIFTED) * share
                if smoothing is not None:
                    weight = _weight(weights, start, columns, inside)
                    dz -= weight * _slope(r, ratio, CAPPED, SHIFTED) * rest_share
                tl.store(gradient + start + columns, dz.to(gradient.dtype.element_ty), mask=inside)
        # Write the target's element once more: a comparison in every element would cost as much as the exponentials.
        dz = (tl.exp2((r_target - least) * slope) / total * factor - own) * 4 * _slope(r_target, ratio, CAPPED, SHIFTED)
        tl.debug_barrier()
        tl.store(gradient + target, dz.to(gradient.dtype.element_ty), mask=known)


def launch(
    z: Tensor,
    targets: Tensor,
    losses: Tensor,
    terms: Terms,
    vocabulary: int,
    gradient: Tensor | None = None,
    z_losses: Tensor | None = None,
) -> None:
    """Write the losses of the rows of z [T, >= V], and dz into ``gradient`` [T, >= V], which may be z.

    ``z_losses`` [T] receives the losses' term in (log Σ exp)².
    """
    case = "blocks" if vocabulary > ROW_ELEMENTS else "loss" if gradient is None else "gradient"
    tuned = launch_parameters("linear_cross_entropy", case, z.device)
    block = tuned["block"] if case == "blocks" else 1 << (vocabulary - 1).bit_length()
    warps = min(32, max(1, block // tuned["columns_per_warp"]))
    caps = terms.softcap if isinstance(terms.softcap, Sequence) else (terms.softcap or 0.5,)
    cap, below = caps[0], caps[-1]
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _cross_entropy_kernel[(z.size(0),)](
            z,
            gradient,
            targets,
            losses,
            z.stride(0),
            0 if gradient is None else gradient.stride(0),
            cap,
            2 * math.log2(math.e) / cap,
            -2 * math.log2(math.e) * cap,
            None if below == cap else below / cap,
            terms.bias,
            terms.weight,
            terms.label_smoothing or None,
            None if z_losses is None and not terms.lse_square_scale else terms.lse_square_scale,
            z_losses,
            V=vocabulary,
            BLOCK=block,
            CAPPED=terms.softcap is not None,
            SHIFTED=terms.softcap is None or max(caps) > LARGEST_FIXED_CAP,
            IGNORED=terms.ignore_index,
            num_warps=warps,
        )
