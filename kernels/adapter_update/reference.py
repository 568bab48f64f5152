"""The reference of `adapter_update_` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def adapter_update_reference_(
    master: Tensor,
    gradient: Tensor,
    copy: Tensor,
    learning: Tensor,
    step: Tensor,
    *,
    first_moment: Tensor | None = None,
    second_moment: Tensor | None = None,
    row_scale: Tensor | None = None,
    optimizer: str = "adamw",
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.999,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
) -> None:
    """Compute `adapter_update_` in plain PyTorch, with the same arguments and effect."""
    scale = 1.0 if row_scale is None else row_scale[:, None]
    g, count = gradient.float() * scale, step.double()
    v = None
    if optimizer == "adamw":
        assert second_moment is not None
        p = master * (1 - lr * weight_decay)
        m = g if first_moment is None else torch.lerp(first_moment, g, 1 - beta1)
        v = second_moment * beta2 + (1 - beta2) * g * g
        size = (v.sqrt() / (1 - beta2**count).sqrt().float()).add_(eps)
        p -= (lr / (1 - beta1**count)).float() * m / size
    else:
        g = g + weight_decay * master
        m = g if first_moment is None else torch.where(step == 1, g, first_moment * beta1 + g)
        p = master - lr * m
    results = ((master, p), (copy, (scale * p).to(copy.dtype)), (first_moment, m), (second_moment, v))
    for tensor, result in results:
        if tensor is not None and result is not None:
            tensor.copy_(torch.where(learning[:, None, None], result, tensor))
