"""An optimizer step around Newton-Schulz, on the record model's banks: ``python -m bench.muon_update``.

`step` is the norm of all gradients, clipping, momentum, and the application with moving averages, to which the updates
go as they are; `norm`, `momentum` and `apply` are its parts, `momentum_eighth` that of one GPU's share of eight, whose
gradients have been sent as bf16. `eager` is the sequence of PyTorch's operators that trained before.

The state starts where the formulas leave it as it is, so that a call may be repeated: after many, a wrong one is
far from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from bench.harness import Builder, Case, Tuning, compiled, main
from pgolf.kernels.muon_update import apply_update, clip_factor, momentum_update, squared_norm

Tensor = torch.Tensor
Shapes = Sequence[tuple[int, ...]]
BANKS: Shapes = ((11, 2048, 512), (11, 512, 2048), (22, 512, 512), (22, 256, 512))
EIGHTH: Shapes = ((2, 2048, 512), (2, 512, 2048), (3, 512, 512), (3, 256, 512))
REST: Shapes = (
    (8192, 512),
    (8, 512),
    (8, 512),
    (11, 2, 2),
    (11, 2),
    (1,),
    (1, 12),
    *((512,), (512,), (2, 512), (8,), (8, 24)) * 11,
)
LR, WEIGHT_DECAY, MOMENTUM, DECAY = 0.05, 1.0, 0.5, 0.5


class State(NamedTuple):
    """Gradients of banks and of the rest, and what a step changes."""

    gradients: list[Tensor]
    rest: list[Tensor]
    buffers: list[Tensor]
    parameters: list[Tensor]
    averages: list[Tensor]


def factor(shape: Sequence[int]) -> float:
    """Muon's factor on the learning rate."""
    return max(1, shape[-2] / shape[-1]) ** 0.5


def old_step(parts: Sequence[str], limit: float, state: State) -> list[Tensor]:
    """The sequence of operators, with the cast that made the gradients ready to be sent."""
    results, scale = [], 1.0
    updates = state.buffers
    gradients = [g.to(torch.bfloat16) for g in state.gradients] if parts != ("apply",) else []
    if "norm" in parts:
        squares = sum(g.float().square().sum() for g in gradients)
        norms = torch._foreach_norm(state.rest)
        norm = (squares + torch.stack([n.float() for n in norms]).square().sum()).sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        results += [norm, scale]
    if "momentum" in parts:
        updates = []
        for gradient, buffer in zip(gradients, state.buffers, strict=True):
            gradient = gradient * scale
            buffer.mul_(MOMENTUM).add_(gradient)
            updates.append(gradient.add(buffer, alpha=MOMENTUM))
        results += [*updates, *state.buffers]
    if "apply" in parts:
        for p, update in zip(state.parameters, updates, strict=True):
            p.mul_(1 - LR * WEIGHT_DECAY)
            p.add_(update.to(p.dtype), alpha=-LR * factor(p.shape))
        torch._foreach_lerp_(state.averages, [p.float() for p in state.parameters], 1 - DECAY)
        results += [*state.parameters, *state.averages]
    return results


def step(parts: Sequence[str], limit: float, state: State) -> list[Tensor]:
    """The same with the ops."""
    results, scale = [], 1.0
    updates = state.buffers
    if "norm" in parts:
        norm, scale = clip_factor(squared_norm([*state.rest, *state.gradients]), limit)
        results += [norm, scale]
    if "momentum" in parts:
        updates = momentum_update(state.gradients, state.buffers, MOMENTUM, scale)
        results += [*updates, *state.buffers]
    if "apply" in parts:
        apply_update(state.parameters, updates, LR, WEIGHT_DECAY, state.averages, DECAY)
        results += [*state.parameters, *state.averages]
    return results


def build(parts: Sequence[str], banks: Shapes, gradient_dtype: torch.dtype, device: torch.device, quick: bool) -> Case:
    """A case of these parts."""
    rest = REST if "norm" in parts else ()
    if quick or device.type != "cuda":
        banks, rest = ([(*shape[:-1], -(-shape[-1] // 64)) for shape in shapes] for shapes in (banks, rest))
    gradients = [torch.randn(shape, device=device).to(gradient_dtype) for shape in banks]
    rest = [torch.randn(shape, device=device) for shape in rest]
    norm = torch.stack([g.double().norm() for g in (*gradients, *rest)]).norm()
    limit, scale = (0.5 * float(norm), 0.5) if "norm" in parts else (1.0, 1.0)
    fixed = [scale / (1 - MOMENTUM) * gradient.double() for gradient in gradients]
    moved = [-factor(update.shape) / WEIGHT_DECAY * update for update in fixed]

    def state() -> State:
        parameters, averages = ([tensor.float() for tensor in moved] for _ in range(2))
        return State(gradients, rest, [buffer.to(torch.bfloat16) for buffer in fixed], parameters, averages)

    def provider(function: Callable, compiles: bool = False) -> Callable[[], list[Tensor]]:
        run = compiled(partial(function, parts, limit), device) if compiles else partial(function, parts, limit)
        return partial(torch.no_grad()(run), state())

    def exact() -> list[Tensor]:
        results = [norm, torch.tensor(scale, dtype=torch.float64, device=device)] if "norm" in parts else []
        results += [*fixed, *fixed] if "momentum" in parts else []
        return [*results, *moved, *moved] if "apply" in parts else results

    providers = {
        "eager": lambda: provider(old_step),
        "compile": lambda: provider(old_step, compiles=True),
        "pgolf": lambda: provider(step),
    }
    count, size = sum(gradient.numel() for gradient in gradients), gradients[0].element_size()
    moved_bytes = {"norm": size, "momentum": size + 6, "apply": 18}
    return Case(providers, exact, count * sum(moved_bytes[part] for part in parts) + sum(r.nbytes for r in rest))


CASES: dict[str, Builder] = {
    "step": partial(build, ("norm", "momentum", "apply"), BANKS, torch.float32),
    "norm": partial(build, ("norm",), BANKS, torch.float32),
    "momentum": partial(build, ("momentum",), BANKS, torch.float32),
    "momentum_eighth": partial(build, ("momentum",), EIGHTH, torch.bfloat16),
    "apply": partial(build, ("apply",), BANKS, torch.float32),
}
_CHOICES = dict(warps=(2, 4, 8, 16), elements=(8, 16, 32, 64))
TUNING = {
    "squares": Tuning(CASES["norm"], _CHOICES),
    "momentum": Tuning(CASES["momentum"], _CHOICES),
    "apply": Tuning(CASES["apply"], _CHOICES),
}

if __name__ == "__main__":
    sys.exit(main({"muon_update": CASES}, __doc__.splitlines()[0]))
