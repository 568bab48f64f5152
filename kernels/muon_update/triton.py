"""Momentum, norm, clipping and Muon's step for lists of tensors: kernels, launches and operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters, odd_addresses
from ..common.operators import operator
from .reference import CLIP_EPS, scales

MAX_TENSORS = 96  # tensors of a launch, whose arguments may take 4 KiB


# Integers n in tuples are passed as 2n + 1: Triton specialises integers on divisibility by 16, and odd values never
# trigger a recompile.


@jit
def _pick(values, index, FIRST: tl.constexpr, END: tl.constexpr):
    """Return n for values[index] = 2n + 1, where index is in [FIRST, END)."""
    value = values[FIRST].to(tl.int64)
    for i in tl.static_range(FIRST + 1, END):
        value = tl.where(index == i, values[i].to(tl.int64), value)
    return value >> 1


@jit
def _find(program, ends, END: tl.constexpr):
    """Return the index of a program's tensor among the first END, and how many earlier programs that tensor has."""
    index, start = program * 0, program * 0
    for i in tl.static_range(END - 1):
        end = ends[i] >> 1
        index += (program >= end).to(tl.int32)
        start = tl.where(program >= end, end, start)
    return index, (program - start).to(tl.int64)


@jit
def _at(tensor, addresses, index, place, ALIGNED: tl.constexpr):
    """Return a pointer to element ``place`` of the list's tensor ``index``; ``tensor`` is the list's first."""
    distance = _pick(addresses, index, 0, len(addresses)) - (addresses[0] >> 1)
    return tensor + (tl.multiple_of(distance, 16) if ALIGNED else distance) + place


@jit
def _momentum_chunk(
    gradient,
    buffer,
    update,
    left,
    momentum,
    scale,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Update a chunk of ROUNDS times WIDTH elements, of which ``left`` exist where MASKED."""
    gradients: tl.tuple = ()
    buffers: tl.tuple = ()
    for i in tl.static_range(ROUNDS):  # all loads come before the stores: the compiler cannot move loads over stores
        at = i * WIDTH + tl.arange(0, WIDTH)
        mask = at < left if MASKED else None
        gradients = gradients + (tl.load(gradient + at, mask=mask),)
        buffers = buffers + (tl.load(buffer + at, mask=mask),)
    for i in tl.static_range(ROUNDS):
        at = i * WIDTH + tl.arange(0, WIDTH)
        mask = at < left if MASKED else None
        g = scale * gradients[i].to(buffer.dtype.element_ty).to(tl.float32)
        b = momentum * buffers[i].to(tl.float32) + g
        tl.store(buffer + at, b.to(buffer.dtype.element_ty), mask=mask)
        if update is not None:
            tl.store(update + at, (g + momentum * b).to(update.dtype.element_ty), mask=mask)


@jit
def _momentum_kernel(
    gradient,
    gradients,
    buffer,
    buffers,
    update,
    updates,
    sizes,
    ends,
    momentum,
    scale,
    factor,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # Programs go from the last element to the first: the norm read the last ones last, so they are still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    index, place = _find(program, ends, len(ends))
    place *= WIDTH * ROUNDS
    left = _pick(sizes, index, 0, len(sizes)) - place
    gradient = _at(gradient, gradients, index, place, ALIGNED)
    buffer = _at(buffer, buffers, index, place, ALIGNED)
    if update is not None:
        update = _at(update, updates, index, place, ALIGNED)
    if scale is not None:
        factor = tl.load(scale).to(tl.float32)
    if left >= WIDTH * ROUNDS:
        _momentum_chunk(gradient, buffer, update, left, momentum, factor, WIDTH, ROUNDS, False)
    else:
        for _ in range(ROUNDS):
            _momentum_chunk(gradient, buffer, update, left, momentum, factor, WIDTH, 1, True)
            gradient += WIDTH
            buffer += WIDTH
            if update is not None:
                update += WIDTH
            left -= WIDTH


@jit
def _apply_chunk(
    parameter,
    update,
    average,
    left,
    keep,
    step,
    towards,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Update a chunk: p = keep p + step u, and average += towards (p - average)."""
    parameters: tl.tuple = ()
    updates: tl.tuple = ()
    averages: tl.tuple = ()
    for i in tl.static_range(ROUNDS):
        at = i * WIDTH + tl.arange(0, WIDTH)
        mask = at < left if MASKED else None
        parameters = parameters + (tl.load(parameter + at, mask=mask),)
        updates = updates + (tl.load(update + at, mask=mask),)
        if average is not None:
            averages = averages + (tl.load(average + at, mask=mask),)
    for i in tl.static_range(ROUNDS):
        at = i * WIDTH + tl.arange(0, WIDTH)
        mask = at < left if MASKED else None
        p = parameters[i].to(tl.float32) * keep + step * updates[i].to(tl.float32)
        p = p.to(parameter.dtype.element_ty)
        tl.store(parameter + at, p, mask=mask)
        if average is not None:
            a = averages[i].to(tl.float32)
            a += towards * (p.to(tl.float32) - a)
            tl.store(average + at, a.to(average.dtype.element_ty), mask=mask)


@jit
def _apply_kernel(
    parameter,
    parameters,
    update,
    updates,
    average,
    averages,
    sizes,
    ends,
    keep,
    steps,
    towards,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    index, place = _find(program, ends, len(ends))
    place *= WIDTH * ROUNDS
    left = _pick(sizes, index, 0, len(sizes)) - place
    step = steps[0]
    for i in tl.static_range(1, len(steps)):
        step = tl.where(index == i, steps[i], step)
    parameter = _at(parameter, parameters, index, place, ALIGNED)
    update = _at(update, updates, index, place, ALIGNED)
    if average is not None:
        average = _at(average, averages, index, place, ALIGNED)
    if left >= WIDTH * ROUNDS:
        _apply_chunk(parameter, update, average, left, keep, step, towards, WIDTH, ROUNDS, False)
    else:
        for _ in range(ROUNDS):
            _apply_chunk(parameter, update, average, left, keep, step, towards, WIDTH, 1, True)
            parameter += WIDTH
            update += WIDTH
            if average is not None:
                average += WIDTH
            left -= WIDTH


@jit
def _squares_of_chunk(tensor, left, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, MASKED: tl.constexpr):
    values: tl.tuple = ()
    for i in tl.static_range(ROUNDS):
        at = i * WIDTH + tl.arange(0, WIDTH)
        values = values + (tl.load(tensor + at, mask=at < left, other=0) if MASKED else tl.load(tensor + at),)
    total = tl.zeros([WIDTH], tl.float32)
    for i in tl.static_range(ROUNDS):
        value = values[i].to(tl.float32)
        total += value * value
    return tl.sum(total)


@jit
def _squares_kernel(
    tensor,
    tensors,
    sizes,
    ends,
    partials,
    LARGE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sum the squares of a chunk. The first LARGE tensors may have several programs, the others have one each.

    The index of a tensor with one program follows from the program's number, without a search.
    """
    program = tl.program_id(0)
    COUNT: tl.constexpr = len(ends)
    if LARGE == COUNT:
        index, place = _find(program, ends, COUNT)
        address, size = _pick(tensors, index, 0, COUNT), _pick(sizes, index, 0, COUNT)
    elif program < (ends[LARGE - 1] >> 1):
        index, place = _find(program, ends, LARGE)
        address, size = _pick(tensors, index, 0, LARGE), _pick(sizes, index, 0, LARGE)
    else:
        place = (program * 0).to(tl.int64)
        index = LARGE + program - (ends[LARGE - 1] >> 1)
        address, size = _pick(tensors, index, LARGE, COUNT), _pick(sizes, index, LARGE, COUNT)
    place *= WIDTH * ROUNDS
    distance = address - (tensors[0] >> 1)
    tensor += (tl.multiple_of(distance, 16) if ALIGNED else distance) + place
    left = size - place
    if left >= WIDTH * ROUNDS:
        total = _squares_of_chunk(tensor, left, WIDTH, ROUNDS, False)
    else:
        total = tl.zeros([], tl.float32)
        for _ in range(ROUNDS):
            total += _squares_of_chunk(tensor, left, WIDTH, 1, True)
            tensor += WIDTH
            left -= WIDTH
    tl.store(partials + program, total)


@jit(do_not_specialize=["count"])
def _sum_kernel(partials, out, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + at, mask=at < count, other=0)
    tl.store(out, tl.sum(total))


@jit
def _clip_kernel(squares, norm, factor, limit, EPS: tl.constexpr):
    value = tl.sqrt_rn(tl.load(squares))
    ratio = tl.div_rn(limit, value + EPS)
    tl.store(norm, value)
    tl.store(factor, tl.where(ratio > 1, 1.0, ratio))  # NaN stays NaN


def _odd(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(2 * value + 1 for value in values)


class _Launch:
    """The grid and arguments of a kernel over lists of contiguous tensors, whose i-th tensors have one size above 0.

    None in place of a list leaves an operand out.
    """

    def __init__(self, case: str, *lists: Sequence[Tensor] | None) -> None:
        given = self.alive = [tensors for tensors in lists if tensors]  # most operands are addresses, which own nothing
        parameters = launch_parameters("muon_update", case, given[0][0].device)
        warps, elements = parameters["warps"], parameters["elements"]  # elements for each thread
        vector = 16 // max(tensors[0].element_size() for tensors in given)  # 16 bytes of the widest dtype at a time
        chunk, sizes = elements * 32 * warps, [tensor.numel() for tensor in given[0]]
        ends = list(accumulate(-(-size // chunk) for size in sizes))
        self.programs = ends[-1]
        self.large = max(1, sum(size > chunk for size in sizes))
        self.operands: list = []
        for tensors in lists:
            self.operands += [tensors[0], odd_addresses(tensors)] if tensors else [None, None]
        self.operands += [_odd(sizes), _odd(ends)]
        aligned = all(tensor.data_ptr() % 16 == 0 for tensors in given for tensor in tensors)
        self.constants = dict(WIDTH=32 * warps * vector, ROUNDS=elements // vector, ALIGNED=aligned, num_warps=warps)


def _by_dtypes(*lists: Sequence[Any]) -> Iterator[list[list[Any]]]:
    """Yield the lists cut so that each has one dtype and at most MAX_TENSORS tensors, none of them empty.

    Lists after the first may be of numbers.
    """
    kinds: dict[tuple, list[tuple[Any, ...]]] = {}
    for row in zip(*lists, strict=True):
        if row[0].numel():
            kinds.setdefault(tuple(item.dtype for item in row if isinstance(item, Tensor)), []).append(row)
    for rows in kinds.values():
        for first in range(0, len(rows), MAX_TENSORS):
            yield [list(column) for column in zip(*rows[first : first + MAX_TENSORS], strict=True)]


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _write_back(tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    for tensor, result in zip(tensors, written, strict=True):
        if result is not tensor:
            tensor.copy_(result)


def _momentum_update(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    momentum: float,
    scale: Tensor | None,
    factor: float,
) -> None:
    """Launch the momentum kernel; ``updates`` are contiguous, or an empty list leaves them out."""
    with torch.cuda.device_of(buffers[0]):  # Triton launches on the current device
        for sources, targets, outs in _by_dtypes(gradients, buffers, updates or buffers):
            written = _contiguous(targets)
            launch = _Launch("momentum", _contiguous(sources), written, outs if updates else None)
            _momentum_kernel[(launch.programs,)](*launch.operands, momentum, scale, factor, **launch.constants)
            _write_back(targets, written)


def _apply_update(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    averages: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    decay: float,
    factors: Sequence[float],
) -> None:
    with torch.cuda.device_of(parameters[0]):
        for targets, sources, means, scaled in _by_dtypes(parameters, updates, averages or parameters, factors):
            written, written_means = _contiguous(targets), _contiguous(means) if averages else None
            launch = _Launch("apply", written, _contiguous(sources), written_means)
            steps = tuple(-lr * factor for factor in scaled)
            _apply_kernel[(launch.programs,)](
                *launch.operands, 1.0 - lr * weight_decay, steps, 1.0 - decay, **launch.constants
            )
            _write_back(targets, written)
            if written_means is not None:
                _write_back(means, written_means)


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    out = _fake_squared_norm(tensors)
    with torch.cuda.device_of(out):
        launches = [
            _Launch("squares", sorted(_contiguous(same), key=Tensor.numel, reverse=True))
            for (same,) in _by_dtypes(tensors)
        ]
        count = sum(launch.programs for launch in launches)
        rest = partials = torch.empty(count, dtype=torch.float32, device=out.device)
        for launch in launches:
            _squares_kernel[(launch.programs,)](*launch.operands, rest, LARGE=launch.large, **launch.constants)
            rest = rest[launch.programs :]
        _sum_kernel[(1,)](partials, out, count, BLOCK=1024, num_warps=8)
    return out


def _fake_squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=tensors[0].device)


def _clip_factor(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    norm, factor = _fake_clip(squares, limit)
    with torch.cuda.device_of(squares):
        _clip_kernel[(1,)](squares, norm, factor, limit, EPS=CLIP_EPS, num_warps=1)
    return norm, factor


def _fake_clip(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(squares), torch.empty_like(squares)


_momentum_op = operator(
    "momentum_update(Tensor[] gradients, Tensor(a!)[] buffers, Tensor(b!)[] updates, float momentum, Tensor? scale, "
    "float factor) -> ()",
    _momentum_update,
    lambda *arguments: None,
    mutates=("buffers", "updates"),
)
_apply_op = operator(
    "apply_update(Tensor(a!)[] parameters, Tensor[] updates, Tensor(b!)[] averages, float lr, float weight_decay, "
    "float decay, float[] scales) -> ()",
    _apply_update,
    lambda *arguments: None,
    mutates=("parameters", "averages"),
)
_squared_norm_op = operator("squared_norm(Tensor[] tensors) -> Tensor", _squared_norm, _fake_squared_norm)
_clip_op = operator("clip_factor(Tensor squares, float limit) -> (Tensor, Tensor)", _clip_factor, _fake_clip)


def momentum_update_triton(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    gradient_scale: Tensor | float = 1.0,
    nesterov: bool = True,
) -> list[Tensor]:
    """Compute `momentum_update` with kernels."""
    on_device = isinstance(gradient_scale, Tensor)
    scale, factor = (gradient_scale, 1.0) if on_device else (None, float(gradient_scale))
    updates = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in buffers] if nesterov else []
    _momentum_op(list(gradients), list(buffers), updates, float(momentum), scale, factor)
    return updates or list(buffers)


def squared_norm_triton(tensors: Sequence[Tensor]) -> Tensor:
    """Compute `squared_norm` with kernels."""
    return _squared_norm_op(list(tensors))


def clip_factor_triton(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Compute `clip_factor` with a kernel."""
    return _clip_op(squares, float(limit))


def apply_update_triton(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    averages: Sequence[Tensor] | None = None,
    decay: float = 0.0,
    *,
    scale: float | Sequence[float] | None = None,
) -> None:
    """Compute `apply_update` with kernels."""
    lists = list(parameters), list(updates), list(averages or ())
    _apply_op(*lists, float(lr), float(weight_decay), float(decay), scales(parameters, scale))
