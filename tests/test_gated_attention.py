"""The attention sublayer between its projections: formula, gradients, precision, cores, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import library

from pgolf.kernels import gated_attention as family
from pgolf.kernels._launch import INTERPRETED, using
from pgolf.kernels.gated_attention import CORES, Core, gated_attention, gated_attention_reference, kernels
from pgolf.kernels.smear_gate import RMS_EPS

FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6, torch.float64: 1e-13}  # of a relative error
NOISE = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
BOUNDS = [0, 0, 4, 5, 13]  # a segment without tokens, one of one token
# H, K, D, half of the rotated dimensions, padding columns
SHAPES = {
    "plain": (4, 2, 16, 4, 0),
    "odd": (3, 3, 12, 3, 5),
    "no rotation": (4, 1, 8, 0, 1),
    "padded": (6, 2, 16, 8, 3),
    "record": (8, 4, 64, 8, 0),
    "a key a head": (2, 2, 16, 8, 1),
    "a key for all": (8, 1, 32, 4, 2),
}
EVERY_WAY = ("plain", "odd")  # with and without gates and exclusion; in the Triton core and around the plain one

pytestmark = pytest.mark.usefixtures("poisoned")


class Problem:
    """Arguments of one call, in float64 until asked for otherwise, and how to call."""

    def __init__(self, shape="plain", device=DEVICE, *, exclude=True, gated=True, bounds=BOUNDS, rows=1, tokens=13):
        self.heads, self.keys, self.dim, half, padding = SHAPES[shape] if isinstance(shape, str) else shape
        self.cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
        self.longest = 0 if bounds is None else max([1, *np.diff(bounds).tolist()])
        self.options = dict(exclude_own_value=exclude, gated=gated, head_dim=self.dim)
        width = (self.heads + 2 * self.keys) * self.dim + self.heads * gated + padding
        double = dict(device=device, dtype=torch.float64)
        self.projected, self.dy = (torch.randn(rows, tokens, n, **double) for n in (width, self.heads * self.dim))
        angles = torch.randn(tokens, half, **double)
        self.cos, self.sin, self.gain = angles.cos(), angles.sin(), torch.rand(self.heads, **double) + 0.5

    def to(self, dtype: torch.dtype) -> Problem:
        for name in ("projected", "dy", "cos", "sin", "gain"):
            setattr(self, name, getattr(self, name).to(dtype))
        return self

    def call(self, function=gated_attention, **options):
        """``function`` of (projected, gain)."""
        return lambda projected, gain: function(
            projected, self.cos.to(projected.dtype), self.sin.to(projected.dtype), gain, self.cu, self.longest,
            self.heads, self.keys, **self.options, **options,
        )  # fmt: skip

    def results(self, function, projected=None, gain=None, dy=None) -> dict[str, torch.Tensor]:
        """y, its gradients by the columns' meaning and that of the gains; inputs default to the problem's."""
        projected, gain, dy = (b if a is None else a for a, b in ((projected, self.projected), (gain, self.gain),
                                                                  (dy, self.dy)))  # fmt: skip
        dtype = projected.dtype
        leaves = [tensor.detach().requires_grad_() for tensor in (projected, gain)]
        y = function(*leaves)
        dprojected, dgain = torch.autograd.grad(y, leaves, dy.to(dtype))
        assert (dprojected.shape, dprojected.dtype, dgain.dtype) == (projected.shape, dtype, gain.dtype)
        parts = [self.heads * self.dim, self.keys * self.dim, self.keys * self.dim]
        parts.append(self.heads * self.options["gated"])
        dq, dk, dv, dlogits, rest = dprojected.split([*parts, projected.size(-1) - sum(parts)], dim=-1)
        assert not rest.any()
        return {"y": y.detach(), "dq": dq, "dk": dk, "dv": dv, "dlogits": dlogits, "dgain": dgain}

    def assert_as_precise(self, function=None, floor: float | None = None, **inputs) -> None:
        """Every result is as near to float64's as the reference's in the same dtype, but for the condition's sake."""
        reference = self.call(gated_attention_reference)
        got, plain = (self.results(f, **inputs) for f in (function or self.call(), reference))
        double = {name: getattr(self, name).double() for name in ("projected", "gain", "dy")}
        double |= {name: tensor.double() for name, tensor in inputs.items()}
        exact = self.results(reference, **double)
        noisy = [self.results(reference, **{n: x * (1 + NOISE * torch.randn_like(x)) for n, x in double.items()})
                 for _ in range(4)]  # fmt: skip
        floor = floor or FLOOR[got["y"].dtype]
        for name, c in exact.items():
            size = c.norm().clamp(min=0.1 * double["dy"].norm())  # for what is zero but for rounding
            condition = max(1.0, *(float((other[name] - c).norm() / size) / NOISE for other in noisy))
            error, allowed = (float((results[name].double() - c).norm() / size) for results in (got, plain))
            assert error <= 1.5 * allowed + floor * condition, f"{name}: {error}, where the reference has {allowed}"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def by_hand(p: Problem, exclude: bool, gated: bool) -> torch.Tensor:
    """The formula, one token and head at a time."""
    y = torch.zeros_like(p.dy)
    K, D, half = p.keys, p.dim, p.cos.size(1)

    def turned(row: torch.Tensor, index: int, t: int) -> torch.Tensor:
        x = row[index * D : (index + 1) * D]
        x = x / (x.square().mean() + RMS_EPS).sqrt()
        first, second, rest = x[:half], x[half : 2 * half], x[2 * half :]
        cos, sin = p.cos[t], p.sin[t]
        return torch.cat([first * cos + second * sin, second * cos - first * sin, rest])

    for row, out in zip(p.projected, y, strict=True):
        for t in range(row.size(0)):
            start = 0 if p.cu is None else max(bound for bound in p.cu.tolist() if bound <= t)
            for h in range(p.heads):
                j = h // (p.heads // K)
                q = p.gain[h] * turned(row[t], h, t)
                past = range(start, t + 1)
                scores = torch.stack([q @ turned(row[s], p.heads + j, s) for s in past]) / D**0.5
                values = [row[s, (p.heads + K + j) * D : (p.heads + K + j + 1) * D] for s in past]
                o = scores.softmax(0) @ torch.stack(values)
                if exclude:
                    own = values[-1] / values[-1].norm()
                    o = o - (o @ own) * own
                logit = row[t, (p.heads + 2 * K) * D + h] if gated else torch.zeros_like(q[0])
                out[t, h * D : (h + 1) * D] = 2 * torch.sigmoid(logit) * o
    return y


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_formula(device, packed: bool, gated: bool, exclude: bool) -> None:
    rows = 1 if packed else 2
    p = Problem("odd", device, exclude=exclude, gated=gated, bounds=BOUNDS if packed else None, rows=rows)
    assert (p.call()(p.projected, p.gain) - by_hand(p, exclude, gated)).abs().max() < 1e-12


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients(device, gated: bool, exclude: bool) -> None:
    p = Problem((2, 1, 3, 1, 1), device, exclude=exclude, gated=gated, bounds=[0, 1, 3], tokens=3)
    leaves = [p.projected[0].requires_grad_(), p.gain.requires_grad_()]
    assert torch.autograd.gradcheck(p.call(), leaves, fast_mode=True)


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_precision(device, shape: str, gated: bool, exclude: bool) -> None:
    if shape not in EVERY_WAY and not (gated and exclude):
        pytest.skip("the other shapes show it")
    for dtype in (torch.bfloat16, torch.float32):
        Problem(shape, device, exclude=exclude, gated=gated).to(dtype).assert_as_precise()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_precision_of_other_dtypes(device, dtype) -> None:
    p = Problem("padded", device).to(dtype)
    p.gain = p.gain.float()  # the masters' dtype
    p.assert_as_precise()


@pytest.mark.parametrize("rows, tokens", [(3, 7), (1, 1), (2, 1), (1, 5)])
def test_dense_rows(device, rows: int, tokens: int) -> None:
    p = Problem("padded", device, bounds=None, rows=rows, tokens=tokens).to(torch.float32)
    # A token that sees itself alone is left with rounding: 1.9e-6 on an H100, where the reference has 4e-7.
    p.assert_as_precise(floor=2e-6 if tokens == 1 else None)


def test_a_row_without_a_batch(device) -> None:
    p = Problem("plain", device)
    assert torch.equal(p.call()(p.projected[0], p.gain), p.call()(p.projected, p.gain)[0])


@pytest.mark.parametrize("shape", ["plain", "odd"])
def test_head_dim_is_found(device, shape: str) -> None:
    p = Problem(shape, device)
    for function in (gated_attention, gated_attention_reference):
        known = p.call(function)(p.projected, p.gain)
        found = Problem(shape, device)
        found.__dict__ |= p.__dict__ | {"options": p.options | {"head_dim": None}}
        assert torch.equal(found.call(function)(p.projected, p.gain), known)


def test_values_of_no_length(device) -> None:
    """Nothing lies along a value of zeros, and next to nothing along one shorter than the clamp."""
    p = Problem("plain", device).to(torch.float32)
    first = (p.heads + p.keys) * p.dim
    p.projected[:, 2, first : first + 2 * p.dim] = 0
    p.projected[:, 7, first : first + p.dim] *= 1e-15
    p.assert_as_precise()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_shut_and_open(device, dtype) -> None:
    p = Problem("plain", device).to(dtype)
    extremes = torch.tensor([-1e4, -200, -95, -60, -20, 20, 95, 1e4], device=device, dtype=dtype)
    first = (p.heads + 2 * p.keys) * p.dim
    p.projected[0, :8, first], p.projected[0, 5:, first + 3] = extremes, extremes
    p.assert_as_precise()
    assert all(value.isfinite().all() for value in p.results(p.call()).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_far_from_zero(device, dtype) -> None:
    """Nearly all of the attention's result lies along the own value."""
    p = Problem("plain", device).to(dtype)
    first = (p.heads + p.keys) * p.dim
    p.projected[:, :, first : first + p.keys * p.dim] += 30
    p.assert_as_precise()


@needs_kernels
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_epilogue_in_the_core_is_the_epilogue_after_it(monkeypatch, gated: bool, exclude: bool) -> None:
    """In segments of more than a tile."""
    tokens, last = (600, 250) if DEVICE == "cuda" else (54, 17)
    bounds = [0, tokens - last - 1, tokens - last, tokens]
    p = Problem("plain", exclude=exclude, gated=gated, bounds=bounds, tokens=tokens).to(torch.float32)
    fused = p.results(p.call())
    if gated and exclude:
        p.assert_as_precise()
    monkeypatch.setitem(CORES, "triton", CORES["triton"]._replace(fuses=False))
    apart = p.results(p.call())
    for name in fused:
        assert torch.allclose(fused[name], apart[name], rtol=1e-4, atol=1e-4), name


def test_inputs_that_are_not_contiguous(device) -> None:
    p = Problem("padded", device).to(torch.float32)
    wide = torch.randn(13, 300, device=device)
    wide[:, 7 : 7 + p.projected.size(-1)] = p.projected[0]
    dy = torch.randn(1, 13, 1, device=device).expand(p.dy.shape)
    p.assert_as_precise(projected=wide[None, :, 7 : 7 + p.projected.size(-1)], dy=dy)
    p.cos, p.sin = (torch.stack([x, x], -1)[..., 0] for x in (p.cos, p.sin))
    p.assert_as_precise(projected=p.projected.mT.contiguous().mT, gain=torch.stack([p.gain, p.gain], 1)[:, 0])


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_no_tokens(device, shape) -> None:
    p = Problem("plain", device, bounds=[0] if shape[0] else None, rows=shape[0], tokens=shape[1])
    results = p.results(p.call())
    assert results["y"].shape == (*shape, p.heads * p.dim) and not results["dgain"].any()


@needs_kernels
@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("kind", ["in place", "elsewhere", "v by its own"])
def test_whatever_the_core_does_with_its_outputs(monkeypatch, kind: str, exclude: bool) -> None:
    """Columns written in place are turned in place; others are read from where they are."""
    plain = CORES["sdpa"]
    if kind == "elsewhere":  # as FlashAttention does, and with strides that it does not have

        def backward(*arguments):
            dq, dk, dv = plain.backward(*arguments[:10])
            return dq, torch.cat([dk, dk], 2)[..., : dk.size(2)], dv.mT.contiguous().mT

        core = Core(plain.forward, backward)
    else:
        core = plain._replace(adds=kind == "in place")
    monkeypatch.setitem(CORES, "sdpa", core)
    p = Problem("padded", exclude=exclude).to(torch.float32)
    p.assert_as_precise()


def test_reference_keeps_to_flash_whatever_kernels_are_on(monkeypatch) -> None:
    monkeypatch.setattr(family, "_flash_takes", lambda *_: True)
    monkeypatch.setattr(family, "varlen_attn", lambda q, *_, **__: q + 1)
    q, k, v = torch.zeros(3, 1, 8, 2, 16)
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    for choice in ("reference", "triton"):
        with using(choice):
            assert (family.attention_reference(q, k, v, bounds, 8) == 1).all()
    assert (family.attention_reference(q, k, v, bounds, 8, "sdpa") == 0).all()


def test_plain_core_agrees_with_autograd() -> None:
    q, k, v, do = (torch.randn(13, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2, 4))
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    expected = family.attention_reference(q[None], k[None], v[None], cu, 8)[0]
    gradients = torch.autograd.grad(expected, (q, k, v), do)
    arguments = [x.detach() for x in (q, k, v)]
    o, lse = CORES["sdpa"].forward(*arguments, cu, 8, 8**-0.5)
    assert torch.allclose(o, expected)
    for delta in (None, (do * o).sum(-1).T.detach()):
        got = CORES["sdpa"].backward(do.detach(), *arguments, o, lse, cu, 8, 8**-0.5, delta)
        assert all(torch.allclose(a, b) for a, b in zip(got, gradients, strict=True))


@needs_kernels
@pytest.mark.parametrize("tokens, warps", [(1, 1), (4, 2), (16, 4)])
def test_any_launch_parameters(monkeypatch, tokens: int, warps: int) -> None:
    p = Problem("odd").to(torch.float32)
    expected = p.results(p.call())
    monkeypatch.setattr(kernels, "launch_parameters", lambda *_: dict(tokens=tokens, warps=warps))
    got = p.results(p.call())
    for name in expected:
        assert torch.allclose(got[name], expected[name], rtol=1e-5, atol=1e-5), name


@needs_kernels
def test_repeats_bit_for_bit() -> None:
    p = Problem("padded", bounds=[0, 11, 22], tokens=22).to(torch.bfloat16)
    first, *others = (p.results(p.call()) for _ in range(20 if DEVICE == "cuda" else 3))
    assert all(same(first, other) for other in others)


@needs_kernels
def test_offsets_beyond_32_bits() -> None:
    """The third of three rows begins at element 2³¹ or later."""
    H, K, D = 2, 1, 8
    stride = 2**30 + 8
    if DEVICE == "cpu":  # pages never touched take no memory
        memory = torch.from_numpy(np.zeros(2 * stride + 64, np.float16))
    else:
        memory = torch.zeros(2 * stride + 64, device=DEVICE, dtype=torch.float16)
    projected = memory.as_strided((3, 34), (stride, 1))
    projected.copy_(torch.randn(3, 34))
    near = projected.clone()
    o = torch.randn(3, H, D, device=DEVICE).half()
    angles, gain = torch.randn(3, 4, device=DEVICE).half(), torch.ones(H, device=DEVICE)
    sizes = H, K, D
    pairs = [
        (kernels.prologue(x, angles, angles, gain, *sizes, 1e-7), kernels.epilogue(o, x, *sizes, True, True))
        for x in (projected, near)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@needs_kernels
@pytest.mark.parametrize("core", ["sdpa", "triton"])
def test_operators_are_registered_as_they_behave(core: str) -> None:
    p = Problem("plain", bounds=[0, 2, 5], tokens=5).to(torch.float32)
    rest = (p.longest, p.heads, p.keys, p.dim, True, True, 1e-7, core)
    inputs = p.projected, p.cos, p.sin, p.gain
    leaves = p.projected.clone().requires_grad_(), p.cos, p.sin, p.gain.clone().requires_grad_()
    library.opcheck(torch.ops.pgolf.gated_attention.default, (*leaves, p.cu, *rest))
    saved = family._gated_attention_triton(*inputs, p.cu, *rest)
    arguments = (p.dy, *inputs, p.cu, *saved, *rest)
    library.opcheck(torch.ops.pgolf.gated_attention_backward.default, arguments)


@pytest.mark.parametrize("packed", [True, False])
def test_compiles_whole(device, packed: bool) -> None:
    p = Problem("plain", device, bounds=[0, 2, 5] if packed else None, rows=1 if packed else 2, tokens=5)
    p.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch._dynamo.reset()
    plain, whole = (
        p.results(call) for call in (p.call(), torch.compile(p.call(), fullgraph=True, backend="aot_eager"))
    )
    tolerance = 2e-2 if device.type == "cuda" else 1e-5
    for name in plain:
        assert torch.allclose(plain[name], whole[name], rtol=tolerance, atol=tolerance), name


@needs_kernels
def test_without_a_gradient_and_with_some() -> None:
    p = Problem("plain").to(torch.float32)
    with torch.no_grad():
        y = p.call()(p.projected, p.gain)
    whole = p.results(p.call())
    assert torch.equal(y, whole["y"])
    gain = p.gain.clone().requires_grad_()
    (dgain,) = torch.autograd.grad(p.call()(p.projected, gain), gain, p.dy)
    assert torch.equal(dgain, whole["dgain"])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(p.call()(p.projected, p.gain), y)


@needs_kernels
def test_second_derivative_is_refused() -> None:
    p = Problem("plain").to(torch.float32)
    x = p.projected.requires_grad_()
    (dx,) = torch.autograd.grad(p.call()(x, p.gain).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("packed", [True, False])
def test_in_a_cuda_graph(packed: bool) -> None:
    p = Problem("record", bounds=BOUNDS if packed else None, rows=1 if packed else 2).to(torch.bfloat16)
    expected = p.results(p.call())
    with torch.cuda.stream(torch.cuda.Stream()):
        p.results(p.call())
    torch.cuda.synchronize()
    projected, gain = p.projected.clone().requires_grad_(), p.gain.clone().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = p.call()(projected, gain)
        gradients = torch.autograd.grad(y, (projected, gain), p.dy)
    graph.replay()
    assert torch.equal(y, expected["y"]) and torch.equal(gradients[1], expected["dgain"])


def test_errors_name_the_argument() -> None:
    p = Problem("plain", "cpu").to(torch.float32)
    arguments = dict(
        projected=p.projected, cos=p.cos, sin=p.sin, q_gain=p.gain, cu_seqlens=p.cu, max_seqlen=8, num_heads=4,
        num_kv_heads=2, **p.options,
    )  # fmt: skip

    def refused(error, match: str, **changes) -> None:
        with pytest.raises(error, match=match):
            gated_attention(**(arguments | changes))

    refused(ValueError, "projected must be .* got shape \\(5,\\)", projected=torch.ones(5))
    refused(ValueError, "projected must have at least 132 columns for heads of 16, got 131",
            projected=p.projected[..., 1:])  # fmt: skip
    refused(ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3", num_kv_heads=3)
    refused(ValueError, r"cos must be \[13, at most 8\], got shape \(12, 4\)", cos=p.cos[1:])
    refused(ValueError, r"sin must have cos's shape \(13, 4\), got \(13, 3\)", sin=p.sin[:, 1:])
    refused(ValueError, r"q_gain must be \[4\], got shape \(4, 1\)", q_gain=p.gain[:, None])
    refused(TypeError, "projected must be bfloat16, float16, float32 or float64, got torch.int64",
            projected=p.projected.long())  # fmt: skip
    refused(ValueError, "q_gain must be on projected's device cpu, got meta", q_gain=p.gain.to("meta"))
    refused(ValueError, "cu_seqlens must be one-dimensional int32 on cpu, got torch.int64", cu_seqlens=p.cu.long())
    refused(ValueError, "projected must be one row with cu_seqlens, got 2 rows",
            projected=p.projected.expand(2, 13, 132))  # fmt: skip
    refused(ValueError, "max_seqlen must be .* got 0", max_seqlen=0)
    refused(ValueError, "attention has the cores auto, .*, and 'fast' is none of them", core="fast")


def test_flash_core_takes_what_the_op_gives() -> None:
    """Its arguments and the shapes of its results; the values are for a GPU."""
    with torch.device("meta"):
        qk, projected, cu = torch.empty(20, 12, 64), torch.empty(20, 1032), torch.empty(4, dtype=torch.int32)
    qk, projected = qk.bfloat16(), projected.bfloat16()
    q, k, v = qk[:, :8], qk[:, 8:], family._heads(projected, 12, 4, 64)
    o, lse = CORES["flash"].forward(q, k, v, cu, 9, 0.125)
    assert (o.shape, lse.shape, lse.dtype) == ((20, 8, 64), (8, 20), torch.float32)
    gradients = CORES["flash"].backward(o, q, k, v, o, lse, cu, 9, 0.125, lse, q, k, None)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
