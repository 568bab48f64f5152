"""The terms of linear_cross_entropy against PyTorch's own: what is ignored, weights, z-loss, bias, dtypes, memory."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.linear_cross_entropy import linear_cross_entropy, rows, triton

FLOOR = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 5e-5}  # of a relative error
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

pytestmark = pytest.mark.usefixtures("poisoned")


def composed(
    h,
    table,
    targets,
    softcap=None,
    reduction="mean",
    *,
    update=None,
    bias=None,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    lse_square_scale=0.0,
    return_z_loss=False,
):
    """The loss as it is written with PyTorch's own functions, with the logits in h's dtype."""
    logits = F.linear(h, table.to(h.dtype), None if bias is None else bias.to(h.dtype))
    logits = logits if update is None else logits + update
    logits = logits.to(torch.promote_types(h.dtype, torch.float32)).flatten(0, -2)
    if softcap is not None:
        positive, negative = softcap if isinstance(softcap, tuple) else (softcap, softcap)
        cap = torch.where(logits > 0, logits.new_tensor(positive), logits.new_tensor(negative))
        logits = cap * torch.tanh(logits / cap)
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        targets.flatten(),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    kept = targets.flatten() != ignore_index
    z_loss = lse_square_scale * logits.logsumexp(-1).square() * kept
    z_loss = z_loss if reduction == "none" else z_loss.sum() / (kept.sum() if reduction == "mean" else 1)
    loss, z_loss = ((each.view(targets.shape) if reduction == "none" else each) for each in (loss + z_loss, z_loss))
    return (loss, z_loss) if return_z_loss else loss


def problem(tokens, width, vocabulary, dtype=torch.float32, device=DEVICE, *, table="normal", ignored=None):
    """h, table and targets, of which some are ``ignored``; the same numbers on every device."""
    draw = torch.rand if table == "uniform" else torch.randn
    targets = torch.randint(0, vocabulary, (tokens,))
    if ignored is not None:
        targets[torch.randperm(tokens)[: tokens // 3]] = ignored
    made = torch.randn(tokens, width).to(dtype), draw(vocabulary, width).to(dtype), targets
    return tuple(tensor.to(device) for tensor in made)


def outcome(function, h, table, targets, dloss=None, *, bias=None, update=None, **options):
    """Loss, z-loss if it is asked for, and gradients of what there is, for the loss's gradient ``dloss``."""
    leaves = dict(h=h, table=table, bias=bias, update=update)
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items() if t is not None}
    found = function(targets=targets, **leaves, **options)
    losses = dict(zip(("loss", "z_loss"), found, strict=True)) if isinstance(found, tuple) else dict(loss=found)
    loss = losses["loss"]
    dloss = torch.ones_like(loss) if dloss is None else dloss.to(loss).expand_as(loss)
    gradients = torch.autograd.grad(loss, list(leaves.values()), dloss)
    return {name: value.detach() for name, value in losses.items()} | dict(zip(leaves, gradients, strict=True))


def widened(tensor):
    return tensor.double() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor


def assert_as_precise(h, table, targets, dloss=None, *, scale=1e-12, **options) -> None:
    """All results are as near to float64 as those that PyTorch composes in the same dtypes.

    Errors are relative to norms, or to ``scale`` where these are less.
    """
    run = partial(outcome, targets=targets, dloss=dloss)
    got = run(linear_cross_entropy, h, table, **options)
    plain = run(composed, h, table, **options)
    exact = run(composed, h.double(), table.double(), **{name: widened(value) for name, value in options.items()})
    assert got.keys() == exact.keys()
    for name, value in got.items():
        a, b, c = (results[name].double() for results in (got, plain, exact))
        assert value.dtype == plain[name].dtype and a.shape == c.shape, name
        error, allowed = (float((x - c).norm() / c.norm().clamp(min=scale)) for x in (a, b))
        assert error <= 1.5 * allowed + FLOOR[h.dtype], f"{name}: {error} where PyTorch has {allowed}"


# The grids of Liger-Kernel's test/transformers/test_fused_linear_cross_entropy.py at ead96b61, 141 cases. 117 are 32
# with gradients, 32 of the loss alone, 16 of the function with every argument, 16 with and without accuracy, 16 under
# autocast, and 5 whose losses are scaled by their probabilities. The 8 that ask for the accuracy have no meaning here,
# and the other 109 are below. Of 24 younger ones 6 have a meaning: 4 of gradients for each token, and 2 for the form of
# the result without accuracy; 18 ask for the accuracy or for predicted tokens.
LARGE, ODD = (8 * 128, 1024, 4096), (4 * 47, 31, 123)
HERE = {} if DEVICE == "cuda" else {LARGE: (5, 24, 48), ODD: (7, 31, 41)} if INTERPRETED else {LARGE: (64, 64, 256)}
BF16, FP32 = torch.bfloat16, torch.float32
NO_TERMS = dict()
ALL_TERMS = dict(softcap=30.0, ignore_index=42, label_smoothing=0.1, lse_square_scale=1e-4, return_z_loss=True)
GRID = list(itertools.product((LARGE, ODD), ("mean", "sum"), (BF16, FP32), (True, False), (NO_TERMS, ALL_TERMS)))
FUNCTION = list(itertools.product(((4, 8, 8), (63, 41, 41)), (BF16, FP32), (True, False), (True, False)))
ACCURACY = list(itertools.product((LARGE, ODD), (BF16, FP32), (True, False)))
AUTOCAST = list(itertools.product((LARGE, ODD), (BF16, torch.float16), (True, False), (None, FP32)))
SCALED = [("none", True), ("sum", True), ("sum", False), ("none", False), ("ignored", True)]
BY_TOKEN = list(itertools.product(((32, 32, 64), (32, 64, 128)), (True, False)))


def head(shape, dtype, bias: bool, terms=NO_TERMS, weighted: bool | None = None, table: str = "uniform"):
    """A problem of the grid, and its options."""
    tokens, width, vocabulary = HERE.get(shape, shape)
    terms = terms | (dict(ignore_index=min(terms["ignore_index"], vocabulary - 1)) if "ignore_index" in terms else {})
    made = problem(tokens, width, vocabulary, dtype, table=table, ignored=terms.get("ignore_index", -100))
    options = terms | (dict(bias=torch.rand(vocabulary).to(DEVICE, dtype)) if bias else {})
    if weighted is None:
        weighted = terms is not NO_TERMS and bool(terms)
    return made, options | (dict(weight=torch.rand(vocabulary).to(DEVICE)) if weighted else {})


def test_the_grids_have_the_peers_counts() -> None:
    assert 2 * len(GRID) + len(FUNCTION) + len(ACCURACY) + len(AUTOCAST) + len(SCALED) == 117 - 8
    assert len(BY_TOKEN) + 2 == 24 - 18


@pytest.mark.parametrize("shape, reduction, dtype, bias, terms", GRID)
def test_peers_gradients(shape, reduction, dtype, bias, terms) -> None:
    made, options = head(shape, dtype, bias, terms)
    assert_as_precise(*made, reduction=reduction, **options)


@pytest.mark.parametrize("shape, reduction, dtype, bias, terms", GRID)
def test_peers_losses_alone(shape, reduction, dtype, bias, terms) -> None:
    made, options = head(shape, dtype, bias, terms)
    graded = outcome(linear_cross_entropy, *made, reduction=reduction, **options)["loss"]
    with torch.no_grad():
        found = linear_cross_entropy(*made, reduction=reduction, **options)
    loss = found[0] if isinstance(found, tuple) else found
    assert not loss.requires_grad and torch.allclose(loss, graded, rtol=1e-5)


@pytest.mark.parametrize("shape, dtype, weighted, bias", FUNCTION)
def test_peers_function(shape, dtype, weighted, bias) -> None:
    made, options = head(shape, dtype, bias, ALL_TERMS | dict(ignore_index=-100), False, "normal")
    if weighted:
        options["weight"] = torch.randn(made[1].size(0)).to(DEVICE)  # also below 0, as theirs are
    assert_as_precise(*made, dloss=torch.tensor(-0.7), **options)


@pytest.mark.parametrize("shape, dtype, bias", ACCURACY)
def test_peers_without_accuracy(shape, dtype, bias) -> None:
    made, options = head(shape, dtype, bias)
    assert_as_precise(*made, **options)


@pytest.mark.parametrize("shape, dtype, bias, accumulate", AUTOCAST)
def test_peers_autocast(shape, dtype, bias, accumulate) -> None:
    """Gradients have the dtype of the leaves. Sums over tokens are float32 here, whatever their accum_dtype says."""
    (h, table, targets), options = head(shape, FP32, bias)

    def under(function, **arguments):
        with torch.autocast(DEVICE, dtype):
            return outcome(function, targets=targets, **arguments)

    got, plain = (under(function, h=h, table=table, **options) for function in (linear_cross_entropy, composed))
    doubled = {name: widened(value) for name, value in options.items()}
    exact = outcome(composed, h.double(), table.double(), targets, **doubled)
    for name, value in got.items():
        error, allowed = (float((x[name].double() - exact[name]).norm() / exact[name].norm()) for x in (got, plain))
        assert value.dtype == FP32 and error <= 1.5 * allowed + FLOOR[dtype], f"{name}: {error}, PyTorch has {allowed}"


@pytest.mark.parametrize("reduction, bias", SCALED)
def test_peers_losses_scaled_by_probabilities(reduction: str, bias: bool) -> None:
    """Which is a composition: every token's loss times exp of its negative."""
    made, options = head((8, 8, 16), FP32, bias, table="normal")
    if reduction == "ignored":
        made = problem(6, 8, 48, ignored=-100)
        options["bias"] = torch.randn(48).to(DEVICE)

    def scaled(function, **arguments):
        losses = function(reduction="none", **arguments)
        losses = losses * (-losses).exp().detach()
        return losses if reduction == "none" else losses.sum()

    got, plain = (outcome(partial(scaled, f), *made, **options) for f in (linear_cross_entropy, composed))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got.values(), plain.values(), strict=True))


@pytest.mark.parametrize("shape, bias", BY_TOKEN)
def test_peers_gradients_for_each_token(shape, bias) -> None:
    made, options = head(shape if not INTERPRETED else (6, 16, 32), FP32, bias, table="normal")
    dloss = torch.rand(len(made[0])) + 0.5
    for chunk in ({}, dict(chunk_tokens=5)):
        got = outcome(
            linear_cross_entropy,
            *made,
            reduction="none",
            dloss=dloss,
            **chunk,
            **options,
        )
        plain = outcome(composed, *made, reduction="none", dloss=dloss, **options)
        assert all(torch.allclose(got[name], plain[name], rtol=1e-4, atol=1e-4) for name in plain)


@pytest.mark.parametrize("asked", [False, True])
def test_peers_form_of_the_result(device, asked: bool) -> None:
    h, table, targets = problem(3, 2, 3, device=device)
    found = linear_cross_entropy(h.requires_grad_(), table, targets, return_z_loss=asked)
    loss = found[0] if asked else found
    assert torch.allclose(loss, F.cross_entropy(F.linear(h, table), targets)) and loss.requires_grad
    assert not asked or (found[1] == 0 and not found[1].requires_grad)


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("softcap", [1e-6, 1e-3, 1.0, 39.9, 40.1, 1e3, 1e8, 1e30, None, (20.0, 5.0), (5.0, 60.0)])
def test_every_cap_is_as_precise_as_pytorch(softcap, dtype) -> None:
    h, table, targets = problem(9, 16, 45, dtype, ignored=44)
    options = dict(softcap=softcap, ignore_index=44, label_smoothing=0.2, lse_square_scale=1e-2)
    options |= dict(scale=0.1)  # low caps leave no gradients
    bias, weight, update = torch.randn(45).to(DEVICE, dtype), torch.rand(45).to(DEVICE), torch.randn(9, 45)
    assert_as_precise(h, table, targets, bias=bias, weight=weight, update=update.to(DEVICE, dtype), **options)
    assert_as_precise(h, table, targets, reduction="none", dloss=torch.rand(9), **options)


@needs_kernels
@pytest.mark.parametrize("softcap", [5.0, 100.0, None, (5.0, 20.0), (100.0, 20.0)])
def test_terms_of_rows_in_blocks(monkeypatch, softcap) -> None:
    monkeypatch.setattr(rows, "ROW_ELEMENTS", 32)
    monkeypatch.setattr(rows, "launch_parameters", lambda *_: dict(block=32, columns_per_warp=32))
    h, table, targets = problem(9, 16, 70, ignored=3)
    options = dict(softcap=softcap, ignore_index=3, label_smoothing=0.2, lse_square_scale=1e-2, return_z_loss=True)
    assert_as_precise(h, table, targets, **options)
    options |= dict(bias=torch.randn(70).to(DEVICE), weight=torch.rand(70).to(DEVICE))
    assert_as_precise(h, table, targets, **options)


def each_term(vocabulary, device):
    return dict(
        bias=torch.randn(vocabulary).to(device),
        weight=torch.rand(vocabulary).to(device),
        label_smoothing=0.1,
        lse_square_scale=0.01,
        return_z_loss=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("updated", [False, True])
def test_an_ignored_token_might_as_well_not_be_there(device, updated: bool, chunk: int | None, reduction: str) -> None:
    h, table, targets = problem(9, 8, 24, device=device, ignored=7)
    options = each_term(24, device) | dict(softcap=20.0, reduction=reduction, ignore_index=7, chunk_tokens=chunk)
    options |= dict(update=torch.randn(9, 24).to(device)) if updated else {}
    kept = targets != 7
    got = outcome(linear_cross_entropy, h, table, targets, **options)
    of_tokens = ("h", "update") if reduction != "none" else ("h", "update", "loss", "z_loss")
    assert not any(got[name][~kept].any() for name in of_tokens if name in got)
    options |= dict(update=options["update"][kept]) if updated else {}
    alone = outcome(linear_cross_entropy, h[kept], table, targets[kept], **options)
    for name, value in alone.items():
        found = got[name][kept] if name in of_tokens else got[name]
        assert torch.allclose(found, value, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_ignored(device, reduction: str, chunk: int | None) -> None:
    """PyTorch's mean is NaN too, and its gradients are zero."""
    h, table, targets = problem(5, 8, 24, device=device)
    terms = each_term(24, device)
    got = outcome(linear_cross_entropy, h, table, targets.fill_(-100), reduction=reduction, chunk_tokens=chunk, **terms)
    losses = got.pop("loss"), got.pop("z_loss")
    assert all(loss.isnan() if reduction == "mean" else not loss.any() for loss in losses)
    without_weights = {name: value for name, value in terms.items() if name != "weight"}
    got |= outcome(linear_cross_entropy, h, table, targets, reduction=reduction, chunk_tokens=chunk, **without_weights)
    assert not any(got[name].any() for name in ("h", "table", "bias"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_every_term(device, reduction: str) -> None:
    h, table, targets = problem(4, 3, 5, torch.float64, device, ignored=-100)
    leaves = [h, table, torch.randn(5, dtype=h.dtype, device=device), torch.randn(4, 5, dtype=h.dtype, device=device)]
    options = each_term(5, device) | dict(return_z_loss=False)

    def function(h, table, bias, update):
        return linear_cross_entropy(h, table, targets, 4.0, reduction, **options | dict(bias=bias, update=update))

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction, chunk", [("mean", None), ("sum", 4), ("none", None), ("none", 4)])
def test_a_float32_table_has_float32_gradients(device, reduction: str, chunk: int | None, dtype) -> None:
    """They are the sums before rounding, and the rest is what a table of h's dtype gives."""
    h, table, targets = problem(12, 8, 24, dtype, device)
    options = dict(reduction=reduction, chunk_tokens=chunk, softcap=20.0)
    bias = torch.randn(24).to(device, dtype)
    wide = outcome(linear_cross_entropy, h, table.float(), targets, bias=bias.float(), **options)
    narrow = outcome(linear_cross_entropy, h, table, targets, bias=bias, **options)
    assert (wide["table"].dtype, wide["bias"].dtype, wide["h"].dtype) == (FP32, FP32, dtype)
    assert all(torch.allclose(wide[name].to(narrow[name]), narrow[name], rtol=2e-2, atol=1e-3) for name in narrow)
    if device.type == "cuda" or INTERPRETED:
        assert not torch.equal(wide["table"], wide["table"].to(dtype).float())


def test_autocast_casts_as_a_linear_layer_does(device) -> None:
    """And is off inside: what float32 computes there stays so. float64 is left alone, as everywhere in PyTorch."""
    h, table, targets = problem(12, 8, 24, device=device)
    terms = each_term(24, device) | dict(update=torch.randn(12, 24).to(device))

    def under_autocast(**arguments):
        with torch.autocast(device.type, torch.bfloat16):
            return linear_cross_entropy(**arguments)

    for reduction in ("mean", "none"):
        got = outcome(under_autocast, h, table, targets, reduction=reduction, **terms)
        same = terms | dict(update=terms["update"].bfloat16())
        plain = outcome(linear_cross_entropy, h.bfloat16(), table, targets, reduction=reduction, **same)
        assert all(torch.equal(got[name], plain[name].float()) for name in plain)
    with torch.autocast(device.type, torch.bfloat16):
        assert linear_cross_entropy(h.double(), table.double(), targets).dtype == torch.float64


@needs_kernels
def test_every_token_s_loss_is_computed_again_where_it_is_large(monkeypatch) -> None:
    h, table, targets = problem(20, 16, 64, torch.bfloat16)
    run = partial(outcome, linear_cross_entropy, h, table, targets, torch.rand(20), reduction="none")
    whole = run(**(terms := each_term(64, DEVICE)))
    monkeypatch.setattr(triton, "ONE_CHUNK_BYTES", 20 * 128 - 1)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 6 * 256)
    pieces, launch = [], triton.launch
    monkeypatch.setattr(triton, "launch", lambda z, *rest: (pieces.append((len(z), z.dtype)), launch(z, *rest)))
    parts = run(**terms)
    assert pieces == 2 * [(n, FP32) for n in (6, 6, 6, 2)]
    assert all(torch.allclose(whole[name], parts[name], rtol=2e-2, atol=1e-3) for name in whole)


@pytest.mark.parametrize("reduction, chunk", [("mean", None), ("mean", 4), ("none", 4)])
def test_terms_compile_whole(device, reduction: str, chunk: int | None) -> None:
    h, table, targets = problem(9, 8, 24, torch.bfloat16, device, ignored=-100)
    terms = each_term(24, device)

    def function(h, table, targets, **options):
        with torch.autocast(h.device.type, torch.bfloat16):
            return linear_cross_entropy(h.sin(), table, targets, None, reduction, chunk, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, whole = (outcome(each, h, table.float(), targets, **terms) for each in (function, compiled))
    assert all(torch.allclose(plain[name], whole[name], rtol=1e-2, atol=1e-4) for name in plain)


def test_class_weights_are_of_any_dtype(device) -> None:
    h, table, targets = problem(9, 8, 24, torch.bfloat16, device)
    weight = torch.rand(24).to(device).bfloat16()
    given = (linear_cross_entropy(h, table, targets, weight=weight.to(dtype)) for dtype in (*FLOOR, torch.float64))
    first, *others = given
    assert all(torch.allclose(first, other, rtol=1e-3) for other in others)


@needs_gpu
@pytest.mark.parametrize("softcap", [None, 30.0, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gpu_and_cpu_agree(reduction: str, softcap: float | None) -> None:
    h, table, targets = problem(50, 32, 200, device="cpu", ignored=-100)
    terms = each_term(200, "cpu") | dict(reduction=reduction, softcap=softcap)
    on_cpu = outcome(linear_cross_entropy, h, table, targets, **terms)
    terms = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in terms.items()}
    on_gpu = outcome(linear_cross_entropy, h.cuda(), table.cuda(), targets.cuda(), **terms)
    for name, value in on_cpu.items():
        assert torch.allclose(on_gpu[name].cpu(), value, rtol=1e-3, atol=1e-4), name


@needs_gpu
@pytest.mark.parametrize("wide_table", [False, True])
@pytest.mark.parametrize("reduction, chunk", [("mean", None), ("mean", 1024), ("none", None), ("none", 1024)])
@pytest.mark.parametrize("graded", [True, False])
def test_memory_is_what_the_docstring_says(graded: bool, reduction: str, chunk: int | None, wide_table: bool) -> None:
    """Above all it never holds tokens x vocabulary in float32, which here are 1.65 GB."""
    tokens, width, vocabulary = 8192, 512, 50_304
    h, table, targets = problem(tokens, width, vocabulary, torch.bfloat16)
    table = table.float() if wide_table else table
    leaves = h.requires_grad_(graded), table.requires_grad_(graded)

    def call() -> None:
        loss = linear_cross_entropy(*leaves, targets, 30.0, reduction, chunk)
        if graded:
            torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    call()  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    whole, element = graded and chunk is None, 2
    at_a_time = chunk or (tokens if whole else triton._rows_at_a_time(vocabulary, element))
    logits = element * at_a_time * vocabulary
    if reduction == "none":
        piece = min(at_a_time * vocabulary * 4, triton.CHUNK_BYTES)
        logits = piece + (logits if whole else piece // 2 if graded else 0)
    of_table = table.numel() * (2 * element + (4 if whole else 8) * graded)
    results = (h.nbytes + table.nbytes) * graded
    limit = logits + of_table + results + 2 * h.nbytes + 64 * tokens + 2**26
    assert peak <= limit, f"{peak / 2**20:.0f} MiB, and {limit / 2**20:.0f} MiB are allowed"
    assert peak < 4 * tokens * vocabulary
