"""The parts that the kernels of `residual` share: device functions on one row, launch plans, gradients of parameters.

A program, one warp at d = 512, processes a chunk of consecutive rows while it loads the next ones. Programs that sum
gradients of parameters keep the sums of the columns in registers and store them once; `partial_sums` adds them up. A
pointer that is None removes all code that would use it from the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common.compiling import jit, tl
from ..common.launch import accumulator, launch_parameters, multiprocessors
from ..common.partial_sums import partial_sums

Tensor = torch.Tensor


@jit
def row_columns(D: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    return columns, (columns < D) | (D == BLOCK)


@jit
def load(pointer, offsets, inside, ACC: tl.constexpr):
    return tl.load(pointer + offsets, mask=inside, other=0).to(ACC)


@jit
def store(pointer, offsets, inside, value):
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=inside)


@jit
def load_vector(pointer, columns, inside, ACC: tl.constexpr):
    """A parameter of the columns, or 0 without a pointer."""
    return load(pointer, columns, inside, ACC) if pointer is not None else 0.0


@jit
def load_gate(pointer, columns, inside, ACC: tl.constexpr):
    return tl.sigmoid(load(pointer, columns, inside, ACC)) if pointer is not None else 0.0


@jit
def load_scalar(pointer, ACC: tl.constexpr):
    return tl.load(pointer).to(ACC) if pointer is not None else 1.0


@jit
def load_row_gate(pointer, columns, K: tl.constexpr, ACC: tl.constexpr):
    """The weights of the first K columns, then the bias, or 0 without a pointer."""
    return tl.load(pointer + columns, mask=columns <= K, other=0).to(ACC) if pointer is not None else 0.0


@jit
def row_root(value, row, columns, K: tl.constexpr):
    """The root of a row's gate."""
    return tl.sqrt(tl.sigmoid(tl.sum(row * tl.where(columns == K, 1.0, value))))


@jit
def join(value, skipped, w, sigma, GATED: tl.constexpr):
    scaled = w * skipped
    return scaled + sigma * (value - scaled) if GATED else value + scaled


@jit
def join_gradient(g, value, skipped, w, sigma, GATED: tl.constexpr):
    """Return the gradients of value and skipped, and the row's terms of those of weight and gate.

    The term of weight lacks the factor 1 - σ, that of gate the factor σ (1 - σ); `store_sums` applies them to the sums.
    """
    kept = sigma * g if GATED else g
    passed = (g - kept) * w if GATED else g * w
    return kept, passed, g * skipped, g * (value - w * skipped) if GATED else 0.0


@jit
def inverse_rms(value, EPS: tl.constexpr, D: tl.constexpr):
    return tl.rsqrt(tl.sum(value * value) / D + EPS)


@jit
def norm_gradient(dy, normed, inverse, D: tl.constexpr):
    return inverse * (dy - (tl.sum(dy * normed) / D) * normed)


@jit
def gated_norm_gradient(dy, value, normed, inverse, factor, root, row, columns, K: tl.constexpr, D: tl.constexpr):
    """Return the gradient of value, whose output is root factor normed, and the row's terms of that of its gate."""
    dot, factor = tl.sum(dy * normed), factor * root
    dz = 0.5 * (1 - root * root) * (factor * dot)
    g = factor * inverse * (dy - (dot / D) * normed) + tl.where(columns < K, dz * row, 0.0)
    return g, dz * tl.where(columns == K, 1.0, value)


@jit
def add_n1_gradient(
    g, row_sum, dy, value, factor, row_gate, row, columns, EPS: tl.constexpr, K: tl.constexpr, D: tl.constexpr
):
    """Return g with the gradient of value, whose norm n1 is, and row_sum with the row's terms of that of its gate."""
    inverse = inverse_rms(value, EPS, D)
    normed = value * inverse
    if row_gate is not None:
        root = row_root(value, row, columns, K)
        part, row_part = gated_norm_gradient(dy, value, normed, inverse, factor, root, row, columns, K, D)
        g += part
        row_sum += row_part
    else:
        g += norm_gradient(dy, normed, factor * inverse, D)
    return g, row_sum


@jit
def store_sums(
    partials,
    first,
    second,
    dweight,
    dgate,
    drow,
    sigma,
    columns,
    inside,
    D: tl.constexpr,
    MIX: tl.constexpr,
    JOIN: tl.constexpr,
    GATED: tl.constexpr,
    ROW: tl.constexpr,
    K: tl.constexpr,
):
    """Store this program's partial sums for mix, weight, gate and row_gate; return the pointer behind them."""
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
    if ROW:
        tl.store(partials + columns, drow, mask=columns <= K)
        partials += K + 1
    return partials


def plan(case: str, x: Tensor) -> tuple[tuple[int], tuple[int, int], dict]:
    """Return the grid, (rows, rows per program) and the constants of a launch over the rows of x."""
    tuned, width = launch_parameters("residual", case, x.device), x.size(-1)
    rows, block = x.numel() // width, 1 << (width - 1).bit_length()
    chunk = tuned["chunk"]
    if "programs" in tuned:  # a kernel with sums runs so many programs per multiprocessor
        chunk = max(chunk, -(-rows // (tuned["programs"] * multiprocessors(x.device))))
    settings = dict(
        D=width,
        BLOCK=block,
        STAGES=tuned["stages"],
        num_warps=min(32, max(1, block // tuned["columns_per_warp"])),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
    )
    return (-(-rows // chunk),), (rows, chunk), settings


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors as contiguous ones; None stays None."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def pointer(tensor: Tensor) -> Tensor | None:
    """Return the tensor, or None for an empty one: an output that is not kept."""
    return tensor if tensor.numel() else None


def total(partials: Tensor | None, x: Tensor) -> Tensor:
    """Return the sums of the programs' partial sums, or an empty tensor without any."""
    return x.new_empty(0, dtype=accumulator(x)) if partials is None else partial_sums(partials)


def sums_width(x: Tensor, mix: Tensor | None, skip: Tensor | None, gate: Tensor | None, row_gate: Tensor | None) -> int:
    """Return the length of the flat gradient of mix, weight, gate and row_gate, of those that are given."""
    vectors = 2 * (mix is not None) + (skip is not None) + (gate is not None)
    return vectors * x.size(-1) + (0 if row_gate is None else row_gate.numel())


def gate_columns(row_gate: Tensor | None) -> int:
    """Return how many columns a row's gate reads, 0 without one: all of its elements but the bias have one."""
    return 0 if row_gate is None else row_gate.numel() - 1


def empty(x: Tensor, *kept: bool) -> tuple[Tensor, ...]:
    """Return one uninitialised tensor for each output: of x's shape if it is kept, else without elements."""
    return tuple(x.new_empty(x.shape if keep else 0) for keep in kept)


def empty_sums(x: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised tensor in the dtype of sums."""
    return x.new_empty(shape, dtype=accumulator(x))


def kept_gradient(gradient: Tensor | None) -> Tensor | None:
    """Return None for the gradient of an output that was not kept: the dispatcher passes an empty tensor for it."""
    return gradient if gradient is not None and gradient.numel() else None


def needed(needs: tuple[bool, ...], *gradients: Tensor | None) -> Iterator[Tensor | None]:
    """Yield the gradients, None for arguments that need none."""
    return (gradient if need else None for gradient, need in zip(gradients, needs, strict=False))


def parameter_gradients(sums: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Return the parameters' gradients from flat sums, in the order in which they lie there; None stays None."""
    gradients: list[Tensor | None] = []
    for parameter in parameters:
        size = 0 if parameter is None else parameter.numel()
        gradients.append(None if parameter is None else sums[:size].view(parameter.shape).to(parameter.dtype))
        sums = sums[size:]
    return gradients
