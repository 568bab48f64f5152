"""Calibration: the Hessians of the inputs of every quantised product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.artifact.quantized import QuantizeError
from pgolf.data.loader import Batch
from pgolf.model.gpt import GPT, evaluation_mode

DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # times the Hessian's mean diagonal; the first that gives a Cholesky factor is used


def hessian_group(name: str, tied: bool = True) -> str | None:
    """Return the group of tensors with the same input, whose Hessian tensor ``name`` uses.

    Examples: ``blocks.3.attn.c_k.weight`` gives ``blocks.3.attn.qkv``; ``tok_emb.weight`` gives ``tok_emb``. With an
    untied head (``tied`` False), ``lm_head.weight`` gives ``tok_emb``, and the embedding, which is no product, None.
    """
    base = name.removesuffix(".weight")
    if base == "lm_head":
        return "tok_emb"
    if base == "tok_emb":
        return "tok_emb" if tied else None
    for projection in ("c_q", "c_k", "c_v"):
        base = base.replace(f".attn.{projection}", ".attn.qkv")
    return base


def collect_hessians(model: GPT, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Compute Σ xᵀx over all tokens, divided by the number of batches, for the inputs x of every quantised product.

    Runs the model in eval mode with the loop on; each pass through a looped layer counts. Sums are float32 without
    TF32. With several ranks, each passes its own batches, and all return the average over all batches.

    Args:
        batches: this rank's calibration batches, at least one.

    Returns one float32 [in, in] matrix for each group (see `hessian_group`), on the model's device.
    Raises QuantizeError, on all ranks, if any rank had no batch.
    """
    sums: dict[str, Tensor] = {}

    def observe(group: str, activation: Tensor) -> None:
        x = activation.reshape(-1, activation.size(-1))
        product = _gram(x)
        sums[group] = sums[group].add_(product) if group in sums else product

    count = 0
    with evaluation_mode(model, looping=True), torch.no_grad():
        for batch in batches:
            model.hidden(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, observe=observe)
            count += 1
    return _average_over_ranks(sums, count, next(model.parameters()).device)


def _gram(x: Tensor) -> Tensor:
    """Compute xᵀx, float32 [in, in] without TF32, of x [tokens, in]."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # Products of 16-bit floats are exact in float32, so tensor cores lose no precision here.
        return torch.mm(x.T, x, out_dtype=torch.float32)
    x = x.float()
    with exact_float32_products():
        return x.T @ x


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


@contextmanager
def exact_float32_products() -> Iterator[None]:
    """Compute matrix products of float32 tensors without TF32 inside the context."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
