"""All layers' matrices in the compute dtype, from the banks that the optimizer keeps, and the banks' gradients.

    inputs  [N, d]  the rows of qo_bank[i], kv_bank[i], kv_bank[n + i] and gates[i], and of zeros to a multiple of 16
    out     [d, d]  scales[i] qo_bank[n + i], row by row
    up      [m, d]  up_bank[i]
    down    [d, m]  scales[n + i] down_bank[i], row by row

of layer i of n, each rounded once. A layer that runs several times has tensors of its own for each pass, of the same
memory: autograd then has no gradients of matrices to add up, but hands those of all passes to this op, which adds them
in the order of the passes in the banks' dtype:

    dbank = scale Σ dW,   dscale[row] = Σ bank Σ dW

One launch forward, one backward. A layer's matrices are one block of rows of d, where `out` and `down` are transposed:
the products onto the residual take that as well, and `residual_mlp`'s gradient takes it without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common.backend import select
from .common.compiling import jit, tl
from .common.launch import launch_parameters, odd_addresses
from .common.operators import _traced, operator

Tensor = torch.Tensor
Matrices = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs, out, up, down
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def layer_weights_reference(
    qo_bank: Tensor,
    kv_bank: Tensor,
    up_bank: Tensor,
    down_bank: Tensor,
    scales: Tensor,
    gates: Tensor | None,
    dtype: torch.dtype,
    order: Sequence[int],
) -> list[Matrices]:
    """Plain PyTorch; the contract of `layer_weights`, whose arguments it shares."""
    q, out = qo_bank.chunk(2)
    inputs = [q, *kv_bank.chunk(2)]
    if gates is not None:
        inputs.append(F.pad(gates, (0, q.size(2) - gates.size(2))))
    inputs.append(q.new_zeros(len(q), -sum(part.size(1) for part in inputs) % 16, q.size(2)))
    of_out, of_down = scales[:, :, None].chunk(2)
    banks = torch.cat(inputs, dim=1), of_out * out, up_bank, of_down * down_bank
    layers = list(zip(*(bank.to(dtype).unbind() for bank in banks), strict=True))
    return [layers[i] for i in order]


# A layer's matrices come in parts, one a bank, and each part has programs of its own.


@jit
def _tile_of_weights(
    tile,
    layer,
    bank,
    scale,
    weights,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TAKEN: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of the [TAKEN, D] that a matrix [HEIGHT, WIDTH] becomes, or (scale[:, None] matrix)ᵀ."""
    across = tl.cdiv(D, BLOCK)
    rows = (tile // across * BLOCK + tl.arange(0, BLOCK))[:, None]
    columns = (tile % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    bank += layer * HEIGHT * WIDTH
    if scale is None:
        value = tl.load(bank + rows * WIDTH + columns, mask=(rows < HEIGHT) & (columns < WIDTH), other=0)
    else:
        value = tl.load(bank + columns * WIDTH + rows, mask=(rows < WIDTH) & (columns < HEIGHT), other=0)
        value *= tl.load(scale + layer * HEIGHT + columns, mask=columns < HEIGHT, other=0)
    value = value.to(weights.dtype.element_ty)
    tl.store(weights + rows * D + columns, value, mask=(rows < TAKEN) & (columns < D))


@jit
def _weights_kernel(
    banks, scales, weights, PARTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """weights [layers, ROWS, D]; of a part PARTS has height, width, the rows it takes and its programs."""
    tile, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    weights += layer * ROWS * D
    for i in tl.static_range(len(banks)):
        if (tile >= 0) & (tile < PARTS[i][3]):
            _tile_of_weights(tile, layer, banks[i], scales[i], weights, PARTS[i][0], PARTS[i][1], PARTS[i][2], D, BLOCK)
        tile -= PARTS[i][3]
        weights += PARTS[i][2] * D


@jit
def _rows_of_gradient(
    tile,
    layer,
    gradient,
    addresses,
    bank,
    scale,
    dbank,
    dscale,
    LAYERS: tl.constexpr,
    KIND: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Rows of dbank = scale Σ dW and dscale = Σ bank Σ dW; each dW, of LAYERS[KIND][k], is from row FIRST of STRIDE."""
    dtype: tl.constexpr = dbank.dtype.element_ty
    ROWS: tl.constexpr = BLOCK // COLUMNS
    rows = tile * ROWS + tl.arange(0, ROWS)
    place = layer.to(tl.int64) * HEIGHT + rows
    dots = tl.zeros((ROWS,), dtype)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
        total = tl.zeros((ROWS, COLUMNS), dtype)
        for k in tl.static_range(len(LAYERS[KIND])):
            if layer == LAYERS[KIND][k]:
                matrix = gradient + tl.multiple_of(addresses[KIND][k] >> 1, ALIGNED) + FIRST * STRIDE
                offsets = rows[:, None] * STRIDE + columns[None, :]
                total += tl.load(matrix + offsets, mask=inside, other=0).to(dtype)
        offsets = place[:, None] * WIDTH + columns[None, :]
        if scale is not None:
            dots += tl.sum(total * tl.load(bank + offsets, mask=inside, other=0), 1)
            total *= tl.load(scale + place, mask=rows < HEIGHT, other=0)[:, None]
        tl.store(dbank + offsets, total, mask=inside)
    if scale is not None:
        tl.store(dscale + place, dots, mask=rows < HEIGHT)


@jit
def _banks_kernel(
    gradient,
    addresses,
    banks,
    scales,
    dbanks,
    dscales,
    PARTS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """All banks' gradients from matrices at these addresses; ``gradient`` is a null pointer of their dtype.

    Of a part PARTS has its programs, which of the four lists is its, and what `_rows_of_gradient` wants to know.
    """
    tile, layer = tl.program_id(0), tl.program_id(1)
    for i in tl.static_range(len(banks)):
        if (tile >= 0) & (tile < PARTS[i][0]):
            _rows_of_gradient(
                tile,
                layer,
                gradient,
                addresses,
                banks[i],
                scales[i],
                dbanks[i],
                dscales[i],
                LAYERS,
                PARTS[i][1],
                PARTS[i][2],
                PARTS[i][3],
                PARTS[i][4],
                PARTS[i][5],
                PARTS[i][6],
                BLOCK,
                ALIGNED,
            )
        tile -= PARTS[i][0]


def _parts(qo: Tensor, kv: Tensor, up: Tensor, down: Tensor, scales: Tensor, gates: Tensor | None) -> list[tuple]:
    """(bank [n, height, width], scales [n, height] or None, which of a layer's four) in the order of a layer's rows.

    Of the banks, and of their gradients.
    """
    (q, out), (k, v), (of_out, of_down) = qo.chunk(2), kv.chunk(2), scales.chunk(2)
    inputs = [(part, None, 0) for part in (q, k, v, gates) if part is not None]
    return [*inputs, (out, of_out, 1), (up, None, 2), (down, of_down, 3)]


def _rows(parts: list[tuple]) -> list[int]:
    """How many rows of a layer's block each part takes; the last of `inputs` fills a multiple of 16."""
    rows = [bank.size(1 if scales is None else 2) for bank, scales, _ in parts]
    rows[-4] += -sum(rows[:-3]) % 16
    return rows


def _matrices(weights: Tensor, mlp: int, order: Sequence[int]) -> Iterator[Matrices]:
    """The four matrices of these layers in their blocks [n, rows, d]; views, or of the blocks' gradient its parts."""
    d = weights.size(2)
    for i in order:
        inputs, out, up, down = weights[i].split((weights.size(1) - d - 2 * mlp, d, mlp, mlp))
        yield inputs, out.mT, up, down.mT


def _forward(*masters_and_dtype: Any) -> Tensor:
    """All layers' blocks [n, rows, d]."""
    weights = _fake(*masters_and_dtype)
    masters = [master if master is None else master.contiguous() for master in masters_and_dtype[:-1]]
    parts, (n, rows, d) = _parts(*masters), weights.shape
    tuned = launch_parameters("layer_weights", "forward", weights.device)
    block = tuned["block"]
    constants = tuple(
        (*bank.shape[1:], taken, -(-taken // block) * -(-d // block))
        for (bank, *_), taken in zip(parts, _rows(parts), strict=True)
    )
    banks, scales, _ = zip(*parts, strict=True)
    with torch.cuda.device_of(weights):  # Triton launches on the current device
        _weights_kernel[(sum(part[3] for part in constants), n)](
            banks, scales, weights, PARTS=constants, ROWS=rows, D=d, BLOCK=block, num_warps=tuned["warps"]
        )
    return weights


def _fake(qo, kv, up, down, scales, gates, dtype) -> Tensor:
    rows = sum(_rows(_parts(qo, kv, up, down, scales, gates)))
    return up.new_empty(up.size(0), rows, up.size(2), dtype=dtype)


def _backward(gradients: Sequence[Tensor | None], order: Sequence[int], *masters: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the masters, of None an empty one; ``gradients`` are those of four matrices a pass, or None."""
    outputs = _fake_backward(gradients, order, *masters)
    parts = _parts(*(master if master is None else master.contiguous() for master in masters))
    dparts = _parts(*outputs[:5], None if masters[5] is None else outputs[5])
    given: list[list[Tensor]] = [[], [], [], []]
    layers: list[list[int]] = [[], [], [], []]
    for k, gradient in enumerate(gradients):
        if gradient is not None:
            given[k % 4].append(gradient.contiguous())
            layers[k % 4].append(order[k // 4])
    every, down = sum(given, []), masters[3]
    tuned = launch_parameters("layer_weights", "backward", down.device)
    block, constants, first = tuned["block"], [], 0
    for bank, _, kind in parts:
        height, width = bank.shape[1:]
        columns = min(block, 1 << (width - 1).bit_length())
        programs = -(-height * columns // block)
        constants.append((programs, kind, height, width, *((0, width) if kind else (first, down.size(1))), columns))
        first += height
    banks, scales, _ = zip(*parts, strict=True)
    dbanks, dscales, _ = zip(*dparts, strict=True)
    with torch.cuda.device_of(down):
        _banks_kernel[(sum(part[0] for part in constants), down.size(0))](
            every[0].new_empty(0),
            tuple(map(odd_addresses, given)),
            banks,
            scales,
            dbanks,
            dscales,
            PARTS=tuple(constants),
            LAYERS=tuple(map(tuple, layers)),
            BLOCK=block,
            ALIGNED=1 if any(tensor.data_ptr() % 16 for tensor in every) else 16 // every[0].element_size(),
            num_warps=tuned["warps"],
        )
    return outputs


def _fake_backward(gradients, order, *masters: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(masters[0].new_empty(0 if master is None else master.shape) for master in masters)


_backward_op = operator(
    "layer_weights_backward(Tensor?[] gradients, int[] order, Tensor qo_bank, Tensor kv_bank, Tensor up_bank, "
    "Tensor down_bank, Tensor scales, Tensor? gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _of_passes(ctx: Any, gradients: Sequence[Tensor | None], order: Sequence[int]) -> list[Tensor | None]:
    masters = ctx.saved_tensors
    if all(gradient is None for gradient in gradients):
        return [None] * 6
    found = _backward_op(list(gradients), list(order), *masters)
    return [None if master is None else gradient for gradient, master in zip(found, masters, strict=True)]


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])


@once_differentiable
def _of_blocks(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients from that of all layers' blocks, where autograd has added those of passes."""
    order = range(dweights.size(0))
    gradients = sum(_matrices(dweights, ctx.saved_tensors[2].size(1), order), ())
    return *_of_passes(ctx, gradients, order), None


_op = operator(
    "layer_weights(Tensor qo_bank, Tensor kv_bank, Tensor up_bank, Tensor down_bank, Tensor scales, Tensor? gates, "
    "ScalarType dtype) -> Tensor",
    _forward,
    _fake,
    setup_context=_save,
    backward=_of_blocks,
)


class _Passes(torch.autograd.Function):
    """The matrices of each pass, one after the other: an operator may not return several tensors of one memory."""

    @staticmethod
    def forward(ctx: Any, order: Sequence[int], *inputs: Any) -> tuple[Tensor, ...]:
        _save(ctx, inputs, None)
        ctx.order = order
        ctx.set_materialize_grads(False)
        return sum(_matrices(_forward(*inputs), inputs[2].size(1), order), ())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_of_passes(ctx, gradients, ctx.order), None


def _layer_weights_triton(*arguments: Any) -> list[Matrices]:
    *inputs, order = arguments
    if _traced(inputs) or not torch.is_grad_enabled():
        return list(_matrices(_op(*inputs), inputs[2].size(1), order))
    flat = _Passes.apply(order, *inputs)
    return list(zip(*(flat[k::4] for k in range(4)), strict=True))


_LAYER_WEIGHTS = {"reference": layer_weights_reference, "triton": _layer_weights_triton}


def layer_weights(
    qo_bank: Tensor,
    kv_bank: Tensor,
    up_bank: Tensor,
    down_bank: Tensor,
    scales: Tensor,
    gates: Tensor | None,
    dtype: torch.dtype,
    order: Sequence[int],
) -> list[Matrices]:
    """(inputs, out, up, down) of each pass through a layer; see the module's docstring for the formulas.

    Differentiable once in all tensors. Do not write into the results: passes through a layer share memory.

    Args:
        qo_bank: [2 n, d, d]: of n layers queries, then outputs; float32 or float64, as all others are.
        kv_bank: [2 n, k, d]: keys, then values.
        up_bank, down_bank: [n, m, d] and [n, d, m].
        scales: [2 n, d]: of the rows of outputs, then of those of `down`.
        gates: [n, H, w], w <= d: the other columns of their rows are zero, and their gradients are not read; or None.
        dtype: of the results: bfloat16, float16, float32 or float64.
        order: the layer of each pass, in running order; a layer may be there several times, or not.

    Raises ValueError for a wrong shape, device or layer, TypeError for a wrong dtype.
    """
    if qo_bank.dtype not in _DTYPES[2:]:
        raise TypeError(f"qo_bank must be float32 or float64, got {qo_bank.dtype}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    if down_bank.ndim != 3 or not down_bank.size(0):
        raise ValueError(f"down_bank must be [n, d, m] with n >= 1, got shape {tuple(down_bank.shape)}")
    n, d, m = down_bank.shape
    for name, tensor, shape in (
        ("qo_bank", qo_bank, (2 * n, d, d)),
        ("kv_bank", kv_bank, (2 * n, None, d)),
        ("up_bank", up_bank, (n, m, d)),
        ("down_bank", down_bank, (n, d, m)),
        ("scales", scales, (2 * n, d)),
        ("gates", gates, (n, None, None)),
    ):
        if tensor is None:
            continue
        sizes = (got if size is None else size for size, got in zip(shape, tensor.shape, strict=False))
        if tensor.ndim != len(shape) or tensor.shape != tuple(sizes):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
        if tensor.dtype != qo_bank.dtype:
            raise TypeError(f"{name} must have qo_bank's dtype {qo_bank.dtype}, got {tensor.dtype}")
        if tensor.device != qo_bank.device:
            raise ValueError(f"{name} must be on qo_bank's device {qo_bank.device}, got {tensor.device}")
    if gates is not None and gates.size(2) > d:
        raise ValueError(f"gates must have at most {d} columns, got {gates.size(2)}")
    if any(not 0 <= i < n for i in order):
        raise ValueError(f"order must have layers from 0 to {n - 1}, got {list(order)}")
    return select("layer_weights", _LAYER_WEIGHTS, qo_bank)(
        qo_bank, kv_bank, up_bank, down_bank, scales, gates, dtype, order
    )
