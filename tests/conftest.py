"""Fixtures for all tests: fixed seeds, an environment without our variables, devices, golden numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.config import ALIASES, FIELDS

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]

torch.set_num_threads(1)  # tensors are small here, and sums keep one order on every machine
for _variable in ("PGOLF_KERNELS", *(name.upper() for name in (*FIELDS, *ALIASES))):
    os.environ.pop(_variable, None)  # the caller's settings are not the tests'


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same seeds."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, where there is one, the GPU: a test that takes this runs on both."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """``golden("model")`` is the arrays of tests/golden/model.npz by name."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the repository, with files too big for it; tests that take this skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder.name} beside the repository")
    return folder
