"""SmearGate and the prologue: formula, masks, gradients, precision, edges; kernels run on a GPU or interpreted."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.smear_gate import (
    RMS_EPS,
    embed_smear_norm,
    embed_smear_norm_reference,
    smear_gate,
    smear_gate_reference,
    triton,
)
from tests.conftest import covering

PATTERNS = {"none": [], "first": [0], "last": [6], "some": [0, 3, 4], "every": list(range(7))}
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6, torch.float64: 1e-13}  # of a relative error
NOISE = 1e-6
SHAPES = [(1, 1, 8, 8), (2, 7, 10, 4), (3, 37, 24, 12), (2, 18, 512, 12), (1, 5, 1500, 1)]  # B, T, D, W
DTYPES = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")


pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(device, pattern: str, dtype=torch.float64, rows: int = 2, width: int = 4):
    ids = torch.randint(4, 30, (rows, 7), device=device)
    ids[:, PATTERNS[pattern]] = 1
    x = torch.randn(rows, 7, 10, device=device, dtype=dtype)
    return x, ids, torch.randn(1, width, device=device, dtype=dtype), torch.randn(1, device=device, dtype=dtype)


def token_by_token(x, ids, weight, lam, bos_id):
    """The formula, one token at a time."""
    y = x.clone()
    for row in range(x.size(0)):
        for t in range(1, x.size(1)):
            if bos_id is None or ids[row, t] != bos_id:
                gate = lam * torch.sigmoid(weight.flatten() @ x[row, t, : weight.numel()])
                y[row, t] = x[row, t] + gate * x[row, t - 1]
    return y


def noise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a relative error of `NOISE` in every element."""
    return tensor * (1 + NOISE * torch.randn_like(tensor))


def gradients(function, leaves, dout):
    """The value of ``function`` of fresh leaves, then their gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def assert_as_precise(function, reference, leaves, dout) -> None:
    """Value and gradients are as near to those of float64 as the reference's in the same dtype.

    What both may miss by is a relative error of the inputs times the result's condition: the gradients of the gate
    are sums over all tokens and columns, which can cancel to any degree.
    """
    got = gradients(function, leaves, dout)
    plain = gradients(reference, leaves, dout)
    leaves, dout, floor = [leaf.double() for leaf in leaves], dout.double(), FLOOR[leaves[0].dtype]
    exact = gradients(reference, leaves, dout)
    noisy = [gradients(reference, [noise(leaf) for leaf in leaves], noise(dout)) for _ in range(8)]
    for i, name in enumerate(("value", "first", "weight", "lam")):
        a, b, c = got[i], plain[i], exact[i]
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        size = c.norm().clamp(min=1e-30)
        condition = max(1.0, *(float((tensors[i] - c).norm() / size) / NOISE for tensors in noisy))
        error, allowed = (float((tensor.double() - c).norm() / size) for tensor in (a, b))
        assert error <= 1.2 * allowed + floor * condition, f"{name}: {error} where the reference has {allowed}"


def compiled_for(function):
    """``function`` through the whole compiler but its code generation."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("bos_id", [1, None])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_formula(device, pattern: str, bos_id: int | None) -> None:
    arguments = inputs(device, pattern)
    assert (smear_gate(*arguments, bos_id) - token_by_token(*arguments, bos_id)).abs().max() < 1e-12


def test_one_token_is_unchanged(device) -> None:
    x, ids, weight, lam = inputs(device, "none")
    assert torch.equal(smear_gate(x[:, :1], ids[:, :1], weight, lam), x[:, :1])


@pytest.mark.parametrize("bos", [[], [1], [0, 1, 2]])
def test_gradients(device, bos: list[int]) -> None:
    ids = torch.tensor([[3, 2, 3]], device=device)
    ids[:, bos] = 1
    x, table = (torch.randn(*shape, 3, device=device, dtype=torch.float64) for shape in ((1, 3), (5,)))
    leaves = [torch.randn(n, device=device, dtype=torch.float64, requires_grad=True) for n in (2, 1)]
    assert torch.autograd.gradcheck(
        lambda *leaves: smear_gate(leaves[0], ids, *leaves[1:]), [x.requires_grad_(), *leaves]
    )
    assert torch.autograd.gradcheck(lambda *leaves: embed_smear_norm(ids, *leaves), [table.requires_grad_(), *leaves])


@pytest.mark.parametrize("shape, dtype", covering(SHAPES, DTYPES, strength=1), ids=str)
def test_precision_of_smear_gate(device, shape, dtype) -> None:
    rows, tokens, width, gate = shape
    ids = torch.randint(0, 6, (rows, tokens), device=device, dtype=torch.int32)
    x, dout = (torch.randn(rows, tokens, width, device=device).to(dtype) for _ in range(2))
    weight, lam = torch.randn(1, gate, device=device), torch.randn((), device=device)
    for bos_id in (1, None):
        assert_as_precise(
            lambda x, weight, lam, bos_id=bos_id: smear_gate(x, ids, weight, lam, bos_id),
            lambda x, weight, lam, bos_id=bos_id: smear_gate_reference(x, ids, weight, lam, bos_id),
            [x, weight, lam],
            dout,
        )


@pytest.mark.parametrize("shape, dtype, deterministic", covering(SHAPES, DTYPES, [True, False]), ids=str)
def test_precision_of_the_prologue(device, shape, dtype, deterministic: bool) -> None:
    rows, tokens, width, gate = shape
    ids = torch.randint(0, 20, (rows, tokens), device=device)
    table, dout = torch.randn(20, width, device=device), torch.randn(rows, tokens, width, device=device).to(dtype)
    weight, lam = torch.randn(gate, device=device).to(dtype), torch.randn(1, device=device).to(dtype)
    assert_as_precise(
        lambda *leaves: embed_smear_norm(ids, *leaves, deterministic=deterministic),
        lambda *leaves: embed_smear_norm_reference(ids, *leaves),
        [table.to(dtype), weight, lam],
        dout,
    )


LENGTHS = [1, 4, 1, 9, 3]  # of the sequences in a packed row
PACKED = sum(LENGTHS)


def packed(device) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, PACKED] ids, some of which are BOS, and the starts of the sequences."""
    ids = torch.randint(1, 6, (1, PACKED), device=device)
    starts = torch.zeros(1, PACKED, device=device, dtype=torch.bool)
    starts[0, np.cumsum([0, *LENGTHS[:-1]])] = True
    return ids, starts


def apart(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A packed row's sequences as rows of their own."""
    return list(tensor.split(LENGTHS, 1))


def smear(x, ids, weight, lam, bos_id, starts):
    return smear_gate(x, ids, weight, lam, bos_id, starts=starts)


PROLOGUES = {
    f"deterministic {deterministic}": lambda table, ids, weight, lam, bos_id, starts, d=deterministic: embed_smear_norm(
        ids, table, weight, lam, bos_id, deterministic=d, starts=starts
    )
    for deterministic in (True, False)
}


@pytest.mark.parametrize("bos_id", [1, None])
@pytest.mark.parametrize("name", ["smear_gate", *PROLOGUES])
def test_a_packed_row_is_its_sequences_as_rows_of_their_own(device, name: str, bos_id: int | None) -> None:
    ids, starts = packed(device)
    dout = torch.randn(1, PACKED, 10, device=device, dtype=torch.float64)
    rest = [torch.randn(n, device=device, dtype=torch.float64) for n in (4, 1)]
    if name == "smear_gate":
        sources, function = torch.randn_like(dout), smear
        leaf = lambda source, part: apart(source)[part]  # noqa: E731
    else:
        sources, function = torch.randn(6, 10, device=device, dtype=torch.float64), PROLOGUES[name]
        leaf = lambda source, part: source  # noqa: E731

    def separate(source, *rest):
        rows = [function(leaf(source, i), row, *rest, bos_id, None) for i, row in enumerate(apart(ids))]
        return torch.cat(rows, 1)

    together = gradients(lambda source, *rest: function(source, ids, *rest, bos_id, starts), [sources, *rest], dout)
    for a, b in zip(together, gradients(separate, [sources, *rest], dout), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)
    without = function(sources, ids, *rest, bos_id, None)
    assert not torch.allclose(together[0], without)


@pytest.mark.parametrize("starts", [[1], [0, 2], [0, 1, 2]])
def test_gradients_with_starts(device, starts: list[int]) -> None:
    ids, first = torch.tensor([[3, 1, 3]], device=device), torch.zeros(1, 3, device=device, dtype=torch.bool)
    first[:, starts] = True
    x, table = (torch.randn(*shape, 3, device=device, dtype=torch.float64) for shape in ((1, 3), (5,)))
    leaves = [torch.randn(n, device=device, dtype=torch.float64, requires_grad=True) for n in (2, 1)]
    assert torch.autograd.gradcheck(lambda x, *rest: smear(x, ids, *rest, None, first), [x.requires_grad_(), *leaves])
    for function in PROLOGUES.values():
        assert torch.autograd.gradcheck(
            lambda table, *rest, f=function: f(table, ids, *rest, None, first), [table.requires_grad_(), *leaves]
        )


@pytest.mark.parametrize("shape, dtype", covering(SHAPES, [torch.bfloat16, torch.float32], strength=1), ids=str)
def test_precision_with_starts(device, shape, dtype) -> None:
    rows, tokens, width, gate = shape
    ids = torch.randint(0, 20, (rows, tokens), device=device)
    starts = (torch.rand(tokens, rows, device=device) < 0.3).T  # not contiguous
    table, x, dout = (torch.randn(*lead, width, device=device).to(dtype) for lead in ((20,), *2 * ((rows, tokens),)))
    rest = [torch.randn(gate, device=device).to(dtype), torch.randn(1, device=device).to(dtype)]
    assert_as_precise(
        lambda x, *rest: smear(x, ids, *rest, 1, starts),
        lambda x, *rest: smear_gate_reference(x, ids, *rest, 1, starts=starts),
        [x, *rest],
        dout,
    )
    for function in PROLOGUES.values():
        assert_as_precise(
            lambda table, *rest, f=function: f(table, ids, *rest, 1, starts),
            lambda table, *rest: embed_smear_norm_reference(ids, table, *rest, 1, starts=starts),
            [table, *rest],
            dout,
        )


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("wild", [float("nan"), float("inf")])
@pytest.mark.parametrize("boundary", ["bos", "starts"])
def test_nothing_that_is_not_finite_passes_a_boundary(device, boundary: str, wild: float) -> None:
    """Neither from before it in the forward, nor from behind it in the backward."""
    ids, at = torch.tensor([[2, 3, 4, 1, 5, 3]], device=device), 3  # whose third token is wild
    starts = None if boundary == "bos" else ids == 1
    bos_id = 1 if boundary == "bos" else None
    x, table = torch.randn(1, 6, 10, device=device), torch.randn(6, 10, device=device)
    weight, lam = torch.randn(4, device=device), torch.randn(1, device=device)
    broken, broken_table, dout = x.clone(), table.clone(), torch.randn(1, 6, 10, device=device)
    broken[0, at - 1], broken_table[4] = wild, wild
    later = dout.clone()
    later[0, at] = wild
    cases = [(smear, broken, x, [3, 4, 5], [0, 1, 2])]
    cases += [(function, broken_table, table, [1, 5], [2, 4]) for function in PROLOGUES.values()]
    for function, bad, good, behind, before in cases:
        call = lambda source, *rest, f=function: f(source, ids, *rest, bos_id, starts)  # noqa: E731
        expected = gradients(call, [good, weight, lam], dout)
        got = gradients(call, [bad, weight, lam], dout)
        assert not got[0][0, at - 1].isfinite().any()
        assert torch.allclose(got[0][:, at:], expected[0][:, at:], atol=1e-6)
        assert torch.allclose(*(tensors[1].flatten(0, -2)[behind] for tensors in (got, expected)), atol=1e-5)
        got = gradients(call, [good, weight, lam], later)
        assert torch.allclose(*(tensors[1].flatten(0, -2)[before] for tensors in (got, expected)), atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got[2:], expected[2:], strict=True))


@needs_kernels
def test_integers_bit_for_bit() -> None:
    ids = torch.randint(0, 5, (2, 35), device=DEVICE)
    x, dout = (torch.randint(-8, 9, (2, 35, 16), device=DEVICE).bfloat16() for _ in range(2))
    weight, lam = torch.zeros(4, device=DEVICE), torch.full((1,), 2.0, device=DEVICE)  # so every gate is one
    got = gradients(lambda *leaves: smear_gate(leaves[0], ids, *leaves[1:]), [x, weight, lam], dout)
    leaves = [tensor.double() for tensor in (x, weight, lam)]
    exact = gradients(lambda *leaves: smear_gate_reference(leaves[0], ids, *leaves[1:]), leaves, dout)
    assert all(torch.equal(a.double(), b) for a, b in zip(got, exact, strict=True))


@given(bos=st.lists(st.booleans(), min_size=1, max_size=40), rows=st.integers(1, 3))
@settings(deadline=None, derandomize=True, max_examples=12)
def test_any_pattern_of_documents(bos: list[bool], rows: int) -> None:
    torch.manual_seed(len(bos))
    ids = torch.randint(2, 9, (rows, len(bos)), device=DEVICE)
    ids[:, torch.tensor(bos)] = 1
    x, table, dout = (torch.randn(*shape, 8, device=DEVICE) for shape in (ids.shape, (9,), ids.shape))
    leaves = [torch.randn(3, device=DEVICE), torch.randn(1, device=DEVICE)]
    assert_as_precise(
        lambda *leaves: smear_gate(leaves[0], ids, *leaves[1:]),
        lambda *leaves: smear_gate_reference(leaves[0], ids, *leaves[1:]),
        [x, *leaves],
        dout,
    )
    assert_as_precise(
        lambda *leaves: embed_smear_norm(ids, *leaves),
        lambda *leaves: embed_smear_norm_reference(ids, *leaves),
        [table, *leaves],
        dout,
    )


def test_prologue_is_its_three_parts(device) -> None:
    _, ids, weight, lam = inputs(device, "some")
    table = torch.randn(30, 10, device=device, dtype=torch.float64)
    parts = F.rms_norm(smear_gate(F.embedding(ids, table), ids, weight, lam), (10,), eps=RMS_EPS)
    assert (embed_smear_norm(ids, table, weight, lam) - parts).abs().max() < 1e-14


def test_inputs_that_are_not_contiguous(device) -> None:
    x = torch.randn(10, 7, 2, device=device).permute(2, 1, 0)
    ids = torch.randint(0, 4, (7, 2), device=device).T
    weight, lam = torch.randn(8, 1, device=device)[::2].T, torch.randn(2, device=device)[1]
    leaves = [x, weight, lam]
    dout = torch.randn(1, 1, 10, device=device).expand(2, 7, 10)
    assert_as_precise(
        lambda *leaves: smear_gate(leaves[0], ids, *leaves[1:]),
        lambda *leaves: smear_gate_reference(leaves[0], ids, *leaves[1:]),
        leaves,
        dout,
    )
    table = torch.randn(10, 8, device=device)[:, ::2].T
    got = embed_smear_norm(ids, table, weight, lam)
    assert torch.allclose(got, embed_smear_norm_reference(ids, table, weight, lam), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens(device, shape) -> None:
    ids, x = torch.zeros(shape, device=device, dtype=torch.long), torch.zeros(*shape, 6, device=device)
    leaves = [torch.ones(1, 2, device=device), torch.ones(1, device=device)]
    out, dx, dw, dlam = gradients(lambda *leaves: smear_gate(leaves[0], ids, *leaves[1:]), [x, *leaves], x)
    assert out.shape == dx.shape == x.shape and not dw.any() and not dlam.any()
    table = torch.ones(5, 6, device=device)
    for deterministic in (True, False):
        function = lambda *leaves, d=deterministic: embed_smear_norm(ids, *leaves, deterministic=d)  # noqa: E731
        out, *rest = gradients(function, [table, *leaves], x)
        assert out.shape == x.shape and not any(gradient.any() for gradient in rest)


@needs_kernels
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # 0 / 0, which the kernel leaves out
@pytest.mark.parametrize("vocabulary, tokens", [(1, 75), (3, 40), (40, 33), (2**15 + 1, 20)])
def test_sums_by_id(monkeypatch, vocabulary: int, tokens: int) -> None:
    """Segments inside a chunk, over two and over many, on the chunks' borders and at the end."""
    small = dict(chunk=8, columns_per_warp=8, stages=2, block=16, rows=2, join_warps=2)  # joined in many steps
    table = torch.randint(0, 2, (vocabulary, 16), device=DEVICE) * 2.0 - 1  # every norm is one
    ids, dout = (
        torch.randint(low, high, shape, device=DEVICE)
        for low, high, shape in ((0, vocabulary, (2, tokens)), (-4, 5, (2, tokens, 16)))
    )
    weight, lam = torch.zeros(3, device=DEVICE), torch.zeros(1, device=DEVICE)
    leaves, double = ([tensor.to(dtype) for tensor in (table, weight, lam)] for dtype in (torch.float32, torch.float64))
    exact = gradients(lambda *leaves: embed_smear_norm_reference(ids, *leaves, 1, 0.0), double, dout)
    parameters = triton.launch_parameters
    for tuned in (parameters, lambda *_: small | dict(chunk=7), lambda *_: small | dict(columns_per_warp=16)):
        monkeypatch.setattr(triton, "launch_parameters", tuned)
        got = gradients(lambda *leaves: embed_smear_norm(ids, *leaves, 1, 0.0), leaves, dout)
        assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5) for a, b in zip(got, exact, strict=True))
        assert torch.equal(got[1].double(), exact[1])  # the table's: sums of integers over 16
    if vocabulary > 1:  # else the norm leaves no gradient for the gate
        random = [torch.randn_like(leaf) for leaf in leaves]
        reference = lambda *leaves: embed_smear_norm_reference(ids, *leaves)  # noqa: E731
        assert_as_precise(lambda *leaves: embed_smear_norm(ids, *leaves), reference, random, dout.float())


@needs_kernels
@pytest.mark.parametrize("wild", [-1, 30, 2**40])
def test_an_id_outside_the_table_makes_its_row_nan(wild: int) -> None:
    _, ids, weight, lam = inputs(DEVICE, "none", torch.float32)
    table, rest = torch.randn(30, 10, device=DEVICE), (weight, lam, 1, RMS_EPS)
    ids[1, 2] = wild
    out = triton._embed_smear_norm(ids, table, *rest, True, None)
    assert out[1, 2].isnan().all() and out.isnan().sum() == 10
    for deterministic in (True, False):
        triton._embed_smear_norm_backward(out.nan_to_num(), ids, table, *rest, deterministic, None)


@pytest.mark.parametrize("wild", [-1, 30, 2**40])
def test_an_id_outside_the_table_where_nobody_reads_it(device, wild: int) -> None:
    _, ids, weight, lam = inputs(device, "none", torch.float32)
    ids[1, 2] = wild
    table = torch.randn(30, 10, device=device)
    expected = embed_smear_norm_reference(ids, table, weight, lam)
    assert expected[1, 2].isnan().all() and expected.isnan().sum() == 10
    got = compiled_for(lambda *leaves: embed_smear_norm(ids, *leaves))(table, weight, lam)
    assert torch.allclose(got, expected, atol=1e-5, equal_nan=True)


@needs_kernels
def test_repeats_bit_for_bit() -> None:
    ids = torch.randint(0, 5, (1, 70), device=DEVICE)
    leaves = [torch.randn(*shape, device=DEVICE) for shape in ((5, 32), (1, 12), (1,))]
    dout = torch.randn(1, 70, 32, device=DEVICE)
    first, *others = (gradients(lambda *leaves: embed_smear_norm(ids, *leaves), leaves, dout) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
def test_a_program_writes_its_own_chunk_only() -> None:
    """What it wrote into the next chunk's rows would be right or wrong by the order in which programs run."""
    x, weight, lam = torch.randn(1, 20, 16, device=DEVICE), torch.randn(4, device=DEVICE), torch.ones(1, device=DEVICE)
    ids = torch.zeros(1, 20, device=DEVICE, dtype=torch.long)
    dx, partials = torch.full_like(x, torch.nan), torch.full((5, 1), torch.nan, device=DEVICE)
    triton._backward_kernel[(1,)](
        x,
        x,
        ids,
        weight,
        lam,
        dx,
        partials,
        20,
        3,
        1,
        None,
        None,
        EPS=0.0,
        D=16,
        W=4,
        BLOCK=16,
        CHUNK=8,
        STAGES=2,
        EMBED=False,
        ACC=triton.tl.float32,
        num_warps=1,
    )
    assert not dx[:, :8].isnan().any() and dx[:, 8:].isnan().all() and not partials.isnan().any()


@needs_kernels
def test_offsets_beyond_32_bits() -> None:
    """The second of two rows of tokens begins behind element 2³¹; the kernel is given two tokens of it."""
    tokens, width = 2**22 + 5, 512
    if DEVICE == "cpu":  # pages never touched take no memory
        x = torch.from_numpy(np.zeros((2, tokens, width), np.float16))[:, :2]
    else:
        x = torch.zeros(2, tokens, width, device=DEVICE, dtype=torch.float16)[:, :2]
    x.copy_(torch.randn(2, 2, width))
    whole = torch.as_strided(x, (2, tokens, width), (tokens * width, width, 1))
    ids = torch.zeros(2, tokens, device=DEVICE, dtype=torch.int32)
    weight, lam = torch.randn(12, device=DEVICE), torch.ones(1, device=DEVICE)
    expected = smear_gate_reference(x.float(), ids[:, :2], weight, lam)
    triton._forward_kernel[(2,)](
        whole,
        ids,
        weight,
        lam,
        whole,
        tokens,
        1,
        2,
        1,
        None,
        EPS=0.0,
        D=width,
        W=12,
        BLOCK=512,
        CHUNK=2,
        STAGES=1,
        EMBED=False,
        ACC=triton.tl.float32,
        num_warps=1,
    )
    assert torch.allclose(x.float(), expected, atol=1e-2)


@needs_kernels
def test_operators_are_registered_as_they_behave() -> None:
    x, ids, weight, lam = inputs(DEVICE, "some", torch.float32)
    table = torch.randn(30, 10, device=DEVICE)
    differentiable = [tensor.requires_grad_() for tensor in (x, weight, lam, table)]
    ops = torch.ops.pgolf
    starts = ids % 3 == 0
    for first in (None, starts):
        library.opcheck(ops.smear_gate.default, (x, ids, weight, lam, 1, first))
        library.opcheck(ops.embed_smear_norm.default, (ids, table, weight, lam, None, RMS_EPS, True, first))
    x, weight, lam, table = (tensor.detach() for tensor in differentiable)
    for first in (None, starts):
        library.opcheck(ops.smear_gate_backward.default, (x, x, ids, weight, lam, None, first))
        for deterministic in (True, False):
            arguments = (x, ids, table, weight, lam, 1, RMS_EPS, deterministic, first)
            library.opcheck(ops.embed_smear_norm_backward.default, arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(device, autocast: bool) -> None:
    x, ids, weight, lam = inputs(device, "some", torch.float32)
    table = torch.randn(30, 10, device=device)
    calls = (
        (lambda *leaves: smear_gate(leaves[0], ids, *leaves[1:]), [x, weight, lam]),
        (lambda *leaves: embed_smear_norm(ids, *leaves), [table, weight, lam]),
        (lambda *leaves: embed_smear_norm(ids, *leaves, starts=ids % 2 == 0), [table, weight, lam]),
    )
    for function, leaves in calls:
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            plain, whole = (gradients(call, leaves, x) for call in (function, compiled_for(function)))
        assert plain[0].dtype == torch.float32
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(plain, whole, strict=True))


@needs_kernels
def test_second_derivative_is_refused() -> None:
    x, ids, weight, lam = inputs(DEVICE, "none", torch.float32)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(smear_gate(x, ids, weight, lam).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_errors_name_the_argument() -> None:
    x, ids, weight, lam = inputs("cpu", "none")
    table = torch.randn(30, 10)
    with pytest.raises(ValueError, match="x must be"):
        smear_gate(x[:, :5], ids, weight, lam)
    with pytest.raises(TypeError, match="x must be bfloat16, float16, float32 or float64, got torch.int64"):
        smear_gate(x.long(), ids, weight, lam)
    with pytest.raises(TypeError, match="input_ids must be int32 or int64"):
        smear_gate(x, ids.float(), weight, lam)
    with pytest.raises(ValueError, match="weight has 11"):
        smear_gate(x, ids, torch.zeros(1, 11), lam)
    with pytest.raises(ValueError, match=r"weight must be \[W\] or \[1, W\], got shape \(2, 2\)"):
        smear_gate(x, ids, torch.zeros(2, 2), lam)
    with pytest.raises(ValueError, match="lam must be one element"):
        smear_gate(x, ids, weight, torch.zeros(2))
    with pytest.raises(ValueError, match="lam must be on x's device cpu, got meta"):
        smear_gate(x, ids, weight, torch.zeros(1, device="meta"))
    for starts, error, message in (
        (torch.zeros(2, 7), TypeError, "starts must be bool, got torch.float32"),
        (torch.zeros(2, 6, dtype=torch.bool), ValueError, r"starts must have input_ids' shape \(2, 7\), got \(2, 6\)"),
        (torch.zeros(2, 7, dtype=torch.bool, device="meta"), ValueError, "starts must be on .* device cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            smear_gate(x, ids, weight, lam, starts=starts)
        with pytest.raises(error, match=message):
            embed_smear_norm(ids, table, weight, lam, starts=starts)
    with pytest.raises(ValueError, match="table must be"):
        embed_smear_norm(ids, x, weight, lam)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 30\), got 30"):
        embed_smear_norm(ids.clone().fill_(30), table, weight, lam)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 30\), got -1"):
        embed_smear_norm(ids.clone().fill_(-1), table, weight, lam)
