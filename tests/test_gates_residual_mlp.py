"""What the MLP's products become on GPUs that need not be there: registers, spills, shared memory, instructions."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.common import hopper_product as hopper
from pgolf.kernels.common.launch import launch_parameters
from pgolf.kernels.residual_mlp import triton as family
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

EPILOGUES = {"up": family.MARKED_SQUARE, "plain": family.SQUARE, "gradient": family.GRADIENT}


def compile_product(
    name: str, tokens: int, d: int, m: int, dtype: torch.dtype, capability: int, monkeypatch=None, slope: float = 0.5
) -> Compiled:
    """The kernel that would be launched; with ``monkeypatch`` the one for all chips."""
    if monkeypatch:
        monkeypatch.setattr(family, "fits", lambda *_: False)
    x, hidden = torch.empty(tokens, d, dtype=dtype), torch.empty(tokens, m, dtype=dtype)
    up = torch.empty(m, d, dtype=dtype)
    operands = (x, up, hidden) if name == "gradient" else (x, up)
    with compiling(capability) as kernels:
        family.fused_product(name.replace("plain", "up"), EPILOGUES[name].value, *operands, slope=slope)
    (kernel,) = kernels
    return kernel


@pytest.mark.parametrize("tokens, d, m", [(98_304, 512, 2048), (65_541, 768, 3072)])
@pytest.mark.parametrize("name", EPILOGUES)
def test_products_on_an_h100(monkeypatch, name: str, tokens: int, d: int, m: int) -> None:
    kernel = compile_product(name, tokens, d, m, torch.bfloat16, 90, monkeypatch)
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


@pytest.mark.parametrize("tokens, d, m", [(98_304, 512, 2048), (2, 640, 384)])
@pytest.mark.parametrize(
    ("name", "slope"), [("up", 0.5), ("plain", 0.5), ("gradient", 0.5), ("plain", 0.0), ("gradient", 0.0)]
)
def test_ping_pong_on_an_h100(name: str, slope: float, tokens: int, d: int, m: int) -> None:
    kernel = compile_product(name, tokens, d, m, torch.bfloat16, 90, slope=slope)
    assert kernel.name == "_ping_pong_kernel"
    check(kernel, registers=168, matrix_products=True)
    assert kernel.shared_bytes <= min(14, d // 64 + 6) * 16_384 + 512
    # Twelve warps begin with 168 registers; consumers go on with 240. Each has a first step and a loop, without a wait
    # but the step's own and the last.
    assert kernel.count(r"USETMAXREG\S*\s+(UP\d, )?0xf0") == 2 and kernel.count(r"USETMAXREG\S*\s+(UP\d, )?0x18")
    assert kernel.count(r"HGMMA\.64x128x16") == kernel.count("HGMMA") == 2 * 2 * 8
    assert kernel.count(r"WARPGROUP\.DEPBAR") == 2 * 3
    # The last stage goes back at once, not under the epilogue.
    assert kernel.count(r"DEPBAR\.LE gsb0, 0x0 .*\n(.*\n){1,12}.*SYNCS\.ARRIVE") == 2
    assert kernel.count(r"UTMALDG\.5D") == kernel.count(r"UTMALDG\.2D") > 0 and not kernel.count("UTMASTG")
    # Nothing goes through shared memory on its way out or, of aux, in.
    assert kernel.count(r"STG\.E") == kernel.count(r"STG\.E\S*\.128") == 2 * 16
    assert kernel.count(r"LDG\.E") == kernel.count(r"LDG\.E\S*\.128") == (2 * 16 if name == "gradient" else 0)
    assert not kernel.count("STSM") and kernel.count("STS") <= 2


def test_which_products_ping_pong() -> None:
    a, b = torch.empty(9, 512).bfloat16(), torch.empty(256, 512).bfloat16()
    with compiling(90):
        assert hopper.fits(a, b, 6) and hopper.fits(a[:, :256], b[:, :256], 6) and hopper.fits(a, b, 4)
        assert not hopper.fits(a, b, 0) and not hopper.fits(a, b[:200], 6)
        for k in (8, 128, 264, 704, 2048):
            assert not hopper.fits(a.new_empty(9, k), b.new_empty(256, k), 6)
        assert not hopper.fits(a.new_empty(1).expand(2**31 - 1, 512), b, 6)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize(("name", "slope"), [("up", 0.5), ("plain", 0.5), ("gradient", 0.5), ("gradient", 0.0)])
def test_products_on_other_chips(name: str, slope: float, capability: int) -> None:
    kernel = compile_product(name, 98_304, 512, 2048, torch.bfloat16, capability, slope=slope)
    check(kernel, registers=168, matrix_products=True, streams=name == "gradient")
    assert kernel.count(r"LDGSTS\.E\S*\.128"), f"{kernel.name}: no asynchronous copies of 16 bytes"
    assert kernel.count(r"STG\.E") == kernel.count(r"STG\.E\S*\.128")


@pytest.mark.parametrize("name", EPILOGUES)
def test_products_in_float16(name: str) -> None:
    check(compile_product(name, 1000, 512, 2048, torch.float16, 90), matrix_products=True)
