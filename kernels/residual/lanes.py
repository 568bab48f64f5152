"""The kernels of `residual` on two lanes, and their operator and derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.launch import accumulator
from ..common.operators import carrying, operator
from .rows import (
    add_n1_gradient,
    contiguous,
    empty,
    empty_sums,
    gate_columns,
    inverse_rms,
    join,
    join_gradient,
    kept_gradient,
    load,
    load_gate,
    load_row_gate,
    load_scalar,
    load_vector,
    needed,
    norm_gradient,
    parameter_gradients,
    plan,
    pointer,
    row_columns,
    row_root,
    store,
    store_sums,
    sums_width,
    total,
)

Tensor = torch.Tensor


@jit
def _lane_scalars(post, resid, ACC: tl.constexpr):
    return (
        tl.load(resid).to(ACC),
        tl.load(resid + 1).to(ACC),
        tl.load(post).to(ACC),
        tl.load(post + 1).to(ACC),
        tl.load(post + 2).to(ACC),
        tl.load(post + 3).to(ACC),
    )


@jit(do_not_specialize=("rows", "chunk"))
def _lanes_kernel(
    x0,
    lane0,
    lane1,
    attention,
    mlp,
    post,
    resid,
    mix,
    skip,
    weight,
    gate,
    scale,
    row_gate,
    out0,
    out1,
    n0,
    n1,
    rows,
    chunk,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    K: tl.constexpr,
):
    """Mix both lanes after a layer into out0 and out1, and join out0 with skip.

    With mix, n0 and n1 are the norms that the next layer reads; with row_gate, n1 is scaled by the roots of the rows'
    gates. Without out0, n0 is the norm of the lanes' mean.
    """
    columns, inside = row_columns(D, BLOCK)
    r0, r1, a0, a1, m0, m1 = _lane_scalars(post, resid, ACC)
    w, sigma, factor = (
        load_vector(weight, columns, inside, ACC),
        load_gate(gate, columns, inside, ACC),
        load_scalar(scale, ACC),
    )
    row = load_row_gate(row_gate, columns, K, ACC)
    if mix is not None:
        first, second = load(mix, columns, inside, ACC), load(mix + D, columns, inside, ACC)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        a, m = load(attention, offsets, inside, ACC), load(mlp, offsets, inside, ACC)
        value0 = r0 * load(lane0, offsets, inside, ACC) + (a0 * a + m0 * m)
        value1 = r1 * load(lane1, offsets, inside, ACC) + (a1 * a + m1 * m)
        if out0 is not None:
            if skip is not None:
                value0 = join(value0, load(skip, offsets, inside, ACC), w, sigma, gate is not None)
            store(out0, offsets, inside, value0)
            store(out1, offsets, inside, value1)
            if mix is not None:
                scaling = inverse_rms(value1, EPS, D) * factor
                if row_gate is not None:
                    scaling *= row_root(value1, row, columns, K)
                store(n1, offsets, inside, value1 * scaling)
                u = first * value0 + second * load(x0, offsets, inside, ACC)
                store(n0, offsets, inside, u * (inverse_rms(u, EPS, D) * factor))
        else:
            u = 0.5 * (value0 + value1)
            store(n0, offsets, inside, u * (inverse_rms(u, EPS, D) * factor))


@jit
def _thread_sum(values, BLOCK: tl.constexpr):
    """Sums of eight neighbouring elements, which lie in one thread."""
    GROUP: tl.constexpr = 8 if BLOCK > 8 else BLOCK
    return tl.sum(tl.reshape(values, (BLOCK // GROUP, GROUP)), 1)


@jit(do_not_specialize=("rows", "chunk"))
def _lanes_backward_kernel(
    dx0_next,
    dout0,
    dout1,
    dn0,
    dn1,
    x0,
    lane0,
    lane1,
    attention,
    mlp,
    post,
    resid,
    mix,
    skip,
    weight,
    gate,
    scale,
    row_gate,
    dx0,
    dlane0,
    dlane1,
    dattention,
    dmlp,
    dskip,
    partials,
    rows,
    chunk,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns, inside = row_columns(D, BLOCK)
    zeros = tl.zeros((BLOCK,), ACC)
    r0, r1, a0, a1, m0, m1 = _lane_scalars(post, resid, ACC)
    w, sigma, factor = (
        load_vector(weight, columns, inside, ACC),
        load_gate(gate, columns, inside, ACC),
        load_scalar(scale, ACC),
    )
    row = load_row_gate(row_gate, columns, K, ACC)
    weight_sum, gate_sum, first_sum, second_sum, row_sum = zeros, zeros, zeros, zeros, zeros
    if mix is not None:
        first, second = load(mix, columns, inside, ACC), load(mix + D, columns, inside, ACC)
    nothing = _thread_sum(zeros, BLOCK)
    r0_sum, r1_sum, a0_sum, a1_sum, m0_sum, m1_sum = nothing, nothing, nothing, nothing, nothing, nothing
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        a, m = load(attention, offsets, inside, ACC), load(mlp, offsets, inside, ACC)
        l0, l1 = load(lane0, offsets, inside, ACC), load(lane1, offsets, inside, ACC)
        value0 = r0 * l0 + (a0 * a + m0 * m)
        value1 = r1 * l1 + (a1 * a + m1 * m)
        if dout0 is not None:
            g0, g1 = load(dout0, offsets, inside, ACC), load(dout1, offsets, inside, ACC)
            joined = value0
            if skip is not None:
                skipped = load(skip, offsets, inside, ACC)
                joined = join(value0, skipped, w, sigma, gate is not None)
            if mix is not None:
                g1, row_sum = add_n1_gradient(
                    g1, row_sum, load(dn1, offsets, inside, ACC), value1, factor, row_gate, row, columns, EPS, K, D
                )
                value_x0 = load(x0, offsets, inside, ACC)
                u = first * joined + second * value_x0
                inverse = inverse_rms(u, EPS, D)
                du = norm_gradient(load(dn0, offsets, inside, ACC), u * inverse, factor * inverse, D)
                if partials is not None:
                    first_sum += du * joined
                    second_sum += du * value_x0
                if dx0 is not None:
                    result = second * du
                    if dx0_next is not None:
                        result += load(dx0_next, offsets, inside, ACC)
                    store(dx0, offsets, inside, result)
                g0 += first * du
            if skip is not None:
                g0, passed, part, gate_part = join_gradient(g0, value0, skipped, w, sigma, gate is not None)
                if partials is not None:
                    weight_sum += part
                    gate_sum += gate_part
                store(dskip, offsets, inside, passed)
        else:
            u = 0.5 * (value0 + value1)
            inverse = inverse_rms(u, EPS, D)
            dn = load(dn0, offsets, inside, ACC)
            g0 = 0.5 * norm_gradient(dn, u * inverse, factor * inverse, D)
            g1 = g0
        store(dlane0, offsets, inside, r0 * g0)
        store(dlane1, offsets, inside, r1 * g1)
        store(dattention, offsets, inside, a0 * g0 + a1 * g1)
        store(dmlp, offsets, inside, m0 * g0 + m1 * g1)
        if partials is not None:
            r0_sum += _thread_sum(g0 * l0, BLOCK)
            r1_sum += _thread_sum(g1 * l1, BLOCK)
            a0_sum += _thread_sum(g0 * a, BLOCK)
            a1_sum += _thread_sum(g1 * a, BLOCK)
            m0_sum += _thread_sum(g0 * m, BLOCK)
            m1_sum += _thread_sum(g1 * m, BLOCK)
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * WIDTH
        scalars = store_sums(
            partials,
            first_sum,
            second_sum,
            weight_sum,
            gate_sum,
            row_sum,
            sigma,
            columns,
            inside,
            D,
            mix is not None,
            skip is not None,
            gate is not None,
            row_gate is not None,
            K,
        )
        tl.store(scalars, tl.sum(r0_sum))
        tl.store(scalars + 1, tl.sum(r1_sum))
        tl.store(scalars + 2, tl.sum(a0_sum))
        tl.store(scalars + 3, tl.sum(a1_sum))
        tl.store(scalars + 4, tl.sum(m0_sum))
        tl.store(scalars + 5, tl.sum(m1_sum))


def _kept(mix: Tensor | None, mean: bool) -> tuple[bool, bool, bool, bool]:
    """Return which of lane 0, lane 1, n0 and n1 are outputs."""
    return not mean, not mean, mean or mix is not None, mix is not None


def _lanes_case(mix: Tensor | None, mean: bool, direction: str) -> str:
    return f"lanes_{'mean_' * mean}{'norm_' * (mix is not None)}{direction}"


def lanes_forward(
    x0: Tensor | None,
    lane0: Tensor,
    lane1: Tensor,
    attention: Tensor,
    mlp: Tensor,
    post: Tensor,
    resid: Tensor,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    row_gate: Tensor | None,
    eps: float,
    mean: bool = False,
) -> tuple[Tensor, ...]:
    """Return (lane 0, lane 1, n0, n1); n0 and n1 are empty without mix; with ``mean`` only n0 is kept."""
    outputs = empty(lane0, *_kept(mix, mean))
    if lane0.numel():
        grid, extent, settings = plan(_lanes_case(mix, mean, "forward"), lane0)
        inputs = contiguous(x0, lane0, lane1, attention, mlp, post, resid, mix, skip, weight, gate, scale, row_gate)
        settings["K"] = gate_columns(row_gate)
        with torch.cuda.device_of(lane0):
            _lanes_kernel[grid](*inputs, *map(pointer, outputs), *extent, EPS=eps, **settings)
    return outputs


def lanes_sums(lane0: Tensor, *parameters: Tensor | None) -> int:
    """Return the length of `lanes_backward`'s flat gradient, for mix, skip, gate and row_gate."""
    return sums_width(lane0, *parameters) + 6


def _empty_gradients(lane0: Tensor, mix: Tensor | None, skip: Tensor | None, need_x0: bool) -> tuple[Tensor, ...]:
    """Return uninitialised gradients of x0, lane0, lane1, attention, mlp and skip, empty if not needed."""
    always = (True,) * 4
    return empty(lane0, need_x0 and mix is not None, *always, skip is not None)


def lanes_backward(
    dx0_next: Tensor | None,
    dout0: Tensor | None,
    dout1: Tensor | None,
    dn0: Tensor | None,
    dn1: Tensor | None,
    x0: Tensor | None,
    lane0: Tensor,
    lane1: Tensor,
    attention: Tensor,
    mlp: Tensor,
    post: Tensor,
    resid: Tensor,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    row_gate: Tensor | None,
    eps: float,
    need_x0: bool = True,
    need_parameters: bool = True,
) -> tuple[Tensor, ...]:
    """Return the gradients of x0, lane0, lane1, attention, mlp and skip, and a flat one of the parameters.

    The flat gradient is that of mix, weight, gate, row_gate, resid and post, in this order, of those given. Without
    dout0 the output was the norm of the lanes' mean, whose gradient is dn0. A gradient that is not needed is
    empty.
    """
    width = lanes_sums(lane0, mix, skip, gate, row_gate) if need_parameters else 0
    outputs = _empty_gradients(lane0, mix, skip, need_x0)
    if not lane0.numel():
        return *outputs, lane0.new_zeros(width, dtype=accumulator(lane0))
    grid, extent, settings = plan(_lanes_case(mix, dout0 is None, "backward"), lane0)
    partials = lane0.new_empty(*grid, width, dtype=accumulator(lane0)) if need_parameters else None
    gradients = contiguous(dx0_next, dout0, dout1, dn0, dn1)
    inputs = contiguous(x0, lane0, lane1, attention, mlp, post, resid, mix, skip, weight, gate, scale, row_gate)
    settings |= dict(EPS=eps, K=gate_columns(row_gate), WIDTH=width)
    with torch.cuda.device_of(lane0):
        _lanes_backward_kernel[grid](*gradients, *inputs, *map(pointer, outputs), partials, *extent, **settings)
    return *outputs, total(partials, lane0)


def _fake_lanes_backward(*args: Any) -> tuple[Tensor, ...]:
    lane0, (mix, skip, _, gate, _, row_gate), (need_x0, need_parameters) = args[6], args[12:18], args[19:]
    outputs = _empty_gradients(lane0, mix, skip, need_x0)
    return *outputs, empty_sums(lane0, lanes_sums(lane0, mix, skip, gate, row_gate) if need_parameters else 0)


_lanes_backward_op = operator(
    "residual_lanes_backward(Tensor? dx0_next, Tensor? dout0, Tensor? dout1, Tensor? dn0, Tensor? dn1, Tensor? x0, "
    "Tensor lane0, Tensor lane1, Tensor attention, Tensor mlp, Tensor post, Tensor resid, Tensor? mix, Tensor? skip, "
    "Tensor? weight, Tensor? gate, Tensor? scale, Tensor? row_gate, float eps, bool need_x0, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lanes_backward,
    _fake_lanes_backward,
)


def _save_lanes(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.mean = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@once_differentiable
def _lanes_gradients(ctx: Any, dout0, dout1, dn0, dn1, dx0_next=None):
    _, lane0, _, _, _, post, resid, mix, _, weight, gate, _, row_gate = ctx.saved_tensors
    gradients = [
        (torch.zeros_like(lane0) if kept_gradient(gradient) is None else gradient) if keep else None
        for gradient, keep in zip((dout0, dout1, dn0, dn1), _kept(mix, ctx.mean), strict=True)
    ]
    needs = ctx.needs_input_grad
    need_parameters = any(needs[5:8]) or any(needs[9:11]) or needs[12]
    dx0, *dlanes, dskip, sums = _lanes_backward_op(
        dx0_next, *gradients, *ctx.saved_tensors, ctx.eps, needs[0], need_parameters
    )
    dresid = dpost = dmix = dweight = dgate = drow = None
    if need_parameters:
        dmix, dweight, dgate, drow = parameter_gradients(sums, mix, weight, gate, row_gate)
        dresid, dpost = parameter_gradients(sums[-6:], resid, post)
    return *needed(needs, dx0, *dlanes, dpost, dresid, dmix, dskip, dweight, dgate, None, drow), None, None


_lanes_op = carrying(
    "residual_lanes(Tensor? x0, Tensor lane0, Tensor lane1, Tensor attention, Tensor mlp, Tensor post, Tensor resid, "
    "Tensor? mix, Tensor? skip, Tensor? weight, Tensor? gate, Tensor? scale, Tensor? row_gate, float eps, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lanes_forward,
    lambda *args: empty(args[1], *_kept(args[7], args[-1])),
    _save_lanes,
    _lanes_gradients,
    carried=1,
)


def mix_lanes(
    lane0: Tensor,
    lane1: Tensor,
    attention: Tensor,
    mlp: Tensor,
    post: Tensor,
    resid: Tensor,
    x0: Tensor | None = None,
    mix: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 0.0,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    row_gate: Tensor | None = None,
    mean: bool = False,
) -> tuple[Tensor, ...]:
    """Return (lane 0, lane 1, n0, n1, x0) of `_lanes_kernel`; those not kept are empty. ``mean`` keeps only n0."""
    arguments = x0, lane0, lane1, attention, mlp, post, resid, mix, skip, weight, gate, scale, row_gate, eps, mean
    return _lanes_op(*arguments)
