"""Muon against golden steps, the whole optimizer against its formulas, and any number of ranks against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pgolf.config import RunConfig
from pgolf.kernels.newton_schulz import POLAR_EXPRESS, QUINTIC, newton_schulz
from pgolf.model.gpt import GPT
from pgolf.training.optim import ModelOptimizer, Muon
from tests.processes import run_processes

CONFIG = RunConfig.preset("demo").replace(model_dim=64, vocab_size=300, gate_attn_width=12)


@pytest.mark.parametrize("layout", ["wide", "tall"])
def test_three_golden_steps(golden, layout: str) -> None:
    arrays = {name: torch.from_numpy(value) for name, value in golden("optim").items()}
    bank = torch.nn.Parameter(arrays[f"muon/p_{layout}0"].clone())
    optimizer = Muon([bank], lr=0.026, momentum=0.95, weight_decay=0.095, row_normalize=True)
    for step in range(3):
        bank.grad = arrays[f"muon/g_{layout}{step}"]
        optimizer.step()
        moved = arrays[f"muon/p_{layout}{step + 1}"] - arrays[f"muon/p_{layout}0"]
        assert (bank - arrays[f"muon/p_{layout}{step + 1}"]).norm() < 1e-2 * moved.norm()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 40), (40, 16)])
def test_formula(shape: tuple[int, ...], nesterov: bool) -> None:
    p = torch.nn.Parameter(torch.randn(shape))
    optimizer = Muon([p], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.5, dtype=torch.float32)
    expected, buffer = p.detach().clone(), torch.zeros(shape)
    scale = max(1, shape[-2] / shape[-1]) ** 0.5
    for _ in range(2):
        p.grad = torch.randn(shape)
        buffer = 0.9 * buffer + p.grad
        update = p.grad + 0.9 * buffer if nesterov else buffer
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * scale * newton_schulz(update, dtype=torch.float32)
        optimizer.step()
    assert (p - expected).abs().max() < 1e-5


def test_muon_takes_matrices_only() -> None:
    with pytest.raises(ValueError, match="matrices or banks"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1, momentum=0.9)


def model_and_optimizer(world_size: int = 1, **fields) -> tuple[GPT, ModelOptimizer]:
    config = CONFIG.replace(**fields)
    torch.manual_seed(5)
    model = GPT(config)
    return model, ModelOptimizer(model, config, world_size)


def test_groups_hold_every_parameter_once() -> None:
    for tied in (True, False):
        model, optimizer = model_and_optimizer(tie_embeddings=tied)
        groups = [*optimizer.adamw.param_groups, *optimizer.muon.param_groups]
        members = [id(p) for group in groups for p in group["params"]]
        assert sorted(members) == sorted(id(p) for p in model.parameters())
        rates = [group["base_lr"] for group in groups]
        assert rates == ([0.03, 0.02, 0.026] if tied else [0.6, 0.02, 0.03, 0.026])


@pytest.mark.parametrize("fields", [{}, dict(tie_embeddings=False, muon_row_normalize=False, polar_express_ns=False)])
def test_two_steps_of_a_model_follow_the_formulas(fields: dict) -> None:
    """Every group's rate, weight decay and constants, the rate's scale and Muon's momentum of each step.

    In float64 where AdamW is elementwise. Gradients reach down to where its eps counts.
    """
    model, optimizer = model_and_optimizer(grad_clip_norm=0.0, **fields)
    config = model.config
    coefficients = POLAR_EXPRESS if config.polar_express_ns else (QUINTIC,)
    expected = {name: value.detach().double() for name, value in model.named_parameters()}
    state = {name: [torch.zeros_like(value) for _ in range(2)] for name, value in expected.items()}
    embed_lr = config.tied_embed_lr if config.tie_embeddings else config.embed_lr
    rates = {"tok_emb.weight": (embed_lr, config.embed_wd), "lm_head.weight": (config.tied_embed_lr, config.embed_wd)}
    for step, (scale, momentum) in enumerate(((1.0, 0.8), (0.25, 0.9)), 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 10 ** -torch.randint(9, parameter.shape).float()
        gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
        optimizer.step(scale, momentum)
        for name, g in gradients.items():
            p, (first, second) = expected[name], state[name]
            if name.endswith("_bank"):
                first.mul_(momentum).add_(g)
                u = (g + momentum * first).float()
                options = dict(row_normalize=config.muon_row_normalize, dtype=torch.float32)
                direction = newton_schulz(u, config.muon_backend_steps, coefficients, **options).double()
                p *= 1 - scale * config.matrix_lr * config.muon_wd
                p -= scale * config.matrix_lr * max(1, p.size(-2) / p.size(-1)) ** 0.5 * direction
                continue
            lr, decay = rates.get(name, (config.scalar_lr, config.adam_wd))
            first.lerp_(g, 1 - 0.9), second.lerp_(g.square(), 1 - 0.95)
            mean, spread = first / (1 - 0.9**step), (second / (1 - 0.95**step)).sqrt()
            p *= 1 - scale * lr * decay
            p -= scale * lr * mean / (spread + 1e-8)
    for name, parameter in model.named_parameters():
        # float32: a step of the largest rate, 0.6, and weights up to 5 are rounded to 3e-7; decays alone move 4e-6.
        tolerance = 1e-4 if name.endswith("_bank") else 1e-6  # the iteration triples a float32 rounding five times
        assert (parameter - expected[name]).abs().max() < tolerance, name


def test_clipping_scales_the_reduced_gradient() -> None:
    """The norm returned is the whole gradient's, and a clipped step equals one on gradients scaled by hand."""
    moved = []
    for clip, factor in ((0.3, 1.0), (0.0, None)):
        model, optimizer = model_and_optimizer(grad_clip_norm=clip)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        if factor is None:
            for parameter in model.parameters():
                parameter.grad *= 0.3 / (norm + 1e-6)
            norm = norm * 0.3 / (norm + 1e-6)
        assert optimizer.step(1.0, 0.9).item() == pytest.approx(norm.item(), rel=1e-5)
        moved.append([p.detach().clone() for p in model.parameters()])
    for clipped, scaled in zip(*moved, strict=True):
        assert (clipped - scaled).abs().max() < 1e-5


def test_state_dict_restores_everything() -> None:
    model, optimizer = model_and_optimizer()

    def step(seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step(1.0, 0.9)

    step(1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, optimizer.state_dict()
    )
    step(2)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    step(2)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_averages_move_with_the_weights() -> None:
    """Of every parameter, and the weights move as without."""
    results = []
    for averaged in (False, True):
        model, optimizer = model_and_optimizer()
        averages = {name: value.detach().clone() for name, value in model.named_parameters()}
        expected = {name: value.clone() for name, value in averages.items()}
        for step in range(2):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step(1.0, 0.9, averages if averaged else None, 0.75)
            for name, value in model.named_parameters():
                expected[name].lerp_(value.detach(), 0.25)
        results.append(model.state_dict())
    assert all(torch.equal(averages[name], expected[name]) for name in expected)
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def _steps(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Two steps whose gradients, averaged over ranks, do not depend on the number of ranks; state moved in between."""
    model, optimizer = model_and_optimizer(size)
    averages = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(2):
        torch.manual_seed(step)
        for parameter in model.parameters():
            common, own = torch.randn_like(parameter), torch.ones_like(parameter)
            parameter.grad = common + own * (rank - (size - 1) / 2)
        optimizer.step(1.0, 0.9, averages, 0.5)
        state = optimizer.state_dict()
        model_again, optimizer = model, ModelOptimizer(model, CONFIG, size)
        optimizer.load_state_dict(state)
    averages = {f"average of {name}": value for name, value in averages.items()}
    return {**model_again.state_dict(), **averages, "momentum": state["muon"]["state"][0]["momentum_buffer"]}


def test_several_ranks_give_the_same_step(tmp_path: Path) -> None:
    alone = _steps(0, 1)
    for result in run_processes(_steps, 3, tmp_path):
        for name, value in alone.items():
            assert (result[name] - value).abs().max() < 2e-5, name
