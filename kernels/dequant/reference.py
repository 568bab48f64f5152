"""Dequantisation in plain PyTorch: the contract of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .matrix import QuantizedMatrix
from .packing import factor_values, scaled_codes, unpack


def dequantize_reference(q: QuantizedMatrix, out: Tensor) -> None:
    """Write the weights of a packed matrix into ``out``, in plain PyTorch."""
    weight = scaled_codes(unpack(q), q.scale, q.zero)
    if q.low_rank is not None:
        A, B = factor_values(q)
        product = torch.zeros_like(weight)
        for k in range(A.size(1)):
            product = fused_multiply_add(A[:, k, None], B[k], product)
        weight = weight + product
    out.copy_(weight)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a · b + c of float32 numbers, rounded once.

    The sum is first rounded to odd in float64, which makes the rounding to float32 correct.
    """
    product, c = a.double() * b.double(), c.double()
    total, part = product + c, product + c - c
    error = (c - (total - part)) + (product - part)
    bits = total.view(torch.int64)
    outwards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where((error != 0) & (bits & 1 == 0), bits + outwards, bits).view(torch.float64).float()
