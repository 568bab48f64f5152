"""What the adapters' step becomes on GPUs that need not be there: registers, spills, widths of accesses."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pgolf.kernels.adapter_update.triton import launch_update
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

REGISTERS = {80: 48, 90: 72, 100: 48}


def compile_one(adamw: bool, moments: bool, scaled: bool, shape=(4, 96, 512), capability: int = 90) -> Compiled:
    master, copy = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    first, second = [master] * moments, [master] * adamw
    row_scale = torch.empty(shape[1]) if scaled else None
    learning, step = torch.ones(shape[0], dtype=torch.bool), torch.ones(())
    with compiling(capability) as kernels:
        for lr in (0.1, 0.01):  # one compilation
            launch_update(
                master, copy, copy, learning, step, first, second, row_scale, adamw, lr, 0.9 * moments, lr, lr, lr
            )
    (kernel,) = kernels
    return kernel


ON_OTHER_CHIPS = [(True, True, True), (False, False, False)]


@pytest.mark.parametrize(
    "adamw, moments, scaled, capability",
    [
        *((*case, 90) for case in product((True, False), repeat=3)),
        *((*case, c) for case in ON_OTHER_CHIPS for c in (80, 100)),
    ],
)
def test_streams(adamw: bool, moments: bool, scaled: bool, capability: int) -> None:
    """float32 by 16 bytes, bf16 beside it by 8, so that a warp's accesses are of one piece."""
    kernel = compile_one(adamw, moments, scaled, capability=capability)
    check(kernel, registers=REGISTERS[capability], shared=64, streams=True)
    rounds, stacks = 4 if capability == 90 and not adamw else 2, 1 + moments + adamw
    wide = [kernel.count(rf"{name}\.E\S*\.128") for name in ("LDG", "STG")]
    half = [kernel.count(rf"{name}\.E\S*\.64") for name in ("LDG", "STG")]
    assert wide == [rounds * stacks] * 2 and half == [rounds] * 2
    narrow = kernel.count(r"LDG\.E") - wide[0] - half[0]
    assert narrow <= 2 + scaled * rounds, "besides learning, the step and the rows' scales"


@pytest.mark.parametrize("shape", [(4, 7, 5), (3, 1000, 6)])
def test_rows_of_any_length(shape: tuple[int, ...]) -> None:
    for adamw in (True, False):
        check(compile_one(adamw, True, True, shape), registers=96)
