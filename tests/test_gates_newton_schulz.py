"""What Newton-Schulz's kernel becomes on GPUs that need not be there: registers, shared memory, instructions."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels import newton_schulz
from pgolf.kernels.common import launch
from pgolf.kernels.newton_schulz import POLAR_EXPRESS
from pgolf.kernels.newton_schulz.reference import Settings
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import check, compiling

ON_AN_H100 = [("banks_full", 90), ("banks_eighth", 90), ("odd", 90)]
ON_OTHER_CHIPS = [("banks_full", 80), ("odd", 80), ("banks_full", 100)]  # whose launch parameters are all the same


SETTINGS = Settings(POLAR_EXPRESS, "auto", torch.float16, norm_scale=1.0, eps=1e-7, row_normalize=True)


@pytest.mark.parametrize("case, capability", [*ON_AN_H100, *ON_OTHER_CHIPS])
def test_newton_schulz(case: str, capability: int) -> None:
    shapes = {
        "banks_full": [(22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)],
        "banks_eighth": [(3, 512, 512), (3, 256, 512), (2, 2048, 512), (2, 512, 2048)],
        "odd": [(1, 70, 130)],
    }[case]
    banks = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    with compiling(capability) as kernels:
        newton_schulz.triton.launch(banks, banks, SETTINGS)
    check(kernels[0], registers=64)
    kernel = kernels[1]
    entry = {"banks_full": "large", "banks_eighth": "small", "odd": "odd"}[case]
    parameters = launch.launch_parameters("newton_schulz", entry, banks[0].device)
    check(kernel, matrix_products=True, streams=case != "odd")
    if capability == 90:
        # Three tickets or looks ahead, one wait; the looks and waits forget the SM's cache; one count behind a fence.
        names = "ATOMG.E.ADD", "LDG.E.STRONG.GPU", "CCTL.IVALL", "MEMBAR.ALL.GPU", "REDG.E.ADD"
        assert [kernel.count(name) for name in names] == [3, 1, 2, 1, 1]
        assert (kernel.shared_bytes + 1024) * parameters["programs"] <= 233_472
        assert kernel.registers * 32 * parameters["warps"] * parameters["programs"] <= 65_536


def test_one_kernel_serves_any_number_of_banks() -> None:
    lists = [[(22, 512, 512)], [(1, 512, 512)] * 24, [(1, 256, 256)] * 72, [(1, 256, 256)] * 300]
    with compiling() as kernels:
        for shapes in lists:
            banks = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
            newton_schulz.triton.launch(banks, banks, SETTINGS)
    names = [kernel.name for kernel in kernels]
    assert names == ["_place_kernel", "_tasks_kernel", "_place_kernel", "_place_kernel"]  # for 1, 32 and 64 addresses
    for kernel in kernels:
        check(kernel)
