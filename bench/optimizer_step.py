"""A Muon step of GPT-2 small's matrices, twelve layers of 768 and 3072, float32: ``python -m bench.optimizer_step``.

`gpt2_small` has Jordan's tuple for all five steps of Newton-Schulz, `gpt2_small_polar_express` the Polar Express tuples
for packages that have these. All providers do the same work: momentum, Nesterov, Newton-Schulz, decay and update.

`pgolf` is `pgolf.optim.Muon`, `torch_muon` torch.optim.Muon, `kellerjordan` KellerJordan's SingleDeviceMuon; `dion` and
`gram_newton_schulz` are the Muon of these packages. All of them are called as a training loop does. `eager` and
`compile` are the formula alone, Newton-Schulz of a stack for each shape; `compile` has its additions inside the
products, `compile_gram` the Gram form in float16. The rates count the least arithmetic known for Newton-Schulz.

Momentum has come to rest, and weight decay takes all of the parameters, so that every step ends where the first did.
Each optimizer also trains a small model for 60 steps, from the same weights on the same tokens; a row's `losses` are
those of its steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from bench.newton_schulz import iterate_gram, operations, wide_and_normalised
from pgolf.kernels.newton_schulz import POLAR_EXPRESS, QUINTIC, Coefficients
from pgolf.optim import Muon

Tensor = torch.Tensor
LAYER = {"attention": (2304, 768), "projection": (768, 768), "up": (3072, 768), "down": (768, 3072)}
LR, WEIGHT_DECAY, MOMENTUM = 1.0, 1.0, 0.95
TUPLES: dict[str, Coefficients] = {"gpt2_small": (QUINTIC,) * 5, "gpt2_small_polar_express": POLAR_EXPRESS}

TRAINING_STEPS = 60
TRAINED = dict(lr=0.02, weight_decay=0.01)  # of the matrices
ADAMW = dict(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)  # of the table and the head


class Optimizer(NamedTuple):
    """How a package's Muon is made and keeps its momentum.

    Attributes:
        make: of the parameters, with ``lr`` and ``weight_decay``.
        buffer: name of the momentum in its state.
        at_rest: the momentum that stays, for a gradient of 1.
    """

    make: Callable[..., torch.optim.Optimizer]
    buffer: str = "momentum_buffer"
    at_rest: float = 1.0


def iterate(tuples: Coefficients, X: Tensor) -> Tensor:
    """Iterate as it is written."""
    for a, b, c in tuples:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def iterate_fused(tuples: Coefficients, X: Tensor) -> Tensor:
    """Iterate with additions inside the products."""
    for a, b, c in tuples:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def plain_step(
    orthogonalize: Callable, parameters: Sequence[Tensor], gradients: Sequence[Tensor], buffers: Sequence[Tensor]
) -> None:
    """Step by the formula, with this Newton-Schulz of stacks."""
    torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
    directions = torch._foreach_lerp(gradients, buffers, MOMENTUM)
    for shape in dict.fromkeys(parameter.shape for parameter in parameters):
        same = [i for i, parameter in enumerate(parameters) if parameter.shape == shape]
        stack = torch.stack([directions[i] for i in same])
        for i, update in zip(same, orthogonalize(stack), strict=True):
            parameters[i].mul_(1 - LR * WEIGHT_DECAY).add_(update, alpha=-LR * factor(shape))


def factor(shape: Sequence[int]) -> float:
    """Return Muon's factor on the learning rate."""
    return max(1, shape[0] / shape[1]) ** 0.5


def build(tuples: Coefficients, device: torch.device, quick: bool) -> Case:
    """Build the case of these coefficients; two layers of an eighth of the width where it is small."""
    small = quick or device.type != "cuda"
    shapes = [(rows // 8, columns // 8) if small else (rows, columns) for rows, columns in LAYER.values()]
    shapes = shapes * (2 if small else 12)
    gradients = [torch.randn(shape, device=device) for shape in shapes]

    def exact() -> list[Tensor]:
        of_one = partial(wide_and_normalised, partial(iterate, tuples), torch.float64)
        return [-LR * factor(gradient.shape) * of_one(gradient.double()) for gradient in gradients]

    def stepping(imported: Callable[[], Optimizer]) -> Function:
        optimizer = imported()
        parameters = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
        muon = optimizer.make(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()  # some packages write into it
            muon.state[parameter][optimizer.buffer] = gradient * optimizer.at_rest

        def call() -> list[Tensor]:
            muon.step()
            return [parameter.detach() for parameter in parameters]

        return call

    def formula(iterate: Callable, dtype: torch.dtype = torch.bfloat16, compiles: bool = True) -> Function:
        parameters, buffers = (
            [change(gradient) for gradient in gradients] for change in (torch.ones_like, torch.clone)
        )
        step = partial(plain_step, partial(wide_and_normalised, iterate, dtype))
        step = compiled(step, device) if compiles else step

        def call() -> list[Tensor]:
            with torch.no_grad():
                step(parameters, gradients, buffers)
            return parameters

        return call

    optimizers = polar_express_optimizers(device) if tuples == POLAR_EXPRESS else jordan_optimizers()
    providers: dict[str, Callable[[], Function]] = {
        "eager": lambda: formula(partial(iterate, tuples), compiles=False),
        "compile": lambda: formula(partial(iterate_fused, tuples)),
    }
    if tuples == POLAR_EXPRESS:
        providers["compile_gram"] = lambda: formula(iterate_gram, torch.float16)
    providers |= {name: partial(stepping, imported) for name, imported in optimizers.items()}
    trainings = {name: partial(train, imported, device, small) for name, imported in optimizers.items()}
    elements = sum(gradient.numel() for gradient in gradients)
    arithmetic = sum(operations((1, *shape)) for shape in shapes)
    return Case(providers, exact, 20 * elements, arithmetic, trainings)


# The packages' optimizers, by provider; each function imports its package.


def jordan_optimizers() -> dict[str, Callable[[], Optimizer]]:
    """Return those with Jordan's tuple."""
    return {
        "torch_muon": lambda: Optimizer(partial(torch.optim.Muon, momentum=MOMENTUM)),
        "kellerjordan": _kellerjordan,
        "pgolf": lambda: Optimizer(partial(Muon, momentum=MOMENTUM)),
    }


def polar_express_optimizers(device: torch.device) -> dict[str, Callable[[], Optimizer]]:
    """Return those with the Polar Express tuples; last those that bring CUDA graphs of their own."""
    return {
        "pgolf": lambda: Optimizer(partial(Muon, momentum=MOMENTUM, ns_coefficients=POLAR_EXPRESS)),
        "dion": partial(_dion, device),
        "gram_newton_schulz_torch": partial(_gram_newton_schulz, False),
        "gram_newton_schulz": partial(_gram_newton_schulz, True),
    }


def _kellerjordan() -> Optimizer:
    from muon import SingleDeviceMuon

    return Optimizer(partial(SingleDeviceMuon, momentum=MOMENTUM))


def _dion(device: torch.device) -> Optimizer:
    from dion import Muon as DionMuon

    def make(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Make a group for each of Muon's factors, which are not its own: a higher rate has a lower decay."""
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(factor(parameter.shape), []).append(parameter)
        given = [dict(params=same, lr=lr * by, weight_decay=weight_decay / by) for by, same in groups.items()]
        return DionMuon(given, mu=MOMENTUM, nesterov=True, adjust_lr=None, use_triton=device.type == "cuda")

    return Optimizer(make, "momentum", 1 / (1 - MOMENTUM))


def _gram_newton_schulz(kernels: bool) -> Optimizer:
    from gram_newton_schulz import Muon as GramMuon

    make = partial(
        GramMuon,
        momentum=MOMENTUM,
        adjust_lr=lambda lr, shape: lr * factor(shape),
        ns_coefficients=[list(abc) for abc in POLAR_EXPRESS],
        ns_use_kernels=kernels,
        gram_newton_schulz_restart_iterations=[2],
    )
    return Optimizer(make, "momentum", 1 / (1 - MOMENTUM))


# A training of 60 steps.


class Model(nn.Module):
    """A decoder of two layers without positions but its causal mask; calling it gives the mean loss."""

    def __init__(self, vocabulary: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(vocabulary, width))
        self.head = nn.Parameter(torch.zeros(vocabulary, width))
        shapes = dict(qkv=(3 * width, width), out=(width, width), up=(4 * width, width), down=(width, 4 * width))
        self.layers = nn.ModuleList(
            nn.ParameterDict({name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()})
            for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean loss of ids [rows, T], each predicted from those before it."""
        x = F.embedding(ids[:, :-1], self.table)
        for weights in self.layers:
            q, k, v = F.linear(self._norm(x), weights["qkv"]).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + F.linear(attended, weights["out"])
            x = x + F.linear(F.linear(self._norm(x), weights["up"]).relu().square(), weights["down"])
        return F.cross_entropy(F.linear(self._norm(x), self.head).flatten(0, 1), ids[:, 1:].flatten())

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


def tokens(step: int, vocabulary: int, rows: int, length: int) -> Tensor:
    """Return counts with a stride that each row must be read for, modulo the vocabulary; one token in ten is noise."""
    generator = torch.Generator().manual_seed(step)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = (draw(0, vocabulary, rows, 1) + draw(1, 5, rows, 1) * torch.arange(length)) % vocabulary
    return torch.where(draw(0, 10, rows, length) == 0, draw(0, vocabulary, rows, length), ids)


def train(imported: Callable[[], Optimizer], device: torch.device, small: bool) -> list[float]:
    """Train the model's matrices by this optimizer, and the rest by AdamW; return the losses."""
    vocabulary, width, heads, rows, length = (64, 32, 2, 8, 33) if small else (256, 256, 4, 32, 129)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(vocabulary, width, heads).to(device)
    optimizers: list[Any] = [
        imported().make(list(model.layers.parameters()), **TRAINED),
        torch.optim.AdamW([model.table, model.head], **ADAMW),
    ]
    losses = []
    for step in range(TRAINING_STEPS):
        loss = model(tokens(step, vocabulary, rows, length).to(device))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return [round(float(loss), 6) for loss in losses]


CASES: dict[str, Builder] = {name: partial(build, tuples) for name, tuples in TUPLES.items()}
TUNING: dict[str, Tuning] = {}

if __name__ == "__main__":
    sys.exit(main({"optimizer_step": CASES}, __doc__.splitlines()[0]))
