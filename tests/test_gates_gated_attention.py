"""What the streams around the attention become on GPUs that need not be there: registers, spills, accesses."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from pgolf.kernels._gated_attention_kernels import epilogue, epilogue_backward, prologue, prologue_backward
from tests.gates import check, compiling

TOKENS = 98_304  # the record's micro-step
# registers, 16-byte loads and stores of a thread: q, k or o of so many tokens, each with its pairs, cosines and sines
LIMITS = {
    "_prologue_kernel": (48, 12, 3),
    "_epilogue_kernel": (40, 3, 2),
    "_epilogue_backward_kernel": (64, 5, 3),
    "_prologue_backward_kernel": (64, 17, 4),
}


def launch(dtype, H=8, K=4, D=64, half=8, padding=0, exclude=True, gated=True):
    """All four kernels; the core wrote dq and dk in place and dv elsewhere."""
    width = (H + 2 * K) * D + H * gated + padding
    projected, o = torch.empty(TOKENS, width, dtype=dtype), torch.empty(TOKENS, H, D, dtype=dtype)
    angles, gain, dv = torch.empty(TOKENS, half, dtype=dtype), torch.empty(H), torch.empty(TOKENS, K, D, dtype=dtype)
    prologue(projected, angles, angles, gain, H, K, D, 1e-7)
    epilogue(o, projected, H, K, D, exclude, gated)
    _, _, dprojected = epilogue_backward(o.flatten(1), o, projected, H, K, D, exclude, gated)
    dq, dk = dprojected[:, : H * D].view(-1, H, D), dprojected[:, H * D : (H + K) * D].view(-1, K, D)
    prologue_backward(dq, dk, dv, projected, angles, angles, gain, dprojected, H, K, D, exclude, gated, 1e-7)


@pytest.mark.parametrize("capability, padding", [(80, 8), (90, 8), (90, 0), (100, 8)])
def test_record_model(capability: int, padding: int) -> None:
    with compiling(capability) as compiled:
        launch(torch.bfloat16, padding=padding)
    assert {kernel.name for kernel in compiled} == set(LIMITS)
    for kernel in compiled:
        if capability != 90:
            check(kernel, registers=128, shared=1024, streams=True)
            continue
        registers, loads, stores = LIMITS[kernel.name]
        check(kernel, registers=registers, shared=1024, streams=True)
        assert (kernel.count(r"LDG\.E\S*\.128"), kernel.count(r"STG\.E\S*\.128")) == (loads, stores), kernel.name
        # Besides: gains or logits; gradients of logits, delta, padding, or the gains' partial sums.
        assert kernel.count("LDG") - loads <= 2 and kernel.count("STG") - stores <= 5, kernel.name


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype=torch.float32),
        dict(dtype=torch.bfloat16, exclude=False, gated=False),
        dict(dtype=torch.bfloat16, H=4, K=2, D=24, half=4, padding=4),  # the demo's
        dict(dtype=torch.float16, H=16, K=2, D=128, half=64, padding=8),
    ],
    ids=["float32", "plain", "demo", "wide"],
)
def test_other_models(options: dict) -> None:
    with compiling(90) as compiled:
        launch(**options)
    for kernel in compiled:
        check(kernel, registers=168, shared=4096, streams=True)
