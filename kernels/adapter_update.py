"""One optimizer step of a stack of adapters in place: parameters, moments, and the copy that the next forward reads.

A stack has G groups [R, C] that learn or rest by themselves. With s the row's scale (1 without), g = s · gradient and
t the number of the update, from 1:

    adamw   p = p (1 - lr wd);   m = β1 m + (1 - β1) g;   v = β2 v + (1 - β2) g²
            p = p - lr / (1 - β1ᵗ) · m / (√v / √(1 - β2ᵗ) + eps)
    sgd     g = g + wd p;   m = g at the first update, then β1 m + g;   p = p - lr m
    copy    s · p, rounded to the copy's dtype

as torch.optim.AdamW and SGD have it; without first moments (β1 = 0) m is g. The gradient is that of the copy, therefore
the scale in g.

Kernel: one launch, a program for each block of a group, every element read and written once in 16 bytes of float32.
Programs of a group that rests end at once and touch nothing. The update's number is on the device, so a CUDA graph can
replay the step; rates may change at each call without a new compilation.

Shapes: master, gradient, copy, moments [G, R, C]; learning [G] bool; step scalar; row_scale [R].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common.backend import select
from .common.compiling import jit, tl
from .common.launch import launch_parameters
from .common.operators import operator

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIMIZERS = ("adamw", "sgd")


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
    """Plain PyTorch; the contract of `adapter_update_`, whose arguments it shares."""
    scale = 1.0 if row_scale is None else row_scale[:, None]
    g, count = gradient.float() * scale, step.double()
    if optimizer == "adamw":
        p = master * (1 - lr * weight_decay)
        m = g if first_moment is None else torch.lerp(first_moment, g, 1 - beta1)
        v = second_moment * beta2 + (1 - beta2) * g * g
        size = (v.sqrt() / (1 - beta2**count).sqrt().float()).add_(eps)
        p -= (lr / (1 - beta1**count)).float() * m / size
    else:
        g = g + weight_decay * master
        m = g if first_moment is None else torch.where(step == 1, g, first_moment * beta1 + g)
        p, v = master - lr * m, None
    results = ((master, p), (copy, (scale * p).to(copy.dtype)), (first_moment, m), (second_moment, v))
    for tensor, result in results:
        if tensor is not None:
            tensor.copy_(torch.where(learning[:, None, None], result, tensor))


@jit
def _one_minus_power(step, log_beta):
    """1 - βᵗ; near 0 by exp's series, for 1 - exp(x) cancels there."""
    x = step * log_beta
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))


@jit
def _adapter_update_kernel(
    master,
    gradient,
    copy,
    first,
    second,
    row_scale,
    learning,
    step,
    master_stride,
    gradient_stride,
    copy_stride,
    first_stride,
    second_stride,
    blocks,
    vectors,
    lr,
    beta1,
    rest1,
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    eps,
    decay,
    ADAMW: tl.constexpr,
    ROW: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK vectors of a group. A row has ROW vectors; rest is 1 - β; decay is 1 - lr wd for AdamW, wd for SGD."""
    program = tl.program_id(0)
    group = (program // blocks).to(tl.int64)
    if tl.load(learning + group) != 0:
        start = program % blocks * BLOCK
        vector = start + tl.arange(0, BLOCK)
        mask = (vector < vectors)[:, None]
        at = tl.arange(0, BLOCK)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        offset = start.to(tl.int64) * VECTOR
        master += group * master_stride + offset
        gradient += group * gradient_stride + offset
        copy += group * copy_stride + offset
        p = tl.load(master + at, mask=mask, other=0)
        g = tl.load(gradient + at, mask=mask, other=0).to(tl.float32)
        if first is not None:
            first += group * first_stride + offset
            m = tl.load(first + at, mask=mask, other=0)
        if ADAMW:
            second += group * second_stride + offset
            v = tl.load(second + at, mask=mask, other=0)
        count = tl.load(step)
        if row_scale is not None:
            scale = tl.load(row_scale + vector // ROW, mask=vector < vectors, other=0)[:, None]
            g *= scale
        if ADAMW:
            p *= decay
            v = beta2 * v + rest2 * g * g
            size = tl.sqrt(v) / tl.sqrt(_one_minus_power(count, log_beta2)) + eps
            if first is not None:
                g = beta1 * m + rest1 * g
                lr /= _one_minus_power(count, log_beta1)
            p -= lr * g / size
            tl.store(second + at, v, mask=mask)
        else:
            g += decay * p
            if first is not None:
                g = tl.where(count == 1, g, beta1 * m + g)
            p -= lr * g
        if first is not None:
            tl.store(first + at, g, mask=mask)
        tl.store(master + at, p, mask=mask)
        if row_scale is not None:
            p *= scale
        tl.store(copy + at, p.to(copy.dtype.element_ty), mask=mask)


def _log(beta: float) -> float:
    """log β, or for β = 0 what makes 1 - βᵗ one."""
    return math.log(beta) if beta > 0 else -1e4


def _contiguous_groups(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor[0].is_contiguous()


def _adapter_update_triton(
    master: Tensor,
    gradient: Tensor,
    copy: Tensor,
    learning: Tensor,
    step: Tensor,
    first: list[Tensor],
    second: list[Tensor],
    row_scale: Tensor | None,
    adamw: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """first and second have one tensor or none."""
    groups, rows, columns = master.shape
    if not master.numel():
        return
    gradient = gradient if _contiguous_groups(gradient) else gradient.contiguous()
    tuned = launch_parameters("adapter_update", "adamw" if adamw else "sgd", master.device)
    vector = math.gcd(columns, 4)  # elements; of float32, 16 bytes
    block = 32 * tuned["warps"] * tuned["elements"] // vector
    vectors = rows * columns // vector
    blocks = -(-vectors // block)
    m, v = (moments[0] if moments else None for moments in (first, second))
    operands = (master, gradient, copy, m, v)
    strides = (0 if tensor is None else tensor.stride(0) if groups > 1 else rows * columns for tensor in operands)
    with torch.cuda.device_of(master):  # Triton launches on the current device
        _adapter_update_kernel[(blocks * groups,)](
            *operands,
            None if row_scale is None else row_scale.contiguous(),
            learning.contiguous().view(torch.uint8),
            step,
            *strides,
            blocks,
            vectors,
            lr,
            beta1,
            1 - beta1,
            _log(beta1),
            beta2,
            1 - beta2,
            _log(beta2),
            eps,
            1 - lr * weight_decay if adamw else weight_decay,
            ADAMW=adamw,
            ROW=columns // vector,
            VECTOR=vector,
            BLOCK=block,
            num_warps=tuned["warps"],
        )


_adapter_update_op = operator(
    "adapter_update(Tensor(a!) master, Tensor gradient, Tensor(b!) copy, Tensor learning, Tensor step, "
    "Tensor(c!)[] first, Tensor(d!)[] second, Tensor? row_scale, bool adamw, float lr, float beta1, float beta2, "
    "float eps, float weight_decay) -> ()",
    _adapter_update_triton,
    lambda *arguments: None,
    mutates=("master", "copy", "first", "second"),
)


def _adapter_update_kernels(
    master,
    gradient,
    copy,
    learning,
    step,
    *,
    first_moment,
    second_moment,
    row_scale,
    optimizer,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
) -> None:
    first, second = ([] if moment is None else [moment] for moment in (first_moment, second_moment))
    rates = (float(number) for number in (lr, beta1, beta2, eps, weight_decay))
    adamw = optimizer == "adamw"
    _adapter_update_op(master, gradient, copy, learning, step, first, second, row_scale, adamw, *rates)


_ADAPTER_UPDATE = {"reference": adapter_update_reference_, "triton": _adapter_update_kernels}


def _check_moments(first, second, optimizer: str, beta1: float, beta2: float) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be {' or '.join(map(repr, OPTIMIZERS))}, got {optimizer!r}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {beta}")
    if first is None and beta1 != 0:
        raise ValueError(f"first_moment must be given for beta1 {beta1}")
    if (second is None) == (optimizer == "adamw"):
        raise ValueError(f"second_moment must be {'given' if second is None else 'None'} for {optimizer!r}")


def _check(stacks: dict[str, Tensor | None], learning: Tensor, step: Tensor, row_scale: Tensor | None) -> None:
    """master is the first of stacks."""
    master = stacks["master"]
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
        if name != "gradient" and tensor.numel() and not _contiguous_groups(tensor):
            raise ValueError(f"{name} must be contiguous in each group, got strides {tensor.stride()}")
    others = {"learning": (learning, torch.bool, master.shape[:1]), "step": (step, torch.float32, ())}
    if row_scale is not None:
        others["row_scale"] = (row_scale, torch.float32, master.shape[1:2])
    for name, (tensor, dtype, shape) in others.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (*stacks.items(), *((name, other[0]) for name, other in others.items())):
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
    """Update a stack of adapters and its copy in place; see the module's docstring for the formulas.

    Args:
        master: float32 [G, R, C], changed in place.
        gradient: [G, R, C] bfloat16, float16 or float32, the loss's gradient of ``copy``.
        copy: [G, R, C] bfloat16, float16 or float32, overwritten by the scaled and rounded master.
        learning: bool [G]; a group where it is False stays as it is, and the kernel does not read it.
        step: float32 scalar on master's device, the number of this update, from 1.
        first_moment: float32 [G, R, C], changed in place; may be None for ``beta1=0``. AdamW's starts at 0, SGD's is
            not used at the first update.
        second_moment: float32 [G, R, C], changed in place, starts at 0; None for SGD.
        row_scale: float32 [R], s in the formulas; None is 1.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr, beta1, beta2, eps, weight_decay: as in the formulas; SGD uses beta1 as its momentum.

    master, copy and moments may be slices of larger stacks along the first dimension: a group is contiguous. Raises
    ValueError for a wrong shape, stride, device, rate or missing moment, TypeError for a wrong dtype.
    """
    _check_moments(first_moment, second_moment, optimizer, beta1, beta2)
    stacks = dict(master=master, gradient=gradient, copy=copy, first_moment=first_moment, second_moment=second_moment)
    _check(stacks, learning, step, row_scale)
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
