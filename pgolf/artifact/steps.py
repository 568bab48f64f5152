"""Steps of codes on a trellis: a row's times a column's, each a whole power of 2^(1/16)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OCTAVE = 16  # increase of an exponent that doubles the step


def step_sizes(exponent: Tensor) -> Tensor:
    """Return the steps of exponents, float32 on their device. They are computed on the host: devices' pow differ."""
    whole = exponent.cpu().numpy() // OCTAVE
    part = np.array([2.0 ** (i / OCTAVE) for i in range(OCTAVE)], np.float32)[exponent.cpu().numpy() - whole * OCTAVE]
    return torch.from_numpy(np.ldexp(part, whole)).to(exponent.device)


def dequantize_codes(codes: Tensor, row_exponent: Tensor, column_exponent: Tensor, *, states: int) -> Tensor:
    """Return the weights float32 [R, C] of codes int16 [R, C] and the exponents int16 of rows [R] and columns [C].

    On a trellis a code stands for half a step: neighbouring codes of one parity are a step apart.
    """
    rows = step_sizes(row_exponent - (OCTAVE if states > 1 else 0)).to(codes.device)
    return codes.float() * rows[:, None] * step_sizes(column_exponent).to(codes.device)
