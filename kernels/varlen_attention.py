"""Causal attention over segments of a packed token stream, with grouped key/value heads.

    o_i = Σ_j p_ij v_j,   p_ij = exp(scale q_i · k_j - lse_i),   j <= i in the segment of i

q, o [T, H, D]; k, v [T, K, D] with H a multiple of K, query head h reading key head h // (H // K). ``cu_seqlens`` int32
[S + 1] has the segments' boundaries from 0 to T; equal ones are empty segments.

Other boundaries are errors where the host can see them, on a CPU. Elsewhere they count as at least 0 and at most T, and
where they descend there are no segments; o and all gradients of tokens that are in no segment are zero.

Kernels: a program's tile holds the queries of a piece of one segment for all heads that share a key head, so keys are
read once for them and their gradients need no further sum. Tiles begin where their segment does: only those on the
diagonal need a mask. Segment s, from 0, owns the tiles from ``cu_seqlens[s] // size + s + 1``, which are enough for it
and known without a sum over segments, T // size + S + 2 in all with those before and behind the segments; small
kernels, `attention_tiles`, sort them by their segment's length, so that the last programs to start are short and few
have nothing to do. Backward is one kernel for dq, which
also computes delta = Σ do o, and one for dk and dv, each with probabilities recomputed from the base 2 ``lse``: two
products more than in a single kernel, which would have to add to dq in memory. With the tuned ``plain`` the forward
kernel does not subtract the maximum of scores, whose comparisons and the scaling back of sums are a quarter of its
instructions: a row whose largest is from -40 to 90 to the base 2 does not need it, and a tile whose sums tell of others
is computed again. `_forward` and `_backward` can take in what `gated_attention` does to o: tiles have whole rows of it,
and those of dq all heads of a group.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._varlen_attention_kernels import (
    _attention_bounds_kernel,
    _attention_kernel,
    _attention_keys_kernel,
    _attention_queries_kernel,
    _attention_tiles_kernel,
)
from .common.backend import select
from .common.launch import launch_parameters
from .common.operators import operator, readable
from .common.partial_sums import partial_sums

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton: the references serve
    TensorDescriptor = None

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WIDEST = 128
GROUPS = (1, 2, 4, 8, 16)  # H / K for which a tile can have all heads of a group


def segment_bounds(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The boundaries in int64 as kernels take them: from 0 to T, and all T, of no segment, where they descend."""
    bounds = cu_seqlens.long().clamp(0, tokens)
    return torch.where((bounds.diff() < 0).any(), tokens, bounds)


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Plain PyTorch; the contract of `varlen_attention`, whose arguments it shares."""
    if not q.numel():
        return q + 0 * (k.sum() + v.sum())
    tokens, bounds = torch.arange(q.size(0), device=q.device), segment_bounds(cu_seqlens, q.size(0))
    rows = bounds[:-1, None] + tokens[: min(max_seqlen, q.size(0))]
    valid = (rows < bounds[1:, None])[:, :, None, None]
    rows = rows.clamp(max=q.size(0) - 1)
    padded = (torch.where(valid, x[rows], 0).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(*padded, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    segment = torch.searchsorted(bounds, tokens, right=True) - 1
    inside, segment = (segment >= 0) & (segment < len(o)), segment.clamp(0, len(o) - 1)
    place = tokens - bounds[segment]
    inside &= place < o.size(1)
    return torch.where(inside[:, None, None], o[segment, place.clamp(0, o.size(1) - 1)], 0)


def _tuned(case: str, dtype: torch.dtype, width: int, group: int, device: torch.device) -> tuple[dict, int]:
    """A case's launch parameters, and how many heads of a group a tile of queries has: a power of two divides it."""
    name = "float32" if dtype == torch.float32 else f"{case}_wide" if width > 64 else case
    tuned = launch_parameters("varlen_attention", name, device)
    return tuned, min(max(group & -group, 1), tuned["heads"])


def _settings(case: str, q: torch.Tensor, k: torch.Tensor) -> dict:
    """Constants and options of a case's launch."""
    heads, width = q.shape[1:]
    group = heads // k.size(1)
    tuned, together = _tuned(case, q.dtype, width, group, q.device)
    options = {}
    if case == "forward":  # what is not divided by the largest passes float16's
        options["PLAIN"] = bool(tuned["plain"]) and q.dtype != torch.float16
    elif case == "keys":
        options["HELD"] = bool(tuned["held"])
    return options | dict(
        H=heads,
        GROUP=group,
        D=width,
        QUERIES=tuned["rows"] // together,
        HEADS=together,
        KEYS=tuned["keys"],
        STAGES=tuned["stages"],
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tuned["warps"],
        maxnreg=tuned["maxnreg"] if together == tuned["heads"] else 255,  # of one head there are more tokens to address
    )


def _rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with contiguous rows, and so that offsets in a tile are 32 bit."""
    fits = (x.stride(-1) == 1 and x.stride(0) < 2**22 and x.stride(1) < 2**26 for x in tensors)
    return tuple(x if fit else x.contiguous() for x, fit in zip(tensors, fits, strict=True))


def _tile_sizes(dtype: torch.dtype, width: int, group: int, device: torch.device) -> tuple[int, ...]:
    """The sizes in tokens, ascending, of the tiles that the kernels may ask for."""
    cases = (_tuned(case, dtype, width, group, device) for case in ("forward", "queries", "keys"))
    (forward, of_forward), (queries, of_queries), (keys, _) = cases
    sizes = {forward["rows"] // of_forward, queries["rows"] // of_queries, keys["keys"]}
    if group in GROUPS:
        sizes.add(queries["rows"] // group)
    return tuple(sorted(sizes))


def tiles_shape(
    cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype, width: int, group: int
) -> tuple[int, int, int]:
    """The shape of `attention_tiles` of these arguments."""
    sizes = _tile_sizes(dtype, width, group, cu_seqlens.device)
    return len(sizes), tokens // sizes[0] + cu_seqlens.size(0) + 1, 4


def _tiles_triton(cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype, width: int, group: int) -> torch.Tensor:
    tiles = cu_seqlens.new_empty(tiles_shape(cu_seqlens, tokens, dtype, width, group))
    sizes = _tile_sizes(dtype, width, group, cu_seqlens.device)
    chunk, segments = 256, cu_seqlens.numel() - 1  # segments that a program looks at together, and all
    bounds = cu_seqlens.new_empty(segments + 3)
    with torch.cuda.device_of(tiles):  # Triton launches on the current device
        _attention_bounds_kernel[(1,)](cu_seqlens.contiguous(), bounds, segments, tokens, CHUNK=chunk, num_warps=1)
        _attention_tiles_kernel[(tiles.size(1), len(sizes))](
            bounds, tiles, segments + 2, SIZES=sizes, CHUNK=chunk, num_warps=1
        )
    return tiles


# An operator: tables of launch parameters are files, which a compiler cannot read.
_tiles_op = operator(
    "attention_tiles(Tensor cu_seqlens, SymInt tokens, ScalarType dtype, int width, int group) -> Tensor",
    _tiles_triton,
    lambda cu_seqlens, *arguments: cu_seqlens.new_empty(tiles_shape(cu_seqlens, *arguments)),
)


def attention_tiles(cu_seqlens: torch.Tensor, tokens: int, dtype: torch.dtype, width: int, group: int) -> torch.Tensor:
    """How the kernels cut segments into tiles: int32 [sizes, T // smallest size + S + 2, 4], made by small kernels.

    One result serves every call, forward and backward, on ``tokens`` = T tokens in the same segments, with q, k and v
    of ``dtype``, heads of ``width`` columns, D, and ``group`` = H / K on one chip. ``cu_seqlens`` is int32 [S + 1].
    A tile names its segment: calls look up there where queries begin, if they are told so, and the tiles are the same.

    Raises ValueError for a wrong shape or, on a CPU, wrong values of ``cu_seqlens``, TypeError for a wrong dtype.
    """
    check_segments(cu_seqlens, tokens)
    return _tiles_op(cu_seqlens, tokens, dtype, width, group)


def _of_size(tiles: torch.Tensor, size: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Those of `attention_tiles` that have this size, [T // size + S + 2, 4]."""
    tokens, heads, width = q.shape
    sizes = _tile_sizes(q.dtype, width, heads // k.size(1), q.device)
    parts = tiles.size(1) - tokens // sizes[0]
    return tiles[sizes.index(size), : tokens // size + parts].contiguous()


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def _row_strides(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) for x in tensors]


class Prologue(NamedTuple):
    """What q and k were made by, as `gated_attention` has it, of rows x.

    q = unit gain R(x / rms(x)), k = R(x / rms(x)), with unit = scale log2(e), so that q · k is a score to the base 2.
    """

    inverse_rms: torch.Tensor  # 1 / rms(x), float32 [H + K, T], contiguous
    gain: torch.Tensor  # [H], contiguous
    cos: torch.Tensor  # [P, HALF], contiguous, a token's at its index modulo P; see `turns_in_registers`
    sin: torch.Tensor


def turns_in_registers(half: int, width: int) -> bool:
    """Whether the kernels rotate that many pairs of the leading dimensions of heads."""
    return half & (half - 1) == 0 and 2 * half <= width


def _described(
    case: str, wanted: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Tensor memory access to tiles of k and v where it is wanted, by the case's table too, and addresses allow it.

    It takes fewer instructions, and reads the next segment's rows where pointers read zeros; of finite ones nothing
    comes, whose probability is zero.
    """
    heads, width = k.shape[1:]
    tuned, _ = _tuned(case, q.dtype, width, q.size(1) // heads, q.device)
    regular = (
        x.element_size() == 2 and x.stride(1) == width and not (x.stride(0) % 8 or x.data_ptr() % 16) for x in (k, v)
    )
    if not (wanted and tuned["descriptors"] and all(regular)):
        return None, None
    block = [tuned["keys"], width]
    k, v = (TensorDescriptor(x, [x.size(0), heads * width], [x.stride(0), 1], block) for x in (k, v))
    return k, v


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    *,
    along: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    base_2: bool = False,
    first_queries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the base 2 logarithm of each row's sum of exponentials, float32 [H, T]; ``base_2``: q is as `Prologue`'s.

    With ``along``, contiguous float32 [H, T], o loses its part along u = v / max(|v|, 1e-12) of its own token, <o, u>,
    which is written there. With ``logits`` [T, H], whose rows are contiguous, it is then multiplied by 2 σ(logits).
    With ``first_queries``, contiguous int32 [S], only tokens from there on in their segment are queries: o of the
    others is zero, and what lse and ``along`` have of them means nothing.
    """
    tokens, heads, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(heads, tokens, dtype=torch.float32)
    if o.numel():
        q, k, v = _rows(q, k, v)
        settings = _settings("forward", q, k)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            tiles = _of_size(tiles, settings["QUERIES"], q, k)
            _attention_kernel[(tiles.size(0) * heads // settings["HEADS"],)](
                q,
                k,
                v,
                *_described("forward", base_2, q, k, v),
                o,
                lse,
                along,
                logits,
                tiles,
                first_queries,
                *_strides(q, k, v),
                *_row_strides(logits),
                tokens,
                None if base_2 else scale * math.log2(math.e),
                **settings,
            )
    return o, lse


def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    *,
    along: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    dlogits: torch.Tensor | None = None,
    prologue: Prologue | None = None,
    dgain: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    first_queries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, written into those given, whose rows must be contiguous.

    lse is `_forward`'s. Where that was given ``along`` or ``logits``, they are given with their values, do is the
    gradient of its result, o, and dlogits is written; this needs H / K to be one of `GROUPS`. With
    ``prologue``, which made q and k, dq and dk are the gradients of what it made them of, and dgain, float32 [H], is
    written. ``padding`` [T, columns] gets zeros. Here and in `_forward` D is a power of two from 16 to 128. With
    ``first_queries``, `_forward`'s, rows of do before them are not read, and dq and dlogits get zeros there.
    """
    tokens, heads, _ = q.shape
    dq = q.new_empty(q.shape) if dq is None else dq
    dk = k.new_empty(k.shape) if dk is None else dk
    dv = v.new_empty(v.shape) if dv is None else dv
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    do, q, k, v = _rows(do, q, k, v)
    by_queries, by_keys = _settings("queries", q, k), _settings("keys", q, k)
    core_do = None
    if along is not None or logits is not None:
        core_do = do.new_empty(do.shape)
        rows = by_queries["QUERIES"] * by_queries["HEADS"]
        by_queries |= dict(QUERIES=rows // by_queries["GROUP"], HEADS=by_queries["GROUP"])
    # lse and delta side by side, repeated up to an element a thread: what is less is copied by all threads for each.
    rows = by_keys["QUERIES"] * by_keys["HEADS"]
    width = min(8, max(2, 32 * by_keys["num_warps"] // rows))
    pairs = lse.new_empty(*lse.shape, width)
    partials, columns, period = None, 0 if padding is None else padding.size(1), None
    inverse_rms, gain, cos, sin = prologue or (None,) * 4
    constants = dict(WIDTH=width, HALF=0 if cos is None else cos.size(1))
    with torch.cuda.device_of(q):
        of_queries, of_keys = (_of_size(tiles, size, q, k) for size in (by_queries["QUERIES"], by_keys["KEYS"]))
        if prologue:
            partials = lse.new_empty(heads, of_queries.size(0))
            period = None if cos.size(0) == tokens else cos.size(0)
        unit = scale * math.log2(math.e)
        rest = tokens, period, *((None, math.log(2)) if prologue else (unit, scale))
        _attention_queries_kernel[(of_queries.size(0) * heads // by_queries["HEADS"],)](
            do,
            q,
            k,
            v,
            *_described("queries", prologue is not None, q, k, v),
            o.contiguous(),
            lse,
            along,
            logits,
            pairs,
            dq,
            core_do,
            dlogits,
            dv,
            inverse_rms,
            gain,
            cos,
            sin,
            partials,
            padding,
            of_queries,
            first_queries,
            *_strides(do, q, k, v, dq, dv),
            *_row_strides(logits, dlogits, padding),
            *rest,
            unit,
            PADDING=columns,
            PADDED=1 << max(columns - 1, 0).bit_length(),
            **constants,
            **by_queries,
        )
        if prologue:
            partial_sums(partials.t(), dgain)
        do = do if core_do is None else core_do
        _attention_keys_kernel[(of_keys.size(0) * k.size(1),)](
            do,
            q,
            k,
            v,
            pairs,
            dk,
            dv,
            inverse_rms,
            cos,
            sin,
            of_keys,
            first_queries,
            *_strides(do, q, k, v, dk, dv),
            *rest,
            ADD=along is not None,
            **constants,
            **by_keys,
        )
    return dq, dk, dv


def check_segments(cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int | None = None) -> None:
    """Raise ValueError or TypeError for what is no ``cu_seqlens``, or where that can be read has longer segments."""
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 + (tokens > 0):
        raise ValueError(f"cu_seqlens must be [segments + 1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if readable(cu_seqlens):
        check_bounds(cu_seqlens.tolist(), tokens, max_seqlen)


def check_bounds(bounds: list[int], tokens: int, max_seqlen: int | None = None, owner: str = "") -> None:
    """Raise ValueError where boundaries do not ascend from 0 to T, or segments are longer than ``max_seqlen``."""
    if (bounds[0], bounds[-1]) != (0, tokens):
        raise ValueError(
            f"{owner}cu_seqlens must go from 0 to the number of tokens, {tokens}, got {bounds[0]} to {bounds[-1]}"
        )
    lengths = [end - start for start, end in pairwise(bounds)]
    if min(lengths, default=0) < 0:
        s = next(s for s, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{owner}cu_seqlens must ascend, got {bounds[s + 1]} after {bounds[s]} at index {s + 1}")
    longest = max(lengths, default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"{owner}max_seqlen must be at least the longest segment, {longest}, got {max_seqlen}")


def _check(q, k, v, cu_seqlens, max_seqlen) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [T, heads, D], got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if (q.size(0), q.size(2)) != (k.size(0), k.size(2)):
        raise ValueError(f"k must be [{q.size(0)}, heads, {q.size(2)}] as q is, got {tuple(k.shape)}")
    if not k.size(1) or q.size(1) % k.size(1):
        raise ValueError(f"q's {q.size(1)} heads must be a multiple of the {k.size(1)} of k and v")
    for name, x in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if max_seqlen < (q.size(0) > 0):
        raise ValueError(f"max_seqlen must be at least the longest segment, got {max_seqlen}")
    check_segments(cu_seqlens, q.size(0), max_seqlen)


def _fake_forward(q, k, v, tiles, scale):
    return q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)


def _backward_triton(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(do, q, k, v, o, lse, tiles, scale)


_backward_op = operator(
    "varlen_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor tiles, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _backward_triton,
    lambda do, q, k, v, o, lse, tiles, scale: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.scale = inputs[4]
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _differentiate(ctx, do, _):
    return *_backward_op(do, *ctx.saved_tensors, ctx.scale), None, None


_forward_op = operator(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor tiles, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_differentiate,
)


def _triton(q, k, v, cu_seqlens, max_seqlen, scale):
    width = q.size(-1)
    if width & (width - 1) or width < 16:  # the tiles' widths are powers of two
        q, k, v = (F.pad(x, (0, max(16, 1 << (width - 1).bit_length()) - width)) for x in (q, k, v))
    tiles = attention_tiles(cu_seqlens, q.size(0), q.dtype, q.size(2), q.size(1) // k.size(1))
    return _forward_op(q, k, v, tiles, scale)[0][..., :width].contiguous()


_IMPLEMENTATIONS = {"reference": varlen_attention_reference, "triton": _triton}


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale q kᵀ) v over each token's own segment and past; see the module's docstring for shapes.

    q, k, v are of one dtype, bfloat16, float16, float32 or float64, and may be strided. ``scale`` is 1 / √D by default.
    Products of 16 bit inputs take probabilities in their dtype and sum in float32. Differentiable once in q, k and v.
    ``max_seqlen`` is at least the longest segment. float64 and D > 128 always take the reference.

    Returns o [T, H, D]. Raises ValueError for a wrong shape or device and, for tensors on a CPU, for wrong values of
    ``cu_seqlens`` and a ``max_seqlen`` below the longest segment; TypeError for a wrong dtype. On a GPU reading them
    would wait for it: there and in compiled code wrong values count as the module's docstring says, kernels do not read
    ``max_seqlen``, and of a longer segment the reference makes the tokens from there on zero.
    """
    _check(q, k, v, cu_seqlens, max_seqlen)
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    chosen = select("varlen_attention", _IMPLEMENTATIONS, q)
    if q.dtype == torch.float64 or q.size(-1) > _WIDEST:
        chosen = varlen_attention_reference
    return chosen(q, k, v, cu_seqlens, max_seqlen, scale)
