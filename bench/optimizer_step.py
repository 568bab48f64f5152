"""A Muon step of GPT-2 small's matrices, twelve layers of 768 and 3072, float32: ``python -m bench.optimizer_step``.

`pgolf` is `pgolf.optim.Muon`, `torch_muon` torch.optim.Muon, both as a training loop calls them. `eager` and `compile`
are the formula alone, Newton-Schulz of a stack for each shape; `compile` has its additions inside the products. The
rates count the least arithmetic known for Newton-Schulz.

Momentum has come to rest, and weight decay takes all of the parameters, so that every step ends where the first did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from bench.newton_schulz import operations, wide_and_normalised
from pgolf.kernels.newton_schulz import QUINTIC
from pgolf.optim import Muon

Tensor = torch.Tensor
LAYER = {"attention": (2304, 768), "projection": (768, 768), "up": (3072, 768), "down": (768, 3072)}
LR, WEIGHT_DECAY, MOMENTUM = 1.0, 1.0, 0.95


def iterate(X: Tensor) -> Tensor:
    """Five steps with Jordan's coefficients."""
    a, b, c = QUINTIC
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def iterate_fused(X: Tensor) -> Tensor:
    """The same with additions inside the products."""
    a, b, c = QUINTIC
    for _ in range(5):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def plain_step(
    iterate: Callable, parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor]
) -> None:
    """The formula, with this iteration."""
    torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
    directions = torch._foreach_lerp(gradients, buffers, MOMENTUM)
    for shape in dict.fromkeys(parameter.shape for parameter in parameters):
        same = [i for i, parameter in enumerate(parameters) if parameter.shape == shape]
        stack = torch.stack([directions[i] for i in same])
        for i, update in zip(same, wide_and_normalised(iterate, torch.bfloat16, stack), strict=True):
            parameters[i].mul_(1 - LR * WEIGHT_DECAY).add_(update, alpha=-LR * factor(shape))


def factor(shape: Sequence[int]) -> float:
    """Muon's factor on the learning rate."""
    return max(1, shape[0] / shape[1]) ** 0.5


def build(device: torch.device, quick: bool) -> Case:
    """The case; two layers of an eighth of the width where it is small."""
    small = quick or device.type != "cuda"
    shapes = [(rows // 8, columns // 8) if small else (rows, columns) for rows, columns in LAYER.values()]
    shapes = shapes * (2 if small else 12)
    gradients = [torch.randn(shape, device=device) for shape in shapes]

    def exact() -> list[Tensor]:
        of_one = partial(wide_and_normalised, iterate, torch.float64)
        return [-LR * factor(gradient.shape) * of_one(gradient.double()) for gradient in gradients]

    def training(optimizer: Callable) -> Function:
        parameters = [torch.nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
        muon = optimizer(parameters, lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
            muon.state[parameter]["momentum_buffer"] = gradient.clone()

        def call() -> list[Tensor]:
            muon.step()
            return [parameter.detach() for parameter in parameters]

        return call

    def formula(step: Callable) -> Function:
        parameters, buffers = (
            [change(gradient) for gradient in gradients] for change in (torch.ones_like, torch.clone)
        )

        def call() -> list[Tensor]:
            with torch.no_grad():
                step(parameters, gradients, buffers)
            return parameters

        return call

    providers = {
        "eager": lambda: formula(partial(plain_step, iterate)),
        "compile": lambda: formula(compiled(partial(plain_step, iterate_fused), device)),
        "torch_muon": lambda: training(torch.optim.Muon),
        "pgolf": lambda: training(Muon),
    }
    elements = sum(gradient.numel() for gradient in gradients)
    return Case(providers, exact, 20 * elements, sum(operations((1, *shape)) for shape in shapes))


CASES: dict[str, Builder] = {"gpt2_small": build}
TUNING: dict[str, Tuning] = {}

if __name__ == "__main__":
    sys.exit(main({"optimizer_step": CASES}, __doc__.splitlines()[0]))
