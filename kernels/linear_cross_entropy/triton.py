"""Cross-entropy of a linear head: the products, in chunks of tokens, and the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.operators import operator
from .rows import Terms, launch

ONE_CHUNK_BYTES = 2**31  # the most that the logits of all tokens may take to be kept whole for the backward
CHUNK_BYTES = 2**29  # bytes of a chunk's logits where there are several chunks


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in fp32, whatever the dtype of a and b."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _column_sums(dz: Tensor, dloss: Tensor) -> Tensor:
    """Return the sums over tokens of dz times dloss, one number or one for each token, in fp32."""
    if dloss.ndim:
        return _wide_product(dloss.to(dz.dtype)[None], dz)[0]
    return dz.sum(0, dtype=torch.float32) * dloss


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
    bias: bool


def _shapes(h: Tensor, table: Tensor, chunk: int, reduction: str, needed: _Needed) -> tuple[Sequence[int], ...]:
    """Return the shapes of the loss and of the three tensors kept for the backward.

    In one chunk the first is dz and the others are empty. In several chunks they are dh, dtable and dbias, and of every
    token's loss nothing is kept.
    """
    count, vocabulary = h.size(0), table.size(0)
    loss = (count,) if reduction == "none" else ()
    if any(needed) and chunk >= count:
        return loss, (count, _row_length(vocabulary)), (0,), (0,)
    if not any(needed) or reduction == "none":
        return loss, (0,), (0,), (0,)
    return (
        loss,
        h.shape if needed.h else (0,),
        table.shape if needed.table else (0,),
        (vocabulary,) if needed.bias else (0,),
    )


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
    bias: Tensor | None,
    weight: Tensor | None,
    softcap: Sequence[float] | None,
    ignore_index: int | None,
    label_smoothing: float,
    lse_square_scale: float,
    with_z_loss: bool,
    chunk: int,
    reduction: str,
    *needed_gradients: bool,
) -> tuple[Tensor, ...]:
    """Return the loss, the part of it that the z-loss is or an empty tensor, and what `_shapes` says is kept."""
    h, targets, needed = h.contiguous(), targets.contiguous(), _Needed(*needed_gradients)
    rounded = table.contiguous().to(h.dtype)
    terms = Terms(softcap, ignore_index, label_smoothing, lse_square_scale, bias, weight)
    count, vocabulary, divisor = h.size(0), table.size(0), _divisor(reduction, h.size(0))
    losses = h.new_empty(count, dtype=torch.float32)
    z_losses = torch.empty_like(losses) if with_z_loss else None
    _, *shapes = _shapes(h, table, chunk, reduction, needed)
    whole, scores = chunk >= count, reduction == "none"
    differentiated = any(needed) and (whole or not scores)
    first = h.new_empty(shapes[0])
    second, third = (torch.zeros(shape, dtype=torch.float32, device=h.device) for shape in shapes[1:])
    memory = first if whole and differentiated else None
    if not scores and memory is None:
        memory = h.new_empty(min(chunk, count), _row_length(vocabulary))
    if memory is not None:
        memory[:, vocabulary:].zero_()  # nothing writes the padding, and its content would differ from call to call
    rows = min(chunk, _rows_at_a_time(vocabulary, 4)) if scores else chunk
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        z = _logits(h[part], rounded, None if update is None else update[part], None if scores else memory)
        gradient = None if not differentiated else first[part] if scores else z
        launch(
            z, targets[part], losses[part], terms, vocabulary, gradient, None if z_losses is None else z_losses[part]
        )
        if differentiated and not whole:
            if needed.h:
                _dz_times(z, rounded, divisor, first[part])
            if needed.table:
                second += _wide_product(z[:, :vocabulary].t(), h[part])
            if needed.bias:
                third += z[:, :vocabulary].sum(0, dtype=torch.float32)
        del z, gradient  # frees what the next ones take
    z_loss = losses.new_empty(0) if z_losses is None else _reduced(z_losses, reduction)
    return _reduced(losses, reduction), z_loss, first, second, third


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    """Return the mean or the sum, or all."""
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _backward(
    dloss: Tensor,
    h: Tensor,
    table: Tensor,
    first: Tensor,
    second: Tensor,
    third: Tensor,
    whole: bool,
    reduction: str,
    *needed_gradients: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of h, table, update and bias, empty where not needed; that of a bias in fp32.

    ``dloss`` is one number, or one for each token. The tensors after the table are those of `_forward`.
    """
    h, table, needed = h.contiguous(), table.contiguous(), _Needed(*needed_gradients)
    divisor = _divisor(reduction, h.size(0))
    dh, dtable, dupdate, dbias = _empty_gradients(h, table, needed._replace(table=False, bias=False))
    dz = first[:, : table.size(0)] if whole else first
    if needed.update:  # dz itself stays as it is: there may be another backward
        torch.mul(dz, (dloss.float() / divisor).reshape(-1, 1), out=dupdate)
    if needed.h:
        if needed.update:
            dh = torch.mm(dupdate, table.to(h.dtype), out=dh)
        elif not whole:
            dh = _scaled(first, dloss, h.dtype)
        elif reduction == "mean":
            dh = _dz_times(dz, _scaled(table, dloss, h.dtype), divisor, dh)
        else:
            dh = _scaled(dz @ table.to(h.dtype), dloss, h.dtype)
    if needed.table:
        if reduction == "none":
            dtable = _wide_product(dz.t(), _scaled(h, dloss, h.dtype)).to(table.dtype)
        else:
            total = _wide_product(dz.t(), h) if whole else second
            dtable = _scaled(total, dloss / divisor, table.dtype)
    if needed.bias:
        dbias = _column_sums(dz, dloss.float() / divisor) if whole else third * (dloss / divisor)
    return dh, dtable, dupdate, dbias


def _backward_again(
    dlosses: Tensor,
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    softcap: Sequence[float] | None,
    ignore_index: int | None,
    label_smoothing: float,
    lse_square_scale: float,
    chunk: int,
    *needed_gradients: bool,
) -> tuple[Tensor, ...]:
    """Return what `_backward` does for every token's loss, from logits that are computed again in chunks."""
    h, targets, needed = h.contiguous(), targets.contiguous(), _Needed(*needed_gradients)
    rounded = table.contiguous().to(h.dtype)
    terms = Terms(softcap, ignore_index, label_smoothing, lse_square_scale, bias, weight)
    count, vocabulary = h.size(0), table.size(0)
    dh, _, dupdate, _ = _empty_gradients(h, table, needed._replace(table=False, bias=False))
    dtable, dbias = (
        torch.zeros(shape if need else (0,), dtype=torch.float32, device=h.device)
        for shape, need in ((table.shape, needed.table), ((vocabulary,), needed.bias))
    )
    rows = min(chunk, _rows_at_a_time(vocabulary, 4))
    memory, losses = h.new_empty(rows, _row_length(vocabulary)), h.new_empty(rows, dtype=torch.float32)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        z = _logits(h[part], rounded, None, None)
        gradient, dloss = memory[: z.size(0)], dlosses[part]
        launch(z, targets[part], losses, terms, vocabulary, gradient)
        dz = gradient[:, :vocabulary]
        if needed.h:
            torch.mul(dz @ rounded, dloss.float()[:, None], out=dh[part])
        if needed.table:
            dtable += _wide_product(dz.t(), _scaled(h[part], dloss, h.dtype))
        if needed.bias:
            dbias += _column_sums(dz, dloss)
        del z  # frees what the next one takes
    return dh, dtable.to(table.dtype), dupdate, dbias


def _empty_gradients(h: Tensor, table: Tensor, needed: _Needed) -> tuple[Tensor, ...]:
    """Allocate the gradients; the update's has rows as long as dz's, whose alignment products need."""
    dupdate = h.new_empty(0)
    if needed.update:
        dupdate = h.new_empty(h.size(0), _row_length(table.size(0)))[:, : table.size(0)]
    return (
        h.new_empty(h.shape if needed.h else (0,)),
        table.new_empty(table.shape if needed.table else (0,)),
        dupdate,
        h.new_empty((table.size(0),) if needed.bias else (0,), dtype=torch.float32),
    )


def _fake_forward(h: Tensor, table: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, with_z_loss, chunk, reduction = rest[:-4]
    loss, *kept = _shapes(h, table, chunk, reduction, _Needed(*rest[-4:]))
    shapes, wide = (loss, loss if with_z_loss else (0,), kept[1], kept[2]), torch.float32
    found, z_loss, second, third = (h.new_empty(shape, dtype=wide) for shape in shapes)
    return found, z_loss, h.new_empty(kept[0]), second, third


def _fake_backward(dloss: Tensor, h: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(h, table, _Needed(*rest[-4:]))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    h, table, targets, _, bias, weight, *terms, _, chunk, ctx.reduction = inputs[:-4]
    ctx.set_materialize_grads(False)  # the gradient of dz would be as large as the logits
    ctx.mark_non_differentiable(*output[1:])
    ctx.whole, ctx.again = chunk >= h.size(0), (*terms, chunk)
    kept = (targets, bias, weight) if ctx.reduction == "none" and not ctx.whole else output[2:]
    ctx.save_for_backward(h, table, *kept)
    ctx.bias_dtype = None if bias is None else bias.dtype


@once_differentiable
def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 17
    needed = _Needed(*(ctx.needs_input_grad[place] for place in (0, 1, 3, 4)))
    if ctx.reduction == "none" and not ctx.whole:
        found = _backward_again_op(dloss, *ctx.saved_tensors, *ctx.again, *needed)
    else:
        found = _backward_op(dloss, *ctx.saved_tensors, ctx.whole, ctx.reduction, *needed)
    dh, dtable, dupdate, dbias = (tensor if need else None for tensor, need in zip(found, needed, strict=True))
    return dh, dtable, None, dupdate, None if dbias is None else dbias.to(ctx.bias_dtype), *(None,) * 12


_TERMS = (
    "Tensor? bias, Tensor? weight, float[]? softcap, int? ignore_index, float label_smoothing, float lse_square_scale"
)
_NEEDED = "bool need_h, bool need_table, bool need_update, bool need_bias"
_backward_op = operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor table, Tensor first, Tensor second, Tensor third, "
    f"bool whole, str reduction, {_NEEDED}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_backward_again_op = operator(
    f"linear_cross_entropy_backward_again(Tensor dlosses, Tensor h, Tensor table, Tensor targets, {_TERMS}, int chunk, "
    f"{_NEEDED}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_again,
    _fake_backward,
)
_forward_op = operator(
    f"linear_cross_entropy(Tensor h, Tensor table, Tensor targets, Tensor? update, {_TERMS}, bool with_z_loss, "
    f"int chunk, str reduction, {_NEEDED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
)


def _weight_of(targets: Tensor, weight: Tensor, ignore_index: int | None) -> Tensor:
    """Return the sum of the targets' class weights."""
    known = (targets >= 0) & (targets < weight.size(0))
    if ignore_index is not None:
        known &= targets != ignore_index
    return weight.index_select(0, targets.where(known, 0)).where(known, 0).sum()


def linear_cross_entropy_triton(
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
    """Compute `linear_cross_entropy` with the kernel, in as many chunks as the memory suggests."""
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (h, table, update, bias)]
    tokens, targets_1d = h.reshape(-1, h.size(-1)), targets.reshape(-1)
    updates = None if update is None else update.reshape(-1, table.size(0))
    count, row_bytes = tokens.size(0), table.size(0) * h.element_size()
    fits = chunk_tokens is None and count * row_bytes <= ONE_CHUNK_BYTES
    if any(needed) and (update is not None or fits):  # the gradient of an update is as large as all logits
        chunk_tokens = max(count, 1)
    elif chunk_tokens is None:
        chunk_tokens = _rows_at_a_time(table.size(0), 4 if reduction == "none" else h.element_size())
    counted = None if ignore_index is None or reduction != "mean" else (targets_1d != ignore_index).sum().float()
    if weight is not None:
        weight = weight.detach().float().contiguous()
        if reduction == "mean":
            weight = weight * ((count if counted is None else counted) / _weight_of(targets_1d, weight, ignore_index))
    loss, z_loss, *_ = _forward_op(
        tokens,
        table,
        targets_1d,
        updates,
        None if bias is None else bias.contiguous(),
        weight,
        [softcap] if isinstance(softcap, float) else softcap,
        ignore_index,
        label_smoothing,
        lse_square_scale,
        return_z_loss,
        chunk_tokens,
        reduction,
        *needed,
    )
    if counted is not None:
        # The operator divides by all tokens. The share is exactly 1 where none is ignored; where all are, the mean is
        # NaN and the gradients stay zero.
        share, none = count / counted.clamp(min=1), counted == 0
        loss, z_loss = ((value * share).masked_fill(none, math.nan) for value in (loss, z_loss))
    if reduction == "none":
        loss = loss.view(targets.shape)
        z_loss = z_loss.view(targets.shape) if return_z_loss else z_loss
    return (loss, z_loss) if return_z_loss else loss
