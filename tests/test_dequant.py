"""Dequantisation: packing round trips, kernels bit for bit as the reference in every format, golden weights, plans and
errors that name the argument."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from pgolf.kernels.common import backend
from pgolf.kernels.dequant import (
    DequantizePlan,
    LowRankFactors,
    PackedFactors,
    QuantizedMatrix,
    dequantize,
    dequantize_all,
    dequantize_reference,
    pack,
    triton,
    unpack,
)
from pgolf.kernels.dequant.packing import factor_values
from pgolf.kernels.dequant.reference import fused_multiply_add
from tests.conftest import INTERPRETED, covering

BITS = (4, 6, 7, 8)


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """The interpreter's fma rounds twice; a GPU's and ours once."""
    if INTERPRETED:
        import triton.runtime.interpreter as interpreter

        def create_fma(self, x, y, z):
            arrays = np.broadcast_arrays(x.data, y.data, z.data)
            result = fused_multiply_add(*(torch.from_numpy(np.array(array)) for array in arrays))
            return interpreter.TensorHandle(result.numpy(), z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


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
        (dict(scale=torch.zeros(24, dtype=torch.float64)), TypeError, "scale must be float16, bfloat16 or float32"),
        (dict(scale=torch.zeros(23)), ValueError, r"scale must be \[24\]"),
        (dict(scale=torch.zeros(24, 5)), ValueError, "groups dividing 64"),
        (dict(scale=torch.full((24,), float("inf"))), ValueError, "scale must be finite and below 2.100"),
        (dict(out=torch.zeros(64, 24)), ValueError, "out must be"),
        (dict(out=torch.zeros(24, 64), dtype=torch.float16), TypeError, "dtype must be left out"),
        (dict(dtype=torch.int32), TypeError, "dtype must be float16"),
        (dict(qA=torch.zeros(24, 3, dtype=torch.int8)), ValueError, "low_rank.qA and low_rank.qB"),
        (dict(qB=torch.zeros(4, 63, dtype=torch.int8)), ValueError, "low_rank.qA and low_rank.qB"),
        (dict(sA=torch.zeros(1)), ValueError, "low_rank.sA must be one element"),
        (dict(sB=torch.zeros(7)), ValueError, "low_rank.sB must be"),
        (dict(sB=torch.zeros(8, dtype=torch.float64)), TypeError, "low_rank.sB must be float16"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    q, scale, low_rank, _ = random_case()
    in_factors = {name: value for name, value in change.items() if name in LowRankFactors._fields}
    arguments = dict(q=q, scale=scale, low_rank=low_rank._replace(**in_factors))
    with pytest.raises(error, match=words):
        dequantize(**arguments | {name: value for name, value in change.items() if name not in in_factors})


# --- Packed matrices --------------------------------------------------------------------------------------------------


def random_codes(bits: int, signed: bool, rows: int, columns: int) -> torch.Tensor:
    low = -(1 << bits - 1) if signed else 0
    codes = torch.randint(low, low + (1 << bits), (rows, columns))
    return codes.to(torch.int8 if signed else torch.uint8)


def random_factors(kind: str, rows: int, columns: int, rank: int):
    if kind == "asymmetric":
        group = 64 if rank * columns % 64 == 0 else 8
        return random_factors("symmetric", rows, columns, rank)._replace(
            sA=torch.tensor(0.37).half(), sB=torch.rand(rank * columns // group).half()
        )
    qA, qB = torch.randint(-8, 8, (rows, rank)), torch.randint(-8, 8, (rank, columns))
    if kind == "wide":
        qA = qA * 15
    if kind in ("symmetric", "wide"):
        scales = torch.rand(rows).half() - 0.5, torch.rand(rank).half()
        return LowRankFactors(qA.to(torch.int8), scales[0], qB.to(torch.int8), scales[1])
    dtype = getattr(torch, kind)
    return (torch.randn(rows, rank).to(dtype), torch.randn(rank, columns).to(dtype))


def random_matrix(
    rows=24, columns=64, bits=6, signed=False, group=None, zero=None, scale=torch.float16, factors=None, rank=4
) -> QuantizedMatrix:
    """zero: None, "whole" or "any"."""
    groups = columns // group if group else 1
    scales = (torch.rand(rows, groups) + 0.01).to(scale)
    zeros = torch.rand(rows, groups) * (1 << bits)
    zeros = None if zero is None else (zeros.round() if zero == "whole" else zeros).to(scale)
    low_rank = None if factors is None else random_factors(factors, rows, columns, rank)
    return pack(random_codes(bits, signed, rows, columns), bits, scales, zeros, low_rank)


def to(q: QuantizedMatrix, device: torch.device) -> QuantizedMatrix:
    def moved(part):
        if isinstance(part, torch.Tensor):
            return part.to(device)
        if isinstance(part, tuple):
            return part._make(map(moved, part)) if hasattr(part, "_make") else tuple(map(moved, part))
        return part

    return q._replace(**{name: moved(part) for name, part in q._asdict().items()})


def reference(q: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(q.rows, q.columns, dtype=dtype)
    dequantize_reference(to(q, torch.device("cpu")), out)
    return out


FORMATS = {
    "rows": dict(rows=40, columns=72, signed=True),
    "groups": dict(columns=96, group=48, zero="whole"),
    "narrow groups": dict(columns=48, group=16, zero="any"),
    "bfloat16": dict(group=16, zero="any", scale=torch.bfloat16),
    "float32": dict(group=32, zero="whole", scale=torch.float32),
    "float32 without zeros": dict(rows=9, signed=True, scale=torch.float32),
    "ragged": dict(rows=13, columns=70, zero="whole"),
    "one row": dict(rows=1, columns=16, signed=True),
    "one column": dict(rows=17, columns=1),
    "several tiles": dict(rows=20 if INTERPRETED else 70, columns=1024, group=64, zero="whole", factors="asymmetric"),
    "asymmetric": dict(rows=30, columns=128, signed=True, factors="asymmetric"),
    "symmetric": dict(zero="any", group=32, factors="symmetric", rank=3),
    "ragged factors": dict(rows=11, columns=70, factors="symmetric", rank=8),
    "rank 1": dict(factors="symmetric", rank=1),
    "odd groups of B": dict(rows=8, columns=20, factors="asymmetric", rank=2),
    "wide factors": dict(columns=72, factors="wide", rank=5),
    "ragged values": dict(rows=9, columns=70, factors="float32", rank=2),
    "float16 factors": dict(factors="float16"),
    "bfloat16 factors": dict(factors="bfloat16", rank=7),
    "float32 factors": dict(factors="float32", rank=6),
}


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    bits=st.sampled_from(BITS),
    signed=st.booleans(),
    rows=st.integers(0, 20),
    columns=st.integers(0, 70),
    seed=st.integers(0, 2**30),
)
def test_codes_survive_packing(bits, signed, rows, columns, seed):
    torch.manual_seed(seed)
    codes = random_codes(bits, signed, rows, columns)
    q = pack(codes, bits, torch.ones(rows))
    assert torch.equal(unpack(q), codes) and unpack(q).dtype == codes.dtype
    units = -(-rows // 8) * -(-columns // 8)
    assert q.planes.nbytes == (codes.numel() if bits == 8 else 8 * bits * units)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(rows=st.integers(1, 20), columns=st.integers(1, 70), rank=st.integers(1, 8), seed=st.integers(0, 2**30))
def test_factors_survive_packing(rows, columns, rank, seed):
    torch.manual_seed(seed)
    factors = random_factors("symmetric", rows, columns, rank)
    q = pack(random_codes(8, True, rows, columns), 8, torch.ones(rows), low_rank=factors)
    assert isinstance(q.low_rank, PackedFactors)
    A, B = factor_values(q)
    assert torch.equal(A[:, :rank], factors.qA.float() * factors.sA.float()[:, None])
    assert torch.equal(B[:rank], factors.qB.float() * factors.sB.float()[:, None])
    assert A.shape == (rows, rank + -rank % 4) and not A[:, rank:].any() and not B[rank:].any()


def test_fma_rounds_once():
    """Against exact fractions, with sums that float64 cannot hold."""
    a, b, c = (torch.randn(300) * 2.0 ** torch.randint(-30, 30, (300,)) for _ in range(3))
    b[0], c[0], b[1] = 1.0, -a[0], 0.0
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    for got, wanted in zip(fused_multiply_add(a, b, c).tolist(), exact, strict=True):
        near = [np.nextafter(np.float32(got), np.float32(end)) for end in (-np.inf, np.inf)]
        assert all(abs(Fraction(got) - wanted) <= abs(Fraction(float(other)) - wanted) for other in near)


def test_fma_next_to_a_midpoint():
    """2^-24 (1 - 2^-46) beside 1 + 2^-23: less than half way to the next number; in float64 it is half way."""
    a, b, c = torch.tensor([2.0**-24 * (1 + 2.0**-23)]), torch.tensor([1 - 2.0**-23]), torch.tensor([1 + 2.0**-23])
    twice = (a.double() * b.double() + c.double()).float()
    assert twice == 1 + 2.0**-22, "what rounding twice gives"
    assert fused_multiply_add(a, b, c) == c and fused_multiply_add(-a, b, -c) == -c
    assert fused_multiply_add(a, b, torch.ones(1)) == 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_exact(device, bits, name):
    q = random_matrix(bits=bits, **FORMATS[name])
    wanted = reference(q)
    assert wanted.isfinite().all()
    got = dequantize(to(q, device))
    assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("name", ["groups", "ragged", "several tiles", "float32"])
def test_reference_is_the_formula(name):
    q = random_matrix(bits=6, **FORMATS[name])
    zero = 0 if q.zero is None else q.zero.double()[:, :, None]
    expected = ((unpack(q).double().view(*q.scale.shape, -1) - zero) * q.scale.double()[:, :, None]).view(q.rows, -1)
    if q.low_rank is not None:
        A, B = factor_values(q)
        expected = expected + A.double() @ B.double()
    torch.testing.assert_close(reference(q).double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_rounds_once(device, dtype):
    q = random_matrix(columns=70, factors="symmetric")
    wanted = reference(q, dtype)
    assert torch.equal(dequantize(to(q, device), dtype=dtype).cpu(), wanted)
    assert torch.equal(wanted, reference(q).to(dtype))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU, bench.tune checks what it tries")
@pytest.mark.parametrize("parameters", [{"rows": 1}, {"rows": 2}, {"rows": 8}, {"warps": 2}, {"warps": 8}], ids=str)
def test_every_launch_parameter_gives_the_same(device, monkeypatch, parameters):
    tables = triton.launch_parameters
    monkeypatch.setattr(triton, "launch_parameters", lambda *which: tables(*which) | parameters)
    matrices = mixed_model(device)
    outs = [torch.empty(q.rows, q.columns, device=device) for q in matrices]
    dequantize_all(matrices, outs)
    for q, out in zip(matrices, outs, strict=True):
        assert torch.equal(out, reference(q)) and torch.equal(dequantize(q), out)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 64, 65, 4095, 2**20 + 1, 2**28 - 1])
def test_division_by_multiplication(divisor):
    factor, shift = triton._reciprocal(divisor)
    assert 2**31 <= factor < 2**32
    near = [k * divisor + step for k in (0, 1, 2, (2**31 - 2) // divisor) for step in (-1, 0, 1)]
    for n in (n for n in (*near, 2**31 - 1) if 0 <= n < 2**31):
        assert n // divisor == (2 * n * factor >> 32) >> shift


def test_out_of_any_strides(device):
    q = to(random_matrix(rows=19, columns=64, group=16, zero="whole"), device)
    wanted = dequantize(q)
    wide = torch.full((19, 130), 7.0, device=device)
    for out in (wide[:, 3:67], wide[:, 64:128], torch.empty(64, 19, device=device).T):
        assert dequantize(q, out=out) is out
        assert torch.equal(out, wanted)
    assert (wide[:, :3] == 7).all() and (wide[:, 128:] == 7).all()


def test_strided_operands(device):
    codes, scale = random_codes(6, True, 16, 32).to(device), torch.rand(2, 16, device=device).half()
    wide = torch.stack([codes, codes], 2)[:, :, 0]
    q = pack(wide, 6, scale.T, low_rank=(torch.randn(4, 16, device=device).T, torch.randn(32, 4, device=device).T))
    assert torch.equal(dequantize(q).cpu(), reference(q))
    assert torch.equal(dequantize(wide, scale.T), dequantize(codes, scale.T.contiguous()))


def test_unaligned_operands(device):
    q = to(random_matrix(rows=16, columns=32, signed=True), device)
    moved = torch.cat([q.planes[:1], q.planes])[1:]
    assert torch.equal(dequantize(q._replace(planes=moved)).cpu(), reference(q))
    codes = torch.cat([unpack(q).flatten()[:1], unpack(q).flatten()])[1:].view(16, 32)
    assert torch.equal(dequantize(codes, q.scale), dequantize(q))


def mixed_model(device: torch.device, columns: int = 128) -> list[QuantizedMatrix]:
    formats = [
        dict(rows=40, bits=6, signed=True, factors="asymmetric"),
        dict(rows=24, bits=7, signed=True),
        dict(rows=9, bits=4, group=32, zero="whole"),
        dict(rows=16, bits=8, signed=True, zero="any", group=16, factors="symmetric", rank=1),
        dict(rows=0, bits=6),
        dict(rows=33, bits=8, signed=False, zero="whole"),
        dict(rows=64, bits=6, group=64, zero="whole", factors="symmetric", rank=3),
    ]
    return [to(random_matrix(columns=columns, **fields), device) for fields in formats]


@pytest.mark.parametrize("columns, dtype", covering([128, 40 * 16, 70], [torch.bfloat16, torch.float32], strength=1))
def test_a_plan_of_many_formats(device, columns, dtype):
    if columns == 70:
        formats = [dict(rows=20, bits=6), dict(rows=5, bits=8, signed=True), dict(rows=9, bits=7, factors="symmetric")]
        matrices = [to(random_matrix(columns=70, **fields), device) for fields in formats]
    else:
        matrices = mixed_model(device, columns)
    bank = torch.full((sum(q.rows for q in matrices) + 2, columns), float("nan"), dtype=dtype, device=device)
    outs = list(bank[1:-1].split([q.rows for q in matrices]))
    plan = DequantizePlan(matrices, outs)
    for _ in range(2):
        bank.fill_(float("nan"))
        plan()
        for q, out in zip(matrices, outs, strict=True):
            assert torch.equal(out.cpu(), reference(q, dtype))
        assert bank[0].isnan().all() and bank[-1].isnan().all()
    again = [torch.empty_like(out) for out in outs]
    dequantize_all(matrices, again)
    assert all(torch.equal(a, b) for a, b in zip(again, outs, strict=True))


def test_a_plan_without_factors_or_zeros_and_an_empty_one(device):
    matrices = [to(random_matrix(rows=rows, bits=6, signed=True), device) for rows in (8, 20)]
    outs = [torch.empty(q.rows, q.columns, dtype=torch.bfloat16, device=device) for q in matrices]
    dequantize_all(matrices, outs)
    assert all(torch.equal(out.cpu(), reference(q, out.dtype)) for q, out in zip(matrices, outs, strict=True))
    values = [to(random_matrix(rows=8, factors="float32", rank=rank), device) for rank in (1, 6)]
    outs = [torch.empty(8, 64, device=device) for _ in values]
    dequantize_all([*values, matrices[0]], [*outs, torch.empty(8, 64, device=device)])
    assert all(torch.equal(out.cpu(), reference(q)) for q, out in zip(values, outs, strict=True))
    dequantize_all([], [])


def test_a_plan_whose_first_matrix_is_unaligned(device):
    matrices = [to(random_matrix(rows=16, bits=bits, factors="symmetric"), device) for bits in (6, 8, 6)]
    wide = torch.full((16, 67), 7.0, device=device)
    outs = [wide[:, 1:65], *(torch.empty(16, 64, device=device) for _ in matrices[1:])]
    dequantize_all(matrices, outs)
    assert all(torch.equal(out.cpu(), reference(q)) for q, out in zip(matrices, outs, strict=True))
    assert (wide[:, :1] == 7).all() and (wide[:, 65:] == 7).all()


def test_a_plan_of_odd_slices(device):
    """Codes of 8 bits are taken where they are, at any address."""
    bank = torch.randint(-128, 128, (3, 9, 7), dtype=torch.int8, device=device)
    matrices = [pack(codes, 8, torch.rand(9, device=device).half()) for codes in bank]
    outs = torch.empty(3, 9, 7, device=device)
    dequantize_all(matrices, list(outs))
    for q, out in zip(matrices, outs, strict=True):
        assert torch.equal(out, dequantize(q))


def test_autograd_sees_what_is_overwritten(device):
    q = pack(torch.ones(4, 16, dtype=torch.int8, device=device), 8, torch.ones(4, device=device).half())
    x = torch.ones(2, 16, device=device, requires_grad=True)
    for write in (lambda out: dequantize(q, out=out), lambda out: dequantize_all([q], [out])):
        weight = torch.zeros(4, 16, device=device)
        y = x @ weight.T
        write(weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_plan_sees_new_contents(device):
    q = to(random_matrix(signed=True, zero="whole", factors="symmetric"), device)
    out = torch.empty(24, 64, device=device)
    plan = DequantizePlan([q], [out])
    q.planes.copy_(q.planes.flip(0))
    q.scale.mul_(0.5)
    plan()
    assert torch.equal(out.cpu(), reference(q))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_plan_in_a_cuda_graph():
    device = torch.device("cuda")
    matrices = mixed_model(device)
    outs = [torch.empty(q.rows, q.columns, dtype=torch.bfloat16, device=device) for q in matrices]
    plan = DequantizePlan(matrices, outs)
    plan()
    wanted = [out.clone() for out in outs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan()
    for _ in range(100):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, other) for out, other in zip(outs, wanted, strict=True))


def test_empty_matrices(device):
    for rows, columns in ((0, 32), (8, 0), (0, 0)):
        q = pack(torch.zeros(rows, columns, dtype=torch.int8, device=device), 6, torch.ones(rows, device=device))
        assert dequantize(q, dtype=torch.bfloat16).shape == (rows, columns)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can be kept from writing")
@pytest.mark.parametrize("planned", [False, True])
def test_rows_more_than_two_gigabytes_apart(monkeypatch, planned):
    import triton.runtime.interpreter as interpreter

    addresses = []

    def record(self, pointers, value, mask, *_):
        addresses.extend(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist())

    q = random_matrix(rows=17, columns=8, bits=4)
    out = torch.empty(8).as_strided((17, 8), (0, 1))
    item = triton._item(q, out)
    item = item._replace(sizes=(*item.sizes[:3], 2**27, *item.sizes[4:]))
    monkeypatch.setattr(triton, "_item", lambda *_: item)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", record)
    dequantize_all([q], [out]) if planned else dequantize(q, out=out)
    assert min(addresses) == out.data_ptr() and max(addresses) == out.data_ptr() + (16 * 2**27 + 7) * 4


def test_operator(device):
    q = to(random_matrix(group=32, zero="whole", factors="symmetric"), device)
    out = torch.empty(24, 64, dtype=torch.bfloat16, device=device)
    for case in (q, q._replace(low_rank=None), q._replace(zero=None, low_rank=factor_values(q))):
        arguments = (*case[:7], list(case.low_rank or ()), case.whole, out)
        library.opcheck(torch.ops.pgolf.dequantize_out.default, arguments)


@pytest.mark.skipif(INTERPRETED, reason="the compiler is for the process without the interpreter")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(device, backend):
    q = to(random_matrix(group=32, zero="whole", factors="symmetric"), device)

    @torch.compile(fullgraph=True, backend=backend)
    def apply(x, q, bank):
        dequantize(q, out=bank[1])
        return x @ dequantize(q, dtype=torch.float32).T, bank * 2

    x, bank = torch.randn(3, 64, device=device), torch.zeros(2, 24, 64, device=device)
    product, doubled = apply(x, q, bank)
    weight = dequantize(q)
    torch.testing.assert_close(product, x @ weight.T)
    assert torch.equal(bank[1], weight) and torch.equal(doubled[1], weight * 2) and not bank[0].any()


def test_autocast_changes_nothing(device):
    q = to(random_matrix(factors="symmetric"), device)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(dequantize(q).cpu(), reference(q))


def test_reference_can_be_asked_for(device, monkeypatch):
    monkeypatch.setattr(backend, "_chosen", "reference")
    q = to(random_matrix(factors="symmetric"), device)
    out = torch.empty(24, 64, device=device)
    dequantize_all([q], [out])
    assert torch.equal(dequantize(q), out) and torch.equal(out.cpu(), reference(q))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(codes=torch.zeros(24, 64)), TypeError, "codes must be int8 or uint8"),
        (dict(codes=torch.zeros(64, dtype=torch.int8)), ValueError, "codes must be a matrix"),
        (
            dict(codes=torch.full((24, 64), 32, dtype=torch.int8)),
            ValueError,
            r"codes must be in \[-32, 32\) for 6 bits",
        ),
        (dict(codes=torch.full((24, 64), 64, dtype=torch.uint8)), ValueError, r"codes must be in \[0, 64\)"),
        (dict(bits=5), ValueError, "bits must be 4, 6, 7 or 8, got 5"),
        (dict(scale=torch.ones(24, 8)), ValueError, "scale must be .* multiples of 16"),
        (dict(scale=torch.ones(24, 0)), ValueError, "scale must be"),
        (dict(scale=torch.ones(24, requires_grad=True)), ValueError, "scale must be detached"),
        (
            dict(scale=torch.full((24,), float("inf")).half()),
            ValueError,
            "scale must be finite and below 2.100, .* inf",
        ),
        (dict(scale=torch.full((24,), float("nan"))), ValueError, "scale must be finite .* magnitude of nan"),
        (dict(scale=torch.full((24,), -(2.0**100))), ValueError, "scale must be finite and below"),
        (dict(scale=torch.ones(24), zero=torch.full((24,), float("inf"))), ValueError, "zero must be finite"),
        (
            dict(low_rank=(torch.ones(24, 2), torch.full((2, 64), float("nan")))),
            ValueError,
            r"low_rank\[1\] must be finite",
        ),
        (dict(zero=torch.ones(24, 2).half()), ValueError, "zero must be as scale"),
        (dict(zero=torch.ones(24)), ValueError, "zero must be as scale"),
        (dict(low_rank=(torch.ones(24, 9), torch.ones(9, 64))), ValueError, r"low_rank\[0\] must be of rank 1 to 8"),
        (dict(low_rank=(torch.ones(24, 2), torch.ones(3, 64))), ValueError, "low_rank.* rank"),
        (
            dict(low_rank=(torch.ones(24, 2), torch.ones(2, 64).half())),
            TypeError,
            r"low_rank\[1\] must be torch.float32",
        ),
    ],
)
def test_errors_of_packing(change, error, words):
    arguments = dict(codes=torch.zeros(24, 64, dtype=torch.int8), bits=6, scale=torch.ones(24).half())
    with pytest.raises(error, match=words):
        pack(**arguments | change)


def test_errors_of_packed_matrices_and_plans():
    q, out = random_matrix(factors="symmetric"), torch.empty(24, 64)
    for change in (dict(planes=q.planes[1:]), dict(bits=7), dict(rows=25), dict(planes=q.planes.long())):
        with pytest.raises(ValueError, match="q.planes must be"):
            dequantize(q._replace(**change))
    with pytest.raises(ValueError, match="q.low_rank must be as pack made it"):
        dequantize(q._replace(low_rank=q.low_rank._replace(A=torch.ones(23, 4))))
    with pytest.raises(TypeError, match="scale and low_rank must be left out"):
        dequantize(q, torch.ones(24))
    with pytest.raises(TypeError, match="scale must be given"):
        dequantize(unpack(q))
    with pytest.raises(ValueError, match="out must be written under no_grad"):
        dequantize(q, out=torch.empty(24, 64, requires_grad=True))
    with pytest.raises(ValueError, match="outs must be as many as the matrices, 1"):
        DequantizePlan([q], [])
    with pytest.raises(TypeError, match=r"matrices\[0\] must be a QuantizedMatrix"):
        DequantizePlan([unpack(q)], [out])
    with pytest.raises(ValueError, match=r"matrices\[1\].scale must be"):
        DequantizePlan([q, q._replace(scale=q.scale[1:])], [out, out])
    with pytest.raises(ValueError, match=r"outs\[0\] must be a matrix with rows in one piece"):
        DequantizePlan([q], [torch.empty(64, 24).T])
    with pytest.raises(ValueError, match="of one dtype of scales and outs"):
        DequantizePlan([q, q], [out, out.bfloat16()])
