"""The last step of a sum over a whole GPU: one small kernel adds the programs' partial sums in a fixed order."""

from __future__ import annotations

import torch

from .compiling import jit, tl


@jit(do_not_specialize=["count"])
def _partial_sums_kernel(
    parts,
    out,
    count,
    part_stride,
    stride,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns < WIDTH)[None, :]
    total = tl.zeros((PARTS, COLUMNS), parts.dtype.element_ty)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += tl.load(parts + part * part_stride + columns[None, :] * stride, mask=inside & (part < count), other=0)
    tl.store(out + columns, tl.sum(total, 0), mask=columns < WIDTH)


def partial_sums(parts: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sums over the rows of parts [count, width], in ``out`` [width] if given.

    parts is float32 or float64 with one contiguous dimension. Every sum is taken in the same order at every call.
    """
    count, width = parts.shape
    out = parts.new_empty(width) if out is None else out
    rows, columns = (256, 16) if parts.stride(1) == 1 else (1024, 1)
    with torch.cuda.device_of(parts):  # Triton launches on the current device
        _partial_sums_kernel[(-(-width // columns),)](
            parts, out, count, *parts.stride(), WIDTH=width, PARTS=rows, COLUMNS=columns, num_warps=8
        )
    return out
