"""Second moments of the inputs of the model's products, for the quantiser's Hessians and for Newton-Muon."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pgolf.data.loader import Batch
from pgolf.model.gpt import GPT, evaluation_mode


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


def sum_second_moments(
    model: GPT, batches: Iterable[Batch], looping: bool | None = None
) -> tuple[dict[str, Tensor], int]:
    """Compute Σ xᵀx over all tokens of this rank's batches, for the inputs x of every product with a matrix.

    Runs the model in eval mode, without graphs. Each pass through a looped layer counts. Sums are float32 without TF32.

    Args:
        looping: whether the loop runs; None leaves it as it is.

    Returns one float32 [in, in] matrix for each group (see `hessian_group`), on the model's device, and the number of
    batches.
    """
    sums: dict[str, Tensor] = {}

    def observe(group: str, activation: Tensor) -> None:
        x = activation.reshape(-1, activation.size(-1))
        product = _gram(x)
        sums[group] = sums[group].add_(product) if group in sums else product

    count = 0
    with evaluation_mode(model, looping), torch.no_grad():
        for batch in batches:
            model.hidden(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, observe=observe)
            count += 1
    return sums, count


def _gram(x: Tensor) -> Tensor:
    """Compute xᵀx, float32 [in, in] without TF32, of x [tokens, in]."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # Products of 16-bit floats are exact in float32, so tensor cores lose no precision here.
        return torch.mm(x.T, x, out_dtype=torch.float32)
    x = x.float()
    with exact_float32_products():
        return x.T @ x


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
