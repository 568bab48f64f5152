"""Softcapped linear cross-entropy: formula, gradients, precision, edges; kernels run on a GPU or interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import library

from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    rows,
    triton,
)
from tests.conftest import covering

FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 5e-5}  # of a relative error
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(device, tokens=(2, 5), width=8, vocabulary=24, dtype=torch.float32, size=2.0):
    h = (size * torch.randn(*tokens, width, device=device)).to(dtype)
    table = torch.randn(vocabulary, width, device=device).to(dtype)
    return h, table, torch.randint(0, vocabulary, tokens, device=device)


def results(function, h, table, dloss, update=None):
    """The loss of fresh leaves and its gradients for the loss's gradient ``dloss``."""
    leaves = (h, table) if update is None else (h, table, update)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in leaves]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss).expand_as(loss))]


def assert_as_precise(h, table, targets, softcap, dloss, update=None, **options) -> None:
    """Loss and gradients are as near to those of float64 as the reference's in the same dtype."""
    run, plainly = (
        lambda h, table, update=None, f=function: f(h, table, targets, softcap, update=update, **options)
        for function in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    got, plain = (results(function, h, table, dloss, update) for function in (run, plainly))
    exact = results(plainly, h.double(), table.double(), dloss.double(), None if update is None else update.double())
    for name, a, b, c in zip(("loss", "h", "table", "update"), got, plain, exact, strict=False):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        error, allowed = (float((tensor.double() - c).norm() / c.norm().clamp(min=1e-12)) for tensor in (a, b))
        assert error <= 1.5 * allowed + FLOOR[h.dtype], f"{name}: {error} where the reference has {allowed}"


def capped(z, softcap):
    """The formula, of one cap, of a pair by sign, or of none."""
    if softcap is None:
        return z
    caps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    cap = torch.tensor(caps, device=z.device, dtype=z.dtype)[(z <= 0).long()]
    return cap * torch.tanh(z / cap)


REDUCTIONS = ("mean", "sum", "none")
TOKENS = (2, 4) if INTERPRETED else (3, 7)
PAIRS = [(3.0, 7.0), (30.0, 4.0), (5.0, 39.0), (100.0, 6.0), (6.0, 100.0)]  # caps of positive and of negative z


@pytest.mark.parametrize(
    "softcap, reduction, updated", covering([3.0, 30.0, 100.0, (3.0, 7.0), (60.0, 2.0)], REDUCTIONS, [False, True])
)
def test_formula(device, softcap, reduction: str, updated: bool) -> None:
    h, table, targets = inputs(device)
    update = torch.randn(2, 5, 24, device=device) if updated else None
    z = h.double() @ table.double().T + (update.double() if updated else 0)
    logits = capped(z, softcap)
    expected = torch.logsumexp(logits, -1) - logits.gather(-1, targets[..., None])[..., 0]
    got = linear_cross_entropy(h, table, targets.int(), softcap, reduction, update=update)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_reference_takes_the_softcap_in_float32(device) -> None:
    h, table, targets = inputs(device, dtype=torch.bfloat16)
    update = torch.randn(2, 5, 24, device=device).bfloat16()
    z = (h @ table.T + update).double()
    logits = 30 * torch.tanh(z / 30)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    got = linear_cross_entropy_reference(h, table, targets, 30.0, update=update)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("softcap", [4.0, (4.0, 2.0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(device, reduction: str, softcap) -> None:
    h, table, targets = inputs(device, (2, 2), 3, 5, torch.float64)
    leaves = [h, table, torch.randn(2, 2, 5, device=device, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda h, table, update: linear_cross_entropy(h, table, targets, softcap, reduction, update=update),
        [leaf.requires_grad_() for leaf in leaves],
    )


@pytest.mark.parametrize(
    "softcap, vocabulary, dtype", covering([5.0, 30.0, 100.0, 1e30, None, *PAIRS], [2, 24, 70, 512], FLOOR)
)
def test_precision(device, softcap, vocabulary: int, dtype) -> None:
    h, table, targets = inputs(device, TOKENS, 16, vocabulary, dtype)
    for dloss in (torch.ones((), device=device), torch.tensor(0.3, device=device)):
        assert_as_precise(h, table, targets, softcap, dloss)
    assert_as_precise(h, table, targets, softcap, torch.tensor(0.01, device=device), reduction="sum")
    assert_as_precise(h, table, targets, softcap, torch.randn(TOKENS, device=device), reduction="none")


@pytest.mark.parametrize(
    "softcap, vocabulary, dtype", covering([5.0, 30.0, 100.0, (5.0, 30.0)], [2, 24, 70, 512], FLOOR)
)
def test_precision_with_an_update(device, softcap, vocabulary: int, dtype) -> None:
    h, table, targets = inputs(device, TOKENS, 16, vocabulary, dtype)
    update = torch.randn(*TOKENS[::-1], vocabulary, device=device).transpose(0, 1).to(dtype)
    for reduction, dloss in (("mean", 0.3), ("sum", 0.05)):
        assert_as_precise(h, table, targets, softcap, torch.tensor(dloss, device=device), update, reduction=reduction)
    weights = torch.rand(TOKENS, device=device) * (torch.arange(TOKENS[1], device=device) % 3 > 0)  # some are 0
    for chunk in (None, 4):
        options = dict(reduction="none", chunk_tokens=chunk)
        assert_as_precise(h, table, targets, softcap, weights, update, **options)
        with torch.no_grad():
            losses = linear_cross_entropy(h, table, targets, softcap, update=update, **options)
            plain = linear_cross_entropy_reference(h, table, targets, softcap, update=update, **options)
        assert torch.allclose(losses, plain, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("way", ["graded", "scored"])
def test_every_token_s_loss_is_of_logits_in_float32(device, way: str) -> None:
    """Rounded to bfloat16 they would be off by a sixteenth."""
    h, table, targets = inputs(device, (40 if INTERPRETED else 200,), 64, 512, torch.bfloat16, size=1.0)
    h.requires_grad_(way == "graded")
    losses = linear_cross_entropy(h, table, targets, 30.0, "none").detach()
    exact = linear_cross_entropy_reference(h.detach().double(), table.double(), targets, 30.0, "none")
    assert (losses - exact).abs().max() < 1e-4
    rounded = linear_cross_entropy_reference(h.detach(), table, targets, 30.0, "mean")
    assert (rounded - exact.mean()).abs() > (losses.mean() - exact.mean()).abs()


@needs_kernels
def test_scores_in_pieces(monkeypatch) -> None:
    """A score's logits are in memory a piece at a time, also where a gradient is wanted."""
    h, table, targets = inputs(DEVICE, (20,), 16, 64, torch.bfloat16)
    weights = torch.rand(20, device=DEVICE)
    call = lambda *leaves: linear_cross_entropy(*leaves, targets, 30.0, "none")  # noqa: E731
    whole = results(call, h, table, weights)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 6 * 64 * 4)
    pieces, launch = [], triton.launch
    monkeypatch.setattr(triton, "launch", lambda z, *rest: (pieces.append((len(z), z.dtype)), launch(z, *rest)))
    parts = results(call, h, table, weights)
    assert pieces == [(n, torch.float32) for n in (6, 6, 6, 2)]
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-5) for a, b in zip(whole, parts, strict=True))


def test_tokens_without_weight_have_no_gradient(device) -> None:
    h, table, targets = inputs(device, (6,))
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 2.0], device=device)
    update = torch.randn(6, 24, device=device)
    loss, dh, _, dupdate = results(
        lambda h, table, update: linear_cross_entropy(h, table, targets, 30.0, "none", update=update),
        h,
        table,
        weights,
        update,
    )
    assert loss.all() and not dh[weights == 0].any() and not dupdate[weights == 0].any()
    assert dh[weights > 0].any(-1).all() and dupdate[weights > 0].any(-1).all()


@pytest.mark.parametrize("chunk, dtype", covering([1, 4, 21, 50], FLOOR, strength=1))
def test_chunks(device, chunk: int, dtype) -> None:
    h, table, targets = inputs(device, (3, 7), 16, 70, dtype)
    for reduction, size in (("mean", 1.5), ("sum", 0.1)):
        dloss = torch.tensor(size, device=device)
        assert_as_precise(h, table, targets, 30.0, dloss, chunk_tokens=chunk, reduction=reduction)
    dloss = torch.randn(3, 7, device=device)
    assert_as_precise(h, table, targets, 30.0, dloss, reduction="none", chunk_tokens=chunk)
    with torch.no_grad():
        losses = [linear_cross_entropy(h, table, targets, 30.0, "none", size) for size in (chunk, None)]
    assert torch.allclose(*losses, rtol=1e-2)  # products of other sizes may sum in another order


@needs_kernels
def test_chunks_by_memory(monkeypatch) -> None:
    h, table, targets = inputs(DEVICE, (20,), 16, 64, torch.bfloat16)
    whole = results(lambda *leaves: linear_cross_entropy(*leaves, targets, 30.0), h, table, torch.ones(()))
    monkeypatch.setattr(triton, "ONE_CHUNK_BYTES", 20 * 128 - 1)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 6 * 128)
    chunks, launch = [], triton.launch
    monkeypatch.setattr(triton, "launch", lambda z, *rest: (chunks.append(len(z)), launch(z, *rest)))
    parts = results(lambda *leaves: linear_cross_entropy(*leaves, targets, 30.0), h, table, torch.ones(()))
    assert chunks == [6, 6, 6, 2]
    assert all(torch.allclose(a, b, rtol=2e-2, atol=1e-3) for a, b in zip(whole, parts, strict=True))


@needs_kernels
@pytest.mark.parametrize("softcap", [30.0, 100.0, None, *PAIRS])
@pytest.mark.parametrize("vocabulary", [33, 70, 96])
def test_rows_in_blocks(monkeypatch, vocabulary: int, softcap) -> None:
    """Rows longer than a program keeps in registers, here of 32 elements."""
    monkeypatch.setattr(rows, "ROW_ELEMENTS", 32)
    monkeypatch.setattr(rows, "launch_parameters", lambda *_: dict(block=32, columns_per_warp=32))
    h, table, targets = inputs(DEVICE, (4 if INTERPRETED else 9,), 16, vocabulary, torch.bfloat16)
    assert_as_precise(h, table, targets, softcap, torch.ones((), device=DEVICE))


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("which", ["h", "table", "update", "neither"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_of_some(device, which: str, chunk: int | None, updated: bool) -> None:
    h, table, targets = inputs(device)
    leaves = {"h": h, "table": table}
    if updated:
        leaves["update"] = torch.randn(2, 5, 24, device=device)

    def function(h, table, update=None, chunk=None):
        return linear_cross_entropy(h, table, targets, 30.0, chunk_tokens=chunk, update=update)

    expected = results(function, h, table, torch.ones(()), leaves.get("update"))
    if which in leaves:
        leaves[which].requires_grad_()
    loss = function(*leaves.values(), chunk=chunk)
    assert loss.requires_grad == (which in leaves)
    if which in leaves:
        for _ in range(2):  # what is kept for the backward outlives it
            (gradient,) = torch.autograd.grad(loss, leaves[which], retain_graph=True)
            assert torch.allclose(gradient, expected[1 + list(leaves).index(which)], rtol=1e-4, atol=1e-6)


def test_inputs_that_are_not_contiguous(device) -> None:
    h = torch.randn(8, 7, 3, device=device).permute(2, 1, 0)
    table, targets = torch.randn(16, 20, device=device)[::2].T, torch.randint(0, 20, (7, 3), device=device).T
    assert_as_precise(h, table, targets, 30.0, torch.ones((), device=device))
    assert_as_precise(h, table, targets, 30.0, torch.randn(7, 3, device=device).T, reduction="none")


@pytest.mark.parametrize("chunk", [None, 3])
def test_no_tokens(device, chunk: int | None) -> None:
    h, table, targets = inputs(device, (0, 4))
    loss, dh, dtable = results(
        lambda h, table: linear_cross_entropy(h, table, targets, 30.0, "none", chunk), h, table, torch.ones(0, 4)
    )
    assert loss.shape == (0, 4) and dh.shape == h.shape and not dtable.any()
    assert linear_cross_entropy(h, table, targets, 30.0, chunk_tokens=chunk).isnan()
    update = torch.zeros(0, 4, 24, device=device, requires_grad=True)
    loss = linear_cross_entropy(h, table, targets, 30.0, "sum", chunk, update=update)
    loss.backward()
    assert loss == 0 and update.grad.shape == update.shape


def test_one_token(device) -> None:
    h, table, targets = inputs(device, ())
    assert_as_precise(h, table, targets, 30.0, torch.ones((), device=device))
    assert_as_precise(h, table, targets, 30.0, torch.ones((), device=device), reduction="none")


@pytest.mark.parametrize(
    "softcap", [1e-6, 0.5, 30.0, 40.0, 1000.0, 1e8, 1e30, None, (1e-6, 1e30), (1e30, 1e-6), (2.0, 40.0)]
)
@pytest.mark.parametrize("size", [0.0, 1e-3, 1e4])
def test_logits_of_any_size(device, size: float, softcap) -> None:
    """At their caps or all equal: finite, and zero gradients where tanh is flat."""
    h, table, targets = inputs(device, (4,), size=size)
    table = torch.cat([table, -table])
    loss, dh, dtable = results(
        lambda *leaves: linear_cross_entropy(*leaves, targets, softcap), h, table, torch.ones(())
    )
    expected = linear_cross_entropy_reference(h.double(), table.double(), targets, softcap)
    assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-3)
    assert dh.isfinite().all() and dtable.isfinite().all()


@pytest.mark.parametrize(
    "softcap", [40.0, 41.0, 300.0, 1e4, 1e6, 1e30, None, (40.0, 9.0), (9.0, 40.0), (300.0, 2.0), (2.0, 300.0)]
)
def test_losses_are_exact_whatever_the_cap(device, softcap) -> None:
    """As sums of fp32 are, whether caps are far above the logits, near them or below."""
    h, table, targets = inputs(device, (40,), vocabulary=70, size=4.0)
    h[::4] *= softcap / 30 if isinstance(softcap, float) and softcap < 1e3 else 1
    got = linear_cross_entropy(h, table, targets, softcap, "none")
    z = (h @ table.T).double()  # products of fp32 differ
    logits = capped(z, softcap)
    exact = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    error = (got.double() - exact).abs() / (1 + logits.abs().amax(1))
    assert error.max() < 1e-6


def test_one_word(device) -> None:
    h, table, targets = inputs(device, vocabulary=1)
    loss, *gradients = results(lambda *leaves: linear_cross_entropy(*leaves, targets, 30.0), h, table, torch.ones(()))
    assert loss.abs() < 1e-5 and all(gradient.abs().max() < 1e-5 for gradient in gradients)


@pytest.mark.parametrize("way", ["reference", "compiled", "triton", "chunks"])
@pytest.mark.parametrize("wild", [-101, -1, 24, 2**40])
def test_a_target_outside_the_table(device, wild: int, way: str) -> None:
    """Its loss is NaN, and so is the mean's; it has no part in the gradients, and the others' are what they were."""
    if way in ("triton", "chunks") and device.type == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU or the interpreter")
    h, table, targets = inputs(device, (6,))
    others = torch.arange(6, device=device) != 2
    dloss = torch.ones((), device=device)
    known = lambda h, table: linear_cross_entropy_reference(h[others], table, targets[others], 30.0, "none")  # noqa: E731
    expected, (_, *gradients) = known(h, table), results(lambda *x: known(*x).sum() / 6, h, table, dloss)
    targets[2] = wild
    torch._dynamo.reset()
    call = {
        "reference": linear_cross_entropy_reference,
        "compiled": torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager"),
        "triton": lambda *x: triton.linear_cross_entropy_triton(*x, None),
        "chunks": lambda *x: triton.linear_cross_entropy_triton(*x, 4),
    }[way]
    losses = call(h, table, targets, 30.0, "none")
    assert losses[2].isnan() and torch.allclose(losses[others], expected, rtol=1e-4)
    loss, *found = results(lambda h, table: call(h, table, targets, 30.0, "mean"), h, table, dloss)
    assert loss.isnan() and not found[0][2].any()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, gradients, strict=True))


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("cap", [30.0, 100.0])
def test_equal_caps_are_one_bit_for_bit(device, cap: float, dtype) -> None:
    h, table, targets = inputs(device, (9,), 16, 70, dtype)
    for reduction in REDUCTIONS:
        one, pair = (
            results(lambda *x, rest=rest: linear_cross_entropy(*x, targets, *rest), h, table, torch.ones(()))
            for rest in ((cap, reduction), ((cap, cap), reduction))
        )
        assert all(torch.equal(a, b) for a, b in zip(one, pair, strict=True))


@needs_kernels
@pytest.mark.parametrize("softcap", PAIRS)
def test_gradients_of_logits_by_sign(softcap) -> None:
    """Each is as near to that of float64 as the same formula in fp32."""
    z = 5 * torch.randn(8, 64, device=DEVICE)
    z[:, 0], z[:, 1] = 0, -0.0
    targets = torch.randint(0, 64, (8,), device=DEVICE)

    def gradient(z):
        logits = capped(z.requires_grad_(), softcap)
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), z)[0]

    exact, plain = gradient(z.double()), gradient(z.clone())
    losses, dz = torch.empty(8, device=DEVICE), torch.empty_like(z)
    rows.launch(z, targets, losses, rows.Terms(softcap), 64, dz)
    error, allowed = ((found.double() - exact).abs().max() for found in (dz, plain))
    assert error <= 2 * allowed + 1e-6


@needs_kernels
def test_padding_of_rows_is_left_alone() -> None:
    z, targets = torch.randn(3, 64, device=DEVICE), torch.zeros(3, device=DEVICE, dtype=torch.int64)
    before, losses = z.clone(), torch.empty(3, device=DEVICE)
    rows.launch(z, targets, losses, rows.Terms(30.0), 41, z)
    assert torch.equal(z[:, 41:], before[:, 41:]) and not torch.equal(z[:, :41], before[:, :41])


@needs_kernels
def test_offsets_beyond_32_bits() -> None:
    """The second row begins behind element 2³¹."""
    stride = 2**31 + 64
    if DEVICE == "cpu":  # pages never touched take no memory
        memory = torch.from_numpy(np.zeros(stride + 64, np.float16))
    else:
        memory = torch.zeros(stride + 64, device=DEVICE, dtype=torch.float16)
    z, losses = memory.as_strided((2, 32), (stride, 1)), torch.empty(2, device=DEVICE)
    z.copy_(torch.randn(2, 32))
    targets, logits = torch.tensor([3, 5], device=DEVICE), 30 * torch.tanh(z.double() / 30)
    rows.launch(z, targets, losses, rows.Terms(30.0), 32, z)
    assert torch.allclose(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none").float())
    dz = (logits.softmax(-1) - torch.eye(32, device=DEVICE)[targets]) * (1 - (logits / 30) ** 2)
    assert torch.allclose(z.double(), dz, atol=1e-3)


@needs_kernels
def test_repeats_bit_for_bit() -> None:
    h, table, targets = inputs(DEVICE, (40,), 32, 200, torch.bfloat16)
    for chunk in (None, 16):
        function = lambda *leaves, c=chunk: linear_cross_entropy(*leaves, targets, 30.0, chunk_tokens=c)  # noqa: E731
        first, *others = (results(function, h, table, torch.ones(())) for _ in range(20 if DEVICE == "cuda" else 2))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
def test_operators_are_registered_as_they_behave() -> None:
    h, table, targets = inputs(DEVICE, (6,), 8, 25)
    update, bias = torch.randn(6, 25, device=DEVICE), torch.randn(25, device=DEVICE)
    h, table, update, bias = (tensor.requires_grad_() for tensor in (h, table, update, bias))
    ops = torch.ops.pgolf
    plain, every = (
        (None, None, [30.0, 9.0], None, 0.0, 0.0, False),
        (bias, bias.detach().abs(), None, 2, 0.1, 1e-2, True),
    )
    for terms, chunk, reduction, added in (
        (plain, 6, "mean", None),
        (plain, 4, "mean", None),
        (plain, 6, "sum", update),
        (plain, 6, "none", update),
        (every, 6, "none", None),
        (every, 4, "none", None),
        (every, 4, "sum", None),
    ):
        needed = (True, True, added is not None, terms is every)
        arguments = (h, table, targets, added, *terms, chunk, reduction, *needed)
        library.opcheck(ops.linear_cross_entropy.default, arguments)
        loss, _, *kept = triton._forward(*_detached(arguments))
        if chunk < 6 and reduction == "none":
            again = (torch.ones_like(loss), h, table, targets, *terms[:-1], chunk, *needed)
            library.opcheck(ops.linear_cross_entropy_backward_again.default, _detached(again))
        else:
            backward = (torch.ones_like(loss), h, table, *kept, chunk == 6, reduction, *needed)
            library.opcheck(ops.linear_cross_entropy_backward.default, _detached(backward))
    none = (h, table, targets, None, *every, 4, "mean", False, False, False, False)
    library.opcheck(ops.linear_cross_entropy.default, _detached(none))


def _detached(arguments: tuple) -> tuple:
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize(
    "way, updated, vocabulary",
    covering(
        [("mean", None), ("mean", 4), ("none", None), ("sum", None)],
        [False, True],
        [24, 25],
        strength=1,
        everywhere=True,
    ),
)
def test_compiles_whole(device, way: tuple[str, int | None], updated: bool, vocabulary: int) -> None:
    reduction, chunk = way
    h, table, targets = inputs(device, vocabulary=vocabulary)
    update = torch.randn(2, 5, vocabulary, device=device) if updated else None

    def function(h, table, update=None):
        h = h.sin()  # of which the compiler must know that it wants a gradient
        update = update if update is None else update.cos()
        return linear_cross_entropy(h, table, targets, 30.0, reduction, chunk, update=update)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    dloss = torch.ones((), device=device)
    plain, whole = (results(call, h, table, dloss, update) for call in (function, compiled))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(plain, whole, strict=True))
    with torch.no_grad():
        assert torch.allclose(compiled(h, table, update), plain[0], rtol=1e-5)


@needs_kernels
def test_second_derivative_is_refused() -> None:
    h, table, targets = inputs(DEVICE)
    loss = linear_cross_entropy(h.requires_grad_(), table, targets, 30.0)
    (dh,) = torch.autograd.grad(loss.square(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dh.sum().backward()


def test_errors_name_the_argument() -> None:
    h, table, targets = inputs("cpu")
    with pytest.raises(ValueError, match=r"table must be \[V, d\]"):
        linear_cross_entropy(h, table[:, :4], targets, 30.0)
    with pytest.raises(ValueError, match=r"table must be \[V, d\]"):
        linear_cross_entropy(h, table[:0], targets, 30.0)
    with pytest.raises(ValueError, match="targets must have h's shape"):
        linear_cross_entropy(h, table, targets[:1], 30.0)
    with pytest.raises(TypeError, match="h must be bfloat16, float16, float32 or float64, got torch.int64"):
        linear_cross_entropy(h.long(), table.long(), targets, 30.0)
    with pytest.raises(TypeError, match="table must have h's dtype torch.float32 or be float32, got torch.bfloat16"):
        linear_cross_entropy(h, table.bfloat16(), targets, 30.0)
    with pytest.raises(TypeError, match="targets must be int32 or int64"):
        linear_cross_entropy(h, table, targets.float(), 30.0)
    with pytest.raises(ValueError, match="table must be on h's device cpu, got meta"):
        linear_cross_entropy(h, table.to("meta"), targets, 30.0)
    for softcap in (0.0, -1.0, float("inf"), float("nan"), 1e-7, 2e30, (30.0, 0.0), (-1.0, 3.0), (3.0,), (1.0,) * 3):
        with pytest.raises(ValueError, match=r"softcap must be from 1e-06 to 1e\+30, a pair of such .*, or None, got"):
            linear_cross_entropy(h, table, targets, softcap)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        linear_cross_entropy(h, table, targets, 30.0, "max")
    update = torch.zeros(2, 5, 24)
    with pytest.raises(TypeError, match="update must have h's dtype torch.float32, got torch.bfloat16"):
        linear_cross_entropy(h, table, targets, 30.0, update=update.bfloat16())
    with pytest.raises(ValueError, match=r"update must be \[..., V\], \(2, 5, 24\), got \(10, 24\)"):
        linear_cross_entropy(h, table, targets, 30.0, update=update.flatten(0, 1))
    with pytest.raises(ValueError, match="update must be on h's device cpu, got meta"):
        linear_cross_entropy(h, table, targets, 30.0, update=update.to("meta"))
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_cross_entropy(h, table, targets, 30.0, chunk_tokens=0)
    for wild in (24, -1):
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 24\) or ignore_index -100, got {wild}"):
            linear_cross_entropy(h, table, targets.clone().fill_(wild), 30.0)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 24\), got -100"):
        linear_cross_entropy(h, table, targets.clone().fill_(-100), ignore_index=None)
    with pytest.raises(TypeError, match="bias must have h's dtype torch.float32 or be float32, got torch.float64"):
        linear_cross_entropy(h, table, targets, bias=torch.zeros(24).double())
    for name in ("bias", "weight"):
        with pytest.raises(ValueError, match=rf"{name} must be \[V\], \(24,\), got \(23,\)"):
            linear_cross_entropy(h, table, targets, **{name: torch.zeros(23)})
        with pytest.raises(ValueError, match=f"{name} must be on h's device cpu, got meta"):
            linear_cross_entropy(h, table, targets, **{name: torch.zeros(24, device="meta")})
    with pytest.raises(TypeError, match="weight must be of floating point, got torch.int64"):
        linear_cross_entropy(h, table, targets, weight=torch.ones(24).long())
    with pytest.raises(ValueError, match=r"weight, of the classes, has no gradient.*give weight.detach\(\)"):
        linear_cross_entropy(h, table, targets, weight=torch.ones(24, requires_grad=True))
    for smoothing in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1, got"):
            linear_cross_entropy(h, table, targets, label_smoothing=smoothing)
    for scale in (-1e-4, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="lse_square_scale must be a number from 0 on, got"):
            linear_cross_entropy(h, table, targets, lse_square_scale=scale)
