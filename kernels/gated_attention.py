"""Everything of an attention sublayer between its fused input projection and its output projection, as one op.

A row of ``projected`` holds, of one token, H query heads, K key heads and K value heads of D columns each, then H gate
logits where the op is ``gated``, then padding. Query head h reads key head j = h // (H / K):

    q^_h = gain_h R(q_h / rms(q_h)),   k^_j = R(k_j / rms(k_j)),   rms(x) = sqrt(mean(x²) + eps)
    o_h = softmax(q^_h k^_jᵀ / sqrt(D)) v_j over the token's own past in its segment
    z_h = o_h - <o_h, u_j> u_j with u = v / max(|v|, 1e-12) where the own value is excluded, else o_h
    y_h = 2 σ(logit_h) z_h where gated, else z_h

R rotates the pairs (i, i + P) of the leading 2 P dimensions by the token's angles, whose cosines and sines are given.

Kernels: four streams around an attention core (`CORES`), each of one pass and 16-byte accesses; a program takes a few
tokens with all heads. The *prologue* reads q and k and writes q^ and k^ side by side, [T, H + K, D]; the *epilogue*
reads o, v and logits and writes y. The *epilogue's backward* writes do, delta = <do, o>, and of the projection's
gradient the logits' and what the exclusion gives v; the core's backward writes dq^ and dk^ where dq and dk will be; the
*prologue's backward* turns them into these in place, adds the core's dv unless the core has, and sums the gains'
gradient by programs. The Triton core computes the epilogue and its backward itself, on what it has in registers. Saved
are the inputs, q^ and k^, the logarithms of the softmax's sums (lse), and o, or in its stead y and <o, u> [H, T].

MB read + written at T = 98,304, H = 8, K = 4, D = 64 in bf16: 151 + 151, 153 + 101, 253 + 157, and 403 + 201, or
302 + 151 where the core adds to dv.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from . import _gated_attention_kernels as kernels
from . import varlen_attention
from ._launch import RMS_EPS, operator, runs_kernels, select
from .varlen_attention import Prologue, turns_in_registers

Tensor = torch.Tensor
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# torch 2.11 takes fewer key heads without being told; later versions want to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


# --- Reference ---


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def prologue_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, eps: float = RMS_EPS
) -> tuple[Tensor, Tensor]:
    """(q^, k^) of q [B, T, H, D] and k [B, T, K, D]."""
    q, k = (_rotate(F.rms_norm(x, (x.size(-1),), eps=eps), cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))
    return q * q_gain[:, None].to(q.dtype), k


def epilogue_reference(o: Tensor, v: Tensor, logits: Tensor | None, exclude_own_value: bool) -> Tensor:
    """y [B, T, H, D] of o [B, T, H, D], v [B, T, K, D] and the gates' logits [B, T, H]."""
    if exclude_own_value:
        own = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
        grouped = o.unflatten(2, (v.size(2), -1))
        o = (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)
    return o if logits is None else o * (2 * torch.sigmoid(logits))[..., None]


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, core: str = "auto"
) -> Tensor:
    """Causal attention of q [B, T, H, D] on k, v [B, T, K, D] in rows, or in the segments of a single one."""
    if not torch.compiler.is_compiling() and (v.stride(1) % 8 or v.storage_offset() % 8):
        v = v.contiguous()  # PyTorch's kernels read 16 bytes at a time, whatever the address
    if cu_seqlens is None:
        return _dense(q, k, v)
    if core != "sdpa" and _flash_takes(q.device, q.dtype, q.size(-1)):
        bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
        return varlen_attn(q[0], k[0], v[0], *bounds, window_size=(-1, 0), **_GROUPED)[None]
    if torch.compiler.is_compiling():  # the compiler cannot know how long segments are
        positions = torch.arange(q.size(1), device=q.device)
        segments = torch.searchsorted(cu_seqlens, positions, right=True)
        return _dense(q, k, v, (segments[:, None] == segments) & (positions[:, None] >= positions))
    parts = [_dense(q[:, low:high], k[:, low:high], v[:, low:high]) for low, high in _segments(cu_seqlens)]
    return torch.cat(parts, dim=1) if parts else q


def _gated_attention_reference(
    projected, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, exclude_own_value, gated, eps, core
) -> Tensor:
    q, k, v, rest = projected.split([H * D, K * D, K * D, projected.size(-1) - (H + 2 * K) * D], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    o = attention_reference(*prologue_reference(q, k, cos, sin, q_gain, eps), v, cu_seqlens, max_seqlen, core)
    return epilogue_reference(o, v, rest[..., :H] if gated else None, exclude_own_value).flatten(2)


# --- Attention cores ---


def _segments(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return ((low, high) for low, high in zip(bounds, bounds[1:], strict=False) if high > low)


def _scores(q: Tensor, k: Tensor, v: Tensor, low: int, high: int, scale: float) -> tuple[Tensor, ...]:
    """q, k, v of one segment as [heads, L, D] in at least float32, k and v for each query head, and the scores."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x[low:high].transpose(0, 1).to(accumulate) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(0) // x.size(0), 0) for x in (k, v))
    future = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
    return q, k, v, (scale * q @ k.mT).masked_fill(future, float("-inf"))


def _plain_forward(q, k, v, cu_seqlens, max_seqlen, scale) -> tuple[Tensor, Tensor]:
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.size(1), q.size(0), dtype=torch.promote_types(q.dtype, torch.float32))
    with torch.autocast(q.device.type, enabled=False):
        for low, high in _segments(cu_seqlens):
            *_, values, scores = _scores(q, k, v, low, high, scale)
            lse[:, low:high] = scores.logsumexp(-1)
            o[low:high] = (scores.softmax(-1) @ values).transpose(0, 1).to(o.dtype)
    return o, lse


def _plain_backward(
    do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, delta=None, dq=None, dk=None, dv=None, *, add_dv=False
):
    dq, dk, dv = (x.new_empty(x.shape) if out is None else out for x, out in ((q, dq), (k, dk), (v, dv)))
    with torch.autocast(q.device.type, enabled=False):
        for low, high in _segments(cu_seqlens):
            span = slice(low, high)
            queries, keys, values, scores = _scores(q, k, v, low, high, scale)
            slope = do[span].transpose(0, 1).to(scores.dtype)
            p = (scores - lse[:, span, None]).exp()
            along = (slope * o[span].transpose(0, 1)).sum(-1) if delta is None else delta[:, span]
            ds = scale * p * (slope @ values.mT - along[..., None])
            for out, whole, add in ((dq, ds @ keys, False), (dk, ds.mT @ queries, False), (dv, p.mT @ slope, add_dv)):
                whole = whole.unflatten(0, (out.size(1), -1)).sum(1).transpose(0, 1)
                out[span] = (whole + out[span] if add else whole).to(out.dtype)
    return dq, dk, dv


def _flash_forward(q, k, v, cu_seqlens, max_seqlen, scale) -> tuple[Tensor, Tensor]:
    v = v if v.stride(0) % 8 == 0 else v.contiguous()
    bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return torch.ops.aten._flash_attention_forward(q, k, v, *bounds, 0.0, True, False, scale=scale)[:2]


def _flash_backward(do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, delta=None, dq=None, dk=None, dv=None):
    v = v if v.stride(0) % 8 == 0 else v.contiguous()
    bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    # Without dropout the state of the random numbers is not read.
    random = torch.empty(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(do, q, k, v, o, lse, *bounds, 0.0, True, *random, scale=scale)


class Core(NamedTuple):
    """Attention of q [T, H, D] on k, v [T, K, D], which may be strided.

    forward(q, k, v, cu_seqlens, max_seqlen, scale) -> (o, lse [H, T]). backward(do, q, k, v, o, lse, cu_seqlens,
    max_seqlen, scale, delta, dq, dk, dv) -> (dq, dk, dv) with delta = <do, o> [H, T] may write into the dq, dk, dv that
    it gets, or return others. With ``adds`` it takes ``add_dv=True`` to add to dv. With ``fuses`` forward and backward
    also take what makes the epilogue part of them, as `varlen_attention._forward` and `_backward` have it.
    """

    forward: Callable
    backward: Callable
    adds: bool = False
    fuses: bool = False


CORES = {
    # heads of 16, 32, 64 or 128
    "triton": Core(varlen_attention._forward, varlen_attention._backward, adds=True, fuses=True),
    "flash": Core(_flash_forward, _flash_backward),  # PyTorch's FlashAttention: CUDA, half precision
    "sdpa": Core(_plain_forward, _plain_backward, adds=True),  # plain PyTorch, segment by segment; waits for the device
}


def _flash_takes(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> bool:
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.device(device).type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256


def resolve_core(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """``auto`` made definite: which core computes attention there.

    Raises ValueError for an unknown name and where ``flash`` is asked for and cannot be had.
    """
    if name not in ("auto", *CORES):
        raise ValueError(f"attention has the cores auto, {', '.join(CORES)}, and {name!r} is none of them")
    flash = _flash_takes(device, dtype, head_dim)
    if name == "flash" and not flash:
        raise ValueError(f"flash attention needs CUDA, half precision and heads of a multiple of 8 up to 256, and this "
                         f"is {device}, {dtype}, {head_dim}; use auto or sdpa")  # fmt: skip
    if name != "auto":
        return name
    suits = dtype != torch.float64 and head_dim in (16, 32, 64, 128)
    if suits and runs_kernels(torch.device(device)):
        return "triton"
    return "flash" if flash else "sdpa"


# --- The op ---


def _flat(projected: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Tensor, Tensor, int]:
    """Rows [B T, N], contiguous each, the segments' boundaries and the longest segment."""
    rows, tokens, width = projected.shape
    projected = projected.reshape(rows * tokens, width)
    projected = projected if projected.stride(1) == 1 else projected.contiguous()
    if cu_seqlens is not None:
        return projected, cu_seqlens, max_seqlen
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=projected.device) * tokens
    return projected, cu_seqlens, tokens


def _heads(x: Tensor, first: int, count: int, D: int) -> Tensor:
    """``count`` heads of D columns, from the ``first`` on, of x [T, columns]: a view [T, count, D]."""
    return x[:, first * D : (first + count) * D].unflatten(1, (count, D))


def _logits(x: Tensor, H: int, K: int, D: int) -> Tensor:
    return x[:, (H + 2 * K) * D : (H + 2 * K) * D + H]


def _fuses(core: str, H: int, K: int) -> bool:
    """Whether the core computes the epilogue, whose backward takes the heads of a group together."""
    return CORES[core].fuses and H // K in (1, 2, 4, 8, 16)


def _gated_attention_triton(
    projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, cu_seqlens: Tensor | None, max_seqlen: int,
    num_heads: int, num_kv_heads: int, head_dim: int, exclude_own_value: bool, gated: bool, eps: float, core: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and what the backward needs besides: q^ and k^ [B T, H + K, D]; o [B T, H, D] or `along`; lse [H, B T]."""
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    rows, tokens, _ = projected.shape
    if not rows * tokens:
        return _fake(projected, cos, sin, q_gain, cu_seqlens, max_seqlen, *sizes, exclude_own_value, gated, eps, core)
    flat, cu_seqlens, max_seqlen = _flat(projected, cu_seqlens, max_seqlen)
    qk = kernels.prologue(flat, cos, sin, q_gain, *sizes, eps)
    arguments = qk[:, :H], qk[:, H:], _heads(flat, H + K, K, D), cu_seqlens, max_seqlen, D**-0.5
    if _fuses(core, H, K):
        kept = flat.new_empty(H * exclude_own_value, rows * tokens, dtype=torch.float32)
        epilogue = dict(along=kept if exclude_own_value else None, logits=_logits(flat, *sizes) if gated else None)
        y, lse = CORES[core].forward(*arguments, **epilogue)
    else:
        kept, lse = CORES[core].forward(*arguments)
        y = kernels.epilogue(kept, flat, *sizes, exclude_own_value, gated)
    return y.view(rows, tokens, H * D), qk, kept, lse


def _gated_attention_backward_triton(
    dy: Tensor, projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, cu_seqlens: Tensor | None, y: Tensor,
    qk: Tensor, kept: Tensor, lse: Tensor, max_seqlen: int, num_heads: int, num_kv_heads: int, head_dim: int,
    exclude_own_value: bool, gated: bool, eps: float, core: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    if not dy.numel():
        return projected.new_empty(projected.shape), q_gain.new_zeros(q_gain.shape)
    flat, cu_seqlens, max_seqlen = _flat(projected, cu_seqlens, max_seqlen)
    do, options, delta = dy.reshape(flat.size(0), H * D), {}, None
    fused, add = _fuses(core, H, K), exclude_own_value and CORES[core].adds
    if fused:
        if exclude_own_value:
            options["along"] = kept
        do, kept, dprojected = do.view(-1, H, D), y.view(-1, H, D), projected.new_empty(flat.shape)
        if gated:
            options |= dict(logits=_logits(flat, *sizes), dlogits=_logits(dprojected, *sizes))
        if turns_in_registers(cos.size(1), D):
            angles = cos.contiguous(), sin.contiguous()
            made = Prologue(_heads(flat, 0, H, D), _heads(flat, H, K, D), *angles, q_gain.contiguous(), eps)
            padding = dprojected[:, (H + 2 * K) * D + H * gated :]
            dgain = kept.new_empty(H, dtype=torch.float32)
            options |= dict(prologue=made, dgain=dgain, padding=padding)
    else:
        do, delta, dprojected = kernels.epilogue_backward(do, kept, flat, *sizes, exclude_own_value, gated)
        if add:
            options["add_dv"] = True
    dq, dk, dv = _heads(dprojected, 0, H, D), _heads(dprojected, H, K, D), _heads(dprojected, H + K, K, D)
    dq, dk, dv = CORES[core].backward(
        do, qk[:, :H], qk[:, H:], _heads(flat, H + K, K, D), kept, lse, cu_seqlens, max_seqlen, D**-0.5, delta, dq, dk,
        None if exclude_own_value and not (add or fused) else dv, **options,
    )  # fmt: skip
    if "prologue" in options:
        dgain = dgain.to(q_gain.dtype)
    else:
        dgain = kernels.prologue_backward(
            dq, dk, dv, flat, cos, sin, q_gain, dprojected, *sizes, exclude_own_value, gated, eps
        )
    return dprojected.view(projected.shape), dgain


def _fake(
    projected, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, exclude, gated, eps, core
) -> tuple[Tensor, ...]:
    rows, tokens, _ = projected.shape
    qk, o = (projected.new_empty(rows * tokens, heads, D) for heads in (H + K, H))
    lse = projected.new_empty(H, rows * tokens, dtype=torch.promote_types(projected.dtype, torch.float32))
    if _fuses(core, H, K):
        o = lse.new_empty(H * exclude, rows * tokens)
    return projected.new_empty(rows, tokens, H * D), qk, o, lse


_ARGUMENTS = "SymInt max_seqlen, int num_heads, int num_kv_heads, int head_dim, bool exclude_own_value, bool gated, "
_ARGUMENTS += "float eps, str core"
_backward_op = operator(
    "gated_attention_backward(Tensor dy, Tensor projected, Tensor cos, Tensor sin, Tensor q_gain, Tensor? cu_seqlens, "
    f"Tensor y, Tensor qk, Tensor kept, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _gated_attention_backward_triton,
    lambda dy, projected, cos, sin, q_gain, *rest: (
        projected.new_empty(projected.shape), q_gain.new_empty(q_gain.shape)
    ),
)  # fmt: skip


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.rest = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx, dy: Tensor | None, *_: None):
    if dy is None:
        return (None,) * 13
    dprojected, dgain = _backward_op(dy, *ctx.saved_tensors, *ctx.rest)
    return dprojected, None, None, dgain, *(None,) * 9


_op = operator(
    "gated_attention(Tensor projected, Tensor cos, Tensor sin, Tensor q_gain, Tensor? cu_seqlens, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_attention_triton,
    _fake,
    setup_context=_save,
    backward=_gradients,
)
_GATED_ATTENTION = {"reference": _gated_attention_reference, "triton": lambda *arguments: _op(*arguments)[0]}


def _check(projected, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, gated) -> None:
    if H < 1 or K < 1 or H % K:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {H} and {K}")
    columns = (H + 2 * K) * D + H * gated
    if D < 1 or projected.size(-1) < columns:
        raise ValueError(f"projected must have at least {columns} columns for heads of {D}, got {projected.size(-1)}")
    if cos.ndim != 2 or cos.size(0) != projected.size(1) or 2 * cos.size(1) > D:
        raise ValueError(f"cos must be [{projected.size(1)}, at most {D // 2}], got shape {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if q_gain.shape != (H,):
        raise ValueError(f"q_gain must be [{H}], got shape {tuple(q_gain.shape)}")
    for name, tensor in (("projected", projected), ("cos", cos), ("sin", sin), ("q_gain", q_gain)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if tensor.device != projected.device:
            raise ValueError(f"{name} must be on projected's device {projected.device}, got {tensor.device}")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != projected.device:
            raise ValueError(
                f"cu_seqlens must be one-dimensional int32 on {projected.device}, got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
            )
        if projected.size(0) != 1:
            raise ValueError(f"projected must be one row with cu_seqlens, got {projected.size(0)} rows")
        if max_seqlen < 1 and projected.size(1):
            raise ValueError(f"max_seqlen must be the longest segment's length or more, got {max_seqlen}")


def gated_attention(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    num_heads: int,
    num_kv_heads: int,
    *,
    exclude_own_value: bool,
    gated: bool,
    head_dim: int | None = None,
    eps: float = RMS_EPS,
    core: str = "auto",
) -> Tensor:
    """The attention sublayer between its projections; see the module's docstring for the formula.

    Differentiable once in projected and q_gain.

    Args:
        projected: [T, N] or [B, T, N], N >= (H + 2 K) D, plus H where gated; more columns are padding. A Triton core
            needs N to be a multiple of 16 for its fastest accesses.
        cos, sin: [T, P], 2 P <= D, of the angles by index in a row.
        q_gain: [H], of any floating dtype.
        cu_seqlens: int32 boundaries of segments, from 0 to T, repeated values allowed; needs B = 1. None: each row is
            one causal sequence.
        max_seqlen: at least the longest segment's length; read only with cu_seqlens.
        head_dim: D; None: as many columns as there are for each head, so that less than H + 2 K are padding.
        core: the attention inside the kernels, of `CORES`; auto: triton where its kernels are in use, else flash where
            it can, else sdpa.

    Returns [.., T, H D] in projected's dtype. Kernels compute in fp32, or in fp64 for float64. Raises ValueError for a
    wrong shape, value or device, TypeError for a wrong dtype.
    """
    if projected.ndim not in (2, 3):
        raise ValueError(f"projected must be [T, N] or [B, T, N], got shape {tuple(projected.shape)}")
    if head_dim is None:
        head_dim = (projected.size(-1) - num_heads * gated) // max(num_heads + 2 * num_kv_heads, 1)
    whole = projected if projected.ndim == 3 else projected[None]
    core = resolve_core(core, projected.device, projected.dtype, head_dim)
    _check(whole, cos, sin, q_gain, cu_seqlens, max_seqlen, num_heads, num_kv_heads, head_dim, gated)
    y = select("gated_attention", _GATED_ATTENTION, projected)(
        whole, cos, sin, q_gain, cu_seqlens, max_seqlen, num_heads, num_kv_heads, head_dim, exclude_own_value, gated,
        eps, core,
    )  # fmt: skip
    return y if projected.ndim == 3 else y[0]


def gated_attention_reference(
    projected: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor, cu_seqlens: Tensor | None, max_seqlen: int,
    num_heads: int, num_kv_heads: int, *, exclude_own_value: bool, gated: bool, head_dim: int | None = None,
    eps: float = RMS_EPS, core: str = "auto",
) -> Tensor:  # fmt: skip
    """Plain PyTorch; the contract of `gated_attention`, whose arguments it shares; ``sdpa`` keeps it from flash."""
    if head_dim is None:
        head_dim = (projected.size(-1) - num_heads * gated) // (num_heads + 2 * num_kv_heads)
    whole = projected if projected.ndim == 3 else projected[None]
    y = _gated_attention_reference(
        whole, cos, sin, q_gain, cu_seqlens, max_seqlen, num_heads, num_kv_heads, head_dim, exclude_own_value, gated,
        eps, core,
    )  # fmt: skip
    return y if projected.ndim == 3 else y[0]
