"""What the softcapped cross-entropy's kernel becomes on GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.linear_cross_entropy import rows, triton
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import check, compiling

REGISTERS = {(8192, 30.0): 64, (8192, 100.0): 96, (50_304, 30.0): 72}  # by vocabulary and softcap
ON_AN_H100 = [(*case, gradient, 90) for case in REGISTERS for gradient in (True, False)]
ON_OTHER_CHIPS = [
    (8192, 30.0, True, 80),
    (50_304, 30.0, False, 80),
    (8192, 100.0, False, 100),
    (50_304, 30.0, True, 100),
]


@pytest.mark.parametrize("vocabulary, softcap, gradient, capability", [*ON_AN_H100, *ON_OTHER_CHIPS])
def test_a_row_in_registers(vocabulary: int, softcap: float, gradient: bool, capability: int) -> None:
    z, targets = torch.empty(4, vocabulary, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int64)
    with compiling(capability) as kernels:
        rows.launch(z, targets, torch.empty(4), rows.Terms(softcap), vocabulary, z if gradient else None)
    (kernel,) = kernels
    check(kernel, registers=REGISTERS[vocabulary, softcap], shared=1024, streams=gradient)
    wide, all_loads = kernel.count(r"LDG\.E\S*\.128"), kernel.count(r"LDG\.E")
    assert wide and all_loads == wide + 2, f"{kernel.name}: narrow loads besides the target and its logit"
    if vocabulary == 8192 and softcap == 30.0:
        assert kernel.count("MUFU") <= 3 * 32 + 6, f"{kernel.name}: more than three special functions an element"
        assert kernel.count("BAR") <= 3


@pytest.mark.parametrize("softcap, registers", [((30.0, 20.0), 80), ((100.0, 20.0), 96)])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_row_with_a_cap_for_each_sign(softcap: tuple[float, float], registers: int, gradient: bool) -> None:
    z, targets = torch.empty(4, 8192, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int64)
    with compiling(90) as kernels:
        rows.launch(z, targets, torch.empty(4), rows.Terms(softcap), 8192, z if gradient else None)
    check(kernels[0], registers=registers, shared=1024, streams=gradient)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_row_of_a_score(gradient: bool) -> None:
    """Its logits are float32, and the gradient's dtype is that of h."""
    z, dz, targets = torch.empty(4, 8192), torch.empty(4, 8192, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int64)
    with compiling(90) as kernels:
        rows.launch(z, targets, torch.empty(4), rows.Terms(30.0), 8192, dz if gradient else None)
    (kernel,) = kernels
    check(kernel, registers=64, shared=1024, streams=gradient)
    assert kernel.count(r"LDG\.E") == kernel.count(r"LDG\.E\S*\.128") + 2


def test_vocabulary_of_odd_size() -> None:
    z = torch.empty(4, triton._row_length(8191), dtype=torch.bfloat16)
    with compiling(90) as kernels:
        rows.launch(z, torch.empty(4, dtype=torch.int32), torch.empty(4), rows.Terms(30.0), 8191, z)
    check(kernels[0], registers=72, shared=1024)


VOCABULARIES = sorted({vocabulary for vocabulary, _ in REGISTERS})


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_row_without_a_cap(vocabulary: int, gradient: bool) -> None:
    z, targets = torch.empty(4, vocabulary, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int64)
    with compiling(90) as kernels:
        rows.launch(z, targets, torch.empty(4), rows.Terms(ignore_index=-100), vocabulary, z if gradient else None)
    (kernel,) = kernels
    check(kernel, registers=64, shared=1024, streams=gradient)
    assert kernel.count(r"LDG\.E") == kernel.count(r"LDG\.E\S*\.128") + 2
    if vocabulary == 8192:
        assert kernel.count("MUFU") <= 32 + 6, f"{kernel.name}: more than one special function an element"


@pytest.mark.parametrize("softcap", [None, 30.0, 100.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_row_with_every_term(vocabulary: int, softcap: float | None) -> None:
    z, targets = torch.empty(4, vocabulary, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int64)
    bias, weight = torch.empty(vocabulary, dtype=torch.bfloat16), torch.empty(vocabulary)
    terms = rows.Terms(softcap, -100, 0.1, 1e-4, bias, weight)
    with compiling(90) as kernels:
        rows.launch(z, targets, torch.empty(4), terms, vocabulary, z, torch.empty(4))
    (kernel,) = kernels
    check(kernel, registers=128, shared=1024, streams=True)
