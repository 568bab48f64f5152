"""The kernel of `residual_mlp`, its launch, and the operator with its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..common.compiling import jit, tl
from ..common.epilogues import EVENED, GRADIENT, MARKED_SQUARE, SQUARE, finish
from ..common.hopper_product import fits, ping_pong
from ..common.launch import launch_parameters, multiprocessors
from ..common.operators import may_overwrite, operator, overwriting
from .reference import leaky_relu

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton: the reference is used
    TensorDescriptor = None


@jit
def _place(matrix, row, column, height, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile and a mask of its elements inside the matrix; offsets within a tile fit in 32 bits."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (columns < width - column) | (width % COLUMNS == 0)
    start = matrix + row.to(tl.int64) * width + column
    return start + (rows[:, None] * width + columns[None, :]), (rows < height - row)[:, None] & inside[None, :]


@jit
def _load(
    matrix,
    row,
    column,
    height,
    width: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    if DESCRIPTORS:
        tile = matrix.load([row, column])
    else:
        pointers, inside = _place(matrix, row, column, height, width, ROWS, COLUMNS)
        tile = tl.load(pointers, mask=inside, other=0)
    return tile


@jit
def _store(
    product,
    hidden,
    out,
    row,
    column,
    M,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SLOPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Apply the epilogue to a part of a tile, for GRADIENT with the same part of hidden, and store the result."""
    result = finish(product, hidden, EPILOGUE, SLOPE, dtype)
    if DESCRIPTORS:
        out.store([row, column], result)
    else:
        pointers, inside = _place(out, row, column, M, N, ROWS, COLUMNS)
        tl.store(pointers, result, mask=inside)


@jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@jit
def _finish(
    product,
    aux,
    out,
    row,
    column,
    M,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUBTILES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SLOPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Apply the epilogue to a tile in SUBTILES parts one after the other, which takes less shared memory."""
    if SUBTILES > 1:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = _halves(product, ROWS, COLUMNS)
        _finish(left, aux, out, row, column, M, N, ROWS, HALF, SUBTILES // 2, EPILOGUE, SLOPE, DESCRIPTORS, dtype)
        column += HALF
        _finish(right, aux, out, row, column, M, N, ROWS, HALF, SUBTILES // 2, EPILOGUE, SLOPE, DESCRIPTORS, dtype)
    else:
        hidden = None
        if EPILOGUE == GRADIENT:
            hidden = _load(aux, row, column, M, N, ROWS, COLUMNS, DESCRIPTORS)
        _store(product, hidden, out, row, column, M, N, ROWS, COLUMNS, EPILOGUE, SLOPE, DESCRIPTORS, dtype)


@jit
def _product_kernel(
    a,
    b,
    aux,
    out,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    STAGES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SLOPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    EARLY: tl.constexpr,
    dtype: tl.constexpr,
):
    """out = epilogue of a bᵀ, a [M, K] and b [N, K]. Tiles go row by row, so that a is read from memory once.

    FLATTEN makes one loop of tiles and depth, which loads the next tile's operands during the epilogue. EARLY loads aux
    into registers during the product; this suits several programs per multiprocessor.
    """
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile // across * BLOCK_M, tile % across * BLOCK_N
        if EARLY:
            first = _load(aux, row, column, M, N, BLOCK_M, HALF, False)
            second = _load(aux, row, column + HALF, M, N, BLOCK_M, HALF, False)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            left = _load(a, row, k, M, K, BLOCK_M, BLOCK_K, DESCRIPTORS)
            right = _load(b, column, k, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS)
            product = tl.dot(left, right.T, product)
        if EARLY:
            left, right = _halves(product, BLOCK_M, BLOCK_N)
            _store(left, first, out, row, column, M, N, BLOCK_M, HALF, EPILOGUE, SLOPE, DESCRIPTORS, dtype)
            _store(right, second, out, row, column + HALF, M, N, BLOCK_M, HALF, EPILOGUE, SLOPE, DESCRIPTORS, dtype)
        else:
            _finish(
                product,
                aux,
                out,
                row,
                column,
                M,
                N,
                BLOCK_M,
                BLOCK_N,
                SUBTILES,
                EPILOGUE,
                SLOPE,
                DESCRIPTORS,
                dtype,
            )


def _regular(*tensors: torch.Tensor | None) -> bool:
    """Return whether numbers have 16 bits, and rows and addresses are multiples of 16 bytes, as the kernel requires."""
    given = [t for t in tensors if t is not None]
    return all(t.element_size() == 2 and not t.size(-1) % 8 and not t.data_ptr() % 16 for t in given)


def unfused_product(
    epilogue: int, a: torch.Tensor, b: torch.Tensor, aux: torch.Tensor | None, slope: float = 0.5
) -> torch.Tensor:
    """Compute `fused_product` with PyTorch's operators, for tensors that the kernel does not support."""
    if a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a, b.t(), out_dtype=torch.float32)
    else:
        product = a.float() @ b.t().float()
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    if epilogue == GRADIENT.value:
        assert aux is not None
        root = aux.float().sqrt()
        derivative = 2 * root
        if slope:
            derivative = torch.where(aux.view(integer) % 2 != 0, -slope * derivative, derivative)
        return (product * derivative).to(a.dtype)
    if epilogue == SQUARE.value:
        return leaky_relu(product, slope).square().to(a.dtype)
    negative = (product < 0).to(torch.int32)
    if a.dtype == torch.bfloat16:
        root = torch.maximum(product * EVENED.value, product * slope)
        bits = root.square().view(torch.int32) >> 16
    else:
        bits = leaky_relu(product, slope).square().to(a.dtype).view(integer).to(torch.int32)
    return (bits & -2 | negative).to(integer).view(a.dtype)


def fused_product(
    case: str,
    epilogue: int,
    a: torch.Tensor,
    b: torch.Tensor,
    aux: torch.Tensor | None = None,
    slope: float = 0.5,
) -> torch.Tensor:
    """Return ``epilogue`` of a bᵀ, [M, N]; for GRADIENT with aux [M, N], the hidden, marked unless ``slope`` is 0.

    a is [M, K], b is [N, K]; all are contiguous. ``case`` names the launch parameters.
    """
    (M, K), N = a.shape, b.size(0)
    out = a.new_empty(M, N)
    if not out.numel():
        return out
    if not _regular(a, b, out, aux):
        return unfused_product(epilogue, a, b, aux, slope)
    early, aux = aux is not None, out if aux is None else aux
    tuned = launch_parameters("residual_mlp", case, a.device)
    if fits(a, b, tuned["ping_pong"]):
        with torch.cuda.device_of(a):
            stages, copies = tuned["ping_pong"], bool(tuned["copies"])
            ping_pong(epilogue, a, b, aux, out, constants=(slope,), stages=stages, copies=copies)
        return out
    m, n, k, parts = (tuned[name] for name in ("block_m", "block_n", "block_k", "subtiles"))
    early, descriptors = bool(early and tuned["early"]), bool(tuned["descriptors"])
    parts = 2 if early else parts
    left, right, second, result = a, b, aux, out
    if descriptors:
        left, right, result = (
            TensorDescriptor.from_tensor(tensor, block)
            for tensor, block in ((a, [m, k]), (b, [n, k]), (out, [m, n // parts]))
        )
        second = aux if early else TensorDescriptor.from_tensor(aux, [m, n // parts])
    programs = min(multiprocessors(a.device) * tuned["programs"], -(-M // m) * -(-N // n))
    with torch.cuda.device_of(a):  # Triton launches on the current device
        _product_kernel[(programs,)](
            left,
            right,
            second,
            result,
            M,
            N=N,
            K=K,
            BLOCK_M=m,
            BLOCK_N=n,
            BLOCK_K=k,
            SUBTILES=parts,
            STAGES=tuned["stages"],
            EPILOGUE=epilogue,
            SLOPE=slope,
            DESCRIPTORS=descriptors,
            FLATTEN=bool(tuned["flatten"]),
            EARLY=early,
            dtype=getattr(tl, str(a.dtype).removeprefix("torch.")),
            num_warps=tuned["warps"],
        )
    return out


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return [..., d] as a contiguous [T, d]."""
    return tensor.reshape(-1, tensor.size(-1)).contiguous()


def mlp_forward(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    keep: bool,
    slope: float,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result and the hidden [T, m] for backward, marked unless ``slope`` is 0, empty unless ``keep``."""
    epilogue = MARKED_SQUARE if keep and slope else SQUARE
    hidden = fused_product("up", epilogue.value, _rows(x), up.contiguous(), slope=slope)
    if residual is None:
        out = (hidden @ down.t()).view(x.shape)
    else:
        out = residual if inplace else residual.clone(memory_format=torch.contiguous_format)
        out.view(-1, x.size(-1)).addmm_(hidden, down.t())
    return out, hidden if keep else x.new_empty(0)


def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    hidden: torch.Tensor,
    slope: float,
    need_x: bool,
    need_up: bool,
    need_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, up and down, empty if not needed."""
    dout = _rows(dout)
    dx, dup, ddown = (x.new_empty(0) for _ in range(3))
    if need_x or need_up:
        dpre = fused_product("gradient", GRADIENT.value, dout, down.t().contiguous(), hidden, slope)
        if need_x:
            dx = (dpre @ up).view(x.shape)
        if need_up:
            dup = dpre.t() @ _rows(x)
    if need_down:
        ddown = dout.t() @ hidden
    return dx, dup, ddown


def _fake_forward(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    keep: bool,
    slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = x.numel() // x.size(-1)
    return x.new_empty(x.shape), x.new_empty((tokens, up.size(0)) if keep else (0,))


def _fake_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    hidden: torch.Tensor,
    slope: float,
    *needs: bool,
) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, up, down), needs, strict=True))


def _save(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)  # hidden has no gradient
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[1:4], output[1])
    ctx.slope = inputs[5]


@once_differentiable
def _gradients(ctx: Any, dout: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    of_residual, *needs = ctx.needs_input_grad[:4]
    gradients = _backward_op(dout, *ctx.saved_tensors, ctx.slope, *needs) if any(needs) else (None,) * 3
    gradients = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dout if of_residual else None, *gradients, None, None


_backward_op = operator(
    "residual_mlp_backward(Tensor dout, Tensor x, Tensor up, Tensor down, Tensor hidden, float negative_slope, "
    "bool need_x, bool need_up, bool need_down) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_forward_op = operator(
    "residual_mlp(Tensor? residual, Tensor x, Tensor up, Tensor down, bool keep, float negative_slope) -> "
    "(Tensor, Tensor)",
    mlp_forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
)


_inplace = overwriting(mlp_forward, _save, _gradients)


def residual_mlp_triton(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    negative_slope: float = 0.5,
    inplace: bool = False,
) -> torch.Tensor:
    """Compute `residual_mlp` by kernels."""
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, up, down))
    arguments = residual, x, up, down, keep, float(negative_slope)
    return (_inplace if inplace and may_overwrite(arguments) else _forward_op)(*arguments)[0]
