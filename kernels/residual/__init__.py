"""The residual stream between the matrix products: mixes, joins, lanes, norms, and products that add to it.

    residual_mix_norm     u = mix[0] x + mix[1] x0,  n = scale rms(u);  with a skip, x is first joined with it
    residual_linear       v = residual + x Wᵀ
    residual_linear_norm  the same, and n = scale rms(v)
    join_skip             lerp(weight skip, x, σ(gate)); without a gate x + weight skip
    enter_lanes_norm      lane 0 is x joined with the skip, lane 1 is x, and the norms n0 and n1 of a parallel layer
    mix_lanes             lane_j' = resid[j] lane_j + post[0, j] attention + post[1, j] mlp
    mix_lanes_norm        the same, and the next layer's `enter_lanes_norm` of both lanes
    mix_lanes_final       the same and the final norm, rms of the lanes' mean
    scaled_rms_norm       scale rms(x), or scale rms(0.5 (x + other))

with rms(u) = u / sqrt(mean(u²) + eps) over the last dimension. The norm of an MLP's input v, which is the n of
`residual_linear_norm` or n1, takes a ``row_gate`` [k + 1], 1 <= k < d. Each row of it is then scaled by
σ(row_gate[:k] · v[:k] + row_gate[k])^½. An MLP of leaky_relu² is homogeneous of degree 2 in its input, so that this
gates its output by σ. Activations are [..., d] of one dtype (bfloat16,
float16, float32 or float64), parameters of any of these; scale is one element on the device and has no gradient.

Each op except the products reads its inputs and writes its outputs once, forward and backward. The products are
cuBLAS's and add to the residual. A residual that must not be overwritten is copied first, two passes over memory;
``inplace`` permits overwriting it. The norms therefore keep n and 1 / sqrt(mean(v²) + eps) for backward instead of v. A
scale of a product's outputs is a scale of its weight's rows: `layer_weights` applies it to the weights of all layers.

If two ops read the same tensor, autograd adds their gradients in a separate kernel: three passes over memory. To avoid
this, an op also returns its inputs (`Mixed.x`, `Mixed.x0`, `Lanes.x0`). Pass the returned tensor to later readers:
their gradient is then added by the kernel that writes this op's gradient. Under torch.compile the inputs are returned
unchanged.

An input that requires no gradient is returned unchanged. Backward then neither reads nor writes a gradient of x0, or of
the x of `residual_mix_norm` and `enter_lanes_norm`. If no parameter of an op requires a gradient, backward computes no
sums for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..common import RMS_EPS
from ..common.backend import select
from . import lanes, triton
from .reference import (
    Lanes,
    Mixed,
    enter_lanes_norm_reference,
    join_skip_reference,
    mix_lanes_final_reference,
    mix_lanes_norm_reference,
    mix_lanes_reference,
    residual_linear_norm_reference,
    residual_linear_reference,
    residual_mix_norm_reference,
    scaled_rms_norm_reference,
)

Tensor = torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _mix_norm_triton(x, x0, mix, scale, eps, *, skip, weight, gate) -> Mixed:
    _, u, n, _, x, x0 = triton.mix_stream(
        x, x0, mix, scale, eps, skip=skip, weight=weight, gate=gate, keep_u=True, keep_n=True
    )
    return Mixed(u, n, x if skip is None else None, x0)


def _join_skip_triton(x, skip, weight, gate) -> Tensor:
    return triton.mix_stream(x, skip=skip, weight=weight, gate=gate, keep_joined=True)[0]


def _enter_lanes_triton(x, x0, mix, scale, eps, *, skip, weight, gate, row_gate) -> Lanes:
    join = dict(skip=skip, weight=weight, gate=gate, row_gate=row_gate, keep_joined=skip is not None)
    joined, _, n0, n1, x, x0 = triton.mix_stream(x, x0, mix, scale, eps, **join, keep_n=True, keep_n1=True)
    return Lanes(x if skip is None else joined, x, n0, n1, x0)


def _mix_lanes_triton(lane0, lane1, attention, mlp, post, resid) -> tuple[Tensor, Tensor]:
    lane0, lane1, *_ = lanes.mix_lanes(lane0, lane1, attention, mlp, post, resid)
    return lane0, lane1


def _mix_lanes_norm_triton(*args, **options) -> Lanes:
    return Lanes(*lanes.mix_lanes(*args, **options))


def _mix_lanes_final_triton(lane0, lane1, attention, mlp, post, resid, eps) -> Tensor:
    return lanes.mix_lanes(lane0, lane1, attention, mlp, post, resid, eps=eps, mean=True)[2]


_Implementations = Mapping[str, Callable]
_MIX_NORM: _Implementations = {"reference": residual_mix_norm_reference, "triton": _mix_norm_triton}
_JOIN_SKIP: _Implementations = {"reference": join_skip_reference, "triton": _join_skip_triton}
_NORM: _Implementations = {"reference": scaled_rms_norm_reference, "triton": triton.norm_rows}
_ENTER_LANES: _Implementations = {"reference": enter_lanes_norm_reference, "triton": _enter_lanes_triton}
_LANES: _Implementations = {"reference": mix_lanes_reference, "triton": _mix_lanes_triton}
_LANES_NORM: _Implementations = {"reference": mix_lanes_norm_reference, "triton": _mix_lanes_norm_triton}
_LANES_FINAL: _Implementations = {"reference": mix_lanes_final_reference, "triton": _mix_lanes_final_triton}
_LINEAR: _Implementations = {"reference": residual_linear_reference, "triton": triton.linear}
_LINEAR_NORM: _Implementations = {"reference": residual_linear_norm_reference, "triton": triton.linear_norm}


def _same(argument: str, tensor: Tensor, name: str, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{argument} must have {name}'s dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{argument} must be on {name}'s device {x.device}, got {tensor.device}")


def _check(activations: dict[str, Tensor | None], parameters: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise unless activations are like the first one, and parameters have the shapes given; () means one element."""
    (name, x), *rest = ((name, tensor) for name, tensor in activations.items() if tensor is not None)
    if not x.ndim:
        raise ValueError(f"{name} must be [..., d], got a scalar")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    for argument, tensor in rest:
        if tensor.shape != x.shape:
            raise ValueError(f"{argument} must have {name}'s shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
        _same(argument, tensor, name, x)
    for argument, (parameter, shape) in parameters.items():
        if parameter is None:
            continue
        if shape and parameter.shape != shape:
            raise ValueError(f"{argument} must have shape {tuple(shape)}, got {tuple(parameter.shape)}")
        if not shape and parameter.numel() != 1:
            raise ValueError(f"{argument} must be one element, got shape {tuple(parameter.shape)}")
        if parameter.dtype not in _DTYPES:
            raise TypeError(f"{argument} must be bfloat16, float16, float32 or float64, got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{argument} must be on {name}'s device {x.device}, got {parameter.device}")


def residual_mix_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> Mixed:
    """Compute u = mix[0] x + mix[1] x0 and n = scale rms(u), with x first joined with ``skip`` if given.

    x, x0 and skip are [..., d], mix is [2, d], scale one element, weight and gate are [d] as in `join_skip`.
    Differentiable once in all of them except scale. Returns a `Mixed`; pass its x (if there is no skip) and x0 to later
    readers, see the module's docstring.

    Raises ValueError for a wrong shape or device or a skip without a weight, TypeError for a wrong dtype.
    """
    _check({"x": x, "x0": x0, "skip": skip}, {"mix": (mix, (2, *x.shape[-1:])), "scale": (scale, ())})
    _check_join(x, skip, weight, gate)
    chosen = select("residual_mix_norm", _MIX_NORM, x)
    return chosen(x, x0, mix, scale, eps, skip=skip, weight=weight, gate=gate)


def _check_join(x: Tensor, skip: Tensor | None, weight: Tensor | None, gate: Tensor | None) -> None:
    if (skip is None) != (weight is None) or (skip is None and gate is not None):
        raise ValueError("skip and weight go together, and gate with them")
    _check({"x": x, "skip": skip}, {"weight": (weight, x.shape[-1:]), "gate": (gate, x.shape[-1:])})


def _check_row_gate(x: Tensor, row_gate: Tensor | None, width: int) -> None:
    if row_gate is not None:
        if row_gate.ndim != 1 or not 2 <= row_gate.numel() <= width:
            raise ValueError(f"row_gate must be [k + 1] with 1 <= k < {width}, got shape {tuple(row_gate.shape)}")
        _check({"x": x}, {"row_gate": (row_gate, row_gate.shape)})


def join_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """Compute lerp(weight skip, x, σ(gate)), or x + weight skip without a gate.

    x and skip are [..., d], weight and gate are [d]. Differentiable once in all. Raises ValueError for a wrong shape or
    device, TypeError for a wrong dtype.
    """
    _check_join(x, skip, weight, gate)
    return select("join_skip", _JOIN_SKIP, x)(x, skip, weight, gate)


def scaled_rms_norm(
    x: Tensor, scale: Tensor | None = None, other: Tensor | None = None, eps: float = RMS_EPS
) -> Tensor:
    """Compute scale rms(x), or scale rms(0.5 (x + other)) if ``other`` is given; scale is 1 if None.

    x and other are [..., d]. Differentiable once in both. Raises ValueError for a wrong shape or device, TypeError for
    a wrong dtype.
    """
    _check({"x": x, "other": other}, {"scale": (scale, ())})
    return select("scaled_rms_norm", _NORM, x)(x, scale, other, eps)


def enter_lanes_norm(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    row_gate: Tensor | None = None,
) -> Lanes:
    """Split one stream into two lanes and compute the norms that the first parallel layer reads, in one pass.

    Lane 0 is x joined with ``skip`` as by `join_skip`, or x without one; lane 1 is x. The norms are
    n0 = scale rms(mix[0] lane0 + mix[1] x0) and n1 = scale rms(x), gated by ``row_gate`` if given. Arguments and errors
    are those of `residual_mix_norm`. Returns a `Lanes`; pass its lane1 (in place of x) and x0 to later readers.
    """
    _check({"x": x, "x0": x0, "skip": skip}, {"mix": (mix, (2, *x.shape[-1:])), "scale": (scale, ())})
    _check_join(x, skip, weight, gate)
    _check_row_gate(x, row_gate, x.size(-1))
    chosen = select("enter_lanes_norm", _ENTER_LANES, x)
    return chosen(x, x0, mix, scale, eps, skip=skip, weight=weight, gate=gate, row_gate=row_gate)


def _check_lanes(lane0, lane1, attention, mlp, post, resid) -> None:
    activations = {"lane0": lane0, "lane1": lane1, "attention": attention, "mlp": mlp}
    _check(activations, {"post": (post, (2, 2)), "resid": (resid, (2,))})


def mix_lanes(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute lane_j' = resid[j] lane_j + post[0, j] attention + post[1, j] mlp for both lanes j.

    lane0, lane1, attention and mlp are [..., d], post is [2 sources, 2 lanes], resid is [2]. Differentiable once in
    all. Returns both lanes. Raises ValueError for a wrong shape or device, TypeError for a wrong dtype.
    """
    _check_lanes(lane0, lane1, attention, mlp, post, resid)
    return select("mix_lanes", _LANES, lane0)(lane0, lane1, attention, mlp, post, resid)


def mix_lanes_norm(
    lane0: Tensor,
    lane1: Tensor,
    attention: Tensor,
    mlp: Tensor,
    post: Tensor,
    resid: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    row_gate: Tensor | None = None,
) -> Lanes:
    """Compute `mix_lanes` and the norms that the next parallel layer reads, in one pass.

    Lane 0 is then joined with ``skip`` as by `join_skip`, if given. The norms are
    n0 = scale rms(mix[0] lane0 + mix[1] x0) and n1 = scale rms(lane1), gated by ``row_gate`` if given. Arguments and
    errors are those of `mix_lanes` and `residual_mix_norm`. Returns a `Lanes`; pass its x0 to later readers.
    """
    _check_lanes(lane0, lane1, attention, mlp, post, resid)
    _check({"lane0": lane0, "x0": x0}, {"mix": (mix, (2, *lane0.shape[-1:])), "scale": (scale, ())})
    _check_join(lane0, skip, weight, gate)
    _check_row_gate(lane0, row_gate, lane0.size(-1))
    arguments, join = (lane0, lane1, attention, mlp, post, resid, x0, mix, scale, eps), dict(weight=weight, gate=gate)
    return select("mix_lanes_norm", _LANES_NORM, lane0)(*arguments, skip=skip, **join, row_gate=row_gate)


def mix_lanes_final(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor, eps: float = RMS_EPS
) -> Tensor:
    """Compute rms of the mean of both lanes after `mix_lanes`, without storing the lanes.

    Arguments and errors are those of `mix_lanes`. Returns [..., d].
    """
    _check_lanes(lane0, lane1, attention, mlp, post, resid)
    return select("mix_lanes_final", _LANES_FINAL, lane0)(lane0, lane1, attention, mlp, post, resid, eps)


def _check_linear(residual, x, weight, scale) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must be [d, k], got shape {tuple(weight.shape)}")
    _check({"x": x}, {"weight": (weight, (weight.size(0), *x.shape[-1:])), "scale": (scale, ())})
    if residual is not None:
        expected = (*x.shape[:-1], weight.size(0))
        if residual.shape != expected:
            raise ValueError(f"residual must have shape {expected}, got {tuple(residual.shape)}")
        _same("residual", residual, "x", x)


def residual_linear(residual: Tensor | None, x: Tensor, weight: Tensor, *, inplace: bool = False) -> Tensor:
    """Compute residual + x weightᵀ, or x weightᵀ if residual is None.

    residual is [..., d], x is [..., k], weight is [d, k]. Differentiable once in all. ``inplace`` permits overwriting
    the residual, as PyTorch's in-place operations do. Returns [..., d] in x's dtype. Raises ValueError for a wrong
    shape or device, TypeError for a wrong dtype.
    """
    _check_linear(residual, x, weight, None)
    return select("residual_linear", _LINEAR, x)(residual, x, weight, inplace=inplace)


def residual_linear_norm(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    row_gate: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute v = residual + x weightᵀ and n = scale rms(v), gated by ``row_gate`` if given, and return both.

    Arguments and errors are those of `residual_linear`; scale is one element and has no gradient.
    """
    _check_linear(residual, x, weight, scale)
    _check_row_gate(x, row_gate, weight.size(0))
    chosen = select("residual_linear_norm", _LINEAR_NORM, x)
    return chosen(residual, x, weight, scale, eps, row_gate=row_gate, inplace=inplace)


__all__ = [
    "Lanes",
    "Mixed",
    "enter_lanes_norm",
    "enter_lanes_norm_reference",
    "join_skip",
    "join_skip_reference",
    "mix_lanes",
    "mix_lanes_final",
    "mix_lanes_final_reference",
    "mix_lanes_norm",
    "mix_lanes_norm_reference",
    "mix_lanes_reference",
    "residual_linear",
    "residual_linear_norm",
    "residual_linear_norm_reference",
    "residual_linear_reference",
    "residual_mix_norm",
    "residual_mix_norm_reference",
    "scaled_rms_norm",
    "scaled_rms_norm_reference",
]
