"""What Muon's list kernels become on GPUs that need not be there: registers, widths of accesses, compilations."""

from __future__ import annotations

import pytest
import torch

from bench.muon_update import BANKS, EIGHTH, REST, Shapes
from pgolf.kernels import muon_update
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

FP32, BF16 = torch.float32, torch.bfloat16
# Registers that leave an SM room for 2048 threads, or for 1536.
FULL, THREE_QUARTERS = 32, 40


def tensors(dtype: torch.dtype, shapes: Shapes = BANKS) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def compile_one(launch, capability: int = 90) -> Compiled:
    with compiling(capability) as kernels:
        launch()
    (kernel,) = kernels
    return kernel


def accesses(kernel: Compiled) -> dict[str, int]:
    """Vector loads and stores by their bytes."""
    sizes = {"16": r"\.128", "8": r"\.64"}
    return {
        f"{name} {size}": kernel.count(rf"{instruction}\.E\S*{suffix}")
        for name, instruction in (("load", "LDG"), ("store", "STG"))
        for size, suffix in sizes.items()
    }


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_momentum(capability: int) -> None:
    """fp32 gradients by 16 bytes, bf16 beside them by 8, so that a warp's loads are of one piece."""
    scale = torch.ones(())

    def launch() -> None:
        for momentum in (0.92, 0.97):  # one compilation
            muon_update.triton._momentum_update(tensors(FP32), tensors(BF16), tensors(BF16), momentum, scale, 1.0)

    kernel = compile_one(launch, capability)
    check(kernel, registers=FULL)
    rounds = 4 if capability == 90 else 2
    assert accesses(kernel) == {"load 16": rounds, "load 8": rounds, "store 16": 0, "store 8": 2 * rounds}


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_a_share(nesterov: bool) -> None:
    shares = tensors(BF16, EIGHTH)
    updates = shares if nesterov else []
    kernel = compile_one(lambda: muon_update.triton._momentum_update(shares, shares, updates, 0.9, torch.ones(()), 1.0))
    check(kernel, registers=FULL, streams=True)
    assert accesses(kernel) == {"load 16": 4, "load 8": 0, "store 16": 2 + 2 * nesterov, "store 8": 0}


@pytest.mark.parametrize("averaged, capability", [(True, 90), (False, 90), (True, 80), (False, 100)])
def test_apply(averaged: bool, capability: int) -> None:
    def launch() -> None:
        for lr in (0.026, 0.01):  # one compilation
            averages = tensors(FP32) if averaged else []
            muon_update.triton._apply_update(tensors(FP32), tensors(BF16), averages, lr, lr, 1 - lr, [lr] * len(BANKS))

    kernel = compile_one(launch, capability)
    check(kernel, registers=THREE_QUARTERS if averaged else FULL, streams=True)
    rounds = 4 if capability == 90 else 2
    wide = rounds * (1 + averaged)
    assert accesses(kernel) == {"load 16": wide, "load 8": rounds, "store 16": wide, "store 8": 0}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_squared_norm(capability: int) -> None:
    with compiling(capability) as kernels:
        muon_update.triton._squared_norm(tensors(FP32, [*REST, *BANKS]))
        norm, factor = muon_update.triton._clip_factor(torch.ones(()), 0.3)
    squares, total, clip = kernels
    check(squares, registers=FULL, shared=64)
    assert accesses(squares)["load 16"] == (8 if capability == 90 else 4)
    assert norm.dtype == factor.dtype == FP32
    for kernel in (total, clip):
        check(kernel, registers=FULL, shared=64)


def test_any_address() -> None:
    """Banks that do not begin at 16 bytes: no spills."""
    odd = [torch.empty(shape.numel() + 1)[1:].view(shape) for shape in map(torch.Size, EIGHTH)]
    for launch in (
        lambda: muon_update.triton._momentum_update(odd, odd, odd, 0.9, None, 1.0),
        lambda: muon_update.triton._apply_update(odd, odd, odd, 0.1, 0.1, 0.9, [1.0] * len(odd)),
    ):
        check(compile_one(launch), registers=80)
