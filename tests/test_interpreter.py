"""Triton's interpreter as a user meets it, and the kernels' tests once more, in processes where it runs the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py") if path.parent.name != "common")
FAMILIES += ["cross_entropy_terms", "layer_kernels", "partial_sums", "varlen_attention_options"]
PROCESSES = 4  # each takes seconds to import PyTorch


@pytest.mark.parametrize("families", [FAMILIES[i::PROCESSES] for i in range(PROCESSES)], ids=" ".join)
def test_kernels_in_the_interpreter(families: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"]
    command += [f"tests/test_{family}.py" for family in families]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-20_000:]}{result.stderr[-4_000:]}"


FOREIGN = """
import torch
import triton
import triton.language as tl

from pgolf.kernels import using
from pgolf.kernels.residual_mlp import residual_mlp, residual_mlp_reference


@triton.jit
def kernel(a, b, counts, product, rounded, integers, masked, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    total = tl.zeros((N, N), tl.float32)
    for _ in range(tl.load(counts)):
        total = tl.dot(tl.load(a + square), tl.load(b + square), total)
    tl.store(product + square, total)
    tl.store(rounded + square, total.to(tl.bfloat16))
    tl.store(integers + i, i.to(tl.bfloat16))
    tl.store(masked + i, i, mask=(i < N) & (tl.load(counts) > 5))


a, b = torch.randn(2, 16, 16).bfloat16()
product, rounded, integers, masked = torch.empty(16, 16), a.clone(), a[0].clone(), torch.full((16,), -1)
kernel[(1,)](a, b, torch.tensor([3]), product, rounded, integers, masked, 16)
torch.testing.assert_close(product, 3 * a.float() @ b.float())
assert torch.equal(rounded, product.bfloat16()) and torch.equal(integers, torch.arange(16.0).bfloat16())
assert (masked == -1).all()

matrices = None, a, torch.randn(32, 16).bfloat16() / 4, torch.randn(16, 32).bfloat16() / 6
with using("triton"):
    torch.testing.assert_close(residual_mlp(*matrices), residual_mlp_reference(*matrices), rtol=0.05, atol=0.05)
"""


def test_importing_a_family_mends_every_kernel_of_a_process(tmp_path: Path) -> None:
    """Also with a kernel of another package, and without this folder's conftest."""
    script = tmp_path / "foreign.py"  # the interpreter reads kernels from their file
    script.write_text(FOREIGN)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
