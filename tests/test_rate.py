"""Quantisation by rate: steps by sensitivity, a number of bytes, and weights that come back near."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pgolf.artifact import rate, sensitivity
from pgolf.artifact.code_length import PackedSize, packed_size
from pgolf.artifact.container import load, save
from pgolf.artifact.hessians import collect_hessians
from pgolf.artifact.quantize import dequantize_model
from pgolf.artifact.quantized import CODES, QuantizeError
from pgolf.artifact.sensitivity import Sensitivities, collect_sensitivities
from pgolf.artifact.sizes import expected_size
from pgolf.artifact.steps import OCTAVE, dequantize_codes, step_sizes
from pgolf.common.runtime import World, start_world
from pgolf.config import ConfigError, RunConfig
from pgolf.data.loader import Batch
from pgolf.data.shards import BOS_ID
from pgolf.kernels.linear_cross_entropy import softcapped
from pgolf.model.build import model_with
from pgolf.model.gpt import GPT
from pgolf.model.weights import unbank
from tests.logits import forward_logits

CPU = torch.device("cpu")
CONFIG = RunConfig.preset("demo").replace(
    device="cpu",
    vocab_size=512,
    model_dim=48,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=8,
    gptq_passthrough_numel=500,
    trellis_states=4,
    trellis_rows=32,
    sensitivity_sequences=6,
    sensitivity_tokens=24,
)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def sensitivities(model: GPT) -> Sensitivities:
    tokens = torch.randint(1, CONFIG.vocab_size, (4000,), generator=torch.Generator().manual_seed(1))
    return collect_sensitivities(model, CONFIG, tokens, start_world(CONFIG))


@pytest.fixture(scope="module")
def tensors(model: GPT) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in unbank(model.state_dict(), CONFIG.num_layers).items()}


@pytest.fixture(scope="module")
def measured(tensors, sensitivities) -> tuple[dict[str, torch.Tensor], Sensitivities]:
    """What `rate.prepare` takes beside the weights."""
    hessians = {}
    for name, tensor in tensors.items():
        group = rate.hessian_group(name)
        if tensor.ndim == 2 and group is not None and group not in hessians:
            x = torch.randn(512, tensor.size(1)) * (0.2 + torch.rand(tensor.size(1)))
            hessians[group] = x.T @ x
    return hessians, sensitivities


@pytest.fixture(scope="module")
def matrices(tensors, measured) -> dict[str, rate.Matrix]:
    return rate.prepare(tensors, *measured, CONFIG, CPU)


def test_steps_are_exact_powers() -> None:
    exponents = torch.tensor([-33, -16, -1, 0, 1, 8, 16, 31], dtype=torch.int16)
    assert torch.allclose(step_sizes(exponents).double(), torch.exp2(exponents.double() / OCTAVE), rtol=1e-7)
    codes = torch.tensor([[3, -2]], dtype=torch.int16)
    zero = torch.zeros(1, dtype=torch.int16), torch.tensor([0, 16], dtype=torch.int16)
    assert dequantize_codes(codes, *zero, states=1).tolist() == [[3.0, -4.0]]
    assert dequantize_codes(codes, *zero, states=4).tolist() == [[1.5, -2.0]]


def test_sensitivities_predict_what_noise_costs(model: GPT, sensitivities: Sensitivities) -> None:
    """Kullback-Leibler divergence of small white noise on one bank against half the variance times the Fisher sums."""
    ids = torch.randint(1, CONFIG.vocab_size, (24, 24), generator=torch.Generator().manual_seed(2))
    model.eval()
    model.looping_active = CONFIG.num_loops > 0
    bank, scale = model.mlp_down_bank, 2e-3
    expected = sum(float(v.sum()) for name, v in sensitivities.rows.items() if ".mlp.proj" in name) * scale**2 / 2
    kept, found = bank.detach().clone(), []
    with torch.no_grad():
        p = forward_logits(model, ids).double().log_softmax(-1)
        for _ in range(4):
            bank += scale * torch.randn_like(bank)
            q = forward_logits(model, ids).double().log_softmax(-1)
            bank.copy_(kept)
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert expected == pytest.approx(sum(found) / len(found), rel=0.15)  # 0.975 here


@pytest.mark.parametrize("negative", [0.0, 2.0])
def test_the_head_s_sensitivity_follows_the_softcap(model: GPT, negative: float) -> None:
    model = copy.deepcopy(model).requires_grad_(True)
    model.config = CONFIG.replace(logit_softcap=0.5, logit_softcap_negative=negative)
    ids, bounds = torch.arange(1, 25), torch.tensor([0, 24], dtype=torch.int32)
    sums = sensitivity._Sums(model)
    sums.add(ids, torch.rand(24), bounds)
    h = model.hidden(ids[None], bounds, 24)[0].detach()
    logits = (h @ model.head_weight.detach().T).double().requires_grad_()
    z = softcapped(logits, model.config.softcap)
    (slope,) = torch.autograd.grad(z.sum(), logits)
    p = z.detach().softmax(-1)
    expected = (p * (1 - p) * slope.square() * h.square().sum(-1, keepdim=True)).sum(0)
    torch.testing.assert_close(sums.totals[sensitivity.HEAD], expected, rtol=1e-4, atol=0)


def test_attention_of_sequences_stops_where_documents_do(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, seen = torch.randint(2, CONFIG.vocab_size, (4000,)), []
    tokens[::7] = BOS_ID
    monkeypatch.setattr(sensitivity._Sums, "add", lambda self, ids, places, bounds: seen.append((ids, bounds)))
    collect_sensitivities(model, CONFIG, tokens, start_world(CONFIG))
    assert len(seen) == CONFIG.sensitivity_sequences
    for ids, bounds in seen:
        assert bounds.unique().tolist() == sorted({0, *torch.nonzero(ids == BOS_ID).flatten().tolist(), len(ids)})


def test_ranks_share_the_sequences(model: GPT, sensitivities: Sensitivities, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(1, CONFIG.vocab_size, (4000,), generator=torch.Generator().manual_seed(1))
    again = collect_sensitivities(model, CONFIG, tokens, start_world(CONFIG))
    assert all(torch.equal(again.rows[name], value) for name, value in sensitivities.rows.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="more than 24 training tokens"):
        collect_sensitivities(model, CONFIG, tokens[:24], start_world(CONFIG))
    monkeypatch.setattr("pgolf.artifact.sensitivity.dist.all_reduce", lambda total: None)  # the sum is taken below
    halves = [collect_sensitivities(model, CONFIG, tokens, World(rank, 2, CPU)) for rank in range(2)]
    assert torch.allclose(halves[0].head + halves[1].head, sensitivities.head, rtol=1e-9)
    for name, value in sensitivities.rows.items():
        assert torch.allclose(halves[0].rows[name] + halves[1].rows[name], value, rtol=1e-9), name
        assert not torch.equal(halves[0].rows[name], value), name


def level_of(matrices: dict[str, rate.Matrix], bits: float) -> float:
    """The level at which codes are predicted to have so many bits each."""
    return rate.Lengths(matrices).level(bits * sum(matrix.weight.numel() for matrix in matrices.values()))


@pytest.mark.parametrize("bits", [2.5, 3.5, 5.0])
def test_lengths_are_those_of_the_codes(matrices: dict[str, rate.Matrix], bits: float) -> None:
    lengths, level = rate.Lengths(matrices), level_of(matrices, bits)
    count = sum(matrix.weight.numel() for matrix in matrices.values())
    assert lengths.bits(level) == pytest.approx(bits * count, rel=1e-6)
    coded = rate.code(matrices, level, CONFIG.replace(trellis_states=1))
    assert 8 * packed_size(coded, CPU).codes == pytest.approx(bits * count, rel=0.04)
    coarsest, finest = lengths.level(0.0), lengths.level(100.0 * count)
    assert coarsest > level > finest and coarsest == lengths.level(1.0)
    assert lengths.bits(coarsest) > 2 * count and lengths.bits(finest) < 7.1 * count


def test_two_tries_find_the_bytes(tensors, matrices, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr(rate, "code", lambda *given, code=rate.code: tries.append(given[1]) or code(*given))
    for target in (140_000, 170_000, 200_000):
        tries.clear()
        rate.quantize_by_rate(tensors, matrices, CONFIG, CPU, target)
        assert len(tries) <= 2, target


def test_rows_lose_alike(matrices: dict[str, rate.Matrix]) -> None:
    """Step² times sensitivity is one number for all rows of all matrices that are within the bounds."""
    costs = []
    for matrix in matrices.values():
        exponents = rate.allocate(matrix, level_of(matrices, 4.5))
        deviation = (matrix.weight / step_sizes(matrix.column_exponent)).std(1)
        ratio = step_sizes(exponents) / deviation
        within = (ratio < 0.95 * rate.COARSEST) & (ratio > 1.05 * rate.FINEST)
        assert ((ratio < 1.03 * rate.COARSEST) & (ratio > 0.97 * rate.FINEST)).all()
        costs.append((step_sizes(exponents).double().square() * matrix.slope)[within])
    costs = torch.cat(costs)
    assert len(costs) > 500 and costs.max() / costs.min() < 2 ** (2.1 / OCTAVE)


@pytest.mark.parametrize("target", [150_000, 190_000])
def test_the_artifact_has_the_bytes_it_is_given(tensors, matrices, tmp_path: Path, target: int) -> None:
    path = tmp_path / "model.pgolf"
    quantized = rate.quantize_by_rate(tensors, matrices, CONFIG, CPU, target)
    size = save(path, quantized)
    assert abs(size - packed_size(quantized, CPU).total) < 600
    assert target - rate.SLACK_BYTES <= size <= target
    weights = dequantize_model(load(path), tensors)
    for name, matrix in matrices.items():
        error = (weights[name] - tensors[name]).square().mean(1).sqrt()
        limit = step_sizes(quantized.tensors[name + ".row"]) * step_sizes(matrix.column_exponent).mean()
        assert (error < 0.8 * limit).all(), name
    kept = [name for name in tensors if name not in matrices]
    assert kept and all(torch.equal(weights[name], tensors[name].half().float()) for name in kept)


def smaller(size: PackedSize, by: int) -> PackedSize:
    """A size with so many bytes of codes fewer."""
    return size._replace(codes=size.codes - by)


def test_more_bytes_than_computed_are_quantised_away(tensors, matrices, tmp_path: Path, monkeypatch) -> None:
    path, target = tmp_path / "model.pgolf", 170_000
    monkeypatch.setattr(rate, "packed_size", lambda *given: smaller(packed_size(*given), 5000))
    quantized, blob, *_ = rate.quantize_to_fit(tensors, matrices, CONFIG, CPU, path, target)
    assert target - rate.SLACK_BYTES <= len(blob) <= target and save(path, quantized) == len(blob)
    monkeypatch.setattr(rate, "packed_size", lambda *given: smaller(packed_size(*given), 90_000))
    monkeypatch.setattr(rate, "FITS", 1)
    with pytest.raises(QuantizeError, match="does not fit 170,000 bytes: it takes [0-9,]+, more than computed"):
        rate.quantize_to_fit(tensors, matrices, CONFIG, CPU, path, target)


def test_targets_drawn_to_zero_have_shorter_codes(matrices) -> None:
    level = level_of(matrices, 3.0)
    plain, drawn = (rate.code(matrices, level, CONFIG.replace(trellis_shrink=s)) for s in (0.0, 1.0))
    sizes, energy = (
        [measure(coded) for coded in (plain, drawn)]
        for measure in (
            lambda coded: packed_size(coded, CPU).codes,
            lambda coded: sum(
                int(x.long().square().sum()) for name, x in coded.tensors.items() if name.endswith(CODES)
            ),
        )
    )
    assert sizes[1] < sizes[0] and energy[1] < energy[0]


def test_bounds_of_size(tensors, matrices) -> None:
    finest = rate.quantize_by_rate(tensors, matrices, CONFIG, CPU, 5_000_000)
    assert 250_000 < packed_size(finest, CPU).total < 400_000
    with pytest.raises(QuantizeError, match="does not fit 50,000 bytes: at the coarsest steps tried it takes [0-9,]+"):
        rate.quantize_by_rate(tensors, matrices, CONFIG, CPU, 50_000)


def test_rows_of_zeros_stay_zeros(tensors, measured, tmp_path: Path) -> None:
    name = "blocks.0.mlp.fc.weight"
    tensors = tensors | {name: tensors[name].clone()}
    tensors[name][3] = 0
    matrices = rate.prepare(tensors, *measured, CONFIG, CPU)
    save(tmp_path / "model.pgolf", rate.quantize_by_rate(tensors, matrices, CONFIG, CPU, 170_000))
    weights = dequantize_model(load(tmp_path / "model.pgolf"), tensors)
    assert weights[name][3].abs().max() < 1e-9  # a path through the trellis has odd codes


def test_bytes_that_fall_in_stairs_are_met_from_below(tensors, measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix with one step: its bytes jump from exponent to exponent."""
    config = CONFIG.replace(trellis_row_steps=False, trellis_column_steps=False)
    name = "blocks.0.mlp.fc.weight"
    matrices = {name: rate.prepare(tensors, *measured, config, CPU)[name]}
    tries: list[float] = []
    monkeypatch.setattr(rate, "code", lambda *given, code=rate.code: tries.append(given[1]) or code(*given))
    monkeypatch.setattr(rate, "SLACK_BYTES", 40)  # fewer than an exponent changes
    for target in (5000, 5050, 5100, 5150):
        tries.clear()
        quantized = rate.quantize_by_rate({name: tensors[name]}, matrices, config, CPU, target)
        # An exponent is 72 bytes; of all but codes, the first try's bytes count.
        assert abs(target - packed_size(quantized, CPU).total) < 150, tries
        assert 1 < len(tries) < rate.ATTEMPTS


def test_a_model_without_matrices_says_so(tensors, sensitivities) -> None:
    small = {name: tensor for name, tensor in tensors.items() if tensor.numel() < 500}
    with pytest.raises(QuantizeError, match="no tensor has enough numbers to be quantised"):
        rate.prepare(small, {}, sensitivities, CONFIG, CPU)
    with pytest.raises(ConfigError, match="no tensor has enough numbers to be quantised"):
        expected_size(CONFIG.replace(gptq_passthrough_numel=10**8))


def test_numbers_that_are_not_finite_are_named(tensors, sensitivities) -> None:
    name = "blocks.0.mlp.fc.weight"
    broken = tensors | {name: torch.full_like(tensors[name], float("nan"))}
    with pytest.raises(QuantizeError, match="blocks.0.mlp.fc.weight has numbers that are not finite"):
        rate.prepare({name: broken[name]}, {}, sensitivities, CONFIG, CPU)
    with pytest.raises(QuantizeError, match="there is no Hessian of group 'blocks.0.mlp.fc'"):
        rate.prepare({name: tensors[name]}, {}, sensitivities, CONFIG, CPU)


# The same on a GPU, part by part, in the size of `tests.test_stages`.
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
GPU_CONFIG = CONFIG.replace(
    device="cuda",
    vocab_size=400,
    model_dim=64,
    num_heads=2,
    num_kv_heads=1,
    gate_attn_width=8,
    smear_gate_width=4,
    gptq_passthrough_numel=500,
    trellis_states=8,
    trellis_rows=64,
    sensitivity_sequences=24,
    sensitivity_tokens=128,
)


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple]:
    """On the CPU and on the GPU: the model's tensors, its sensitivities and Hessians."""
    torch.manual_seed(0)
    drawn = GPT(GPU_CONFIG)
    state = {name: value + 0.02 * torch.randn_like(value) for name, value in drawn.state_dict().items()}
    tokens = torch.randint(1, 400, (4000,))
    found = {}
    for device in ("cpu", "cuda"):
        config = GPU_CONFIG.replace(device=device)
        world = start_world(config)
        model = model_with(config, world, state)
        batch = Batch(
            tokens[None, :1024].to(device),
            tokens[None, 1:1025].to(device),
            torch.arange(0, 64 * 256, 64, dtype=torch.int32, device=device).clamp(max=1024),  # padded, as by the loader
            64,
        )
        hessians = collect_hessians(model, [batch])
        found[device] = hessians, collect_sensitivities(model, config, tokens, world)
    found["tensors"] = unbank({name: value.float() for name, value in state.items()}, GPU_CONFIG.num_layers)
    return found


@needs_cuda
def test_hessians_on_a_gpu(parts: dict[str, tuple]) -> None:
    for group, hessian in parts["cuda"][0].items():
        exact = parts["cpu"][0][group]
        assert (hessian.cpu() - exact).norm() < 0.03 * exact.norm(), group  # bfloat16 on a CPU: up to 0.013


@needs_cuda
def test_sensitivities_on_a_gpu(parts: dict[str, tuple]) -> None:
    found, exact = parts["cuda"][1], parts["cpu"][1]
    assert (found.head - exact.head).norm() < 1e-3 * exact.head.norm()  # bfloat16 on a CPU: 7e-5
    for name, rows in found.rows.items():
        assert torch.isfinite(rows).all(), name
        if name.endswith(".weight") and "gate" not in name:
            total = float(exact.rows[name].sum())
            assert rows.sum() == pytest.approx(total, rel=0.05), name  # bfloat16 on a CPU: 0.012


@needs_cuda
def test_codes_on_a_gpu(parts: dict[str, tuple]) -> None:
    tensors, codes = parts["tensors"], {}
    for device in ("cpu", "cuda"):
        matrices = rate.prepare(tensors, *parts["cpu"], GPU_CONFIG, torch.device(device))
        codes[device] = rate.code(matrices, level_of(matrices, 3.0), GPU_CONFIG)
    for name, exact in codes["cpu"].tensors.items():
        found = codes["cuda"].tensors[name]
        assert (found != exact).float().mean() < (0.05 if name.endswith(".q") else 0.02), name
