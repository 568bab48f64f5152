"""Grouped adapters of low rank: formula, gradients, precision, groups of any size; kernels on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import library

from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.low_rank import LowRank, low_rank, low_rank_reference
from pgolf.kernels.low_rank import triton as family

FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}  # of a relative error: one unit of bf16
NAMES = ("value", "x", "A", "B")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
# offsets, rows, d, rank, parts, width
CASES = {
    "several parts": ([0, 5, 5, 6, 47], 47, 48, 16, (40, 16, 24), 96),
    "rows in no group": ([3, 20, 20, 52], 70, 32, 5, (24,), None),
    "odd": ([0, 1, 34], 34, 37, 1, (3, 50), 55),
    "small": ([0, 5, 5, 19], 19, 16, 8, (24, 8), 40),
    "rank 80": ([0, 0, 17, 30, 30], 31, 72, 80, (33,), 40),
    "rank 128": ([0, 20], 20, 24, 128, (16, 16), None),
    "rank 256": ([2, 10, 19], 21, 40, 256, (48,), None),
    "many columns": ([0, 18, 20], 20, 16, 16, (300, 130), 512),
    "no rows": ([0, 0, 0], 0, 16, 16, (16,), None),
    "rows in none": ([4, 4, 4], 9, 16, 16, (16,), 24),
}

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(device, case: str, dtype: torch.dtype = torch.bfloat16) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """x, A, B, and the other arguments."""
    bounds, rows, d, rank, parts, width = CASES[case]
    groups = len(bounds) - 1
    shapes = (rows, d), (groups, len(parts) * rank, d), (groups, sum(parts), rank)
    sizes = 1, d**-0.5, rank**-0.5
    leaves = [(size * torch.randn(shape, device=device)).to(dtype) for shape, size in zip(shapes, sizes, strict=True)]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    return leaves, dict(offsets=offsets, scale=0.7, parts=parts, width=width)


def reference(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, offsets=None, scale=1.0, parts=None, width=None, residual=None
) -> LowRank:
    parts = (B.size(1),) if parts is None else parts
    return low_rank_reference(x, A, B, offsets, residual, scale, parts, sum(parts) if width is None else width)


def onto(op):
    """``op`` whose residual is its first argument, for `assert_as_precise` and `results`."""
    return lambda residual, *leaves, **arguments: op(*leaves, **arguments, residual=residual)


def row_by_row(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, offsets, scale, parts, width) -> torch.Tensor:
    """The formula, one row at a time."""
    y, rank, bounds = x.new_zeros(x.size(0), width or sum(parts)), B.size(2), offsets.tolist()
    for g in range(A.size(0)):
        for t in range(bounds[g], bounds[g + 1]):
            for j in range(len(parts)):
                first = sum(parts[:j])
                hidden = A[g, j * rank : (j + 1) * rank] @ x[t]
                y[t, first : first + parts[j]] = scale * B[g, first : first + parts[j]] @ hidden
    return y


def results(op, leaves, dout: torch.Tensor, arguments: dict, later: torch.Tensor | None = None) -> list[torch.Tensor]:
    """y of fresh leaves, then their gradients; ``later`` is that of the x handed through."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = op(*leaves, **arguments)
    loss, douts = [out.y], [dout.to(out.y.dtype)]
    if later is not None:
        loss, douts = [*loss, out.x], [*douts, later.to(out.x.dtype)]
    return [out.y.detach(), *torch.autograd.grad(loss, leaves, douts)]


def assert_as_precise(
    leaves, dout: torch.Tensor, arguments: dict, later: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> None:
    """Value and gradients are as near to those of float64 as the reference's in the same dtype."""
    ops, names = (low_rank, reference), NAMES
    if residual is not None:
        ops, names, leaves = [onto(op) for op in ops], (NAMES[0], "residual", *NAMES[1:]), [residual, *leaves]
    got, plain = (results(op, leaves, dout, arguments, later) for op in ops)
    exact = results(ops[1], [leaf.double() for leaf in leaves], dout.double(), arguments, later)
    for name, a, b, c in zip(names, got, plain, exact, strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        error, allowed = (float((tensor.double() - c).norm() / c.norm().clamp(min=1e-12)) for tensor in (a, b))
        assert error <= 1.2 * allowed + FLOOR[a.dtype], f"{name}: {error} where the reference has {allowed}"


def random_like(y: torch.Tensor, width: int | None = None) -> torch.Tensor:
    return torch.randn(*y.shape[:-1], y.size(-1) if width is None else width, device=y.device)


@pytest.mark.parametrize("case", CASES)
def test_formula(case: str) -> None:
    leaves, arguments = inputs("cpu", case, torch.float64)
    y = low_rank(*leaves, **arguments).y
    assert (y - row_by_row(*leaves, **arguments)).norm() < 1e-11
    assert torch.equal(low_rank(leaves[0][None], *leaves[1:], **arguments).y, y[None])


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_precision(device, case: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype != torch.bfloat16 and case not in ("small", "odd"):
        pytest.skip("of the other dtypes a few")
    leaves, arguments = inputs(device, case, dtype)
    _, rows, _, _, parts, width = CASES[case]
    assert_as_precise(leaves, torch.randn(rows, width or sum(parts), device=device), arguments)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_precision_onto_a_residual(device, case: str, dtype: torch.dtype) -> None:
    if INTERPRETED and (dtype != torch.bfloat16 or case in ("rank 256", "many columns")):
        pytest.skip("of the other dtypes and the large ones none")
    leaves, arguments = inputs(device, case, dtype)
    _, rows, _, _, parts, width = CASES[case]
    residual = torch.randn(rows, width or sum(parts), device=device).to(dtype)
    later = random_like(leaves[0]).to(dtype)
    assert_as_precise(leaves, random_like(residual), arguments, later, residual)


def test_columns_and_rows_of_nobody_are_the_residual(device) -> None:
    leaves, arguments = inputs(device, "rows in no group")
    residual = torch.randn(70, 31, device=device).bfloat16()
    given = residual.clone()
    y = low_rank(*leaves, **(arguments | dict(width=31)), residual=residual).y
    assert torch.equal(residual, given)
    assert all(
        torch.equal(y[place], residual[place]) for place in (slice(3), slice(52, 70), (slice(70), slice(24, 31)))
    )
    assert (y[3:52, :24] != residual[3:52, :24]).sum() > 1000


def test_the_residual_rounds_nothing_between(device) -> None:
    """The sum is fp32, and rounded once."""
    leaves, arguments = inputs(device, "rank 128", torch.bfloat16)
    residual = torch.randn(20, 32, device=device).bfloat16()
    y = low_rank(*leaves, **arguments, residual=residual).y
    assert not low_rank(*leaves, **arguments, residual=-y).y.isnan().any()
    if device.type == "cuda" or INTERPRETED:
        x, A, B = (leaf.float() for leaf in leaves)
        h = (x @ A[0].view(2, 128, 24).mT).bfloat16().float()
        exact = residual + arguments["scale"] * torch.cat([h[0] @ B[0, :16].T, h[1] @ B[0, 16:].T], 1)
        assert (y != exact.bfloat16()).sum() <= 20, "but for h's roundings"


@pytest.mark.parametrize("frozen", ["residual", "all others"])
def test_gradient_of_the_residual(device, frozen: str) -> None:
    """It is dy itself, or nothing."""
    leaves, arguments = inputs(device, "small")
    residual = torch.randn(19, 40, device=device).bfloat16().requires_grad_(frozen != "residual")
    expected = results(low_rank, leaves, random := random_like(residual), arguments)[1:]
    leaves = [leaf.detach().requires_grad_(frozen == "residual") for leaf in leaves]
    y, x = low_rank(*leaves, **arguments, residual=residual)
    dout = random.bfloat16()
    if frozen == "residual":
        got = torch.autograd.grad(y, leaves, dout)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and not residual.requires_grad
    else:
        (got,) = torch.autograd.grad(y, residual, dout)
        assert torch.equal(got, dout) and x is leaves[0]
        if device.type == "cuda" or INTERPRETED:
            assert got.data_ptr() == dout.data_ptr(), "no copy"


def test_strides_of_the_residual(device) -> None:
    leaves, arguments = inputs(device, "small")
    residual = torch.randn(40, 19, device=device).bfloat16().T
    expected = low_rank(*leaves, **arguments, residual=residual.contiguous()).y
    assert torch.equal(low_rank(*leaves, **arguments, residual=residual).y, expected)


@needs_kernels
@pytest.mark.parametrize("trained", [(), (1,), (2,), (1, 2)], ids=str)
def test_an_x_without_gradient_costs_none(monkeypatch, trained: tuple[int, ...]) -> None:
    """It is returned itself; neither dx nor, if only B needs a gradient, dh is computed."""
    leaves, arguments = inputs(DEVICE, "small")
    dout = random_like(leaves[0], 40).bfloat16()
    expected = results(low_rank, leaves, dout, arguments)[1:]
    launched = []
    for name in ("_write_dh", "_write_dx", "_write_dweight"):
        kernel = getattr(family, name)
        monkeypatch.setattr(family, name, lambda *a, name=name, kernel=kernel: launched.append(name) or kernel(*a))
    leaves = [leaf.detach().requires_grad_(i in trained) for i, leaf in enumerate(leaves)]
    residual = torch.randn(19, 40, device=DEVICE).bfloat16().requires_grad_()
    y, x = low_rank(*leaves, **arguments, residual=residual)
    got = torch.autograd.grad(y, [residual, *(leaves[i] for i in trained)], dout)[1:]
    assert x is leaves[0] and not x.requires_grad
    assert all(torch.equal(gradient, expected[i]) for i, gradient in zip(trained, got, strict=True))
    assert launched == ["_write_dh"] * (1 in trained) + ["_write_dweight"] * len(trained)


def test_columns_and_rows_of_nobody_are_zero(device) -> None:
    leaves, arguments = inputs(device, "rows in no group")
    with torch.no_grad():
        y, x = low_rank(*leaves, **(arguments | dict(width=31)))
    assert x is leaves[0] and y.shape == (70, 31)
    assert not y[:, 24:].any() and not y[:3].any() and not y[52:].any() and y[3:52, :24].all(1).sum() > 40


@pytest.mark.parametrize("shape", [(3, 21, 24), (3, 24), (2, 3, 5, 24), (1, 70, 24)], ids=str)
def test_groups_of_as_many_rows_each(device, shape: tuple[int, ...]) -> None:
    x, A, B = (torch.randn(size, device=device).bfloat16() for size in (shape, (shape[0], 8, 24), (shape[0], 17, 8)))
    flat, offsets = x.reshape(-1, 24), torch.arange(shape[0] + 1, dtype=torch.int32, device=device)
    offsets *= flat.size(0) // shape[0]
    y = low_rank(x, A, B, width=20).y
    assert y.shape == (*shape[:-1], 20)
    assert torch.equal(y.view(-1, 20), low_rank(flat, A, B, offsets, width=20).y)
    assert_as_precise([x, A, B], random_like(y), dict(width=20))


@needs_kernels
@pytest.mark.parametrize("rows", [64, 400])
def test_large_and_small_tiles(rows: int) -> None:
    """The launch parameters depend on how many rows a group has."""
    x = torch.randn(rows, 32, device=DEVICE).bfloat16()
    A, B = torch.randn(2, 16, 32, device=DEVICE).bfloat16(), torch.randn(2, 40, 16, device=DEVICE).bfloat16()
    offsets = torch.tensor([0, 50, rows], dtype=torch.int32, device=DEVICE)
    assert_as_precise([x, A, B], torch.randn(rows, 40, device=DEVICE), dict(offsets=offsets))


@needs_kernels
@pytest.mark.parametrize("case", ["several parts", "odd"])
def test_tiles_that_are_not_square(monkeypatch, case: str) -> None:
    """The weights' lie across where the gradient is narrower than they are, and dx_next is read before the product."""
    tile = dict(rows=32, columns=128, depth=16, warps=1, stages=2) if INTERPRETED else None
    tile = tile or dict(rows=64, columns=256, depth=32, warps=4, stages=2)
    table = family.launch_parameters
    other = ("input", "weights")
    monkeypatch.setattr(family, "launch_parameters", lambda f, c, d: tile if c in other else table(f, c, d))
    monkeypatch.setattr(family, "_SHORT", 0)
    leaves, arguments = inputs(DEVICE, case)
    _, rows, _, _, parts, width = CASES[case]
    assert_as_precise(leaves, torch.randn(rows, width, device=DEVICE), arguments, random_like(leaves[0]))


@needs_kernels
def test_many_groups() -> None:
    """More of them than a program reads at a time."""
    lengths = torch.randint(0, 3, (140,)) * (torch.rand(140) < 0.1)
    offsets = torch.cat([torch.tensor([2]), 2 + lengths.cumsum(0)]).to(DEVICE, torch.int32)
    rows = int(offsets[-1]) + 3
    leaves = [torch.randn(shape, device=DEVICE).bfloat16() for shape in ((rows, 8), (140, 4, 8), (140, 6, 4))]
    with torch.no_grad():
        y = low_rank(*leaves, offsets).y
    assert torch.allclose(y, reference(*leaves, offsets).y, rtol=2e-2, atol=5e-2)
    assert not y[:2].any() and not y[-3:].any()


@pytest.mark.parametrize("kind", ["wider", "transposed", "expanded", "unaligned"])
def test_strides(device, kind: str) -> None:
    """Of the gradient of y, and inputs that are not contiguous."""
    leaves, arguments = inputs(device, "small")
    base = torch.randn(19, 40, device=device).bfloat16()
    dout = {
        "wider": torch.cat([base, base + torch.nan], 1)[:, :40],
        "transposed": base.T.contiguous().T,
        "expanded": base[:1].expand(19, 40),
        "unaligned": torch.cat([base[:, :1], base], 1)[:, 1:],
    }[kind]
    assert dout.stride() != base.stride()
    expected = results(low_rank, leaves, dout.contiguous(), arguments)
    strided = [torch.stack([leaf, leaf], -1)[..., 0].requires_grad_() for leaf in leaves]
    y = low_rank(*strided, **arguments).y
    got = [y.detach(), *torch.autograd.grad(y, strided, dout)]
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(got, expected, strict=True))


def test_gradient_of_later_readers(device) -> None:
    leaves, arguments = inputs(device, "rows in no group")
    dout, later = torch.randn(70, 24, device=device), random_like(leaves[0]).bfloat16()
    assert_as_precise(leaves, dout, arguments, later)
    dx = results(low_rank, leaves, dout, arguments, later)[1]
    assert torch.equal(dx[:3], later[:3]) and torch.equal(dx[52:], later[52:]), "of rows in no group what was handed in"


def test_gradient_of_later_readers_alone(device) -> None:
    leaves, arguments = inputs(device, "small")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    later = random_like(leaves[0]).bfloat16()
    dx, *others = torch.autograd.grad(low_rank(*leaves, **arguments).x, leaves, later, allow_unused=True)
    assert torch.equal(dx, later) and others == [None, None]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_gradients_that_are_not_needed(device, needed: tuple[int, ...]) -> None:
    leaves, arguments = inputs(device, "small")
    dout = torch.randn(19, 40, device=device)
    expected = results(low_rank, leaves, dout, arguments)[1:]
    leaves = [leaf.detach().requires_grad_(i in needed) for i, leaf in enumerate(leaves)]
    got = torch.autograd.grad(low_rank(*leaves, **arguments).y, [leaves[i] for i in needed], dout.bfloat16())
    assert all(torch.equal(gradient, expected[i]) for i, gradient in zip(needed, got, strict=True))


def test_what_is_behind_or_before_the_groups_is_not_read(device) -> None:
    leaves, arguments = inputs(device, "rows in no group")
    dout = torch.randn(70, 24, device=device)
    expected = results(low_rank, leaves, dout, arguments)
    bounds = arguments["offsets"].tolist()
    for tensor in (leaves[0], dout):
        tensor[: bounds[0]] = tensor[bounds[-1] :] = torch.nan
    got = results(low_rank, leaves, dout, arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradient_of_zero_columns_is_not_read(device) -> None:
    leaves, arguments = inputs(device, "small")
    dout = torch.randn(19, 40, device=device)
    expected = results(low_rank, leaves, dout, arguments)
    dout[:, 32:] = torch.nan
    got = results(low_rank, leaves, dout, arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradcheck(device) -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, device=device) for shape in ((5, 3), (2, 4, 3), (2, 3, 2))]
    offsets = torch.tensor([1, 3, 4], dtype=torch.int32, device=device)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(
        lambda *leaves: tuple(low_rank(*leaves, offsets, 0.7, parts=(2, 1), width=4)), leaves, fast_mode=True
    )
    x = torch.randn(2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: low_rank(*leaves, parts=(2, 1)).y, [x, *leaves[1:]], fast_mode=True)
    residual = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *leaves: onto(low_rank)(*leaves, offsets=offsets, parts=(2, 1), width=4).y,
        [residual, *leaves],
        fast_mode=True,
    )


@needs_kernels
def test_the_same_bits_every_time() -> None:
    leaves, arguments = inputs(DEVICE, "small", torch.bfloat16)
    dout = torch.randn(19, 40, device=DEVICE)
    first, *others = (results(low_rank, leaves, dout, arguments) for _ in range(2 + 8 * (DEVICE == "cuda")))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
@pytest.mark.parametrize("bounds", [[-5, 10, 90, 200], [40, 3, 25, 12], [2**31 - 1, -(2**31), 7, 9]], ids=str)
def test_offsets_that_are_wrong_stay_inside(monkeypatch, bounds: list[int]) -> None:
    """Nothing around the tensors is written."""
    leaves, arguments = inputs(DEVICE, "rows in no group")
    offsets = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    guards = []  # what is around the results

    def guarded(*shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 4096,), 7.0, device=DEVICE, dtype=torch.bfloat16)
        guards.append((whole[:2048], whole[2048 + size :]))
        return whole[2048 : 2048 + size].view(shape)

    fakes = family._fake_forward, family._fake_backward
    monkeypatch.setattr(family, "_fake_forward", lambda *a: tuple(guarded(*t.shape) for t in fakes[0](*a)))
    monkeypatch.setattr(family, "_fake_backward", lambda *a: tuple(guarded(*t.shape) for t in fakes[1](*a)))
    x, A, B = leaves
    y, h = family.low_rank_forward(x, A, B, offsets, None, 1.0, (24,), 24, keep=True)
    family.low_rank_forward(x, A, B, offsets, y, 1.0, (24,), 24, keep=True)
    family.low_rank_backward(x, y, x, A, B, offsets, h.nan_to_num(0), 1.0, (24,))
    assert len(guards) == 7 and all(bool((guard == 7).all()) for pair in guards for guard in pair)


@needs_kernels
def test_the_operators_are_registered_as_they_behave() -> None:
    ops = torch.ops.pgolf
    x, A, B = (torch.randn(shape, device=DEVICE).bfloat16() for shape in ((9, 8), (2, 8, 8), (2, 12, 4)))
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, A, B)]
    residual = torch.randn(9, 16, device=DEVICE).bfloat16().requires_grad_()
    library.opcheck(ops.low_rank.default, (*leaves, offsets, None, 0.5, [8, 4], 16, True))
    library.opcheck(ops.low_rank.default, (*leaves, offsets, residual, 0.5, [8, 4], 16, True))
    x = x[:8].view(2, 4, 8)
    y, h = ops.low_rank.default(x, A, B, None, None, 0.5, [8, 4], 16, True)
    library.opcheck(ops.low_rank_backward.default, (None, y, x, A, B, None, h, 0.5, [8, 4], True, False, True))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "onto a residual"])
@pytest.mark.parametrize("offsets", [True, False], ids=["offsets", "equal groups"])
def test_compiles_whole(device, offsets: bool, residual: bool) -> None:
    leaves, arguments = inputs(device, "small")
    if not offsets:
        leaves[0], arguments["offsets"] = leaves[0][:18].reshape(3, 6, 16), None

    def function(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, **arguments: Any) -> LowRank:
        y, x = low_rank(x, A, B, **arguments)
        return LowRank(y + 1, 2 * x)

    torch._dynamo.reset()
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    dout, later = random_like(function(*leaves, **arguments).y), random_like(leaves[0])
    ops = function, whole
    if residual:
        ops, leaves = map(onto, ops), [random_like(dout).bfloat16(), *leaves]
    plain, compiled = (results(op, leaves, dout, arguments, later) for op in ops)
    assert all(torch.allclose(a, b, atol=3e-2, rtol=2e-2) for a, b in zip(plain, compiled, strict=True))


@needs_kernels
def test_second_derivative_is_refused() -> None:
    leaves, arguments = inputs(DEVICE, "small")
    leaves = [leaf.requires_grad_() for leaf in leaves]
    (dA,) = torch.autograd.grad(low_rank(*leaves, **arguments).y.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dA.sum().backward()


def test_errors_say_what_to_give() -> None:
    (x, A, B), _ = inputs("cpu", "several parts", torch.float32)
    offsets = torch.tensor([0, 5, 5, 6, 47], dtype=torch.int32)
    right = dict(x=x, A=A, B=B, offsets=offsets, parts=(40, 16, 24), width=96)
    low_rank(**right)
    for error, message, wrong in (
        (TypeError, "x must be bfloat16, float16, float32 or float64, got torch.int64", dict(x=x.long())),
        (TypeError, "A must be x's dtype torch.float32, got torch.bfloat16", dict(A=A.bfloat16())),
        (TypeError, "offsets must be int32, got torch.int64", dict(offsets=offsets.long())),
        (ValueError, "A must be .groups, parts x rank, d. with groups and d >= 1", dict(A=A[:0], B=B[:0])),
        (ValueError, r"B must be \[4, columns, rank\] with rank from 1 to 256, got shape \(3, 80, 16\)", dict(B=B[1:])),
        (ValueError, "with rank from 1 to 256", dict(B=torch.zeros(4, 80, 257))),
        (
            ValueError,
            r"parts must be positive and add up to B's 80 columns, got \[40, 40, 1\]",
            dict(parts=(40, 40, 1)),
        ),
        (ValueError, "parts must be positive", dict(parts=(80, 0))),
        (ValueError, "parts must be positive", dict(parts=())),
        (ValueError, "A must have 2 x 16 rows a group, parts x rank, got 48", dict(parts=(40, 40))),
        (ValueError, "width must be at least the 80 columns of all parts, got 79", dict(width=79)),
        (ValueError, "A must be on x's device cpu, got meta", dict(A=A.to("meta"))),
        (ValueError, "offsets must be on x's device cpu, got meta", dict(offsets=offsets.to("meta"))),
        (TypeError, "residual must be x's dtype torch.float32, got torch.bfloat16", dict(residual=x.bfloat16())),
        (ValueError, r"residual must be \[47, 96\], y's shape, got \[47, 48\]", dict(residual=x)),
        (ValueError, "residual must be on x's device cpu, got meta", dict(residual=torch.empty(47, 96, device="meta"))),
        (ValueError, r"x must be \[4, ..., 48\] without offsets, a row of it a group", dict(offsets=None)),
        (ValueError, r"x must be \[T, 48\] or \[1, T, 48\] with offsets, got shape \(47, 47\)", dict(x=x[:, 1:])),
        (ValueError, r"x must be \[T, 48\] or \[1, T, 48\] with offsets", dict(x=x.view(47, 1, 48))),
        (ValueError, r"offsets must be \[5\], groups \+ 1, got shape \(4,\)", dict(offsets=offsets[1:])),
        (ValueError, "offsets must ascend from 0 or more to x's 47 rows or less", dict(offsets=offsets.flip(0))),
        (ValueError, "offsets must ascend", dict(offsets=offsets - 1)),
        (ValueError, "offsets must ascend", dict(offsets=offsets + 1)),
    ):
        with pytest.raises(error, match=message):
            low_rank(**(right | wrong))
