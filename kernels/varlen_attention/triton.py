"""The kernels of `varlen_attention`, their launches, and the operator with its derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.epilogues import away_from_zero
from ..common.operators import operator
from ..common.partial_sums import partial_sums
from .segments import attention_parameters, attention_tiles, segment_bounds, tiles_of_size

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton: the references are used
    TensorDescriptor = None


# Columns of the heads whose q and k may stay in registers as operands of the loop's products. At 32, ptxas of CUDA 12.8
# gives k's registers to a later product, so that dk and dv are wrong from the second tile of queries on.
REGISTER_WIDTH = 64
WIDEST = 256  # columns of a head


@jit
def tile_of(tiles, slot):
    """Load a tile: the first token (int64) and the length of its segment, and the tile's first token in the segment.

    The length is negative if the tile's tokens are in no segment.
    """
    tiles += slot * 4
    return tl.load(tiles).to(tl.int64), tl.load(tiles + 1), tl.load(tiles + 2)


@jit
def _first_query(first_queries, tiles, slot):
    """Load the index of the first query in a tile's segment."""
    return tl.load(first_queries + tl.load(tiles + slot * 4 + 3))


@jit
def _other_side(bounds, tiles, slot, start, length):
    """Load where the other side of a tile's segment, its keys or its queries, starts, and its length.

    Without ``bounds`` both sides are the tile's.
    """
    if bounds is not None:
        bounds += tl.load(tiles + slot * 4 + 3)
        low = tl.load(bounds)
        length = tl.load(bounds + 1) - low
        start = low.to(tl.int64)
    return start, length


@jit
def _keys_seen(first, length, key_length, left, right, QUERIES: tl.constexpr):
    """Return where the keys that a tile of queries attends to begin and end.

    The segment has ``length`` queries and ``key_length`` keys, and its last query is in its last key's place.
    """
    shift = key_length - length
    begin, end = 0, tl.minimum(first + QUERIES, length) + shift
    if left is not None:
        begin, end = tl.maximum(first + shift - left, 0), tl.minimum(end + right, key_length)
    return begin, end


@jit
def _mask_keys(s, queries, at, first, length, key_length, left, right, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Set scores [queries, keys from ``at`` on] to -inf where the query does not attend to the key.

    Tiles without such pairs stay as they are; ``first`` is the tile's first query.
    """
    keys = tl.arange(0, KEYS)
    if left is None:
        if at + KEYS > first:  # a tile on the diagonal
            s = tl.where(queries[:, None] >= keys[None, :] + at, s, float("-inf"))
    else:
        shift = key_length - length
        if (at + KEYS > tl.minimum(first + shift + right + 1, key_length)) | (at < first + QUERIES - 1 + shift - left):
            ahead = keys[None, :] + at - shift - queries[:, None]  # of the query's own place
            s = tl.where((ahead <= right) & (ahead >= -left) & (keys[None, :] < key_length - at), s, float("-inf"))
    return s


@jit
def _tanh(x):
    """Return tanh x: a series where the quotient of exponentials would cancel."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # e^(-2 |x|)
    quotient = (1 - e) / (1 + e)
    return tl.where(square < 0.09, series, tl.where(x < 0, -quotient, quotient))


@jit
def _offsets(stride_t, stride_h, TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Offsets of a tile of tokens and heads: rows are the tokens of each head in turn."""
    rows = tl.arange(0, TOKENS * HEADS)[:, None]
    return rows % TOKENS * stride_t + rows // TOKENS * stride_h + tl.arange(0, D)[None, :]


@jit
def _rows(x, descriptor, start, at, length, head, x_t, x_h, ROWS: tl.constexpr, D: tl.constexpr):
    """Load ROWS rows of a head from row ``at`` of a segment on.

    Rows behind the segment's end are zeros, or with a descriptor the rows that follow in memory.
    """
    if descriptor is not None:
        tile = descriptor.load([(start + at).to(tl.int32), (head * D).to(tl.int32)])
    else:
        x += (start + at) * x_t + head * x_h
        valid = tl.arange(0, ROWS)[:, None] < length - at
        tile = tl.load(x + _offsets(x_t, 0, ROWS, 1, D), mask=valid, other=0)
    return tile


@jit
def _in_registers(x, D: tl.constexpr, PRECISION: tl.constexpr):
    """Move x to registers, as a product with the identity, whose result has the layout of a product's left operand."""
    unit = (tl.arange(0, D)[:, None] == tl.arange(0, D)[None, :]).to(x.dtype)
    return tl.dot(x, unit, input_precision=PRECISION).to(x.dtype)


@jit
def _base_2(s, scale, softcap):
    """Return scores to the base 2; a prologue (scale is None) and a cap have already made them so."""
    return s if scale is None or softcap is not None else s * scale


@jit
def through_prologue(
    g, factor, y, inverse, gain, cos, sin, tokens, inside, period, D: tl.constexpr, HALF: tl.constexpr
):
    """Return the gradient of rows x from factor g, that of y = gain R(x inverse), and factor <g, y> / gain.

    inverse is 1 / rms(x). With 8 rotated pairs, both dimensions of a pair lie in one thread of a product's result.
    """
    y = y.to(tl.float32)
    component, strength = factor * tl.sum(g * y, 1), factor * inverse
    if gain is not None:
        component /= gain
        strength *= gain
    g = strength[:, None] * g - (inverse * component / D)[:, None] * y
    if HALF > 0:
        ROWS: tl.constexpr = g.shape[0]
        REST: tl.constexpr = D // (2 * HALF)
        if period is not None:
            tokens = tokens % period
        angles = tokens[:, None] * HALF + tl.arange(0, HALF)[None, :]
        c = tl.load(cos + angles, mask=inside[:, None], other=0).to(tl.float32)[:, None, :]
        s = tl.load(sin + angles, mask=inside[:, None], other=0).to(tl.float32)[:, None, :]
        turned = (tl.arange(0, REST) == 0)[None, :, None]
        first, second = tl.split(tl.permute(tl.reshape(g, (ROWS, REST, 2, HALF)), (0, 1, 3, 2)))
        g = tl.join(tl.where(turned, first * c - second * s, first), tl.where(turned, second * c + first * s, second))
        g = tl.reshape(tl.permute(g, (0, 1, 3, 2)), (ROWS, D))
    return g, component


@jit
def _clear_padding(
    padding,
    padding_t,
    at_first,
    first,
    length,
    head,
    QUERIES: tl.constexpr,
    PADDING: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Store zeros into the padding of a tile's tokens; only the program of the first heads does."""
    if PADDING > 0:
        tokens, columns = tl.arange(0, QUERIES)[:, None], tl.arange(0, PADDED)[None, :]
        zeros = tl.zeros((QUERIES, PADDED), padding.dtype.element_ty)
        mask = (first + tokens < length) & (columns < PADDING) & (head == 0)
        tl.store(padding + at_first * padding_t + tokens * padding_t + columns, zeros, mask=mask)


@jit
def _attend(
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    queries,
    start,
    first,
    length,
    key_length,
    head,
    k_t,
    k_h,
    v_t,
    v_h,
    left,
    right,
    scale,
    softcap,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    """Return the sums over keys of p v and of p = exp2(score - top), and top: the maximum if MAXIMUM, else 0.

    ``start`` is that of the segment's keys.
    """
    ROWS: tl.constexpr = q.shape[0]
    acc = tl.zeros((ROWS, D), tl.float32)
    # A window may hide a row's first tiles: finite, as -inf - -inf is no number.
    lowest = float("-inf") if left is None else -3e38
    top = tl.full((ROWS,), lowest if MAXIMUM else 0.0, tl.float32)
    total = tl.zeros((ROWS, 8), tl.float32)  # over every eighth key: they lie in one thread, in a product's result
    begin, end = _keys_seen(first, length, key_length, left, right, QUERIES)
    for at in tl.range(begin, end, KEYS, num_stages=STAGES):
        key = _rows(k, k_descriptor, start, at, key_length, head, k_t, k_h, KEYS, D)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if softcap is not None:
            s = softcap * _tanh(s * scale)
        s = _mask_keys(s, queries, at, first, length, key_length, left, right, QUERIES, KEYS)
        if MAXIMUM:
            higher = tl.maximum(top, _base_2(tl.max(s, 1), scale, softcap))
            shrunk = tl.exp2(top - higher)
            acc *= shrunk[:, None]
            total *= shrunk[:, None]
            top = higher
            p = tl.exp2(_base_2(s, scale, softcap) - top[:, None])
        else:
            p = tl.exp2(_base_2(s, scale, softcap))
        total += tl.sum(tl.reshape(p, (ROWS, KEYS // 8, 8)), 1)
        value = _rows(v, v_descriptor, start, at, key_length, head, v_t, v_h, KEYS, D)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, tl.sum(total, 1), top


@jit(do_not_specialize=["left", "right"])
def _attention_kernel(
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    o,
    lse,
    components,
    logits,
    tiles,
    first_queries,
    key_bounds,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    logits_t,
    T,
    left,
    right,
    scale,
    softcap,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    NO_MAXIMUM: tl.constexpr,
):
    """Write o and lse of a tile of queries, with the epilogue of `attention_forward` if its tensors are given.

    NO_MAXIMUM takes exponentials of the scores without subtracting their maximum. If the sums then show that scores
    were too large or all too small, the tile is computed again with the maximum. With first_queries, a tile that has
    queries is computed as a whole, and its rows before the first query get zeros. Tokens in no segment get zeros, and
    rows that attend to no key zeros and an lse of -inf.
    """
    head = (tl.program_id(0) % (H // HEADS) * HEADS).to(tl.int64)
    slot = tl.program_id(0) // (H // HEADS)
    start, length, first = tile_of(tiles, slot)
    rows = tl.arange(0, QUERIES * HEADS)
    idle = first >= length
    if first_queries is not None:
        first_query = _first_query(first_queries, tiles, slot)
        idle |= tl.minimum(first + QUERIES, length) <= first_query
    if idle:
        valid = first + rows % QUERIES < tl.abs(length)
        skipped = o + ((start + first) * H + head) * D + _offsets(H * D, D, QUERIES, HEADS, D)
        tl.store(skipped, tl.zeros((QUERIES * HEADS, D), o.dtype.element_ty), mask=valid[:, None])
        skipped = start + first + head * T + rows // QUERIES * T + rows % QUERIES
        tl.store(lse + skipped, tl.zeros((QUERIES * HEADS,), tl.float32), mask=valid)
        if components is not None:
            tl.store(components + skipped, tl.zeros((QUERIES * HEADS,), tl.float32), mask=valid)
        return
    queries = first + rows % QUERIES
    inside = queries < length
    if logits is not None:
        logit = tl.load(logits + (start + queries) * logits_t + head + rows // QUERIES, mask=inside, other=0)
    q += (start + first) * q_t + head * q_h
    q = tl.load(q + _offsets(q_t, q_h, QUERIES, HEADS, D), mask=inside[:, None], other=0)
    if k_descriptor is not None:  # barriers take shared memory: with q there too, one program fewer fits on an SM
        q = _in_registers(q, D, PRECISION)
    key_start, key_length = _other_side(key_bounds, tiles, slot, start, length)
    acc, total, top = _attend(
        q,
        k,
        v,
        k_descriptor,
        v_descriptor,
        queries,
        key_start,
        first,
        length,
        key_length,
        head // GROUP,
        k_t,
        k_h,
        v_t,
        v_h,
        left,
        right,
        scale,
        softcap,
        D,
        QUERIES,
        KEYS,
        STAGES,
        PRECISION,
        not NO_MAXIMUM,
    )
    if left is not None:
        own = queries + key_length - length  # the query's place among the keys
        keys_of_row = tl.minimum(own + right, key_length - 1) - tl.maximum(own - left, 0) + 1
    if NO_MAXIMUM:
        # Nothing has overflowed then, and terms that underflowed are less than 2^-80 of the row's sum.
        sound = (total > 2.0**-40) & (total < 2.0**100) & (tl.sum(tl.abs(acc), 1) < 2.0**126)
        if left is not None:
            sound |= keys_of_row <= 0
        if tl.min(sound.to(tl.int32)) == 0:
            acc, total, top = _attend(
                q,
                k,
                v,
                None,
                None,
                queries,
                key_start,
                first,
                length,
                key_length,
                head // GROUP,
                k_t,
                k_h,
                v_t,
                v_h,
                left,
                right,
                scale,
                softcap,
                D,
                QUERIES,
                32,
                1,
                PRECISION,
                True,
            )
    if left is None:
        single = queries == 0
    else:
        single = keys_of_row == 1
        total = tl.where(keys_of_row > 0, total, 1)
        top = tl.where(keys_of_row > 0, top, float("-inf"))
    # A row of one key has a single p: divide by p as rounded for the product, which makes o = v exact.
    acc *= (1 / tl.where(single, total.to(v.dtype.element_ty).to(tl.float32), total))[:, None]
    at_rows = start + first + head * T + rows // QUERIES * T + rows % QUERIES
    tl.store(lse + at_rows, top + tl.log2(total), mask=inside)
    if components is not None:
        v += (start + first) * v_t + head // GROUP * v_h + _offsets(v_t, 0, QUERIES, HEADS, D)
        token_value = tl.load(v, mask=inside[:, None], other=0).to(tl.float32)
        inverse = tl.rsqrt(tl.maximum(tl.sum(token_value * token_value, 1), 1e-24))
        component = tl.sum(acc * token_value, 1) * inverse
        tl.store(components + at_rows, component, mask=inside)
        acc -= (component * inverse)[:, None] * token_value
    if logits is not None:
        acc *= 2 * tl.sigmoid(logit.to(tl.float32))[:, None]
    if first_queries is not None:
        acc = tl.where(queries[:, None] >= first_query, acc, 0)
    o += ((start + first) * H + head) * D
    tl.store(o + _offsets(H * D, D, QUERIES, HEADS, D), acc.to(o.dtype.element_ty), mask=inside[:, None])


@jit(do_not_specialize=["left", "right"])
def _attention_queries_kernel(
    do,
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    o,
    lse,
    dlse,
    components,
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
    tiles,
    first_queries,
    key_bounds,
    do_t,
    do_h,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    dq_t,
    dq_h,
    dv_t,
    dv_h,
    logits_t,
    dlogits_t,
    padding_t,
    T,
    period,
    left,
    right,
    scale,
    softcap,
    factor,
    unit,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PADDING: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dq of a tile of queries, and the pairs (lse, delta = <do, o>; if dlse is given, less dlse / ln 2).

    With core_do, the arguments do and o are the gradient and the result y = g (o - <o, u> u) of the epilogue of
    `attention_forward`. The kernel then also writes core_do = g (do - <do, u> u), dlogits, and into dv the gradient
    that v gets through u, summed over the tile's heads, which are a whole group. With first_queries, dq and dlogits of
    earlier rows are zeros, and core_do and the pairs are written for queries only. Tokens in no segment get zeros.
    """
    head = (tl.program_id(0) % (H // HEADS) * HEADS).to(tl.int64)
    slot = tl.program_id(0) // (H // HEADS)
    start, length, first = tile_of(tiles, slot)
    idle = first >= length
    if first_queries is not None:
        first_query = _first_query(first_queries, tiles, slot)
        idle |= tl.minimum(first + QUERIES, length) <= first_query
    if idle:
        if gain is not None:
            at = (head + tl.arange(0, HEADS)) * (tl.num_programs(0) // (H // HEADS)) + slot
            tl.store(partials + at, tl.zeros((HEADS,), tl.float32))
        rows, at_first = tl.arange(0, QUERIES * HEADS), start + first
        inside = first + rows % QUERIES < tl.abs(length)
        skipped = dq + at_first * dq_t + head * dq_h + _offsets(dq_t, dq_h, QUERIES, HEADS, D)
        tl.store(skipped, tl.zeros((QUERIES * HEADS, D), dq.dtype.element_ty), mask=inside[:, None])
        if logits is not None:
            skipped = dlogits + (at_first + rows % QUERIES) * dlogits_t + head + rows // QUERIES
            tl.store(skipped, tl.zeros((QUERIES * HEADS,), dlogits.dtype.element_ty), mask=inside)
        _clear_padding(padding, padding_t, at_first, first, tl.abs(length), head, QUERIES, PADDING, PADDED)
        return
    rows = tl.arange(0, QUERIES * HEADS)
    queries = first + rows % QUERIES
    inside = queries < length
    is_query = inside
    if first_queries is not None:
        is_query &= queries >= first_query
    at_first = start + first
    at_rows = at_first + head * T + rows // QUERIES * T + rows % QUERIES
    do += at_first * do_t + head * do_h
    do = tl.load(do + _offsets(do_t, do_h, QUERIES, HEADS, D), mask=is_query[:, None], other=0)
    in_heads = (at_first * H + head) * D + _offsets(H * D, D, QUERIES, HEADS, D)
    o = tl.load(o + in_heads, mask=is_query[:, None], other=0)
    if components is not None:
        token_value = v + at_first * v_t + head // GROUP * v_h + _offsets(v_t, 0, QUERIES, HEADS, D)
        token_value = tl.load(token_value, mask=is_query[:, None], other=0).to(tl.float32)
        component = tl.load(components + at_rows, mask=is_query, other=0)
    if logits is not None:
        logit = tl.load(logits + (start + queries) * logits_t + head + rows // QUERIES, mask=is_query, other=0)
    dy, y = do.to(tl.float32), o.to(tl.float32)
    delta = tl.sum(dy * y, 1)
    if core_do is not None:
        gate = tl.full((QUERIES * HEADS,), 1, tl.float32)
        if logits is not None:
            gate = 2 * tl.sigmoid(logit.to(tl.float32))
            dlogits += (start + queries) * dlogits_t + head + rows // QUERIES
            tl.store(dlogits, ((1 - gate / 2) * delta).to(dlogits.dtype.element_ty), mask=inside)
        exact = gate[:, None] * dy
        if components is not None:
            squares = tl.sum(token_value * token_value, 1)
            inverse = tl.rsqrt(tl.maximum(squares, 1e-24))
            component *= inverse
            outward = tl.sum(dy * token_value, 1) * inverse
            exact -= (gate * outward * inverse)[:, None] * token_value
        tl.store(core_do + in_heads, exact.to(core_do.dtype.element_ty), mask=is_query[:, None])
        tl.debug_barrier()
        do = tl.load(
            core_do + in_heads, mask=is_query[:, None], other=0
        )  # read again so that products find it in shared memory
        # Delta is computed from the rounded do, as the products are: rows of dS then sum to zero. o = y / g + <o, u> u.
        rounded = do.to(tl.float32)
        delta = (1 / tl.maximum(gate, 1e-30)) * tl.sum(rounded * y, 1)
        if components is not None:
            delta += component * tl.sum(rounded * token_value, 1)
            # u does not depend on |v|, except where |v| is clamped.
            clamped = tl.where(squares > 1e-24, 0, 2 * gate * outward * inverse)
            dv_rows = (inverse * outward)[:, None] * y + component[:, None] * (rounded + clamped[:, None] * token_value)
            dv_rows = -tl.sum(tl.reshape(dv_rows, (HEADS, QUERIES, D)), 0)
            dv += at_first * dv_t + head // GROUP * dv_h + _offsets(dv_t, 0, QUERIES, 1, D)
            tl.store(dv, dv_rows.to(dv.dtype.element_ty), mask=first + tl.arange(0, QUERIES)[:, None] < length)
    q_pointer = q
    q += at_first * q_t + head * q_h
    q = tl.load(q + _offsets(q_t, q_h, QUERIES, HEADS, D), mask=is_query[:, None], other=0)
    lse = tl.load(lse + at_rows, mask=is_query, other=0)
    if dlse is not None:
        delta -= tl.load(dlse + at_rows, mask=is_query, other=0) * 1.4426950408889634
    if left is not None:  # rows without keys: exp2(-inf - lse) is zero, and multiplies a finite delta
        keyless = lse == float("-inf")
        lse, delta = tl.where(keyless, 0, lse), tl.where(keyless, 0, delta)
    pair = tl.arange(0, WIDTH)[None, :]
    pairs += at_rows[:, None] * WIDTH + pair
    tl.store(pairs, tl.where(pair % 2 == 0, lse[:, None], delta[:, None]), mask=is_query[:, None])
    acc = tl.zeros((QUERIES * HEADS, D), tl.float32)
    key_start, key_length = _other_side(key_bounds, tiles, slot, start, length)
    begin, end = _keys_seen(first, length, key_length, left, right, QUERIES)
    for at in tl.range(begin, end, KEYS, num_stages=STAGES):
        key = _rows(k, k_descriptor, key_start, at, key_length, head // GROUP, k_t, k_h, KEYS, D)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if softcap is not None:
            tanh = _tanh(s * scale)
            s = softcap * tanh
        s = _mask_keys(s, queries, at, first, length, key_length, left, right, QUERIES, KEYS)
        value = _rows(v, v_descriptor, key_start, at, key_length, head // GROUP, v_t, v_h, KEYS, D)
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = tl.exp2(_base_2(s, scale, softcap) - lse[:, None]) * (dp - delta[:, None])
        if softcap is not None:
            ds *= 1 - tanh * tanh
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision=PRECISION)
    if gain is None:
        acc *= factor
    else:
        start, length, first = tile_of(tiles, slot)  # loaded again, like q: registers are scarce above
        at_first, inside = start + first, first + rows % QUERIES < length
        q_pointer += at_first * q_t + head * q_h
        q_again = tl.load(q_pointer + _offsets(q_t, q_h, QUERIES, HEADS, D), mask=inside[:, None], other=0)
        at_rows = at_first + head * T + rows // QUERIES * T + rows % QUERIES
        inverse = tl.load(inverse_rms + at_rows, mask=inside, other=0)
        strength = unit * away_from_zero(tl.load(gain + head + rows // QUERIES))
        acc, component = through_prologue(
            acc, factor, q_again, inverse, strength, cos, sin, at_first + rows % QUERIES, inside, period, D, HALF
        )
        at = (head + tl.arange(0, HEADS)) * (tl.num_programs(0) // (H // HEADS)) + slot
        tl.store(partials + at, unit * tl.sum(tl.reshape(tl.where(inside, component, 0), (HEADS, QUERIES)), 1))
    dq += at_first * dq_t + head * dq_h + _offsets(dq_t, dq_h, QUERIES, HEADS, D)
    tl.store(dq, acc.to(dq.dtype.element_ty), mask=inside[:, None])
    _clear_padding(padding, padding_t, at_first, first, length, head, QUERIES, PADDING, PADDED)


@jit(do_not_specialize=["left", "right"])
def _attention_keys_kernel(
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
    tiles,
    first_queries,
    query_bounds,
    do_t,
    do_h,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    dk_t,
    dk_h,
    dv_t,
    dv_h,
    T,
    period,
    left,
    right,
    scale,
    softcap,
    factor,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    K_IN_REGISTERS: tl.constexpr,
):
    """Write dk and dv of a tile of keys; tokens in no segment get zeros.

    With ADD, dv is added to the values in memory, with first_queries only in rows of queries. Scores are transposed, so
    that their gradients are left operands of products and stay in registers. K_IN_REGISTERS does the same for k: the
    bandwidth of shared memory limits these small products.
    """
    head = (tl.program_id(0) % (H // GROUP)).to(tl.int64)
    slot = tl.program_id(0) // (H // GROUP)
    start, length, first = tile_of(tiles, slot)
    keys = first + tl.arange(0, KEYS)
    at_first = start + first
    if first >= length:
        outside = keys[:, None] < tl.abs(length)
        zeros = tl.zeros((KEYS, D), dk.dtype.element_ty)
        tl.store(dk + at_first * dk_t + head * dk_h + _offsets(dk_t, 0, KEYS, 1, D), zeros, mask=outside)
        tl.store(dv + at_first * dv_t + head * dv_h + _offsets(dv_t, 0, KEYS, 1, D), zeros, mask=outside)
        return
    inside = keys[:, None] < length
    k_pointer = k
    k = tl.load(k + at_first * k_t + head * k_h + _offsets(k_t, 0, KEYS, 1, D), mask=inside, other=0)
    v = tl.load(v + at_first * v_t + head * v_h + _offsets(v_t, 0, KEYS, 1, D), mask=inside, other=0)
    if K_IN_REGISTERS:
        k = _in_registers(k, D, PRECISION)
    rows = tl.arange(0, QUERIES * HEADS)
    queries = rows % QUERIES
    acc_k = tl.zeros((KEYS, D), tl.float32)
    acc_v = tl.zeros((KEYS, D), tl.float32)
    query_start, query_length = _other_side(query_bounds, tiles, slot, start, length)
    shift = length - query_length
    begin, end = first // QUERIES * QUERIES, query_length
    if left is not None:
        begin = tl.maximum(first - shift - right, 0)
        end = tl.minimum(tl.minimum(first + KEYS, length) - shift + left, query_length)
    if first_queries is not None:  # tiles start there, so that no row needs a mask
        begin = tl.maximum(begin, _first_query(first_queries, tiles, slot))
    for part in tl.static_range(0, GROUP, HEADS):
        at_begin = query_start + begin
        query_head = head * GROUP + part
        q_rows = q + at_begin * q_t + query_head * q_h + _offsets(q_t, q_h, QUERIES, HEADS, D)
        do_rows = do + at_begin * do_t + query_head * do_h + _offsets(do_t, do_h, QUERIES, HEADS, D)
        at_rows = at_begin + query_head * T + rows // QUERIES * T + queries
        of_rows = pairs + at_rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        for at in tl.range(begin, end, QUERIES, num_stages=STAGES):
            valid = queries[:, None] < query_length - at
            query = tl.load(q_rows, mask=valid, other=0)
            gradient = tl.load(do_rows, mask=valid, other=0)
            both = tl.load(of_rows, mask=valid, other=0).reshape(QUERIES * HEADS, WIDTH // 2, 2)
            for _ in tl.static_range(WIDTH // 4):  # the first of 1, 2 or 4 pairs
                both = both.reshape(QUERIES * HEADS, 2, both.shape[1] // 2, 2).permute(0, 2, 3, 1)
                both = tl.split(both)[0]
            lse, delta = tl.split(both.reshape(QUERIES * HEADS, 2))
            s = tl.dot(k, tl.trans(query), input_precision=PRECISION)
            if softcap is not None:
                tanh = _tanh(s * scale)
                s = softcap * tanh
            if left is None:
                if at < first + KEYS:
                    s = tl.where(queries[None, :] + at >= keys[:, None], s, float("-inf"))
            elif (at + shift + right < first + KEYS - 1) | (at + shift + QUERIES - 1 - left > first):
                ahead = keys[:, None] - (queries[None, :] + at + shift)
                s = tl.where((ahead <= right) & (ahead >= -left), s, float("-inf"))
            dp = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            p = tl.exp2(_base_2(s, scale, softcap) - lse[None, :])
            acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            if softcap is not None:
                ds *= 1 - tanh * tanh
            acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision=PRECISION)
            q_rows += QUERIES * q_t
            do_rows += QUERIES * do_t
            of_rows += QUERIES * WIDTH
    start, length, first = tile_of(tiles, slot)  # loaded again, like k: registers are scarce above
    at_first, keys = start + first, first + tl.arange(0, KEYS)
    inside = keys[:, None] < length
    if inverse_rms is None:
        acc_k *= factor
    else:
        tokens = at_first + tl.arange(0, KEYS)
        inverse = tl.load(inverse_rms + (H + head) * T + tokens, mask=keys < length, other=0)
        k_pointer += at_first * k_t + head * k_h
        k_again = tl.load(k_pointer + _offsets(k_t, 0, KEYS, 1, D), mask=inside, other=0)
        acc_k, _ = through_prologue(
            acc_k, factor, k_again, inverse, None, cos, sin, tokens, keys < length, period, D, HALF
        )
    dk += at_first * dk_t + head * dk_h + _offsets(dk_t, 0, KEYS, 1, D)
    tl.store(dk, acc_k.to(dk.dtype.element_ty), mask=inside)
    dv += at_first * dv_t + head * dv_h + _offsets(dv_t, 0, KEYS, 1, D)
    if ADD:
        present = inside
        if first_queries is not None:
            present &= keys[:, None] >= _first_query(first_queries, tiles, slot)
        acc_v += tl.load(dv, mask=present, other=0).to(tl.float32)
    tl.store(dv, acc_v.to(dv.dtype.element_ty), mask=inside)


# --- Launches ---


class Options(NamedTuple):
    """What `varlen_attention` does beyond causal attention of tokens on their own segment."""

    window: Sequence[int] | None = (
        None  # (left, right) as there, right = 0 for causal; None: (-1, 0), by faster kernels
    )
    softcap: float = 0.0
    query_bounds: torch.Tensor | None = None  # of the segments of q and k, int32 [S + 1], as `segment_bounds` returns
    key_bounds: torch.Tensor | None = None  # them; both or neither, and with a window only


PLAIN = Options()


def _settings(case: str, q: torch.Tensor, k: torch.Tensor, options: Options) -> dict:
    """Return the constants and options of a case's launch."""
    heads, width = q.shape[1:]
    group = heads // k.size(1)
    tuned, heads_per_tile = attention_parameters(case, q.dtype, width, group, q.device)
    # With fewer heads a tile has more tokens, whose addresses take registers; so do a cap's derivative, and a window in
    # the keys' kernel where it goes over its queries more than once.
    roomy = heads_per_tile != tuned["heads"]
    again = case == "keys" and heads_per_tile != group and options.window is not None
    roomy |= case != "forward" and (options.softcap > 0 or again)
    constants: dict[str, Any] = {}
    if case == "forward":  # without the maximum, exponentials exceed float16's range
        constants["NO_MAXIMUM"] = bool(tuned["plain"]) and q.dtype != torch.float16
    elif case == "keys":
        constants["K_IN_REGISTERS"] = bool(tuned["held"]) and width == REGISTER_WIDTH
    return constants | dict(
        H=heads,
        GROUP=group,
        D=width,
        QUERIES=tuned["rows"] // heads_per_tile,
        HEADS=heads_per_tile,
        KEYS=tuned["keys"],
        STAGES=tuned["stages"],
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tuned["warps"],
        maxnreg=255 if roomy else tuned["maxnreg"],
    )


def _score_arguments(
    q: torch.Tensor, k: torch.Tensor, scale: float, options: Options
) -> tuple[int | None, int | None, float, float | None]:
    """Return the kernels' left, right, scale and softcap: what makes masked scores to the base 2 of products q · k."""
    left = right = None
    if options.window is not None:
        most = max(q.size(0), k.size(0))  # as good as unlimited, and far from what 32 bits hold
        left, right = (most if side < 0 else min(side, most) for side in options.window)
    if not options.softcap:
        return left, right, scale * math.log2(math.e), None
    return left, right, scale / options.softcap, options.softcap * math.log2(math.e)


def _with_contiguous_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors with contiguous rows and with strides for which offsets in a tile fit in 32 bits."""
    fits = (x.stride(-1) == 1 and x.stride(0) < 2**22 and x.stride(1) < 2**26 for x in tensors)
    return tuple(x if fit else x.contiguous() for x, fit in zip(tensors, fits, strict=True))


def _strides(*tensors: torch.Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def _row_strides(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) for x in tensors]


class Prologue(NamedTuple):
    """The operands of the normalisation and rotation that compute q and k from rows x, see `gated_attention`.

    q = unit gain R(x / rms(x)), k = R(x / rms(x)), with unit = scale log2(e): q · k is a score to the base 2.
    """

    inverse_rms: torch.Tensor  # 1 / rms(x), float32 [H + K, T], contiguous
    gain: torch.Tensor  # [H], contiguous
    cos: torch.Tensor  # [period, pairs], contiguous, indexed by the token modulo period; see `rotates_in_registers`
    sin: torch.Tensor


def rotates_in_registers(half: int, width: int) -> bool:
    """Return whether the kernels can rotate ``half`` pairs of the leading dimensions of heads of ``width`` columns."""
    return half & (half - 1) == 0 and 2 * half <= width


def _descriptors(
    case: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Return descriptors for tensor memory access to tiles of k and v, or None if table or strides rule them out.

    They take fewer instructions than pointers, and q is then in registers. Behind a segment's end they read the next
    segment's rows instead of zeros; finite values there have no effect, since their probability is zero.
    """
    heads, width = k.shape[1:]
    tuned, _ = attention_parameters(case, q.dtype, width, q.size(1) // heads, q.device)
    regular = (
        x.element_size() == 2 and x.stride(1) == width and not (x.stride(0) % 8 or x.data_ptr() % 16) for x in (k, v)
    )
    if not (tuned["descriptors"] and width == REGISTER_WIDTH and all(regular)):
        return None, None
    block = [tuned["keys"], width]
    k, v = (TensorDescriptor(x, [x.size(0), heads * width], [x.stride(0), 1], block) for x in (k, v))
    return k, v


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    *,
    options: Options = PLAIN,
    components: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    base_2: bool = False,
    first_queries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o [T, H, D] and lse, the base 2 logarithm of each row's sum of exponentials, float32 [H, T].

    ``base_2`` means that q contains the factor of a `Prologue`. ``components``, contiguous float32 [H, T], requests the
    exclusion: o - <o, u> u is returned for o, with u = v / max(|v|, 1e-12) of the same token, and <o, u> is written
    into components. ``logits`` [T, H] with contiguous rows then multiply the result by 2 σ(logits). With
    ``first_queries``, contiguous int32 [S], only tokens from that index in their segment on are queries: o of the
    others is zero, and their lse and components are undefined.
    """
    tokens, heads, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(heads, tokens, dtype=torch.float32)
    if o.numel():
        q, k, v = _with_contiguous_rows(q, k, v)
        settings = _settings("forward", q, k, options)
        left, right, unit, cap = _score_arguments(q, k, scale, options)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            tiles = tiles_of_size(tiles, settings["QUERIES"], q, settings["GROUP"])
            _attention_kernel[(tiles.size(0) * heads // settings["HEADS"],)](
                q,
                k,
                v,
                *(_descriptors("forward", q, k, v) if base_2 else (None, None)),
                o,
                lse,
                components,
                logits,
                tiles,
                first_queries,
                options.key_bounds,
                *_strides(q, k, v),
                *_row_strides(logits),
                tokens,
                left,
                right,
                None if base_2 else unit,
                cap,
                **settings,
            )
    return o, lse


def attention_backward(
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
    options: Options = PLAIN,
    dlse: torch.Tensor | None = None,
    components: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    dlogits: torch.Tensor | None = None,
    prologue: Prologue | None = None,
    offset_keys: bool = False,
    dgain: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    first_queries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv, written into the tensors given for them, whose rows must be contiguous.

    o and lse are the results of `attention_forward`, do and dlse, contiguous or None for zeros, their gradients. Pass
    the same ``options``, ``components`` (with the values written there), ``logits`` and ``first_queries``: dlogits is
    then written; components or logits need H / K to be one of `GROUPS`; rows of do before the first query are not read,
    and get zeros in dq and dlogits. With the ``prologue`` from which q and k come, dq and dk are the gradients of its
    inputs, and dgain, float32 [H], is written. With ``offset_keys``, k is not its result, and dk is the gradient of k.
    ``padding`` [T, columns] gets zeros. D is a power of two from 16 to 256, here and in `attention_forward`.
    """
    tokens, heads, _ = q.shape
    dq = q.new_empty(q.shape) if dq is None else dq
    dk = k.new_empty(k.shape) if dk is None else dk
    dv = v.new_empty(v.shape) if dv is None else dv
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    do, q, k, v = _with_contiguous_rows(do, q, k, v)
    by_queries, by_keys = _settings("queries", q, k, options), _settings("keys", q, k, options)
    core_do = None
    if components is not None or logits is not None:
        core_do = do.new_empty(do.shape)
        rows = by_queries["QUERIES"] * by_queries["HEADS"]
        by_queries |= dict(QUERIES=rows // by_queries["GROUP"], HEADS=by_queries["GROUP"])
    # Each pair (lse, delta) is repeated up to one element per thread: fewer elements would be copied by all threads.
    rows = by_keys["QUERIES"] * by_keys["HEADS"]
    width = min(8, max(2, 32 * by_keys["num_warps"] // rows))
    pairs = lse.new_empty(*lse.shape, width)
    partials, columns, period = None, 0 if padding is None else padding.size(1), None
    inverse_rms, gain, cos, sin = prologue or (None,) * 4
    keys_prologue = (inverse_rms, cos, sin) if prologue and not offset_keys else (None,) * 3
    constants = dict(WIDTH=width, HALF=prologue.cos.size(1) if prologue else 0)
    with torch.cuda.device_of(q):
        group = by_keys["GROUP"]
        of_queries = tiles_of_size(tiles, by_queries["QUERIES"], q, group)
        if options.key_bounds is not None:
            tiles = attention_tiles(options.key_bounds, k.size(0), k.dtype, k.size(2), group)
        of_keys = tiles_of_size(tiles, by_keys["KEYS"], k, group)
        if prologue:
            partials = lse.new_empty(heads, of_queries.size(0))
            period = None if prologue.cos.size(0) == tokens else prologue.cos.size(0)
        left, right, unit, cap = _score_arguments(q, k, scale, options)
        scores = left, right, None if prologue else unit, cap, math.log(2) if prologue else scale
        _attention_queries_kernel[(of_queries.size(0) * heads // by_queries["HEADS"],)](
            do,
            q,
            k,
            v,
            *(_descriptors("queries", q, k, v) if prologue else (None, None)),
            o.contiguous(),
            lse,
            dlse,
            components,
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
            options.key_bounds,
            *_strides(do, q, k, v, dq, dv),
            *_row_strides(logits, dlogits, padding),
            tokens,
            period,
            *scores,
            unit,
            PADDING=columns,
            PADDED=1 << max(columns - 1, 0).bit_length(),
            **constants,
            **by_queries,
        )
        if partials is not None:
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
            *keys_prologue,
            of_keys,
            first_queries,
            options.query_bounds,
            *_strides(do, q, k, v, dk, dv),
            tokens,
            period,
            *scores,
            ADD=components is not None,
            **constants,
            **by_keys,
        )
    return dq, dk, dv


# --- Operators and derivatives ---


def _forward_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor, scale: float, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_forward(q, k, v, tiles, scale, options=Options(*options))


def _backward_triton(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dlse = None if dlse is None else dlse.contiguous()
    return attention_backward(do, q, k, v, o, lse, tiles, scale, options=Options(*options), dlse=dlse)


_OPTIONS = "Tensor tiles, float scale, int[]? window, float softcap, Tensor? query_bounds, Tensor? key_bounds"
_backward_op = operator(
    "varlen_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_triton,
    lambda do, dlse, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _save(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3], *inputs[7:])
    ctx.options = inputs[4:7]
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if do is None and dlse is None:
        return (None,) * 9
    *saved, query_bounds, key_bounds = ctx.saved_tensors
    do = torch.zeros_like(saved[3]) if do is None else do
    return *_backward_op(do, dlse, *saved, *ctx.options, query_bounds, key_bounds), *(None,) * 6


_forward_op = operator(
    f"varlen_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward_triton,
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)),
    setup_context=_save,
    backward=_differentiate,
)


def varlen_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    *,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_k: int | None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `varlen_attention` by kernels; the longest segments are ignored."""
    width = q.size(-1)
    if width > WIDEST:
        raise ValueError(f"the kernels take heads of at most {WIDEST} columns, got {width}; PGOLF_KERNELS=reference")
    if width & (width - 1) or width < 16:  # the tiles' widths are powers of two
        q, k, v = (F.pad(x, (0, max(16, 1 << (width - 1).bit_length()) - width)) for x in (q, k, v))
    tiles = attention_tiles(cu_seqlens, q.size(0), q.dtype, q.size(2), q.size(1) // k.size(1))
    window: tuple[int, int] | None = (window_size[0], 0 if causal else window_size[1])
    bounds: tuple[torch.Tensor | None, ...] = (None, None)
    if cu_seqlens_k is not None:
        sides = ((cu_seqlens, q), (cu_seqlens_k, k))
        bounds = tuple(segment_bounds(boundaries, x.size(0)).int() for boundaries, x in sides)
    elif window == (-1, 0):
        window = None
    o, lse = _forward_op(q, k, v, tiles, scale, window, softcap, *bounds)
    o = o[..., :width].contiguous()
    return (o, math.log(2) * lse) if return_lse else o
