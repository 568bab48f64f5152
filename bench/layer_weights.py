"""All layers' weights of the record model from their float32 banks, bf16: ``python -m bench.layer_weights``.

`plain` runs every layer once, `looped` three of the eleven three times, which autograd adds up for the opponents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from pgolf.kernels.layer_weights import layer_weights, layer_weights_reference

ORDERS = {"plain": [*range(11)], "looped": [0, 1, 2, *[3, 4, 5] * 3, 6, 7, 8, 9, 10]}
Tensor = torch.Tensor


def build(order: list[int], backward: bool, device: torch.device, quick: bool) -> Case:
    """The matrices of all passes and, with ``backward``, the gradients of the banks."""
    d = 32 if quick or device.type != "cuda" else 512
    shapes = (22, d, d), (22, d // 2, d), (11, 4 * d, d), (11, d, 4 * d), (22, d), (11, 8, 24)
    masters = [torch.randn(shape, device=device) for shape in shapes]
    matrices = [matrix for each in layer_weights(*masters, torch.bfloat16, order) for matrix in each]
    # A share of what is multiplied with them, without which the scales' gradients are sums of noise.
    douts = [(torch.randn(matrix.shape, device=device) + matrix).bfloat16() for matrix in matrices]

    def run(op: Callable, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        results = [matrix for each in op(*leaves, dtype, order) for matrix in each]
        if not backward:
            return results
        gradients = torch.autograd.grad(results, leaves, [dout.to(dtype) for dout in douts])
        return [*(result.detach() for result in results), *gradients]

    def provider(op: Callable, wide: torch.dtype = torch.float32, dtype: torch.dtype = torch.bfloat16) -> Function:
        leaves = [master.to(wide).requires_grad_(backward) for master in masters]
        return partial(run, op, leaves, dtype)

    providers = {
        "eager": lambda: provider(layer_weights_reference),
        "compile": lambda: provider(compiled(layer_weights_reference, device)),
        "pgolf": lambda: provider(layer_weights),
    }
    exact = provider(layer_weights_reference, torch.float64, torch.float64)
    banks, layer = sum(master.nbytes for master in masters), sum(matrix.nbytes for matrix in matrices[:4])
    moved = banks + 11 * layer
    if backward:  # for the scales' gradients outputs are read again
        moved += len(order) * layer + banks + masters[0].nbytes // 2 + masters[3].nbytes
    return Case(providers, exact, moved)


CASES: dict[str, Builder] = {
    "forward": partial(build, ORDERS["plain"], False),
    **{f"{name}_forward_backward": partial(build, order, True) for name, order in ORDERS.items()},
}
TUNING = {
    "forward": Tuning(CASES["forward"], dict(block=(32, 64, 128), warps=(2, 4, 8))),
    "backward": Tuning(CASES["looped_forward_backward"], dict(block=(1024, 2048, 4096, 8192), warps=(2, 4, 8))),
}

if __name__ == "__main__":
    sys.exit(main({"layer_weights": CASES}, __doc__.splitlines()[0]))
