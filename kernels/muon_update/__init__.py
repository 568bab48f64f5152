"""Everything that Muon does to its banks besides Newton-Schulz, for lists of tensors, and the norm for clipping.

    momentum_update   g = s · rounded(g);   buf = μ buf + g;   u = g + μ buf (Nesterov) or buf
    squared_norm      Σ g² over all tensors
    clip_factor       norm = (Σ g²)^½;   s = min(1, limit / (norm + 1e-6))
    apply_update      p = p (1 - lr weight_decay) - lr scale u;   mean += (1 - decay) (p - mean)

The scale is Muon's, max(1, rows / columns)^½, or any other. The gradient is rounded to the buffer's dtype first, as it
is where ranks send each other gradients in that dtype.

Kernels: one launch for each list, one program for each chunk of a tensor, and every element is read and written once.
Addresses and sizes are arguments of the launch, so nothing is copied to the device and a CUDA graph can capture it.
Rates and momentum may change at each call without a new compilation. PyTorch computes float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.backend import select
from .reference import (
    apply_update_reference,
    clip_factor_reference,
    momentum_update_reference,
    squared_norm_reference,
)
from .triton import apply_update_triton, clip_factor_triton, momentum_update_triton, squared_norm_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MOMENTUM = {"reference": momentum_update_reference, "triton": momentum_update_triton}
_SQUARED_NORM = {"reference": squared_norm_reference, "triton": squared_norm_triton}
_CLIP = {"reference": clip_factor_reference, "triton": clip_factor_triton}
_APPLY = {"reference": apply_update_reference, "triton": apply_update_triton}


@torch.no_grad()
def momentum_update(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    gradient_scale: Tensor | float = 1.0,
    nesterov: bool = True,
) -> list[Tensor]:
    """Update the momentum buffers of all tensors in one launch; see the module's docstring for the formula.

    Args:
        gradients: tensors of any shapes, bfloat16, float16, float32 or float64. Each is rounded to its buffer's dtype
            first.
        buffers: tensors of the gradients' shapes, changed in place.
        momentum: μ.
        gradient_scale: s, a number or one element on the gradients' device.
        nesterov: look ahead by one momentum step.

    Returns the updates, in the buffers' shapes and dtypes: new tensors, or without Nesterov the buffers themselves.
    Tensors of several dtypes take a launch for each dtype. Raises ValueError for a wrong number, shape or device,
    TypeError for a wrong dtype.
    """
    if not gradients and not buffers:
        return []
    device = (*gradients, *buffers)[0].device
    _check(device, gradients=gradients, buffers=buffers)
    if isinstance(gradient_scale, Tensor):
        _check_scalar("gradient_scale", gradient_scale, device)
        gradient_scale = gradient_scale.reshape(())
    run = _select("momentum_update", _MOMENTUM, gradients, buffers)
    return run(gradients, buffers, momentum, gradient_scale, nesterov)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ g² over all elements of all tensors, a float32 scalar on their device with the same bits at every call.

    ``tensors`` are one or more, of any shapes, bfloat16, float16, float32 or float64. On a GPU one launch for each
    dtype sums chunks, and one more launch adds the chunks' sums. Raises ValueError for an empty list and for different
    devices, TypeError for a wrong dtype.
    """
    if not tensors:
        raise ValueError("tensors must be one tensor at least, got none")
    _check(tensors[0].device, tensors=tensors)
    return _select("squared_norm", _SQUARED_NORM, tensors)(tensors)


@torch.no_grad()
def clip_factor(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return (norm, factor) of a squared norm: the factor brings a norm above ``limit`` down to it, and else is 1.

    ``squares`` and both results are float32 scalars. ``limit`` is above 0. Raises ValueError for anything else.
    """
    if squares.shape != () or squares.dtype != torch.float32:
        raise ValueError(f"squares must be a float32 scalar, got {squares.dtype} {list(squares.shape)}")
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    return _select("clip_factor", _CLIP, [squares])(squares, limit)


@torch.no_grad()
def apply_update(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    averages: Sequence[Tensor] | None = None,
    decay: float = 0.0,
    *,
    scale: float | Sequence[float] | None = None,
) -> None:
    """Step all parameters, and their moving averages where given, in one launch; see the module's docstring.

    Args:
        parameters: matrices or banks of matrices [..., rows, columns], bfloat16, float16, float32 or float64, changed
            in place. With a ``scale`` they may have any shape.
        updates: tensors of the parameters' shapes.
        lr: learning rate, as in the formula.
        weight_decay: weight decay, as in the formula.
        averages: tensors of the parameters' shapes, changed in place. They move towards the parameters as stored, that
            is rounded to the parameters' dtype.
        decay: share of an average that stays.
        scale: factor on the learning rate, a number for all parameters or one for each, as 0.2 max(rows, columns)^½
            (Moonshot's, arXiv 2502.16982); None is Muon's.

    Tensors of several dtypes take a launch for each dtype. Raises ValueError for a wrong number, shape or device,
    TypeError for a wrong dtype.
    """
    if not parameters and not updates and not averages:
        return
    lists = {"parameters": parameters, "updates": updates} | ({} if averages is None else {"averages": averages})
    _check((*parameters, *updates, *(averages or ()))[0].device, **lists)
    if isinstance(scale, Sequence) and len(scale) != len(parameters):
        raise ValueError(f"scale must be one number, or one for each of {len(parameters)} parameters, got {len(scale)}")
    for i, parameter in enumerate(parameters):
        if parameter.ndim < 2 and scale is None:
            raise ValueError(
                f"parameters[{i}] must be [..., rows, columns], got shape {list(parameter.shape)}; scale=1.0 takes any"
            )
    run = _select("apply_update", _APPLY, *lists.values())
    run(parameters, updates, lr, weight_decay, averages, decay, scale=scale)


def _select(op: str, implementations: dict[str, Callable], *lists: Sequence[Tensor]) -> Callable:
    """Choose the implementation; float64 has no kernel."""
    if any(tensor.dtype == torch.float64 for tensors in lists for tensor in tensors):
        return implementations["reference"]
    return select(op, implementations, lists[0][0])


def _check(device: torch.device, **lists: Sequence[Tensor]) -> None:
    """Raise unless all are floating point on ``device`` and the lists' i-th tensors have one shape."""
    first, tensors = next(iter(lists.items()))
    for name, others in lists.items():
        if len(others) != len(tensors):
            raise ValueError(f"{name} must have one tensor for each of the {len(tensors)} {first}, got {len(others)}")
        for i, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
            if other.dtype not in _DTYPES:
                raise TypeError(f"{name}[{i}] must be bfloat16, float16, float32 or float64, got {other.dtype}")
            if other.device != device:
                raise ValueError(f"{name}[{i}] must be on {device} as the others, got {other.device}")
            if other.shape != tensor.shape:
                expected = f"{list(tensor.shape)} as {first}[{i}]"
                raise ValueError(f"{name}[{i}] must have shape {expected}, got {list(other.shape)}")


def _check_scalar(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise ValueError(f"{name} must be one floating point element, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the tensors, got {tensor.device}")


__all__ = [
    "apply_update",
    "apply_update_reference",
    "clip_factor",
    "clip_factor_reference",
    "momentum_update",
    "momentum_update_reference",
    "squared_norm",
    "squared_norm_reference",
]
