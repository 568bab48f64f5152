"""What the shipped attention kernels become on GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.common import launch
from pgolf.kernels.varlen_attention import attention_tiles
from pgolf.kernels.varlen_attention import triton as family
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import Compiled, check, compiling

TOKENS, SEGMENTS = 98_304, 191  # the record's micro-step
REGISTERS = {
    "_attention_kernel": 128,
    "_attention_queries_kernel": 168,
    "_attention_keys_kernel": 240,
}  # at 64 wide heads of sm_90
# Waits for products, which are that many; in the keys' kernel, whose programs are small, three an SM hide them.
# The forward kernel has two more for tiles that are computed again, and where it is described one to hold q.
PRODUCTS = {"_attention_kernel": 4, "_attention_queries_kernel": 3, "_attention_keys_kernel": 8}
TABLE = {"_attention_kernel": "forward", "_attention_queries_kernel": "queries", "_attention_keys_kernel": "keys"}


def compile_all(
    capability: int,
    width: int = 64,
    heads: int = 8,
    dtype=torch.bfloat16,
    epilogue: bool = False,
    half: int | None = 8,
    first_queries: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    other_keys: bool = False,
) -> list[Compiled]:
    """Every kernel of the family, alone or with ``epilogue`` and prologue; k and v are slices of a projection.

    With ``other_keys`` keys have boundaries of their own, and lse a gradient.
    """
    q, fused = torch.empty(TOKENS, heads, width, dtype=dtype), torch.empty(TOKENS, 16 * width + 16, dtype=dtype)
    k, v = (fused[:, i * 4 * width : (i + 1) * 4 * width].unflatten(1, (4, width)) for i in range(2))
    bounds, lse = torch.full((SEGMENTS + 1,), TOKENS, dtype=torch.int32), torch.empty(heads, TOKENS)
    bounds[0] = 0
    logits = fused[:, 16 * width : 16 * width + heads]
    forward, backward = {}, {}
    options = family.Options(window, softcap, *([bounds, bounds] if other_keys else []))
    if other_keys:
        backward = dict(dlse=lse)
    if epilogue:
        forward = dict(components=lse, logits=logits)
        padding = fused[:, 16 * width + heads :]
        backward = dict(dq=q, dk=k, dv=v, dlogits=logits, padding=padding, **forward)
    if first_queries:
        forward["first_queries"] = backward["first_queries"] = bounds[1:]
    if epilogue and half is not None:
        angles, gain = torch.empty(TOKENS, half, dtype=dtype), torch.empty(heads)
        made_by = family.Prologue(torch.empty(heads + 4, TOKENS), gain, angles, angles)
        backward |= dict(prologue=made_by, dgain=gain)
    with compiling(capability) as kernels:
        tiles = attention_tiles(bounds, TOKENS, dtype, width, heads // 4)
        family.attention_forward(q, k, v, tiles, 0.125, options=options, base_2=epilogue, **forward)
        family.attention_backward(q, q, k, v, q, lse, tiles, 0.125, options=options, **backward)
    for kernel in kernels:
        check(kernel)
    small = "_attention_bounds_kernel", "_attention_tiles_kernel", "_partial_sums_kernel"
    kernels = [kernel for kernel in kernels if kernel.name not in small]
    assert [kernel.name for kernel in kernels] == list(PRODUCTS)
    return kernels


ON_AN_H100 = [(90, width, epilogue) for width in (64, 128, 32) for epilogue in (False, True)]
ON_OTHER_CHIPS = [(80, 64, False), (80, 128, True), (100, 64, True)]


@pytest.mark.parametrize("capability, width, epilogue", [*ON_AN_H100, *ON_OTHER_CHIPS])
def test_attention(capability: int, width: int, epilogue: bool) -> None:
    for kernel in compile_all(capability, width, epilogue=epilogue):
        narrow = capability == 90 and width <= 64
        check(
            kernel, registers=REGISTERS[kernel.name] if narrow else 255, matrix_products=capability != 100, streams=True
        )
        if capability == 90:
            # Probabilities and score gradients are left operands from registers; no product waits for each step.
            from_registers = kernel.count(r"HGMMA\S+ R\d+, R\d+")
            assert from_registers and kernel.count("HGMMA") > from_registers
            described = epilogue and width == 64 and kernel.name != "_attention_keys_kernel"
            waits = PRODUCTS[kernel.name] + (described and kernel.name == "_attention_kernel")
            assert kernel.count(r"WARPGROUP\.DEPBAR") <= waits, f"{kernel.name}: products in series"
            copies = "UTMALDG" if described else r"LDGSTS\.E\S*\.128"
            assert kernel.count(copies) >= 4, f"{kernel.name}: no asynchronous copies"
        if capability == 90 and width == 64:
            warps = launch.launch_parameters("varlen_attention", TABLE[kernel.name], torch.device("cpu"))["warps"]
            assert kernel.registers * 32 * warps * 2 <= 65_536  # two programs an SM
            assert 2 * (kernel.shared_bytes + 1024) <= 233_472


def test_registers_that_an_assembler_loses_are_found(monkeypatch) -> None:
    """Of k at 32 columns: dk and dv were wrong from the second tile of queries on."""
    monkeypatch.setattr(family, "REGISTER_WIDTH", 32)
    with pytest.raises(AssertionError, match="_attention_keys_kernel on sm_90: the assembler gives registers of"):
        compile_all(90, 32)


@pytest.mark.parametrize("heads, epilogue", [(4, True), (12, False), (16, True)])
def test_attention_with_other_groups(heads: int, epilogue: bool) -> None:
    for kernel in compile_all(90, heads=heads, epilogue=epilogue, half=None):  # a prologue has spills around the loops
        check(kernel, matrix_products=True, streams=True)
        rounds = 3 if heads == 12 else 1  # for dk and dv, of a group that no power of two divides
        waits = rounds * PRODUCTS[kernel.name] + (epilogue and kernel.name == "_attention_kernel")
        assert kernel.count(r"WARPGROUP\.DEPBAR") <= waits, f"{kernel.name}: products in series"


@pytest.mark.parametrize("half", [0, 32])
def test_attention_with_other_rotations(half: int) -> None:
    for kernel in compile_all(90, epilogue=True, half=half):
        check(kernel, registers=REGISTERS[kernel.name], matrix_products=True, streams=True)


@pytest.mark.parametrize("capability, width", [(90, 64), (90, 32), (80, 64)])
def test_attention_of_some_queries(capability: int, width: int) -> None:
    for kernel in compile_all(capability, width, epilogue=True, first_queries=True):
        registers = REGISTERS[kernel.name] if capability == 90 else 255
        check(kernel, registers=registers, matrix_products=capability != 100, streams=True)
        waits = PRODUCTS[kernel.name] + (kernel.name == "_attention_kernel")
        assert capability != 90 or kernel.count(r"WARPGROUP\.DEPBAR") <= waits, f"{kernel.name}: products in series"


WINDOW = dict(window=(1023, 0))
EVERYTHING = dict(window=(1023, 0), softcap=50.0, other_keys=True)


@pytest.mark.parametrize(
    "width, options",
    [(64, WINDOW), (64, EVERYTHING), (128, EVERYTHING), (256, {}), (256, EVERYTHING)],
    ids=str,
)
def test_attention_with_options(width: int, options: dict) -> None:
    for kernel in compile_all(90, width, **options):
        check(kernel, matrix_products=True, streams=True)
        assert kernel.count(r"WARPGROUP\.DEPBAR") <= PRODUCTS[kernel.name], f"{kernel.name}: products in series"


@pytest.mark.parametrize("width", [64, 256])
def test_attention_with_options_and_four_heads_to_a_key(width: int) -> None:
    for kernel in compile_all(90, width, heads=16, **EVERYTHING):
        check(kernel, matrix_products=True, streams=True)


@pytest.mark.parametrize("capability", [80, 100])
def test_widest_attention_on_other_chips(capability: int) -> None:
    for kernel in compile_all(capability, 256, **EVERYTHING):
        check(kernel, matrix_products=capability != 100, streams=True)


def test_attention_in_float32() -> None:
    compile_all(90, dtype=torch.float32, epilogue=True)
