"""All layers' matrices in the compute dtype, from the banks that the optimizer keeps, and the banks' gradients.

    inputs  [N, d]  the rows of qo_bank[i], kv_bank[i], kv_bank[n + i] and gates[i], and zeros up to a multiple of 16
    out     [d, d]  scales[i] qo_bank[n + i], row by row
    up      [m, d]  up_bank[i]
    down    [d, m]  scales[n + i] down_bank[i], row by row

for layer i of n, each rounded once. A layer that runs several times has separate tensors for each pass, which share
memory. Autograd then adds no gradients of matrices: it hands the gradients of all passes to this operator, which adds
them in the order of the passes in the banks' dtype:

    dbank = scale Σ dW,   dscale[row] = Σ bank Σ dW

The forward is one launch, and so is the backward. A layer's matrices are one block of rows of length d, in which `out`
and `down` are stored transposed: the products onto the residual take either layout, and the gradient of `residual_mlp`
takes this one without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.backend import select
from .reference import Matrices, layer_weights_reference
from .triton import layer_weights_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_IMPLEMENTATIONS = {"reference": layer_weights_reference, "triton": layer_weights_triton}


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
    """Return (inputs, out, up, down) of each pass through a layer; see the module's docstring for the formulas.

    The results are differentiable once in all tensors. Do not write into them: passes through a layer share memory.

    Args:
        qo_bank: [2 n, d, d], the query matrices of n layers, then their output matrices; float32 or float64. All other
            tensors have its dtype.
        kv_bank: [2 n, k, d], the key matrices, then the value matrices.
        up_bank: [n, m, d].
        down_bank: [n, d, m].
        scales: [2 n, d], the scales of the rows of `out`, then those of the rows of `down`.
        gates: [n, H, w] with w <= d, or None. The other columns of their rows in `inputs` are zero, and the gradients
            of those columns are not read.
        dtype: dtype of the results, bfloat16, float16, float32 or float64.
        order: the layer of each pass, in running order. A layer may appear several times, or not at all.

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
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")
        if tensor.dtype != qo_bank.dtype:
            raise TypeError(f"{name} must have qo_bank's dtype {qo_bank.dtype}, got {tensor.dtype}")
        if tensor.device != qo_bank.device:
            raise ValueError(f"{name} must be on qo_bank's device {qo_bank.device}, got {tensor.device}")
    if gates is not None and gates.size(2) > d:
        raise ValueError(f"gates must have at most {d} columns, got {gates.size(2)}")
    if any(not 0 <= i < n for i in order):
        raise ValueError(f"order must have layers from 0 to {n - 1}, got {list(order)}")
    return select("layer_weights", _IMPLEMENTATIONS, qo_bank)(
        qo_bank, kv_bank, up_bank, down_bank, scales, gates, dtype, order
    )


__all__ = ["Matrices", "layer_weights", "layer_weights_reference"]
