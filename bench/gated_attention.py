"""The attention sublayer up to its output projection, bf16, at the record's shape: ``python -m bench.gated_attention``.

The cases `forward` and `forward_backward` are the whole op, so the projection's products, too; `pgolf_flash` takes
PyTorch's FlashAttention and operations. `prologue` makes q^ and k^ of a projection's q and k, ours in place;
`gate_logits` is the part of the product that only gates read. Documents have about 400 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, compiled, main, on_inputs, with_backward
from pgolf.kernels.common import RMS_EPS
from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.gated_attention import (
    gated_attention,
    gated_attention_reference,
    prologue_reference,
)
from pgolf.kernels.gated_attention.projection import gate_logits as logits_kernel
from pgolf.kernels.gated_attention.projection import prologue as prologue_kernel

TOKENS, WIDTH, HEADS, KEYS, DIM, HALF = 98_304, 512, 8, 4, 64, 8
GATE_WIDTH = 24
PADDING = 8  # to a multiple of 16 columns: Triton then knows that rows begin at 16 bytes
LONGEST, DOCUMENT_TOKENS = 2048, 400
Tensor = torch.Tensor


def documents(tokens: int, device: torch.device) -> Tensor:
    """Boundaries of documents whose lengths are spread as an exponential distribution, up to the longest."""
    lengths = -DOCUMENT_TOKENS * torch.rand(tokens, generator=torch.Generator().manual_seed(0)).log()
    ends = lengths.long().clamp(1, LONGEST).cumsum(0)
    ends = [end for end in ends.tolist() if end < tokens]
    return torch.tensor([0, *ends, tokens], dtype=torch.int32, device=device)


class Inputs:
    """Random inputs of the op."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.tokens = TOKENS // 256 if quick or device.type != "cuda" else TOKENS
        half = partial(torch.randn, device=device)
        self.n, self.dy = (half(1, self.tokens, width).bfloat16() for width in (WIDTH, HEADS * DIM))
        weight = half((HEADS + 2 * KEYS) * DIM + HEADS + PADDING, WIDTH) / WIDTH**0.5
        weight[-HEADS - PADDING :, GATE_WIDTH:], weight[-PADDING:] = 0, 0
        self.weight = weight.bfloat16()
        angles = half(self.tokens, HALF)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.gain = torch.rand(HEADS, device=device).add(0.5)
        self.cu_seqlens = documents(self.tokens, device)


def whole(backward: bool, device: torch.device, quick: bool, key_offset: bool = False) -> Case:
    """A case of the whole op."""
    i = Inputs(device, quick)
    inputs = i.n, i.weight, i.gain

    def call(op: Callable, n: Tensor, weight: Tensor, gain: Tensor, **options: str) -> Tensor:
        angles = i.cos.to(n.dtype), i.sin.to(n.dtype)
        flags = dict(exclude_own_value=True, gated=True, key_offset=key_offset, head_dim=DIM, gate_width=GATE_WIDTH)
        return op(n, weight, *angles, gain, i.cu_seqlens, LONGEST, HEADS, KEYS, **flags, **options)

    def provider(op: Callable, compiles: bool = False, **options: str) -> Function:
        function = partial(call, op, **options)
        run = compiled(function, device) if compiles else function
        return on_inputs(run, inputs, i.dy, backward=backward)

    def exact() -> tuple[Tensor, ...]:
        double = tuple(value.detach().double().requires_grad_() for value in inputs)
        results = with_backward(partial(call, gated_attention_reference), double, i.dy.double())
        return results if backward else results[:1]

    providers = {
        "eager": lambda: provider(gated_attention_reference),
        "compile": lambda: provider(gated_attention_reference, compiles=True),
        "pgolf": lambda: provider(gated_attention),
    }
    if device.type == "cuda":
        providers["pgolf_flash"] = partial(provider, gated_attention, core="flash")
    lengths = i.cu_seqlens.diff().double()
    pairs = float((lengths * (lengths + 1)).sum()) / 2
    moved = i.n.nbytes + i.dy.nbytes + backward * (2 * i.n.nbytes + i.dy.nbytes)
    products = 2 * i.tokens * i.weight.numel() * (1 + 2 * backward)
    return Case(providers, exact, moved, products + int(4 * HEADS * DIM * pairs * (1 + 2.5 * backward)))


def prologue(device: torch.device, quick: bool) -> Case:
    """The prologue alone; it does not rotate, so that a projection once overwritten stays as it is at later calls."""
    i = Inputs(device, quick)
    cos, sin, gain = torch.ones_like(i.cos), torch.zeros_like(i.sin), torch.ones_like(i.gain)
    projected = (i.n @ i.weight.T)[0]
    columns = (HEADS + KEYS) * DIM

    def function(projected: Tensor) -> Tensor:
        q, k = (x.unflatten(-1, (-1, DIM)) for x in projected[None, :, :columns].split([HEADS * DIM, KEYS * DIM], 2))
        return torch.cat(prologue_reference(q, k, cos, sin, gain), 2).flatten(2)[0]

    def provider(compiles: bool = False, dtype: torch.dtype = torch.bfloat16) -> Function:
        run = compiled(function, device) if compiles else function
        return partial(torch.no_grad()(run), projected.to(dtype))

    def ours() -> Function:
        if device.type != "cuda" and not INTERPRETED:
            return provider()
        buffer = projected.clone()

        def run() -> Tensor:
            prologue_kernel(buffer, cos, sin, gain, HEADS, KEYS, DIM, eps=RMS_EPS, unit=0.18)
            return buffer[:, :columns]

        return run

    providers = {"eager": provider, "compile": partial(provider, True), "pgolf": ours}
    return Case(providers, lambda: provider(dtype=torch.float64)(), 2 * i.tokens * columns * 2)


def gate_logits(device: torch.device, quick: bool) -> Case:
    """The gates' logits and the padding beside them, of the columns of n that gates read."""
    i = Inputs(device, quick)
    n, weight = i.n[0, :, :GATE_WIDTH], i.weight[-HEADS - PADDING :, :GATE_WIDTH]
    out = (i.n @ i.weight.T)[0, :, -HEADS - PADDING :]

    def provider(function: Callable) -> Function:
        return partial(torch.no_grad()(function), n, weight)

    def product(n: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(n, weight.t(), out=out)

    ours = device.type == "cuda" or INTERPRETED
    providers = {
        "eager": lambda: provider(product),
        "pgolf": lambda: provider(partial(logits_kernel, out=out) if ours else product),
    }
    return Case(providers, lambda: n.double() @ weight.double().T, n.nbytes + out.nbytes)


CASES: dict[str, Builder] = {
    "forward": partial(whole, False),
    "forward_backward": partial(whole, True),
    "offset_forward_backward": partial(whole, True, key_offset=True),
    "prologue": prologue,
    "gate_logits": gate_logits,
}
TUNING = {
    "prologue": Tuning(prologue, dict(tokens=(1, 2, 4, 8, 16), warps=(1, 2, 4, 8))),
    "gate_logits": Tuning(gate_logits, dict(rows=(32, 64, 128, 256), warps=(1, 2, 4, 8))),
    "project": Tuning(CASES["forward"], dict(ping_pong=(0, 4, 5, 6))),
}

if __name__ == "__main__":
    sys.exit(main({"gated_attention": CASES}, __doc__.splitlines()[0]))
