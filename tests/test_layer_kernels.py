"""The model computed by kernels equals the model computed by references: loss, every gradient, both loop states."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch

from pgolf.config import RunConfig
from pgolf.data.loader import segment_boundaries
from pgolf.kernels.common.backend import INTERPRETED, using
from pgolf.kernels.varlen_attention import segments
from pgolf.model.gpt import GPT

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
SMALL = RunConfig.preset("record").replace(
    device=DEVICE,
    vocab_size=260,
    num_layers=5,
    loop_start=1,
    loop_end=2,
    num_loops=1,
    parallel_start_layer=3,
    xsa_last_n=3,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=8,
    gate_attn_width=8,
    smear_gate_width=4,
    mlp_mult=2.0,
    train_seq_len=24,
)

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter"),
    pytest.mark.usefixtures("poisoned"),
]


def small_model(**fields) -> GPT:
    """A model whose every parameter matters: gates and scales, too, are random."""
    model = GPT(SMALL.replace(**fields)).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    return model


def loss_and_gradients(model: GPT, backend: str, batch: tuple) -> list[tuple[str, torch.Tensor]]:
    model.zero_grad()
    with using(backend):
        assert model.runs_kernels() == (backend == "triton")
        loss = model(*batch)
        loss.backward()
    return [("loss", loss.detach()), *((name, p.grad.double()) for name, p in model.named_parameters())]


def batch(tokens: int) -> tuple:
    ids = torch.randint(4, SMALL.vocab_size, (tokens + 1,), device=DEVICE)
    ids[[0, 5, 6, 30]] = 1
    return ids[None, :-1], ids[None, 1:], segment_boundaries(ids[:-1], SMALL.train_seq_len), SMALL.train_seq_len


on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="takes the interpreter a minute")


@pytest.mark.parametrize("looping", [True, pytest.param(False, marks=on_a_gpu)])
def test_gradients_in_float32(looping: bool, monkeypatch) -> None:
    """All layers share attention's tiles, forward and backward: one kernel makes them."""
    launches = MagicMock()
    launches.__getitem__.side_effect = segments._attention_tiles_kernel.__getitem__
    monkeypatch.setattr(segments, "_attention_tiles_kernel", launches)
    model = small_model(
        compute_dtype="float32",
        mlp_gate=looping,
        key_offset=looping,
        loop_mixing="1.5:.2:-.1,1.2:0:.3" if looping else "",
    )
    model.looping_active = looping
    data = batch(44)
    expected, got = (loss_and_gradients(model, backend, data) for backend in ("reference", "triton"))
    for (name, a), (_, b) in zip(expected, got, strict=True):
        assert (a - b).norm() <= 5e-5 * a.norm() + 1e-9, f"{name}: {(a - b).norm() / a.norm():.1e}"
    launches.__getitem__.assert_called_once()


@on_a_gpu
@pytest.mark.parametrize("gated", [False, True])
def test_errors_in_bfloat16_are_those_of_the_references(gated: bool) -> None:
    model, exact = (small_model(compute_dtype=dtype, mlp_gate=gated) for dtype in ("bfloat16", "float32"))
    exact.load_state_dict(model.state_dict())
    model.looping_active = exact.looping_active = True
    data = batch(44)
    true = loss_and_gradients(exact, "reference", data)
    plain, kernels = (loss_and_gradients(model, backend, data) for backend in ("reference", "triton"))
    for (name, a), (_, b), (_, c) in zip(true, plain, kernels, strict=True):
        # The sums behind a gain's or scale's few gradients cancel: their errors vary by chance.
        bound = 1.5 * (b - a).norm() + (0.06 if a.numel() < 64 else 0.02) * a.norm() + 1e-9
        assert (c - a).norm() <= bound, f"{name}: {(c - a).norm() / a.norm():.1e}, {(b - a).norm() / a.norm():.1e}"
