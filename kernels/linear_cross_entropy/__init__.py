"""Cross-entropy of a linear head: loss and gradients from the hidden states, without float32 logits of all tokens.

    z = h tableᵀ + update + bias,   l = cap tanh(z / cap), or z without a cap,   lse_t = log Σ_v exp(l_tv)
    loss_t = (1 - s) w_target (lse_t - l_t,target) + s/V Σ_v w_v (lse_t - l_tv) + c lse_t²

in nats, with s the label smoothing, w the class weights and c the factor of the z-loss. `linear_cross_entropy` returns
the mean or the sum over tokens, or every token's loss. ``update`` is what adapters of the head add to z. The cap of
negative z may be another one (parameter-golf PR #1923). The terms are those of `torch.nn.functional.cross_entropy`; the
z-loss is PaLM's (arXiv:2204.02311), reduced as Liger-Kernel does. The kernel is compiled without the terms that a call
leaves out.

A mean is over the tokens that are not ignored. With class weights the losses' sum is divided by the sum of the targets'
weights, and the z-loss's sum by the number of tokens. If all are ignored the mean is NaN, as in PyTorch, and the
gradients are zero.

The products are cuBLAS's. For a mean or a sum, the product is in the dtype of h; an update is added to it, and the sum
is rounded again. For every token's loss z is fp32: these losses are scores, and errors of logits raise a loss by half
of their variance, which is some 2e-4 nats in bfloat16. The bias is added in fp32.

One kernel reads each row of z once and holds it in registers. With r = 1 / (1 + exp(2 z / cap)) a logit is
cap - 2 cap r, never above cap, and 1 - tanh² is 4 (r - r²). Up to a cap of 40 the softmax needs no maximum, because
Σ exp(l - cap) cannot vanish. Above 40, where the rounding of r times 2 cap would show, the kernel uses
r - 1/2 = -tanh / 2 instead, near 0 by a series. Where the caps differ, it multiplies r - 1/2 of negative z by their
ratio. It writes the loss, and the loss's gradient over z or, where z is fp32, in the dtype of h:

    dz = (((1 - s) w_target + s/V Σ w + 2 c lse) softmax - (1 - s) w_target onehot - s/V w) (1 - tanh²),
    dh = dz table,   dtable = dzᵀ h,   dbias = Σ_t dz_t.

An ignored target has a loss of zero, that of another target outside [0, V) is NaN, and dz of both is zero.

Chunks. One chunk of all tokens takes the least traffic: dz waits for the backward, and the loss's gradient, a number on
the device, then scales the table and dtable and never a large tensor. This takes T V elements of memory. In several
chunks the forward computes dh, dtable and dbias (these in fp32) and the backward scales them, which is one more pass
over dh. Every token's loss has a gradient of its own, of which the forward knows nothing: with several chunks the
backward computes the logits again, which is one more product. The gradient of an update is dz itself times the loss's
gradient: the backward writes it once and computes dh = dupdate table from it.

Memory, besides arguments and results: where a gradient is needed and there is one chunk, T V elements of h's dtype, and
with an update as many again; otherwise a chunk's logits. With ``reduction="none"`` logits are fp32 in pieces of at most
512 MiB, and beside a piece lies its dz in h's dtype. There are two copies of the table in h's dtype at the most, the
gradient of the table in fp32, twice with several chunks, and twice the elements of h.

Shapes: h [..., d]; table [V, d]; targets [...] int32 or int64; update [..., V]; bias, weight [V].
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal, overload

import torch
from torch import Tensor

from ..common.backend import select
from ..common.operators import readable
from .reference import linear_cross_entropy_reference, softcapped
from .triton import linear_cross_entropy_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_IMPLEMENTATIONS = {"reference": linear_cross_entropy_reference, "triton": linear_cross_entropy_triton}
SOFTCAPS = 1e-6, 1e30  # limits between which 2 / cap, and 2 cap times a logit, are numbers of fp32


def _autocast_dtype(h: Tensor) -> torch.dtype | None:
    """Return the dtype of the `torch.autocast` in force for h, or None; as everywhere in PyTorch, float64 stays."""
    device = h.device.type
    if h.dtype == torch.float64 or device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@overload
def linear_cross_entropy(
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
    return_z_loss: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_cross_entropy(
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
    return_z_loss: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
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
    """Return the mean cross-entropy in nats of the logits h tableᵀ + update + bias, softly capped where a cap is given.

    Args:
        h: [..., d], bfloat16, float16, float32 or float64. Kernels compute in fp32, from logits z in h's dtype, or with
            ``reduction="none"`` in fp32. The reference computes float64. Under `torch.autocast` h is cast to its dtype,
            unless it is float64.
        table: [V, d] in h's dtype, or float32, which is cast to h's dtype inside; its gradient is float32 then.
        targets: [...] int32 or int64.
        softcap: from 1e-6 to 1e30, a pair of such numbers, for positive and for negative z, or None for plain logits.
            Up to 40 kernels compute a few sums less for each logit, and with equal caps a few products less.
        reduction: ``"mean"`` or ``"sum"`` over tokens, or ``"none"`` for every token's loss.
        chunk_tokens: tokens whose logits are in memory at a time. None is all tokens where a gradient is needed and
            their logits take at most 2 GiB, else as many as take 512 MiB. With an update, and where a gradient is
            needed, there is one chunk of all tokens. With ``"none"`` and several chunks the backward computes the
            logits once more.
        update: [..., V] in h's dtype, added to h tableᵀ, or None.
        bias: [V] in h's dtype or float32, added to every token's z, or None.
        weight: [V], floating point: the class weights, or None. They have no gradient.
        ignore_index: the target of tokens that take no part: their loss and gradients are zero, and a mean is over the
            others. None ignores none, which spares a mean the count.
        label_smoothing: from 0 to 1, the part of the target's probability that is spread over all classes.
        lse_square_scale: the z-loss's factor, which multiplies (log Σ exp(logits))²; it is not weighted by classes.
        return_z_loss: also return the part of the loss that the z-loss is, reduced as the loss is and without gradient.

    Returns float32 (float64 for float64), a scalar or with ``reduction="none"`` the targets' shape; with
    ``return_z_loss`` a pair of such. The loss is differentiable once in h, table, update and bias. Raises TypeError for
    a wrong dtype. Raises ValueError for a wrong shape, device, softcap, reduction, chunk, smoothing or factor, for
    class weights that require a gradient, and for targets outside [0, V) other than ignore_index. Checking the targets
    of a GPU's tensor would wait for the GPU: there and in compiled code such a target makes the loss NaN and adds
    nothing to the gradients.
    """
    autocast = _autocast_dtype(h)
    if autocast is not None:
        h, update = h.to(autocast), None if update is None else update.to(autocast)
        table = table if table.dtype == torch.float32 else table.to(autocast)
        bias = bias if bias is None or bias.dtype == torch.float32 else bias.to(autocast)
    if h.ndim < 1 or table.ndim != 2 or table.size(1) != h.size(-1) or table.size(0) == 0:
        raise ValueError(f"table must be [V, d] with V >= 1 for h [..., d], got {tuple(table.shape)}, {tuple(h.shape)}")
    if h.shape[:-1] != targets.shape:
        raise ValueError(f"targets must have h's shape without its last, {tuple(h.shape)}, got {tuple(targets.shape)}")
    if h.dtype not in _DTYPES:
        raise TypeError(f"h must be bfloat16, float16, float32 or float64, got {h.dtype}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if update is not None and update.dtype != h.dtype:
        raise TypeError(f"update must have h's dtype {h.dtype}, got {update.dtype}")
    if update is not None and update.shape != (*targets.shape, table.size(0)):
        raise ValueError(f"update must be [..., V], {(*targets.shape, table.size(0))}, got {tuple(update.shape)}")
    for argument, tensor in (("table", table), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (h.dtype, torch.promote_types(h.dtype, torch.float32)):
            raise TypeError(f"{argument} must have h's dtype {h.dtype} or be float32, got {tensor.dtype}")
    for argument, tensor in (("bias", bias), ("weight", weight)):
        if tensor is not None and tensor.shape != (table.size(0),):
            raise ValueError(f"{argument} must be [V], {(table.size(0),)}, got {tuple(tensor.shape)}")
    if weight is not None and not weight.is_floating_point():
        raise TypeError(f"weight must be of floating point, got {weight.dtype}")
    if weight is not None and weight.requires_grad:
        raise ValueError("weight, of the classes, has no gradient, and this one requires one: give weight.detach()")
    tensors = dict(table=table, targets=targets, update=update, bias=bias, weight=weight)
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != h.device:
            raise ValueError(f"{argument} must be on h's device {h.device}, got {tensor.device}")
    if softcap is not None:
        caps = softcap if isinstance(softcap, (tuple, list)) else (softcap, softcap)
        if len(caps) != 2 or not all(SOFTCAPS[0] <= cap <= SOFTCAPS[1] for cap in caps):
            numbers = f"from {SOFTCAPS[0]:g} to {SOFTCAPS[1]:g}"
            raise ValueError(f"softcap must be {numbers}, a pair of such numbers, or None, got {softcap}")
        positive, negative = float(caps[0]), float(caps[1])
        softcap = positive if positive == negative else (positive, negative)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not 0 <= lse_square_scale < math.inf:
        raise ValueError(f"lse_square_scale must be a number from 0 on, got {lse_square_scale}")
    if readable(targets):
        wild = targets[(targets < 0) | (targets >= table.size(0))]
        wild = wild if ignore_index is None else wild[wild != ignore_index]
        if wild.numel():
            besides = "" if ignore_index is None else f" or ignore_index {ignore_index}"
            raise ValueError(f"targets must be in [0, {table.size(0)}){besides}, got {int(wild[0])}")
    has_kernel = h.dtype != torch.float64
    chosen = select("linear_cross_entropy", _IMPLEMENTATIONS, h) if has_kernel else linear_cross_entropy_reference
    with nullcontext() if autocast is None else torch.autocast(h.device.type, enabled=False):
        return chosen(
            h,
            table,
            targets,
            softcap,
            reduction,
            chunk_tokens,
            update=update,
            bias=bias,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=float(label_smoothing),
            lse_square_scale=float(lse_square_scale),
            return_z_loss=return_z_loss,
        )


__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference", "softcapped"]
