"""The kernels of `residual` and their launches; formulas and shapes are there.

A program, one warp at d = 512, walks a chunk of consecutive rows with the next ones on their way. Whoever sums
gradients of parameters keeps the columns' sums in registers, leaves them as one part; `partial_sums` adds the parts.
A pointer that is None leaves what belongs to it out of the compiled kernel.
"""

from __future__ import annotations

import torch

from .common.compiling import jit, tl
from .common.launch import launch_parameters, multiprocessors
from .common.partial_sums import partial_sums

Tensor = torch.Tensor


@jit
def _columns(D: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    return columns, (columns < D) | (D == BLOCK)


@jit
def _load(pointer, offsets, inside, ACC: tl.constexpr):
    return tl.load(pointer + offsets, mask=inside, other=0).to(ACC)


@jit
def _store(pointer, offsets, inside, value):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=inside)


@jit
def _vector(pointer, columns, inside, ACC: tl.constexpr):
    """A parameter of the columns, or 0 where there is none."""
    return _load(pointer, columns, inside, ACC) if pointer is not None else 0.0


@jit
def _gate(pointer, columns, inside, ACC: tl.constexpr):
    return tl.sigmoid(_load(pointer, columns, inside, ACC)) if pointer is not None else 0.0


@jit
def _scalar(pointer, ACC: tl.constexpr):
    return tl.load(pointer).to(ACC) if pointer is not None else 1.0


@jit
def _join(value, skipped, w, sigma, GATED: tl.constexpr):
    scaled = w * skipped
    return scaled + sigma * (value - scaled) if GATED else value + scaled


@jit
def _join_gradient(g, value, skipped, w, sigma, GATED: tl.constexpr):
    """Gradients of value and skipped, and a row's part in those of weight, over 1 - σ, and gate, over σ (1 - σ)."""
    kept = sigma * g if GATED else g
    passed = (g - kept) * w if GATED else g * w
    return kept, passed, g * skipped, g * (value - w * skipped) if GATED else 0.0


@jit
def _norm(value, EPS: tl.constexpr, D: tl.constexpr):
    return tl.rsqrt(tl.sum(value * value) / D + EPS)


@jit
def _norm_gradient(dy, normed, inverse, D: tl.constexpr):
    return inverse * (dy - (tl.sum(dy * normed) / D) * normed)


@jit
def _store_sums(
    partials,
    first,
    second,
    dweight,
    dgate,
    sigma,
    columns,
    inside,
    D: tl.constexpr,
    MIX: tl.constexpr,
    JOIN: tl.constexpr,
    GATED: tl.constexpr,
):
    """This program's parts of the gradients of mix, weight and gate; returns where the next may lie."""
    if MIX:
        tl.store(partials + columns, first, mask=inside)
        tl.store(partials + D + columns, second, mask=inside)
        partials += 2 * D
    if JOIN:
        if GATED:
            tl.store(partials + columns, dweight * (1 - sigma), mask=inside)
            tl.store(partials + D + columns, dgate * sigma * (1 - sigma), mask=inside)
            partials += 2 * D
        else:
            tl.store(partials + columns, dweight, mask=inside)
            partials += D
    return partials


@jit(do_not_specialize=("rows", "chunk"))
def _residual_kernel(
    x,
    x0,
    mix,
    skip,
    weight,
    gate,
    scale,
    joined,
    u,
    n,
    n1,
    rstd,
    rows,
    chunk,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """joined = join(x, skip); u = mix[0] joined + mix[1] x0, without mix their mean; n = scale u rstd(u), n1 = scale x
    rstd(x)."""
    columns, inside = _columns(D, BLOCK)
    w, sigma = _vector(weight, columns, inside, ACC), _gate(gate, columns, inside, ACC)
    first, second, factor = 0.5, 0.5, _scalar(scale, ACC)
    if mix is not None:
        first, second = _load(mix, columns, inside, ACC), _load(mix + D, columns, inside, ACC)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        value = _load(x, offsets, inside, ACC)
        if n1 is not None:
            _store(n1, offsets, inside, value * (_norm(value, EPS, D) * factor))
        if skip is not None:
            value = _join(value, _load(skip, offsets, inside, ACC), w, sigma, gate is not None)
            if joined is not None:
                _store(joined, offsets, inside, value)
        if x0 is not None:
            value = first * value + second * _load(x0, offsets, inside, ACC)
            if u is not None:
                _store(u, offsets, inside, value)
        if n is not None:
            inverse = _norm(value, EPS, D)
            _store(n, offsets, inside, value * (inverse * factor))
            if rstd is not None:
                tl.store(rstd + base + i, inverse)


@jit(do_not_specialize=("rows", "chunk"))
def _residual_backward_kernel(
    djoined,
    du,
    dn,
    dn1,
    dx_next,
    dx0_next,
    x,
    x0,
    mix,
    skip,
    weight,
    gate,
    scale,
    rstd,
    dx,
    dx0,
    dskip,
    partials,
    rows,
    chunk,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    HALF: tl.constexpr,
    X0_IS_X: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of `_residual_kernel`. With rstd, x is n. dx_next is added to dx, and dx0_next to dx0.

    With ``X0_IS_X`` the gradient of x0 is added to that of x, and so is that of a skip which has no place of its own.
    """
    columns, inside = _columns(D, BLOCK)
    zeros = tl.zeros((BLOCK,), ACC)
    w, sigma, factor = _vector(weight, columns, inside, ACC), _gate(gate, columns, inside, ACC), _scalar(scale, ACC)
    weight_sum, gate_sum, first_sum, second_sum = zeros, zeros, zeros, zeros
    if mix is not None:
        first, second = _load(mix, columns, inside, ACC), _load(mix + D, columns, inside, ACC)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        value = _load(x, offsets, inside, ACC)
        joined = value
        if skip is not None:
            skipped = _load(skip, offsets, inside, ACC)
            joined = _join(value, skipped, w, sigma, gate is not None)
        u = joined
        if mix is not None:
            other = _load(x0, offsets, inside, ACC)
            u = first * joined + second * other
        g = _load(du, offsets, inside, ACC) if du is not None else zeros
        if dn is not None:
            if rstd is not None:
                inverse = tl.load(rstd + base + i)
                normed = u if scale is None else u * tl.where(factor == 0, 0, 1 / factor)
            else:
                inverse = _norm(u, EPS, D)
                normed = u * inverse
            g += _norm_gradient(_load(dn, offsets, inside, ACC), normed, factor * inverse, D)
        if mix is not None:
            if partials is not None:
                first_sum += g * joined
                second_sum += g * other
            if X0_IS_X or dx0 is not None:
                result = second * g
                if dx0_next is not None:
                    result += _load(dx0_next, offsets, inside, ACC)
                if dx0 is not None:
                    _store(dx0, offsets, inside, result)
            g *= first
        if djoined is not None:
            g += _load(djoined, offsets, inside, ACC)
        if skip is not None:
            g, passed, part, gate_part = _join_gradient(g, value, skipped, w, sigma, gate is not None)
            if partials is not None:
                weight_sum += part
                gate_sum += gate_part
            if dskip is not None:
                _store(dskip, offsets, inside, passed)
            else:
                g += passed
        if dn1 is not None:
            inverse = _norm(value, EPS, D)
            g += _norm_gradient(_load(dn1, offsets, inside, ACC), value * inverse, factor * inverse, D)
        if dx_next is not None:
            g += _load(dx_next, offsets, inside, ACC)
        if X0_IS_X:
            g += result
        if dx is not None:
            _store(dx, offsets, inside, 0.5 * g if HALF else g)
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * WIDTH
        _store_sums(
            partials,
            first_sum,
            second_sum,
            weight_sum,
            gate_sum,
            sigma,
            columns,
            inside,
            D,
            mix is not None,
            skip is not None,
            gate is not None,
        )


@jit
def _lane_scalars(post, resid, ACC: tl.constexpr):
    return (
        tl.load(resid).to(ACC),
        tl.load(resid + 1).to(ACC),
        tl.load(post).to(ACC),
        tl.load(post + 1).to(ACC),
        tl.load(post + 2).to(ACC),
        tl.load(post + 3).to(ACC),
    )


@jit(do_not_specialize=("rows", "chunk"))
def _lanes_kernel(
    x0,
    lane0,
    lane1,
    attention,
    mlp,
    post,
    resid,
    mix,
    skip,
    weight,
    gate,
    scale,
    out0,
    out1,
    n0,
    n1,
    rows,
    chunk,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Both lanes after a layer; without out0 n0 is the norm of their mean, with mix n0 and n1 are the next layer's."""
    columns, inside = _columns(D, BLOCK)
    r0, r1, a0, a1, m0, m1 = _lane_scalars(post, resid, ACC)
    w, sigma, factor = _vector(weight, columns, inside, ACC), _gate(gate, columns, inside, ACC), _scalar(scale, ACC)
    if mix is not None:
        first, second = _load(mix, columns, inside, ACC), _load(mix + D, columns, inside, ACC)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        a, m = _load(attention, offsets, inside, ACC), _load(mlp, offsets, inside, ACC)
        value0 = r0 * _load(lane0, offsets, inside, ACC) + (a0 * a + m0 * m)
        value1 = r1 * _load(lane1, offsets, inside, ACC) + (a1 * a + m1 * m)
        if out0 is not None:
            if skip is not None:
                value0 = _join(value0, _load(skip, offsets, inside, ACC), w, sigma, gate is not None)
            _store(out0, offsets, inside, value0)
            _store(out1, offsets, inside, value1)
            if mix is not None:
                _store(n1, offsets, inside, value1 * (_norm(value1, EPS, D) * factor))
                u = first * value0 + second * _load(x0, offsets, inside, ACC)
                _store(n0, offsets, inside, u * (_norm(u, EPS, D) * factor))
        else:
            u = 0.5 * (value0 + value1)
            _store(n0, offsets, inside, u * (_norm(u, EPS, D) * factor))


@jit
def _thread_sum(values, BLOCK: tl.constexpr):
    """Sums of eight neighbours, which one thread has."""
    GROUP: tl.constexpr = 8 if BLOCK > 8 else BLOCK
    return tl.sum(tl.reshape(values, (BLOCK // GROUP, GROUP)), 1)


@jit(do_not_specialize=("rows", "chunk"))
def _lanes_backward_kernel(
    dx0_next,
    dout0,
    dout1,
    dn0,
    dn1,
    x0,
    lane0,
    lane1,
    attention,
    mlp,
    post,
    resid,
    mix,
    skip,
    weight,
    gate,
    scale,
    dx0,
    dlane0,
    dlane1,
    dattention,
    dmlp,
    dskip,
    partials,
    rows,
    chunk,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    WIDTH: tl.constexpr,
):
    columns, inside = _columns(D, BLOCK)
    zeros = tl.zeros((BLOCK,), ACC)
    r0, r1, a0, a1, m0, m1 = _lane_scalars(post, resid, ACC)
    w, sigma, factor = _vector(weight, columns, inside, ACC), _gate(gate, columns, inside, ACC), _scalar(scale, ACC)
    weight_sum, gate_sum, first_sum, second_sum = zeros, zeros, zeros, zeros
    if mix is not None:
        first, second = _load(mix, columns, inside, ACC), _load(mix + D, columns, inside, ACC)
    nothing = _thread_sum(zeros, BLOCK)
    r0_sum, r1_sum, a0_sum, a1_sum, m0_sum, m1_sum = nothing, nothing, nothing, nothing, nothing, nothing
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        a, m = _load(attention, offsets, inside, ACC), _load(mlp, offsets, inside, ACC)
        l0, l1 = _load(lane0, offsets, inside, ACC), _load(lane1, offsets, inside, ACC)
        value0 = r0 * l0 + (a0 * a + m0 * m)
        value1 = r1 * l1 + (a1 * a + m1 * m)
        if dout0 is not None:
            g0, g1 = _load(dout0, offsets, inside, ACC), _load(dout1, offsets, inside, ACC)
            joined = value0
            if skip is not None:
                skipped = _load(skip, offsets, inside, ACC)
                joined = _join(value0, skipped, w, sigma, gate is not None)
            if mix is not None:
                inverse = _norm(value1, EPS, D)
                g1 += _norm_gradient(_load(dn1, offsets, inside, ACC), value1 * inverse, factor * inverse, D)
                other = _load(x0, offsets, inside, ACC)
                u = first * joined + second * other
                inverse = _norm(u, EPS, D)
                du = _norm_gradient(_load(dn0, offsets, inside, ACC), u * inverse, factor * inverse, D)
                if partials is not None:
                    first_sum += du * joined
                    second_sum += du * other
                if dx0 is not None:
                    result = second * du
                    if dx0_next is not None:
                        result += _load(dx0_next, offsets, inside, ACC)
                    _store(dx0, offsets, inside, result)
                g0 += first * du
            if skip is not None:
                g0, passed, part, gate_part = _join_gradient(g0, value0, skipped, w, sigma, gate is not None)
                if partials is not None:
                    weight_sum += part
                    gate_sum += gate_part
                _store(dskip, offsets, inside, passed)
        else:
            u = 0.5 * (value0 + value1)
            inverse = _norm(u, EPS, D)
            dn = _load(dn0, offsets, inside, ACC)
            g0 = 0.5 * _norm_gradient(dn, u * inverse, factor * inverse, D)
            g1 = g0
        _store(dlane0, offsets, inside, r0 * g0)
        _store(dlane1, offsets, inside, r1 * g1)
        _store(dattention, offsets, inside, a0 * g0 + a1 * g1)
        _store(dmlp, offsets, inside, m0 * g0 + m1 * g1)
        if partials is not None:
            r0_sum += _thread_sum(g0 * l0, BLOCK)
            r1_sum += _thread_sum(g1 * l1, BLOCK)
            a0_sum += _thread_sum(g0 * a, BLOCK)
            a1_sum += _thread_sum(g1 * a, BLOCK)
            m0_sum += _thread_sum(g0 * m, BLOCK)
            m1_sum += _thread_sum(g1 * m, BLOCK)
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * WIDTH
        scalars = _store_sums(
            partials,
            first_sum,
            second_sum,
            weight_sum,
            gate_sum,
            sigma,
            columns,
            inside,
            D,
            mix is not None,
            skip is not None,
            gate is not None,
        )
        tl.store(scalars, tl.sum(r0_sum))
        tl.store(scalars + 1, tl.sum(r1_sum))
        tl.store(scalars + 2, tl.sum(a0_sum))
        tl.store(scalars + 3, tl.sum(a1_sum))
        tl.store(scalars + 4, tl.sum(m0_sum))
        tl.store(scalars + 5, tl.sum(m1_sum))


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype kernels compute in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _accumulates(tensor: Tensor) -> dict:
    """The same for a kernel."""
    return dict(ACC=tl.float64 if tensor.dtype == torch.float64 else tl.float32)


def _plan(case: str, x: Tensor) -> tuple[tuple[int], tuple[int, int], dict]:
    """Grid, (rows, rows of a program) and the constants of a launch over the rows of x."""
    tuned, width = launch_parameters("residual", case, x.device), x.size(-1)
    rows, block = x.numel() // width, 1 << (width - 1).bit_length()
    chunk = tuned["chunk"]
    if "programs" in tuned:  # those that leave sums: so many on each multiprocessor
        chunk = max(chunk, -(-rows // (tuned["programs"] * multiprocessors(x.device))))
    settings = dict(
        D=width,
        BLOCK=block,
        STAGES=tuned["stages"],
        num_warps=min(32, max(1, block // tuned["columns_per_warp"])),
        **_accumulates(x),
    )
    return (-(-rows // chunk),), (rows, chunk), settings


def _case(mix: Tensor | None, skip: Tensor | None, direction: str) -> str:
    return "join_" * (skip is not None) + "mix_" * (mix is not None) + direction


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _like(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else 0)


def _pointer(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _added(partials: Tensor | None, x: Tensor) -> Tensor:
    """Add the parts up; without any there are no sums."""
    return x.new_empty(0, dtype=accumulator(x)) if partials is None else partial_sums(partials)


def mix_forward(
    x: Tensor,
    x0: Tensor | None,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
    *keep: bool,
) -> tuple[Tensor, ...]:
    """(joined, u, n, n1), of which those not kept are empty."""
    outputs = [_like(x, kept) for kept in keep]
    if x.numel():
        grid, extent, settings = _plan(_case(mix, skip, "forward"), x)
        inputs = _contiguous(x, x0, mix, skip, weight, gate, scale)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _residual_kernel[grid](*inputs, *map(_pointer, outputs), None, *extent, EPS=eps, **settings)
    return tuple(outputs)


def mix_sums(x: Tensor, mix: Tensor | None, skip: Tensor | None, gate: Tensor | None) -> int:
    """Length of `mix_backward`'s sums."""
    return (2 * (mix is not None) + (skip is not None) + (gate is not None)) * x.size(-1)


def mix_backward(
    djoined: Tensor | None,
    du: Tensor | None,
    dn: Tensor | None,
    dn1: Tensor | None,
    dx_next: Tensor | None,
    dx0_next: Tensor | None,
    x: Tensor,
    x0: Tensor | None,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
    x0_is_x: bool = False,
    skip_is_x: bool = False,
    need_x: bool = True,
    need_x0: bool = True,
    need_parameters: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x0 and skip, and the flat sums, those of mix, weight and gate where there are any.

    That of a tensor which is x is empty and part of x's. What is not needed is empty, too.
    """
    width = mix_sums(x, mix, skip, gate) * need_parameters
    own = need_x, need_x0 and x0 is not None and not x0_is_x, skip is not None and not skip_is_x
    outputs = [_like(x, wanted) for wanted in own]
    if not x.numel():
        return *outputs, x.new_zeros(width, dtype=accumulator(x))
    grid, extent, settings = _plan(_case(mix, skip, "backward"), x)
    partials = x.new_empty(*grid, width, dtype=accumulator(x)) if need_parameters else None
    inputs = _contiguous(djoined, du, dn, dn1, dx_next, dx0_next, x, x0, mix, skip, weight, gate, scale)
    with torch.cuda.device_of(x):
        _residual_backward_kernel[grid](
            *inputs,
            None,
            *map(_pointer, outputs),
            partials,
            *extent,
            EPS=eps,
            HALF=False,
            X0_IS_X=x0_is_x,
            WIDTH=width,
            **settings,
        )
    return *outputs, _added(partials, x)


def norm_forward(x: Tensor, other: Tensor | None, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """scale rms_norm(x) or of the mean of x and other; and a row's factor 1 / sqrt(mean(x²) + eps)."""
    n, rstd = _like(x, True), x.new_empty(x.shape[:-1], dtype=accumulator(x))
    if x.numel():
        grid, extent, settings = _plan("norm_forward", x)
        x, other = _contiguous(x, other)
        with torch.cuda.device_of(x):
            _residual_kernel[grid](
                x, other, None, None, None, None, scale, None, None, n, None, rstd, *extent, EPS=eps, **settings
            )
    return n, rstd


def norm_backward(
    dx_next: Tensor | None, dn: Tensor, n: Tensor, rstd: Tensor, scale: Tensor | None, mean: bool
) -> Tensor:
    """dx_next and the gradient through the norm; with ``mean`` half of it, for either of the two inputs."""
    dx = _like(n, True)
    if n.numel():
        grid, extent, settings = _plan("norm_backward", n)
        dx_next, dn, n, rstd = _contiguous(dx_next, dn, n, rstd)
        with torch.cuda.device_of(n):
            _residual_backward_kernel[grid](
                None,
                dx_next,
                dn,
                None,
                None,
                None,
                n,
                None,
                None,
                None,
                None,
                None,
                scale,
                rstd,
                dx,
                None,
                None,
                None,
                *extent,
                EPS=0.0,
                HALF=mean,
                X0_IS_X=False,
                WIDTH=0,
                **settings,
            )
    return dx


def _lanes_case(mix: Tensor | None, mean: bool, direction: str) -> str:
    return f"lanes_{'mean_' * mean}{'norm_' * (mix is not None)}{direction}"


def lanes_forward(
    x0: Tensor | None,
    lane0: Tensor,
    lane1: Tensor,
    attention: Tensor,
    mlp: Tensor,
    post: Tensor,
    resid: Tensor,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lane 0, lane 1, n0, n1); n0 and n1 are empty without mix; with ``mean`` n0 alone is kept."""
    norm = mix is not None
    outputs = [_like(lane0, wanted) for wanted in (not mean, not mean, norm or mean, norm)]
    if lane0.numel():
        grid, extent, settings = _plan(_lanes_case(mix, mean, "forward"), lane0)
        inputs = _contiguous(x0, lane0, lane1, attention, mlp, post, resid, mix, skip, weight, gate, scale)
        with torch.cuda.device_of(lane0):
            _lanes_kernel[grid](*inputs, *map(_pointer, outputs), *extent, EPS=eps, **settings)
    return tuple(outputs)


def lanes_backward(
    dx0_next: Tensor | None,
    dout0: Tensor | None,
    dout1: Tensor | None,
    dn0: Tensor | None,
    dn1: Tensor | None,
    x0: Tensor | None,
    lane0: Tensor,
    lane1: Tensor,
    attention: Tensor,
    mlp: Tensor,
    post: Tensor,
    resid: Tensor,
    mix: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
    need_x0: bool = True,
    need_parameters: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of x0, lane0, lane1, attention, mlp, skip; then, flat, of mix, weight, gate, resid and post.

    Without dout0, of the norm of the lanes' mean. What is not needed is empty.
    """
    width = lanes_sums(lane0, mix, skip, gate) * need_parameters
    own = need_x0 and mix is not None, True, True, True, True, skip is not None
    outputs = [_like(lane0, wanted) for wanted in own]
    if not lane0.numel():
        return *outputs, lane0.new_zeros(width, dtype=accumulator(lane0))
    grid, extent, settings = _plan(_lanes_case(mix, dout0 is None, "backward"), lane0)
    partials = lane0.new_empty(*grid, width, dtype=accumulator(lane0)) if need_parameters else None
    inputs = (dx0_next, dout0, dout1, dn0, dn1, x0, lane0, lane1, attention, mlp, post, resid)
    inputs = _contiguous(*inputs, mix, skip, weight, gate, scale)
    with torch.cuda.device_of(lane0):
        _lanes_backward_kernel[grid](
            *inputs, *map(_pointer, outputs), partials, *extent, EPS=eps, WIDTH=width, **settings
        )
    return *outputs, _added(partials, lane0)


def lanes_sums(lane0: Tensor, mix: Tensor | None, skip: Tensor | None, gate: Tensor | None) -> int:
    """Length of `lanes_backward`'s sums."""
    return mix_sums(lane0, mix, skip, gate) + 6
