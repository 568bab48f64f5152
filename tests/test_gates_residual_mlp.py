"""What the MLP's products become on GPUs that need not be there: registers, spills, shared memory, instructions."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels import residual_mlp as family
from pgolf.kernels._launch import launch_parameters
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

EPILOGUES = {"up": family.MARKED_SQUARE, "plain": family.SQUARE, "gradient": family.GRADIENT}


def compile_product(name: str, tokens: int, d: int, m: int, dtype: torch.dtype, capability: int) -> Compiled:
    x, hidden = torch.empty(tokens, d, dtype=dtype), torch.empty(tokens, m, dtype=dtype)
    up = torch.empty(m, d, dtype=dtype)
    operands = (x, up, hidden) if name == "gradient" else (x, up)
    with compiling(capability) as kernels:
        family._product(name.replace("plain", "up"), EPILOGUES[name].value, *operands)
    (kernel,) = kernels
    return kernel


@pytest.mark.parametrize("tokens, d, m", [(98_304, 512, 2048), (65_541, 768, 3072)])
@pytest.mark.parametrize("name", EPILOGUES)
def test_products_on_an_h100(name: str, tokens: int, d: int, m: int) -> None:
    kernel = compile_product(name, tokens, d, m, torch.bfloat16, 90)
    tuned = launch_parameters("residual_mlp", name.replace("plain", "up"), torch.device("cpu"))
    check(kernel, matrix_products=True)
    assert kernel.registers * 32 * tuned["warps"] * tuned["programs"] <= 65_536
    assert (kernel.shared_bytes + 1024) * tuned["programs"] <= 233_472
    # The largest matrix instruction, as often as a step in depth needs it; everything by tensor memory access, but
    # what is read early.
    rows = 128 * tuned["warps"] // 8
    steps = tuned["block_m"] // rows * tuned["block_k"] // 16
    assert kernel.count(rf"HGMMA\.64x{tuned['block_n']}x16") == kernel.count("HGMMA") == steps
    assert kernel.count("UTMALDG") and kernel.count("UTMASTG") and not kernel.count(r"STG\.E")
    early = tuned["early"] and name == "gradient"
    elements = tuned["block_m"] * tuned["block_n"] // (32 * tuned["warps"])
    assert kernel.count(r"LDG\.E") == kernel.count(r"LDG\.E\S*\.128") == (elements // 8 if early else 0)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("name", EPILOGUES)
def test_products_on_other_chips(name: str, capability: int) -> None:
    kernel = compile_product(name, 98_304, 512, 2048, torch.bfloat16, capability)
    check(kernel, registers=168, matrix_products=True, streams=name == "gradient")
    assert kernel.count(r"LDGSTS\.E\S*\.128"), f"{kernel.name}: no asynchronous copies of 16 bytes"
    assert kernel.count(r"STG\.E") == kernel.count(r"STG\.E\S*\.128")


@pytest.mark.parametrize("name", EPILOGUES)
def test_products_in_float16(name: str) -> None:
    check(compile_product(name, 1000, 512, 2048, torch.float16, 90), matrix_products=True)


def test_scale_gradient() -> None:
    gradient, down, scale = torch.empty(512, 2048), torch.empty(512, 2048).bfloat16(), torch.empty(512).bfloat16()
    with compiling(90) as kernels:
        family._scale_gradient(gradient, down, scale)
    check(kernels[0], registers=64, shared=1024, streams=True)
