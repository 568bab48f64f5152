"""What Muon does to its banks around Newton-Schulz, for lists of tensors at once, and the norm that clipping needs.

    momentum_update   g = s · rounded(g);   buf = μ buf + g;   u = g + μ buf (Nesterov) or buf
    squared_norm      Σ g² over all tensors
    clip_factor       norm = (Σ g²)^½;   s = min(1, limit / (norm + 1e-6))
    apply_update      p = p (1 - lr weight_decay) - lr max(1, rows / columns)^½ u;   mean += (1 - decay) (p - mean)

The gradient is rounded to the buffer's dtype first, as ranks do that send it to each other in that dtype.

Kernels: one launch for each list, a program for each chunk of a tensor, every element read and written once. Addresses
and sizes are arguments of the launch, so nothing is copied to the device and a CUDA graph can capture it; rates and
momentum may change at each call without a new compilation. float64 is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch

from .common.backend import select
from .common.compiling import jit, tl
from .common.launch import launch_parameters, odd_addresses
from .common.operators import operator

CLIP_EPS = 1e-6
MOST = 96  # tensors of a launch, whose arguments may take 4 KiB
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Tensor = torch.Tensor


def momentum_update_reference(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    gradient_scale: Tensor | float = 1.0,
    nesterov: bool = True,
) -> list[Tensor]:
    """Plain PyTorch; the contract of `momentum_update`, whose arguments it shares."""
    updates = []
    for gradient, buffer in zip(gradients, buffers, strict=True):
        gradient = gradient.to(buffer.dtype) * gradient_scale
        buffer.mul_(momentum).add_(gradient)
        updates.append(gradient.add(buffer, alpha=momentum) if nesterov else buffer)
    return updates


def squared_norm_reference(tensors: Sequence[Tensor]) -> Tensor:
    """Plain PyTorch; the contract of `squared_norm`, whose arguments it shares."""
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(list(tensors), 2, wide)).square().sum().float()


def clip_factor_reference(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; the contract of `clip_factor`, whose arguments it shares."""
    norm = squares.sqrt()
    return norm, (limit / (norm + CLIP_EPS)).clamp(max=1.0)


def apply_update_reference(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    averages: Sequence[Tensor] | None = None,
    decay: float = 0.0,
) -> None:
    """Plain PyTorch; the contract of `apply_update`, whose arguments it shares."""
    for parameter, update in zip(parameters, updates, strict=True):
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update.to(parameter.dtype), alpha=_step(parameter, lr))
    for average, parameter in zip(averages or (), parameters, strict=averages is not None):
        average.lerp_(parameter.to(average.dtype), 1 - decay)


def _step(parameter: Tensor, lr: float) -> float:
    """What an update is multiplied with."""
    rows, columns = parameter.shape[-2:]
    return -lr * max(1, rows / columns) ** 0.5


# Integers in tuples are odd (2 n + 1), for Triton compiles anew for those that 16 divides and for those it does not.


@jit
def _pick(values, index, FIRST: tl.constexpr, END: tl.constexpr):
    """values[index], where index is in [FIRST, END)."""
    value = values[FIRST].to(tl.int64)
    for i in tl.static_range(FIRST + 1, END):
        value = tl.where(index == i, values[i].to(tl.int64), value)
    return value >> 1


@jit
def _find(program, ends, END: tl.constexpr):
    """The tensor, among the first END, of a program, and how many programs of that tensor come before it."""
    index, start = program * 0, program * 0
    for i in tl.static_range(END - 1):
        end = ends[i] >> 1
        index += (program >= end).to(tl.int32)
        start = tl.where(program >= end, end, start)
    return index, (program - start).to(tl.int64)


@jit
def _at(tensor, addresses, index, place, ALIGNED: tl.constexpr):
    """Pointer to an element of the list's tensor ``index``; ``tensor`` is the first of the list."""
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
    gradients, buffers = (), ()
    for i in tl.static_range(ROUNDS):  # all loads before a store, which the compiler could not move them over
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
    # From the last element to the first: what was read last for the norm is still in the cache.
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
    parameters, updates, averages = (), (), ()
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
    values = ()
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
    """The first LARGE tensors may have several programs, the others have one each and are looked up by themselves."""
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
    wanted = tl.div_rn(limit, value + EPS)
    tl.store(norm, value)
    tl.store(factor, tl.where(wanted > 1, 1.0, wanted))  # NaN stays NaN


def _odd(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(2 * value + 1 for value in values)


class _Launch:
    """How a kernel goes over lists of contiguous tensors: the lists' i-th tensors have one size, above 0."""

    def __init__(self, case: str, *lists: Sequence[Tensor] | None) -> None:
        """None is an operand left out."""
        given = self.alive = [tensors for tensors in lists if tensors]  # the kernel knows most by their addresses only
        parameters = launch_parameters("muon_update", case, given[0][0].device)
        warps, elements = parameters["warps"], parameters["elements"]  # elements of a thread
        vector = 16 // max(tensors[0].element_size() for tensors in given)  # of the widest dtype 16 bytes at a time
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


def _by_dtypes(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """The lists cut into short ones of one dtype each, without empty tensors."""
    kinds: dict[tuple, list[tuple[Tensor, ...]]] = {}
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel():
            kinds.setdefault(tuple(tensor.dtype for tensor in tensors), []).append(tensors)
    for rows in kinds.values():
        for first in range(0, len(rows), MOST):
            yield [list(column) for column in zip(*rows[first : first + MOST], strict=True)]


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _write_back(tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    for tensor, result in zip(tensors, written, strict=True):
        if result is not tensor:
            tensor.copy_(result)


def _momentum_triton(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    updates: Sequence[Tensor],
    momentum: float,
    scale: Tensor | None,
    factor: float,
) -> None:
    """updates are contiguous, or none are wanted."""
    with torch.cuda.device_of(buffers[0]):  # Triton launches on the current device
        for sources, targets, outs in _by_dtypes(gradients, buffers, updates or buffers):
            written = _contiguous(targets)
            launch = _Launch("momentum", _contiguous(sources), written, outs if updates else None)
            _momentum_kernel[(launch.programs,)](*launch.operands, momentum, scale, factor, **launch.constants)
            _write_back(targets, written)


def _apply_triton(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    averages: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    decay: float,
) -> None:
    with torch.cuda.device_of(parameters[0]):
        for targets, sources, means in _by_dtypes(parameters, updates, averages or parameters):
            written, written_means = _contiguous(targets), _contiguous(means) if averages else None
            launch = _Launch("apply", written, _contiguous(sources), written_means)
            steps = tuple(_step(parameter, lr) for parameter in targets)
            _apply_kernel[(launch.programs,)](
                *launch.operands, 1.0 - lr * weight_decay, steps, 1.0 - decay, **launch.constants
            )
            _write_back(targets, written)
            if averages:
                _write_back(means, written_means)


def _squared_norm_triton(tensors: Sequence[Tensor]) -> Tensor:
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


def _clip_triton(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    norm, factor = _fake_clip(squares, limit)
    with torch.cuda.device_of(squares):
        _clip_kernel[(1,)](squares, norm, factor, limit, EPS=CLIP_EPS, num_warps=1)
    return norm, factor


def _fake_clip(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(squares), torch.empty_like(squares)


_momentum_op = operator(
    "momentum_update(Tensor[] gradients, Tensor(a!)[] buffers, Tensor(b!)[] updates, float momentum, Tensor? scale, "
    "float factor) -> ()",
    _momentum_triton,
    lambda *arguments: None,
    mutates=("buffers", "updates"),
)
_apply_op = operator(
    "apply_update(Tensor(a!)[] parameters, Tensor[] updates, Tensor(b!)[] averages, float lr, float weight_decay, "
    "float decay) -> ()",
    _apply_triton,
    lambda *arguments: None,
    mutates=("parameters", "averages"),
)
_squared_norm_op = operator("squared_norm(Tensor[] tensors) -> Tensor", _squared_norm_triton, _fake_squared_norm)
_clip_op = operator("clip_factor(Tensor squares, float limit) -> (Tensor, Tensor)", _clip_triton, _fake_clip)


def _momentum_kernels(gradients, buffers, momentum, gradient_scale, nesterov) -> list[Tensor]:
    on_device = isinstance(gradient_scale, Tensor)
    scale, factor = (gradient_scale, 1.0) if on_device else (None, float(gradient_scale))
    updates = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in buffers] if nesterov else []
    _momentum_op(list(gradients), list(buffers), updates, float(momentum), scale, factor)
    return updates or list(buffers)


def _apply_kernels(parameters, updates, lr, weight_decay, averages, decay) -> None:
    _apply_op(list(parameters), list(updates), list(averages or ()), float(lr), float(weight_decay), float(decay))


_MOMENTUM = {"reference": momentum_update_reference, "triton": _momentum_kernels}
_APPLY = {"reference": apply_update_reference, "triton": _apply_kernels}
_SQUARED_NORM = {
    "reference": squared_norm_reference,
    "triton": lambda tensors: _squared_norm_op(list(tensors)),
}
_CLIP = {"reference": clip_factor_reference, "triton": lambda squares, limit: _clip_op(squares, float(limit))}


def _select(op: str, implementations: dict[str, Callable], *lists: Sequence[Tensor]) -> Callable:
    if any(tensor.dtype == torch.float64 for tensors in lists for tensor in tensors):
        return implementations["reference"]
    return select(op, implementations, lists[0][0])


def _check(device: torch.device, **lists: Sequence[Tensor]) -> None:
    """All are floating point on one device, and the lists' i-th tensors have one shape."""
    first, tensors = next(iter(lists.items()))
    for name, others in lists.items():
        if len(others) != len(tensors):
            raise ValueError(f"{name} must have one tensor for each of the {len(tensors)} {first}, got {len(others)}")
        for i, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
            if other.dtype not in _DTYPES:
                raise TypeError(f"{name}[{i}] must be bfloat16, float16, float32 or float64, got {other.dtype}")
            if other.device != device:
                raise ValueError(f"{name}[{i}] must be on {device} as the others, got {other.device}")
            if other.shape != tensor.shape:
                wanted = f"{list(tensor.shape)} as {first}[{i}]"
                raise ValueError(f"{name}[{i}] must have shape {wanted}, got {list(other.shape)}")


def _check_scalar(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise ValueError(f"{name} must be one floating point element, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as the tensors, got {tensor.device}")


@torch.no_grad()
def momentum_update(
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    momentum: float,
    gradient_scale: Tensor | float = 1.0,
    nesterov: bool = True,
) -> list[Tensor]:
    """Momentum of all tensors in one launch; see the module's docstring for the formula.

    Args:
        gradients: any shapes, bfloat16, float16, float32 or float64; each is rounded to its buffer's dtype first.
        buffers: the gradients' shapes, changed in place.
        momentum: μ.
        gradient_scale: s, a number or one element on the gradients' device.
        nesterov: look ahead by one momentum step.

    Returns the updates, in the buffers' shapes and dtypes: new tensors, or without Nesterov the buffers themselves.
    Tensors of several dtypes take a launch for each. Raises ValueError for a wrong number, shape or device, TypeError
    for a wrong dtype.
    """
    if not gradients and not buffers:
        return []
    device = (*gradients, *buffers)[0].device
    _check(device, gradients=gradients, buffers=buffers)
    if isinstance(gradient_scale, Tensor):
        _check_scalar("gradient_scale", gradient_scale, device)
        gradient_scale = gradient_scale.reshape(())
    run = _select("momentum_update", _MOMENTUM, gradients, buffers)
    return run(gradients, buffers, momentum, gradient_scale, nesterov)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Σ g² over all elements of all tensors, float32 scalar on their device; the same bits at every call.

    tensors: one or more, of any shapes, bfloat16, float16, float32 or float64. On a GPU one launch (for each dtype)
    sums chunks, and a second one their sums. Raises ValueError where there is none or devices differ, TypeError for a
    wrong dtype.
    """
    if not tensors:
        raise ValueError("tensors must be one tensor at least, got none")
    _check(tensors[0].device, tensors=tensors)
    return _select("squared_norm", _SQUARED_NORM, tensors)(tensors)


@torch.no_grad()
def clip_factor(squares: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """(norm, factor) of a squared norm, float32 scalars: what brings a norm above ``limit`` down to it, else 1.

    squares: float32 scalar. limit: above 0. Raises ValueError for anything else.
    """
    if squares.shape != () or squares.dtype != torch.float32:
        raise ValueError(f"squares must be a float32 scalar, got {squares.dtype} {list(squares.shape)}")
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    return _select("clip_factor", _CLIP, [squares])(squares, limit)


@torch.no_grad()
def apply_update(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    averages: Sequence[Tensor] | None = None,
    decay: float = 0.0,
) -> None:
    """Move all parameters, and their moving averages where given, in one launch; see the module's docstring.

    Args:
        parameters: matrices or banks of them [..., rows, columns], bfloat16, float16, float32 or float64, changed in
            place.
        updates: the parameters' shapes.
        lr, weight_decay: as in the formula.
        averages: the parameters' shapes, changed in place; they move towards the parameters as they are stored.
        decay: share of an average that stays.

    Tensors of several dtypes take a launch for each. Raises ValueError for a wrong number, shape or device, TypeError
    for a wrong dtype.
    """
    if not parameters and not updates and not averages:
        return
    lists = {"parameters": parameters, "updates": updates} | ({} if averages is None else {"averages": averages})
    _check((*parameters, *updates, *(averages or ()))[0].device, **lists)
    for i, parameter in enumerate(parameters):
        if parameter.ndim < 2:
            raise ValueError(f"parameters[{i}] must be [..., rows, columns], got shape {list(parameter.shape)}")
    run = _select("apply_update", _APPLY, *lists.values())
    run(parameters, updates, lr, weight_decay, averages, decay)


__all__ = [
    "apply_update",
    "apply_update_reference",
    "clip_factor",
    "clip_factor_reference",
    "momentum_update",
    "momentum_update_reference",
    "squared_norm",
    "squared_norm_reference",
]
