"""The operators of `residual` and their derivatives; formulas and shapes are there.

Outputs that are not wanted are empty: an operator's number of results is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _residual_kernels as kernels
from .common.operators import carrying, may_overwrite, operator, overwriting

Tensor = torch.Tensor


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in a's dtype, autocast or not."""
    return torch.mm(a, b.to(a.dtype), out=a.new_empty(a.size(0), b.size(1)))


def _linear(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    eps: float,
    norm: bool,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(v, n, rstd); n and rstd are empty without the norm."""
    rows = x.reshape(-1, x.size(-1))
    if residual is None:
        v = _product(rows, weight.T).view(*x.shape[:-1], weight.size(0))
    else:
        v = residual if inplace else residual.clone(memory_format=torch.contiguous_format)
        v.view(-1, v.size(-1)).addmm_(rows, weight.T.to(x.dtype))
    if norm:
        return v, *kernels.norm_forward(v, None, scale, eps)
    return v, x.new_empty(0), x.new_empty(0, dtype=kernels.accumulator(x))


def _linear_backward(dv: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, empty where not needed."""
    dv, rows = dv.reshape(-1, dv.size(-1)), x.reshape(-1, x.size(-1))
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if need_x:
        dx = _product(dv, weight).view(x.shape)
    if need_weight:
        dweight = _product(dv.T, rows).to(weight.dtype)
    return dx, dweight


def _empty(x: Tensor, *kept: bool) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape if keep else 0) for keep in kept)


def _sums(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=kernels.accumulator(x))


def _fake_mix_backward(*arguments) -> tuple[Tensor, ...]:
    x, x0, mix, skip, _, gate = arguments[6:12]
    x0_is_x, skip_is_x, need_x, need_x0, need_parameters = arguments[14:]
    outputs = _empty(x, need_x, need_x0 and x0 is not None and not x0_is_x, skip is not None and not skip_is_x)
    return *outputs, _sums(x, kernels.mix_sums(x, mix, skip, gate) if need_parameters else 0)


_mix_backward_op = operator(
    "residual_mix_backward(Tensor? djoined, Tensor? du, Tensor? dn, Tensor? dn1, Tensor? dx_next, Tensor? dx0_next, "
    "Tensor x, Tensor? x0, Tensor? mix, Tensor? skip, Tensor? weight, Tensor? gate, Tensor? scale, float eps, "
    "bool x0_is_x, bool skip_is_x, bool need_x, bool need_x0, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernels.mix_backward,
    _fake_mix_backward,
)
_norm_backward_op = operator(
    "residual_norm_backward(Tensor? dx_next, Tensor dn, Tensor n, Tensor rstd, Tensor? scale, bool mean) -> Tensor",
    kernels.norm_backward,
    lambda dx_next, dn, n, rstd, scale, mean: n.new_empty(n.shape),
)


def _fake_lanes_backward(*arguments) -> tuple[Tensor, ...]:
    lane0, (mix, skip, _, gate), (need_x0, need_parameters) = arguments[6], arguments[12:16], arguments[18:]
    outputs = _empty(lane0, need_x0 and mix is not None, True, True, True, True, skip is not None)
    return *outputs, _sums(lane0, kernels.lanes_sums(lane0, mix, skip, gate) if need_parameters else 0)


_lanes_backward_op = operator(
    "residual_lanes_backward(Tensor? dx0_next, Tensor? dout0, Tensor? dout1, Tensor? dn0, Tensor? dn1, Tensor? x0, "
    "Tensor lane0, Tensor lane1, Tensor attention, Tensor mlp, Tensor post, Tensor resid, Tensor? mix, Tensor? skip, "
    "Tensor? weight, Tensor? gate, Tensor? scale, float eps, bool need_x0, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.lanes_backward,
    _fake_lanes_backward,
)
_linear_backward_op = operator(
    "residual_linear_backward(Tensor dv, Tensor x, Tensor weight, bool need_x, bool need_weight) -> (Tensor, Tensor)",
    _linear_backward,
    lambda dv, x, weight, *needs: tuple(
        t.new_empty(t.shape if need else 0) for t, need in zip((x, weight), needs, strict=True)
    ),
)


def _given(gradient: Tensor | None) -> Tensor | None:
    """None for the gradient of an output that was not kept, which the dispatcher makes zeros."""
    return gradient if gradient is not None and gradient.numel() else None


def _needed(needs: tuple[bool, ...], *gradients: Tensor | None) -> Iterator[Tensor | None]:
    """Replace the gradients of arguments that need none by None."""
    return (gradient if need else None for gradient, need in zip(gradients, needs, strict=False))


def _save_mix(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs[:8]
    x, x0, _, skip, *_ = tensors
    ctx.same = x0 is x, skip is x
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@once_differentiable
def _mix_gradients(ctx, djoined, du, dn, dn1, dx_next=None, dx0_next=None):
    x, x0, mix, skip, weight, gate, scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = needs[0], needs[1], needs[2] or any(needs[4:6])
    gradients = *map(_given, (djoined, du, dn, dn1)), dx_next, dx0_next
    dx, dx0, dskip, sums = _mix_backward_op(*gradients, *ctx.saved_tensors, ctx.eps, *ctx.same, *wanted)
    dmix, *djoin = _parameter_gradients(sums, mix, weight, gate) if wanted[2] else (None,) * 3
    dx0, dskip = (None if same else gradient for gradient, same in zip((dx0, dskip), ctx.same, strict=True))
    return *_needed(needs, dx, dx0, dmix, dskip, *djoin), *(None,) * 6


def _save_norm(ctx, inputs, output) -> None:
    _, other, scale, _ = inputs
    ctx.save_for_backward(*output, scale)
    ctx.mean = other is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable
def _norm_gradients(ctx, dn, drstd):
    n, rstd, scale = ctx.saved_tensors
    dx = None if dn is None else _norm_backward_op(None, dn, n, rstd, scale, ctx.mean)
    return dx, dx if ctx.mean else None, None, None


def _parameter_gradients(sums: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Those of mix, weight and gate, from flat sums."""
    gradients = []
    for parameter in parameters:
        size = 0 if parameter is None else parameter.numel()
        gradients.append(None if parameter is None else sums[:size].view(parameter.shape).to(parameter.dtype))
        sums = sums[size:]
    return gradients


def _save_lanes(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.mean = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@once_differentiable
def _lanes_gradients(ctx, dout0, dout1, dn0, dn1, dx0_next=None):
    _, lane0, _, _, _, post, resid, mix, skip, weight, gate, _ = ctx.saved_tensors
    kept = (not ctx.mean, not ctx.mean, ctx.mean or mix is not None, mix is not None)
    gradients = [
        (torch.zeros_like(lane0) if _given(gradient) is None else gradient) if keep else None
        for gradient, keep in zip((dout0, dout1, dn0, dn1), kept, strict=True)
    ]
    needs = ctx.needs_input_grad
    wanted = needs[0], any(needs[5:8]) or any(needs[9:11])
    dx0, *dlanes, dskip, sums = _lanes_backward_op(dx0_next, *gradients, *ctx.saved_tensors, ctx.eps, *wanted)
    dresid = dpost = dmix = dweight = dgate = None
    if wanted[1]:
        dmix, dweight, dgate = _parameter_gradients(sums, mix, weight, gate)
        dresid, dpost = _parameter_gradients(sums[-6:], resid, post)
    return *_needed(needs, dx0, *dlanes, dpost, dresid, dmix, dskip, dweight, dgate), None, None, None


def _save_linear(ctx, inputs, output) -> None:
    residual, x, weight, scale, *_ = inputs
    _, n, rstd = output
    ctx.save_for_backward(x, weight, scale, n, rstd)
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


@once_differentiable
def _linear_gradients(ctx, dv, dn, drstd):
    x, weight, scale, n, rstd = ctx.saved_tensors
    if (dn := _given(dn)) is not None:
        dv = _norm_backward_op(dv, dn, n, rstd, scale, False)
    if dv is None:
        return (None,) * 6
    needs = ctx.needs_input_grad[1:3]
    gradients = _linear_backward_op(dv, x, weight, *needs)
    return dv if ctx.has_residual else None, *_needed(needs, *gradients), None, None, None


mix_op = carrying(
    "residual_mix(Tensor x, Tensor? x0, Tensor? mix, Tensor? skip, Tensor? weight, Tensor? gate, Tensor? scale, "
    "float eps, bool keep_joined, bool keep_u, bool keep_n, bool keep_n1) -> (Tensor, Tensor, Tensor, Tensor)",
    kernels.mix_forward,
    lambda x, x0, mix, skip, weight, gate, scale, eps, *keep: _empty(x, *keep),
    _save_mix,
    _mix_gradients,
    carried=2,
)
norm_op = operator(
    "residual_norm(Tensor x, Tensor? other, Tensor? scale, float eps) -> (Tensor, Tensor)",
    kernels.norm_forward,
    lambda x, other, scale, eps: (x.new_empty(x.shape), _sums(x, *x.shape[:-1])),
    setup_context=_save_norm,
    backward=_norm_gradients,
)


def _fake_lanes(*arguments) -> tuple[Tensor, ...]:
    mean, norm = arguments[-1], arguments[7] is not None
    return _empty(arguments[1], not mean, not mean, mean or norm, norm)


lanes_op = carrying(
    "residual_lanes(Tensor? x0, Tensor lane0, Tensor lane1, Tensor attention, Tensor mlp, Tensor post, Tensor resid, "
    "Tensor? mix, Tensor? skip, Tensor? weight, Tensor? gate, Tensor? scale, float eps, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernels.lanes_forward,
    _fake_lanes,
    _save_lanes,
    _lanes_gradients,
    carried=1,
)
_linear_op = operator(
    "residual_linear(Tensor? residual, Tensor x, Tensor weight, Tensor? scale, float eps, bool norm) "
    "-> (Tensor, Tensor, Tensor)",
    _linear,
    lambda residual, x, weight, scale, eps, norm: (
        v := x.new_empty(*x.shape[:-1], weight.size(0)),
        v.new_empty(v.shape if norm else 0),
        _sums(x, *(x.shape[:-1] if norm else (0,))),
    ),
    setup_context=_save_linear,
    backward=_linear_gradients,
)


_linear_inplace = overwriting(_linear, _save_linear, _linear_gradients)


def linear(*args: Any, inplace: bool = False) -> tuple[Tensor, ...]:
    """The operator of both products; ``inplace`` writes onto the residual where it can."""
    return (_linear_inplace if inplace and may_overwrite(args) else _linear_op)(*args)
