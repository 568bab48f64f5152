"""The residual stream between the matrix products: mixes, joins, lanes, norms, and products that add onto it.

    residual_mix_norm     u = mix[0] x + mix[1] x0,  n = scale rms(u);  with a skip, x is first joined with it
    residual_linear       v = residual + x Wᵀ
    residual_linear_norm  the same, and n = scale rms(v)
    join_skip             lerp(weight skip, x, σ(gate)); without a gate x + weight skip
    enter_lanes_norm      lane 0 is x joined with the skip, lane 1 is x, and the norms n0 and n1 of a parallel layer
    mix_lanes             lane_j' = resid[j] lane_j + post[0, j] attention + post[1, j] mlp
    mix_lanes_norm        the same, and the next layer's `enter_lanes_norm` of both lanes
    mix_lanes_final       the same and the final norm, rms of the lanes' mean
    scaled_rms_norm       scale rms(x), or of the mean of x and another

with rms(u) = u / sqrt(mean(u²) + eps) over the last dimension. Activations are [..., d] of one dtype (bfloat16,
float16, float32 or float64), parameters of any of these; scale is one element on the device and has no gradient.

Each op but the products is one pass over what it reads and writes, forward and backward. Products are cuBLAS's, onto
the residual; torch copies that first unless it may overwrite it (``inplace``), two passes more; that is why the norms
keep n and 1 / sqrt(mean(v²) + eps) for backward, and not v. A scale of a product's outputs is one of its weight's rows:
`layer_weights` multiplies it into the weights of all layers at once.

An op that feeds one tensor to two readers makes autograd add their gradients, three passes. So ops hand their inputs
through (`Mixed.x`, `Mixed.x0`, `Lanes.x0`): who reads the tensor later takes it from there, and the gradient that comes
back is added where the op's own is written. Under torch.compile the inputs are handed through as they are.

An input that requires no gradient is returned itself and requires none afterwards. Backward then neither reads nor
writes a gradient of x0, or of the x of `residual_mix_norm` and `enter_lanes_norm`. Where no parameter of an op requires
a gradient, it sums none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import _residual_ops as ops
from .common import RMS_EPS
from .common.backend import select

Tensor = torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Mixed(NamedTuple):
    """What `residual_mix_norm` returns."""

    u: Tensor
    n: Tensor
    x: Tensor | None  # None where it was joined with a skip, which is not kept
    x0: Tensor


class Lanes(NamedTuple):
    """What `enter_lanes_norm` and `mix_lanes_norm` return."""

    lane0: Tensor  # joined with the skip
    lane1: Tensor
    n0: Tensor
    n1: Tensor
    x0: Tensor


def _rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    n = F.rms_norm(x, (x.size(-1),), eps=eps)
    return n if scale is None else (n * scale.detach()).to(x.dtype)


def residual_mix_norm_reference(
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
    """Plain PyTorch; the contract of `residual_mix_norm`, whose arguments it shares."""
    joined, mix = x if skip is None else join_skip_reference(x, skip, weight, gate), mix.to(x.dtype)
    u = mix[0] * joined + mix[1] * x0
    return Mixed(u, _rms_norm(u, scale, eps), x if skip is None else None, x0)


def join_skip_reference(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """Plain PyTorch; the contract of `join_skip`, whose arguments it shares."""
    weighted = weight.to(x.dtype) * skip
    return x + weighted if gate is None else torch.lerp(weighted, x, torch.sigmoid(gate.to(x.dtype)))


def scaled_rms_norm_reference(
    x: Tensor, scale: Tensor | None = None, other: Tensor | None = None, eps: float = RMS_EPS
) -> Tensor:
    """Plain PyTorch; the contract of `scaled_rms_norm`, whose arguments it shares."""
    return _rms_norm(x if other is None else 0.5 * (x + other), scale, eps)


def enter_lanes_norm_reference(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> Lanes:
    """Plain PyTorch; the contract of `enter_lanes_norm`, whose arguments it shares."""
    lane0 = x if skip is None else join_skip_reference(x, skip, weight, gate)
    n0 = residual_mix_norm_reference(lane0, x0, mix, scale, eps).n
    return Lanes(lane0, x, n0, _rms_norm(x, scale, eps), x0)


def mix_lanes_reference(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; the contract of `mix_lanes`, whose arguments it shares."""
    post, resid = post.to(lane0.dtype), resid.to(lane0.dtype)
    return (
        resid[0] * lane0 + post[0, 0] * attention + post[1, 0] * mlp,
        resid[1] * lane1 + post[0, 1] * attention + post[1, 1] * mlp,
    )


def mix_lanes_norm_reference(
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
) -> Lanes:
    """Plain PyTorch; the contract of `mix_lanes_norm`, whose arguments it shares."""
    lane0, lane1 = mix_lanes_reference(lane0, lane1, attention, mlp, post, resid)
    entered = enter_lanes_norm_reference(lane0, x0, mix, scale, eps, skip=skip, weight=weight, gate=gate)
    return entered._replace(lane1=lane1, n1=_rms_norm(lane1, scale, eps))


def mix_lanes_final_reference(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor, eps: float = RMS_EPS
) -> Tensor:
    """Plain PyTorch; the contract of `mix_lanes_final`, whose arguments it shares."""
    lane0, lane1 = mix_lanes_reference(lane0, lane1, attention, mlp, post, resid)
    return scaled_rms_norm_reference(lane0, None, lane1, eps)


def residual_linear_reference(residual: Tensor | None, x: Tensor, weight: Tensor, *, inplace: bool = False) -> Tensor:
    """Plain PyTorch; the contract of `residual_linear`, whose arguments it shares."""
    v = F.linear(x, weight.to(x.dtype))
    return v if residual is None else residual + v


def residual_linear_norm_reference(
    residual: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, eps: float = RMS_EPS, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; the contract of `residual_linear_norm`, whose arguments it shares."""
    v = residual_linear_reference(residual, x, weight)
    return v, _rms_norm(v, scale, eps)


def _mix_norm_triton(x, x0, mix, scale, eps, *, skip, weight, gate) -> Mixed:
    _, u, n, _, x, x0 = ops.mix_op(x, x0, mix, skip, weight, gate, scale, eps, False, True, True, False)
    return Mixed(u, n, x if skip is None else None, x0)


def _enter_lanes_triton(x, x0, mix, scale, eps, *, skip, weight, gate) -> Lanes:
    join = skip is not None
    joined, _, n0, n1, x, x0 = ops.mix_op(x, x0, mix, skip, weight, gate, scale, eps, join, False, True, True)
    return Lanes(joined if join else x, x, n0, n1, x0)


_MIX_NORM = {"reference": residual_mix_norm_reference, "triton": _mix_norm_triton}
_JOIN_SKIP = {
    "reference": join_skip_reference,
    "triton": lambda x, skip, weight, gate: ops.mix_op(
        x, None, None, skip, weight, gate, None, 0.0, True, False, False, False
    )[0],
}
_NORM = {
    "reference": scaled_rms_norm_reference,
    "triton": lambda x, scale, other, eps: ops.norm_op(x, other, scale, eps)[0],
}
_ENTER_LANES = {"reference": enter_lanes_norm_reference, "triton": _enter_lanes_triton}
_LANES = {
    "reference": mix_lanes_reference,
    "triton": lambda *lanes: ops.lanes_op(None, *lanes, None, None, None, None, None, 0.0, False)[:2],
}
_LANES_NORM = {
    "reference": mix_lanes_norm_reference,
    "triton": lambda *arguments, skip, weight, gate: Lanes(
        *ops.lanes_op(arguments[6], *arguments[:6], arguments[7], skip, weight, gate, *arguments[8:], False)
    ),
}
_LANES_FINAL = {
    "reference": mix_lanes_final_reference,
    "triton": lambda *arguments: ops.lanes_op(None, *arguments[:6], None, None, None, None, None, arguments[6], True)[
        2
    ],
}
_LINEAR = {
    "reference": residual_linear_reference,
    "triton": lambda *args, inplace: ops.linear(*args, None, 0.0, False, inplace=inplace)[0],
}
_LINEAR_NORM = {
    "reference": residual_linear_norm_reference,
    "triton": lambda *args, inplace: ops.linear(*args, True, inplace=inplace)[:2],
}


def _same(argument: str, tensor: Tensor, name: str, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{argument} must have {name}'s dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{argument} must be on {name}'s device {x.device}, got {tensor.device}")


def _check(activations: dict[str, Tensor | None], parameters: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Activations are all like the first; parameters come with the shapes they must have, () for one element."""
    (name, x), *rest = ((name, tensor) for name, tensor in activations.items() if tensor is not None)
    if not x.ndim:
        raise ValueError(f"{name} must be [..., d], got a scalar")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    for argument, tensor in rest:
        if tensor.shape != x.shape:
            raise ValueError(f"{argument} must have {name}'s shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
        _same(argument, tensor, name, x)
    for argument, (tensor, shape) in parameters.items():
        if tensor is None:
            continue
        if shape and tensor.shape != shape:
            raise ValueError(f"{argument} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if not shape and tensor.numel() != 1:
            raise ValueError(f"{argument} must be one element, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{argument} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{argument} must be on {name}'s device {x.device}, got {tensor.device}")


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
    """u = mix[0] x + mix[1] x0 and n = scale rms(u), as `Mixed`; with ``skip``, x is first joined with it.

    x, x0 and skip are [..., d], mix [2, d], weight and gate [d] as in `join_skip`. Differentiable once in all of them.
    Take x (where there is no skip) and x0 from the result for all later readers: see the module's docstring.

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


def join_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """lerp(weight skip, x, σ(gate)); without a gate, x + weight skip.

    x and skip are [..., d], weight and gate [d]; differentiable once in all. Raises ValueError for a wrong shape or
    device, TypeError for a wrong dtype.
    """
    _check_join(x, skip, weight, gate)
    return select("join_skip", _JOIN_SKIP, x)(x, skip, weight, gate)


def scaled_rms_norm(
    x: Tensor, scale: Tensor | None = None, other: Tensor | None = None, eps: float = RMS_EPS
) -> Tensor:
    """scale rms(x), or of the mean 0.5 (x + other).

    Differentiable once in x and other, both [..., d]. Raises ValueError for a wrong shape or device, TypeError for a
    wrong dtype.
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
) -> Lanes:
    """Two lanes from one stream, and what the first parallel layer reads of them, in one pass.

    Lane 0 is x joined with ``skip``, as by `join_skip`, or x; lane 1 is x; n0 = scale rms(mix[0] lane0 + mix[1] x0) and
    n1 = scale rms(x). Arguments and errors as in `residual_mix_norm`; take x (lane 1) and x0 from the result for later
    readers.
    """
    _check({"x": x, "x0": x0, "skip": skip}, {"mix": (mix, (2, *x.shape[-1:])), "scale": (scale, ())})
    _check_join(x, skip, weight, gate)
    chosen = select("enter_lanes_norm", _ENTER_LANES, x)
    return chosen(x, x0, mix, scale, eps, skip=skip, weight=weight, gate=gate)


def _check_lanes(lane0, lane1, attention, mlp, post, resid) -> None:
    activations = {"lane0": lane0, "lane1": lane1, "attention": attention, "mlp": mlp}
    _check(activations, {"post": (post, (2, 2)), "resid": (resid, (2,))})


def mix_lanes(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor
) -> tuple[Tensor, Tensor]:
    """lane_j' = resid[j] lane_j + post[0, j] attention + post[1, j] mlp for both lanes j.

    lane0, lane1, attention and mlp are [..., d], post is [2 sources, 2 lanes], resid [2]; differentiable once in all.
    Raises ValueError for a wrong shape or device, TypeError for a wrong dtype.
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
) -> Lanes:
    """`mix_lanes`, and what begins the next parallel layer, in one pass.

    Lane 0 is joined with ``skip``, as by `join_skip`; n0 = scale rms(mix[0] lane0 + mix[1] x0), n1 = scale rms(lane1).
    Arguments and errors as in `mix_lanes` and `residual_mix_norm`; take x0 from the result for later readers.
    """
    _check_lanes(lane0, lane1, attention, mlp, post, resid)
    _check({"lane0": lane0, "x0": x0}, {"mix": (mix, (2, *lane0.shape[-1:])), "scale": (scale, ())})
    _check_join(lane0, skip, weight, gate)
    arguments = (lane0, lane1, attention, mlp, post, resid, x0, mix, scale, eps)
    return select("mix_lanes_norm", _LANES_NORM, lane0)(*arguments, skip=skip, weight=weight, gate=gate)


def mix_lanes_final(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor, eps: float = RMS_EPS
) -> Tensor:
    """rms of the mean of both lanes after `mix_lanes`, which are not written; arguments and errors as there."""
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
    """residual + x weightᵀ, without a residual the second part alone.

    residual is [..., d], x [..., k], weight [d, k]; differentiable once in all. ``inplace`` lets kernels overwrite the
    residual, as torch's in-place operations do. Returns [..., d] in x's dtype. Raises ValueError for a wrong shape or
    device, TypeError for a wrong dtype.
    """
    _check_linear(residual, x, weight, None)
    return select("residual_linear", _LINEAR, x)(residual, x, weight, inplace=inplace)


def residual_linear_norm(
    residual: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, eps: float = RMS_EPS, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """v = residual + x weightᵀ and n = scale rms(v); arguments and errors as `residual_linear`."""
    _check_linear(residual, x, weight, scale)
    return select("residual_linear_norm", _LINEAR_NORM, x)(residual, x, weight, scale, eps, inplace=inplace)
