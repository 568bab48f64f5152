"""What the projection's small kernels become on GPUs that need not be there: registers, spills, accesses."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from pgolf.kernels.gated_attention.projection import gate_logits, prologue
from tests.gates import check, compiling

TOKENS = 98_304  # the record's micro-step


def launch(dtype, H=8, K=4, D=64, half=8, padding=8, period=TOKENS):
    projected = torch.empty(TOKENS, (H + 2 * K) * D + H + padding, dtype=dtype)
    angles = torch.empty(period, half, dtype=dtype)
    prologue(projected, angles, angles, torch.empty(H), H, K, D, eps=1e-7, unit=0.18)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_record_model(capability: int) -> None:
    with compiling(capability) as compiled:
        launch(torch.bfloat16)
    (kernel,) = compiled
    check(kernel, registers=80, shared=1024, streams=True)
    if capability == 90:
        assert kernel.registers <= 48
        # Of a thread's two heads: it, its pairs, cosines and sines, gain; it and 1 / rms.
        assert (kernel.count(r"LDG\.E\S*\.128"), kernel.count("LDG")) == (8, 10)
        assert (kernel.count(r"STG\.E\S*\.128"), kernel.count("STG")) == (2, 3)
    assert kernel.sass.index("BAR.SYNC") < kernel.sass.index("STG")


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype=torch.float32),
        dict(dtype=torch.bfloat16, period=1024),
        dict(dtype=torch.bfloat16, H=4, K=2, D=32, half=4, padding=4),
        dict(dtype=torch.bfloat16, H=16, K=2, D=128, half=64, padding=0),
        dict(dtype=torch.bfloat16, H=6, K=3, half=0, padding=2),
    ],
    ids=["float32", "rows", "narrow", "wide", "no rotation"],
)
def test_other_models(options: dict) -> None:
    with compiling(90) as compiled:
        launch(**options)
    for kernel in compiled:
        check(kernel, registers=200, shared=4096, streams=True)


def launch_gate_logits(dtype, depth: int = 24, columns: int = 16) -> None:
    n, weight = torch.empty(TOKENS, 512, dtype=dtype), torch.empty(1024 + columns, 512, dtype=dtype)
    projected = torch.empty(TOKENS, 1024 + columns, dtype=dtype)
    gate_logits(n[:, :depth], weight[1024:, :depth], projected[:, 1024:])


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_gate_logits_of_the_record_model(capability: int) -> None:
    with compiling(capability) as compiled:
        launch_gate_logits(torch.bfloat16)
    (kernel,) = compiled
    check(kernel, registers=48, shared=10_240, matrix_products=True, streams=True)
    if capability == 90:
        # A thread's 4 parts of rows, then one element of the weight; its logits.
        assert (kernel.count(r"LDG\.E\S*\.128"), kernel.count("LDG")) == (4, 5)
        assert kernel.count(r"STG\.E\S*\.128") == kernel.count("STG") == 2


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype=torch.float16),
        dict(dtype=torch.bfloat16, depth=5, columns=4),
        dict(dtype=torch.bfloat16, depth=128, columns=128),
    ],
    ids=["float16", "narrow", "wide"],
)
def test_gate_logits_of_other_models(options: dict) -> None:
    with compiling(90) as compiled:
        launch_gate_logits(**options)
    (kernel,) = compiled
    check(kernel, matrix_products=True)
