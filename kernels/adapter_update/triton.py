"""The kernel of `adapter_update_`, its launch and its operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters
from ..common.operators import operator


@jit
def _one_minus_power(step, log_beta):
    """1 - βᵗ; near 0 by the series of exp, since 1 - exp(x) cancels there."""
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
    """Update BLOCK vectors of a group, of ROW per row. rest is 1 - β; decay is 1 - lr wd for AdamW, wd for SGD."""
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
    """Return log β, or for β = 0 a number for which the kernel's 1 - βᵗ is 1."""
    return math.log(beta) if beta > 0 else -1e4


def has_contiguous_groups(tensor: Tensor) -> bool:
    """Return whether each group of [G, R, C] is contiguous."""
    return tensor.is_contiguous() or tensor[0].is_contiguous()


def launch_update(
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
    """Launch the kernel; ``first`` and ``second`` hold one moment or none."""
    groups, rows, columns = master.shape
    if not master.numel():
        return
    gradient = gradient if has_contiguous_groups(gradient) else gradient.contiguous()
    tuned = launch_parameters("adapter_update", "adamw" if adamw else "sgd", master.device)
    vector = math.gcd(columns, 4)  # elements; 4 of float32 are 16 bytes
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
    launch_update,
    lambda *arguments: None,
    mutates=("master", "copy", "first", "second"),
)


def adapter_update_triton(
    master: Tensor,
    gradient: Tensor,
    copy: Tensor,
    learning: Tensor,
    step: Tensor,
    *,
    first_moment: Tensor | None,
    second_moment: Tensor | None,
    row_scale: Tensor | None,
    optimizer: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Compute `adapter_update_` by the kernel."""
    first, second = ([] if moment is None else [moment] for moment in (first_moment, second_moment))
    rates = (float(number) for number in (lr, beta1, beta2, eps, weight_decay))
    adamw = optimizer == "adamw"
    _adapter_update_op(master, gradient, copy, learning, step, first, second, row_scale, adamw, *rates)
