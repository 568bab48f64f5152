"""The operator of `gated_attention` with its derivative: the projection, then the kernels of `varlen_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..common.operators import operator
from ..varlen_attention.segments import attention_tiles
from ..varlen_attention.triton import Prologue, attention_backward, attention_forward
from .key_offset import offset_keys, offset_keys_backward
from .projection import project

Tensor = torch.Tensor


def _columns(x: Tensor, H: int, K: int, D: int) -> tuple[Tensor, ...]:
    """Return views of x [T, N]: q, k and v [T, heads, D] with H, K and K heads, and the logits [T, H]."""
    q, k, v, rest = x.split([H * D, K * D, K * D, x.size(1) - (H + 2 * K) * D], dim=1)
    return *(part.unflatten(1, (-1, D)) for part in (q, k, v)), rest[:, :H]


def gated_attention_forward(
    n: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    tiles: Tensor,
    update: Tensor | None,
    first_queries: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    exclude_own_value: bool,
    gated: bool,
    key_offset: bool,
    gate_width: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y and the tensors for backward.

    They are projected [B T, N], 1 / rms [H + K, B T], <o, u> and lse [H, B T], and the offset keys [B T, K, D], if any.
    """
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    rows, tokens, d = n.shape
    if not rows * tokens:
        return _fake(
            n, weight, cos, sin, q_gain, tiles, update, first_queries, *sizes, exclude_own_value, gated, key_offset
        )
    update = None if update is None else update.reshape(rows * tokens, -1)
    projected, inverse_rms = project(
        n.reshape(-1, d),
        weight,
        cos,
        sin,
        q_gain,
        *sizes,
        eps=eps,
        unit=D**-0.5 * math.log2(math.e),
        gate_width=gate_width,
        gated=gated,
        update=update,
    )
    q, k, v, logits = _columns(projected, *sizes)
    offset = offset_keys(k, tiles, cos.size(1), H // K) if key_offset else k.new_empty(0)
    components = inverse_rms.new_empty(H * exclude_own_value, rows * tokens)
    y, lse = attention_forward(
        q,
        offset if key_offset else k,
        v,
        tiles,
        D**-0.5,
        components=components if exclude_own_value else None,
        logits=logits if gated else None,
        base_2=True,
        first_queries=first_queries,
    )
    return y.view(rows, tokens, H * D), projected, inverse_rms, components, lse, offset


def gated_attention_backward(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor,
    tiles: Tensor,
    y: Tensor,
    projected: Tensor,
    inverse_rms: Tensor,
    components: Tensor,
    lse: Tensor,
    offset: Tensor,
    first_queries: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    exclude_own_value: bool,
    gated: bool,
    key_offset: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of n weightᵀ [B T, N] and of q_gain."""
    sizes = H, K, D = num_heads, num_kv_heads, head_dim
    dprojected = torch.empty_like(projected)
    if not y.numel():
        return dprojected, q_gain.new_zeros(H)
    dgain = inverse_rms.new_empty(H)
    q, k, v, logits = _columns(projected, *sizes)
    dq, dk, dv, dlogits = _columns(dprojected, *sizes)
    prologue = Prologue(inverse_rms, q_gain.contiguous(), cos.contiguous(), sin.contiguous())
    projected_k, projected_dk = k, dk
    if key_offset:
        k, dk = offset, torch.empty_like(offset)
    gates: dict[str, Any] = dict(logits=logits, dlogits=dlogits) if gated else {}
    attention_backward(
        dy.reshape(-1, H, D),
        q,
        k,
        v,
        y.view(-1, H, D),
        lse,
        tiles,
        D**-0.5,
        dq,
        dk,
        dv,
        components=components if exclude_own_value else None,
        dgain=dgain,
        prologue=prologue,
        offset_keys=key_offset,
        padding=dprojected[:, (H + 2 * K) * D + H * gated :],
        first_queries=first_queries,
        **gates,
    )
    if key_offset:
        offset_keys_backward(dk, projected_k, projected_dk, tiles, prologue, H // K)
    return dprojected, dgain.to(q_gain.dtype)


def _fake(
    n, weight, cos, sin, q_gain, tiles, update, first_queries, H, K, D, exclude, gated, key_offset, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, tokens, _ = n.shape
    small = (n.new_empty(count, rows * tokens, dtype=torch.float32) for count in (H + K, H * exclude, H))
    offset = n.new_empty((rows * tokens, K, D) if key_offset else 0)
    return n.new_empty(rows, tokens, H * D), n.new_empty(rows * tokens, weight.size(0)), *small, offset


_ARGUMENTS = "int num_heads, int num_kv_heads, int head_dim, bool exclude_own_value, bool gated, bool key_offset"
_backward_op = operator(
    "gated_attention_backward(Tensor dy, Tensor cos, Tensor sin, Tensor q_gain, Tensor tiles, Tensor y, "
    f"Tensor projected, Tensor inverse_rms, Tensor components, Tensor lse, Tensor offset, "
    f"Tensor? first_queries, {_ARGUMENTS}) -> (Tensor, Tensor)",
    gated_attention_backward,
    lambda dy, cos, sin, q_gain, tiles, y, projected, *_: (torch.empty_like(projected), torch.empty_like(q_gain)),
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6], *output, inputs[7])
    ctx.rest = inputs[8:14]
    ctx.updated = 0 if inputs[6] is None else inputs[6].size(-1)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx, dy: Tensor | None, *_: None):
    if dy is None:
        return (None,) * 16
    n, weight, *saved = ctx.saved_tensors
    dprojected, dgain = _backward_op(dy, *saved, *ctx.rest)
    need_n, need_weight, *_, need_update = ctx.needs_input_grad[:7]
    dn = (dprojected @ weight).view(n.shape) if need_n else None
    dweight = dprojected.t() @ n.reshape(-1, n.size(-1)) if need_weight else None
    dupdate = dprojected[:, : ctx.updated].unflatten(0, n.shape[:-1]) if need_update else None
    return dn, dweight, None, None, dgain, None, dupdate, *(None,) * 9


_op = operator(
    "gated_attention(Tensor n, Tensor weight, Tensor cos, Tensor sin, Tensor q_gain, Tensor tiles, Tensor? update, "
    f"Tensor? first_queries, {_ARGUMENTS}, int? gate_width, float eps) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    gated_attention_forward,
    _fake,
    setup_context=_save,
    backward=_gradients,
)


def gated_attention_triton(
    n: Tensor,
    weight: Tensor,
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
    key_offset: bool,
    head_dim: int,
    gate_width: int | None = None,
    update: Tensor | None = None,
    eps: float,
    core: str,
    tiles: Tensor | None = None,
    first_queries: Tensor | None = None,
) -> Tensor:
    """Compute `gated_attention` by kernels; max_seqlen and core are ignored."""
    whole = n if n.ndim == 3 else n[None]
    update = update if update is None or update.ndim == 3 else update[None]
    if tiles is None:
        rows, tokens, _ = whole.shape
        if cu_seqlens is None:
            cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=n.device) * tokens
        tiles = attention_tiles(cu_seqlens, rows * tokens, n.dtype, head_dim, num_heads // num_kv_heads)
    y = _op(
        whole,
        weight,
        cos,
        sin,
        q_gain,
        tiles,
        update,
        None if first_queries is None else first_queries.contiguous(),
        num_heads,
        num_kv_heads,
        head_dim,
        exclude_own_value,
        gated,
        key_offset,
        gate_width,
        eps,
    )[0]
    return y if n.ndim == 3 else y[0]
