"""The MLP, residual + leaky_relu(x upᵀ, s)² downᵀ, with its elementwise operations inside the matrix products.

    forward     pre = x upᵀ,   hidden = leaky_relu(pre, s)²,   out = residual + hidden downᵀ
    backward    dpre = (dout down) 2 a a',   dx = dpre up,   dup = dpreᵀ x,   ddown = doutᵀ hidden,   dresidual = dout

with a = leaky_relu(pre, s) and its derivative a'. The slope s is 0.5 in parameter-golf PR #1874. With s = 0 hidden is
relu², as in Primer (arXiv 2109.08668), modded-nanogpt and nanochat.

pre is never stored. The epilogue of the first product writes hidden; if a gradient is needed, it replaces the last
mantissa bit of hidden by the sign of pre. Backward needs nothing else: 2 a a' is √hidden times 2 or -2 s, which the
epilogue of its first product computes, and ddown reads hidden itself. The error of hidden is then up to one unit in the
last place instead of half a unit, the same as that of pre rounded to the dtype and squared. With s = 0 there is no
mark: hidden is zero where pre is negative, and rounded as without a gradient.

The products with an epilogue are one persistent kernel, and on Hopper a second kernel for shapes that it supports. The
other products are cuBLAS's. The last forward product adds to the residual if it may overwrite it (``inplace``), else to
a copy, which costs two passes over memory. Backward reads downᵀ by rows; it copies down unless down is the transpose of
a contiguous matrix (as from `layer_weights`).

Shapes: residual and x [..., d]; up [m, d]; down [d, m].
"""

from __future__ import annotations

import torch

from ..common.backend import select
from .reference import residual_mlp_reference
from .triton import residual_mlp_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_RESIDUAL_MLP = {"reference": residual_mlp_reference, "triton": residual_mlp_triton}


def residual_mlp(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    negative_slope: float = 0.5,
    inplace: bool = False,
) -> torch.Tensor:
    """Compute residual + leaky_relu(x upᵀ, negative_slope)² downᵀ, or the second term if ``residual`` is None.

    The module's docstring gives the shapes. All tensors have one dtype: bfloat16, float16, float32 or float64.
    Differentiable once in all. ``negative_slope`` is from 0, for relu², to 1; kernels are compiled for each value.
    ``inplace`` permits overwriting the residual, as PyTorch's in-place operations do.

    Kernels sum in fp32. float64 takes the reference; float32, and rows whose size is no multiple of 16 bytes, take
    PyTorch's products. If a gradient is needed and the slope is above 0, the last bit of hidden stores a sign, and an
    infinite hidden of a negative pre becomes NaN.

    Returns x's shape and dtype. Raises ValueError for a wrong shape, device or slope, TypeError for a wrong dtype.
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
    if not 0 <= negative_slope <= 1:
        raise ValueError(f"negative_slope must be from 0, for relu², to 1, got {negative_slope}")
    chosen = residual_mlp_reference
    if x.dtype != torch.float64:
        chosen = select("residual_mlp", _RESIDUAL_MLP, x)
    return chosen(residual, x, up, down, negative_slope=negative_slope, inplace=inplace)


__all__ = ["residual_mlp", "residual_mlp_reference"]
