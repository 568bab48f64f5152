"""SmearGate and the model's prologue: kernels, launches and operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.launch import accumulator, launch_parameters
from ..common.operators import operator


@jit
def _span(T, chunks, CHUNK: tl.constexpr):
    """Return this program's chunk: its row's first token (int64), then first and last + 1 token in the row."""
    program = tl.program_id(0)
    start = program % chunks * CHUNK
    return (program // chunks).to(tl.int64) * T, start, tl.minimum(start + CHUNK, T)


@jit
def _row(x, ids, token, columns, inside, V, D: tl.constexpr, EMBED: tl.constexpr):
    """Load row ``token`` of x, or with EMBED the row of the table x for the token's id, clamped to the table."""
    row = token
    if EMBED:
        row = tl.minimum(tl.maximum(tl.load(ids + token).to(tl.int64), 0), V - 1)
    return tl.load(x + row * D + columns, mask=inside, other=0)


@jit
def _gated(gated, ids, starts, token, bos_id):
    """Return ``gated`` where the token is neither a BOS nor the start of a sequence, else false."""
    if bos_id is not None:
        gated = gated & (tl.load(ids + token) != bos_id)
    if starts is not None:
        gated = gated & (tl.load(starts + token) == 0)
    return gated


@jit
def _forward_kernel(
    x,
    ids,
    weight,
    lam,
    out,
    T,
    chunks,
    V,
    bos_id,
    starts,
    EPS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    EMBED: tl.constexpr,
    ACC: tl.constexpr,
):
    base, start, stop = _span(T, chunks, CHUNK)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, mask=columns < W, other=0).to(ACC)
    strength = tl.load(lam).to(ACC)
    previous = _row(x, ids, base + tl.maximum(start - 1, 0), columns, inside, V, D, EMBED).to(ACC)
    for t in tl.range(start, stop, num_stages=STAGES):
        token = base + t
        current = _row(x, ids, token, columns, inside, V, D, EMBED).to(ACC)
        gate = strength * tl.sigmoid(tl.sum(current * w))
        gate = tl.where(_gated(t > 0, ids, starts, token, bos_id), gate, 0)
        y = current + gate * tl.where(gate == 0, 0, previous)  # testing the gate saves registers
        if EMBED:
            scale = tl.rsqrt(tl.sum(y * y) / D + EPS)
            identity = tl.load(ids + token)
            y *= tl.where((identity < 0) | (identity >= V), float("nan"), scale)
        # With EMBED the table should stay in the cache, so evict the output first.
        evict: tl.constexpr = "evict_first" if EMBED else ""
        tl.store(out + token * D + columns, y.to(out.dtype.element_ty), mask=inside, eviction_policy=evict)
        previous = current


@jit
def _backward_kernel(
    dout,
    x,
    ids,
    weight,
    lam,
    dx,
    partials,
    T,
    chunks,
    V,
    bos_id,
    starts,
    EPS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    EMBED: tl.constexpr,
    ACC: tl.constexpr,
):
    base, start, stop = _span(T, chunks, CHUNK)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, mask=columns < W, other=0).to(ACC)
    strength = tl.load(lam).to(ACC)
    # The walk starts with the token after the chunk: the chunk's last token needs a part of its gradient. The program
    # of the next chunk stores it.
    last = tl.minimum(stop, T - 1)
    current = _row(x, ids, base + last, columns, inside, V, D, EMBED).to(ACC)
    carried = tl.zeros((BLOCK,), ACC)
    dw = tl.zeros((BLOCK,), ACC)
    dlam = tl.sum(carried)
    for i in tl.range(last - start + 1, num_stages=STAGES):
        t = last - i
        token = base + t
        previous = _row(x, ids, base + tl.maximum(t - 1, 0), columns, inside, V, D, EMBED).to(ACC)
        dy = tl.load(dout + token * D + columns, mask=inside, other=0).to(ACC)
        sigma = tl.sigmoid(tl.sum(current * w))
        gated = _gated(t > 0, ids, starts, token, bos_id)
        gate = strength * sigma
        scale = 1.0  # factor of dy, applied later
        if EMBED:
            y = tl.where(gated, current + gate * previous, current)
            scale = tl.rsqrt(tl.sum(y * y) / D + EPS)
            dy -= (scale * scale * tl.sum(dy * y) / D) * y
        s = tl.where(gated & (t < stop), scale * tl.sum(dy * previous), 0)
        dlam += sigma * s
        slope = strength * sigma * (1 - sigma) * s
        dw += slope * current
        result = carried + scale * dy + slope * w
        if EMBED:
            identity = tl.load(ids + token).to(tl.int64)
            mine = inside & (t < stop) & (identity >= 0) & (identity < V)
            tl.atomic_add(dx + identity * D + columns, result, mask=mine, sem="relaxed")
        else:
            tl.store(dx + token * D + columns, result.to(dx.dtype.element_ty), mask=inside & (t < stop))
        carried = tl.where(gated, (gate * scale) * dy, 0)
        current = previous
    programs = tl.num_programs(0).to(tl.int64)
    partials += tl.program_id(0)
    tl.store(partials + columns * programs, dw, mask=columns < W)
    tl.store(partials + W * programs, dlam)


@jit
def _prepare_kernel(
    ids,
    table,
    weight,
    keys,
    codes,
    sigmas,
    gradient,
    N,
    T,
    V,
    bos_id,
    starts,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Prepare what `_table_gradient_kernel` reads, and fill the gradient with zeros for ids that no token has.

    keys: the tokens' ids, clamped to the table. codes: the same, but ~id for tokens without a gate (a BOS, a start, or
    the first of a row). sigmas [V]: the ids' gates without λ.
    """
    program = tl.program_id(0).to(tl.int64)
    token = program * TOKENS + tl.arange(0, TOKENS)
    given = tl.load(ids + token, mask=token < N, other=0)
    gated = token % T != 0
    if bos_id is not None:
        gated = gated & (given != bos_id)
    if starts is not None:
        gated = gated & (tl.load(starts + token, mask=token < N, other=0) == 0)
    identity = tl.minimum(tl.maximum(given.to(tl.int64), 0), V - 1)
    tl.store(keys + token, identity.to(keys.dtype.element_ty), mask=token < N)
    code = tl.where(gated, identity, -1 - identity)
    tl.store(codes + token, code.to(codes.dtype.element_ty), mask=token < N)
    row, gate, columns = program * ROWS + tl.arange(0, ROWS), tl.arange(0, GATE), tl.arange(0, BLOCK)
    w = tl.load(weight + gate, mask=gate < W, other=0).to(ACC)
    mask = (row < V)[:, None] & (gate < W)[None, :]
    x = tl.load(table + row[:, None] * D + gate[None, :], mask=mask, other=0).to(ACC)
    tl.store(sigmas + row, tl.sigmoid(tl.sum(x * w[None, :], 1)), mask=row < V)
    zeros = tl.zeros((ROWS, BLOCK), gradient.dtype.element_ty)
    mask = (row < V)[:, None] & (columns < D)[None, :]
    tl.store(gradient + row[:, None] * D + columns[None, :], zeros, mask=mask)


@jit
def _pick(values, chosen):
    """Return the one chosen value, as a sum of integers (the bits of floats): in one warp that is one instruction."""
    if values.dtype.is_floating():
        bits: tl.constexpr = tl.int64 if values.dtype == tl.float64 else tl.int32
        return tl.sum(tl.where(chosen, values.to(bits, bitcast=True), 0)).to(values.dtype, bitcast=True)
    return tl.sum(tl.where(chosen, values, 0))


@jit
def _table_gradient_kernel(
    dout,
    table,
    codes,
    sigmas,
    keys,
    order,
    weight,
    lam,
    gradient,
    pieces,
    partials,
    N,
    EPS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum the table's gradient over runs of equal ids (segments) in one chunk of the tokens sorted by id.

    Whole segments go into ``gradient``. Piece [chunk, 0] ends or continues a segment of earlier chunks, and piece
    [chunk, 1] begins a segment. Within a segment all tokens have the same embedding x and the same gate. The norm of
    token t contributes r (dy - r² <dy, y> y / D) to its gradient. Token t + 1 reads the embedding of t as the previous
    one, so its norm contributes the same expression of token t + 1, times the gate g of token t + 1.
    """
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    columns, gate_columns = tl.arange(0, BLOCK), tl.arange(0, GATE)
    inside = columns < D
    strength = tl.load(lam).to(ACC)
    key = tl.load(keys + start)
    continued = (start > 0) & (tl.load(keys + tl.maximum(start - 1, 0)) == key)
    key = key.to(codes.dtype.element_ty)
    # Load the indices of all the chunk's rows at once.
    offsets = tl.arange(0, LIST)
    count = tl.minimum(N - start, CHUNK).to(tl.int32)
    listed = offsets < count
    tokens = tl.load(order + start + offsets, mask=listed, other=0)
    listed_codes = tl.load(codes + tokens, mask=listed, other=-1)
    previous_ids = tl.load(codes + tokens - 1, mask=listed & (tokens > 0), other=0)
    previous_ids = tl.maximum(previous_ids, -1 - previous_ids)
    next_ids = tl.load(codes + tokens + 1, mask=listed & (tokens + 1 < N), other=-1)
    next_gates = strength * tl.load(sigmas + next_ids, mask=next_ids >= 0, other=0)
    tokens = tokens.to(codes.dtype.element_ty)
    tokens = tl.where(listed_codes >= 0, tokens, -1 - tokens)
    same = tl.load(keys + start + offsets, mask=listed, other=0)
    follows = start + offsets + 1 < N
    next_keys = tl.load(keys + start + offsets + 1, mask=listed & follows, other=0)
    next_keys = tl.where((next_keys != same) | (start + offsets + 1 == N), next_keys.to(codes.dtype.element_ty), -1)

    current = tl.load(table + key.to(tl.int64) * D + columns, mask=inside, other=0).to(ACC)
    sigma = tl.load(sigmas + key)
    total = tl.zeros((BLOCK,), ACC)
    s = tl.sum(total)  # Σ s_t over the segment
    dw = tl.zeros((GATE,), ACC)
    dlam = s
    for i in tl.range(count, num_stages=STAGES):
        chosen = offsets == i
        token = _pick(tokens, chosen)
        gated = token >= 0
        token = tl.maximum(token, -1 - token).to(tl.int64)
        previous_id = _pick(previous_ids, chosen).to(tl.int64)
        next_id = _pick(next_ids, chosen).to(tl.int64)
        has_next = next_id >= 0
        previous = tl.load(table + previous_id * D + columns, mask=inside & gated, other=0).to(ACC)
        dy = tl.load(dout + token * D + columns, mask=inside, other=0).to(ACC)
        following = tl.load(table + next_id * D + columns, mask=inside & has_next, other=0).to(ACC)
        dz = tl.load(dout + (token + 1) * D + columns, mask=inside & has_next, other=0).to(ACC)
        gate = tl.where(gated, strength * sigma, 0)
        y = current + gate * previous
        scale = tl.rsqrt(tl.sum(y * y) / D + EPS)
        dy -= (scale * scale * tl.sum(dy * y) / D) * y
        s += scale * tl.sum(tl.where(gated, dy * previous, 0))
        total += scale * dy
        gate = _pick(next_gates, chosen)
        z = following + gate * current
        scale = tl.rsqrt(tl.sum(z * z) / D + EPS)
        slope = scale * scale * tl.sum(dz * z) / D
        scale = tl.where(has_next, gate * scale, 0)
        total += scale * dz
        total -= tl.where(has_next, scale * slope, 0) * z
        next_key = _pick(next_keys, chosen)
        if (next_key >= 0) | (i + 1 == count):
            row = key.to(tl.int64) * D
            dlam += sigma * s
            slope = strength * sigma * (1 - sigma) * s
            dw += slope * tl.load(table + row + gate_columns, mask=gate_columns < W, other=0).to(ACC)
            total += slope * tl.load(weight + columns, mask=columns < W, other=0).to(ACC)
            if (next_key >= 0) & (not continued):
                tl.store(gradient + row + columns, total.to(gradient.dtype.element_ty), mask=inside)
            else:
                piece = chunk * 2 + tl.where(continued, 0, 1)
                tl.store(pieces + piece * D + columns, total, mask=inside)
            total = tl.zeros((BLOCK,), ACC)
            s = tl.sum(total)
            continued = key != key
            key = tl.maximum(next_key, 0)
            current = tl.load(table + key.to(tl.int64) * D + columns, mask=inside, other=0).to(ACC)
            sigma = tl.load(sigmas + key)
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partials + gate_columns * programs + chunk, dw, mask=gate_columns < W)
    tl.store(partials + W * programs + chunk, dlam)


@jit
def _join_segments_kernel(
    keys,
    gradient,
    pieces,
    partials,
    sums,
    N,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SUMMANDS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add up the pieces of the segment that begins in this chunk and continues in later ones; sum the partials."""
    chunk, chunks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if tl.program_id(1) == 0:
        for row in range(chunk, W + 1, chunks):
            summands = tl.zeros((SUMMANDS,), ACC)
            for first in range(0, chunks, SUMMANDS):
                place = first + tl.arange(0, SUMMANDS)
                summands += tl.load(partials + row * chunks + place, mask=place < chunks, other=0)
            tl.store(sums + row, tl.sum(summands))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < D) | (D % BLOCK == 0)
    start, stop = chunk * CHUNK, (chunk + 1) * CHUNK
    key = tl.load(keys + stop - 1, mask=stop < N, other=-1)
    begins = (start == 0) | (tl.load(keys + tl.maximum(start - 1, 0)) != key)
    later = chunk + 1 + tl.arange(0, ROWS)
    same = tl.load(keys + later * CHUNK, mask=later * CHUNK < N, other=-1) == key
    if begins & (key >= 0) & (tl.load(keys + tl.minimum(stop, N - 1)) == key):
        total = tl.load(pieces + (2 * chunk + 1) * D + columns, mask=inside, other=0)
        more = chunk == chunk
        while more:  # keys are loaded one step ahead of the pieces
            mask = same[:, None] & inside[None, :]
            rows = tl.load(pieces + later[:, None] * (2 * D) + columns[None, :], mask=mask, other=0)
            more = tl.min(same.to(tl.int32)) == 1
            later += ROWS
            same = tl.load(keys + later * CHUNK, mask=later * CHUNK < N, other=-1) == key
            total += tl.sum(rows, 0)
        tl.store(gradient + key.to(tl.int64) * D + columns, total.to(gradient.dtype.element_ty), mask=inside)


def _settings(case: str, source: Tensor) -> tuple[dict[str, int], dict[str, Any]]:
    """Return a case's tuned parameters, and the launch arguments that follow from them and the width of ``source``."""
    tuned = launch_parameters("smear_gate", case, source.device)
    block = 1 << (source.size(-1) - 1).bit_length()
    warps = min(32, max(1, block // tuned["columns_per_warp"]))
    accumulate = tl.float64 if accumulator(source) == torch.float64 else tl.float32
    return tuned, dict(D=source.size(-1), BLOCK=block, ACC=accumulate, num_warps=warps)


def _bytes(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.uint8)


def _forward(
    source: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    starts: Tensor | None,
    *,
    eps: float = 0.0,
    embed: bool = False,
) -> Tensor:
    """Launch the forward of either operator: ``source`` is x, or with ``embed`` the table."""
    rows, tokens = input_ids.shape
    out = source.new_empty(rows, tokens, source.size(-1))
    if out.numel():
        tuned, settings = _settings("prologue_forward" if embed else "forward", source)
        chunks = -(-tokens // tuned["chunk"])
        with torch.cuda.device_of(source):  # Triton launches on the current device
            _forward_kernel[(rows * chunks,)](
                source.contiguous(),
                input_ids.contiguous(),
                weight.contiguous(),
                lam,
                out,
                tokens,
                chunks,
                source.size(0) if embed else 1,
                bos_id,
                _bytes(starts),
                EPS=eps,
                W=weight.numel(),
                CHUNK=tuned["chunk"],
                STAGES=tuned["stages"],
                EMBED=embed,
                **settings,
            )
    return out


def _backward(
    dout: Tensor,
    source: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    starts: Tensor | None,
    *,
    eps: float = 0.0,
    embed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch a backward that walks the tokens in order.

    Returns the gradients of x and of (w, λ). With ``embed`` the first is the table's, summed by atomics.
    """
    rows, tokens = input_ids.shape
    dx = source.new_empty(dout.shape)
    if embed:
        dx = torch.zeros(source.shape, dtype=accumulator(source), device=source.device)
    if not dout.numel():
        return dx, source.new_zeros(weight.numel() + 1, dtype=accumulator(source))
    tuned, settings = _settings("prologue_backward" if embed else "backward", source)
    chunks = -(-tokens // tuned["chunk"])
    partials = source.new_empty(weight.numel() + 1, rows * chunks, dtype=accumulator(source))
    with torch.cuda.device_of(source):
        _backward_kernel[(rows * chunks,)](
            dout.contiguous(),
            source.contiguous(),
            input_ids.contiguous(),
            weight.contiguous(),
            lam,
            dx,
            partials,
            tokens,
            chunks,
            source.size(0) if embed else 1,
            bos_id,
            _bytes(starts),
            EPS=eps,
            W=weight.numel(),
            CHUNK=tuned["chunk"],
            STAGES=tuned["stages"],
            EMBED=embed,
            **settings,
        )
    return dx, partials.sum(1)


def _narrowest(largest: int) -> torch.dtype:
    """Return the narrowest signed dtype that holds ``largest``."""
    return next(t for t in (torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(t).max)


def _table_gradient(
    dout: Tensor,
    table: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    starts: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the table and of (w, λ), summed over tokens sorted by id, in a fixed order."""
    (vocabulary, width), count, gate, accumulate = table.shape, input_ids.numel(), weight.numel(), accumulator(table)
    gradient, sigmas = table.new_empty(vocabulary, width), table.new_empty(vocabulary, dtype=accumulate)
    # A radix sort takes one pass for every 8 bits of its keys, so narrow keys sort faster.
    keys = torch.empty(count, dtype=_narrowest(vocabulary - 1), device=table.device)
    codes = torch.empty_like(keys, dtype=_narrowest(max(vocabulary, count, 2**15)))
    tuned, settings = _settings("table_gradient", table)
    # Where a program has several warps, each of them holds the whole list of tokens: keep the list to 32.
    chunk = tuned["chunk"] if settings["num_warps"] == 1 else min(tuned["chunk"], 32)
    chunks = -(-count // chunk)
    pieces = table.new_empty(chunks, 2, width, dtype=accumulate)
    partials, sums = (table.new_empty(gate + 1, *more, dtype=accumulate) for more in ((chunks,), ()))
    table, weight, dout = table.contiguous(), weight.contiguous(), dout.contiguous()
    settings |= dict(W=gate, GATE=1 << (gate - 1).bit_length())
    rows, tokens = max(1, 4096 // settings["BLOCK"]), 128
    with torch.cuda.device_of(table):
        _prepare_kernel[(max(-(-vocabulary // rows), -(-count // tokens)),)](
            input_ids.contiguous(),
            table,
            weight,
            keys,
            codes,
            sigmas,
            gradient,
            count,
            input_ids.size(1),
            vocabulary,
            bos_id,
            _bytes(starts),
            ROWS=rows,
            TOKENS=tokens,
            **settings | dict(num_warps=4),
        )
        keys, order = torch.sort(keys, stable=True)
        _table_gradient_kernel[(chunks,)](
            dout,
            table,
            codes,
            sigmas,
            keys,
            order,
            weight,
            lam,
            gradient,
            pieces,
            partials,
            count,
            EPS=eps,
            CHUNK=chunk,
            LIST=1 << (chunk - 1).bit_length(),
            STAGES=tuned["stages"],
            **settings,
        )
        block = min(tuned["block"], settings["BLOCK"])
        _join_segments_kernel[(chunks, -(-width // block))](
            keys,
            gradient,
            pieces,
            partials,
            sums,
            count,
            D=width,
            W=gate,
            BLOCK=block,
            CHUNK=chunk,
            ROWS=tuned["rows"],
            SUMMANDS=1024,
            ACC=settings["ACC"],
            num_warps=tuned["join_warps"],
        )
    return gradient, sums


def _smear_gate(
    x: Tensor, input_ids: Tensor, weight: Tensor, lam: Tensor, bos_id: int | None, starts: Tensor | None
) -> Tensor:
    return _forward(x, input_ids, weight, lam, bos_id, starts)


def _smear_gate_backward(
    dout: Tensor, x: Tensor, input_ids: Tensor, weight: Tensor, lam: Tensor, bos_id: int | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _backward(dout, x, input_ids, weight, lam, bos_id, starts)


def _embed_smear_norm(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    eps: float,
    deterministic: bool,
    starts: Tensor | None,
) -> Tensor:
    return _forward(table, input_ids, weight, lam, bos_id, starts, eps=eps, embed=True)


def _embed_smear_norm_backward(
    dout: Tensor,
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    eps: float,
    deterministic: bool,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if deterministic and dout.numel():
        return _table_gradient(dout, table, input_ids, weight, lam, bos_id, starts, eps)
    gradient, sums = _backward(dout, table, input_ids, weight, lam, bos_id, starts, eps=eps, embed=True)
    return gradient.to(table.dtype), sums


def _gate_gradients(sums: Tensor, weight: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    return sums[:-1].reshape(weight.shape).to(weight.dtype), sums[-1].reshape(lam.shape).to(lam.dtype)


def _fake_sums(source: Tensor, weight: Tensor) -> Tensor:
    return source.new_empty(weight.numel() + 1, dtype=accumulator(source))


_smear_gate_backward_op = operator(
    "smear_gate_backward(Tensor dout, Tensor x, Tensor input_ids, Tensor weight, Tensor lam, int? bos_id, "
    "Tensor? starts) -> (Tensor, Tensor)",
    _smear_gate_backward,
    lambda dout, x, input_ids, weight, lam, bos_id, starts: (x.new_empty(x.shape), _fake_sums(x, weight)),
)
_embed_smear_norm_backward_op = operator(
    "embed_smear_norm_backward(Tensor dout, Tensor input_ids, Tensor table, Tensor weight, Tensor lam, int? bos_id, "
    "float eps, bool deterministic, Tensor? starts) -> (Tensor, Tensor)",
    _embed_smear_norm_backward,
    lambda dout, input_ids, table, weight, lam, bos_id, eps, deterministic, starts: (
        table.new_empty(table.shape),
        _fake_sums(table, weight),
    ),
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Save the arguments of either operator: four tensors, then numbers, then the starts."""
    ctx.save_for_backward(*inputs[:4], inputs[-1])
    ctx.numbers = inputs[4:-1]


@once_differentiable
def _smear_gate_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, input_ids, weight, lam, starts = ctx.saved_tensors
    dx, sums = _smear_gate_backward_op(dout, x, input_ids, weight, lam, *ctx.numbers, starts)
    return dx, None, *_gate_gradients(sums, weight, lam), None, None


@once_differentiable
def _embed_smear_norm_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    input_ids, table, weight, lam, starts = ctx.saved_tensors
    dtable, sums = _embed_smear_norm_backward_op(dout, input_ids, table, weight, lam, *ctx.numbers, starts)
    return None, dtable, *_gate_gradients(sums, weight, lam), *(None,) * 4


_smear_gate_op = operator(
    "smear_gate(Tensor x, Tensor input_ids, Tensor weight, Tensor lam, int? bos_id, Tensor? starts) -> Tensor",
    _smear_gate,
    lambda x, input_ids, weight, lam, bos_id, starts: x.new_empty(x.shape),
    setup_context=_save,
    backward=_smear_gate_gradients,
)
_embed_smear_norm_op = operator(
    "embed_smear_norm(Tensor input_ids, Tensor table, Tensor weight, Tensor lam, int? bos_id, float eps, "
    "bool deterministic, Tensor? starts) -> Tensor",
    _embed_smear_norm,
    lambda input_ids, table, weight, lam, bos_id, eps, deterministic, starts: table.new_empty(
        *input_ids.shape, table.size(1)
    ),
    setup_context=_save,
    backward=_embed_smear_norm_gradients,
)


def smear_gate_triton(
    x: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None = 1,
    *,
    starts: Tensor | None = None,
) -> Tensor:
    """Compute `smear_gate` with kernels."""
    return _smear_gate_op(x, input_ids, weight, lam, bos_id, starts)


def embed_smear_norm_triton(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    eps: float,
    *,
    deterministic: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    """Compute `embed_smear_norm` with kernels."""
    return _embed_smear_norm_op(input_ids, table, weight, lam, bos_id, eps, deterministic, starts)
