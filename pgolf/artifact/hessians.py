"""Calibration: the Hessians of the inputs of every quantised product."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.artifact.quantized import QuantizeError
from pgolf.data.loader import Batch
from pgolf.model.gpt import GPT
from pgolf.model.second_moments import sum_second_moments

DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # times the Hessian's mean diagonal; the first that gives a Cholesky factor is used


def collect_hessians(model: GPT, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Compute Σ xᵀx over all tokens, divided by the number of batches, for the inputs x of every quantised product.

    Runs the model in eval mode with the loop on; each pass through a looped layer counts. Sums are float32 without
    TF32. With several ranks, each passes its own batches, and all return the average over all batches.

    Args:
        batches: this rank's calibration batches, at least one.

    Returns one float32 [in, in] matrix for each group (see `hessian_group`), on the model's device.
    Raises QuantizeError, on all ranks, if any rank had no batch.
    """
    sums, count = sum_second_moments(model, batches, looping=True)
    return _average_over_ranks(sums, count, next(model.parameters()).device)


def _average_over_ranks(sums: dict[str, Tensor], count: int, device: torch.device) -> dict[str, Tensor]:
    distributed = dist.is_available() and dist.is_initialized()
    tally = torch.tensor([count, count == 0], device=device, dtype=torch.int64)
    if distributed:
        dist.all_reduce(tally)
    total, idle = tally.tolist()
    if idle:
        raise QuantizeError(f"calibration needs at least one batch on every rank, and {idle} had none: check the data")
    for _, hessian in sorted(sums.items()):
        if distributed:
            dist.all_reduce(hessian)
        hessian.div_(total)
    return sums
