"""What the kernels of all layers' weights become on GPUs that need not be there, at the record model's shapes."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.layer_weights import triton
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import check, compiling

LAYERS, WIDTH, HIDDEN = 11, 512, 2048
ORDERS = {"plain": [*range(11)], "looped": [0, 1, 2, *[3, 4, 5] * 3, 6, 7, 8, 9, 10]}


def masters() -> list[torch.Tensor]:
    shapes = [(22, WIDTH, WIDTH), (22, 256, WIDTH), (11, HIDDEN, WIDTH), (11, WIDTH, HIDDEN), (22, WIDTH), (11, 8, 24)]
    return [torch.empty(shape) for shape in shapes]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_forward(capability: int) -> None:
    with compiling(capability) as kernels:
        weights = triton._forward(*masters(), torch.bfloat16)
    assert weights.shape == (LAYERS, 1040 + WIDTH + 2 * HIDDEN, WIDTH)
    (kernel,) = kernels
    check(kernel, registers=64, shared=16_384, streams=True)
    assert kernel.count("STG") == kernel.count(r"STG\.E\S*\.128"), "stores narrower than 16 bytes"


@pytest.mark.parametrize("order, capability", [("plain", 90), ("looped", 90), ("plain", 80), ("plain", 100)])
def test_backward(order: str, capability: int) -> None:
    passes = len(ORDERS[order])
    shapes = [(1040, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)] * passes
    with compiling(capability) as kernels:
        triton._backward([torch.empty(shape).bfloat16() for shape in shapes], ORDERS[order], *masters())
    (kernel,) = kernels
    check(kernel, registers=48, shared=8192, streams=True)  # 1,280 threads or more on a multiprocessor
    narrow = kernel.count("LDG") - kernel.count(r"LDG\.E\S*\.128")
    assert narrow <= 4, "of scales only"


def test_unaligned_gradients() -> None:
    shapes = [torch.Size(shape) for shape in ((1040, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))] * 11
    odd = [torch.empty(shape.numel() + 1, dtype=torch.bfloat16)[1:].view(shape) for shape in shapes]
    with compiling(90) as kernels:
        triton._backward(odd, ORDERS["plain"], *masters())
    check(kernels[0])
