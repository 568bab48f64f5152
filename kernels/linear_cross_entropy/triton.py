"""Cross-entropy of a softcapped linear head: the kernel, its launches in chunks of tokens, and the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters
from ..common.operators import operator

ONE_CHUNK_BYTES = 2**31  # the most that the logits of all tokens may take to be kept whole for the backward
CHUNK_BYTES = 2**29  # bytes of a chunk's logits where there are several chunks
ROW_ELEMENTS = 16_384  # the longest row that a program keeps in registers; it reads longer rows twice, in blocks
LARGEST_FIXED_CAP = 40.0  # exp(-2 cap) is a normal number of fp32


@jit
def _complement(z, scale, CENTRED: tl.constexpr):
    """Return r = 1 / (1 + exp(2 z / cap)), by one exponential and one reciprocal root.

    CENTRED returns r - 1/2 to fp32's precision. Near 0 that takes a series: the minimax polynomial of
    -tanh(z / cap) / 2 for |z / cap| < 1/2, with a relative error of 2e-8.
    """
    x = z.to(tl.float32) * scale
    root = tl.rsqrt(1 + tl.exp2(x))
    r = root * root
    if CENTRED:
        y = x * x
        series = -3.3312521e-4 + y * (1.5911184e-5 - y * 6.1805992e-7)
        series = x * (-0.17328679 + y * (6.93795876e-3 + y * series))
        r = tl.where(tl.abs(x) < 1.442695, series, r - 0.5)
    return r


@jit
def _slope(r, CENTRED: tl.constexpr):
    """Return (1 - tanh²) / 4 from the r of `_complement`."""
    return 0.25 - r * r if CENTRED else r - r * r


@jit
def _softcap_cross_entropy_kernel(
    z,
    gradient,
    targets,
    losses,
    stride,
    gradient_stride,
    cap,
    scale,
    slope,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Write the losses of rows of z, and dz into ``gradient``, which may be z.

    ``scale`` is 2 / cap and ``slope`` is -2 cap, both times log2(e). Where SHIFTED, the softmax subtracts its maximum.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    r_target = _complement(tl.load(z + tl.where(known, target, 0)), scale, SHIFTED)
    least = 0.0  # r of the largest logit; 0, the r of the cap, where the cap can stand in for the maximum
    if V <= BLOCK:
        inside = (columns < V) | (V == BLOCK)
        r = _complement(tl.load(z + columns, mask=inside, other=0), scale, SHIFTED)
        if SHIFTED:
            least = tl.min(tl.where(inside, r, 1))
        weight = tl.where(inside, tl.exp2((r - least) * slope), 0)
        total = tl.sum(weight)
    else:
        sums = tl.zeros((BLOCK,), tl.float32)
        if SHIFTED:
            lowest = tl.full((BLOCK,), 1, tl.float32)
            for start in range(0, V, BLOCK):
                inside = (start + columns < V) | (V % BLOCK == 0)
                r = _complement(tl.load(z + start + columns, mask=inside, other=0), scale, SHIFTED)
                lowest = tl.minimum(lowest, tl.where(inside, r, 1))
            least = tl.min(lowest)
        for start in range(0, V, BLOCK):
            inside = (start + columns < V) | (V % BLOCK == 0)
            r = _complement(tl.load(z + start + columns, mask=inside, other=0), scale, SHIFTED)
            sums += tl.where(inside, tl.exp2((r - least) * slope), 0)
        total = tl.sum(sums)
    loss = tl.log(total) + 2 * cap * (r_target - least)
    tl.store(losses + row, tl.where(known, loss, float("nan")))
    if gradient is not None:
        gradient += row * gradient_stride
        share = tl.where(known, 4 / total, 0)
        if V <= BLOCK:
            dz = weight * _slope(r, SHIFTED) * share
            tl.store(gradient + columns, dz.to(gradient.dtype.element_ty), mask=inside)
        else:
            for start in range(0, V, BLOCK):
                inside = (start + columns < V) | (V % BLOCK == 0)
                r = _complement(tl.load(z + start + columns, mask=inside, other=0), scale, SHIFTED)
                dz = tl.exp2((r - least) * slope) * _slope(r, SHIFTED) * share
                tl.store(gradient + start + columns, dz.to(gradient.dtype.element_ty), mask=inside)
        # Write the target's element once more: a comparison in every element would cost as much as the exponentials.
        dz = (tl.exp2((r_target - least) * slope) / total - 1) * 4 * _slope(r_target, SHIFTED)
        tl.debug_barrier()
        tl.store(gradient + target, dz.to(gradient.dtype.element_ty), mask=known)


def _launch(
    z: Tensor, targets: Tensor, losses: Tensor, softcap: float, vocabulary: int, gradient: Tensor | None
) -> None:
    """Write the losses of the rows of z [T, >= V], and dz into ``gradient`` [T, >= V], which may be z, or None."""
    case = "blocks" if vocabulary > ROW_ELEMENTS else "loss" if gradient is None else "gradient"
    tuned = launch_parameters("linear_cross_entropy", case, z.device)
    block = tuned["block"] if case == "blocks" else 1 << (vocabulary - 1).bit_length()
    warps = min(32, max(1, block // tuned["columns_per_warp"]))
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _softcap_cross_entropy_kernel[(z.size(0),)](
            z,
            gradient,
            targets,
            losses,
            z.stride(0),
            0 if gradient is None else gradient.stride(0),
            softcap,
            2 * math.log2(math.e) / softcap,
            -2 * math.log2(math.e) * softcap,
            V=vocabulary,
            BLOCK=block,
            SHIFTED=softcap > LARGEST_FIXED_CAP,
            num_warps=warps,
        )


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in fp32, whatever the dtype of a and b."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor * factor, computed in fp32 and rounded once; a factor [T] scales rows."""
    factor = factor.float().reshape(-1, 1)
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


def _logits(h: Tensor, table: Tensor, update: Tensor | None, memory: Tensor | None) -> Tensor:
    """Return h tableᵀ + update in the first rows of ``memory``, or in fp32 where ``memory`` is None.

    The rows of ``memory`` may be longer than V, which aligns them.
    """
    if memory is None:
        z = _wide_product(h, table.t())
    else:
        z = memory[: h.size(0)]
        torch.mm(h, table.t(), out=z[:, : table.size(0)])
    if update is not None:
        z[:, : table.size(0)] += update
    return z


def _dz_times(dz: Tensor, table: Tensor, divisor: int, out: Tensor) -> Tensor:
    """Compute dz table / divisor into ``out``; the product applies the factor at no cost."""
    return torch.addmm(out, dz[:, : table.size(0)], table, beta=0, alpha=1 / divisor, out=out)


def _divisor(reduction: str, count: int) -> int:
    """Return the number by which the reduction divides the sum of losses."""
    return max(count, 1) if reduction == "mean" else 1


class _Needed(NamedTuple):
    """Which gradients are needed."""

    h: bool
    table: bool
    update: bool


def _shapes(h: Tensor, table: Tensor, chunk: int, reduction: str, needed: _Needed) -> tuple[Sequence[int], ...]:
    """Return the shapes of the loss and of the two tensors kept for the backward.

    In one chunk the first is dz and the second is empty. In several chunks they are dh and dtable.
    """
    count = h.size(0)
    loss = (count,) if reduction == "none" else ()
    if not any(needed):
        return loss, (0,), (0,)
    if chunk >= count:
        return loss, (count, _row_length(table.size(0))), (0,)
    return loss, h.shape if needed.h else (0,), table.shape if needed.table else (0,)


def _rows_at_a_time(vocabulary: int, element_bytes: int) -> int:
    """Return the tokens of a chunk whose logits take CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (vocabulary * element_bytes))


def _row_length(vocabulary: int) -> int:
    """Return the length of a row of logits in memory, padded where the vocabulary leaves rows unaligned."""
    return -(-vocabulary // 64) * 64 if vocabulary % 8 else vocabulary


def _forward(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    update: Tensor | None,
    softcap: float,
    chunk: int,
    reduction: str,
    *needed_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and what `_shapes` says is kept for the backward."""
    h, table, targets, needed = h.contiguous(), table.contiguous(), targets.contiguous(), _Needed(*needed_gradients)
    count, vocabulary, divisor = h.size(0), table.size(0), _divisor(reduction, h.size(0))
    losses = h.new_empty(count, dtype=torch.float32)
    _, first_shape, second_shape = _shapes(h, table, chunk, reduction, needed)
    whole, differentiated, scores = chunk >= count, any(needed), reduction == "none"
    first = h.new_empty(first_shape)
    second = torch.zeros(second_shape, dtype=torch.float32, device=h.device)
    memory = first if whole and differentiated else None
    if not scores and memory is None:
        memory = h.new_empty(min(chunk, count), _row_length(vocabulary))
    if memory is not None:
        memory[:, vocabulary:].zero_()  # nothing writes the padding, and its content would differ from call to call
    rows = min(chunk, _rows_at_a_time(vocabulary, 4)) if scores else chunk
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        z = _logits(h[part], table, None if update is None else update[part], None if scores else memory)
        gradient = None if not differentiated else first[part] if scores else z
        _launch(z, targets[part], losses[part], softcap, vocabulary, gradient)
        if differentiated and not whole:
            if needed.h:
                _dz_times(z, table, divisor, first[part])
            if needed.table:
                second += _wide_product(z[:, :vocabulary].t(), h[part])
    loss = {"mean": losses.mean, "sum": losses.sum}.get(reduction, lambda: losses)
    return loss(), first, second


def _backward(
    dloss: Tensor,
    h: Tensor,
    table: Tensor,
    first: Tensor,
    second: Tensor,
    whole: bool,
    reduction: str,
    *needed_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of h, table and update, empty where not needed.

    ``dloss`` is one number, or one for each token. ``first`` and ``second`` are those of `_forward`.
    """
    h, table, needed = h.contiguous(), table.contiguous(), _Needed(*needed_gradients)
    divisor = _divisor(reduction, h.size(0))
    dh, dtable, dupdate = _empty_gradients(h, table, needed._replace(table=False))
    dz = first[:, : table.size(0)] if whole else first
    if needed.update:  # dz itself stays as it is: there may be another backward
        torch.mul(dz, (dloss.float() / divisor).reshape(-1, 1), out=dupdate)
    if needed.h:
        if needed.update:
            dh = torch.mm(dupdate, table, out=dh)
        elif not whole:
            dh = _scaled(first, dloss, h.dtype)
        elif reduction == "mean":
            dh = _dz_times(dz, _scaled(table, dloss, table.dtype), divisor, dh)
        else:
            dh = _scaled(dz @ table, dloss, h.dtype)
    if needed.table:
        if reduction == "none":
            dtable = _wide_product(dz.t(), _scaled(h, dloss, h.dtype)).to(table.dtype)
        else:
            total = _wide_product(dz.t(), h) if whole else second
            dtable = _scaled(total, dloss / divisor, table.dtype)
    return dh, dtable, dupdate


def _empty_gradients(h: Tensor, table: Tensor, needed: _Needed) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients; the update's has rows as long as dz's, whose alignment products need."""
    dupdate = h.new_empty(0)
    if needed.update:
        dupdate = h.new_empty(h.size(0), _row_length(table.size(0)))[:, : table.size(0)]
    return (
        h.new_empty(h.shape if needed.h else (0,)),
        table.new_empty(table.shape if needed.table else (0,)),
        dupdate,
    )


def _fake_forward(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    update: Tensor | None,
    softcap: float,
    chunk: int,
    reduction: str,
    *needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, first, second = _shapes(h, table, chunk, reduction, _Needed(*needed))
    return h.new_empty(loss, dtype=torch.float32), h.new_empty(first), h.new_empty(second, dtype=torch.float32)


def _fake_backward(
    dloss: Tensor,
    h: Tensor,
    table: Tensor,
    first: Tensor,
    second: Tensor,
    whole: bool,
    reduction: str,
    *needed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(h, table, _Needed(*needed))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, table, _, _, _, chunk, reduction, *_ = inputs
    ctx.set_materialize_grads(False)  # the gradient of dz would be as large as the logits
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(h, table, *output[1:])
    ctx.whole, ctx.reduction = chunk >= h.size(0), reduction


@once_differentiable
def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    needed = _Needed(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    found = _backward_op(dloss, *ctx.saved_tensors, ctx.whole, ctx.reduction, *needed)
    dh, dtable, dupdate = (tensor if need else None for tensor, need in zip(found, needed, strict=True))
    return dh, dtable, None, dupdate, *(None,) * 6


_backward_op = operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor table, Tensor first, Tensor second, bool whole, "
    "str reduction, bool need_h, bool need_table, bool need_update) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_forward_op = operator(
    "linear_cross_entropy(Tensor h, Tensor table, Tensor targets, Tensor? update, float softcap, int chunk, "
    "str reduction, bool need_h, bool need_table, bool need_update) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
)


def linear_cross_entropy_triton(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    softcap: float,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    *,
    update: Tensor | None = None,
) -> Tensor:
    """Compute `linear_cross_entropy` with the kernel, in as many chunks as the memory suggests."""
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (h, table, update)]
    tokens = h.reshape(-1, h.size(-1))
    updates = None if update is None else update.reshape(-1, table.size(0))
    count, row_bytes = tokens.size(0), table.size(0) * h.element_size()
    chunked = reduction != "none" and update is None  # the backward can take several chunks
    if any(needed) and (not chunked or (chunk_tokens is None and count * row_bytes <= ONE_CHUNK_BYTES)):
        chunk_tokens = max(count, 1)
    elif chunk_tokens is None:
        chunk_tokens = _rows_at_a_time(table.size(0), 4 if reduction == "none" else h.element_size())
    loss, *_ = _forward_op(tokens, table, targets.reshape(-1), updates, softcap, chunk_tokens, reduction, *needed)
    return loss.view(targets.shape) if reduction == "none" else loss
