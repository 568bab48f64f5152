"""The reference of `residual_mlp` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def residual_mlp_reference(
    residual: torch.Tensor | None, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, inplace: bool = False
) -> torch.Tensor:
    """Compute `residual_mlp` in plain PyTorch, with the same arguments and result; ``inplace`` has no effect."""
    out = F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)
    return out if residual is None else residual + out
