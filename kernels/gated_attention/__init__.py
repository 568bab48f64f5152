"""An attention sublayer from its normalised input to the input of its output projection, as one op.

A row of projected = n weightᵀ holds one token's H query heads, K key heads and K value heads of D columns each, then H
gate logits if the op is ``gated``, then padding. An update, if given, is added to the heads. Query head h reads key
head j = h // (H / K):

    q^_h = gain_h R(q_h / rms(q_h)),   k^_j = R(k_j / rms(k_j)),   rms(x) = sqrt(mean(x²) + eps)
    with ``key_offset``, k^'s dimensions from 2 P on are those of the previous token of the segment, if there is one
    o_h = softmax(q^_h k^_jᵀ / sqrt(D)) v_j over the tokens of the segment up to this one
    z_h = o_h - <o_h, u_j> u_j with u = v / max(|v|, 1e-12) of the same token if ``exclude_own_value``, else o_h
    y_h = 2 σ(logit_h) z_h if ``gated``, else z_h

R rotates the pairs (i, i + P) of the leading 2 P dimensions by the token's angles, given by cosines and sines.

Kernels. The product (`projection`) replaces q and k by q^ and k^ in place. The kernels of `varlen_attention` then read
q^, k^, v and logits from there, and compute the step from o to y and its backward in registers. q and k are not kept:
backward derives their gradients from g = dq^, and from dk^ likewise with a gain of 1,

    dq = R⁻¹(gain g - q^ <g, q^> / (gain D)) / rms(q),   dgain = Σ <g, q^> / gain

For this kernels clamp the magnitude of a gain to at least 2⁻²⁴; scores still round to zero in fp32. In q's place they
store log2(e) / √D q^, whose products with k^ are scores to the base 2. The attention's backward writes the projection's
gradient, from which two products compute the gradients of n and weight. Saved for backward are the inputs, the
projection with q^ and k^, 1 / rms [H + K, T], y, <o, u> [H, T] and the logarithms of the softmax's sums, lse [H, T].
Offset keys are a copy, which attention reads and keeps; a kernel behind its backward makes dk of the copy's gradient.

Memory traffic in MB, read + written, at T = 98,304, H = 8, K = 4, D = 64, d = 512 in bf16: product 102 + 204, prologue
154 + 156, y 203 + 107; dq with dlogits, do and a part of dv 414 + 260, dk and dv 360 + 101, dn and dweight 509 + 102.
Offset keys add 50 + 50 and, in backward, 101 + 50.
"""

from __future__ import annotations

import torch

from ..common import RMS_EPS
from ..common.backend import runs_kernels, select
from ..common.operators import readable
from ..varlen_attention.segments import GROUPS, attention_tiles, check_segments, tiles_shape
from ..varlen_attention.triton import rotates_in_registers
from .cached import KVCache, cached_gated_attention
from .reference import (
    attention_reference,
    default_head_dim,
    epilogue_reference,
    flash_attention,
    flash_takes,
    gated_attention_reference,
    offset_keys_reference,
    prologue_reference,
)
from .triton import gated_attention_triton

__all__ = [
    "CORES",
    "KVCache",
    "attention_reference",
    "attention_tiles",
    "cached_gated_attention",
    "epilogue_reference",
    "flash_attention",
    "flash_takes",
    "gated_attention",
    "gated_attention_reference",
    "offset_keys_reference",
    "prologue_reference",
    "resolve_core",
]

Tensor = torch.Tensor
CORES = "triton", "flash", "sdpa"  # the kernels; PyTorch's FlashAttention; plain PyTorch, segment by segment
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_GATED_ATTENTION = {"reference": gated_attention_reference, "triton": gated_attention_triton}


def _kernels_take(dtype: torch.dtype, head_dim: int, group: int, half: int) -> bool:
    fits = head_dim in (16, 32, 64, 128) and group in GROUPS and rotates_in_registers(half, head_dim)
    return fits and dtype in (torch.bfloat16, torch.float32)


def resolve_core(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int, group: int = 1, half: int = 0
) -> str:
    """Return the core, one of `CORES`, that computes attention on this device for a core's name or ``auto``.

    ``group`` is H / K and ``half`` is P. ``triton`` becomes another core where the kernels do not support the
    arguments. Raises ValueError for an unknown name, and for ``flash`` where it is not supported.
    """
    if name not in ("auto", *CORES):
        raise ValueError(f"attention has the cores auto, {', '.join(CORES)}, and {name!r} is none of them")
    flash = flash_takes(device, dtype, head_dim)
    if name == "flash" and not flash:
        raise ValueError(
            f"flash attention needs CUDA, half precision and heads of a multiple of 8 up to 256, and this "
            f"is {device}, {dtype}, {head_dim}; use auto or sdpa"
        )
    if name in ("flash", "sdpa"):
        return name
    fits = _kernels_take(dtype, head_dim, group, half)
    if fits and (name == "triton" or runs_kernels(torch.device(device))):
        return "triton"
    return "flash" if flash else "sdpa"


def _check_first_queries(first_queries: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        raise ValueError("first_queries are those of segments, and cu_seqlens is None")
    if first_queries.dtype != torch.int32:
        raise TypeError(f"first_queries must be int32, got {first_queries.dtype}")
    expected, device = (cu_seqlens.numel() - 1,), cu_seqlens.device
    if first_queries.shape != expected or first_queries.device != device:
        raise ValueError(
            f"first_queries must be {expected} on {device}, got {tuple(first_queries.shape)} on {first_queries.device}"
        )
    if not readable(first_queries, cu_seqlens):
        return
    wrong = ((first_queries < 0) | (first_queries > cu_seqlens.diff())).nonzero()
    if len(wrong):
        s = int(wrong[0])
        raise ValueError(
            f"first_queries must be from 0 to the segment's length, got {int(first_queries[s])} for segment {s} of "
            f"{int(cu_seqlens[s + 1] - cu_seqlens[s])}"
        )


def _check(
    n, weight, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, gated, gate_width, update, tiles, first_queries
) -> None:
    if n.ndim not in (2, 3):
        raise ValueError(f"n must be [T, d] or [B, T, d], got shape {tuple(n.shape)}")
    if weight.ndim != 2 or weight.size(1) != n.size(-1):
        raise ValueError(f"weight must be [N, {n.size(-1)}] for n, got shape {tuple(weight.shape)}")
    if H < 1 or K < 1 or H % K:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {H} and {K}")
    rows, tokens = (H + 2 * K) * D + H * gated, n.size(-2)
    if D < 1 or weight.size(0) < rows:
        raise ValueError(f"weight must have at least {rows} rows for heads of {D}, got {weight.size(0)}")
    if gate_width is not None and not 0 < gate_width <= n.size(-1):
        raise ValueError(f"gate_width must be from 1 to {n.size(-1)}, got {gate_width}")
    if cos.ndim != 2 or cos.size(0) != tokens or 2 * cos.size(1) > D:
        raise ValueError(f"cos must be [{tokens}, at most {D // 2}], got shape {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if q_gain.shape != (H,):
        raise ValueError(f"q_gain must be [{H}], got shape {tuple(q_gain.shape)}")
    if update is not None and update.shape != (*n.shape[:-1], (H + 2 * K) * D):
        raise ValueError(f"update must be {(*n.shape[:-1], (H + 2 * K) * D)}, got shape {tuple(update.shape)}")
    tensors = dict(n=n, weight=weight, update=update, cos=cos, sin=sin, q_gain=q_gain)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        follows = name in ("weight", "update")
        if tensor.dtype not in _DTYPES or (follows and tensor.dtype != n.dtype):
            allowed = f"n's dtype {n.dtype}" if follows else "bfloat16, float16, float32 or float64"
            raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
        if tensor.device != n.device:
            raise ValueError(f"{name} must be on n's device {n.device}, got {tensor.device}")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != n.device:
            raise ValueError(
                f"cu_seqlens must be one-dimensional int32 on {n.device}, got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
            )
        if n.ndim == 3 and n.size(0) != 1:
            raise ValueError(f"n must be one row with cu_seqlens, got {n.size(0)} rows")
        if max_seqlen < 1 and tokens:
            raise ValueError(f"max_seqlen must be the longest segment's length or more, got {max_seqlen}")
        check_segments(cu_seqlens, tokens, max_seqlen)
    if first_queries is not None:
        _check_first_queries(first_queries, cu_seqlens)
    if tiles is None or torch.compiler.is_compiling():  # the compiler cannot read the tables
        return
    if cu_seqlens is None:
        raise ValueError("tiles are those of cu_seqlens, which is None")
    if tiles.dtype != torch.int32:
        raise TypeError(f"tiles must be int32, got {tiles.dtype}")
    expected = tiles_shape(cu_seqlens, tokens, n.dtype, D, H // K)
    if tiles.shape != expected or tiles.device != n.device:
        raise ValueError(
            f"tiles must be {expected} on {n.device}, as attention_tiles makes them for these arguments, "
            f"got {tuple(tiles.shape)} on {tiles.device}"
        )


def gated_attention(
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
    key_offset: bool = False,
    head_dim: int | None = None,
    gate_width: int | None = None,
    update: Tensor | None = None,
    eps: float = RMS_EPS,
    core: str = "auto",
    tiles: Tensor | None = None,
    first_queries: Tensor | None = None,
) -> Tensor:
    """Compute the attention sublayer up to its output projection; the module's docstring gives the formula.

    Differentiable once in n, weight, q_gain and update.

    Args:
        n: [T, d] or [B, T, d].
        weight: [N, d] in n's dtype, N >= (H + 2 K) D, plus H if gated; further rows are padding. Kernels are fastest if
            N and d are multiples of 16.
        cos, sin: [T, P], 2 P <= D, of the angles at each index in a row.
        q_gain: [H], of any floating dtype.
        cu_seqlens: int32 [S + 1], boundaries of segments, ascending from 0 to T, repeated values allowed; needs B = 1.
            None: each row is one causal sequence. On a GPU and in compiled code values are not checked: wrong ones
            count as in `varlen_attention`, and y and gradients of tokens in no segment are zero, except with PyTorch's
            FlashAttention, which reads them unchanged.
        max_seqlen: at least the longest segment's length; read only with cu_seqlens.
        key_offset: whether the dimensions of keys that do not rotate come one token late.
        head_dim: D. None: the largest for which weight has enough rows.
        gate_width: states that the gates' rows of ``weight`` are zero from this column on; the gradient of those zeros
            is then undefined. None: d.
        update: [.., T, (H + 2 K) D] in n's dtype, added to queries, keys and values, as by low-rank adapters.
        core: the implementation of attention, one of `CORES`, or ``auto``: triton if kernels are in use, else flash if
            it is supported, else sdpa.
        tiles: the result of ``attention_tiles(cu_seqlens, T, n.dtype, D, H // K)``, which many calls may share, with
            any ``first_queries``. None: computed by the call if needed. Kernels do not check the tiles' values.
        first_queries: int32 [S], the index of the first query in each segment, from 0 to the segment's length. Earlier
            tokens are keys and values only: their y is zero, and the gradient of y is not read there. Kernels skip
            tiles without queries. None: all tokens are queries. Values are checked on a CPU only, and clamped to the
            range otherwise.

    Returns [.., T, H D] in n's dtype. The core triton computes the whole op in kernels; it supports bfloat16 and
    float32, D of 16, 32, 64 or 128, H / K of 1, 2, 4, 8 or 16, and P of zero or a power of two. Everything else takes
    the reference. Kernels compute in fp32; a value in one segment that is not finite may affect the segment before it.
    Raises ValueError for a wrong shape, value or device, TypeError for a wrong dtype.
    """
    H, K = num_heads, num_kv_heads
    D = default_head_dim(weight, H, K, gated) if head_dim is None else head_dim
    _check(
        n, weight, cos, sin, q_gain, cu_seqlens, max_seqlen, H, K, D, gated, gate_width, update, tiles, first_queries
    )
    core = resolve_core(core, n.device, n.dtype, D, H // K, cos.size(1))
    chosen = select("gated_attention", _GATED_ATTENTION, n) if core == "triton" else gated_attention_reference
    return chosen(
        n,
        weight,
        cos,
        sin,
        q_gain,
        cu_seqlens,
        max_seqlen,
        H,
        K,
        exclude_own_value=exclude_own_value,
        gated=gated,
        key_offset=key_offset,
        head_dim=D,
        gate_width=gate_width,
        update=update,
        eps=eps,
        core=core,
        tiles=tiles,
        first_queries=first_queries,
    )
