"""Cross-entropy of a softcapped linear head: loss and gradients from the hidden states.

    z = h tableᵀ + update,   logits = cap tanh(z / cap),   loss_t = log Σ_v exp(logits_tv) - logits_t,target

in nats. `linear_cross_entropy` returns the mean or the sum over tokens, or every token's loss. ``update`` is what
adapters of the head add to z; without it the term is left out.

The products are cuBLAS's. For a mean or a sum, z is in the dtype of h; an update is added to the rounded product, and
the sum is rounded again. For every token's loss z is fp32: these losses are scores, and errors of logits raise a
loss by half of their variance, which is some 2e-4 nats in bfloat16.

One kernel reads each row of z once and holds it in registers. With r = 1 / (1 + exp(2 z / cap)) a logit is
cap - 2 cap r, never above cap, and 1 - tanh² is 4 (r - r²). Up to a cap of 40 the softmax needs no maximum, because
Σ exp(logits - cap) cannot vanish. Above 40, where the rounding of r times 2 cap would show, the kernel uses
r - 1/2 = -tanh / 2 instead, near 0 by a series. It writes the loss, and the loss's gradient over z or, where z is fp32,
in the dtype of h:

    dz = (softmax - onehot) (1 - tanh²),   dh = dz table,   dtable = dzᵀ h.

The loss of a target outside [0, V) is NaN, and its dz is zero.

Chunks. One chunk of all tokens takes the least traffic: dz waits for the backward, and the loss's gradient, a number on
the device, then scales the table and dtable and never a large tensor. This takes T V elements of memory. In several
chunks the forward computes dh and dtable (in fp32) and the backward scales them, which is one more pass over dh. The
gradient of an update is dz itself times the loss's gradient: the backward writes it once and computes
dh = dupdate table from it.

Shapes: h [..., d]; table [V, d]; targets [...] int32 or int64; update [..., V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.backend import select
from ..common.operators import readable
from .reference import linear_cross_entropy_reference
from .triton import linear_cross_entropy_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_IMPLEMENTATIONS = {"reference": linear_cross_entropy_reference, "triton": linear_cross_entropy_triton}
SOFTCAPS = 1e-6, 1e30  # limits between which 2 / cap, and 2 cap times a logit, are numbers of fp32


def linear_cross_entropy(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    softcap: float,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    *,
    update: Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy in nats of the logits softcap * tanh((h tableᵀ + update) / softcap).

    Args:
        h: [..., d], bfloat16, float16, float32 or float64. Kernels compute in fp32, from logits z in h's dtype, or with
            ``reduction="none"`` in fp32. The reference computes float64.
        table: [V, d] in h's dtype.
        targets: [...] int32 or int64.
        softcap: from 1e-6 to 1e30. Above 40 kernels compute a few more sums for each logit.
        reduction: ``"mean"`` or ``"sum"`` over tokens, or ``"none"`` for every token's loss.
        chunk_tokens: tokens whose logits are in memory at a time. None is all tokens where a gradient is needed and
            their logits take at most 2 GiB, else as many as take 512 MiB. With ``"none"`` or an update, and where a
            gradient is needed, there is one chunk of all tokens.
        update: [..., V] in h's dtype, added to h tableᵀ, or None.

    Returns float32 (float64 for float64), a scalar or with ``reduction="none"`` the targets' shape. It is
    differentiable once in h, table and update. Raises ValueError for a wrong shape, device, softcap, reduction or chunk
    and for targets outside [0, V), TypeError for a wrong dtype. Checking the targets of a GPU's tensor would wait for
    the GPU: there and in compiled code a target outside the table makes the loss NaN and adds nothing to the gradients.
    """
    if h.ndim < 1 or table.ndim != 2 or table.size(1) != h.size(-1) or table.size(0) == 0:
        raise ValueError(f"table must be [V, d] with V >= 1 for h [..., d], got {tuple(table.shape)}, {tuple(h.shape)}")
    if h.shape[:-1] != targets.shape:
        raise ValueError(f"targets must have h's shape without its last, {tuple(h.shape)}, got {tuple(targets.shape)}")
    if h.dtype not in _DTYPES:
        raise TypeError(f"h must be bfloat16, float16, float32 or float64, got {h.dtype}")
    if table.dtype != h.dtype:
        raise TypeError(f"table must have h's dtype {h.dtype}, got {table.dtype}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if update is not None and update.dtype != h.dtype:
        raise TypeError(f"update must have h's dtype {h.dtype}, got {update.dtype}")
    if update is not None and update.shape != (*targets.shape, table.size(0)):
        raise ValueError(f"update must be [..., V], {(*targets.shape, table.size(0))}, got {tuple(update.shape)}")
    for argument, tensor in (("table", table), ("targets", targets), ("update", update)):
        if tensor is not None and tensor.device != h.device:
            raise ValueError(f"{argument} must be on h's device {h.device}, got {tensor.device}")
    if not SOFTCAPS[0] <= softcap <= SOFTCAPS[1]:
        raise ValueError(f"softcap must be from {SOFTCAPS[0]:g} to {SOFTCAPS[1]:g}, got {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if targets.numel() and readable(targets):
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= table.size(0):
            raise ValueError(f"targets must be in [0, {table.size(0)}), got {low if low < 0 else high}")
    has_kernel = h.dtype != torch.float64
    chosen = select("linear_cross_entropy", _IMPLEMENTATIONS, h) if has_kernel else linear_cross_entropy_reference
    return chosen(h, table, targets, float(softcap), reduction, chunk_tokens, update=update)


__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
