"""The reference of `residual_mlp` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def residual_mlp_reference(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    negative_slope: float = 0.5,
    inplace: bool = False,
) -> torch.Tensor:
    """Compute `residual_mlp` in plain PyTorch, with the same arguments and result; ``inplace`` has no effect."""
    out = F.linear(leaky_relu(F.linear(x, up), negative_slope).square(), down)
    return out if residual is None else residual + out


def leaky_relu(pre: torch.Tensor, negative_slope: float) -> torch.Tensor:
    """Return pre where it is positive, else ``negative_slope`` pre; with slope 0 also of an infinite pre."""
    return F.leaky_relu(pre, negative_slope) if negative_slope else F.relu(pre)
