"""The kernels' tests once more, in processes where Triton interprets the kernels on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py") if path.parent.name != "common")
FAMILIES += ["layer_kernels", "partial_sums"]
PROCESSES = 4  # each takes seconds to import PyTorch


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="tests/interpreter.py mends Triton 3.6")
@pytest.mark.parametrize("families", [FAMILIES[i::PROCESSES] for i in range(PROCESSES)], ids=" ".join)
def test_kernels_in_the_interpreter(families: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"]
    command += [f"tests/test_{family}.py" for family in families]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-20_000:]}{result.stderr[-4_000:]}"
