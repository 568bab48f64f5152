"""The MLP with its residual: formula, gradients, precision, edges; kernels run on a GPU or interpreted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import library

from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.common.compiling import jit, tl
from pgolf.kernels.residual_mlp import residual_mlp, residual_mlp_reference
from pgolf.kernels.residual_mlp import triton as family

FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}  # of a relative error: one unit of bf16
NAMES = ("residual", "x", "up", "down")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(device, tokens=(2, 5), width=8, hidden=24, dtype=torch.float32) -> list[torch.Tensor]:
    """residual, x, up and down."""
    shapes = (*tokens, width), (*tokens, width), (hidden, width), (width, hidden)
    sizes = 1, 1, width**-0.5, max(hidden, 1) ** -0.5
    return [(size * torch.randn(shape, device=device)).to(dtype) for shape, size in zip(shapes, sizes, strict=True)]


def results(function, leaves, dout) -> list[torch.Tensor]:
    """The value of ``function`` of fresh leaves, then their gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def assert_as_precise(leaves, dout, function=residual_mlp, reference=residual_mlp_reference) -> None:
    """Value and gradients are as near to those of float64 as the reference's in the same dtype."""
    got, plain = (results(call, leaves, dout) for call in (function, reference))
    exact = results(reference, [leaf.double() for leaf in leaves], dout.double())
    for name, a, b, c in zip(("value", *NAMES[-len(leaves) :]), got, plain, exact, strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        error, allowed = (float((tensor.double() - c).norm() / c.norm().clamp(min=1e-12)) for tensor in (a, b))
        assert error <= 1.5 * allowed + FLOOR[a.dtype], f"{name}: {error} where the reference has {allowed}"


def with_parameters(monkeypatch, **changes: int) -> None:
    """All cases with these launch parameters, small tiles otherwise."""
    base = dict(block_m=64, block_n=64, block_k=32, subtiles=1, stages=2, warps=4, programs=1, descriptors=0)
    tuned = base | dict(flatten=0, early=0, ping_pong=0, copies=0) | changes
    monkeypatch.setattr(family, "launch_parameters", lambda *_: tuned)


SLOPES = [{}, dict(negative_slope=0), dict(negative_slope=0.1), dict(negative_slope=1.0)]


@pytest.mark.parametrize("slope", SLOPES, ids=str)
def test_formula(device, slope) -> None:
    leaves = residual, x, up, down = inputs(device)
    pre = x.double() @ up.double().T
    hidden = torch.where(pre < 0, slope.get("negative_slope", 0.5) * pre, pre) ** 2
    expected = residual + hidden @ down.double().T
    assert torch.allclose(residual_mlp(*leaves, **slope).double(), expected, rtol=1e-5, atol=1e-5)
    alone = residual_mlp(None, *leaves[1:], **slope).double()
    assert torch.allclose(alone, expected - residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slope", SLOPES, ids=str)
def test_gradients(device, slope) -> None:
    leaves = [leaf.requires_grad_() for leaf in inputs(device, (2,), 3, 4, torch.float64)]
    assert torch.autograd.gradcheck(partial(residual_mlp, **slope), leaves)
    assert torch.autograd.gradcheck(partial(residual_mlp, None, **slope), leaves[1:])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("slope", SLOPES[1:], ids=str)
def test_precision_with_other_slopes(device, slope, dtype) -> None:
    leaves, dout = inputs(device, (3, 23), 32, 96, dtype), torch.randn(3, 23, 32, device=device).to(dtype)
    assert_as_precise(leaves, dout, partial(residual_mlp, **slope), partial(residual_mlp_reference, **slope))


@needs_kernels
@pytest.mark.parametrize("dtype", FLOOR)
def test_hidden_of_slope_zero(dtype) -> None:
    """It is rounded in one way with and without a gradient, and is 0 and NaN as relu is."""
    _, x, up, down = inputs(DEVICE, (9,), 16, 24, dtype)
    x[0, 0], up[:, 0] = torch.inf, torch.where(up[:, 0] < 0, -1.0, 1.0)
    x[1, 1] = torch.nan
    outs = [family.mlp_forward(None, x, up, down, keep, 0.0) for keep in (True, False)]
    hidden = family.fused_product("up", family.SQUARE.value, x, up, slope=0.0)
    assert torch.equal(outs[0][1][2:], hidden[2:]) and torch.equal(outs[0][0][2:], outs[1][0][2:])
    assert torch.equal(hidden[0].isinf(), up[:, 0] > 0) and not hidden[0][up[:, 0] < 0].any()
    assert hidden[1].isnan().all() and outs[0][1][1].isnan().all()
    assert torch.equal(outs[0][1][0], hidden[0])


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("tokens, width, hidden", [((1,), 8, 8), ((2, 5), 24, 40), ((3, 23), 32, 96), ((70,), 7, 13)])
def test_precision(device, tokens, width: int, hidden: int, dtype) -> None:
    leaves, dout = inputs(device, tokens, width, hidden, dtype), torch.randn(*tokens, width, device=device).to(dtype)
    assert_as_precise(leaves, dout)
    assert_as_precise(
        leaves[1:], dout, lambda *leaves: residual_mlp(None, *leaves), lambda *s: residual_mlp_reference(None, *s)
    )


@needs_kernels
@pytest.mark.parametrize("tokens", [64, 150])
@pytest.mark.parametrize(
    "changes",
    [
        dict(descriptors=1),
        dict(descriptors=1, subtiles=2, flatten=1, stages=3),
        dict(descriptors=1, subtiles=4, flatten=1),
        dict(descriptors=1, early=1),
        dict(early=1, programs=2),
        dict(subtiles=2, flatten=1),
    ],
    ids=lambda changes: "_".join(f"{name}{value}" for name, value in changes.items()),
)
def test_launch_parameters(monkeypatch, changes: dict[str, int], tokens: int) -> None:
    with_parameters(monkeypatch, **changes)
    leaves, dout = inputs(DEVICE, (tokens,), 64, 136, torch.bfloat16), torch.randn(tokens, 64, device=DEVICE)
    assert_as_precise(leaves, dout.bfloat16())


@needs_kernels
def test_a_program_does_several_tiles(monkeypatch) -> None:
    monkeypatch.setattr(family, "multiprocessors", lambda device: 2)
    for changes in (dict(), dict(descriptors=1, early=1)):
        with_parameters(monkeypatch, **changes)
        leaves, dout = inputs(DEVICE, (130,), 64, 136, torch.bfloat16), torch.randn(130, 64, device=DEVICE)
        assert_as_precise(leaves, dout.bfloat16())


def test_onto_the_residual(device) -> None:
    leaves, dout = inputs(device, (9,), 16, 24), torch.randn(9, 16, device=device)

    def onto(residual, *rest):
        return residual_mlp(2 * residual, *rest, inplace=True)

    expected, got = (
        results(lambda r, *rest: residual_mlp_reference(2 * r, *rest), leaves, dout),
        results(onto, leaves, dout),
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(expected, got, strict=True))
    with torch.no_grad():
        strided = leaves[0].T.contiguous().T  # cannot be written onto as rows
        assert torch.allclose(
            residual_mlp(strided, *leaves[1:], inplace=True), residual_mlp_reference(*leaves), atol=1e-5
        )
        kept = leaves[0].clone()
        residual_mlp(*leaves)
        assert torch.equal(leaves[0], kept)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOOR)
def test_the_last_bit_of_hidden_is_the_sign_before(dtype) -> None:
    """And hidden is as near as that allows, without a bias."""
    x, up = (torch.randn(rows, 16, device=DEVICE).to(dtype) for rows in (257, 150))
    marked, plain = (
        family.fused_product("up", epilogue.value, x, up) for epilogue in (family.MARKED_SQUARE, family.SQUARE)
    )
    pre = x.double() @ up.double().T
    exact = torch.where(pre < 0, pre / 2, pre) ** 2
    bits = marked.view(torch.int32 if dtype == torch.float32 else torch.int16) & 1
    clear = pre.abs() > 0.1  # nearer to zero signs may differ, and float16 has fewer digits
    assert torch.equal(bits[clear] == 1, (pre < 0)[clear])
    unit = torch.finfo(dtype).eps
    assert ((plain.double() - exact) / exact)[clear].abs().max() <= unit / 2 + 1e-4
    error = ((marked.double() - exact) / exact)[clear]
    assert error.abs().max() <= 1.6 * unit + 1e-4
    for sign in (0, 1):
        bias = 0.5 if dtype == torch.float16 else 0.05  # it is made for bf16
        assert error[bits[clear] == sign].mean().abs() < bias * unit + 2e-6


@needs_kernels
@pytest.mark.parametrize("dtype", FLOOR)
def test_nan_and_infinity_stay_what_they_are(dtype) -> None:
    leaves = inputs(DEVICE, (3,), 8, 16, dtype)
    leaves[1][0, 0], leaves[1][1, 0] = torch.nan, 1e30
    for leaf in leaves:
        leaf.requires_grad_()
    for out in (residual_mlp(*leaves), residual_mlp(*(leaf.detach() for leaf in leaves))):
        assert out[0].isnan().all() and out[2].isfinite().all()
        assert dtype != torch.float16 or not out[1].isfinite().any()


@needs_kernels
def test_integers_bit_for_bit() -> None:
    shapes = (70, 16), (70, 16), (40, 16), (16, 40)
    leaves = [torch.randint(-3, 4, shape, device=DEVICE).float() for shape in shapes]
    exact = residual_mlp_reference(*(leaf.double() for leaf in leaves))
    assert torch.equal(residual_mlp(*leaves).double(), exact)


@pytest.mark.parametrize("which", [*NAMES, "none"])
def test_gradients_of_some(device, which: str) -> None:
    leaves = inputs(device)
    dout = torch.randn_like(leaves[0])
    expected = dict(zip(NAMES, results(residual_mlp_reference, leaves, dout)[1:], strict=True))
    for name, leaf in zip(NAMES, leaves, strict=True):
        leaf.requires_grad_(name == which)
    out = residual_mlp(*leaves)
    assert out.requires_grad == (which != "none")
    if which != "none":
        for _ in range(2):  # what is kept for the backward outlives it
            (gradient,) = torch.autograd.grad(out, leaves[NAMES.index(which)], dout, retain_graph=True)
            assert torch.allclose(gradient, expected[which], rtol=1e-4, atol=1e-5)


@needs_kernels
def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    out, hidden = family.mlp_forward(*inputs(DEVICE), False, 0.5)
    assert hidden.numel() == 0 and torch.ops.pgolf.residual_mlp(*inputs(DEVICE), True, 0.5)[1].shape == (10, 24)


def test_inputs_that_are_not_contiguous(device) -> None:
    residual, x = (torch.randn(16, 7, 3, device=device).permute(2, 1, 0) for _ in range(2))
    up, down = torch.randn(32, 24, device=device)[::2].T, torch.randn(24, 16, device=device).T
    leaves = [residual, x, up, down]
    assert_as_precise(leaves, torch.randn(1, 1, 16, device=device).expand(3, 7, 16))
    # an address that is not of whole 16 bytes
    flat = torch.randn(1 + 9 * 16, device=device).bfloat16()[1:].view(9, 16)
    assert_as_precise([flat, flat, *(leaf.bfloat16() for leaf in leaves[2:])], flat)


@pytest.mark.parametrize("tokens, hidden", [((0, 3), 24), ((4,), 0)])
def test_nothing_to_do(device, tokens, hidden: int) -> None:
    leaves = inputs(device, tokens, 8, hidden)
    out, *gradients = results(residual_mlp, leaves, leaves[0])
    assert torch.equal(out, leaves[0]) and torch.equal(gradients[0], leaves[0])
    assert not any(gradient.any() for gradient in gradients[1:])


if tl is not None:

    @jit
    def _copy_tile(matrix, out, row, width: tl.constexpr):
        tile = family._load(matrix, row, 4, row + 2, width, 2, 8, False)
        pointers, inside = family._place(out, tl.program_id(0), 0, 2, 8, 2, 8)
        tl.store(pointers, tile, mask=inside)


@needs_kernels
def test_offsets_beyond_32_bits() -> None:
    row, width = 2**20 + 3, 2048
    if DEVICE == "cpu":  # pages never touched take no memory
        memory = torch.from_numpy(np.zeros((row + 2, width), np.float16))
    else:
        memory = torch.zeros(row + 2, width, device=DEVICE, dtype=torch.float16)
    memory[row:] = torch.randn(2, width)
    out = torch.empty(2, 8, device=DEVICE, dtype=torch.float16)
    _copy_tile[(1,)](memory, out, row, width)
    assert torch.equal(out, memory[row:, 4:12])


@needs_kernels
def test_repeats_bit_for_bit() -> None:
    leaves, dout = inputs(DEVICE, (150,), 64, 128, torch.bfloat16), torch.randn(150, 64, device=DEVICE)
    first, *others = (results(residual_mlp, leaves, dout) for _ in range(20 if DEVICE == "cuda" else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
def test_operators_are_registered_as_they_behave() -> None:
    leaves = [leaf.requires_grad_() for leaf in inputs(DEVICE)]
    ops = torch.ops.pgolf
    library.opcheck(ops.residual_mlp.default, (*leaves, True, 0.5))
    library.opcheck(ops.residual_mlp.default, (None, *leaves[1:], True, 0.0))
    leaves = [leaf.detach() for leaf in leaves]
    library.opcheck(ops.residual_mlp.default, (*leaves, False, 0.5))
    out, hidden = family.mlp_forward(*leaves, True, 0.5)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        library.opcheck(ops.residual_mlp_backward.default, (out, *leaves[1:], hidden, 0.5, *needs))


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_whole(device, frozen: bool) -> None:
    leaves = inputs(device)
    dout, fixed = torch.randn_like(leaves[0]), leaves[2:] if frozen else []
    leaves = leaves[:2] if frozen else leaves

    def function(*leaves):
        x = leaves[1].tanh()  # of which the compiler must know that it wants a gradient
        return residual_mlp(leaves[0], x, *leaves[2:], *fixed, negative_slope=0.0 if frozen else 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, whole = (results(call, leaves, dout) for call in (function, compiled))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(plain, whole, strict=True))
    with torch.no_grad():
        assert torch.allclose(compiled(*leaves), plain[0], rtol=1e-5, atol=1e-5)


@needs_kernels
def test_second_derivative_is_refused() -> None:
    leaves = inputs(DEVICE)
    leaves[1].requires_grad_()
    (dx,) = torch.autograd.grad(residual_mlp(*leaves).square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_errors_name_the_argument() -> None:
    leaves = residual, x, up, down = inputs("cpu")
    with pytest.raises(ValueError, match=r"up must be \[m, d\] for x \[..., d\], got \(24, 4\)"):
        residual_mlp(residual, x, up[:, :4], down)
    with pytest.raises(ValueError, match=r"down must be \(8, 24\), got \(24, 8\)"):
        residual_mlp(residual, x, up, up)
    with pytest.raises(ValueError, match=r"residual must be \(2, 5, 8\), got \(1, 5, 8\)"):
        residual_mlp(residual[:1], x, up, down)
    with pytest.raises(TypeError, match="x must be bfloat16, float16, float32 or float64, got torch.int64"):
        residual_mlp(None, x.long(), up, down)
    for slope in (-0.1, 1.5, torch.nan):
        with pytest.raises(ValueError, match=f"negative_slope must be from 0, for relu², to 1, got {slope}"):
            residual_mlp(*leaves, negative_slope=slope)
    for k, name in enumerate(NAMES):
        if name != "x":
            changed = [*leaves[:k], leaves[k].bfloat16(), *leaves[k + 1 :]]
            with pytest.raises(TypeError, match=f"{name} must be x's dtype torch.float32, got torch.bfloat16"):
                residual_mlp(*changed)
            with pytest.raises(ValueError, match=f"{name} must be on x's device cpu, got meta"):
                residual_mlp(*leaves[:k], leaves[k].to("meta"), *leaves[k + 1 :])
