"""SmearGate: add the gated previous token's embedding to each token's, and the model's fused prologue.

    g_t = λ σ(w · x_t[:W])  for t >= 1, and 0 where token t is a BOS (a document's first token)
    y_t = x_t + g_t x_{t-1},   y_0 = x_0

The previous embedding enters un-smeared. Without the BOS mask (``bos_id=None``, the public code of parameter-golf
PR #1874) the last token of one document leaks into the first of the next. `embed_smear_norm` is embedding lookup,
SmearGate and RMSNorm in one call.

Shapes: x [B, T, D]; input_ids [B, T] int32 or int64; weight [1, W] or [W] with W <= D; lam [1] or scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._launch import select

RMS_EPS = torch.finfo(torch.float32).eps


def smear_gate_reference(
    x: torch.Tensor, input_ids: torch.Tensor, weight: torch.Tensor, lam: torch.Tensor, bos_id: int | None = 1
) -> torch.Tensor:
    """Plain PyTorch; the contract of `smear_gate`, whose arguments it shares."""
    current, previous = x[:, 1:], x[:, :-1]
    gate = torch.sigmoid(F.linear(current[..., : weight.numel()], weight.reshape(1, -1).to(x.dtype)))
    gate = lam.to(x.dtype) * gate
    if bos_id is not None:
        gate = gate * (input_ids[:, 1:, None] != bos_id).to(x.dtype)
    return torch.cat([x[:, :1], current + gate * previous], dim=1)


def embed_smear_norm_reference(
    input_ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    lam: torch.Tensor,
    bos_id: int | None = 1,
    eps: float = RMS_EPS,
) -> torch.Tensor:
    """Plain PyTorch; the contract of `embed_smear_norm`, whose arguments it shares."""
    x = smear_gate_reference(F.embedding(input_ids, table), input_ids, weight, lam, bos_id)
    return F.rms_norm(x, (x.size(-1),), eps=eps)


_SMEAR_GATE = {"reference": smear_gate_reference}
_EMBED_SMEAR_NORM = {"reference": embed_smear_norm_reference}


def _check(input_ids: torch.Tensor, weight: torch.Tensor, lam: torch.Tensor, width: int) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64, got {input_ids.dtype}")
    if weight.numel() > width:
        raise ValueError(f"weight has {weight.numel()} elements and may have at most the width {width}")
    if lam.numel() != 1:
        raise ValueError(f"lam must be one element, got shape {tuple(lam.shape)}")


def smear_gate(
    x: torch.Tensor, input_ids: torch.Tensor, weight: torch.Tensor, lam: torch.Tensor, bos_id: int | None = 1
) -> torch.Tensor:
    """SmearGate of ``x``; see the module's docstring for the formula and shapes.

    Differentiable in x, weight and lam. ``bos_id=None`` leaves the document mask out.
    Returns [B, T, D] in x's dtype. Raises ValueError or TypeError for a wrong shape or dtype.
    """
    if x.ndim != 3 or x.shape[:2] != input_ids.shape:
        raise ValueError(f"x must be [B, T, D] over input_ids {tuple(input_ids.shape)}, got {tuple(x.shape)}")
    _check(input_ids, weight, lam, x.size(-1))
    return select("smear_gate", _SMEAR_GATE, x)(x, input_ids, weight, lam, bos_id)


def embed_smear_norm(
    input_ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    lam: torch.Tensor,
    bos_id: int | None = 1,
    eps: float = RMS_EPS,
) -> torch.Tensor:
    """rms_norm(smear_gate(table[input_ids])) in one call: the model's prologue.

    table is [V, D]; the rest as in `smear_gate`. Differentiable in table, weight and lam.
    Returns [B, T, D] in the table's dtype. Raises ValueError or TypeError for a wrong shape or dtype.
    """
    if table.ndim != 2:
        raise ValueError(f"table must be [V, D], got shape {tuple(table.shape)}")
    _check(input_ids, weight, lam, table.size(-1))
    return select("embed_smear_norm", _EMBED_SMEAR_NORM, table)(input_ids, table, weight, lam, bos_id, eps)
