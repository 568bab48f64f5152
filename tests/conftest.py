"""Fixtures for all tests: fixed seeds, an environment without our variables, devices, golden numbers."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.config import ALIASES, FIELDS
from pgolf.kernels.common import backend

if (_gpus := torch.cuda.device_count()) > 1 and (_worker := os.environ.get("PYTEST_XDIST_WORKER")):
    _visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(_gpus)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = _visible[int(_worker.removeprefix("gw")) % _gpus]  # before CUDA starts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # With AMX, oneDNN's bfloat16 products read what lies between a matrix's rows, times zero: NaN from `torch.empty`.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
if INTERPRETED:  # this process runs kernels on CPU tensors, see test_interpreter.py
    DEVICES = [pytest.param("cpu", id="interpreter")]
    backend.set_backend("triton")

torch.set_num_threads(1)  # tensors are small here, and sums keep one order on every machine
for _variable in ("PGOLF_KERNELS", *(name.upper() for name in (*FIELDS, *ALIASES))):
    os.environ.pop(_variable, None)  # the caller's settings are not the tests'

of_the_reference = pytest.mark.skipif(INTERPRETED, reason="runs no kernel, and in the process without the interpreter")


def covering(*options: Iterable, strength: int = 2, everywhere: bool = False) -> list[tuple]:
    """The product of ``options``; in the interpreter rows of it that hold all values of every ``strength`` of them.

    ``everywhere``: without a GPU, too, where each row is compiled.
    """
    rows = list(itertools.product(*options))
    if not INTERPRETED and (not everywhere or torch.cuda.is_available()):
        return rows
    values = [list(enumerate(map(repr, row))) for row in rows]
    held = [set(itertools.combinations(each, strength)) for each in values]
    missing, taken, chosen = set().union(*held), Counter(), []
    while missing:
        i = max(range(len(rows)), key=lambda i: (len(held[i] & missing), -sum(taken[value] for value in values[i])))
        chosen.append(rows[i])
        taken.update(values[i])
        missing -= held[i]
    return chosen


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: item.path.stem != "test_interpreter")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same seeds, without the TF32 that a stage's run allows its process."""
    torch.set_float32_matmul_precision("highest")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, where there is one, the GPU; or the interpreter: a test that takes this runs the kernels of all."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """``golden("model")`` is the arrays of tests/golden/model.npz by name."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def arrays(golden: Callable[[str], dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The golden numbers of quantisation, as tensors."""
    return {name: torch.from_numpy(array) for name, array in golden("quantize").items()}


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    """A copy, for one test to change, of the data folder that its module's fixture ``built`` makes."""
    return shutil.copytree(built, tmp_path / "data")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the repository, with files too big for it; tests that take this skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder.name} beside the repository")
    return folder
