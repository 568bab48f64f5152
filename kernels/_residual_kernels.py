"""The kernels of `residual` and their launches; formulas and shapes are there.

A program, one warp at d = 512, walks a chunk of consecutive rows with the next ones on their way. Whoever sums
gradients of parameters keeps the columns' sums in registers, leaves them as one part and `torch.sum` adds the parts.
A pointer that is None leaves what belongs to it out of the compiled kernel.
"""

from __future__ import annotations

import torch

from ._launch import jit, launch_parameters, multiprocessors, tl

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


@jit(do_not_specialize=("rows", "chunk"))
def _forward_kernel(
    x, x0, mix, skip, weight, gate, scale, joined, u, n, rstd, rows, chunk, EPS: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """joined = join(x, skip); u = mix[0] joined + mix[1] x0, without mix their mean; n = scale u rstd(u)."""
    columns, inside = _columns(D, BLOCK)
    if skip is not None:
        w = _load(weight, columns, inside, ACC)
        if gate is not None:
            sigma = tl.sigmoid(_load(gate, columns, inside, ACC))
    first, second, factor = 0.5, 0.5, 1.0
    if mix is not None:
        first, second = _load(mix, columns, inside, ACC), _load(mix + D, columns, inside, ACC)
    if scale is not None:
        factor = tl.load(scale).to(ACC)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        value = _load(x, offsets, inside, ACC)
        if skip is not None:
            scaled = w * _load(skip, offsets, inside, ACC)
            if gate is not None:
                value = scaled + sigma * (value - scaled)
            else:
                value += scaled
            if joined is not None:
                _store(joined, offsets, inside, value)
        if x0 is not None:
            other = _load(x0, offsets, inside, ACC)
            value = first * value + second * other
            if u is not None:
                _store(u, offsets, inside, value)
        if n is not None:
            inverse = tl.rsqrt(tl.sum(value * value) / D + EPS)
            _store(n, offsets, inside, value * (inverse * factor))
            if rstd is not None:
                tl.store(rstd + base + i, inverse)


@jit(do_not_specialize=("rows", "chunk"))
def _backward_kernel(
    dx_next, du, dn, dx0_next, x, x0, mix, skip, weight, gate, scale, rstd, dx, dx0, dskip, partials, rows, chunk,
    EPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
    HALF: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Of `_forward_kernel`. With rstd, x is n. dx_next is joined's gradient, dx0_next is added to dx0."""
    columns, inside = _columns(D, BLOCK)
    if skip is not None:
        w = _load(weight, columns, inside, ACC)
        weight_sum = tl.zeros((BLOCK,), ACC)
        if gate is not None:
            sigma = tl.sigmoid(_load(gate, columns, inside, ACC))
            gate_sum = tl.zeros((BLOCK,), ACC)
    if mix is not None:
        first, second = _load(mix, columns, inside, ACC), _load(mix + D, columns, inside, ACC)
        first_sum = tl.zeros((BLOCK,), ACC)
        second_sum = tl.zeros((BLOCK,), ACC)
    factor, unscale = 1.0, 1.0
    if scale is not None:
        factor = tl.load(scale).to(ACC)
        unscale = tl.where(factor == 0, 0, 1 / factor)
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        value = _load(x, offsets, inside, ACC)
        if skip is not None:
            skipped = _load(skip, offsets, inside, ACC)
            if gate is not None:
                difference = value - w * skipped
                value = w * skipped + sigma * difference
            else:
                value += w * skipped
        if mix is not None:
            joined = value
            other = _load(x0, offsets, inside, ACC)
            value = first * value + second * other
        g = _load(du, offsets, inside, ACC) if du is not None else tl.zeros((BLOCK,), ACC)
        if dn is not None:
            dy = _load(dn, offsets, inside, ACC)
            if rstd is not None:
                inverse = tl.load(rstd + base + i)
                normed = value * unscale
            else:
                inverse = tl.rsqrt(tl.sum(value * value) / D + EPS)
                normed = value * inverse
            g += (factor * inverse) * (dy - (tl.sum(dy * normed) / D) * normed)
        if mix is not None:
            first_sum += g * joined
            second_sum += g * other
            result = second * g
            if dx0_next is not None:
                result += _load(dx0_next, offsets, inside, ACC)
            _store(dx0, offsets, inside, result)
            g *= first
        if dx_next is not None:
            g += _load(dx_next, offsets, inside, ACC)
        if skip is not None:
            weight_sum += g * skipped
            if gate is not None:
                gate_sum += g * difference
                scaled = sigma * g
                _store(dskip, offsets, inside, (g - scaled) * w)
                g = scaled
            else:
                _store(dskip, offsets, inside, g * w)
        if HALF:
            g *= 0.5
        _store(dx, offsets, inside, g)
    if SUMS:
        partials += tl.program_id(0).to(tl.int64) * (SUMS * D)
    if mix is not None:
        tl.store(partials + columns, first_sum, mask=inside)
        tl.store(partials + D + columns, second_sum, mask=inside)
        partials += 2 * D
    if skip is not None:
        if gate is not None:
            tl.store(partials + D + columns, gate_sum * sigma * (1 - sigma), mask=inside)
            weight_sum *= 1 - sigma
        tl.store(partials + columns, weight_sum, mask=inside)


@jit(do_not_specialize=("rows", "chunk"))
def _lanes_kernel(
    lane0, lane1, attention, mlp, post, resid, out0, out1, rows, chunk, D: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns, inside = _columns(D, BLOCK)
    r0, r1 = tl.load(resid).to(ACC), tl.load(resid + 1).to(ACC)
    a0, a1, m0, m1 = (tl.load(post).to(ACC), tl.load(post + 1).to(ACC), tl.load(post + 2).to(ACC),
                      tl.load(post + 3).to(ACC))  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        a, m = _load(attention, offsets, inside, ACC), _load(mlp, offsets, inside, ACC)
        _store(out0, offsets, inside, r0 * _load(lane0, offsets, inside, ACC) + (a0 * a + m0 * m))
        _store(out1, offsets, inside, r1 * _load(lane1, offsets, inside, ACC) + (a1 * a + m1 * m))


@jit(do_not_specialize=("rows", "chunk"))
def _lanes_backward_kernel(
    dout0, dout1, lane0, lane1, attention, mlp, post, resid, dlane0, dlane1, dattention, dmlp, partials, rows, chunk,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    columns, inside = _columns(D, BLOCK)
    r0, r1 = tl.load(resid).to(ACC), tl.load(resid + 1).to(ACC)
    a0, a1, m0, m1 = (tl.load(post).to(ACC), tl.load(post + 1).to(ACC), tl.load(post + 2).to(ACC),
                      tl.load(post + 3).to(ACC))  # fmt: skip
    zero = tl.zeros((BLOCK,), ACC)
    r0_sum, r1_sum, a0_sum, a1_sum, m0_sum, m1_sum = zero, zero, zero, zero, zero, zero
    base = tl.program_id(0).to(tl.int64) * chunk
    for i in tl.range(0, tl.minimum(rows - base, chunk).to(tl.int32), num_stages=STAGES):
        offsets = (base + i) * D + columns
        g0, g1 = _load(dout0, offsets, inside, ACC), _load(dout1, offsets, inside, ACC)
        _store(dlane0, offsets, inside, r0 * g0)
        _store(dlane1, offsets, inside, r1 * g1)
        _store(dattention, offsets, inside, a0 * g0 + a1 * g1)
        _store(dmlp, offsets, inside, m0 * g0 + m1 * g1)
        r0_sum += g0 * _load(lane0, offsets, inside, ACC)
        r1_sum += g1 * _load(lane1, offsets, inside, ACC)
        a, m = _load(attention, offsets, inside, ACC), _load(mlp, offsets, inside, ACC)
        a0_sum += g0 * a
        a1_sum += g1 * a
        m0_sum += g0 * m
        m1_sum += g1 * m
    partials += tl.program_id(0).to(tl.int64) * 6
    tl.store(partials, tl.sum(r0_sum))
    tl.store(partials + 1, tl.sum(r1_sum))
    tl.store(partials + 2, tl.sum(a0_sum))
    tl.store(partials + 3, tl.sum(a1_sum))
    tl.store(partials + 4, tl.sum(m0_sum))
    tl.store(partials + 5, tl.sum(m1_sum))


@jit
def _weight_gradient_kernel(
    dfolded, weight, out_scale, dweight, dout_scale, width, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dweight = out_scale dfolded, dout_scale = Σ weight dfolded; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(out_scale + row).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        gradient = _load(dfolded, row * width + columns, inside, ACC)
        total += gradient * _load(weight, row * width + columns, inside, ACC)
        _store(dweight, row * width + columns, inside, factor * gradient)
    tl.store(dout_scale + row, tl.sum(total).to(dout_scale.dtype.element_ty))


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype kernels compute in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _plan(case: str, x: Tensor) -> tuple[tuple[int], tuple[int, int], dict]:
    """Grid, (rows, rows of a program) and the constants of a launch over the rows of x."""
    tuned, width = launch_parameters("residual", case, x.device), x.size(-1)
    rows, block = x.numel() // width, 1 << (width - 1).bit_length()
    chunk = tuned["chunk"]
    if "programs" in tuned:  # those that leave sums: so many on each multiprocessor
        chunk = max(chunk, -(-rows // (tuned["programs"] * multiprocessors(x.device))))
    settings = dict(
        D=width, BLOCK=block, STAGES=tuned["stages"], num_warps=min(32, max(1, block // tuned["columns_per_warp"])),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )  # fmt: skip
    return (-(-rows // chunk),), (rows, chunk), settings


def _case(mix: Tensor | None, skip: Tensor | None, direction: str) -> str:
    return "join_" * (skip is not None) + "mix_" * (mix is not None) + direction


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _like(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else 0)


def _pointer(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def mix_forward(
    x: Tensor, x0: Tensor | None, mix: Tensor | None, skip: Tensor | None, weight: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, eps: float, keep_joined: bool, keep_u: bool, keep_n: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(joined, u, n), of which those not kept are empty."""
    outputs = [_like(x, keep) for keep in (keep_joined, keep_u, keep_n)]
    if x.numel():
        grid, extent, settings = _plan(_case(mix, skip, "forward"), x)
        inputs = _contiguous(x, x0, mix, skip, weight, gate, scale)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _forward_kernel[grid](*inputs, *map(_pointer, outputs), None, *extent, EPS=eps, **settings)
    return tuple(outputs)


def mix_backward(
    dx_next: Tensor | None, du: Tensor | None, dn: Tensor | None, dx0_next: Tensor | None, x: Tensor,
    x0: Tensor | None, mix: Tensor | None, skip: Tensor | None, weight: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, x0 and skip, and the sums that are those of mix (two rows), weight and gate, where there are."""
    sums = 2 * (mix is not None) + (skip is not None) + (gate is not None)
    outputs = [_like(x, wanted) for wanted in (True, x0 is not None, skip is not None)]
    if not x.numel():
        return *outputs, x.new_zeros(sums, x.size(-1), dtype=accumulator(x))
    grid, extent, settings = _plan(_case(mix, skip, "backward"), x)
    partials = x.new_empty(*grid, sums, x.size(-1), dtype=accumulator(x))
    inputs = _contiguous(dx_next, du, dn, dx0_next, x, x0, mix, skip, weight, gate, scale)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            *inputs, None, *map(_pointer, outputs), partials, *extent, EPS=eps, HALF=False, SUMS=sums, **settings
        )
    return *outputs, partials.sum(0)


def norm_forward(x: Tensor, other: Tensor | None, scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """scale rms_norm(x) or of the mean of x and other; and a row's factor 1 / sqrt(mean(x²) + eps)."""
    n, rstd = _like(x, True), x.new_empty(x.shape[:-1], dtype=accumulator(x))
    if x.numel():
        grid, extent, settings = _plan("norm_forward", x)
        x, other = _contiguous(x, other)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](
                x, other, None, None, None, None, scale, None, None, n, rstd, *extent, EPS=eps, **settings
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
            _backward_kernel[grid](
                None, dx_next, dn, None, n, None, None, None, None, None, scale, rstd, dx, None, None, None, *extent,
                EPS=0.0, HALF=mean, SUMS=0, **settings,
            )  # fmt: skip
    return dx


def lanes_forward(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor
) -> tuple[Tensor, Tensor]:
    """Both lanes after a layer."""
    outputs = _like(lane0, True), _like(lane0, True)
    if lane0.numel():
        grid, extent, settings = _plan("lanes_forward", lane0)
        inputs = _contiguous(lane0, lane1, attention, mlp, post, resid)
        with torch.cuda.device_of(lane0):
            _lanes_kernel[grid](*inputs, *outputs, *extent, **settings)
    return outputs


def lanes_backward(
    dout0: Tensor, dout1: Tensor, lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor,
    resid: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of lane0, lane1, attention and mlp, and the six of resid [2] and post [2, 2]."""
    outputs = [_like(lane0, True) for _ in range(4)]
    if not lane0.numel():
        return *outputs, lane0.new_zeros(6, dtype=accumulator(lane0))
    grid, extent, settings = _plan("lanes_backward", lane0)
    partials = lane0.new_empty(*grid, 6, dtype=accumulator(lane0))
    inputs = _contiguous(dout0, dout1, lane0, lane1, attention, mlp, post, resid)
    with torch.cuda.device_of(lane0):
        _lanes_backward_kernel[grid](*inputs, *outputs, partials, *extent, **settings)
    return *outputs, partials.sum(0)


def weight_gradient(dfolded: Tensor, weight: Tensor, out_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight [d, k] and out_scale [d] from that of out_scale[:, None] * weight."""
    dweight = weight.new_empty(weight.shape)
    if not weight.numel():
        return dweight, torch.zeros_like(out_scale)
    dout_scale = out_scale.new_empty(out_scale.shape)
    tuned = launch_parameters("residual", "weight_gradient", weight.device)
    rows, width = weight.shape
    block = min(tuned["block"], 1 << (width - 1).bit_length())
    with torch.cuda.device_of(weight):
        _weight_gradient_kernel[(rows,)](
            *_contiguous(dfolded, weight, out_scale), dweight, dout_scale, width, BLOCK=block,
            ACC=tl.float64 if dfolded.dtype == torch.float64 else tl.float32,
            num_warps=max(1, block // tuned["columns_per_warp"]),
        )  # fmt: skip
    return dweight, dout_scale
