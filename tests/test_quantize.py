"""Quantisation: golden codes and packings, GPTQ's properties, Hessians of a model, and a model there and back."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch

from pgolf.artifact import gptq as gptq_module
from pgolf.artifact.container import load, save
from pgolf.artifact.gptq import gptq
from pgolf.artifact.hessians import collect_hessians
from pgolf.artifact.inspection import inspect_artifact
from pgolf.artifact.low_rank import fit_low_rank, low_rank_factors, lqer_pack, lqer_pack_symmetric, outputs_error
from pgolf.artifact.quantize import dequantize_model, quantize_model, rule_for
from pgolf.artifact.quantized import largest_code, scales_by_group
from pgolf.config import RunConfig
from pgolf.kernels.dequant import LowRankFactors, dequantize
from pgolf.model.gpt import GPT
from pgolf.model.second_moments import _gram, hessian_group
from pgolf.model.weights import unbank
from tests.processes import run_processes


def correlated_hessian(columns: int, tokens: int = 400) -> torch.Tensor:
    x = torch.randn(tokens, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns))
    return x.T @ x / 16


# --- GPTQ


@pytest.mark.parametrize(("bits", "clip_sigmas"), [(4, 4.0), (6, 12.85), (7, 15.0)])
def test_gptq_meets_golden_codes(arrays, device, bits, clip_sigmas):
    weight, hessian = arrays["gptq/W"].to(device), arrays["gptq/H"].to(device)
    codes, scales = gptq(weight, hessian, clip_sigmas, largest_code(bits))
    difference = (codes.cpu().int() - arrays[f"gptq/int{bits}_q"].int()).abs()
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16
    assert (difference == 0).float().mean() >= 0.999
    assert difference.max() <= 1
    assert torch.equal(scales.cpu(), arrays[f"gptq/int{bits}_s"])
    assert not codes[:, 7].any(), "column 7 had no input"


def one_column_at_a_time(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, R: int, fine: range = range(0)
) -> torch.Tensor:
    """GPTQ from its definition in float64: round a column, then solve anew for all columns not yet rounded."""
    weight, hessian, scale = weight.double(), hessian.double(), scale.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(hessian.size(0))
    left = torch.argsort(hessian.diagonal(), descending=True).tolist()
    codes = torch.zeros_like(weight)
    for _ in range(weight.size(1)):
        column, rest = left[0], left[1:]
        step, reach = (scale * R / 127, 127) if column in fine else (scale, R)
        codes[:, column] = torch.round(weight[:, column] / step).clamp(-reach, reach)
        error = weight[:, column] - codes[:, column] * step
        if rest:  # minimise (e, d) H (e, d)ᵀ over the change d of the columns not rounded yet
            change = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, column])
            weight[:, rest] += error[:, None] * change
        left = rest
    return codes.to(torch.int8)


def test_gptq_is_its_definition_in_float64():
    weight, hessian = torch.randn(20, 48), correlated_hessian(48)
    codes, scales = gptq(weight, hessian, 4.0, 7)
    expected = one_column_at_a_time(weight, hessian, scales, 7)
    assert (codes == expected).float().mean() > 0.995
    assert (codes.int() - expected.int()).abs().max() <= 1


def test_groups_of_8_bits_follow_the_definition_and_lose_less():
    weight, hessian = torch.randn(24, 192), correlated_hessian(192)
    codes, scales = gptq(weight, hessian, 12.85, 31, fine=[1])
    agreement = codes == one_column_at_a_time(weight, hessian, scales, 31, range(64, 128))
    assert agreement.float().mean() > 0.999
    plain, same = gptq(weight, hessian, 12.85, 31)
    assert torch.equal(scales, same) and codes[:, 64:128].abs().max() > 31 >= codes[:, 128:].abs().max()
    found, before = (
        weight - dequantize(each, scales_by_group(scales, 6, fine, 192)) for each, fine in ((codes, [1]), (plain, []))
    )
    assert found[:, 64:128].norm() < before[:, 64:128].norm()
    assert outputs_error(found, hessian) < outputs_error(before, hessian)
    codes, _ = gptq(weight, torch.eye(192), 12.85, 31, fine=[1])
    alone = weight - dequantize(codes, scales_by_group(scales, 6, [1], 192))
    inside, outside = alone[:, 64:128].square().mean(), alone[:, 128:].square().mean()
    assert inside / outside == pytest.approx((31 / 127) ** 2, rel=0.15), "without correlations only the step counts"


def test_blocks_give_what_one_block_gives(monkeypatch):
    weight, hessian = torch.randn(32, 100), correlated_hessian(100)
    blocked = {}
    for size in (1, 16, 33, 128):
        monkeypatch.setattr(gptq_module, "BLOCK_COLUMNS", size)
        blocked[size] = gptq(weight, hessian, 6.0, 15)[0]
    for codes in blocked.values():
        assert (codes == blocked[128]).float().mean() > 0.998


def test_gptq_beats_rounding_to_the_nearest_on_the_calibration_inputs():
    weight, hessian = torch.randn(64, 96), correlated_hessian(96)
    codes, scales = gptq(weight, hessian, 4.0, 7)
    nearest = torch.round(weight / scales.float()[:, None]).clamp(-7, 7)

    def loss(rounded: torch.Tensor) -> float:
        error = weight - rounded.float() * scales.float()[:, None]
        return float(((error @ hessian) * error).sum())

    assert loss(codes) < 0.6 * loss(nearest)


def test_uncorrelated_inputs_are_rounded_to_the_nearest():
    weight = torch.randn(16, 40)
    codes, scales = gptq(weight, torch.eye(40), 12.0, 31)
    assert torch.equal(codes, torch.round(weight / scales.float()[:, None]).to(torch.int8))


def test_codes_use_the_whole_range_and_stay_in_it():
    weight = torch.randn(64, 64)
    for bits in (2, 4, 8):
        codes, _ = gptq(weight, correlated_hessian(64), 2.0, largest_code(bits))
        assert codes.abs().max() == largest_code(bits)


def test_a_row_of_zeros_gets_codes_zero():
    """A fresh output projection is zero: its scale must not become 0, nor its codes undefined."""
    weight = torch.randn(8, 32)
    weight[3] = 0
    codes, scales = gptq(weight, correlated_hessian(32), 12.0, 31)
    assert not codes[3].any() and (scales > 0).all()


def test_a_lone_outlier_that_clipping_cuts_is_reported():
    weight = 0.02 * torch.randn(6, 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an ordinary matrix has none
        gptq(weight, torch.eye(512), 12.0, 31)
    weight[2], weight[4] = 0, 0
    weight[2, 7], weight[4, 9] = 5.0, -1.0
    with pytest.warns(UserWarning, match=r"mlp: clipping takes 4\d% of row [24]'s norm away.* and 1 more rows"):
        gptq(weight, torch.eye(512), 12.0, 31, "mlp")


def test_more_damping_is_tried_and_reported_before_giving_up():
    weight = torch.randn(8, 32)
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 1.05  # eigenvalue -0.05: damping 0.01 is not enough, 0.1 is
    with pytest.warns(UserWarning, match=r"weight: the Hessian needed damping 0\.1 instead of 0\.01"):
        codes, _ = gptq(weight, indefinite, 12.0, 31)
    assert codes.any()
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(weight, indefinite * 30 - 29 * torch.eye(32), 12.0, 31)


@pytest.mark.parametrize(
    ("weight", "hessian", "clip_range", "words"),
    [
        (torch.zeros(4), torch.eye(4), 31, "weight must be"),
        (torch.zeros(4, 6), torch.eye(4), 31, r"hessian must be \[6, 6\]"),
        (torch.zeros(4, 4), torch.eye(4), 128, "clip_range"),
        (torch.full((4, 4), float("nan")), torch.eye(4), 31, "weight has numbers that are not finite"),
        (torch.zeros(4, 4), torch.eye(4) / 0, 31, "hessian has numbers that are not finite"),
        (1e8 * torch.randn(4, 4), torch.eye(4), 31, "does not fit float16"),
    ],
)
def test_gptq_errors(weight, hessian, clip_range, words):
    with pytest.raises(ValueError, match=words):
        gptq(weight, hessian, 12.0, clip_range)


# --- Low-rank corrections


def test_packings_are_the_golden_ones(arrays):
    A, B = arrays["lqer/A"], arrays["lqer/B"]
    for packing, packed in (("lqer", lqer_pack(A, B, 64)), ("lqer_sym", lqer_pack_symmetric(A, B, 4))):
        for name, value in packed._asdict().items():
            expected = arrays[f"{packing}/{name}"]
            assert value.dtype == expected.dtype and value.shape == expected.shape
            assert torch.equal(value, expected), (packing, name)


def test_factors_of_a_low_rank_matrix_give_it_back():
    matrix = torch.randn(40, 3) @ torch.randn(3, 30)
    A, B = low_rank_factors(matrix, 3)
    assert A.shape == (40, 3) and B.shape == (3, 30)
    torch.testing.assert_close(A @ B, matrix, rtol=1e-4, atol=1e-4)


def test_packed_ranges_are_those_of_two_s_complement():
    A = torch.tensor([[-3.0, 3.0], [2.0, 0.9]])  # scale 3 / 1.5: 1.5 rounds to 2, which the upper end clips to 1
    B = torch.tensor([[7.5, -7.5, 1.0, 0.4], [0.75, -0.75, 0.1, 0.04]])  # groups of 4: scales 1 and 0.1
    qA, sA, qB, sB = lqer_pack(A, B, 4)
    assert sA == 2 and qA.tolist() == [[-2, 1], [1, 0]]
    assert torch.equal(sB, torch.tensor([1, 0.1]).half()) and qB.tolist() == [[7, -8, 1, 0], [7, -8, 1, 0]]


def test_a_residual_of_zeros_packs_to_zeros():
    A, B = torch.zeros(50, 4), torch.zeros(4, 64)
    for packed in (lqer_pack(A, B, 32), lqer_pack_symmetric(A, B)):
        assert not packed.qA.any() and not packed.qB.any() and (packed.sB > 0).all()
    with pytest.raises(ValueError, match="divide the 256 elements"):
        lqer_pack(A, B, 100)


@pytest.mark.parametrize("shape", [(96, 64), (48, 128)])
@pytest.mark.parametrize("group", [64, None])
def test_fitted_factors_keep_more_of_the_outputs(shape: tuple[int, int], group: int | None):
    """Against the singular vectors of the residual itself, on inputs with a few strong directions."""
    rows, columns = shape
    hessian = correlated_hessian(columns)
    weight = torch.randn(rows, columns)
    codes, scales = gptq(weight, hessian, 12.0, 31)
    residual = weight - dequantize(codes, scales)

    def left(packed: LowRankFactors) -> float:
        none = torch.zeros(rows, columns, dtype=torch.int8)
        return outputs_error(residual - dequantize(none, torch.ones(rows), packed), hessian)

    A, B = low_rank_factors(residual, 4)
    plain = lqer_pack(A, B, group) if group else lqer_pack_symmetric(A, B, 4)
    fitted = fit_low_rank(residual, hessian, 4, group)
    assert [x.shape for x in fitted] == [x.shape for x in plain] and [x.dtype for x in fitted] == [
        x.dtype for x in plain
    ]
    assert left(fitted) < left(plain) and left(fitted) < 0.97 * outputs_error(residual, hessian)
    assert all(torch.equal(x, y) for x, y in zip(fitted, fit_low_rank(residual, hessian, 4, group), strict=True))


@pytest.mark.parametrize("group", [64, None])
def test_the_second_factor_is_fitted_to_the_rounded_first(group: int | None):
    """By least squares, then rounded: half a step from the optimum, and a little for the scale's float16."""
    residual, hessian = torch.randn(96, 64), correlated_hessian(64)
    fitted = fit_low_rank(residual, hessian, 4, group)
    first = fitted.qA.double() * fitted.sA.double().reshape(-1, 1)
    best = torch.linalg.lstsq(first, residual.double()).solution
    steps = fitted.sB.double().repeat_interleave(group or 64).view(4, 64)
    assert ((best - fitted.qB * steps).abs() <= 0.51 * steps).all()


def test_fitting_copes_with_less_rank_than_asked():
    for residual in (torch.zeros(40, 64), torch.randn(40, 1) @ torch.randn(1, 64)):
        fitted = fit_low_rank(residual, torch.eye(64), 4, 64)
        assert all(factor.isfinite().all() for factor in fitted)
        back = dequantize(torch.zeros(40, 64, dtype=torch.int8), torch.ones(40), fitted)
        assert (residual - back).norm() <= residual.norm()


def test_outputs_error_is_the_error_of_outputs():
    x, residual = torch.randn(200, 16), torch.randn(8, 16)
    assert outputs_error(residual, x.T @ x) == pytest.approx(float((x @ residual.T).square().sum()), rel=1e-4)


def test_tensors_are_corrected_where_it_helps_the_outputs():
    """By weights the larger residual wins; by outputs the one whose inputs are large."""
    torch.manual_seed(2)
    tensors = {"blocks.0.mlp.fc.weight": 2 * torch.randn(300, 256), "blocks.0.mlp.proj.weight": torch.randn(300, 256)}
    hessians = {"blocks.0.mlp.fc": correlated_hessian(256), "blocks.0.mlp.proj": 100 * correlated_hessian(256)}
    for weighted, chosen in ((False, "blocks.0.mlp.fc.weight"), (True, "blocks.0.mlp.proj.weight")):
        quantized = quantize_model(tensors, hessians, RunConfig().replace(lqer_top_k=1, lqer_weighted=weighted))
        assert [name for name, mark in quantized.meta.items() if "lqer" in mark] == [chosen]


# --- Which tensor is treated how


def test_groups_of_hessians():
    names = ["c_q", "c_k", "c_v"]
    assert {hessian_group(f"blocks.3.attn.{name}.weight") for name in names} == {"blocks.3.attn.qkv"}
    assert hessian_group("blocks.3.attn.proj.weight") == "blocks.3.attn.proj"
    assert hessian_group("blocks.10.mlp.fc.weight") == "blocks.10.mlp.fc"
    assert hessian_group("tok_emb.weight") == hessian_group("lm_head.weight", tied=False) == "tok_emb"
    assert hessian_group("tok_emb.weight", tied=False) is None


def test_rules_by_class():
    config = RunConfig().replace(matrix_bits=5, embed_bits=8)
    big = torch.zeros(300, 256)
    assert rule_for("tok_emb.weight", big, config) == (8, 15.0)
    assert rule_for("blocks.0.mlp.fc.weight", big, config) == (5, 12.0)
    assert rule_for("blocks.0.attn.c_q.weight", big, config) == (5, 13.0)
    assert rule_for("lm_head.weight", big, config) == (5, 12.85)
    by_class = config.replace(attn_bits=4, mlp_bits=7)
    assert rule_for("blocks.0.attn.c_q.weight", big, by_class) == (4, 13.0)
    assert rule_for("blocks.0.mlp.proj.weight", big, by_class) == (7, 12.0)


def test_what_is_kept():
    config = RunConfig()
    assert rule_for("blocks.0.mlp.fc.weight", torch.zeros(256, 256), config) is None, "65,536 numbers"
    assert rule_for("skip_weights", torch.zeros(300, 256), config) is None, "a control tensor"
    assert rule_for("blocks.0.attn.attn_gate_proj.weight", torch.zeros(300, 256), config) is None
    assert rule_for("blocks.0.mlp_gate", torch.zeros(300, 256), config) is None
    assert rule_for("table", torch.zeros(300, 256, dtype=torch.int64), config) is None
    none = config.replace(control_tensor_name_patterns="")
    assert rule_for("skip_weights", torch.zeros(300, 256), none) == (6, 12.85)


# --- A whole model


def small_model(vocabulary: int = 300, width: int = 256) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    shapes = {
        "blocks.0.attn.c_q.weight": (width, width + 8),
        "blocks.0.mlp.fc.weight": (2 * width, width),
        "blocks.0.attn_scale": (width,),
        "tok_emb.weight": (vocabulary, width),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    hessians = {
        "blocks.0.attn.qkv": correlated_hessian(width + 8),
        "blocks.0.mlp.fc": correlated_hessian(width),
        "tok_emb": correlated_hessian(width),
    }
    return tensors, hessians


def test_a_model_there_and_back(device):
    tensors, hessians = small_model()
    config = RunConfig().replace(lqer_top_k=1, matrix_clip_sigmas=5)
    quantized = quantize_model(tensors, hessians, config, device)
    assert list(quantized.meta) == list(tensors), "the state dict's order"
    assert quantized.meta == {
        "blocks.0.attn.c_q.weight": "gptq (int6)",
        "blocks.0.mlp.fc.weight": "gptq (int6)+lqer_asym",
        "blocks.0.attn_scale": "passthrough (float16)",
        "tok_emb.weight": "gptq (int7)",
    }
    assert all(value.device.type == "cpu" for value in quantized.tensors.values())
    template = {name: value.to(device, torch.bfloat16) for name, value in tensors.items()}
    restored = dequantize_model(quantized, template)
    assert list(restored) == list(tensors)
    for value in restored.values():
        assert value.dtype == torch.bfloat16 and value.device.type == device.type
    kept = restored["blocks.0.attn_scale"]
    assert torch.equal(kept, tensors["blocks.0.attn_scale"].half().to(kept))


def test_the_loss_of_every_class_is_within_rounding_to_the_nearest():
    """On the calibration inputs GPTQ loses less than the variance step²/12 of plain rounding, step = k/R of the row."""
    tensors, hessians = small_model()
    config = RunConfig().replace(lqer_enabled=False)
    restored = dequantize_model(quantize_model(tensors, hessians, config), tensors)
    for name, group, step in (
        ("tok_emb.weight", "tok_emb", 15.0 / 63),
        ("blocks.0.attn.c_q.weight", "blocks.0.attn.qkv", 13.0 / 31),
        ("blocks.0.mlp.fc.weight", "blocks.0.mlp.fc", 12.0 / 31),
    ):
        weight, hessian = tensors[name], hessians[group]
        error = weight - restored[name]
        lost = ((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum()
        assert 0.1 * step**2 / 12 < lost < 0.9 * step**2 / 12, name


def test_a_quantised_model_is_the_same_twice():
    tensors, hessians = small_model()
    first, second = (quantize_model(tensors, hessians, RunConfig()) for _ in range(2))
    assert first.meta == second.meta and list(first.tensors) == list(second.tensors)
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def test_corrections_go_to_the_largest_residuals_and_shrink_them():
    tensors, hessians = small_model()
    plain = quantize_model(tensors, hessians, RunConfig().replace(lqer_enabled=False))
    corrected = quantize_model(tensors, hessians, RunConfig().replace(lqer_top_k=2))
    lost = {
        name: float((tensors[name] - dequantize_model(plain, tensors)[name]).norm())
        for name, how in plain.meta.items()
        if how.startswith("gptq")
    }
    worst = sorted(lost, key=lost.__getitem__)[-2:]
    assert {name for name, how in corrected.meta.items() if "lqer" in how} == set(worst)
    assert not any("lqA" in key for key in plain.tensors)
    after = dequantize_model(corrected, tensors)
    for name in worst:
        assert float((tensors[name] - after[name]).norm()) < lost[name]


def test_the_symmetric_packing_serves_where_groups_do_not_fit():
    tensors, hessians = small_model()
    for change in (dict(lqer_asym_enabled=False), dict(lqer_asym_group=7)):
        quantized = quantize_model(tensors, hessians, RunConfig().replace(lqer_top_k=1, lqer_factor_bits=3, **change))
        assert quantized.meta["blocks.0.mlp.fc.weight"] == "gptq (int6)+lqer"
        factors = quantized.low_rank("blocks.0.mlp.fc.weight")
        assert factors.qA.abs().max() == 3 and factors.sA.shape == (512,)
        assert dequantize_model(quantized, tensors)["blocks.0.mlp.fc.weight"].isfinite().all()


def test_the_most_salient_groups_get_8_bits(tmp_path):
    tensors, hessians = small_model()
    tensors["tok_emb.weight"][:, 128:192] *= 4
    tensors["blocks.0.mlp.fc.weight"][:, 64:128] *= 3
    tensors["blocks.0.mlp.fc.weight"][:, :64] *= 3
    plain, protected = (quantize_model(tensors, hessians, RunConfig().replace(awq_groups=n)) for n in (0, 3))
    assert not any("awq" in how for how in plain.meta.values())
    matrices = [name for name in tensors if name != "blocks.0.attn_scale"]
    scores = []
    for name, group in zip(matrices, ("blocks.0.attn.qkv", "blocks.0.mlp.fc", "tok_emb"), strict=True):
        saliency = hessians[group].diagonal().sqrt() * tensors[name].abs().mean(0)
        if len(saliency) % 64 == 0:  # of attention's 264 columns none
            scores += [(float(part.sum()), name, number) for number, part in enumerate(saliency.split(64))]
    best = sorted(scores)[-3:]
    for name, how in protected.meta.items():
        assert [int(n) for n in how.partition("awq(")[2].partition(")")[0].split(",") if n] == sorted(
            number for _, other, number in best if other == name
        )
    assert protected.meta["blocks.0.mlp.fc.weight"].startswith("gptq (int6)+awq(0,1)")
    restored, before = dequantize_model(protected, tensors), dequantize_model(plain, tensors)
    for _, name, number in best:
        columns = slice(64 * number, 64 * number + 64)
        lost = [float((tensors[name] - found[name])[:, columns].norm()) for found in (restored, before)]
        assert lost[0] < lost[1], name
    codes, scale = (protected.tensors["tok_emb.weight" + key].float() for key in (".q", ".scale"))
    steps = scale[:, None] * torch.ones(256)
    steps[:, 128:192] *= 63 / 127
    uncorrected = quantize_model(tensors, hessians, RunConfig().replace(awq_groups=3, lqer_enabled=False))
    assert torch.equal(dequantize_model(uncorrected, tensors)["tok_emb.weight"], codes * steps)
    assert protected.meta["tok_emb.weight"] == "gptq (int7)+awq(2)+lqer_asym"
    for ending in (".pgolf", ".int6.ptz"):
        save(tmp_path / f"model{ending}", protected, "lzma")
        loaded = load(tmp_path / f"model{ending}")
        assert loaded.meta == protected.meta
        assert all(torch.equal(loaded.tensors[key], value) for key, value in protected.tensors.items())
        (row,) = (row for row in inspect_artifact(tmp_path / f"model{ending}").matrices if row.name == "tok_emb.weight")
        assert "awq(2)" in row.stored and row.row_steps[0] == float(protected.scales("tok_emb.weight").min())


def test_an_untied_embedding_needs_no_hessian():
    tensors, hessians = small_model()
    tensors["lm_head.weight"] = torch.randn(300, 256)
    config = RunConfig().replace(tie_embeddings=False, lqer_enabled=False)
    quantized = quantize_model(tensors, hessians, config)
    scale = quantized.tensors["tok_emb.weight.scale"].float()[:, None]
    assert torch.equal(quantized.tensors["tok_emb.weight.q"], torch.round(tensors["tok_emb.weight"] / scale).char())
    assert quantized.meta["lm_head.weight"] == "gptq (int6)"


def test_model_errors():
    tensors, hessians = small_model()
    with pytest.raises(ValueError, match=r"tok_emb.weight: there is no Hessian of group 'tok_emb'"):
        quantize_model(tensors, {name: h for name, h in hessians.items() if name != "tok_emb"}, RunConfig())
    with pytest.raises(ValueError, match="blocks.0.attn_scale has numbers that do not fit float16"):
        quantize_model(tensors | {"blocks.0.attn_scale": torch.full((4,), 1e5)}, hessians, RunConfig())
    quantized = quantize_model(tensors, hessians, RunConfig().replace(lqer_enabled=False))
    with pytest.raises(ValueError, match="lacks blocks.1.x and has blocks.0.attn_scale"):
        dequantize_model(quantized, {n: t for n, t in tensors.items() if "scale" not in n} | {"blocks.1.x": tensors})
    with pytest.raises(ValueError, match=r"blocks.0.attn_scale is \[256\] in the artifact and \[8\] in the model"):
        dequantize_model(quantized, tensors | {"blocks.0.attn_scale": torch.zeros(8)})


# --- Hessians


class Rows(NamedTuple):
    input_ids: torch.Tensor
    target_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int


class TwoProducts(torch.nn.Module):
    """The part of the model's interface that calibration uses: layer 0 runs twice when looping."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))
        self.looping_active = False

    def hidden(self, input_ids, cu_seqlens=None, max_seqlen=0, *, adapters=None, observe=None):
        assert not torch.is_grad_enabled() and not self.training
        x = torch.nn.functional.one_hot(input_ids, 8).to(self.weight.dtype)
        for _ in range(1 + self.looping_active):
            observe("blocks.0.attn.qkv", x)
            x = x @ self.weight
        observe("tok_emb", x)
        return x


def test_hessians_are_mean_products_over_batches_and_passes():
    model = TwoProducts()
    batches = [Rows(torch.randint(0, 8, (2, 5)), None, None, 5) for _ in range(3)]
    hessians = collect_hessians(model, iter(batches))
    x = torch.nn.functional.one_hot(torch.cat([b.input_ids.reshape(-1) for b in batches]), 8).float()
    y = x @ model.weight.detach()
    torch.testing.assert_close(hessians["blocks.0.attn.qkv"], (x.T @ x + y.T @ y) / 3)
    z = y @ model.weight.detach()
    torch.testing.assert_close(hessians["tok_emb"], z.T @ z / 3)
    assert model.training and not model.looping_active, "the model is put back as it was"


def test_calibration_needs_a_batch_and_restores_after_an_error():
    model = TwoProducts().eval()
    with pytest.raises(ValueError, match="at least one batch on every rank"):
        collect_hessians(model, [])
    with pytest.raises(RuntimeError):
        collect_hessians(model, [Rows(torch.full((1, 4), 99), None, None, 4)])
    assert not model.training and not model.looping_active


def test_the_model_gives_a_hessian_to_every_matrix():
    settings = dict(vocab_size=260, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4, gate_attn_width=8)
    config = RunConfig().replace(**settings, num_layers=6, loop_start=1, loop_end=2, parallel_start_layer=4)
    model = GPT(config)
    rows = Rows(torch.randint(2, 260, (1, 24)), None, torch.tensor([0, 10, 24], dtype=torch.int32), 14)
    hessians = collect_hessians(model, [rows])
    matrices = {
        name: value
        for name, value in unbank(model.state_dict(), config.num_layers).items()
        if name == "tok_emb.weight" or (value.ndim == 2 and ".weight" in name and "gate" not in name)
    }
    assert len(matrices) == 6 * 6 + 1
    assert hessians.keys() == {hessian_group(name) for name in matrices}
    for name, matrix in matrices.items():
        hessian = hessians[hessian_group(name)]
        assert hessian.dtype == torch.float32 and hessian.shape == (matrix.size(1), matrix.size(1))
        torch.testing.assert_close(hessian, hessian.T, rtol=1e-4, atol=1e-4)
    passes = hessians["blocks.1.attn.qkv"].trace() / hessians["blocks.0.attn.qkv"].trace()
    assert passes == pytest.approx(3 / 2, rel=0.01), "three passes, each scaled by 1/(layer + 1)"


def _rank_of_calibration(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = TwoProducts()
    generator = torch.Generator().manual_seed(rank)
    batches = [Rows(torch.randint(0, 8, (2, 5), generator=generator), None, None, 5) for _ in range(rank + 1)]
    hessians = collect_hessians(model, batches)
    with pytest.raises(ValueError, match="and 1 had none"):  # on both ranks, so that none waits for the other
        collect_hessians(model, batches if rank == 0 else [])
    return hessians


def test_ranks_average_over_all_their_batches(tmp_path):
    by_rank = run_processes(_rank_of_calibration, 2, tmp_path)
    torch.manual_seed(0)
    model = TwoProducts()
    batches = []
    for rank in range(2):
        generator = torch.Generator().manual_seed(rank)
        batches += [Rows(torch.randint(0, 8, (2, 5), generator=generator), None, None, 5) for _ in range(rank + 1)]
    for name, expected in collect_hessians(model, batches).items():
        for rank in range(2):
            torch.testing.assert_close(by_rank[rank][name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_are_float32_sums(device, dtype: torch.dtype) -> None:
    """As float32 arithmetic on the CPU; matrix units of a GPU may cut off the last bits of each partial sum."""
    x = torch.randn(4096, 48, device=device).to(dtype)
    exact = x.double().T @ x.double()
    reference = (x.cpu().float().T @ x.cpu().float()).to(device)
    measured = _gram(x)
    slack = 2e-5 if device.type == "cuda" and dtype == torch.bfloat16 else 1e-6
    assert measured.dtype == torch.float32
    assert (measured - exact).norm() <= 2 * (reference - exact).norm() + slack * exact.norm()
