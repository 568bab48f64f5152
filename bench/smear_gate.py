"""SmearGate and the fused prologue (embedding, SmearGate, RMSNorm), bf16: ``python -m bench.smear_gate``.

The cases named `forward` and `forward_backward` are SmearGate, those with `prologue` before it the prologue, at the
record model's 98,304 tokens of width 512; the others end in their tokens x width. Documents have about 400 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Builder, Case, Function, Tuning, compiled, main, on_inputs, with_backward
from pgolf.kernels.smear_gate import (
    RMS_EPS,
    embed_smear_norm,
    embed_smear_norm_reference,
    smear_gate,
    smear_gate_reference,
)

VOCABULARY, GATE_WIDTH, DOCUMENT_TOKENS, BOS = 8192, 12, 400, 1
Tensor = torch.Tensor


def random_ids(tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    """[1, tokens] ids in documents; like words, few are frequent and most are rare."""
    ranks = torch.rand(tokens, device=device).pow(3) * (vocabulary - 2)
    ids = ranks.long() + 2
    ids[::DOCUMENT_TOKENS] = BOS
    return ids.unsqueeze(0)


def build(prologue: bool, backward: bool, tokens: int, width: int, device: torch.device, quick: bool) -> Case:
    """A case; ``prologue`` starts at the table of embeddings, not at the embeddings."""
    vocabulary = VOCABULARY
    if quick or device.type != "cuda":
        tokens, vocabulary = -(-tokens // 256), VOCABULARY // 16

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    ids = random_ids(tokens, vocabulary, device)
    x = random(vocabulary, width) if prologue else random(1, tokens, width)
    gate = min(GATE_WIDTH, width)
    inputs = (x, random(1, gate, dtype=torch.float32), random(1, dtype=torch.float32))
    embeddings = F.embedding(ids, x) if prologue else x
    # Without a share of the token before, the gradient of λ is a sum of noise and says nothing about correctness.
    dy = random(1, tokens, width) + 0.5 * embeddings.roll(1, 1)

    def function(op: Callable) -> Callable[..., Tensor]:
        if prologue:
            return lambda table, weight, lam: op(ids, table, weight, lam, BOS)
        return lambda x, weight, lam: op(x, ids, weight, lam, BOS)

    def provider(op: Callable, compiles: bool = False) -> Function:
        run = compiled(function(op), device) if compiles else function(op)
        return on_inputs(run, inputs, dy, backward=backward)

    def exact() -> tuple[Tensor, ...]:
        double = tuple(value.detach().double().requires_grad_() for value in inputs)
        results = with_backward(function(reference), double, dy.double())
        return results if backward else results[:1]

    reference = embed_smear_norm_reference if prologue else smear_gate_reference
    ours = embed_smear_norm if prologue else smear_gate
    providers = {
        "eager": lambda: provider(reference),
        "compile": lambda: provider(reference, compiles=True),
        "fla": lambda: provider(_fla(prologue)),
        **({"liger": lambda: provider(_liger(dy.new_ones(width)))} if prologue else {}),
        "pgolf": lambda: provider(ours),
    }
    if prologue and backward:
        providers["pgolf_atomic"] = lambda: provider(partial(ours, deterministic=False))
    forward_bytes = x.nbytes + dy.nbytes + ids.nbytes
    backward_bytes = 2 * x.nbytes + dy.nbytes + ids.nbytes
    return Case(providers, exact, forward_bytes + backward * backward_bytes)


SHAPES = {
    "_65536x768": (65_536, 768),
    "_65536x1024": (65_536, 1024),
    "_65536x384": (65_536, 384),
    "_40000x1280": (40_000, 1280),
    "_4099x70": (4099, 70),
}
CASES: dict[str, Builder] = {
    f"{'prologue_' * prologue}forward{'_backward' * backward}{name}": partial(build, prologue, backward, tokens, width)
    for name, (tokens, width) in {"": (98_304, 512), **SHAPES}.items()
    for prologue in (False, True)
    for backward in (False, True)
    if backward or not name
}
_CHOICES = dict(
    chunk=(4, 8, 16, 24, 32, 48, 64, 128),
    columns_per_warp=(64, 128, 256, 512, 1024),
    block=(64, 128, 256, 512),
    stages=(1, 2, 3, 4, 5, 6),
    rows=(4, 8, 16, 32, 64),
    join_warps=(1, 2, 4, 8),
)
TUNING = {
    **{entry: Tuning(CASES[entry], _CHOICES) for entry in ("forward", "prologue_forward")},
    "backward": Tuning(CASES["forward_backward"], _CHOICES),
    "prologue_backward": Tuning(CASES["prologue_forward_backward"], _CHOICES),
    "table_gradient": Tuning(CASES["prologue_forward_backward"], _CHOICES),
}


def _gated(x: Tensor, difference: Tensor, input_ids: Tensor, weight: Tensor, lam: Tensor, bos_id: int) -> Tensor:
    """SmearGate from the difference between each embedding and the one before it."""
    gate = lam.to(x.dtype) * torch.sigmoid(F.linear(x[..., : weight.numel()], weight.to(x.dtype)))
    inside = F.pad(input_ids[:, 1:, None] != bos_id, (0, 0, 1, 0))
    return x + gate * inside.to(x.dtype) * (x + difference)


def _fla(prologue: bool) -> Callable:
    from fla.modules.token_shift import token_shift

    def gate(x: Tensor, input_ids: Tensor, weight: Tensor, lam: Tensor, bos_id: int) -> Tensor:
        return _gated(x, token_shift(x), input_ids, weight, lam, bos_id)

    def whole(input_ids: Tensor, table: Tensor, weight: Tensor, lam: Tensor, bos_id: int) -> Tensor:
        x = gate(F.embedding(input_ids, table), input_ids, weight, lam, bos_id)
        return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)

    return whole if prologue else gate


def _liger(ones: Tensor) -> Callable:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def whole(input_ids: Tensor, table: Tensor, weight: Tensor, lam: Tensor, bos_id: int) -> Tensor:
        x = smear_gate_reference(F.embedding(input_ids, table), input_ids, weight, lam, bos_id)
        return LigerRMSNormFunction.apply(x, ones, RMS_EPS, 0.0, "llama", False)

    return whole


if __name__ == "__main__":
    sys.exit(main({"smear_gate": CASES}, __doc__.splitlines()[0]))
