"""The kernels of `varlen_attention`, their launches, and the operator with its derivative."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.epilogues import away_from_zero
from ..common.operators import operator
from ..common.partial_sums import partial_sums
from .segments import attention_parameters, attention_tiles, tiles_of_size

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton: the references are used
    TensorDescriptor = None


# Columns of the heads whose q and k may stay in registers as operands of the loop's products. At 32, ptxas of CUDA 12.8
# gives k's registers to a later product, so that dk and dv are wrong from the second tile of queries on.
REGISTER_WIDTH = 64


@jit
def _tile(tiles, slot):
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
def _base_2(s, scale):
    """Return scores to the base 2; with a prologue (scale is None) the queries already contain the factor."""
    return s if scale is None else s * scale


@jit
def _through_prologue(
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
    head,
    k_t,
    k_h,
    v_t,
    v_h,
    scale,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    MAXIMUM: tl.constexpr,
):
    """Return the sums over keys of p v and of p = exp2(score - top), and top: the maximum if MAXIMUM, else 0."""
    ROWS: tl.constexpr = q.shape[0]
    keys = tl.arange(0, KEYS)
    acc = tl.zeros((ROWS, D), tl.float32)
    top = tl.full((ROWS,), float("-inf") if MAXIMUM else 0.0, tl.float32)
    total = tl.zeros((ROWS, 8), tl.float32)  # over every eighth key: they lie in one thread, in a product's result
    for at in tl.range(0, tl.minimum(first + QUERIES, length), KEYS, num_stages=STAGES):
        key = _rows(k, k_descriptor, start, at, length, head, k_t, k_h, KEYS, D)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if at + KEYS > first:  # a tile on the diagonal
            s = tl.where(queries[:, None] >= keys[None, :] + at, s, float("-inf"))
        if MAXIMUM:
            higher = tl.maximum(top, _base_2(tl.max(s, 1), scale))
            shrunk = tl.exp2(top - higher)
            acc *= shrunk[:, None]
            total *= shrunk[:, None]
            top = higher
            p = tl.exp2(_base_2(s, scale) - top[:, None])
        else:
            p = tl.exp2(_base_2(s, scale))
        total += tl.sum(tl.reshape(p, (ROWS, KEYS // 8, 8)), 1)
        value = _rows(v, v_descriptor, start, at, length, head, v_t, v_h, KEYS, D)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, tl.sum(total, 1), top


@jit
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
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    logits_t,
    T,
    scale,
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
    queries is computed as a whole, and its rows before the first query get zeros. Tokens in no segment get zeros.
    """
    head = (tl.program_id(0) % (H // HEADS) * HEADS).to(tl.int64)
    slot = tl.program_id(0) // (H // HEADS)
    start, length, first = _tile(tiles, slot)
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
    acc, total, top = _attend(
        q,
        k,
        v,
        k_descriptor,
        v_descriptor,
        queries,
        start,
        first,
        length,
        head // GROUP,
        k_t,
        k_h,
        v_t,
        v_h,
        scale,
        D,
        QUERIES,
        KEYS,
        STAGES,
        PRECISION,
        not NO_MAXIMUM,
    )
    if NO_MAXIMUM:
        # Nothing has overflowed then, and terms that underflowed are less than 2^-80 of the row's sum.
        sound = (total > 2.0**-40) & (total < 2.0**100) & (tl.sum(tl.abs(acc), 1) < 2.0**126)
        if tl.min(sound.to(tl.int32)) == 0:
            acc, total, top = _attend(
                q,
                k,
                v,
                None,
                None,
                queries,
                start,
                first,
                length,
                head // GROUP,
                k_t,
                k_h,
                v_t,
                v_h,
                scale,
                D,
                QUERIES,
                32,
                1,
                PRECISION,
                True,
            )
    # A first token has a single p: divide by p as rounded for the product, which makes o = v exact.
    acc *= (1 / tl.where(queries == 0, total.to(v.dtype.element_ty).to(tl.float32), total))[:, None]
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


@jit
def _attention_queries_kernel(
    do,
    q,
    k,
    v,
    k_descriptor,
    v_descriptor,
    o,
    lse,
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
    scale,
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
    """Write dq of a tile of queries, and the pairs (lse, delta = <do, o>).

    With core_do, the arguments do and o are the gradient and the result y = g (o - <o, u> u) of the epilogue of
    `attention_forward`. The kernel then also writes core_do = g (do - <do, u> u), dlogits, and into dv the gradient
    that v gets through u, summed over the tile's heads, which are a whole group. With first_queries, dq and dlogits of
    earlier rows are zeros, and core_do and the pairs are written for queries only. Tokens in no segment get zeros.
    """
    head = (tl.program_id(0) % (H // HEADS) * HEADS).to(tl.int64)
    slot = tl.program_id(0) // (H // HEADS)
    start, length, first = _tile(tiles, slot)
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
    pair = tl.arange(0, WIDTH)[None, :]
    pairs += at_rows[:, None] * WIDTH + pair
    tl.store(pairs, tl.where(pair % 2 == 0, lse[:, None], delta[:, None]), mask=is_query[:, None])
    keys = tl.arange(0, KEYS)
    acc = tl.zeros((QUERIES * HEADS, D), tl.float32)
    for at in tl.range(0, tl.minimum(first + QUERIES, length), KEYS, num_stages=STAGES):
        key = _rows(k, k_descriptor, start, at, length, head // GROUP, k_t, k_h, KEYS, D)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if at + KEYS > first:
            s = tl.where(queries[:, None] >= keys[None, :] + at, s, float("-inf"))
        value = _rows(v, v_descriptor, start, at, length, head // GROUP, v_t, v_h, KEYS, D)
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = tl.exp2(_base_2(s, scale) - lse[:, None]) * (dp - delta[:, None])
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision=PRECISION)
    if gain is None:
        acc *= factor
    else:
        start, length, first = _tile(tiles, slot)  # loaded again, like q: registers are scarce above
        at_first, inside = start + first, first + rows % QUERIES < length
        q_pointer += at_first * q_t + head * q_h
        q_again = tl.load(q_pointer + _offsets(q_t, q_h, QUERIES, HEADS, D), mask=inside[:, None], other=0)
        at_rows = at_first + head * T + rows // QUERIES * T + rows % QUERIES
        inverse = tl.load(inverse_rms + at_rows, mask=inside, other=0)
        strength = unit * away_from_zero(tl.load(gain + head + rows // QUERIES))
        acc, component = _through_prologue(
            acc, factor, q_again, inverse, strength, cos, sin, at_first + rows % QUERIES, inside, period, D, HALF
        )
        at = (head + tl.arange(0, HEADS)) * (tl.num_programs(0) // (H // HEADS)) + slot
        tl.store(partials + at, unit * tl.sum(tl.reshape(tl.where(inside, component, 0), (HEADS, QUERIES)), 1))
    dq += at_first * dq_t + head * dq_h + _offsets(dq_t, dq_h, QUERIES, HEADS, D)
    tl.store(dq, acc.to(dq.dtype.element_ty), mask=inside[:, None])
    _clear_padding(padding, padding_t, at_first, first, length, head, QUERIES, PADDING, PADDED)


@jit
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
    scale,
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
    start, length, first = _tile(tiles, slot)
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
    begin = first // QUERIES * QUERIES
    if first_queries is not None:  # tiles start there, so that no row needs a mask
        begin = tl.maximum(begin, _first_query(first_queries, tiles, slot))
    for part in tl.static_range(0, GROUP, HEADS):
        at_begin = start + begin
        query_head = head * GROUP + part
        q_rows = q + at_begin * q_t + query_head * q_h + _offsets(q_t, q_h, QUERIES, HEADS, D)
        do_rows = do + at_begin * do_t + query_head * do_h + _offsets(do_t, do_h, QUERIES, HEADS, D)
        at_rows = at_begin + query_head * T + rows // QUERIES * T + queries
        of_rows = pairs + at_rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        for at in tl.range(begin, length, QUERIES, num_stages=STAGES):
            valid = queries[:, None] < length - at
            query = tl.load(q_rows, mask=valid, other=0)
            gradient = tl.load(do_rows, mask=valid, other=0)
            both = tl.load(of_rows, mask=valid, other=0).reshape(QUERIES * HEADS, WIDTH // 2, 2)
            for _ in tl.static_range(WIDTH // 4):  # the first of 1, 2 or 4 pairs
                both = both.reshape(QUERIES * HEADS, 2, both.shape[1] // 2, 2).permute(0, 2, 3, 1)
                both = tl.split(both)[0]
            lse, delta = tl.split(both.reshape(QUERIES * HEADS, 2))
            s = tl.dot(k, tl.trans(query), input_precision=PRECISION)
            if at < first + KEYS:
                s = tl.where(queries[None, :] + at >= keys[:, None], s, float("-inf"))
            dp = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            p = tl.exp2(_base_2(s, scale) - lse[None, :])
            acc_v = tl.dot(p.to(gradient.dtype), gradient, acc_v, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision=PRECISION)
            q_rows += QUERIES * q_t
            do_rows += QUERIES * do_t
            of_rows += QUERIES * WIDTH
    start, length, first = _tile(tiles, slot)  # loaded again, like k: registers are scarce above
    at_first, keys = start + first, first + tl.arange(0, KEYS)
    inside = keys[:, None] < length
    if inverse_rms is None:
        acc_k *= factor
    else:
        tokens = at_first + tl.arange(0, KEYS)
        inverse = tl.load(inverse_rms + (H + head) * T + tokens, mask=keys < length, other=0)
        k_pointer += at_first * k_t + head * k_h
        k_again = tl.load(k_pointer + _offsets(k_t, 0, KEYS, 1, D), mask=inside, other=0)
        acc_k, _ = _through_prologue(
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


def _settings(case: str, q: torch.Tensor, k: torch.Tensor) -> dict:
    """Return the constants and options of a case's launch."""
    heads, width = q.shape[1:]
    group = heads // k.size(1)
    tuned, heads_per_tile = attention_parameters(case, q.dtype, width, group, q.device)
    options: dict[str, Any] = {}
    if case == "forward":  # without the maximum, exponentials exceed float16's range
        options["NO_MAXIMUM"] = bool(tuned["plain"]) and q.dtype != torch.float16
    elif case == "keys":
        options["K_IN_REGISTERS"] = bool(tuned["held"]) and width == REGISTER_WIDTH
    return options | dict(
        H=heads,
        GROUP=group,
        D=width,
        QUERIES=tuned["rows"] // heads_per_tile,
        HEADS=heads_per_tile,
        KEYS=tuned["keys"],
        STAGES=tuned["stages"],
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tuned["warps"],
        # With fewer heads a tile has more tokens, whose addresses take registers.
        maxnreg=tuned["maxnreg"] if heads_per_tile == tuned["heads"] else 255,
    )


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
        settings = _settings("forward", q, k)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            tiles = tiles_of_size(tiles, settings["QUERIES"], q, k)
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
                *_strides(q, k, v),
                *_row_strides(logits),
                tokens,
                None if base_2 else scale * math.log2(math.e),
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
    components: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    dlogits: torch.Tensor | None = None,
    prologue: Prologue | None = None,
    dgain: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    first_queries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv, written into the tensors given for them, whose rows must be contiguous.

    o and lse are the results of `attention_forward`, do is the gradient of o. Pass the same ``components`` (with the
    values written there), ``logits`` and ``first_queries``: dlogits is then written; components or logits need H / K to
    be one of `GROUPS`; rows of do before the first query are not read, and get zeros in dq and dlogits. With the
    ``prologue`` from which q and k come, dq and dk are the gradients of its inputs, and dgain, float32 [H], is written.
    ``padding`` [T, columns] gets zeros. D is a power of two from 16 to 128, here and in `attention_forward`.
    """
    tokens, heads, _ = q.shape
    dq = q.new_empty(q.shape) if dq is None else dq
    dk = k.new_empty(k.shape) if dk is None else dk
    dv = v.new_empty(v.shape) if dv is None else dv
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    do, q, k, v = _with_contiguous_rows(do, q, k, v)
    by_queries, by_keys = _settings("queries", q, k), _settings("keys", q, k)
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
    constants = dict(WIDTH=width, HALF=prologue.cos.size(1) if prologue else 0)
    with torch.cuda.device_of(q):
        of_queries, of_keys = (tiles_of_size(tiles, size, q, k) for size in (by_queries["QUERIES"], by_keys["KEYS"]))
        if prologue:
            partials = lse.new_empty(heads, of_queries.size(0))
            period = None if prologue.cos.size(0) == tokens else prologue.cos.size(0)
        unit = scale * math.log2(math.e)
        rest = tokens, period, *((None, math.log(2)) if prologue else (unit, scale))
        _attention_queries_kernel[(of_queries.size(0) * heads // by_queries["HEADS"],)](
            do,
            q,
            k,
            v,
            *(_descriptors("queries", q, k, v) if prologue else (None, None)),
            o.contiguous(),
            lse,
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
            *_strides(do, q, k, v, dq, dv),
            *_row_strides(logits, dlogits, padding),
            *rest,
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
            inverse_rms,
            cos,
            sin,
            of_keys,
            first_queries,
            *_strides(do, q, k, v, dk, dv),
            *rest,
            ADD=components is not None,
            **constants,
            **by_keys,
        )
    return dq, dk, dv


# --- Operators and derivatives ---


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
    return attention_backward(do, q, k, v, o, lse, tiles, scale)


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
    attention_forward,
    _fake_forward,
    setup_context=_save,
    backward=_differentiate,
)


def varlen_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    """Compute `varlen_attention` by kernels."""
    width = q.size(-1)
    if width & (width - 1) or width < 16:  # the tiles' widths are powers of two
        q, k, v = (F.pad(x, (0, max(16, 1 << (width - 1).bit_length()) - width)) for x in (q, k, v))
    tiles = attention_tiles(cu_seqlens, q.size(0), q.dtype, q.size(2), q.size(1) // k.size(1))
    return _forward_op(q, k, v, tiles, scale)[0][..., :width].contiguous()
