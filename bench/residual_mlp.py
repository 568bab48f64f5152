"""The MLP with its residual, bf16: ``python -m bench.residual_mlp``.

`forward` and `forward_backward` are the whole at the record model's 98,304 tokens, width 512 and 2048 hidden units.
`up` and `gradient` are its products with an epilogue alone. `relu2` in a name stands for a negative slope of 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Builder, Case, Function, Tuning, compiled, main, on_inputs, with_backward
from pgolf.kernels.residual_mlp import residual_mlp, residual_mlp_reference
from pgolf.kernels.residual_mlp import triton as family

TOKENS, WIDTH, HIDDEN = 98_304, 512, 2048
Tensor = torch.Tensor


def _inputs(tokens: int, width: int, hidden: int, device: torch.device, quick: bool) -> list[Tensor]:
    """residual, x, up and down."""
    tokens = -(-tokens // 256) if quick or device.type != "cuda" else tokens
    shapes = (tokens, width), (tokens, width), (hidden, width), (width, hidden)
    sizes = 1, 1, width**-0.5, hidden**-0.5
    return [(size * torch.randn(shape, device=device)).bfloat16() for shape, size in zip(shapes, sizes, strict=True)]


def build(
    backward: bool, slope: float, tokens: int, width: int, hidden: int, device: torch.device, quick: bool
) -> Case:
    """The whole MLP with this slope."""
    inputs = _inputs(tokens, width, hidden, device, quick)
    dout = torch.randn_like(inputs[0])
    plain, ours = (partial(op, negative_slope=slope) for op in (residual_mlp_reference, residual_mlp))

    def provider(op: Callable[..., Tensor], compiles: bool = False) -> Function:
        run = compiled(op, device) if compiles else op
        return on_inputs(run, inputs, dout, backward=backward)

    def exact() -> tuple[Tensor, ...]:
        double = tuple(value.detach().double().requires_grad_() for value in inputs)
        results = with_backward(plain, double, dout.double())
        return results if backward else results[:1]

    providers = {
        "eager": lambda: provider(plain),
        "compile": lambda: provider(plain, compiles=True),
        "pgolf": lambda: provider(ours),
    }
    products = 4 * inputs[0].numel() * hidden
    weights = sum(value.nbytes for value in inputs[2:])
    activations = (6 if backward else 3) * inputs[0].nbytes
    return Case(providers, exact, activations + (2 if backward else 1) * weights, (3 if backward else 1) * products)


def _square(x: Tensor, up: Tensor) -> Tensor:
    return F.leaky_relu(F.linear(x, up), 0.5).square()


def _gradient(dout: Tensor, weight: Tensor, pre: Tensor) -> Tensor:
    return F.linear(dout, weight) * torch.where(pre < 0, 0.5, 2.0) * pre


def build_product(name: str, device: torch.device, quick: bool) -> Case:
    """One product with its epilogue, as in a forward that needs gradients and in the backward."""
    residual, x, up, _ = _inputs(TOKENS, WIDTH, HIDDEN, device, quick)
    operands = {"up": (x, up), "gradient": (residual, up, F.linear(x, up))}
    plain = {"up": _square, "gradient": _gradient}[name]
    epilogue = {"up": family.MARKED_SQUARE, "gradient": family.GRADIENT}[name]

    def ours() -> Function:
        if device.type != "cuda":  # where kernels are interpreted at most
            return partial(plain, *operands[name])
        a, b, *aux = operands[name]
        if name == "gradient":  # from hidden instead of pre
            aux = [family.fused_product("up", family.MARKED_SQUARE.value, x, up)]
        return partial(family.fused_product, name, epilogue.value, a, b, *aux)

    providers = {
        "eager": lambda: partial(plain, *operands[name]),
        "compile": lambda: partial(compiled(plain, device), *operands[name]),
        "pgolf": ours,
    }
    moved = sum(value.nbytes for value in operands[name]) + operands["gradient"][2].nbytes
    operations = 2 * x.numel() * HIDDEN
    return Case(providers, lambda: plain(*(value.double() for value in operands[name])), moved, operations)


CASES: dict[str, Builder] = {
    **{name: partial(build_product, name) for name in ("up", "gradient")},
    "forward": partial(build, False, 0.5, TOKENS, WIDTH, HIDDEN),
    "forward_backward": partial(build, True, 0.5, TOKENS, WIDTH, HIDDEN),
    "forward_backward_65536x768": partial(build, True, 0.5, 65_536, 768, 3072),
    "forward_backward_65536x768_relu2": partial(build, True, 0.0, 65_536, 768, 3072),
    "forward_backward_4099x70": partial(build, True, 0.5, 4099, 70, 282),
}
# `early` is for a matrix that the epilogue reads, in two subtiles, without `flatten`. What pays comes in combinations
# (two programs of 128 columns and 4 warps, or one of 256 and 8), so that one change at a time does not find it. With
# `ping_pong`, the stages of the kernel for Hopper, only `copies` matters besides.
_CHOICES = dict(
    block_m=(64, 128),
    block_n=(128, 256),
    block_k=(32, 64),
    subtiles=(1, 2, 4),
    stages=(2, 3, 4),
    warps=(4, 8),
    programs=(1, 2, 3),
    descriptors=(0, 1),
    flatten=(0, 1),
    early=(0, 1),
    ping_pong=(0, 4, 5, 6),
    copies=(0, 1),
)
TUNING = {
    "up": Tuning(CASES["up"], {**_CHOICES, "early": ()}),
    "gradient": Tuning(CASES["gradient"], _CHOICES),
}

if __name__ == "__main__":
    sys.exit(main({"residual_mlp": CASES}, __doc__.splitlines()[0]))
