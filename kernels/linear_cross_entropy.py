"""Cross-entropy of a softcapped linear head: loss and gradients from the hidden states.

    z = h tableᵀ + update,   logits = cap tanh(z / cap),   loss_t = log Σ_v exp(logits_tv) - logits_t,target

in nats; `linear_cross_entropy` returns the mean or the sum over tokens, or every token's. ``update`` is what adapters
of the head add to z; without it the term is left out.

The products are cuBLAS's. For a mean or a sum, z is in the dtype of h; an update is added to the rounded product and
rounded again. Every token's loss is a score, and its z is fp32: errors of logits raise a loss by half of their
variance, which is some 2e-4 nats in bfloat16. One kernel reads a row of z once and holds it in registers: with r = 1 /
(1 + exp(2 z / cap)) a logit is cap - 2 cap r, never above cap, so that the softmax needs no maximum (for a cap up to
40: Σ exp(logits - cap) cannot vanish), and 1 - tanh² is 4 (r - r²). Above 40, where r's rounding times 2 cap would
show, r is r - 1/2 = -tanh / 2, near 0 by a series. It writes the loss, and its gradient over z or, where z is a
score's, in the dtype of h,

    dz = (softmax - onehot) (1 - tanh²),   dh = dz table,   dtable = dzᵀ h.

The loss of a target outside [0, V) is NaN, and its dz is zero.

Least traffic: one chunk of tokens, whose dz waits for the backward; the loss's gradient, a number on the device, then
scales the table and dtable and never a large tensor. This takes T V elements of memory. In several chunks, dh and
dtable (in fp32) are made by the forward and scaled by the backward, one more pass over dh. The gradient of an update is
dz itself times the loss's: the backward writes it once and takes dh = dupdate table from it.

Shapes: h [..., d]; table [V, d]; targets [...] int32 or int64; update [..., V].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common.backend import select
from .common.compiling import jit, tl
from .common.launch import launch_parameters
from .common.operators import operator, readable

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ONE_CHUNK_BYTES = 2**31  # logits that are kept for the backward whole
CHUNK_BYTES = 2**29  # logits of a chunk where there are several
ROW_ELEMENTS = 16_384  # the longest row that a program keeps in registers; longer ones it reads in blocks, twice
LARGEST_FIXED_CAP = 40.0  # exp(-2 cap) is a normal number of fp32
SOFTCAPS = 1e-6, 1e30  # from, to: 2 / cap and 2 cap times a logit are numbers of fp32


def linear_cross_entropy_reference(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    softcap: float,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
    update: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; the contract of `linear_cross_entropy`, whose arguments it shares (all tokens are one chunk)."""
    wide = torch.promote_types(h.dtype, torch.float32)
    if reduction == "none":
        h, table = h.to(wide), table.to(wide)
    z = F.linear(h, table) if update is None else F.linear(h, table) + update
    z = z.to(wide).reshape(-1, table.size(0))
    logits = softcap * torch.tanh(z / softcap)
    flat = targets.flatten().long()
    unknown = (flat < 0) | (flat >= table.size(0))
    losses = F.cross_entropy(logits, flat.masked_fill(unknown, 0), reduction="none").masked_fill(unknown, math.nan)
    return losses.view(targets.shape) if reduction == "none" else getattr(losses, reduction)()


@jit
def _complement(z, scale, CENTRED: tl.constexpr):
    """r = 1 / (1 + exp(2 z / cap)), by one exponential and one reciprocal root; CENTRED r - 1/2, to fp32's precision.

    The series is a minimax polynomial of -tanh(z / cap) / 2 for |z / cap| < 1/2, with a relative error of 2e-8.
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
    """(1 - tanh²) / 4 of `_complement`'s r."""
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
    """Losses of rows of z, and dz into ``gradient``, which may be z.

    ``scale`` and ``slope`` are 2 / cap and -2 cap, times log2(e).
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    r_target = _complement(tl.load(z + tl.where(known, target, 0)), scale, SHIFTED)
    least = 0.0  # r of the largest logit, or 0 where the cap itself will do for a maximum
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
        # The target's element once more: a comparison in every element costs as much as the exponentials.
        dz = (tl.exp2((r_target - least) * slope) / total - 1) * 4 * _slope(r_target, SHIFTED)
        tl.debug_barrier()
        tl.store(gradient + target, dz.to(gradient.dtype.element_ty), mask=known)


def _launch(z, targets, losses, softcap: float, vocabulary: int, gradient: Tensor | None) -> None:
    """Losses of the rows of z [T, >= V], and dz into ``gradient`` [T, >= V], which may be z; None: no gradient."""
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
    """a b in fp32, whatever a's and b's dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor * factor, computed in fp32 and rounded once; a factor of one dimension is that of rows."""
    factor = factor.float().reshape(-1, 1)
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


def _logits(h: Tensor, table: Tensor, update: Tensor | None, memory: Tensor | None) -> Tensor:
    """h tableᵀ + update in the first rows of ``memory``, whose own rows are longer where that aligns them; or fp32."""
    if memory is None:
        z = _wide_product(h, table.t())
    else:
        z = memory[: h.size(0)]
        torch.mm(h, table.t(), out=z[:, : table.size(0)])
    if update is not None:
        z[:, : table.size(0)] += update
    return z


def _dz_times(dz, table, divisor: int, out: Tensor) -> Tensor:
    """dz table / divisor into ``out``; the factor costs nothing here."""
    return torch.addmm(out, dz[:, : table.size(0)], table, beta=0, alpha=1 / divisor, out=out)


def _divisor(reduction: str, count: int) -> int:
    """What the losses' sum is divided by."""
    return max(count, 1) if reduction == "mean" else 1


def _shapes(h, table, chunk: int, reduction: str, need_h: bool, need_table: bool, need_update: bool) -> tuple:
    """Shapes of the results: loss, then what the backward takes: dz, or dh and dtable of several chunks."""
    count = h.size(0)
    loss = (count,) if reduction == "none" else ()
    if not (need_h or need_table or need_update):
        return loss, (0,), (0,)
    if chunk >= count:
        return loss, (count, _row_length(table.size(0))), (0,)
    return loss, h.shape if need_h else (0,), table.shape if need_table else (0,)


def _rows_at_a_time(vocabulary: int, element_bytes: int) -> int:
    return max(1, CHUNK_BYTES // (vocabulary * element_bytes))


def _row_length(vocabulary: int) -> int:
    return -(-vocabulary // 64) * 64 if vocabulary % 8 else vocabulary


def _forward(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    update: Tensor | None,
    softcap: float,
    chunk: int,
    reduction: str,
    need_h: bool,
    need_table: bool,
    need_update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h, table, targets = h.contiguous(), table.contiguous(), targets.contiguous()
    count, vocabulary, divisor = h.size(0), table.size(0), _divisor(reduction, h.size(0))
    losses = h.new_empty(count, dtype=torch.float32)
    _, first, second = _shapes(h, table, chunk, reduction, need_h, need_table, need_update)
    whole, wanted, scores = chunk >= count, need_h or need_table or need_update, reduction == "none"
    first = h.new_empty(first)
    second = torch.zeros(second, dtype=torch.float32, device=h.device)
    memory = first if whole and wanted else None
    if not scores and memory is None:
        memory = h.new_empty(min(chunk, count), _row_length(vocabulary))
    if memory is not None:
        memory[:, vocabulary:].zero_()  # results that are never written would differ from call to call
    rows = min(chunk, _rows_at_a_time(vocabulary, 4)) if scores else chunk
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        z = _logits(h[part], table, None if update is None else update[part], None if scores else memory)
        gradient = None if not wanted else first[part] if scores else z
        _launch(z, targets[part], losses[part], softcap, vocabulary, gradient)
        if wanted and not whole:
            if need_h:
                _dz_times(z, table, divisor, first[part])
            if need_table:
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
    need_h: bool,
    need_table: bool,
    need_update: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, table and update, empty where not needed; ``dloss`` is one number, or one a token."""
    h, table, divisor = h.contiguous(), table.contiguous(), _divisor(reduction, h.size(0))
    dh, dtable, dupdate = _empty_gradients(dloss, h, table, first, second, whole, reduction, need_h, False, need_update)
    dz = first[:, : table.size(0)] if whole else first
    if need_update:  # dz itself is kept: there may be another backward
        torch.mul(dz, (dloss.float() / divisor).reshape(-1, 1), out=dupdate)
    if need_h:
        if need_update:
            dh = torch.mm(dupdate, table, out=dh)
        elif not whole:
            dh = _scaled(first, dloss, h.dtype)
        elif reduction == "mean":
            dh = _dz_times(dz, _scaled(table, dloss, table.dtype), divisor, dh)
        else:
            dh = _scaled(dz @ table, dloss, h.dtype)
    if need_table:
        if reduction == "none":
            dtable = _wide_product(dz.t(), _scaled(h, dloss, h.dtype)).to(table.dtype)
        else:
            total = _wide_product(dz.t(), h) if whole else second
            dtable = _scaled(total, dloss / divisor, table.dtype)
    return dh, dtable, dupdate


def _fake_forward(h, table, targets, update, softcap, chunk, reduction, need_h, need_table, need_update):
    loss, first, second = _shapes(h, table, chunk, reduction, need_h, need_table, need_update)
    return (h.new_empty(loss, dtype=torch.float32), h.new_empty(first), h.new_empty(second, dtype=torch.float32))


def _empty_gradients(dloss, h, table, first, second, whole, reduction, need_h, need_table, need_update):
    """Memory of the gradients; an update's has rows as long as dz's, whose alignment products want."""
    dupdate = h.new_empty(0)
    if need_update:
        dupdate = h.new_empty(h.size(0), _row_length(table.size(0)))[:, : table.size(0)]
    return h.new_empty(h.shape if need_h else (0,)), table.new_empty(table.shape if need_table else (0,)), dupdate


def _save(ctx, inputs, output) -> None:
    h, table, _, _, _, chunk, reduction, *_ = inputs
    ctx.set_materialize_grads(False)  # of dz it would be as large as the logits
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(h, table, *output[1:])
    ctx.whole, ctx.reduction = chunk >= h.size(0), reduction


@once_differentiable
def _gradients(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 10
    needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    found = _backward_op(dloss, *ctx.saved_tensors, ctx.whole, ctx.reduction, *needed)
    dh, dtable, dupdate = (tensor if need else None for tensor, need in zip(found, needed, strict=True))
    return dh, dtable, None, dupdate, *(None,) * 6


_backward_op = operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor table, Tensor first, Tensor second, bool whole, "
    "str reduction, bool need_h, bool need_table, bool need_update) -> (Tensor, Tensor, Tensor)",
    _backward,
    _empty_gradients,
)
_forward_op = operator(
    "linear_cross_entropy(Tensor h, Tensor table, Tensor targets, Tensor? update, float softcap, int chunk, "
    "str reduction, bool need_h, bool need_table, bool need_update) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
)


def _linear_cross_entropy_triton(h, table, targets, softcap, reduction, chunk_tokens, update=None) -> Tensor:
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (h, table, update)]
    flat = h.reshape(-1, h.size(-1))
    changes = None if update is None else update.reshape(-1, table.size(0))
    count, row = flat.size(0), table.size(0) * h.element_size()
    several = reduction != "none" and update is None  # chunks, where a gradient is wanted
    if any(needed) and (not several or (chunk_tokens is None and count * row <= ONE_CHUNK_BYTES)):
        chunk_tokens = max(count, 1)
    elif chunk_tokens is None:
        chunk_tokens = _rows_at_a_time(table.size(0), 4 if reduction == "none" else h.element_size())
    loss, *_ = _forward_op(flat, table, targets.reshape(-1), changes, softcap, chunk_tokens, reduction, *needed)
    return loss.view(targets.shape) if reduction == "none" else loss


_LINEAR_CROSS_ENTROPY = {"reference": linear_cross_entropy_reference, "triton": _linear_cross_entropy_triton}


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
    """Mean over tokens of the cross-entropy in nats of the logits softcap * tanh((h tableᵀ + update) / softcap).

    Differentiable once in h, table and update, which are bfloat16, float16, float32 or float64 all. Kernels compute in
    fp32, from logits z in h's dtype, with ``"none"`` in fp32; float64 is left to the reference. ``softcap`` is from
    1e-6 to 1e30; above 40 kernels compute a few sums more for each logit. ``reduction="sum"`` gives the sum over
    tokens, ``"none"`` every token's loss. ``update`` [..., V] is added to h tableᵀ. ``chunk_tokens``: tokens whose
    logits are in memory at a time; by default all where a gradient is wanted and they take at most 2 GiB, else what
    takes 512 MiB. With ``"none"`` or an update, one chunk has all tokens where a gradient is wanted.

    Returns float32 (float64 for float64), a scalar or with ``reduction="none"`` the targets' shape. Raises ValueError
    for a wrong shape, device, softcap, reduction or chunk and for targets outside [0, V), TypeError for a wrong dtype.
    On a GPU reading the targets would wait for it: there and in compiled code a target outside the table makes the loss
    NaN and has no part in the gradients.
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
    chosen = linear_cross_entropy_reference
    if h.dtype != torch.float64:
        chosen = select("linear_cross_entropy", _LINEAR_CROSS_ENTROPY, h)
    return chosen(h, table, targets, float(softcap), reduction, chunk_tokens, update)
