"""All layers' matrices in plain PyTorch: the contract of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Matrices = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs, out, up, down


def layer_weights_reference(
    qo_bank: Tensor,
    kv_bank: Tensor,
    up_bank: Tensor,
    down_bank: Tensor,
    scales: Tensor,
    gates: Tensor | None,
    dtype: torch.dtype,
    order: Sequence[int],
) -> list[Matrices]:
    """Compute `layer_weights`, whose arguments it shares, in plain PyTorch."""
    q, out = qo_bank.chunk(2)
    inputs = [q, *kv_bank.chunk(2)]
    if gates is not None:
        inputs.append(F.pad(gates, (0, q.size(2) - gates.size(2))))
    inputs.append(q.new_zeros(len(q), -sum(part.size(1) for part in inputs) % 16, q.size(2)))
    of_out, of_down = scales[:, :, None].chunk(2)
    banks = torch.cat(inputs, dim=1), of_out * out, up_bank, of_down * down_bank
    layers = list(zip(*(bank.to(dtype).unbind() for bank in banks), strict=True))
    return [layers[i] for i in order]
