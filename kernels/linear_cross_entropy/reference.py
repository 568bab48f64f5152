"""Cross-entropy of a softcapped linear head in plain PyTorch: the contract of the kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    softcap: float,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    *,
    update: Tensor | None = None,
) -> Tensor:
    """Compute `linear_cross_entropy`, whose arguments it shares, in plain PyTorch; all tokens are one chunk."""
    wide = torch.promote_types(h.dtype, torch.float32)
    if reduction == "none":
        h, table = h.to(wide), table.to(wide)
    z = F.linear(h, table) if update is None else F.linear(h, table) + update
    z = z.to(wide).reshape(-1, table.size(0))
    logits = softcap * torch.tanh(z / softcap)
    flat = targets.flatten().long()
    unknown = (flat < 0) | (flat >= table.size(0))
    losses = F.cross_entropy(logits, flat.masked_fill(unknown, 0), reduction="none").masked_fill(unknown, math.nan)
    return losses.view(targets.shape) if reduction == "none" else getattr(losses, reduction)()
