"""What kernel families share: the choice of an implementation, operators, launch parameters by chip."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import library

from pgolf.kernels.common import backend, compiling, launch, operators
from pgolf.kernels.residual import scaled_rms_norm, scaled_rms_norm_reference
from tests.conftest import INTERPRETED

BOTH = {"reference": "reference", "triton": "triton"}
CPU, CUDA = (SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device)) for device in ("cpu", "cuda"))


@pytest.fixture(autouse=True)
def _backend(monkeypatch) -> None:
    monkeypatch.setattr(backend, "_chosen", "auto")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiling_ahead_launches_nothing_on_cuda() -> None:
    x = torch.randn(7, 96, device="cuda", requires_grad=True)  # of a width that no other test has
    torch.use_deterministic_algorithms(True, warn_only=True)  # `torch.empty` gives NaN
    with compiling.compiling_ahead():
        y = scaled_rms_norm(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.use_deterministic_algorithms(False)
    assert y.isnan().all() and dx.isnan().all()
    torch.testing.assert_close(scaled_rms_norm(x), scaled_rms_norm_reference(x))


@pytest.mark.skipif(backend.triton is None, reason="needs Triton")
def test_auto_takes_kernels_for_cuda_tensors() -> None:
    assert backend.select("op", BOTH, CUDA) == "triton"
    assert backend.select("op", BOTH, CPU) == "reference"
    assert backend.select("op", {"reference": "reference"}, CUDA) == "reference"


@pytest.mark.skipif(backend.triton is None, reason="needs Triton")
def test_triton_insists(monkeypatch) -> None:
    monkeypatch.setenv("PGOLF_KERNELS", "triton")
    assert backend.select("op", BOTH, CUDA) == "triton"
    with pytest.raises(RuntimeError, match="op has no Triton kernel; use PGOLF_KERNELS=auto"):
        backend.select("op", {"reference": "reference"}, CUDA)
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="need CUDA tensors, got cpu"):
            backend.select("op", BOTH, CPU)
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        backend.select("op", BOTH, CUDA)
    monkeypatch.setenv("PGOLF_KERNELS", "auto")
    assert backend.select("op", BOTH, CUDA) == "reference"


def test_names_are_checked(monkeypatch) -> None:
    with pytest.raises(ValueError, match="set_backend: kernels come as auto, reference, triton, and 'cuda' is none"):
        backend.set_backend("cuda")
    monkeypatch.setenv("PGOLF_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="PGOLF_KERNELS: .* 'nonsense' is none"):
        backend.backend()


@pytest.mark.parametrize(
    ("name", "capability", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA H20", (9, 0), "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "default"),
        ("NVIDIA B200", (10, 0), "default"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "default"),
    ],
)
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the default table")
def test_a_chip_has_its_own_table_or_a_relatives(monkeypatch, name: str, capability: tuple, chip: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.chip(torch.device("cuda")) == chip


def test_cases_that_a_table_lacks_come_from_the_h100s(monkeypatch, tmp_path) -> None:
    for name, cases in (("h100", {"a": {"tile": 1}, "b": {"tile": 2}}), ("x1", {"a": {"tile": 3}})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": {}, "cases": {"family": cases}}))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(launch, "chip", lambda device: "x1")
    look_up = launch.launch_parameters.__wrapped__
    assert look_up("family", "a", torch.device("cpu")) == {"tile": 3}
    assert look_up("family", "b", torch.device("cpu")) == {"tile": 2}
    with pytest.raises(KeyError, match="launch parameters for family, c"):
        look_up("family", "c", torch.device("cpu"))


def test_operators_are_called_directly_unless_traced() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(type(x))
        return 2 * x

    op = operators.operator(
        "test_double(Tensor x) -> Tensor",
        double,
        torch.empty_like,
        setup_context=lambda ctx, inputs, output: None,
        backward=lambda ctx, gradient: 2 * gradient,
    )
    x = torch.ones(3, requires_grad=True)
    op(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0)) and calls == [torch.Tensor]
    with torch.no_grad():
        assert not op(x).requires_grad
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.full((3,), 3.0))
    library.opcheck(torch.ops.pgolf.test_double.default, (x,))
