"""One optimizer step on a stack of adapters in place: parameters, moments, and the copy that the next forward reads.

A stack has G groups [R, C]; each group is updated or left unchanged on its own. With s the row's scale (1 if none),
g = s · gradient and t the number of the update, from 1:

    adamw   p = p (1 - lr wd);   m = β1 m + (1 - β1) g;   v = β2 v + (1 - β2) g²
            p = p - lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + eps)
    sgd     g = g + wd p;   m = g at the first update, then β1 m + g;   p = p - lr m
    copy    s · p, rounded to the copy's dtype

These are the updates of torch.optim.AdamW and SGD; without first moments (β1 = 0) m is g. The gradient is that of the
copy, which is why g contains the scale.

Kernel: one launch with a program for each block of a group. Every element is read and written once, in 16 bytes of
float32. Programs of a group that does not learn end at once and access nothing. The number of the update is on the
device, so that a CUDA graph can replay the step. Rates may change at each call without a recompilation.

Shapes: master, gradient, copy, moments [G, R, C]; learning [G] bool; step scalar; row_scale [R].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.backend import select
from .reference import adapter_update_reference_
from .triton import adapter_update_triton, has_contiguous_groups

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIMIZERS = ("adamw", "sgd")
_ADAPTER_UPDATE = {"reference": adapter_update_reference_, "triton": adapter_update_triton}


def _check_moments(first: Tensor | None, second: Tensor | None, optimizer: str, beta1: float, beta2: float) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be {' or '.join(map(repr, OPTIMIZERS))}, got {optimizer!r}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {beta}")
    if first is None and beta1 != 0:
        raise ValueError(f"first_moment must be given for beta1 {beta1}")
    if (second is None) == (optimizer == "adamw"):
        raise ValueError(f"second_moment must be {'given' if second is None else 'None'} for {optimizer!r}")


def _check(
    master: Tensor, stacks: dict[str, Tensor | None], learning: Tensor, step: Tensor, row_scale: Tensor | None
) -> None:
    """Raise unless all tensors have the right shapes, dtypes and device, of which ``stacks`` have master's shape."""
    if master.ndim != 3:
        raise ValueError(f"master must be [G, R, C], got shape {tuple(master.shape)}")
    for name, tensor in stacks.items():
        if tensor is None:
            continue
        if tensor.shape != master.shape:
            raise ValueError(f"{name} must have master's shape {tuple(master.shape)}, got {tuple(tensor.shape)}")
        dtypes = _DTYPES if name in ("gradient", "copy") else (torch.float32,)
        if tensor.dtype not in dtypes:
            allowed = "bfloat16, float16 or float32" if len(dtypes) > 1 else "float32"
            raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
        if name != "gradient" and tensor.numel() and not has_contiguous_groups(tensor):
            raise ValueError(f"{name} must be contiguous in each group, got strides {tensor.stride()}")
    others: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "learning": (learning, torch.bool, master.shape[:1]),
        "step": (step, torch.float32, ()),
    }
    if row_scale is not None:
        others["row_scale"] = (row_scale, torch.float32, master.shape[1:2])
    for name, (other, dtype, shape) in others.items():
        if other.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {other.dtype}")
        if other.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(other.shape)}")
    for name, tensor in (*stacks.items(), *((name, value[0]) for name, value in others.items())):
        if tensor is not None and tensor.device != master.device:
            raise ValueError(f"{name} must be on master's device {master.device}, got {tensor.device}")


@torch.no_grad()
def adapter_update_(
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
    """Update a stack of adapters and its copy in place; the module's docstring gives the formulas.

    Args:
        master: float32 [G, R, C], changed in place.
        gradient: [G, R, C] bfloat16, float16 or float32, the gradient of the loss with respect to ``copy``.
        copy: [G, R, C] bfloat16, float16 or float32, overwritten by the scaled and rounded master.
        learning: bool [G]; a group for which it is False is neither read nor changed.
        step: float32 scalar on master's device, the number of this update, from 1.
        first_moment: float32 [G, R, C], changed in place; may be None for ``beta1=0``. For AdamW it starts at 0; SGD
            does not read it at the first update.
        second_moment: float32 [G, R, C], changed in place, starts at 0; None for SGD.
        row_scale: float32 [R], s in the formulas; None means 1.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr, beta1, beta2, eps, weight_decay: as in the formulas; SGD uses beta1 as its momentum.

    master, copy and moments may be slices of larger stacks, but each group must be contiguous. Raises ValueError for a
    wrong shape, stride, device, rate or missing moment, TypeError for a wrong dtype.
    """
    _check_moments(first_moment, second_moment, optimizer, beta1, beta2)
    stacks = dict(master=master, gradient=gradient, copy=copy, first_moment=first_moment, second_moment=second_moment)
    _check(master, stacks, learning, step, row_scale)
    select("adapter_update_", _ADAPTER_UPDATE, master)(
        master,
        gradient,
        copy,
        learning,
        step,
        first_moment=first_moment,
        second_moment=second_moment,
        row_scale=row_scale,
        optimizer=optimizer,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )


__all__ = ["adapter_update_", "adapter_update_reference_"]
