"""The kernels of `varlen_attention`, which says how tiles lie and who sums what."""

from __future__ import annotations

from .common.compiling import jit, tl
from .common.epilogues import away_from_zero


@jit(do_not_specialize=["S", "T"])
def _attention_bounds_kernel(cu_seqlens, bounds, S, T, CHUNK: tl.constexpr):
    """bounds [S + 3] of parts that have all tokens: what is before the segments, these, and what is behind them.

    Boundaries are taken as from 0 to T; where they descend there are no segments, and part 0 has all tokens.
    """
    descends = T < 0
    for at in range(0, S, CHUNK):
        s = at + tl.arange(0, CHUNK)
        starts = tl.load(cu_seqlens + s, mask=s < S, other=0)
        ends = tl.load(cu_seqlens + s + 1, mask=s < S, other=0)
        starts, ends = tl.minimum(tl.maximum(starts, 0), T), tl.minimum(tl.maximum(ends, 0), T)
        descends |= tl.max((starts > ends).to(tl.int32), 0) > 0
    for at in range(0, S + 3, CHUNK):
        part = at + tl.arange(0, CHUNK)
        bound = tl.load(cu_seqlens + part - 1, mask=(part > 0) & (part < S + 2), other=0)
        bound = tl.minimum(tl.maximum(bound, 0), T)
        bound = tl.where((part > S + 1) | (descends & (part > 0)), T, bound)
        tl.store(bounds + part, bound, mask=part < S + 3)


@jit(do_not_specialize=["P"])
def _attention_tiles_kernel(bounds, tiles, P, SIZES: tl.constexpr, CHUNK: tl.constexpr):
    """Tile ``slot`` of those of one size that P parts own, to its place: segments by length, what is outside, zeros.

    A tile is its part's first token, the part's length, the tile's first token in it and the segment. Of tokens that
    are in no segment the length is negated, so that they have nothing to attend to.
    """
    slot, which = tl.program_id(0), tl.program_id(1)
    size = SIZES[0]
    for i in tl.static_range(1, len(SIZES)):
        size = tl.where(which == i, SIZES[i], size)
    tiles += which * tl.num_programs(0) * 4
    low, high = slot * 0, slot * 0 + P
    while high - low > CHUNK:
        middle = (low + high) // 2
        owned = tl.load(bounds + middle) // size + middle <= slot
        low, high = tl.where(owned, middle, low), tl.where(owned, high, middle)
    p = low + tl.arange(0, CHUNK)
    owned = (tl.load(bounds + p, mask=p < high, other=0) // size + p <= slot) & (p < high)
    part = low + tl.sum(owned.to(tl.int32)) - 1
    start = tl.load(bounds + part)
    length = tl.load(bounds + part + 1) - start
    block = slot - start // size - part
    outside = (part == 0) | (part == P - 1)
    used, before = slot * 0, slot * 0
    for at in range(0, P, CHUNK):
        p = at + tl.arange(0, CHUNK)
        starts = tl.load(bounds + p, mask=p < P, other=0)
        lengths = tl.load(bounds + p + 1, mask=p < P, other=0) - starts
        blocks = (lengths + size - 1) // size
        used += tl.sum(blocks)
        earlier = (lengths > length) | ((lengths == length) & (starts < start)) | outside
        earlier = (earlier & (p > 0) & (p < P - 1)) | (outside & (p < part))
        before += tl.sum(tl.where(earlier, blocks, 0))
    column = tl.arange(0, 4)
    tile = tl.where(column == 0, start, tl.where(column == 1, tl.where(outside, -length, length), block * size))
    tile = tl.where(column == 3, tl.where(outside, 0, part - 1), tile)
    tl.store(tiles + (before + block) * 4 + column, tile, mask=(block * size < length) & (column >= 0))
    tl.store(tiles + slot * 4 + column, column * 0, mask=(slot >= used) & (column >= 0))


@jit
def _tile(tiles, slot):
    """The first token (int64) and the length of a tile's segment, the tile's first token in it.

    The length is negative where the tile's tokens are in no segment.
    """
    tiles += slot * 4
    return tl.load(tiles).to(tl.int64), tl.load(tiles + 1), tl.load(tiles + 2)


@jit
def _first_query(first_queries, tiles, slot):
    """Where the queries of a tile's segment begin in it."""
    return tl.load(first_queries + tl.load(tiles + slot * 4 + 3))


@jit
def _offsets(stride_t, stride_h, TOKENS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Of the rows of a tile of tokens and heads, head by head, and their columns."""
    rows = tl.arange(0, TOKENS * HEADS)[:, None]
    return rows % TOKENS * stride_t + rows // TOKENS * stride_h + tl.arange(0, D)[None, :]


@jit
def _rows(x, described, start, at, length, head, x_t, x_h, ROWS: tl.constexpr, D: tl.constexpr):
    """A head's rows from ``at`` of a segment on; behind its end zeros, or from a descriptor what lies there."""
    if described is not None:
        tile = described.load([(start + at).to(tl.int32), (head * D).to(tl.int32)])
    else:
        x += (start + at) * x_t + head * x_h
        valid = tl.arange(0, ROWS)[:, None] < length - at
        tile = tl.load(x + _offsets(x_t, 0, ROWS, 1, D), mask=valid, other=0)
    return tile


@jit
def _held(x, D: tl.constexpr, PRECISION: tl.constexpr):
    """x, as a product's result: in registers, where the next product takes its left operand from."""
    unit = (tl.arange(0, D)[:, None] == tl.arange(0, D)[None, :]).to(x.dtype)
    return tl.dot(x, unit, input_precision=PRECISION).to(x.dtype)


@jit
def _base_2(s, scale):
    """Scores to the base 2, which products of keys and a prologue's queries are already."""
    return s if scale is None else s * scale


@jit
def _through_prologue(
    g, factor, made, inverse, gain, cos, sin, tokens, inside, period, D: tl.constexpr, HALF: tl.constexpr
):
    """Gradient of rows x by that of ``made`` = gain R(x inverse), factor g, and factor <g, made> / gain.

    inverse is 1 / rms(x). Both dimensions of a pair are in one thread, of a product's result and of 8 pairs.
    """
    made = made.to(tl.float32)
    along, strength = factor * tl.sum(g * made, 1), factor * inverse
    if gain is not None:
        along /= gain
        strength *= gain
    g = strength[:, None] * g - (inverse * along / D)[:, None] * made
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
    return g, along


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
    """Zeros into the padding of a tile's tokens, by the program of the first heads."""
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
    all_k,
    all_v,
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
    """Sums of p v and of p = exp2(score - top) over a tile's keys, and top: the running maximum, else 0."""
    ROWS: tl.constexpr = q.shape[0]
    keys = tl.arange(0, KEYS)
    acc = tl.zeros((ROWS, D), tl.float32)
    top = tl.full((ROWS,), float("-inf") if MAXIMUM else 0.0, tl.float32)
    total = tl.zeros((ROWS, 8), tl.float32)  # of every eighth key: a thread's own, in a product's result
    for at in tl.range(0, tl.minimum(first + QUERIES, length), KEYS, num_stages=STAGES):
        key = _rows(k, all_k, start, at, length, head, k_t, k_h, KEYS, D)
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
        value = _rows(v, all_v, start, at, length, head, v_t, v_h, KEYS, D)
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, tl.sum(total, 1), top


@jit
def _attention_kernel(
    q,
    k,
    v,
    all_k,
    all_v,
    o,
    lse,
    along,
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
    PLAIN: tl.constexpr,
):
    """With PLAIN exponentials are of the scores themselves: no maximum, nothing to scale back in the loop.

    Where sums then tell that some were too large or all too small, the tile is computed again. With ``first_queries``
    a tile that has queries is computed as a whole, and of its rows those before them get zeros, as do tokens in no
    segment.
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
        if along is not None:
            tl.store(along + skipped, tl.zeros((QUERIES * HEADS,), tl.float32), mask=valid)
        return
    queries = first + rows % QUERIES
    inside = queries < length
    if logits is not None:
        logit = tl.load(logits + (start + queries) * logits_t + head + rows // QUERIES, mask=inside, other=0)
    q += (start + first) * q_t + head * q_h
    q = tl.load(q + _offsets(q_t, q_h, QUERIES, HEADS, D), mask=inside[:, None], other=0)
    if all_k is not None:  # whose barriers' bytes would cost a program an SM, with q in shared memory
        q = _held(q, D, PRECISION)
    acc, total, top = _attend(
        q,
        k,
        v,
        all_k,
        all_v,
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
        not PLAIN,
    )
    if PLAIN:
        # Then nothing has overflowed, and what float32 cannot tell from zero is less than 2^-80 of the row's sum.
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
    # A first token has one p, which was rounded for its product.
    acc *= (1 / tl.where(queries == 0, total.to(v.dtype.element_ty).to(tl.float32), total))[:, None]
    at_rows = start + first + head * T + rows // QUERIES * T + rows % QUERIES
    tl.store(lse + at_rows, top + tl.log2(total), mask=inside)
    if along is not None:
        v += (start + first) * v_t + head // GROUP * v_h + _offsets(v_t, 0, QUERIES, HEADS, D)
        own = tl.load(v, mask=inside[:, None], other=0).to(tl.float32)
        inverse = tl.rsqrt(tl.maximum(tl.sum(own * own, 1), 1e-24))
        component = tl.sum(acc * own, 1) * inverse
        tl.store(along + at_rows, component, mask=inside)
        acc -= (component * inverse)[:, None] * own
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
    all_k,
    all_v,
    o,
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
    """dq of a tile of queries, and the pairs of their lse and delta = <do, o>.

    With ``core_do`` do and o are the gradient and the result y = g (o - <o, u> u) of `_forward`'s epilogue. Then also
    written are core_do = g (do - <do, u> u), dlogits, and into dv what the exclusion gives u; the tile's heads are a
    whole group, of which that is the sum. With ``first_queries`` dq and dlogits of the rows before are zeros, of a tile
    without queries at once, and what only the keys' kernel reads is there for queries alone. Of tokens in no segment
    they are zeros, too.
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
    asked = inside
    if first_queries is not None:
        asked &= queries >= first_query
    at_first = start + first
    at_rows = at_first + head * T + rows // QUERIES * T + rows % QUERIES
    do += at_first * do_t + head * do_h
    do = tl.load(do + _offsets(do_t, do_h, QUERIES, HEADS, D), mask=asked[:, None], other=0)
    in_heads = (at_first * H + head) * D + _offsets(H * D, D, QUERIES, HEADS, D)
    o = tl.load(o + in_heads, mask=asked[:, None], other=0)
    if along is not None:
        own_value = v + at_first * v_t + head // GROUP * v_h + _offsets(v_t, 0, QUERIES, HEADS, D)
        own_value = tl.load(own_value, mask=asked[:, None], other=0).to(tl.float32)
        component = tl.load(along + at_rows, mask=asked, other=0)
    if logits is not None:
        logit = tl.load(logits + (start + queries) * logits_t + head + rows // QUERIES, mask=asked, other=0)
    dy, y = do.to(tl.float32), o.to(tl.float32)
    own = tl.sum(dy * y, 1)
    if core_do is not None:
        gate = tl.full((QUERIES * HEADS,), 1, tl.float32)
        if logits is not None:
            gate = 2 * tl.sigmoid(logit.to(tl.float32))
            dlogits += (start + queries) * dlogits_t + head + rows // QUERIES
            tl.store(dlogits, ((1 - gate / 2) * own).to(dlogits.dtype.element_ty), mask=inside)
        exact = gate[:, None] * dy
        if along is not None:
            squares = tl.sum(own_value * own_value, 1)
            inverse = tl.rsqrt(tl.maximum(squares, 1e-24))
            component *= inverse
            outward = tl.sum(dy * own_value, 1) * inverse
            exact -= (gate * outward * inverse)[:, None] * own_value
        tl.store(core_do + in_heads, exact.to(core_do.dtype.element_ty), mask=asked[:, None])
        tl.debug_barrier()
        do = tl.load(core_do + in_heads, mask=asked[:, None], other=0)  # products take it from shared memory
        # Delta is of do as rounded, as the products are: then the rows of dS sum to zero. o is y / g + <o, u> u.
        rounded = do.to(tl.float32)
        own = (1 / tl.maximum(gate, 1e-30)) * tl.sum(rounded * y, 1)
        if along is not None:
            own += component * tl.sum(rounded * own_value, 1)
            # A direction does not depend on the length, but for where that is clamped.
            clamped = tl.where(squares > 1e-24, 0, 2 * gate * outward * inverse)
            given = (inverse * outward)[:, None] * y + component[:, None] * (rounded + clamped[:, None] * own_value)
            given = -tl.sum(tl.reshape(given, (HEADS, QUERIES, D)), 0)
            dv += at_first * dv_t + head // GROUP * dv_h + _offsets(dv_t, 0, QUERIES, 1, D)
            tl.store(dv, given.to(dv.dtype.element_ty), mask=first + tl.arange(0, QUERIES)[:, None] < length)
    made = q
    q += at_first * q_t + head * q_h
    q = tl.load(q + _offsets(q_t, q_h, QUERIES, HEADS, D), mask=asked[:, None], other=0)
    lse = tl.load(lse + at_rows, mask=asked, other=0)
    pair = tl.arange(0, WIDTH)[None, :]
    pairs += at_rows[:, None] * WIDTH + pair
    tl.store(pairs, tl.where(pair % 2 == 0, lse[:, None], own[:, None]), mask=asked[:, None])
    keys = tl.arange(0, KEYS)
    acc = tl.zeros((QUERIES * HEADS, D), tl.float32)
    for at in tl.range(0, tl.minimum(first + QUERIES, length), KEYS, num_stages=STAGES):
        key = _rows(k, all_k, start, at, length, head // GROUP, k_t, k_h, KEYS, D)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if at + KEYS > first:
            s = tl.where(queries[:, None] >= keys[None, :] + at, s, float("-inf"))
        value = _rows(v, all_v, start, at, length, head // GROUP, v_t, v_h, KEYS, D)
        dp = tl.dot(do, tl.trans(value), input_precision=PRECISION)
        ds = tl.exp2(_base_2(s, scale) - lse[:, None]) * (dp - own[:, None])
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision=PRECISION)
    if gain is None:
        acc *= factor
    else:
        start, length, first = _tile(tiles, slot)  # anew, as q: registers are short until here
        at_first, inside = start + first, first + rows % QUERIES < length
        made += at_first * q_t + head * q_h
        made = tl.load(made + _offsets(q_t, q_h, QUERIES, HEADS, D), mask=inside[:, None], other=0)
        at_rows = at_first + head * T + rows // QUERIES * T + rows % QUERIES
        inverse = tl.load(inverse_rms + at_rows, mask=inside, other=0)
        strength = unit * away_from_zero(tl.load(gain + head + rows // QUERIES))
        acc, component = _through_prologue(
            acc, factor, made, inverse, strength, cos, sin, at_first + rows % QUERIES, inside, period, D, HALF
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
    HELD: tl.constexpr,
):
    """dk and dv of a tile of keys, dv with ADD on top of what is there, with ``first_queries`` in rows of queries only.

    Of tokens in no segment both are zeros. Scores are transposed, so that their gradients are left operands, from
    registers; so is k if HELD, which spares shared memory, whose bandwidth is what these small products take most of.
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
    made = k
    k = tl.load(k + at_first * k_t + head * k_h + _offsets(k_t, 0, KEYS, 1, D), mask=inside, other=0)
    v = tl.load(v + at_first * v_t + head * v_h + _offsets(v_t, 0, KEYS, 1, D), mask=inside, other=0)
    if HELD:
        k = _held(k, D, PRECISION)
    rows = tl.arange(0, QUERIES * HEADS)
    queries = rows % QUERIES
    acc_k = tl.zeros((KEYS, D), tl.float32)
    acc_v = tl.zeros((KEYS, D), tl.float32)
    begin = first // QUERIES * QUERIES
    if first_queries is not None:  # tiles from there on, of which no row needs a mask
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
    start, length, first = _tile(tiles, slot)  # anew, as k: registers are short until here
    at_first, keys = start + first, first + tl.arange(0, KEYS)
    inside = keys[:, None] < length
    if inverse_rms is None:
        acc_k *= factor
    else:
        tokens = at_first + tl.arange(0, KEYS)
        inverse = tl.load(inverse_rms + (H + head) * T + tokens, mask=keys < length, other=0)
        made += at_first * k_t + head * k_h
        made = tl.load(made + _offsets(k_t, 0, KEYS, 1, D), mask=inside, other=0)
        acc_k, _ = _through_prologue(
            acc_k, factor, made, inverse, None, cos, sin, tokens, keys < length, period, D, HALF
        )
    dk += at_first * dk_t + head * dk_h + _offsets(dk_t, 0, KEYS, 1, D)
    tl.store(dk, acc_k.to(dk.dtype.element_ty), mask=inside)
    dv += at_first * dv_t + head * dv_h + _offsets(dv_t, 0, KEYS, 1, D)
    if ADD:
        given = inside
        if first_queries is not None:
            given &= keys[:, None] >= _first_query(first_queries, tiles, slot)
        acc_v += tl.load(dv, mask=given, other=0).to(tl.float32)
    tl.store(dv, acc_v.to(dv.dtype.element_ty), mask=inside)
