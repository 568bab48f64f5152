"""SmearGate and the model's prologue in plain PyTorch: the contract of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import RMS_EPS


def smear_gate_reference(
    x: Tensor, input_ids: Tensor, weight: Tensor, lam: Tensor, bos_id: int | None = 1, *, starts: Tensor | None = None
) -> Tensor:
    """Compute `smear_gate`, whose arguments it shares, in plain PyTorch."""
    current, previous = x[:, 1:], x[:, :-1]
    gate = torch.sigmoid(F.linear(current[..., : weight.numel()], weight.reshape(1, -1).to(x.dtype)))
    gate = lam.to(x.dtype) * gate
    for first in (None if bos_id is None else input_ids == bos_id, starts):
        if first is not None:  # mask both factors: in the backward, too, 0 times infinity would be NaN
            gate, previous = (torch.where(first[:, 1:, None], 0, factor) for factor in (gate, previous))
    return torch.cat([x[:, :1], current + gate * previous], dim=1)


def embed_smear_norm_reference(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None = 1,
    eps: float = RMS_EPS,
    *,
    deterministic: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    """Compute `embed_smear_norm`, whose arguments it shares, in plain PyTorch."""
    last = max(len(table) - 1, 0)
    x = F.embedding(input_ids.clamp(0, last), table)
    x = F.rms_norm(smear_gate_reference(x, input_ids, weight, lam, bos_id, starts=starts), x.shape[-1:], eps=eps)
    return torch.where(((input_ids < 0) | (input_ids > last))[..., None], float("nan"), x)
