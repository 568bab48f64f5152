"""Newton-Muon: the preconditioned update against float64, and what the layers' inputs are."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.data.loader import Batch
from pgolf.kernels.newton_schulz import newton_schulz
from pgolf.model.gpt import GPT
from pgolf.model.second_moments import sum_second_moments
from pgolf.training import optim
from pgolf.training.optim import ModelOptimizer, Muon, damped_inverse
from tests.processes import run_processes

SHAPE = (5, 12, 20)  # a bank that 2 processes do not share evenly


def second_moments(seed: int, tokens: int = 40, columns: int = SHAPE[2]) -> list[Tensor]:
    """K of each matrix of a bank, float32, of inputs whose columns are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SHAPE[0], tokens, columns, generator=generator) * torch.logspace(-1, 1, columns)
    return list(inputs.mT @ inputs / tokens)


def test_the_inverse_is_float64_s(device: torch.device) -> None:
    """As near as float32's own inverse, also where a K has fewer inputs than columns, and I for multiples of I."""
    moments = torch.stack([*second_moments(1), *second_moments(2, tokens=3)]).to(device)
    for ridge in (0.01, 0.2):
        exact, plain = (
            (1 + ridge)
            * torch.linalg.inv(K / K.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + ridge * torch.eye(20).to(K))
            for K in (moments.double(), moments)
        )
        error = (damped_inverse(moments, ridge) - exact).norm()
        assert error <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()
    identity = torch.eye(20, device=device)
    few = torch.stack([identity, 1e6 * identity, 0 * identity])
    torch.testing.assert_close(
        damped_inverse(few, 0.25), torch.stack([identity, identity, 5 * identity]), rtol=1e-6, atol=1e-6
    )
    assert damped_inverse(-few[:1], 0.25).isnan().any(), "a failed factor does not pass for one"


def steps(count: int = 4, every: int = 2, dtype: torch.dtype = torch.float32, **settings) -> Tensor:
    """The bank after steps with new second moments at every other, or with ``every`` 0 never."""
    generator = torch.Generator().manual_seed(3)
    bank = torch.nn.Parameter(torch.randn(SHAPE, generator=generator))
    optimizer = Muon([bank], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=dtype, **settings)
    for step in range(count):
        bank.grad = torch.randn(SHAPE, generator=generator)
        if every and step % every == 0:
            optimizer.precondition({bank: second_moments(step)})
        optimizer.step()
    return bank.detach()


@pytest.mark.parametrize("row_normalize", [False, True])
def test_steps_follow_the_formula(row_normalize: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    expected = torch.randn(SHAPE, generator=generator).double()
    mean, buffer = torch.zeros(SHAPE[0], SHAPE[2], SHAPE[2]).double(), torch.zeros(SHAPE).double()
    for step in range(4):
        gradient = torch.randn(SHAPE, generator=generator).double()
        if step % 2 == 0:
            mean = 0.75 * mean + 0.25 * torch.stack(second_moments(step)).double()
        size = mean.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        gradient = 1.2 * gradient @ torch.linalg.inv(mean / size + 0.2 * torch.eye(20).double())
        buffer = 0.9 * buffer + gradient
        update = newton_schulz(gradient + 0.9 * buffer, dtype=torch.float64, row_normalize=row_normalize)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
    found = steps(moment_decay=0.75, row_normalize=row_normalize)
    plain = steps(every=0, row_normalize=row_normalize)
    assert (found - expected).norm() < 1e-4 * (plain - expected).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_without_direction_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With K = c I the steps are Muon's, but for the rounding of c."""
    plain = steps(every=0, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 0.01
    preconditioned = steps(dtype=dtype)
    monkeypatch.setitem(globals(), "second_moments", lambda step: [(step + 3) * torch.eye(SHAPE[2])] * SHAPE[0])
    moved = plain - steps(count=0)
    assert (steps(dtype=dtype) - plain).norm() <= bound * moved.norm() < 0.1 * (preconditioned - plain).norm()


def _steps_of_rank(rank: int, size: int) -> Tensor:
    return steps()


def test_ranks_precondition_their_share(tmp_path: Path) -> None:
    for found in run_processes(_steps_of_rank, 2, tmp_path):
        torch.testing.assert_close(found, steps(), rtol=1e-5, atol=1e-5)


MODEL = dict(vocab_size=300, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4, gate_attn_width=8)


def test_every_matrix_gets_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """K of each matrix is zᵀz of the inputs z that a plain product with it would take, over the loop's passes."""
    layers = dict(num_layers=5, loop_start=1, loop_end=2, parallel_start_layer=3, train_batch_tokens=50)
    model = GPT(RunConfig.preset("demo").replace(**MODEL, **layers, micro_batch_tokens=50))
    with torch.no_grad():
        model.qo_bank[5:].normal_()  # else attention adds nothing to the stream
    batches = [Batch(torch.randint(2, 300, (1, 25)), torch.zeros(0), None, 25) for _ in range(2)]
    optimizer, given = ModelOptimizer(model, model.config), {}
    monkeypatch.setattr(Muon, "precondition", lambda self, moments: given.update(moments))
    for model.looping_active in (False, True):
        optimizer.observe_inputs(model, batches)
        assert model.training
        seen: dict[str, list[Tensor]] = defaultdict(list)
        with torch.no_grad():
            for batch in batches:
                model.hidden(batch.input_ids, observe=lambda name, x, seen=seen: seen[name].append(x.clone()))
        assert len(seen["blocks.1.mlp.fc"]) == 2 * (3 if model.looping_active else 1)
        for i in range(5):
            fc = seen[f"blocks.{i}.mlp.fc"]
            hidden = [F.leaky_relu(x @ model.mlp_up_bank[i].detach().mT, 0.5).square() for x in fc]
            for bank, position, inputs in (
                (model.qo_bank, i, seen[f"blocks.{i}.attn.qkv"]),
                (model.qo_bank, 5 + i, seen[f"blocks.{i}.attn.proj"]),
                (model.kv_bank, i, seen[f"blocks.{i}.attn.qkv"]),
                (model.kv_bank, 5 + i, seen[f"blocks.{i}.attn.qkv"]),
                (model.mlp_up_bank, i, fc),
                (model.mlp_down_bank, i, hidden),
            ):
                z = torch.cat([x.flatten(0, 1) for x in inputs]).double()
                torch.testing.assert_close(given[bank][position].double(), z.mT @ z / 50, rtol=1e-4, atol=1e-5)
        assert {len(given[bank]) == bank.size(0) for bank in given} == {True} and len(given) == 4


def test_inputs_are_those_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product's gradient is δᵀz: each of its rows lies in the span of the inputs that were observed."""
    model = GPT(RunConfig.preset("demo").replace(**MODEL, num_layers=2, num_loops=0, parallel_start_layer=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bank"):
                parameter.normal_(std=0.2)
    ids = torch.randint(2, 300, (1, 6))  # fewer tokens than columns
    model(ids, ids.roll(-1, 1)).backward()
    sums, count = sum_second_moments(model, [Batch(ids, ids, None, 6)])
    assert count == 1
    for bank in (model.qo_bank, model.kv_bank, model.mlp_up_bank, model.mlp_down_bank):
        name = next(name for name, value in model.named_parameters() if value is bank)
        for gradient, matrix in zip(bank.grad, optim.bank_names(name, 2), strict=True):
            K = sums[optim.hessian_group(matrix)].double()
            span = torch.linalg.eigh(K)[1][:, -6:]
            gradient = gradient.double()
            assert (gradient - gradient @ span @ span.mT).norm() < 1e-4 * gradient.norm() != 0, matrix


def test_a_state_of_other_shapes_is_an_error() -> None:
    model = GPT(RunConfig.preset("demo").replace(**MODEL))
    optimizer = ModelOptimizer(model, model.config)
    optimizer.muon.precondition({model.kv_bank: [torch.eye(32)] * 22})
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    (entry,) = state["muon"]["state"].values()
    assert entry["second_moment"].shape == (22, 32, 32)
    entry["second_moment"] = entry["second_moment"][:, :8]
    with pytest.raises(ValueError, match=r"second_moment of kv_bank has the shape \[22, 8, 32\], expected"):
        optimizer.load_state_dict(state)
