"""All layers' matrices and the banks' gradients: kernels, launches, operators and autograd.

A layer's matrices are composed of parts, one for each bank. Every part has programs of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.launch import launch_parameters, odd_addresses
from ..common.operators import operator, traced
from .reference import Matrices


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
    """Write a tile of the rows [TAKEN, D] that hold a matrix [HEIGHT, WIDTH], or (scale[:, None] matrix)ᵀ."""
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
    """Write weights [layers, ROWS, D]. PARTS lists height, width, rows in the block and programs of every part."""
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
    """Write rows of dbank = scale Σ dW and of dscale = Σ bank Σ dW.

    The k-th dW of this KIND is that of layer LAYERS[KIND][k]. The part begins at row FIRST of dW, whose rows are STRIDE
    apart.
    """
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
    """Write all banks' gradients from matrices at these addresses; ``gradient`` is a null pointer of their dtype.

    PARTS lists of every part its programs, then KIND to COLUMNS of `_rows_of_gradient`, without LAYERS.
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


class _Masters(NamedTuple):
    """The tensors that the optimizer keeps, or their gradients."""

    qo: Tensor
    kv: Tensor
    up: Tensor
    down: Tensor
    scales: Tensor
    gates: Tensor | None

    @classmethod
    def contiguous(cls, tensors: Iterable[Tensor | None]) -> _Masters:
        """Return the tensors, copied where they are not contiguous."""
        return cls._make(tensor if tensor is None else tensor.contiguous() for tensor in tensors)


class _Part(NamedTuple):
    """A part of every layer's matrices, in a bank or in its gradient."""

    bank: Tensor  # [n, height, width]
    scales: Tensor | None  # [n, height]
    kind: int  # 0 inputs, 1 out, 2 up, 3 down


def _parts(masters: _Masters) -> list[_Part]:
    """List the parts in the order of a layer's rows."""
    (q, out), (k, v), (out_scales, down_scales) = masters.qo.chunk(2), masters.kv.chunk(2), masters.scales.chunk(2)
    inputs = [_Part(bank, None, 0) for bank in (q, k, v, masters.gates) if bank is not None]
    return [*inputs, _Part(out, out_scales, 1), _Part(masters.up, None, 2), _Part(masters.down, down_scales, 3)]


def _rows(parts: Sequence[_Part]) -> list[int]:
    """List the rows of a layer's block that each part takes; the last part of `inputs` fills a multiple of 16."""
    rows = [part.bank.size(1 if part.scales is None else 2) for part in parts]
    rows[-4] += -sum(rows[:-3]) % 16
    return rows


def _matrices(weights: Tensor, mlp: int, order: Iterable[int]) -> Iterator[Matrices]:
    """Yield the four matrices of these layers, views of their blocks [n, rows, d] or of the blocks' gradient."""
    d = weights.size(2)
    for layer in order:
        inputs, out, up, down = weights[layer].split((weights.size(1) - d - 2 * mlp, d, mlp, mlp))
        yield inputs, out.mT, up, down.mT


def _forward(
    qo: Tensor, kv: Tensor, up: Tensor, down: Tensor, scales: Tensor, gates: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return all layers' blocks [n, rows, d]."""
    weights = _fake(qo, kv, up, down, scales, gates, dtype)
    parts, (n, rows, d) = _parts(_Masters.contiguous((qo, kv, up, down, scales, gates))), weights.shape
    tuned = launch_parameters("layer_weights", "forward", weights.device)
    block = tuned["block"]
    constants = tuple(
        (*part.bank.shape[1:], taken, -(-taken // block) * -(-d // block))
        for part, taken in zip(parts, _rows(parts), strict=True)
    )
    with torch.cuda.device_of(weights):  # Triton launches on the current device
        _weights_kernel[(sum(programs for *_, programs in constants), n)](
            tuple(part.bank for part in parts),
            tuple(part.scales for part in parts),
            weights,
            PARTS=constants,
            ROWS=rows,
            D=d,
            BLOCK=block,
            num_warps=tuned["warps"],
        )
    return weights


def _fake(
    qo: Tensor, kv: Tensor, up: Tensor, down: Tensor, scales: Tensor, gates: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows = sum(_rows(_parts(_Masters(qo, kv, up, down, scales, gates))))
    return up.new_empty(up.size(0), rows, up.size(2), dtype=dtype)


def _backward(
    gradients: Sequence[Tensor | None], order: Sequence[int], qo: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of the masters, an empty one for None.

    ``gradients`` are those of the four matrices of each pass, one pass after the other, or None.
    """
    masters, outputs = _Masters.contiguous((qo, *others)), _fake_backward(gradients, order, qo, *others)
    dmasters = _Masters._make(outputs)
    parts, dparts = _parts(masters), _parts(dmasters._replace(gates=None) if masters.gates is None else dmasters)
    of_kind: list[list[Tensor]] = [[], [], [], []]
    layers: list[list[int]] = [[], [], [], []]
    for k, gradient in enumerate(gradients):
        if gradient is not None:
            of_kind[k % 4].append(gradient.contiguous())
            layers[k % 4].append(order[k // 4])
    given, down = list(chain.from_iterable(of_kind)), masters.down
    tuned = launch_parameters("layer_weights", "backward", down.device)
    block, constants, first = tuned["block"], [], 0
    for part in parts:
        height, width = part.bank.shape[1:]
        columns = min(block, 1 << (width - 1).bit_length())
        programs = -(-height * columns // block)
        row, stride = (0, width) if part.kind else (first, down.size(1))
        constants.append((programs, part.kind, height, width, row, stride, columns))
        first += height
    with torch.cuda.device_of(down):
        _banks_kernel[(sum(programs for programs, *_ in constants), down.size(0))](
            given[0].new_empty(0),
            tuple(map(odd_addresses, of_kind)),
            tuple(part.bank for part in parts),
            tuple(part.scales for part in parts),
            tuple(part.bank for part in dparts),
            tuple(part.scales for part in dparts),
            PARTS=tuple(constants),
            LAYERS=tuple(map(tuple, layers)),
            BLOCK=block,
            ALIGNED=1 if any(tensor.data_ptr() % 16 for tensor in given) else 16 // given[0].element_size(),
            num_warps=tuned["warps"],
        )
    return outputs


def _fake_backward(
    gradients: Sequence[Tensor | None], order: Sequence[int], qo: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    return tuple(qo.new_empty((0,) if master is None else master.shape) for master in (qo, *others))


_backward_op = operator(
    "layer_weights_backward(Tensor?[] gradients, int[] order, Tensor qo_bank, Tensor kv_bank, Tensor up_bank, "
    "Tensor down_bank, Tensor scales, Tensor? gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])


def _pass_gradients(ctx: Any, gradients: Sequence[Tensor | None], order: Sequence[int]) -> list[Tensor | None]:
    """Return the gradients of the six masters from those of the matrices of each pass."""
    masters = ctx.saved_tensors
    if all(gradient is None for gradient in gradients):
        return [None] * 6
    found = _backward_op(list(gradients), list(order), *masters)
    return [None if master is None else gradient for gradient, master in zip(found, masters, strict=True)]


@once_differentiable
def _block_gradients(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the operator's inputs; autograd has added those of passes through the same layer."""
    order = range(dweights.size(0))
    gradients = list(chain.from_iterable(_matrices(dweights, ctx.saved_tensors[2].size(1), order)))
    return *_pass_gradients(ctx, gradients, order), None


_blocks_op = operator(
    "layer_weights(Tensor qo_bank, Tensor kv_bank, Tensor up_bank, Tensor down_bank, Tensor scales, Tensor? gates, "
    "ScalarType dtype) -> Tensor",
    _forward,
    _fake,
    setup_context=_save,
    backward=_block_gradients,
)


class _Passes(torch.autograd.Function):
    """The matrices of each pass, one pass after the other: an operator may not return several views of one memory."""

    @staticmethod
    def forward(ctx: Any, order: Sequence[int], *inputs: Any) -> tuple[Tensor, ...]:
        _save(ctx, inputs, None)
        ctx.order = order
        ctx.set_materialize_grads(False)
        return tuple(chain.from_iterable(_matrices(_forward(*inputs), inputs[2].size(1), order)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_pass_gradients(ctx, gradients, ctx.order), None


def layer_weights_triton(
    qo_bank: Tensor,
    kv_bank: Tensor,
    up_bank: Tensor,
    down_bank: Tensor,
    scales: Tensor,
    gates: Tensor | None,
    dtype: torch.dtype,
    order: Sequence[int],
) -> list[Matrices]:
    """Compute `layer_weights` with kernels."""
    inputs = qo_bank, kv_bank, up_bank, down_bank, scales, gates, dtype
    if traced(inputs) or not torch.is_grad_enabled():
        return list(_matrices(_blocks_op(*inputs), up_bank.size(1), order))
    matrices = _Passes.apply(order, *inputs)
    return list(zip(*(matrices[kind::4] for kind in range(4)), strict=True))
