"""GPTQ with a trellis: integer codes for matrices, each column a path through a trellis.

A code u of an element w stands for u · row_step · column_step. Codes of a column follow a path through a trellis of S
states, down the rows. State s allows codes u of the parity of s, and the bit (u - parity) / 2 modulo 2 selects the next
state. So a code costs the bits of a quantiser of step 2, and the choice of the path brings its error near that of a
finer one (trellis coded quantisation; Marcellin and Fischer 1990, with Ungerboeck's codes of 1982). On Gaussian numbers
4, 8, 16, 64 and 128 states gain 0.16, 0.17, 0.18, 0.19 and 0.20 bits each.

Columns are coded one after the other, and later columns compensate the error of each (GPTQ, arXiv 2210.17323):

    x_r  = w_rj / (row_step_r column_step_j),   u = the path nearest to shrink_r x,
    e_r  = (w_rj - u_r row_step_r column_step_j) / F_jj,   w_rk -= F_jk e_r   for k > j

with F upper triangular, Fᵀ F = H⁻¹ for the second moment H of the inputs. Rows do not interact, so the plain squared
distance chooses the path. ``shrink`` below 1 draws codes to zero, which costs fewer bits: the quadratic form of
rate-distortion optimised rounding for Gaussian weights.

Kernel: a program codes one path's rows of one matrix for a block of columns; the lanes of one warp hold the S states.
cuBLAS subtracts a block's errors from the columns after it. 36 million weights take 0.2 to 0.9 s (H200, 8 to 128
states).

Shapes: weight [B, R, C], factor [B, C, C], row_step and shrink [B, R], column_step [B, C], codes int16 [B, R, C].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.backend import select
from ..common.operators import readable
from .reference import trellis_gptq_reference
from .tables import STATES, Trellis, trellis
from .triton import trellis_gptq_triton

__all__ = ["STATES", "Trellis", "trellis", "trellis_gptq", "trellis_gptq_reference"]

LARGEST_CODE = 2**14  # codes are int16; the other half of their range is for the errors that earlier columns pass on
_TRELLIS_GPTQ = {"reference": trellis_gptq_reference, "triton": trellis_gptq_triton}


@torch.no_grad()
def trellis_gptq(
    weight: Tensor,
    factor: Tensor,
    row_step: Tensor,
    column_step: Tensor,
    *,
    states: int = 8,
    path_length: int = 256,
    shrink: Tensor | None = None,
) -> Tensor:
    """Return the codes of a stack of matrices; see the module's docstring for the formula.

    Args:
        weight: float32 [B, R, C], with columns in the order in which they are to be coded.
        factor: float32 [B, C, C], upper triangular, of the inverse second moments in the same order.
        row_step: float32 [B, R], positive; half the step of a quantiser that spends as many bits.
        column_step: float32 [B, C], positive.
        states: of `STATES`; 1 rounds every element by itself, to whole multiples of its step.
        path_length: rows of a path; every path begins in state 0. A multiple of 16.
        shrink: float32 [B, R], factors of the targets; None: 1.

    Returns int16 [B, R, C]. The kernel and the reference agree except where a tie of costs is broken by rounding.
    Raises ValueError for a wrong shape, device or number of states and, where a CPU can see them, for steps so small
    that codes would not fit int16; TypeError for a wrong dtype.
    """
    if weight.ndim != 3:
        raise ValueError(f"weight must be [B, R, C], got shape {tuple(weight.shape)}")
    B, R, C = weight.shape
    shapes = {"factor": (B, C, C), "row_step": (B, R), "column_step": (B, C), "shrink": (B, R)}
    tensors = {"weight": weight, "factor": factor, "row_step": row_step, "column_step": column_step, "shrink": shrink}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]} for weight {(B, R, C)}, got {tuple(tensor.shape)}")
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on weight's device {weight.device}, got {tensor.device}")
    if states not in STATES:
        raise ValueError(f"states must be one of {', '.join(map(str, STATES))}, got {states}")
    if path_length < 16 or path_length % 16:
        raise ValueError(f"path_length must be a multiple of 16, got {path_length}")
    if readable(weight, row_step, column_step) and weight.numel():
        largest = float((weight.abs() / (row_step[:, :, None] * column_step[:, None])).max())
        if not largest < LARGEST_CODE:
            raise ValueError(
                f"codes must stay below {LARGEST_CODE}, and a weight is {largest:,.0f} steps: raise the steps"
            )
    shrink = torch.ones_like(row_step) if shrink is None else shrink
    chosen = select("trellis_gptq", _TRELLIS_GPTQ, weight)
    return chosen(weight, factor, row_step, column_step, states=states, path_length=path_length, shrink=shrink)
