"""Dequantisation: exact against golden weights and a float64 sum, both packings, and errors that name the argument."""

from __future__ import annotations

import pytest
import torch

from pgolf.kernels.dequant import LowRankFactors, dequantize


@pytest.fixture
def arrays(golden) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in golden("quantize").items()}


def factors(arrays: dict[str, torch.Tensor], packing: str) -> LowRankFactors:
    return LowRankFactors(*(arrays[f"{packing}/{name}"] for name in LowRankFactors._fields))


def random_case(device: str | torch.device = "cpu", rows: int = 24, columns: int = 64, rank: int = 4):
    q = torch.randint(-31, 32, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows).half() + 0.01
    qA = torch.randint(-2, 2, (rows, rank), dtype=torch.int8)
    qB = torch.randint(-8, 8, (rank, columns), dtype=torch.int8)
    asymmetric = LowRankFactors(qA, torch.tensor(0.37).half(), qB, torch.rand(rank * columns // 32).half())
    symmetric = LowRankFactors(qA, torch.rand(rows).half(), qB, torch.rand(rank).half())
    moved = [LowRankFactors(*(part.to(device) for part in case)) for case in (asymmetric, symmetric)]
    return q.to(device), scale.to(device), *moved


def test_golden_sum_is_exact(arrays):
    q, scale = arrays["gptq/int6_q"], arrays["gptq/int6_s"]
    assert torch.equal(dequantize(q, scale, factors(arrays, "lqer")), arrays["lqer/dequant"])


def test_both_packings_equal_a_float64_sum(device):
    q, scale, *cases = random_case(device)
    plain = q.double() * scale.double()[:, None]
    for qA, sA, qB, sB in cases:
        A = qA.double() * sA.double().reshape(-1, 1)
        B = (qB.double().reshape(sB.numel(), -1) * sB.double()[:, None]).reshape(qB.shape)
        expected = plain + A @ B
        torch.testing.assert_close(
            dequantize(q, scale, LowRankFactors(qA, sA, qB, sB)).double(), expected, rtol=1e-6, atol=1e-5
        )
        assert (A @ B).abs().max() > 1, "the correction must matter here"


def test_group_scales_serve_runs_of_columns():
    q, _, *_ = random_case()
    scale = torch.rand(24, 4).half()
    expected = torch.cat([q[:, 16 * g : 16 * (g + 1)].float() * scale[:, g, None].float() for g in range(4)], dim=1)
    assert torch.equal(dequantize(q, scale), expected)


def test_a_symmetric_packing_is_a_group_of_a_whole_row(arrays):
    """sB [rank] means one scale a row of B: the same rule as for groups, so one function serves both packings."""
    q, scale = arrays["gptq/int6_q"], arrays["gptq/int6_s"]
    qA, sA, qB, sB = factors(arrays, "lqer_sym")
    expected = q.float() * scale.float()[:, None] + (qA.float() * sA.float()[:, None]) @ (
        qB.float() * sB.float()[:, None]
    )
    torch.testing.assert_close(dequantize(q, scale, LowRankFactors(qA, sA, qB, sB)), expected, rtol=0, atol=1e-6)


def test_tf32_does_not_change_a_bit(device):
    q, scale, low_rank, _ = random_case(device)
    before = torch.backends.cuda.matmul.fp32_precision
    exact = dequantize(q, scale, low_rank)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert torch.equal(dequantize(q, scale, low_rank), exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    on_cpu = dequantize(q.cpu(), scale.cpu(), LowRankFactors(*(part.cpu() for part in low_rank)))
    assert torch.equal(exact.cpu(), on_cpu), "the arithmetic is the same on every device"


def test_out_and_dtype_round_once_from_float32(device):
    q, scale, low_rank, _ = random_case(device)
    exact = dequantize(q, scale, low_rank)
    out = torch.full(q.shape, float("nan"), dtype=torch.bfloat16, device=device)
    assert dequantize(q, scale, low_rank, out=out) is out
    assert torch.equal(out, exact.bfloat16())
    assert torch.equal(dequantize(q, scale, low_rank, dtype=torch.bfloat16), out)
    bank = torch.zeros(2, *q.shape, device=device)
    dequantize(q, scale, low_rank, out=bank[1])
    assert torch.equal(bank[1], exact) and not bank[0].any()


def test_transposed_codes_and_an_empty_matrix():
    q, scale, *_ = random_case()
    assert torch.equal(dequantize(q.T.contiguous().T, scale), dequantize(q, scale))
    assert dequantize(q[:0], scale[:0]).shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(q=torch.zeros(24, 64)), TypeError, "q must be int8"),
        (dict(q=torch.zeros(24, dtype=torch.int8)), ValueError, "q must be a matrix"),
        (dict(scale=torch.zeros(24, dtype=torch.float64)), TypeError, "scale must be float16 or float32"),
        (dict(scale=torch.zeros(23)), ValueError, r"scale must be \[24\]"),
        (dict(scale=torch.zeros(24, 5)), ValueError, "groups dividing 64"),
        (dict(out=torch.zeros(64, 24)), ValueError, "out must be"),
        (dict(out=torch.zeros(24, 64), dtype=torch.float16), TypeError, "contradicts out"),
        (dict(dtype=torch.int32), TypeError, "dtype must be a floating"),
        (dict(qA=torch.zeros(24, 3, dtype=torch.int8)), ValueError, "low_rank.qA and low_rank.qB"),
        (dict(qB=torch.zeros(4, 63, dtype=torch.int8)), ValueError, "low_rank.qA and low_rank.qB"),
        (dict(sA=torch.zeros(1)), ValueError, "low_rank.sA must be one element"),
        (dict(sB=torch.zeros(7)), ValueError, "low_rank.sB must be"),
        (dict(sB=torch.zeros(8, dtype=torch.bfloat16)), TypeError, "low_rank.sB must be float16"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    q, scale, low_rank, _ = random_case()
    in_factors = {name: value for name, value in change.items() if name in LowRankFactors._fields}
    arguments = dict(q=q, scale=scale, low_rank=low_rank._replace(**in_factors))
    with pytest.raises(error, match=words):
        dequantize(**arguments | {name: value for name, value in change.items() if name not in in_factors})
