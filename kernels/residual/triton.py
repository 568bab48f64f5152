"""The kernels of `residual` on one stream (mixes, joins, norms), its products, and their operators and derivatives.

Outputs that are not kept are empty tensors, since an operator has a fixed number of results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.launch import accumulator
from ..common.operators import carrying, may_overwrite, operator, overwriting
from .rows import (
    add_n1_gradient,
    contiguous,
    empty,
    empty_sums,
    gate_columns,
    gated_norm_gradient,
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


@jit(do_not_specialize=("rows", "chunk"))
def _residual_kernel(
    x,
    x0,
    mix,
    skip,
    weight,
    gate,
    scale,
    row_gate,
    joined,
    u,
    n,
    n1,
    rstd,
    rows,
    chunk,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    K: tl.constexpr,
):
    """joined = join(x, skip); u = mix[0] joined + mix[1] x0; n = scale rms(u); n1 = scale rms(x).

    Without mix, u is the mean of joined and x0; without x0, u is joined. rstd is 1 / sqrt(mean(u²) + EPS). With
    row_gate, n1, or n if there is rstd, is scaled by the roots of the rows' gates, which then follow in rstd.
    """
    columns, inside = row_columns(D, BLOCK)
    w, sigma = load_vector(weight, columns, inside, ACC), load_gate(gate, columns, inside, ACC)
    first, second, factor = 0.5, 0.5, load_scalar(scale, ACC)
    if mix is not None:
        first, second = load(mix, columns, inside, ACC), load(mix + D, columns, inside, ACC)
    row = load_row_gate(row_gate, columns, K, ACC)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        value = load(x, offsets, inside, ACC)
        if n1 is not None:
            scaling = inverse_rms(value, EPS, D) * factor
            if row_gate is not None:
                scaling *= row_root(value, row, columns, K)
            store(n1, offsets, inside, value * scaling)
        if skip is not None:
            value = join(value, load(skip, offsets, inside, ACC), w, sigma, gate is not None)
            if joined is not None:
                store(joined, offsets, inside, value)
        if x0 is not None:
            value = first * value + second * load(x0, offsets, inside, ACC)
            if u is not None:
                store(u, offsets, inside, value)
        if n is not None:
            inverse = inverse_rms(value, EPS, D)
            scaling = inverse * factor
            if rstd is not None and row_gate is not None:
                root = row_root(value, row, columns, K)
                tl.store(rstd + rows + base + i, root)
                scaling *= root
            store(n, offsets, inside, value * scaling)
            if rstd is not None:
                tl.store(rstd + base + i, inverse)


@jit(do_not_specialize=("rows", "chunk"))
def _residual_backward_kernel(
    djoined,
    du,
    dn,
    dn1,
    dx_next,
    dx0_next,
    x,
    x0,
    mix,
    skip,
    weight,
    gate,
    scale,
    row_gate,
    rstd,
    dx,
    dx0,
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
    HALF: tl.constexpr,
    X0_IS_X: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The backward of `_residual_kernel`. dx_next is added to dx, and dx0_next to dx0.

    If rstd is given, x holds the normalised output n (the inputs were not saved). With X0_IS_X the gradient of x0 is
    added to that of x; so is the gradient of a skip without dskip. HALF halves dx, for either input of a mean.
    """
    columns, inside = row_columns(D, BLOCK)
    zeros = tl.zeros((BLOCK,), ACC)
    w, sigma, factor = (
        load_vector(weight, columns, inside, ACC),
        load_gate(gate, columns, inside, ACC),
        load_scalar(scale, ACC),
    )
    row = load_row_gate(row_gate, columns, K, ACC)
    weight_sum, gate_sum, first_sum, second_sum, row_sum = zeros, zeros, zeros, zeros, zeros
    if mix is not None:
        first, second = load(mix, columns, inside, ACC), load(mix + D, columns, inside, ACC)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        value = load(x, offsets, inside, ACC)
        joined = value
        if skip is not None:
            skipped = load(skip, offsets, inside, ACC)
            joined = join(value, skipped, w, sigma, gate is not None)
        u = joined
        if mix is not None:
            value0 = load(x0, offsets, inside, ACC)
            u = first * joined + second * value0
        g = load(du, offsets, inside, ACC) if du is not None else zeros
        if dn is not None:
            if rstd is not None and row_gate is not None:
                dy, inverse, root = (
                    load(dn, offsets, inside, ACC),
                    tl.load(rstd + base + i),
                    tl.load(rstd + rows + base + i),
                )
                normed = u * tl.where(factor * root == 0, 0, 1 / (factor * root))
                part, row_part = gated_norm_gradient(
                    dy, normed / inverse, normed, inverse, factor, root, row, columns, K, D
                )
                g += part
                row_sum += row_part
            else:
                if rstd is not None:
                    inverse = tl.load(rstd + base + i)
                    normed = u if scale is None else u * tl.where(factor == 0, 0, 1 / factor)
                else:
                    inverse = inverse_rms(u, EPS, D)
                    normed = u * inverse
                g += norm_gradient(load(dn, offsets, inside, ACC), normed, factor * inverse, D)
        if mix is not None:
            if partials is not None:
                first_sum += g * joined
                second_sum += g * value0
            if X0_IS_X or dx0 is not None:
                result = second * g
                if dx0_next is not None:
                    result += load(dx0_next, offsets, inside, ACC)
                if dx0 is not None:
                    store(dx0, offsets, inside, result)
            g *= first
        if djoined is not None:
            g += load(djoined, offsets, inside, ACC)
        if skip is not None:
            g, passed, part, gate_part = join_gradient(g, value, skipped, w, sigma, gate is not None)
            if partials is not None:
                weight_sum += part
                gate_sum += gate_part
            if dskip is not None:
                store(dskip, offsets, inside, passed)
            else:
                g += passed
        if dn1 is not None:
            g, row_sum = add_n1_gradient(
                g, row_sum, load(dn1, offsets, inside, ACC), value, factor, row_gate, row, columns, EPS, K, D
            )
        if dx_next is not None:
            g += load(dx_next, offsets, inside, ACC)
        if X0_IS_X:
            g += result
        if dx is not None:
            store(dx, offsets, inside, 0.5 * g if HALF else g)
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * WIDTH
        store_sums(
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


def _case(mix: Tensor | None, skip: Tensor | None, direction: str) -> str:
    return "join_" * (skip is not None) + "mix_" * (mix is not None) + direction


def mix_forward(
    x: Tensor,
    x0: Tensor | None,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    row_gate: Tensor | None,
    eps: float,
    keep_joined: bool = False,
    keep_u: bool = False,
    keep_n: bool = False,
    keep_n1: bool = False,
) -> tuple[Tensor, ...]:
    """Return (joined, u, n, n1) of `_residual_kernel`; those not kept are empty."""
    outputs = empty(x, keep_joined, keep_u, keep_n, keep_n1)
    if x.numel():
        grid, extent, settings = plan(_case(mix, skip, "forward"), x)
        inputs = contiguous(x, x0, mix, skip, weight, gate, scale, row_gate)
        settings["K"] = gate_columns(row_gate)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _residual_kernel[grid](*inputs, *map(pointer, outputs), None, *extent, EPS=eps, **settings)
    return outputs


def mix_backward(
    djoined: Tensor | None,
    du: Tensor | None,
    dn: Tensor | None,
    dn1: Tensor | None,
    dx_next: Tensor | None,
    dx0_next: Tensor | None,
    x: Tensor,
    x0: Tensor | None,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    row_gate: Tensor | None,
    eps: float,
    x0_is_x: bool = False,
    skip_is_x: bool = False,
    need_x: bool = True,
    need_x0: bool = True,
    need_parameters: bool = True,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, x0 and skip, and the flat gradient of mix, weight, gate and row_gate, of those that
    are given.

    dx_next and dx0_next are added. A gradient that is not needed is empty; so is that of an x0 or skip that is the
    tensor x, which is part of x's.
    """
    width = sums_width(x, mix, skip, gate, row_gate) if need_parameters else 0
    outputs = empty(x, need_x, need_x0 and x0 is not None and not x0_is_x, skip is not None and not skip_is_x)
    if not x.numel():
        return *outputs, x.new_zeros(width, dtype=accumulator(x))
    grid, extent, settings = plan(_case(mix, skip, "backward"), x)
    partials = x.new_empty(*grid, width, dtype=accumulator(x)) if need_parameters else None
    inputs = contiguous(djoined, du, dn, dn1, dx_next, dx0_next, x, x0, mix, skip, weight, gate, scale, row_gate)
    with torch.cuda.device_of(x):
        _residual_backward_kernel[grid](
            *inputs,
            None,
            *map(pointer, outputs),
            partials,
            *extent,
            EPS=eps,
            K=gate_columns(row_gate),
            HALF=False,
            X0_IS_X=x0_is_x,
            WIDTH=width,
            **settings,
        )
    return *outputs, total(partials, x)


def _row_sizes(x: Tensor, row_gate: Tensor | None) -> tuple[int, ...]:
    """Return the shape of what a norm keeps of x's rows."""
    return x.shape[:-1] if row_gate is None else (2, *x.shape[:-1])


def norm_forward(
    x: Tensor, other: Tensor | None, scale: Tensor | None, eps: float, row_gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return n = scale rms(x), or of the mean of x and other, and each row's 1 / sqrt(mean(x²) + eps).

    With row_gate, n is scaled by the roots of the rows' gates, and these are returned behind the latter.
    """
    n, rstd = x.new_empty(x.shape), empty_sums(x, *_row_sizes(x, row_gate))
    if x.numel():
        grid, extent, settings = plan("norm_forward", x)
        inputs, none = contiguous(x, other), (None,) * 4
        settings["K"] = gate_columns(row_gate)
        with torch.cuda.device_of(x):
            _residual_kernel[grid](
                *inputs, *none, scale, row_gate, None, None, n, None, rstd, *extent, EPS=eps, **settings
            )
    return n, rstd


def norm_backward(
    dx_next: Tensor | None,
    dn: Tensor,
    n: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    row_gate: Tensor | None,
    mean: bool = False,
    need_parameters: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return dx_next plus the gradient of the norm's input, and that of row_gate, empty if not needed.

    With ``mean`` the former is half of it, for either input of the mean.
    """
    dx, width = n.new_empty(n.shape), sums_width(n, None, None, None, row_gate) if need_parameters else 0
    if not n.numel():
        return dx, n.new_zeros(width, dtype=accumulator(n))
    grid, extent, settings = plan("mix_backward" if width else "norm_backward", n)  # the former has sums, too
    partials = n.new_empty(*grid, width, dtype=accumulator(n)) if width else None
    du, dn_rows, n_rows, rstd_rows = contiguous(dx_next, dn, n, rstd)
    with torch.cuda.device_of(n):
        _residual_backward_kernel[grid](
            djoined=None,
            du=du,
            dn=dn_rows,
            dn1=None,
            dx_next=None,
            dx0_next=None,
            x=n_rows,
            x0=None,
            mix=None,
            skip=None,
            weight=None,
            gate=None,
            scale=scale,
            row_gate=row_gate,
            rstd=rstd_rows,
            dx=dx,
            dx0=None,
            dskip=None,
            partials=partials,
            rows=extent[0],
            chunk=extent[1],
            EPS=0.0,
            K=gate_columns(row_gate),
            HALF=mean,
            X0_IS_X=False,
            WIDTH=width,
            **settings,
        )
    return dx, total(partials, n)


# --- Operators and derivatives ---


def _fake_mix_backward(*args: Any) -> tuple[Tensor, ...]:
    x, x0, mix, skip, _, gate, _, row_gate = args[6:14]
    x0_is_x, skip_is_x, need_x, need_x0, need_parameters = args[15:]
    outputs = empty(x, need_x, need_x0 and x0 is not None and not x0_is_x, skip is not None and not skip_is_x)
    return *outputs, empty_sums(x, sums_width(x, mix, skip, gate, row_gate) if need_parameters else 0)


_mix_backward_op = operator(
    "residual_mix_backward(Tensor? djoined, Tensor? du, Tensor? dn, Tensor? dn1, Tensor? dx_next, Tensor? dx0_next, "
    "Tensor x, Tensor? x0, Tensor? mix, Tensor? skip, Tensor? weight, Tensor? gate, Tensor? scale, Tensor? row_gate, "
    "float eps, bool x0_is_x, bool skip_is_x, bool need_x, bool need_x0, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    mix_backward,
    _fake_mix_backward,
)


_norm_backward_op = operator(
    "residual_norm_backward(Tensor? dx_next, Tensor dn, Tensor n, Tensor rstd, Tensor? scale, Tensor? row_gate, "
    "bool mean, bool need_parameters) -> (Tensor, Tensor)",
    norm_backward,
    lambda dx_next, dn, n, rstd, scale, row_gate, mean, need_parameters: (
        n.new_empty(n.shape),
        empty_sums(n, sums_width(n, None, None, None, row_gate) if need_parameters else 0),
    ),
)


def _save_mix(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs[:9]
    x, x0, _, skip, *_ = tensors
    ctx.same = x0 is x, skip is x
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@once_differentiable
def _mix_gradients(
    ctx: Any,
    djoined: Tensor | None,
    du: Tensor | None,
    dn: Tensor | None,
    dn1: Tensor | None,
    dx_next: Tensor | None = None,
    dx0_next: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    x, x0, mix, skip, weight, gate, _, row_gate = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_parameters = needs[2] or any(needs[4:6]) or needs[7]
    gradients = *map(kept_gradient, (djoined, du, dn, dn1)), dx_next, dx0_next
    dx, dx0, dskip, sums = _mix_backward_op(
        *gradients, *ctx.saved_tensors, ctx.eps, *ctx.same, *needs[:2], need_parameters
    )
    dmix, dweight, dgate, drow = (
        parameter_gradients(sums, mix, weight, gate, row_gate) if need_parameters else (None,) * 4
    )
    dx0, dskip = (None if same else gradient for gradient, same in zip((dx0, dskip), ctx.same, strict=True))
    return *needed(needs, dx, dx0, dmix, dskip, dweight, dgate, None, drow), *(None,) * 5


def _save_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, other, scale, _ = inputs
    ctx.save_for_backward(*output, scale)
    ctx.mean = other is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable
def _norm_gradients(ctx: Any, dn: Tensor | None, drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    n, rstd, scale = ctx.saved_tensors
    need_parameters = False  # without a row gate there are none
    dx = None if dn is None else _norm_backward_op(None, dn, n, rstd, scale, None, ctx.mean, need_parameters)[0]
    return dx, dx if ctx.mean else None, None, None


_mix_op = carrying(
    "residual_mix(Tensor x, Tensor? x0, Tensor? mix, Tensor? skip, Tensor? weight, Tensor? gate, Tensor? scale, "
    "Tensor? row_gate, float eps, bool keep_joined, bool keep_u, bool keep_n, bool keep_n1) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    mix_forward,
    lambda *args: empty(args[0], *args[9:]),
    _save_mix,
    _mix_gradients,
    carried=2,
)


_norm_op = operator(
    "residual_norm(Tensor x, Tensor? other, Tensor? scale, float eps) -> (Tensor, Tensor)",
    norm_forward,
    lambda x, other, scale, eps: (x.new_empty(x.shape), empty_sums(x, *x.shape[:-1])),
    setup_context=_save_norm,
    backward=_norm_gradients,
)


def mix_stream(
    x: Tensor,
    x0: Tensor | None = None,
    mix: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 0.0,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    row_gate: Tensor | None = None,
    keep_joined: bool = False,
    keep_u: bool = False,
    keep_n: bool = False,
    keep_n1: bool = False,
) -> tuple[Tensor, ...]:
    """Return (joined, u, n, n1, x, x0) of `_residual_kernel`; those not kept are empty."""
    return _mix_op(x, x0, mix, skip, weight, gate, scale, row_gate, eps, keep_joined, keep_u, keep_n, keep_n1)


def norm_rows(x: Tensor, scale: Tensor | None, other: Tensor | None, eps: float) -> Tensor:
    """Compute `scaled_rms_norm`."""
    return _norm_op(x, other, scale, eps)[0]


# --- Products ---


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product a b in a's dtype, also under autocast."""
    return torch.mm(a, b.to(a.dtype), out=a.new_empty(a.size(0), b.size(1)))


def _linear(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    row_gate: Tensor | None,
    eps: float,
    norm: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (v, n, rstd); n and rstd are empty without ``norm``."""
    rows = x.reshape(-1, x.size(-1))
    if residual is None:
        v = _product(rows, weight.T).view(*x.shape[:-1], weight.size(0))
    else:
        v = residual if inplace else residual.clone(memory_format=torch.contiguous_format)
        v.view(-1, v.size(-1)).addmm_(rows, weight.T.to(x.dtype))
    if norm:
        return v, *norm_forward(v, None, scale, eps, row_gate)
    return v, x.new_empty(0), empty_sums(x, 0)


def _linear_backward(dv: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, empty if not needed."""
    dv, rows = dv.reshape(-1, dv.size(-1)), x.reshape(-1, x.size(-1))
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if need_x:
        dx = _product(dv, weight).view(x.shape)
    if need_weight:
        dweight = _product(dv.T, rows).to(weight.dtype)
    return dx, dweight


_linear_backward_op = operator(
    "residual_linear_backward(Tensor dv, Tensor x, Tensor weight, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    _linear_backward,
    lambda dv, x, weight, *needs: tuple(
        t.new_empty(t.shape if need else 0) for t, need in zip((x, weight), needs, strict=True)
    ),
)


def _save_linear(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    residual, x, weight, scale, row_gate, *_ = inputs
    _, n, rstd = output
    ctx.save_for_backward(x, weight, scale, row_gate, n, rstd)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


@once_differentiable
def _linear_gradients(
    ctx: Any, dv: Tensor | None, dn: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, scale, row_gate, n, rstd = ctx.saved_tensors
    *needs, _, need_row = ctx.needs_input_grad[1:5]
    drow = None
    if (dn := kept_gradient(dn)) is None:
        drow = torch.zeros_like(row_gate) if need_row else None
    else:
        mean = False  # the norm is of one stream
        dv, sums = _norm_backward_op(dv, dn, n, rstd, scale, row_gate, mean, need_row)
        (drow,) = parameter_gradients(sums, row_gate if need_row else None)
    if dv is None:
        return (None,) * 7
    gradients = _linear_backward_op(dv, x, weight, *needs)
    return dv if ctx.has_residual else None, *needed(needs, *gradients), None, drow, None, None


_linear_op = operator(
    "residual_linear(Tensor? residual, Tensor x, Tensor weight, Tensor? scale, Tensor? row_gate, float eps, bool norm) "
    "-> (Tensor, Tensor, Tensor)",
    _linear,
    lambda residual, x, weight, scale, row_gate, eps, norm: (
        v := x.new_empty(*x.shape[:-1], weight.size(0)),
        v.new_empty(v.shape if norm else 0),
        empty_sums(x, *(_row_sizes(x, row_gate) if norm else (0,))),
    ),
    setup_context=_save_linear,
    backward=_linear_gradients,
)


_linear_inplace = overwriting(_linear, _save_linear, _linear_gradients)


def linear(residual: Tensor | None, x: Tensor, weight: Tensor, *, inplace: bool = False) -> Tensor:
    """Compute `residual_linear`."""
    return _call_linear((residual, x, weight, None, None, 0.0, False), inplace)[0]


def linear_norm(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float,
    *,
    row_gate: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `residual_linear_norm`."""
    v, n, _ = _call_linear((residual, x, weight, scale, row_gate, eps, True), inplace)
    return v, n


def _call_linear(args: tuple, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator of both products; ``inplace`` overwrites the residual if it may be."""
    return (_linear_inplace if inplace and may_overwrite(args) else _linear_op)(*args)
