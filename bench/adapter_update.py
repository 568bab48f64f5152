"""One optimizer step of stacks of adapters: ``python -m bench.adapter_update``.

64 groups of rank 96, as a product of width 512 has them, with a bf16 copy. `eager` is PyTorch's multi-tensor operators,
`torch_fused` its fused optimizer and the cast, both after the gradient's cast to float32.

The state starts where the formulas leave it as it is, so that a call may be repeated: after many, a wrong one is far
from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from pgolf.kernels.adapter_update import adapter_update_, adapter_update_reference_

Tensor = torch.Tensor
SHAPE = (64, 96, 512)
LR, WEIGHT_DECAY, MOMENTUM, BETA2, EPS = 0.05, 1.0, 0.5, 0.5, 1e-8
STEP = 1000.0  # at which the bias corrections are 1


def build(name: str, momentum: float, device: torch.device, quick: bool) -> Case:
    """A case of optimizer ``name``; without momentum there is no first moment."""
    groups, rows, columns = SHAPE
    shape = (groups, rows, -(-columns // 64)) if quick or device.type != "cuda" else SHAPE
    gradient = torch.randn(shape, device=device).to(torch.bfloat16)
    learning, step = torch.ones(groups, device=device, dtype=torch.bool), torch.tensor(STEP, device=device)
    wide = gradient.double()
    # p (1 - lr wd) - lr u = p, with u the sign of g for AdamW, and the buffer g + wd p + ... = 0 for SGD.
    fixed = -(wide.sign() if name == "adamw" else wide) / WEIGHT_DECAY
    first = (wide if name == "adamw" else torch.zeros_like(wide)) if momentum else None
    second = wide.square() if name == "adamw" else None

    def state() -> list[Tensor | None]:
        """Master, copy and moments."""
        masters = [None if tensor is None else tensor.float() for tensor in (fixed, first, second)]
        return [masters[0], torch.empty(shape, device=device, dtype=torch.bfloat16), *masters[1:]]

    def results(tensors: list[Tensor | None]) -> list[Tensor]:
        """Without SGD's buffer, which is 0 up to rounding."""
        skipped = 2 if name == "sgd" else None
        return [tensor for i, tensor in enumerate(tensors) if tensor is not None and i != skipped]

    def ours(function: Callable, tensors: list[Tensor | None]) -> list[Tensor]:
        master, copy, m, v = tensors
        function(
            master,
            gradient,
            copy,
            learning,
            step,
            first_moment=m,
            second_moment=v,
            optimizer=name,
            lr=LR,
            beta1=momentum,
            beta2=BETA2,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
        )
        return results(tensors)

    def torchs(tensors: list[Tensor | None], zeros: list[Tensor], steps: list[Tensor], **how: bool) -> list[Tensor]:
        """PyTorch's functional optimizers, on the gradient's float32; the step is put back so that it stays."""
        master, copy, m, v = tensors
        rates = dict(lr=LR, weight_decay=WEIGHT_DECAY, maximize=False, **how)
        if name == "adamw":
            lists = [master], [gradient.float()], [zeros[0] if m is None else m], [v], [], steps
            adamw(*lists, amsgrad=False, beta1=momentum, beta2=BETA2, eps=EPS, **rates)
            steps[0].fill_(STEP)
        else:
            sgd([master], [gradient.float()], [m], momentum=momentum, dampening=0.0, nesterov=False, **rates)
        copy.copy_(master)
        return results(tensors)

    def provider(**how: bool) -> Function:
        tensors = state()
        zeros = [torch.zeros_like(tensors[0])] if name == "adamw" and not momentum else []
        capturable = {"capturable": device.type == "cuda" and how["foreach"]} if name == "adamw" else {}
        return partial(torch.no_grad()(torchs), tensors, zeros, [step.clone()], **how, **capturable)

    def exact() -> list[Tensor]:
        return results([fixed, fixed, first, second])

    providers = {
        "eager": lambda: provider(foreach=True, fused=False),
        "torch_fused": lambda: provider(foreach=False, fused=True),
        "compile": lambda: partial(
            compiled(partial(torch.no_grad()(ours), adapter_update_reference_), device), state()
        ),
        "pgolf": lambda: partial(ours, adapter_update_, state()),
    }
    moments = sum(tensor is not None for tensor in (first, second))
    return Case(providers, exact, gradient.numel() * (2 + 2 + 8 * (1 + moments)))


CASES: dict[str, Builder] = {
    "adamw": partial(build, "adamw", MOMENTUM),
    "adamw_one_moment": partial(build, "adamw", 0.0),
    "sgd": partial(build, "sgd", MOMENTUM),
}
_CHOICES = dict(warps=(2, 4, 8), elements=(4, 8, 16, 32))
TUNING = {"adamw": Tuning(CASES["adamw_one_moment"], _CHOICES), "sgd": Tuning(CASES["sgd"], _CHOICES)}

if __name__ == "__main__":
    sys.exit(main({"adapter_update": CASES}, __doc__.splitlines()[0]))
