"""The model's logits, which the package itself never needs as a whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pgolf.kernels.linear_cross_entropy import softcapped
from pgolf.model.gpt import GPT


def forward_logits(
    model: GPT, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None, max_seqlen: int = 0
) -> torch.Tensor:
    """Compute the softcapped logits [B, T, V], at least in float32. Arguments are those of `GPT.hidden`."""
    h = model.hidden(input_ids, cu_seqlens, max_seqlen)
    z = F.linear(h, model.head_weight.to(h.dtype))
    return softcapped(z.to(torch.promote_types(z.dtype, torch.float32)), model.config.softcap)
