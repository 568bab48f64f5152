"""SmearGate: add the gated previous token's embedding to each token's, and the model's fused prologue.

    g_t = λ σ(w · x_t[:W])  for t >= 1, and 0 where token t is a BOS (a document's first token) or starts[t] is set
    y_t = x_t + g_t x_{t-1},   y_0 = x_0

The previous embedding enters un-smeared. BOS and starts select: a NaN or an infinity on one side of such a token does
not reach the other, neither forward nor backward. ``starts`` marks where the sequences of a packed stream begin: a row
with it is what its sequences are as rows of their own. Without the BOS mask (``bos_id=None``, the public code of
parameter-golf PR #1874) the last token of one document leaks into the first of the next. `embed_smear_norm` is
embedding lookup, SmearGate and RMSNorm in one call.

Kernels: a program of one warp (at D = 512) walks a chunk of consecutive tokens, keeps the neighbour's vector in
registers and has the next ones on their way, so each is read once: the forward is one pass over x and y, the
prologue's writes its output and finds the table in the L2 cache. Nothing is saved for backward but the inputs: it
walks from the last token to the first and recomputes gates and norms; with s_t = <dy_t, x_{t-1}>

    dx_t = dy_t + g_{t+1} dy_{t+1} + λ σ'_t s_t w,   dw = Σ λ σ'_t s_t x_t[:W],   dλ = Σ σ_t s_t

in one pass over x, dy and dx. The prologue's, without atomics, walks the tokens sorted by id and makes each one's
gradient from dy_t, dy_{t+1} and three rows of the table: dy is read twice, and no gradient by token is written and
read again. Chunks of the list are summed, and segments that cross chunks are joined in a fixed order.

Shapes: x [B, T, D]; input_ids [B, T] int32 or int64; starts [B, T] bool; weight [1, W] or [W] with W <= D; lam [1] or
scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import RMS_EPS
from .common.backend import select
from .common.compiling import jit, tl
from .common.launch import launch_parameters
from .common.operators import operator, readable

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def smear_gate_reference(
    x: Tensor, input_ids: Tensor, weight: Tensor, lam: Tensor, bos_id: int | None = 1, starts: Tensor | None = None
) -> Tensor:
    """Plain PyTorch; the contract of `smear_gate`, whose arguments it shares."""
    current, previous = x[:, 1:], x[:, :-1]
    gate = torch.sigmoid(F.linear(current[..., : weight.numel()], weight.reshape(1, -1).to(x.dtype)))
    gate = lam.to(x.dtype) * gate
    for first in (None if bos_id is None else input_ids == bos_id, starts):
        if first is not None:  # of both factors: the backward, too, multiplies no 0 with what is not finite
            gate, previous = (torch.where(first[:, 1:, None], 0, factor) for factor in (gate, previous))
    return torch.cat([x[:, :1], current + gate * previous], dim=1)


def embed_smear_norm_reference(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None = 1,
    eps: float = RMS_EPS,
    deterministic: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; the contract of `embed_smear_norm`, whose arguments it shares."""
    last = max(len(table) - 1, 0)
    x = F.embedding(input_ids.clamp(0, last), table)
    x = F.rms_norm(smear_gate_reference(x, input_ids, weight, lam, bos_id, starts), x.shape[-1:], eps=eps)
    return torch.where(((input_ids < 0) | (input_ids > last))[..., None], float("nan"), x)


@jit
def _span(T, chunks, CHUNK: tl.constexpr):
    """This program's chunk: index of its row's first token (int64), first and last + 1 token in the row."""
    program = tl.program_id(0)
    start = program % chunks * CHUNK
    return (program // chunks).to(tl.int64) * T, start, tl.minimum(start + CHUNK, T)


@jit
def _row(x, ids, token, columns, inside, V, D: tl.constexpr, EMBED: tl.constexpr):
    """Row ``token`` of x, or with EMBED of the table x by the token's id, forced into the table."""
    row = token
    if EMBED:
        row = tl.minimum(tl.maximum(tl.load(ids + token).to(tl.int64), 0), V - 1)
    return tl.load(x + row * D + columns, mask=inside, other=0)


@jit
def _gated(gated, ids, starts, token, bos_id):
    """``gated``, and the token is neither a BOS nor the start of a sequence."""
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
        y = current + gate * tl.where(gate == 0, 0, previous)  # asking the gate takes fewer registers
        if EMBED:
            scale = tl.rsqrt(tl.sum(y * y) / D + EPS)
            identity = tl.load(ids + token)
            y *= tl.where((identity < 0) | (identity >= V), float("nan"), scale)
        # With EMBED the table should stay in the cache, so what is written goes first.
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
    # The walk starts one token behind the chunk, whose gradient the chunk's last token needs and no one stores here.
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
        scale = 1.0  # of the gradient dy, left out of it
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
    """What `_table_gradient_kernel` looks up, and a gradient of zeros for the ids that no token has.

    keys are the tokens' ids, forced into the table; codes the same, with ~id for tokens without a gate (a BOS, a start,
    or first in their row); sigmas [V] the ids' gates without λ.
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
    """The chosen one of integers, or of floats; a sum of one warp's integers is one instruction."""
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
    """The table's gradient from one chunk of the tokens sorted by id, summed over runs of equal ids (segments).

    Whole segments go into ``gradient``; piece [chunk, 0] ends a segment of earlier chunks or continues it, [chunk, 1]
    begins one. Along a segment the token's own embedding x and gate stay the same. Token t takes from its own norm
    r (dy - r² <dy, y> y / D), and of the next token's, which has it as the previous one, g times that.
    """
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    columns, gate_columns = tl.arange(0, BLOCK), tl.arange(0, GATE)
    inside = columns < D
    strength = tl.load(lam).to(ACC)
    key = tl.load(keys + start)
    continued = (start > 0) & (tl.load(keys + tl.maximum(start - 1, 0)) == key)
    key = key.to(codes.dtype.element_ty)
    # What leads to the chunk's rows: all tokens' at once.
    offsets = tl.arange(0, LIST)
    count = tl.minimum(N - start, CHUNK).to(tl.int32)
    listed = offsets < count
    tokens = tl.load(order + start + offsets, mask=listed, other=0)
    own = tl.load(codes + tokens, mask=listed, other=-1)
    befores = tl.load(codes + tokens - 1, mask=listed & (tokens > 0), other=0)
    befores = tl.maximum(befores, -1 - befores)
    afters = tl.load(codes + tokens + 1, mask=listed & (tokens + 1 < N), other=-1)
    next_gates = strength * tl.load(sigmas + afters, mask=afters >= 0, other=0)
    tokens = tokens.to(codes.dtype.element_ty)
    tokens = tl.where(own >= 0, tokens, -1 - tokens)
    same = tl.load(keys + start + offsets, mask=listed, other=0)
    follows = start + offsets + 1 < N
    turns = tl.load(keys + start + offsets + 1, mask=listed & follows, other=0)
    turns = tl.where((turns != same) | (start + offsets + 1 == N), turns.to(codes.dtype.element_ty), -1)

    current = tl.load(table + key.to(tl.int64) * D + columns, mask=inside, other=0).to(ACC)
    sigma = tl.load(sigmas + key)
    total = tl.zeros((BLOCK,), ACC)
    s = tl.sum(total)  # Σ s_t of the segment
    dw = tl.zeros((GATE,), ACC)
    dlam = s
    for i in tl.range(count, num_stages=STAGES):
        chosen = offsets == i
        token = _pick(tokens, chosen)
        gated = token >= 0
        token = tl.maximum(token, -1 - token).to(tl.int64)
        before = _pick(befores, chosen).to(tl.int64)
        after = _pick(afters, chosen).to(tl.int64)
        goes_on = after >= 0
        previous = tl.load(table + before * D + columns, mask=inside & gated, other=0).to(ACC)
        dy = tl.load(dout + token * D + columns, mask=inside, other=0).to(ACC)
        following = tl.load(table + after * D + columns, mask=inside & goes_on, other=0).to(ACC)
        dz = tl.load(dout + (token + 1) * D + columns, mask=inside & goes_on, other=0).to(ACC)
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
        scale = tl.where(goes_on, gate * scale, 0)
        total += scale * dz
        total -= tl.where(goes_on, scale * slope, 0) * z
        turn = _pick(turns, chosen)
        if (turn >= 0) | (i + 1 == count):
            row = key.to(tl.int64) * D
            dlam += sigma * s
            slope = strength * sigma * (1 - sigma) * s
            dw += slope * tl.load(table + row + gate_columns, mask=gate_columns < W, other=0).to(ACC)
            total += slope * tl.load(weight + columns, mask=columns < W, other=0).to(ACC)
            if (turn >= 0) & (not continued):
                tl.store(gradient + row + columns, total.to(gradient.dtype.element_ty), mask=inside)
            else:
                piece = chunk * 2 + tl.where(continued, 0, 1)
                tl.store(pieces + piece * D + columns, total, mask=inside)
            total = tl.zeros((BLOCK,), ACC)
            s = tl.sum(total)
            continued = key != key
            key = tl.maximum(turn, 0)
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
    """The segment that begins in this chunk and goes on in the next ones, into the table; and sums of partials."""
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
        while more:  # the keys are a step ahead of the pieces
            mask = same[:, None] & inside[None, :]
            rows = tl.load(pieces + later[:, None] * (2 * D) + columns[None, :], mask=mask, other=0)
            more = tl.min(same.to(tl.int32)) == 1
            later += ROWS
            same = tl.load(keys + later * CHUNK, mask=later * CHUNK < N, other=-1) == key
            total += tl.sum(rows, 0)
        tl.store(gradient + key.to(tl.int64) * D + columns, total.to(gradient.dtype.element_ty), mask=inside)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _settings(case: str, source: Tensor) -> tuple[dict[str, int], dict]:
    """A case's launch parameters and what they and the width of ``source`` make of a launch's."""
    tuned = launch_parameters("smear_gate", case, source.device)
    block = 1 << (source.size(-1) - 1).bit_length()
    warps = min(32, max(1, block // tuned["columns_per_warp"]))
    accumulate = tl.float64 if _accumulator(source) == torch.float64 else tl.float32
    return tuned, dict(D=source.size(-1), BLOCK=block, ACC=accumulate, num_warps=warps)


def _bytes(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.uint8)


def _forward(source, input_ids, weight, lam, bos_id, eps, embed: bool, starts) -> Tensor:
    """Both forward ops: ``source`` is x, or with ``embed`` the table."""
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


def _backward(dout, source, input_ids, weight, lam, bos_id, eps, embed: bool, starts) -> tuple[Tensor, Tensor]:
    """Both backwards in the order of tokens: the gradient of x, or with ``embed`` the table's by atomics; (w, λ)'s."""
    rows, tokens = input_ids.shape
    dx = source.new_empty(dout.shape)
    if embed:
        dx = torch.zeros(source.shape, dtype=_accumulator(source), device=source.device)
    if not dout.numel():
        return dx, source.new_zeros(weight.numel() + 1, dtype=_accumulator(source))
    tuned, settings = _settings("prologue_backward" if embed else "backward", source)
    chunks = -(-tokens // tuned["chunk"])
    partials = source.new_empty(weight.numel() + 1, rows * chunks, dtype=_accumulator(source))
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
    return next(t for t in (torch.int16, torch.int32, torch.int64) if largest <= torch.iinfo(t).max)


def _table_gradient(dout, table, input_ids, weight, lam, bos_id, eps, starts) -> tuple[Tensor, Tensor]:
    """The prologue's backward in the order of ids: the gradients of the table and of (w, λ), in a fixed order."""
    (vocabulary, width), count, gate, accumulate = table.shape, input_ids.numel(), weight.numel(), _accumulator(table)
    gradient, sigmas = table.new_empty(vocabulary, width), table.new_empty(vocabulary, dtype=accumulate)
    # A radix sort takes a pass for every 8 bits of its keys.
    keys = torch.empty(count, dtype=_narrowest(vocabulary - 1), device=table.device)
    codes = torch.empty_like(keys, dtype=_narrowest(max(vocabulary, count, 2**15)))
    tuned, settings = _settings("table_gradient", table)
    # Lists of up to 32 tokens are in each of several warps.
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


def _smear_gate_triton(
    x: Tensor, input_ids: Tensor, weight: Tensor, lam: Tensor, bos_id: int | None, starts: Tensor | None = None
) -> Tensor:
    return _forward(x, input_ids, weight, lam, bos_id, 0.0, False, starts)


def _smear_gate_backward_triton(
    dout: Tensor,
    x: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _backward(dout, x, input_ids, weight, lam, bos_id, 0.0, False, starts)


def _embed_smear_norm_triton(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    eps: float,
    deterministic: bool,
    starts: Tensor | None = None,
) -> Tensor:
    return _forward(table, input_ids, weight, lam, bos_id, eps, True, starts)


def _embed_smear_norm_backward_triton(
    dout: Tensor,
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None,
    eps: float,
    deterministic: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if deterministic and dout.numel():
        return _table_gradient(dout, table, input_ids, weight, lam, bos_id, eps, starts)
    gradient, sums = _backward(dout, table, input_ids, weight, lam, bos_id, eps, True, starts)
    return gradient.to(table.dtype), sums


def _gate_gradients(sums: Tensor, weight: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    return sums[:-1].reshape(weight.shape).to(weight.dtype), sums[-1].reshape(lam.shape).to(lam.dtype)


def _fake_sums(source: Tensor, weight: Tensor) -> Tensor:
    return source.new_empty(weight.numel() + 1, dtype=_accumulator(source))


_smear_gate_backward_op = operator(
    "smear_gate_backward(Tensor dout, Tensor x, Tensor input_ids, Tensor weight, Tensor lam, int? bos_id, "
    "Tensor? starts) -> (Tensor, Tensor)",
    _smear_gate_backward_triton,
    lambda dout, x, input_ids, weight, lam, bos_id, starts: (x.new_empty(x.shape), _fake_sums(x, weight)),
)
_embed_smear_norm_backward_op = operator(
    "embed_smear_norm_backward(Tensor dout, Tensor input_ids, Tensor table, Tensor weight, Tensor lam, int? bos_id, "
    "float eps, bool deterministic, Tensor? starts) -> (Tensor, Tensor)",
    _embed_smear_norm_backward_triton,
    lambda dout, input_ids, table, weight, lam, bos_id, eps, deterministic, starts: (
        table.new_empty(table.shape),
        _fake_sums(table, weight),
    ),
)


def _save(ctx, inputs, output) -> None:
    """Both ops: four tensors, plain values, and the starts."""
    ctx.save_for_backward(*inputs[:4], inputs[-1])
    ctx.rest = inputs[4:-1]


@once_differentiable
def _smear_gate_gradients(ctx, dout: Tensor):
    x, input_ids, weight, lam, starts = ctx.saved_tensors
    dx, sums = _smear_gate_backward_op(dout, x, input_ids, weight, lam, *ctx.rest, starts)
    return dx, None, *_gate_gradients(sums, weight, lam), None, None


@once_differentiable
def _embed_smear_norm_gradients(ctx, dout: Tensor):
    input_ids, table, weight, lam, starts = ctx.saved_tensors
    dtable, sums = _embed_smear_norm_backward_op(dout, input_ids, table, weight, lam, *ctx.rest, starts)
    return None, dtable, *_gate_gradients(sums, weight, lam), *(None,) * 4


_SMEAR_GATE = {
    "reference": smear_gate_reference,
    "triton": operator(
        "smear_gate(Tensor x, Tensor input_ids, Tensor weight, Tensor lam, int? bos_id, Tensor? starts) -> Tensor",
        _smear_gate_triton,
        lambda x, input_ids, weight, lam, bos_id, starts: x.new_empty(x.shape),
        setup_context=_save,
        backward=_smear_gate_gradients,
    ),
}
_EMBED_SMEAR_NORM = {
    "reference": embed_smear_norm_reference,
    "triton": operator(
        "embed_smear_norm(Tensor input_ids, Tensor table, Tensor weight, Tensor lam, int? bos_id, float eps, "
        "bool deterministic, Tensor? starts) -> Tensor",
        _embed_smear_norm_triton,
        lambda input_ids, table, weight, lam, bos_id, eps, deterministic, starts: table.new_empty(
            *input_ids.shape, table.size(1)
        ),
        setup_context=_save,
        backward=_embed_smear_norm_gradients,
    ),
}


def _check(input_ids: Tensor, weight: Tensor, lam: Tensor, starts: Tensor | None, name: str, source: Tensor) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64, got {input_ids.dtype}")
    for argument, tensor in ((name, source), ("weight", weight), ("lam", lam)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{argument} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
    if starts is not None and starts.dtype != torch.bool:
        raise TypeError(f"starts must be bool, got {starts.dtype}")
    if starts is not None and starts.shape != input_ids.shape:
        raise ValueError(f"starts must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(starts.shape)}")
    for argument, tensor in (("input_ids", input_ids), ("weight", weight), ("lam", lam), ("starts", starts)):
        if tensor is not None and tensor.device != source.device:
            raise ValueError(f"{argument} must be on {name}'s device {source.device}, got {tensor.device}")
    if weight.numel() > source.size(-1):
        raise ValueError(f"weight has {weight.numel()} elements and may have at most the width {source.size(-1)}")
    if tuple(weight.shape[:-1]) not in ((), (1,)) or not weight.ndim:
        raise ValueError(f"weight must be [W] or [1, W], got shape {tuple(weight.shape)}")
    if lam.numel() != 1:
        raise ValueError(f"lam must be one element, got shape {tuple(lam.shape)}")


def smear_gate(
    x: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None = 1,
    *,
    starts: Tensor | None = None,
) -> Tensor:
    """SmearGate of ``x``; see the module's docstring for the formula and shapes.

    Differentiable once in x, weight and lam. ``bos_id=None`` leaves the document mask out. ``starts`` is True where a
    token begins a sequence: it has no predecessor, whatever its id; None costs nothing. x, weight and lam are
    bfloat16, float16, float32 or float64 each; kernels compute in fp32, or in fp64 for a float64 x.

    Returns [B, T, D] in x's dtype. Raises ValueError for a wrong shape or device, TypeError for a wrong dtype.
    """
    if x.ndim != 3 or x.shape[:2] != input_ids.shape:
        raise ValueError(f"x must be [B, T, D] over input_ids {tuple(input_ids.shape)}, got {tuple(x.shape)}")
    _check(input_ids, weight, lam, starts, "x", x)
    bos_id = bos_id if bos_id is None else int(bos_id)
    return select("smear_gate", _SMEAR_GATE, x)(x, input_ids, weight, lam, bos_id, starts)


def embed_smear_norm(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None = 1,
    eps: float = RMS_EPS,
    *,
    deterministic: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    """rms_norm(smear_gate(table[input_ids])) in one call: the model's prologue.

    table is [V, D]; the rest as in `smear_gate`. Differentiable once in table, weight and lam; the table's gradient is
    summed in fp32 (fp64 for a float64 table) and has the table's dtype. ``deterministic=False`` lets GPU kernels sum
    it with atomics, faster and in no fixed order.

    Returns [B, T, D] in the table's dtype. Raises ValueError for a wrong shape or device and for ids outside [0, V),
    TypeError for a wrong dtype. On a GPU reading the ids would wait for it: there and in compiled code a token with an
    id outside the table becomes a row of NaN, and what it adds to the gradients means nothing.
    """
    if table.ndim != 2 or (table.size(0) == 0 and input_ids.numel()):
        raise ValueError(f"table must be [V, D] with V >= 1, got shape {tuple(table.shape)}")
    _check(input_ids, weight, lam, starts, "table", table)
    if input_ids.numel() and readable(input_ids):
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= table.size(0):
            raise ValueError(f"input_ids must be in [0, {table.size(0)}), got {low if low < 0 else high}")
    bos_id = bos_id if bos_id is None else int(bos_id)
    chosen = select("embed_smear_norm", _EMBED_SMEAR_NORM, table)
    return chosen(input_ids, table, weight, lam, bos_id, eps, deterministic, starts)
