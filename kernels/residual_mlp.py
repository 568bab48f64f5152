"""The MLP, residual + leaky_relu(x upᵀ, 0.5)² downᵀ, with all that is elementwise inside the products.

    forward     pre = x upᵀ,   hidden = leaky_relu(pre, 0.5)²,   out = residual + hidden downᵀ
    backward    dpre = (dout down) 2 a a',   dx = dpre up,   dup = dpreᵀ x,   ddown = doutᵀ hidden,   dresidual = dout

pre is never in memory. The first product's epilogue writes hidden, whose last mantissa bit is the sign of pre where a
gradient is wanted: |2 a a'| is √hidden times 2 or 1, so that hidden is all that the backward needs, for dpre in the
epilogue of its first product as for ddown. Its error then is up to one unit in the last place instead of half of one;
pre rounded to the same dtype and squared would have as much.

The products with an epilogue are one persistent kernel, on Hopper another where shapes allow; the others are cuBLAS's,
which adds the last one onto the residual where it may overwrite it (``inplace``), else onto a copy, two passes more.
The backward reads downᵀ by rows, and copies it unless down is the transpose of what is contiguous (`layer_weights`).

Shapes: residual and x [..., d]; up [m, d]; down [d, m].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common.backend import select
from .common.compiling import jit, tl
from .common.epilogues import EVENED, GRADIENT, MARKED_SQUARE, SQUARE, finish
from .common.hopper_product import fits, ping_pong
from .common.launch import launch_parameters, multiprocessors
from .common.operators import may_overwrite, operator, overwriting

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def residual_mlp_reference(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    inplace: bool = False,
) -> torch.Tensor:
    """Plain PyTorch; the contract of `residual_mlp`, whose arguments it shares."""
    out = F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)
    return out if residual is None else residual + out


@jit
def _place(matrix, row, column, height, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of a matrix and which of its elements are inside; offsets in a tile fit 32 bits."""
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
    other,
    out,
    row,
    column,
    M,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    dtype: tl.constexpr,
):
    """A part of a tile, with what the epilogue makes of it and of another matrix's."""
    result = finish(product, other, EPILOGUE, dtype)
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
    DESCRIPTORS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Epilogue of a tile, in ``SUBTILES`` parts one after the other through less shared memory."""
    if SUBTILES > 1:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = _halves(product, ROWS, COLUMNS)
        _finish(left, aux, out, row, column, M, N, ROWS, HALF, SUBTILES // 2, EPILOGUE, DESCRIPTORS, dtype)
        column += HALF
        _finish(right, aux, out, row, column, M, N, ROWS, HALF, SUBTILES // 2, EPILOGUE, DESCRIPTORS, dtype)
    else:
        other = None
        if EPILOGUE == GRADIENT:
            other = _load(aux, row, column, M, N, ROWS, COLUMNS, DESCRIPTORS)
        _store(product, other, out, row, column, M, N, ROWS, COLUMNS, EPILOGUE, DESCRIPTORS, dtype)


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
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    EARLY: tl.constexpr,
    dtype: tl.constexpr,
):
    """The epilogue of a bᵀ, a [M, K] and b [N, K]; tiles of a row follow each other, so a comes from memory once.

    FLATTEN: one loop over tiles and depth, the next tile's operands are on their way during the epilogue. EARLY: aux
    is on its way into registers during the product, which is for more programs to a multiprocessor.
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
            _store(left, first, out, row, column, M, N, BLOCK_M, HALF, EPILOGUE, DESCRIPTORS, dtype)
            _store(right, second, out, row, column + HALF, M, N, BLOCK_M, HALF, EPILOGUE, DESCRIPTORS, dtype)
        else:
            _finish(product, aux, out, row, column, M, N, BLOCK_M, BLOCK_N, SUBTILES, EPILOGUE, DESCRIPTORS, dtype)


def _regular(*tensors: torch.Tensor | None) -> bool:
    """Whether rows and addresses are of whole 16 bytes, of 16-bit numbers: what the kernel is made for."""
    given = [t for t in tensors if t is not None]
    return all(t.element_size() == 2 and not t.size(-1) % 8 and not t.data_ptr() % 16 for t in given)


def _plain_product(epilogue: int, a: torch.Tensor, b: torch.Tensor, aux: torch.Tensor | None) -> torch.Tensor:
    """`_product` in PyTorch, for everything else."""
    if a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a, b.t(), out_dtype=torch.float32)
    else:
        product = a.float() @ b.t().float()
    integer = torch.int16 if a.element_size() == 2 else torch.int32
    if epilogue == GRADIENT.value:
        root = aux.float().sqrt()
        return (product * torch.where(aux.view(integer) % 2 != 0, -root, 2 * root)).to(a.dtype)
    if epilogue == SQUARE.value:
        return torch.maximum(product, product * 0.5).square().to(a.dtype)
    negative = (product < 0).to(torch.int32)
    if a.dtype == torch.bfloat16:
        bits = torch.maximum(product * EVENED.value, product * 0.5).square().view(torch.int32) >> 16
    else:
        bits = torch.maximum(product, product * 0.5).square().to(a.dtype).view(integer).to(torch.int32)
    return (bits & -2 | negative).to(integer).view(a.dtype)


def _product(case: str, epilogue: int, a: torch.Tensor, b: torch.Tensor, aux: torch.Tensor | None = None):
    """``epilogue`` of a bᵀ, with aux of the result's shape; all contiguous, a [M, K] and b [N, K]."""
    (M, K), N = a.shape, b.size(0)
    out = a.new_empty(M, N)
    if not out.numel():
        return out
    if not _regular(a, b, out, aux):
        return _plain_product(epilogue, a, b, aux)
    early, aux = aux is not None, out if aux is None else aux
    tuned = launch_parameters("residual_mlp", case, a.device)
    if fits(a, b, tuned["ping_pong"]):
        with torch.cuda.device_of(a):
            ping_pong(epilogue, a, b, aux, out, tuned["ping_pong"], bool(tuned["copies"]))
        return out
    m, n, k, parts = (tuned[name] for name in ("block_m", "block_n", "block_k", "subtiles"))
    early, descriptors = bool(early and tuned["early"]), bool(tuned["descriptors"])
    parts = 2 if early else parts
    left, right, other, result = a, b, aux, out
    if descriptors:
        left, right, result = (
            TensorDescriptor.from_tensor(tensor, block)
            for tensor, block in ((a, [m, k]), (b, [n, k]), (out, [m, n // parts]))
        )
        other = aux if early else TensorDescriptor.from_tensor(aux, [m, n // parts])
    programs = min(multiprocessors(a.device) * tuned["programs"], -(-M // m) * -(-N // n))
    with torch.cuda.device_of(a):  # Triton launches on the current device
        _product_kernel[(programs,)](
            left,
            right,
            other,
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
            DESCRIPTORS=descriptors,
            FLATTEN=bool(tuned["flatten"]),
            EARLY=early,
            dtype=getattr(tl, str(a.dtype).removeprefix("torch.")),
            num_warps=tuned["warps"],
        )
    return out


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., d] as a contiguous [T, d]."""
    return tensor.reshape(-1, tensor.size(-1)).contiguous()


def _forward(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    keep: bool,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and hidden for the backward, or where it is not to be kept nothing."""
    epilogue = MARKED_SQUARE if keep else SQUARE
    hidden = _product("up", epilogue.value, _rows(x), up.contiguous())
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
    need_x: bool,
    need_up: bool,
    need_down: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, up and down, empty where not needed."""
    dout = _rows(dout)
    dx, dup, ddown = (x.new_empty(0) for _ in range(3))
    if need_x or need_up:
        dpre = _product("gradient", GRADIENT.value, dout, down.t().contiguous(), hidden)
        if need_x:
            dx = (dpre @ up).view(x.shape)
        if need_up:
            dup = dpre.t() @ _rows(x)
    if need_down:
        ddown = dout.t() @ hidden
    return dx, dup, ddown


def _fake_forward(residual, x, up, down, keep):
    tokens = x.numel() // x.size(-1)
    return x.new_empty(x.shape), x.new_empty((tokens, up.size(0)) if keep else (0,))


def _fake_backward(dout, x, up, down, hidden, *needs):
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip((x, up, down), needs, strict=True))


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # none is needed for hidden
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[1:4], output[1])


@once_differentiable
def _gradients(ctx, dout, _):
    if dout is None:
        return (None,) * 5
    of_residual, *needs = ctx.needs_input_grad[:4]
    gradients = _backward_op(dout, *ctx.saved_tensors, *needs) if any(needs) else (None,) * 3
    gradients = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return dout if of_residual else None, *gradients, None


_backward_op = operator(
    "residual_mlp_backward(Tensor dout, Tensor x, Tensor up, Tensor down, Tensor hidden, bool need_x, bool need_up, "
    "bool need_down) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_forward_op = operator(
    "residual_mlp(Tensor? residual, Tensor x, Tensor up, Tensor down, bool keep) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_save,
    backward=_gradients,
)


_inplace = overwriting(_forward, _save, _gradients)


def _residual_mlp_triton(residual, x, up, down, *, inplace) -> torch.Tensor:
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, up, down))
    arguments = residual, x, up, down, keep
    return (_inplace if inplace and may_overwrite(arguments) else _forward_op)(*arguments)[0]


_RESIDUAL_MLP = {"reference": residual_mlp_reference, "triton": _residual_mlp_triton}


def residual_mlp(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    inplace: bool = False,
) -> torch.Tensor:
    """residual + leaky_relu(x upᵀ, 0.5)² downᵀ; see the module's docstring for shapes.

    ``residual`` may be None; ``inplace`` lets kernels overwrite it, as torch's in-place operations do. Differentiable
    once in every tensor; all have one dtype, bfloat16, float16, float32 or float64. Kernels sum in fp32; float64 is
    left to the reference, float32 and rows that are not of whole 16 bytes to PyTorch's products. With a gradient
    wanted, hidden is rounded to even or odd numbers and an infinite hidden of a negative pre becomes NaN.

    Returns x's shape and dtype. Raises ValueError for a wrong shape or device, TypeError for a wrong dtype.
    """
    if x.ndim < 1 or up.ndim != 2 or up.size(1) != x.size(-1):
        raise ValueError(f"up must be [m, d] for x [..., d], got {tuple(up.shape)}, {tuple(x.shape)}")
    expected = {"down": up.shape[::-1], "residual": x.shape}
    for argument, tensor in (("x", x), ("up", up), ("down", down), ("residual", residual)):
        if tensor is None:
            continue
        if argument in expected and tensor.shape != torch.Size(expected[argument]):
            raise ValueError(f"{argument} must be {tuple(expected[argument])}, got {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES or tensor.dtype != x.dtype:
            allowed = "bfloat16, float16, float32 or float64" if tensor is x else f"x's dtype {x.dtype}"
            raise TypeError(f"{argument} must be {allowed}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{argument} must be on x's device {x.device}, got {tensor.device}")
    chosen = residual_mlp_reference
    if x.dtype != torch.float64:
        chosen = select("residual_mlp", _RESIDUAL_MLP, x)
    return chosen(residual, x, up, down, inplace=inplace)
