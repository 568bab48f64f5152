"""The residual stream's ops: formulas, gradients, precision, what is handed through, edges; references and kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import library

from pgolf.kernels import residual as family
from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.common.compiling import tl
from pgolf.kernels.residual import (
    RMS_EPS,
    enter_lanes_norm,
    join_skip,
    mix_lanes,
    residual_linear,
    residual_linear_norm,
    residual_mix_norm,
    scaled_rms_norm,
)
from tests.conftest import covering

UNIT = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-21, torch.float64: 2**-48}  # of rounding
ROWS = (2, 3) if INTERPRETED else (2, 7)
SHAPES = {
    torch.bfloat16: [(1, 1, 8), (1, 3, 512)],
    torch.float16: [(*ROWS, 12)],
    torch.float32: [(1, 5, 70)],
    torch.float64: [(*ROWS, 12)],
}
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")

pytestmark = pytest.mark.usefixtures("poisoned")

# By name: a function of (reference or op by name, leaves), and the shapes of its leaves ("x" an activation, "h" the
# product's input, else a parameter's).
Call = Callable[[Callable[[str], Callable], list], object]
SCALE = 0.6
MIX = ["x", "x", (2, "d")]
LANES = ["x", "x", "x", "x", (2, 2), (2,)]


def plain_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()


def plain_join(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    share = torch.sigmoid(gate)
    return share * x + (1 - share) * weight * skip


def scale_of(x: torch.Tensor) -> torch.Tensor:
    return torch.full((), SCALE, device=x.device)


def mix_norm(op, leaves, name="residual_mix_norm"):
    x, x0, mix, *rest = leaves
    join = dict(zip(("skip", "weight", "gate"), rest, strict=False))
    return op(name)(x, x0, mix, scale_of(x), **join)


def enter_lanes(op, leaves):
    return mix_norm(op, leaves, "enter_lanes_norm")


def lanes_norm(op, leaves):
    join = dict(zip(("skip", "weight", "gate"), leaves[8:], strict=False))
    return op("mix_lanes_norm")(*leaves[:8], scale_of(leaves[0]), **join)


def linear_norm(op, leaves, **options):
    return op("residual_linear_norm")(*leaves, scale_of(leaves[1]), **options)


def gated(call: Call) -> Call:
    """``call`` of all leaves but the last, which is the rows' gate."""

    def with_gate(op, leaves):
        return call(lambda name: partial(op(name), row_gate=leaves[-1]), leaves[:-1])

    return with_gate


CALLS: dict[str, tuple[Call, list]] = {
    "mix_norm": (mix_norm, MIX),
    "join_mix_norm": (mix_norm, [*MIX, "x", "d", "d"]),
    "join_mix_norm_ungated": (mix_norm, [*MIX, "x", "d"]),
    "mix_norm_of_one": (lambda op, leaves: mix_norm(op, [leaves[0], *leaves]), ["x", (2, "d")]),
    "join_mix_norm_of_two": (
        lambda op, leaves: mix_norm(op, [*leaves[:3], leaves[0], *leaves[3:]]),
        ["x", "x", (2, "d"), "d", "d"],
    ),
    "join_mix_norm_of_one": (
        lambda op, leaves: mix_norm(op, [leaves[0], *leaves[:2], leaves[0], *leaves[2:]]),
        ["x", (2, "d"), "d"],
    ),
    "join": (lambda op, leaves: op("join_skip")(*leaves), ["x", "x", "d", "d"]),
    "join_ungated": (lambda op, leaves: op("join_skip")(*leaves), ["x", "x", "d"]),
    "norm": (lambda op, leaves: op("scaled_rms_norm")(leaves[0], scale_of(leaves[0])), ["x"]),
    "norm_of_mean": (lambda op, leaves: op("scaled_rms_norm")(leaves[0], None, leaves[1]), ["x", "x"]),
    "enter_lanes": (enter_lanes, MIX),
    "enter_lanes_join": (enter_lanes, [*MIX, "x", "d", "d"]),
    "enter_lanes_join_ungated": (enter_lanes, [*MIX, "x", "d"]),
    "enter_lanes_of_one": (lambda op, leaves: enter_lanes(op, [leaves[0], *leaves]), ["x", (2, "d")]),
    "lanes": (lambda op, leaves: op("mix_lanes")(*leaves), LANES),
    "lanes_norm": (lanes_norm, [*LANES, *MIX[1:]]),
    "lanes_norm_join": (lanes_norm, [*LANES, *MIX[1:], "x", "d", "d"]),
    "lanes_norm_join_ungated": (lanes_norm, [*LANES, *MIX[1:], "x", "d"]),
    "lanes_final": (lambda op, leaves: op("mix_lanes_final")(*leaves), LANES),
    "linear": (lambda op, leaves: op("residual_linear")(*leaves), ["x", "h", ("d", "k")]),
    "linear_alone": (lambda op, leaves: op("residual_linear")(None, *leaves), ["h", ("d", "k")]),
    "linear_norm": (linear_norm, ["x", "h", ("d", "k")]),
    "linear_norm_inplace": (
        lambda op, leaves: linear_norm(op, [leaves[0] * 1, *leaves[1:]], inplace=True),
        ["x", "h", ("d", "k")],
    ),
    "enter_lanes_gated": (gated(enter_lanes), [*MIX, "g"]),
    "enter_lanes_join_gated": (gated(enter_lanes), [*MIX, "x", "d", "d", "g"]),
    "enter_lanes_of_one_gated": (
        gated(lambda op, leaves: enter_lanes(op, [leaves[0], *leaves])),
        ["x", (2, "d"), "g"],
    ),
    "lanes_norm_gated": (gated(lanes_norm), [*LANES, *MIX[1:], "g"]),
    "lanes_norm_join_gated": (gated(lanes_norm), [*LANES, *MIX[1:], "x", "d", "d", "g"]),
    "linear_norm_gated": (gated(linear_norm), ["x", "h", ("d", "k"), "g"]),
}


def ours(name: str) -> Callable:
    return getattr(family, name)


def reference(name: str) -> Callable:
    return getattr(family, f"{name}_reference")


def leaves_of(case: str, shape=(2, 7, 12), dtype=torch.float64, parameters=None, device=DEVICE) -> list[torch.Tensor]:
    sizes = {"d": shape[-1], "k": 20, "g": min(shape[-1], 13)}

    def one(kind) -> torch.Tensor:
        if kind in ("x", "h"):
            return torch.randn(*shape[:-1], shape[-1] if kind == "x" else sizes["k"], device=device).to(dtype)
        dims = [sizes.get(dim, dim) for dim in (kind if isinstance(kind, tuple) else (kind,))]
        return torch.randn(dims, device=device).to(parameters or dtype)

    return [one(kind) for kind in CALLS[case][1]]


def results(function: Callable, leaves, seed: int = 1, frozen: frozenset[int] = frozenset()) -> list[torch.Tensor]:
    """The outputs of ``function`` of fresh leaves, then the leaves' gradients for random ones of the outputs.

    Leaves with the numbers in ``frozen`` require no gradient, and None stands for it.
    """
    leaves = [leaf.detach().clone().requires_grad_(k not in frozen) for k, leaf in enumerate(leaves)]
    outputs = function(leaves)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out is not None]
    generator = torch.Generator().manual_seed(seed)
    douts = [
        torch.randn(out.shape, generator=generator).to(out.device, torch.bfloat16).to(out.dtype) for out in outputs
    ]
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    pairs = [(out, dout) for out, dout in zip(outputs, douts, strict=True) if out.requires_grad]
    gradients = iter(torch.autograd.grad([out for out, _ in pairs], needed, [dout for _, dout in pairs]))
    return [*(out.detach() for out in outputs), *(next(gradients) if leaf.requires_grad else None for leaf in leaves)]


def assert_as_precise(case: str, leaves: list[torch.Tensor]) -> None:
    """Outputs and gradients are as near to those of float64 as the reference's in the same dtype.

    Where there are few elements, the reference can be exact by luck.
    """
    call = CALLS[case][0]
    got, plain = results(lambda leaves: call(ours, leaves), leaves), results(lambda v: call(reference, v), leaves)
    exact = results(lambda v: call(reference, v), [leaf.double() for leaf in leaves])
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), f"result {i}"
        size = c.norm().clamp(min=1e-30)
        error, allowed = (float((tensor.double() - c).norm() / size) for tensor in (a, b))
        floor = UNIT[leaves[0].dtype] * (1 + 8 * c.numel() ** -0.5)
        assert error <= 1.5 * allowed + floor, f"result {i}: {error} where the reference has {allowed}"


def compiled_for(function: Callable) -> Callable:
    """``function`` through the whole compiler but its code generation."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_formulas() -> None:
    x, x0, mix, skip, weight, gate = leaves_of("join_mix_norm")
    joined = plain_join(x, skip, weight, gate)
    u = mix[0] * joined + mix[1] * x0
    got = residual_mix_norm(x, x0, mix, scale_of(x), skip=skip, weight=weight, gate=gate)
    assert got.x is None
    got = *got[:2], got.x0, *enter_lanes_norm(x, x0, mix, scale_of(x), skip=skip, weight=weight, gate=gate)
    expected = u, plain_norm(u) * SCALE, x0, joined, x, plain_norm(u) * SCALE, plain_norm(x) * SCALE, x0
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=1e-6)
    assert torch.allclose(join_skip(x, skip, weight), x + weight * skip, atol=1e-12)
    assert torch.allclose(scaled_rms_norm(x, None, x0), plain_norm(0.5 * (x + x0)), atol=1e-12)
    lane0, lane1, a, f, post, resid = leaves_of("lanes")
    new0, new1 = mix_lanes(lane0, lane1, a, f, post, resid)
    assert torch.allclose(new0, resid[0] * lane0 + post[0, 0] * a + post[1, 0] * f, atol=1e-12)
    assert torch.allclose(new1, resid[1] * lane1 + post[0, 1] * a + post[1, 1] * f, atol=1e-12)
    residual, h, w = leaves_of("linear_norm")
    v = residual + h @ w.T
    got = residual_linear_norm(residual, h, w, scale_of(h))
    assert torch.allclose(got[0], v, atol=1e-12) and torch.allclose(got[1], plain_norm(v) * SCALE, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 5, 11])
def test_a_row_gate_scales_norms_by_its_root(columns: int) -> None:
    row = torch.randn(columns + 1, dtype=torch.float64, device=DEVICE)

    def expected(v: torch.Tensor) -> torch.Tensor:
        return SCALE * plain_norm(v) * torch.sigmoid(v[..., :columns] @ row[:-1] + row[-1]).sqrt()[..., None]

    residual, h, w = leaves_of("linear_norm")
    v, n = residual_linear_norm(residual, h, w, scale_of(h), row_gate=row)
    assert torch.allclose(n, expected(v), atol=1e-12, rtol=1e-6)
    for name, leaves in (("enter_lanes", leaves_of("mix_norm")), ("lanes_norm", leaves_of("lanes_norm"))):
        plain, got = (CALLS[f"{name}{end}"][0](ours, [*leaves, *rest]) for end, rest in (("", []), ("_gated", [row])))
        assert all(torch.equal(a, b) for a, b in zip(got[:3], plain[:3], strict=True))
        assert torch.allclose(got.n1, expected(got.lane1), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("bias", [-120.0, 40.0])
def test_a_row_gate_that_is_shut_or_open(bias: float) -> None:
    leaves = leaves_of("linear_norm_gated", dtype=torch.float32)
    leaves[-1] = torch.cat([0 * leaves[-1][1:], leaves[-1].new_tensor([bias])])
    *outputs, _, _, _, drow = results(lambda v: CALLS["linear_norm_gated"][0](ours, v), leaves)
    assert all(tensor.isfinite().all() for tensor in outputs) and drow.abs().max() < 1e-6
    assert outputs[1].abs().max() < 1e-20 if bias < 0 else outputs[1].abs().max() > 0.1


@pytest.mark.parametrize("case", CALLS)
def test_gradients(case: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in leaves_of(case, (1, 2, 3))]

    def function(*leaves):
        outputs = CALLS[case][0](ours, list(leaves))
        return tuple(out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out is not None)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", SHAPES, ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_precision(case: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[dtype]:
        if "linear" in case:  # a program for each of d rows
            shape = (*shape[:-1], 64)
        assert_as_precise(case, leaves_of(case, shape, dtype))
    if dtype == torch.bfloat16:  # a reference that rounds float32 parameters first
        assert_as_precise(case, leaves_of(case, (*ROWS, 12), dtype, torch.float32))


@pytest.mark.parametrize("case", CALLS)
def test_more_rows_than_programs(case: str) -> None:
    """Programs of many rows, of which the last has fewer."""
    assert_as_precise(case, leaves_of(case, (1, 29, 16), torch.float32))


@pytest.mark.parametrize("case", CALLS)
def test_unused_outputs_have_no_gradient(case: str) -> None:
    """A gradient that never came is one of zeros."""
    call, leaves = CALLS[case][0], leaves_of(case, (1, 2, 12))
    outputs = call(reference, leaves)
    for kept in range(len(outputs) if isinstance(outputs, tuple) else 0):
        if outputs[kept] is not None:
            got, plain = (
                torch.autograd.grad(call(op, fresh)[kept].square().sum(), fresh, allow_unused=True)
                for op in (ours, reference)
                for fresh in [[leaf.clone().requires_grad_() for leaf in leaves]]
            )
            for leaf, *pair in zip(leaves, got, plain, strict=True):
                a, b = (torch.zeros_like(leaf) if gradient is None else gradient for gradient in pair)
                assert torch.allclose(a, b, atol=1e-9)


def layers(op: Callable[[str], Callable], leaves: list[torch.Tensor]) -> torch.Tensor:
    """Two serial layers with a skip, a join, two lanes and the final norm, with every input handed through."""
    x, x0, mix, skip_weight, gate, w, post, resid = leaves
    scale, skips = scale_of(x), []
    for _ in range(2):
        u, n, _, x0 = op("residual_mix_norm")(x, x0, mix, scale)
        v, n = op("residual_linear_norm")(u, n.tanh(), w, scale, inplace=True)
        x = op("residual_linear")(v, n.sin(), w, inplace=True)
        skips.append(x)
    u, n, x, x0 = op("residual_mix_norm")(x, x0, mix, scale)  # a skip taken where it was handed through
    skips[-1] = x
    join = dict(weight=skip_weight, gate=gate)
    lanes = op("enter_lanes_norm")(u, x0, mix, scale, skip=skips.pop(), **join)
    parts = [op("residual_linear")(None, part, w) for part in (lanes.n0.cos(), lanes.n1.tanh())]
    lanes = op("mix_lanes_norm")(
        lanes.lane0, lanes.lane1, *parts, post, resid, lanes.x0, mix, scale, skip=skips.pop(), **join
    )
    parts = [op("residual_linear")(None, part, w) for part in (lanes.n0.cos(), lanes.n1.tanh())]
    lane0, lane1 = op("mix_lanes")(lanes.lane0, lanes.lane1, *parts, post, resid)
    lanes = op("mix_lanes_norm")(lane0, lane1, *parts, post, resid, lanes.x0, mix, scale)
    return op("mix_lanes_final")(lanes.lane0, lanes.lane1, lanes.n0, lanes.n1, post, resid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_layers(dtype: torch.dtype) -> None:
    """Gradients that are handed back through many ops add up, and what is overwritten is not needed again."""
    d = 16
    shapes = [(1, 13, d), (1, 13, d), (2, d), (d,), (d,), (d, d), (2, 2), (2,)]
    leaves = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
    got, plain = (results(lambda v, op=op: layers(op, v), leaves) for op in (ours, reference))
    exact = results(lambda v: layers(reference, v), [leaf.double() for leaf in leaves])
    for a, b, c in zip(got, plain, exact, strict=True):
        error, allowed = (float((tensor.double() - c).norm() / c.norm()) for tensor in (a, b))
        # Behind the lanes' few gradients are sums over all tokens that may nearly cancel.
        assert error <= 1.5 * allowed + (4 if c.numel() > 4 else 16) * UNIT[dtype]


def frozen_leaves(case: str) -> list[frozenset[int]]:
    """List what to freeze: each activation, the parameters, both; all activations."""
    kinds = CALLS[case][1]
    activations = frozenset(k for k, kind in enumerate(kinds) if kind == "x")
    parameters = frozenset(range(len(kinds))) - activations
    frozen = [*({k} for k in activations), *({k} | parameters for k in activations), parameters, activations]
    return [some for some in dict.fromkeys(map(frozenset, frozen)) if len(some) < len(kinds)]


@pytest.mark.parametrize("case", [case for case in CALLS if "linear" not in case and not case.startswith("norm")])
def test_frozen_inputs_leave_the_other_gradients_as_they_are(case: str, device: torch.device) -> None:
    """To the bit where the compiler does not choose which multiplications and additions become one instruction."""
    shape = (1, 700, 512) if device.type == "cuda" else (1, 5, 16)
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16):
        leaves = leaves_of(case, shape, dtype, device=device)
        whole = results(lambda v: CALLS[case][0](ours, v), leaves)
        for frozen in frozen_leaves(case):
            got = results(lambda v: CALLS[case][0](ours, v), leaves, frozen=frozen)
            for k, (a, b) in enumerate(zip(got, whole, strict=True)):
                if a is not None:
                    allowed = UNIT[dtype] * float(b.double().norm()) if device.type == "cuda" else 0.0
                    error = float((a.double() - b.double()).norm())
                    assert error <= allowed, f"{dtype}, frozen {sorted(frozen)}: result {k}"


def test_layers_with_frozen_weights(device: torch.device) -> None:
    """As in test-time training: x alone requires a gradient, and what comes back to it is the same bit for bit."""
    shapes = [(1, 13, 16), (1, 13, 16), (2, 16), (16,), (16,), (16, 16), (2, 2), (2,)]
    leaves = [torch.randn(shape, device=device) for shape in shapes]
    whole = results(lambda v: layers(ours, v), leaves)
    got = results(lambda v: layers(ours, v), leaves, frozen=frozenset(range(1, 8)))
    assert torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[1]) and got[2:] == [None] * 7


@pytest.mark.parametrize("case", ["mix_norm", "join_mix_norm", "enter_lanes", "enter_lanes_join", "lanes_norm_join"])
def test_frozen_inputs_are_handed_through_frozen(case: str, device: torch.device) -> None:
    place = 6 if case.startswith("lanes") else 1
    for frozen in ({place}, {0}, {0, place}, set()):
        leaves = [leaf.requires_grad_(k not in frozen) for k, leaf in enumerate(leaves_of(case, device=device))]
        got = CALLS[case][0](ours, leaves)
        assert got.n.requires_grad if case.endswith("mix_norm") else got.n0.requires_grad
        handed = {place: got.x0}
        if not case.startswith("lanes"):
            handed[0] = got.x if case.endswith("mix_norm") else got.lane1
        for k, tensor in handed.items():
            if tensor is not None:  # x joined with a skip is not handed through
                assert tensor.requires_grad == (k not in frozen) and tensor.data_ptr() == leaves[k].data_ptr()
                assert tensor is leaves[k] or k not in frozen


@needs_kernels
def test_backward_computes_what_is_needed(monkeypatch) -> None:
    """Neither gradients of a frozen x or x0 nor sums for frozen parameters."""
    asked = []

    def spied(op: Callable) -> Callable:
        def call(*args):
            asked.append((op(*args), args))
            return asked[-1][0]

        return call

    monkeypatch.setattr(family.triton, "_mix_backward_op", spied(family.triton._mix_backward_op))
    monkeypatch.setattr(family.lanes, "_lanes_backward_op", spied(family.lanes._lanes_backward_op))
    for case in ("mix_norm", "join_mix_norm", "enter_lanes_join", "lanes_norm", "lanes_norm_join"):
        leaves, lanes = leaves_of(case, (1, 2, 8)), case.startswith("lanes")
        parameters = {4, 5, 7, 9, 10} if lanes else {2, 4, 5}
        place = 6 if lanes else 1
        for frozen in ({place}, parameters, parameters | {place}, *(() if lanes else ({0}, {0, place}))):
            results(lambda v, case=case: CALLS[case][0](ours, v), leaves, frozen=frozenset(frozen))
            outputs, args = asked.pop()
            assert not asked
            dx0, sums = outputs[0 if lanes else 1], outputs[-1]
            assert (dx0.numel() > 0) == (place not in frozen) and (sums.numel() > 0) == (not parameters <= frozen)
            assert lanes or (outputs[0].numel() > 0) == (0 not in frozen)
            assert (args[0 if lanes else 5] is None) == (place in frozen)


def test_inputs_that_are_not_contiguous() -> None:
    for case in ("join_mix_norm", "enter_lanes_join", "lanes", "linear_norm"):
        leaves = leaves_of(case, dtype=torch.float32)
        strided = [torch.stack([leaf, leaf], -1)[..., 0] for leaf in leaves]
        call, (plain, got) = CALLS[case][0], [[leaf.requires_grad_() for leaf in v] for v in (leaves, strided)]
        expected = torch.autograd.grad(
            call(reference, plain)[0].expand(3, *plain[0].shape).sum(), plain, allow_unused=True
        )
        actual = torch.autograd.grad(call(ours, got)[0].expand(3, *plain[0].shape).sum(), got, allow_unused=True)
        for a, b in zip(actual, expected, strict=True):
            assert b is None or torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 8), (8,)], ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_no_rows_and_one(case: str, shape) -> None:
    leaves = leaves_of(case, shape, torch.float32)
    got, plain = (results(lambda v, op=op: CALLS[case][0](op, v), leaves) for op in (ours, reference))
    for a, b in zip(got, plain, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


@needs_kernels
def test_the_first_layer_reads_one_tensor_twice() -> None:
    x, _, mix = leaves_of("mix_norm")
    got, plain = (
        torch.autograd.grad(op("residual_mix_norm")(leaf, leaf, mix, scale_of(x)).n.square().sum() + leaf.sum(), leaf)[
            0
        ]
        for op in (ours, reference)
        for leaf in [x.clone().requires_grad_()]
    )
    assert torch.allclose(got, plain, atol=1e-10)


@needs_kernels
def test_handed_through_without_a_copy() -> None:
    x, x0, mix = (leaf.requires_grad_() for leaf in leaves_of("mix_norm"))
    mixed = residual_mix_norm(x, x0, mix, scale_of(x))
    assert mixed.x.data_ptr() == x.data_ptr() and mixed.x0.data_ptr() == x0.data_ptr()
    u, h, w = mixed.u, *leaves_of("linear_norm")[1:]
    v, _ = residual_linear_norm(u, h, w, scale_of(x), inplace=True)
    assert v.data_ptr() == u.data_ptr()
    v, n = residual_linear_norm(v, h, w, scale_of(x))
    y = residual_linear(v, h, w, inplace=True)  # v is gone, and the norm's gradient does not need it
    torch.autograd.grad(y.sum() + n.sum(), [x, x0, mix])
    with torch.no_grad():
        assert residual_linear(v, h, w, inplace=True).data_ptr() == v.data_ptr()


@needs_kernels
def test_overwriting_what_others_need_is_an_error() -> None:
    residual, h, w = (leaf.requires_grad_() for leaf in leaves_of("linear"))
    with pytest.raises(RuntimeError, match="in-place"):
        residual_linear(residual, h, w, inplace=True)
    u = residual * 1
    square = u.square()
    residual_linear(u, h, w, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@needs_kernels
def test_a_scale_of_zero() -> None:
    x = leaves_of("norm")[0].requires_grad_()
    zero = torch.zeros((), device=DEVICE)
    n = scaled_rms_norm(x, zero)
    (dx,) = torch.autograd.grad(n.sum(), x)
    assert not n.any() and not dx.any()
    lanes = enter_lanes_norm(x, *leaves_of("mix_norm")[1:], zero)
    (dx,) = torch.autograd.grad(lanes.n0.sum() + lanes.n1.sum() + 2 * lanes.lane1.sum(), x)
    assert not lanes.n0.any() and not lanes.n1.any() and torch.equal(dx, torch.full_like(x, 2))


@needs_kernels
def test_repeats_bit_for_bit() -> None:
    for case in ("join_mix_norm", "lanes_norm_join_gated", "linear_norm_gated", "norm_of_mean"):
        leaves = leaves_of(case, (1, 3000 if DEVICE == "cuda" else 20, 64), torch.bfloat16)
        repeats = 20 if DEVICE == "cuda" else 2
        first, *others = (results(lambda v, c=case: CALLS[c][0](ours, v), leaves) for _ in range(repeats))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
def test_offsets_beyond_32_bits() -> None:
    """Four rows of 2³⁰ elements, of which the kernel is given the first eight each."""
    rows, width = 4, 2**30
    if DEVICE == "cpu":  # pages never touched take no memory
        x = torch.from_numpy(np.zeros((rows, width), np.float16))
    else:
        x = torch.zeros(rows, width, device=DEVICE, dtype=torch.float16)
    x[:, :8] = torch.randn(rows, 8)
    expected, weight = 3 * x[:, :8].float(), torch.full((8,), 2.0, device=DEVICE)
    settings = dict(EPS=0.0, D=width, BLOCK=8, STAGES=1, ACC=tl.float32, num_warps=1)
    unused = (None,) * 4
    family.triton._residual_kernel[(2,)](x, None, None, x, weight, *unused[1:], x, *unused, rows, 2, K=0, **settings)
    assert torch.allclose(x[:, :8].float(), expected, atol=1e-2)


@needs_kernels
def test_operators_are_registered_as_they_behave() -> None:
    ops = torch.ops.pgolf
    leaves = {
        case: [leaf.float() for leaf in leaves_of(case, (1, 2, 8))] for case in ("join_mix_norm", "lanes", "linear")
    }
    x, x0, mix, skip, weight, gate = (leaf.requires_grad_() for leaf in leaves["join_mix_norm"])
    scale, rstd = scale_of(x), torch.ones(x.shape[:-1], device=DEVICE)
    row = torch.randn(5, device=DEVICE, requires_grad=True)
    library.opcheck(ops.residual_mix.default, (x, x0, mix, skip, weight, gate, scale, row, 1e-6, *(True,) * 4))
    library.opcheck(ops.residual_mix.default, (x, x0, mix, *(None,) * 3, scale, None, 1e-6, False, False, True, False))
    library.opcheck(ops.residual_norm.default, (x, x0, scale, 1e-6))
    lanes = [leaf.requires_grad_() for leaf in leaves["lanes"]]
    library.opcheck(ops.residual_lanes.default, (None, *lanes, *(None,) * 6, 0.0, False))
    library.opcheck(ops.residual_lanes.default, (x0, *lanes, mix, skip, weight, gate, scale, row, 1e-6, False))
    library.opcheck(ops.residual_lanes.default, (None, *lanes, *(None,) * 6, 1e-6, True))
    residual, h, w = (leaf.requires_grad_() for leaf in leaves["linear"])
    for row_gate, norm in ((None, True), (row, True), (None, False)):
        library.opcheck(ops.residual_linear.default, (residual, h, w, scale, row_gate, 1e-6, norm))
    x, x0, mix, skip, weight, gate, row, residual, h, w, *lanes = (
        leaf.detach() for leaf in (x, x0, mix, skip, weight, gate, row, residual, h, w, *lanes)
    )
    for flags in (
        (False, False, True, True, True),
        (False, False, True, False, False),
        (True, True, True, True, False),
        (False, False, False, True, True),
    ):
        library.opcheck(
            ops.residual_mix_backward.default, (*(x,) * 7, x0, mix, skip, weight, gate, scale, row, 1e-6, *flags)
        )
    library.opcheck(ops.residual_norm_backward.default, (None, x, x, rstd, scale, None, True, False))
    gated = (None, x, x, torch.ones(2, *x.shape[:-1], device=DEVICE), scale, row, False)
    for need in (True, False):
        library.opcheck(ops.residual_norm_backward.default, (*gated, need))
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        arguments = *(x,) * 5, x0, *lanes, mix, skip, weight, gate, scale, row, 1e-6, *needs
        library.opcheck(ops.residual_lanes_backward.default, arguments)
    for needs in ((True, True), (True, False), (False, True)):
        library.opcheck(ops.residual_linear_backward.default, (residual, h, w, *needs))


COMPILED = ["mix_norm", "join_mix_norm", "join", "norm", "enter_lanes_join", "lanes_norm_join", "linear_norm_inplace"]
COMPILED += ["enter_lanes_join_gated", "lanes_norm_join_gated", "linear_norm_gated"]


@pytest.mark.parametrize("case, autocast", covering(COMPILED, [False, True], strength=1, everywhere=True))
def test_compiles_whole(case: str, autocast: bool) -> None:
    if autocast and case.startswith("linear") and DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("the reference's product follows autocast")
    leaves = leaves_of(case, dtype=torch.float32)
    function = lambda v: CALLS[case][0](ours, v)  # noqa: E731
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
        plain, whole = (results(call, leaves) for call in (function, compiled_for(function)))
    assert plain[0].dtype == torch.float32
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(plain, whole, strict=True))


@pytest.mark.parametrize(
    "case, last",
    covering(["join_mix_norm", "enter_lanes_join", "lanes_norm_join"], [1, 2, 3], strength=1, everywhere=True),
)
def test_frozen_inputs_compile_whole(case: str, last: int) -> None:
    leaves, frozen = leaves_of(case, dtype=torch.float32), frozen_leaves(case)[-last]
    function = lambda v: CALLS[case][0](ours, v)  # noqa: E731
    plain, whole = (results(call, leaves, frozen=frozen) for call in (function, compiled_for(function)))
    for a, b in zip(plain, whole, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_layers_compile_whole() -> None:
    shapes = [(1, 5, 8), (1, 5, 8), (2, 8), (8,), (8,), (8, 8), (2, 2), (2,)]
    leaves = [torch.randn(shape, device=DEVICE) for shape in shapes]
    plain = results(lambda v: layers(ours, v), leaves)
    whole = results(compiled_for(lambda v: layers(ours, v)), leaves)
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(plain, whole, strict=True))


@needs_kernels
def test_second_derivative_is_refused() -> None:
    x = leaves_of("norm")[0].requires_grad_()
    (dx,) = torch.autograd.grad(scaled_rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_errors_name_the_argument() -> None:
    x, x0, mix, skip, weight, gate = leaves_of("join_mix_norm", device="cpu")
    scale = torch.ones(())
    with pytest.raises(ValueError, match=r"x0 must have x's shape \(2, 7, 12\), got \(2, 6, 12\)"):
        residual_mix_norm(x, x0[:, :6], mix, scale)
    with pytest.raises(TypeError, match="x0 must have x's dtype torch.float64, got torch.float32"):
        residual_mix_norm(x, x0.float(), mix, scale)
    with pytest.raises(ValueError, match=r"mix must have shape \(2, 12\), got \(2, 11\)"):
        residual_mix_norm(x, x0, mix[:, 1:], scale)
    with pytest.raises(ValueError, match=r"scale must be one element, got shape \(2,\)"):
        residual_mix_norm(x, x0, mix, torch.ones(2))
    with pytest.raises(ValueError, match="scale must be on x's device cpu, got meta"):
        residual_mix_norm(x, x0, mix, torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="skip and weight go together"):
        residual_mix_norm(x, x0, mix, scale, skip=skip)
    with pytest.raises(TypeError, match="x must be bfloat16, float16, float32 or float64, got torch.int64"):
        scaled_rms_norm(x.long())
    with pytest.raises(ValueError, match=r"gate must have shape \(12,\), got \(11,\)"):
        join_skip(x, skip, weight, gate[1:])
    lanes = leaves_of("lanes", device="cpu")
    with pytest.raises(ValueError, match=r"post must have shape \(2, 2\), got \(2,\)"):
        mix_lanes(*lanes[:4], lanes[5], lanes[5])
    with pytest.raises(ValueError, match="mlp must have lane0's shape"):
        mix_lanes(*lanes[:3], lanes[3][:1], *lanes[4:])
    residual, h, w = leaves_of("linear", device="cpu")
    for row_gate in (torch.ones(1), torch.ones(13), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"row_gate must be \[k \+ 1\] with 1 <= k < 12, got shape"):
            residual_linear_norm(residual, h, w, scale, row_gate=row_gate)
    with pytest.raises(TypeError, match="row_gate must be bfloat16"):
        enter_lanes_norm(x, x0, mix, scale, row_gate=torch.ones(3).int())
    with pytest.raises(ValueError, match=r"weight must be \[d, k\], got shape \(12,\)"):
        residual_linear(residual, h, w[:, 0])
    with pytest.raises(ValueError, match=r"weight must have shape \(12, 19\), got \(12, 20\)"):
        residual_linear(residual, h[..., 1:], w)
    with pytest.raises(ValueError, match=r"scale must be one element, got shape \(2,\)"):
        residual_linear_norm(residual, h, w, torch.ones(2))
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 7, 12\), got \(2, 7, 20\)"):
        residual_linear(h, h, w)
    with pytest.raises(TypeError, match="residual must have x's dtype"):
        residual_linear(residual.float(), h, w)
