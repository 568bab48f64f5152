"""Cross-entropy of a softcapped linear head, without logits in fp32: loss and gradients from the hidden states.

    z = h tableᵀ,   logits = cap tanh(z / cap),   loss_t = log Σ_v exp(logits_tv) - logits_t,target

in nats; `linear_cross_entropy` returns the mean over tokens, or every token's.

The products are cuBLAS's, and z is in the dtype of h. One kernel reads a row of z once and holds it in registers: with
r = 1 / (1 + exp(2 z / cap)) a logit is cap - 2 cap r, never above cap, so that the softmax needs no maximum (for a cap
up to 40: Σ exp(logits - cap) cannot vanish), and 1 - tanh² is 4 (r - r²). It writes the loss, and over z its gradient

    dz = (softmax - onehot) (1 - tanh²),   dh = dz table,   dtable = dzᵀ h.

Least traffic: one chunk of tokens, whose dz waits for the backward; the loss's gradient, a number on the device, then
scales the table and dtable and never a large tensor. This takes T V elements of memory. In several chunks, dh and
dtable (in fp32) are made by the forward and scaled by the backward, one more pass over dh.

Shapes: h [..., d]; table [V, d]; targets [...] int32 or int64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._launch import jit, launch_parameters, operator, select, tl

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ONE_CHUNK_BYTES = 2**31  # logits that are kept for the backward whole
CHUNK_BYTES = 2**29  # logits of a chunk where there are several
ROW_ELEMENTS = 16_384  # the longest row that a program keeps in registers; longer ones it reads in blocks, twice
LARGEST_FIXED_CAP = 40.0  # exp(-2 cap) is a normal number of fp32


def linear_cross_entropy_reference(
    h: torch.Tensor,
    table: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Plain PyTorch; the contract of `linear_cross_entropy`, whose arguments it shares (all tokens are one chunk)."""
    logits = softcap * torch.tanh(F.linear(h, table) / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, table.size(0))
    losses = F.cross_entropy(logits, targets.flatten().long(), reduction=reduction)
    return losses.view(targets.shape) if reduction == "none" else losses


@jit
def _complement(z, scale):
    """r = 1 / (1 + exp(2 z / cap)), by one exponential and one reciprocal root."""
    root = tl.rsqrt(1 + tl.exp2(z.to(tl.float32) * scale))
    return root * root


@jit
def _softcap_cross_entropy_kernel(
    z, targets, losses, stride, cap, scale, slope, V: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """Losses of rows of z, which with GRADIENT become dz. scale and slope are 2 / cap and -2 cap, times log2(e)."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < V)
    r_target = _complement(tl.load(z + tl.where(known, target, 0)), scale)
    least = 0.0  # r of the largest logit, or 0 where the cap itself will do for a maximum
    if V <= BLOCK:
        inside = (columns < V) | (V == BLOCK)
        r = _complement(tl.load(z + columns, mask=inside, other=0), scale)
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
                r = _complement(tl.load(z + start + columns, mask=inside, other=0), scale)
                lowest = tl.minimum(lowest, tl.where(inside, r, 1))
            least = tl.min(lowest)
        for start in range(0, V, BLOCK):
            inside = (start + columns < V) | (V % BLOCK == 0)
            r = _complement(tl.load(z + start + columns, mask=inside, other=0), scale)
            sums += tl.where(inside, tl.exp2((r - least) * slope), 0)
        total = tl.sum(sums)
    loss = tl.log(total) + 2 * cap * (r_target - least)
    tl.store(losses + row, tl.where(known, loss, float("nan")))
    if GRADIENT:
        share = 4 / total
        if V <= BLOCK:
            dz = weight * (r - r * r) * share
            tl.store(z + columns, dz.to(z.dtype.element_ty), mask=inside)
        else:
            for start in range(0, V, BLOCK):
                inside = (start + columns < V) | (V % BLOCK == 0)
                r = _complement(tl.load(z + start + columns, mask=inside, other=0), scale)
                dz = tl.exp2((r - least) * slope) * (r - r * r) * share
                tl.store(z + start + columns, dz.to(z.dtype.element_ty), mask=inside)
        # The target's element once more: a comparison in every element costs as much as the exponentials.
        dz = (tl.exp2((r_target - least) * slope) / total - 1) * 4 * (r_target - r_target * r_target)
        tl.debug_barrier()
        tl.store(z + target, dz.to(z.dtype.element_ty), mask=known)


def _launch(z, targets, losses, softcap: float, vocabulary: int, gradient: bool) -> None:
    """Losses of the rows of z [T, >= V], and the gradient in its place."""
    case = "blocks" if vocabulary > ROW_ELEMENTS else "gradient" if gradient else "loss"
    tuned = launch_parameters("linear_cross_entropy", case, z.device)
    block = tuned["block"] if case == "blocks" else 1 << (vocabulary - 1).bit_length()
    warps = min(32, max(1, block // tuned["columns_per_warp"]))
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _softcap_cross_entropy_kernel[(z.size(0),)](
            z, targets, losses, z.stride(0), softcap, 2 * math.log2(math.e) / softcap,
            -2 * math.log2(math.e) * softcap, V=vocabulary, BLOCK=block, SHIFTED=softcap > LARGEST_FIXED_CAP,
            GRADIENT=gradient, num_warps=warps,
        )  # fmt: skip


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32, whatever a's and b's dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _scaled(tensor: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor * factor, computed in fp32 and rounded once; a factor of one dimension is that of rows."""
    factor = factor.float().reshape(-1, 1)
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


def _logits(h: torch.Tensor, table: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """h tableᵀ in the first rows of ``memory``, whose own rows are longer where that aligns them."""
    z = memory[: h.size(0)]
    torch.mm(h, table.t(), out=z[:, : table.size(0)])
    return z


def _mean_of_dz_times(dz, table, count: int, out: torch.Tensor) -> torch.Tensor:
    """dz table / count into ``out``; the factor costs nothing here."""
    return torch.addmm(out, dz[:, : table.size(0)], table, beta=0, alpha=1 / max(count, 1), out=out)


def _shapes(h, table, chunk: int, mean: bool, need_h: bool, need_table: bool) -> tuple:
    """Shapes of the results: loss, then what the backward takes: dz, or dh and dtable of several chunks."""
    count = h.size(0)
    loss = () if mean else (count,)
    if not (need_h or need_table):
        return loss, (0,), (0,)
    if chunk >= count:
        return loss, (count, _row_length(table.size(0))), (0,)
    return loss, h.shape if need_h else (0,), table.shape if need_table else (0,)


def _row_length(vocabulary: int) -> int:
    return -(-vocabulary // 64) * 64 if vocabulary % 8 else vocabulary


def _forward(
    h: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, softcap: float, chunk: int, mean: bool, need_h: bool,
    need_table: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    h, table, targets = h.contiguous(), table.contiguous(), targets.contiguous()
    count, vocabulary = h.size(0), table.size(0)
    losses = h.new_empty(count, dtype=torch.float32)
    _, first, second = _shapes(h, table, chunk, mean, need_h, need_table)
    whole, wanted = chunk >= count, need_h or need_table
    first = h.new_empty(first)
    second = torch.zeros(second, dtype=torch.float32, device=h.device)
    memory = first if whole and wanted else h.new_empty(min(chunk, count), _row_length(vocabulary))
    memory[:, vocabulary:].zero_()  # results that are never written would differ from call to call
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        z = _logits(h[part], table, memory)
        _launch(z, targets[part], losses[part], softcap, vocabulary, wanted)
        if wanted and not whole:
            if need_h:
                _mean_of_dz_times(z, table, count, first[part])
            if need_table:
                second += _wide_product(z[:, :vocabulary].t(), h[part])
    return losses.mean() if mean else losses, first, second


def _backward(
    dloss: torch.Tensor, h: torch.Tensor, table: torch.Tensor, first: torch.Tensor, second: torch.Tensor, whole: bool,
    need_h: bool, need_table: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of h and table, empty where not needed; ``dloss`` is one number for the mean, else one a token."""
    h, table = h.contiguous(), table.contiguous()
    count, dh, dtable = h.size(0), h.new_empty(0), table.new_empty(0)
    dz, mean = first[:, : table.size(0)] if whole else first, dloss.ndim == 0
    if need_h:
        if not whole:
            dh = _scaled(first, dloss, h.dtype)
        elif mean:
            dh = _mean_of_dz_times(dz, _scaled(table, dloss, table.dtype), count, torch.empty_like(h))
        else:
            dh = _scaled(dz @ table, dloss, h.dtype)
    if need_table:
        if mean:
            total = _wide_product(dz.t(), h) if whole else second
            dtable = _scaled(total, dloss / max(count, 1), table.dtype)
        else:
            dtable = _wide_product(dz.t(), _scaled(h, dloss, h.dtype)).to(table.dtype)
    return dh, dtable


def _fake_forward(h, table, targets, softcap, chunk, mean, need_h, need_table):
    loss, first, second = _shapes(h, table, chunk, mean, need_h, need_table)
    return (
        h.new_empty(loss, dtype=torch.float32), h.new_empty(first), h.new_empty(second, dtype=torch.float32)
    )  # fmt: skip


def _fake_backward(dloss, h, table, first, second, whole, need_h, need_table):
    return h.new_empty(h.shape if need_h else (0,)), table.new_empty(table.shape if need_table else (0,))


def _save(ctx, inputs, output) -> None:
    h, table, _, _, chunk, *_ = inputs
    ctx.set_materialize_grads(False)  # of dz it would be as large as the logits
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(h, table, *output[1:])
    ctx.whole = chunk >= h.size(0)


@once_differentiable
def _gradients(ctx, dloss, *_):
    need_h, need_table = ctx.needs_input_grad[:2]
    if dloss is None:
        return (None,) * 8
    dh, dtable = _backward_op(dloss, *ctx.saved_tensors, ctx.whole, need_h, need_table)
    return dh if need_h else None, dtable if need_table else None, *(None,) * 6


_backward_op = operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor table, Tensor first, Tensor second, bool whole, "
    "bool need_h, bool need_table) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_forward_op = operator(
    "linear_cross_entropy(Tensor h, Tensor table, Tensor targets, float softcap, int chunk, bool mean, bool need_h, "
    "bool need_table) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
)


def _linear_cross_entropy_triton(h, table, targets, softcap, reduction, chunk_tokens) -> torch.Tensor:
    need_h, need_table = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (h, table))
    flat, mean = h.reshape(-1, h.size(-1)), reduction == "mean"
    count, row = flat.size(0), table.size(0) * h.element_size()
    wanted = need_h or need_table
    if wanted and (not mean or (chunk_tokens is None and count * row <= ONE_CHUNK_BYTES)):
        chunk_tokens = max(count, 1)
    elif chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES // row)
    loss, *_ = _forward_op(flat, table, targets.reshape(-1), softcap, chunk_tokens, mean, need_h, need_table)
    return loss if mean else loss.view(targets.shape)


_LINEAR_CROSS_ENTROPY = {"reference": linear_cross_entropy_reference, "triton": _linear_cross_entropy_triton}


def linear_cross_entropy(
    h: torch.Tensor,
    table: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Mean over tokens of the cross-entropy in nats of the logits softcap * tanh(h tableᵀ / softcap).

    Differentiable once in h and table, which are bfloat16, float16, float32 or float64 both. Kernels compute in fp32
    from logits z in h's dtype; float64 is left to the reference. ``reduction="none"`` gives every token's loss, in
    one chunk where a gradient is wanted. ``chunk_tokens``: tokens whose logits are in memory at a time; by default
    all where a gradient is wanted and they take at most 2 GiB, else what takes 512 MiB.

    Returns float32 (float64 for float64), a scalar or with ``reduction="none"`` the targets' shape. Raises ValueError
    for a wrong shape, device, softcap, reduction or chunk and for targets outside [0, V), TypeError for a wrong dtype.
    On a GPU reading the targets would wait for it: there a target outside the table makes the loss NaN.
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
    for argument, tensor in (("table", table), ("targets", targets)):
        if tensor.device != h.device:
            raise ValueError(f"{argument} must be on h's device {h.device}, got {tensor.device}")
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    readable = targets.device.type == "cpu" and type(targets) is torch.Tensor and not torch.compiler.is_compiling()
    if readable and targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= table.size(0):
            raise ValueError(f"targets must be in [0, {table.size(0)}), got {low if low < 0 else high}")
    chosen = linear_cross_entropy_reference
    if h.dtype != torch.float64:
        chosen = select("linear_cross_entropy", _LINEAR_CROSS_ENTROPY, h)
    return chosen(h, table, targets, float(softcap), reduction, chunk_tokens)
