"""Calibration: the Hessians of the inputs of every quantised product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.artifact.quantized import QuantizeError
from pgolf.data.loader import Batch
from pgolf.model.gpt import GPT

DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # of the Hessian's mean diagonal; the first that gives a Cholesky factor counts


def hessian_group(name: str, tied: bool = True) -> str | None:
    """The group of tensors, by their common input, whose Hessian serves tensor ``name``.

    ``blocks.3.attn.c_k.weight`` → ``blocks.3.attn.qkv``, ``tok_emb.weight`` → ``tok_emb``. With an untied head
    (``tied`` False) ``lm_head.weight`` takes ``tok_emb``, and the embedding, then only looked up, has none: None.
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
    """Σ xᵀx over all tokens, divided by the number of batches, for the inputs x of every quantised product.

    Runs in eval mode with looping on (every pass through a looped layer counts) and puts the model back as it was.
    Sums are float32 without TF32. With several ranks each gives its own batches, and all get the average over all.

    Args:
        model: on the device to run on.
        batches: this rank's calibration batches, at least one.

    Returns one float32 [in, in] matrix a group (see `hessian_group`), on the model's device.
    Raises QuantizeError, on all ranks alike, when a rank had no batch.
    """
    sums: dict[str, Tensor] = {}

    def observe(group: str, activation: Tensor) -> None:
        x = activation.reshape(-1, activation.size(-1))
        product = _gram(x)
        sums[group] = sums[group].add_(product) if group in sums else product

    was_training, was_looping = model.training, model.looping_active
    model.eval()
    model.looping_active = True
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                model.hidden(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, observe=observe)
                count += 1
    finally:
        model.train(was_training)
        model.looping_active = was_looping
    return _average_over_ranks(sums, count, next(model.parameters()).device)


def _gram(x: Tensor) -> Tensor:
    """xᵀx in float32 without TF32, [in, in] of x [tokens, in]."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # Products of 16-bit floats are exact in float32, so the fast matrix units lose nothing here.
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
    """Matrix products of float32 tensors do not use TF32 inside."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
