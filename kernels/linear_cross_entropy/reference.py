"""Cross-entropy of a linear head in plain PyTorch: the contract of the kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softcapped(z: Tensor, softcap: float | tuple[float, float]) -> Tensor:
    """Compute c tanh(z / c), with c the softcap, or of a pair the first for z > 0 and the second for other z."""
    if isinstance(softcap, tuple):
        return torch.where(z > 0, softcapped(z, softcap[0]), softcapped(z, softcap[1]))
    return softcap * torch.tanh(z / softcap)


def linear_cross_entropy_reference(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    softcap: float | tuple[float, float] | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    *,
    update: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    return_z_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `linear_cross_entropy`, whose arguments it shares, in plain PyTorch; all tokens are one chunk."""
    wide = torch.promote_types(h.dtype, torch.float32)
    table = table.to(h.dtype)
    if reduction == "none":
        h, table = h.to(wide), table.to(wide)
    z = F.linear(h, table) if update is None else F.linear(h, table) + update
    z = z.to(wide).reshape(-1, table.size(0))
    z = z if bias is None else z + bias.to(wide)
    logits = z if softcap is None else softcapped(z, softcap)

    flat = targets.flatten().long()
    ignored = torch.zeros_like(flat, dtype=torch.bool) if ignore_index is None else flat == ignore_index
    unknown = ~ignored & ((flat < 0) | (flat >= table.size(0)))
    filled = flat.masked_fill(ignored | unknown, 0)
    count = of_targets = flat.numel() if ignore_index is None else (~ignored).sum()
    if weight is not None:
        weight = weight.detach().to(wide)
        of_targets = weight[filled].masked_fill(ignored | unknown, 0).sum()

    def reduced(losses: Tensor, divisor: Tensor | int) -> Tensor:
        losses = losses.masked_fill(ignored, 0).masked_fill(unknown, math.nan)
        total = losses.view(targets.shape) if reduction == "none" else losses.sum()
        return total / divisor if reduction == "mean" else total

    losses = F.cross_entropy(logits, filled, weight, reduction="none", label_smoothing=label_smoothing)
    loss = reduced(losses, of_targets)
    if not lse_square_scale and not return_z_loss:
        return loss
    z_loss = reduced(lse_square_scale * logits.logsumexp(-1).square(), count)
    return (loss + z_loss, z_loss.detach()) if return_z_loss else loss + z_loss
