"""Momentum, norm, clipping and Muon's step in plain PyTorch: the contract of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLIP_EPS = 1e-6


def momentum_update_reference(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    gradient_scale: Tensor | float = 1.0,
    nesterov: bool = True,
) -> list[Tensor]:
    """Compute `momentum_update`, whose arguments it shares, in plain PyTorch."""
    updates = []
    for gradient, buffer in zip(gradients, buffers, strict=True):
        gradient = gradient.to(buffer.dtype) * gradient_scale
        buffer.mul_(momentum).add_(gradient)
        updates.append(gradient.add(buffer, alpha=momentum) if nesterov else buffer)
    return updates


def squared_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Compute `squared_norm`, whose arguments it shares, in plain PyTorch."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(list(tensors), 2, wide)).square().sum().float()


def clip_factor_reference(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Compute `clip_factor`, whose arguments it shares, in plain PyTorch."""
    norm = squares.sqrt()
    return norm, (limit / (norm + CLIP_EPS)).clamp(max=1.0)


def apply_update_reference(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    averages: Sequence[Tensor] | None = None,
    decay: float = 0.0,
    *,
    scale: float | Sequence[float] | None = None,
) -> None:
    """Compute `apply_update`, whose arguments it shares, in plain PyTorch."""
    for parameter, update, factor in zip(parameters, updates, scales(parameters, scale), strict=True):
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update.to(parameter.dtype), alpha=-lr * factor)
    for average, parameter in zip(averages or (), parameters, strict=averages is not None):
        average.lerp_(parameter.to(average.dtype), 1 - decay)


def scales(parameters: Sequence[Tensor], scale: float | Sequence[float] | None) -> list[float]:
    """Return the factor on the learning rate of each parameter: ``scale``, or max(1, rows / columns)^½."""
    if scale is None:
        return [max(1, parameter.size(-2) / max(1, parameter.size(-1))) ** 0.5 for parameter in parameters]
    return list(map(float, scale if isinstance(scale, Sequence) else [scale] * len(parameters)))
