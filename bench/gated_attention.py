"""The attention sublayer between its projections, bf16, at the record's shape: ``python -m bench.gated_attention``.

The cases `forward` and `forward_backward` are the whole op, with a variant of ours for each attention core; the others
one of its four streams around the core alone, a gradient without the pass before it. Documents have about 400 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from bench.smear_gate import with_backward
from pgolf.kernels import gated_attention as family
from pgolf.kernels._launch import INTERPRETED
from pgolf.kernels.gated_attention import gated_attention, gated_attention_reference, kernels

TOKENS, HEADS, KEYS, DIM, HALF = 98_304, 8, 4, 64, 8
SIZES = HEADS, KEYS, DIM
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
    """Random inputs of the op, and of its parts."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.tokens = TOKENS // 256 if quick or device.type != "cuda" else TOKENS
        self.kernels_run = device.type == "cuda" or INTERPRETED
        half = partial(torch.randn, device=device)
        self.projected = half(1, self.tokens, (HEADS + 2 * KEYS) * DIM + HEADS + PADDING).bfloat16()
        self.dy, self.o = (half(1, self.tokens, HEADS, DIM).bfloat16() for _ in range(2))
        angles = half(self.tokens, HALF)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.gain = torch.rand(HEADS, device=device).add(0.5)
        self.cu_seqlens = documents(self.tokens, device)

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        *heads, logits, _ = projected.split([HEADS * DIM, KEYS * DIM, KEYS * DIM, HEADS, PADDING], dim=-1)
        return *(x.unflatten(-1, (-1, DIM)) for x in heads), logits

    def prologue(self, projected: Tensor, gain: Tensor) -> Tensor:
        q, k, *_ = self.split(projected)
        return torch.cat(family.prologue_reference(q, k, self.cos, self.sin, gain), 2)

    def epilogue(self, o: Tensor, projected: Tensor) -> Tensor:
        *_, v, logits = self.split(projected)
        return family.epilogue_reference(o, v, logits, True)


def whole(backward: bool, device: torch.device, quick: bool) -> Case:
    """A case of the whole op."""
    i = Inputs(device, quick)
    inputs = i.projected, i.gain
    dy = i.dy.flatten(2)

    def call(op: Callable, projected: Tensor, gain: Tensor, **options: str) -> Tensor:
        angles = i.cos.to(projected.dtype), i.sin.to(projected.dtype)
        flags = dict(exclude_own_value=True, gated=True)
        return op(projected, *angles, gain, i.cu_seqlens, LONGEST, HEADS, KEYS, **flags, **options)

    def provider(op: Callable, compiles: bool = False, **options: str) -> Function:
        function = partial(call, op, **options)
        run = compiled(function, device) if compiles else function
        if not backward:
            return partial(torch.no_grad()(run), *inputs)
        return partial(with_backward, run, tuple(value.requires_grad_() for value in inputs), dy)

    def exact() -> tuple[Tensor, ...]:
        double = tuple(value.detach().double().requires_grad_() for value in inputs)
        results = with_backward(partial(call, gated_attention_reference), double, dy.double())
        return results if backward else results[:1]

    providers = {
        "eager": lambda: provider(gated_attention_reference),
        "compile": lambda: provider(gated_attention_reference, compiles=True),
        "pgolf": lambda: provider(gated_attention),
    }
    for core in family.CORES if device.type == "cuda" else ():
        if core != "sdpa":
            providers[f"pgolf_{core}"] = partial(provider, gated_attention, core=core)
    lengths = i.cu_seqlens.diff().double()
    pairs = float((lengths * (lengths + 1)).sum()) / 2
    moved = i.projected.nbytes + dy.nbytes + backward * (2 * i.projected.nbytes + dy.nbytes)
    return Case(providers, exact, moved, int(4 * HEADS * DIM * pairs * (1 + 2.5 * backward)))


def stream(name: str, backward: bool, device: torch.device, quick: bool) -> Case:
    """A case of the prologue or the epilogue."""
    i = Inputs(device, quick)
    first = name == "prologue"
    function, inputs = (i.prologue, (i.projected, i.gain)) if first else (i.epilogue, (i.o, i.projected))
    dy = torch.randn_like(function(*inputs))
    columns = HEADS * DIM + KEYS * DIM

    def relevant(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Without the columns of ``projected`` that the stream has nothing to do with."""
        a, b = gradients
        return (a[..., :columns], b) if first else (a, b[..., columns:-PADDING])

    def provider(compiles: bool = False, dtype: torch.dtype = torch.bfloat16) -> Function:
        run = compiled(function, device) if compiles else function
        if not backward:
            return partial(torch.no_grad()(run), *(x.to(dtype) for x in inputs))
        leaves = tuple(x.to(dtype).requires_grad_() for x in inputs)
        y = run(*leaves)
        return lambda: relevant(torch.autograd.grad(y, leaves, dy.to(y.dtype), retain_graph=True))

    def ours() -> Function:
        if not i.kernels_run:
            return provider()
        projected, o = i.projected[0], i.o[0]
        angles = i.cos, i.sin, i.gain
        if not backward and first:
            return lambda: kernels.prologue(projected, *angles, *SIZES, family.RMS_EPS)[None]
        if not backward:
            return lambda: kernels.epilogue(o, projected, *SIZES, True, True).view(dy.shape)
        if not first:

            def run() -> tuple[Tensor, ...]:
                do, _, dprojected = kernels.epilogue_backward(dy[0].flatten(1), o, projected, *SIZES, True, True)
                return relevant((do[None], dprojected[None]))

            return run
        # The core's dv is added to the columns at each call: it is zero.
        dprojected, dv = torch.zeros_like(projected), projected.new_zeros(i.tokens, KEYS, DIM)
        dq, dk = dy[0].split([HEADS, KEYS], dim=1)
        arguments = dq, dk, dv, projected, *angles, dprojected, *SIZES, True, True, family.RMS_EPS

        def run() -> tuple[Tensor, ...]:
            dgain = kernels.prologue_backward(*arguments)
            return relevant((dprojected[None], dgain))

        return run

    providers = {"eager": provider, "compile": partial(provider, True), "pgolf": ours}
    row = i.tokens * DIM * i.projected.element_size()
    # Heads of a token that are read and written: q, k and q^, k^ and so on.
    heads = {("prologue", False): 24, ("epilogue", False): 20, ("prologue", True): 48, ("epilogue", True): 32}
    return Case(providers, lambda: provider(dtype=torch.float64)(), row * heads[name, backward])


CASES: dict[str, Builder] = {
    "forward": partial(whole, False),
    "forward_backward": partial(whole, True),
    **{
        f"{name}{'_backward' * backward}": partial(stream, name, backward)
        for name in ("prologue", "epilogue")
        for backward in (False, True)
    },
}
_CHOICES = dict(tokens=(1, 2, 4, 8, 16), warps=(1, 2, 4, 8))
TUNING = {
    entry: Tuning(CASES[entry], _CHOICES)
    for entry in ("prologue", "epilogue", "prologue_backward", "epilogue_backward")
}

if __name__ == "__main__":
    sys.exit(main({"gated_attention": CASES}, __doc__.splitlines()[0]))
