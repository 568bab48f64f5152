"""All layers' matrices and the banks' gradients: values, precision, passes, memory, edges; reference and kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import library

from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.layer_weights import layer_weights, layer_weights_reference
from tests.conftest import covering

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# layers, d, rows of keys, hidden units, gates and the columns that they read
SIZES = [(3, 32, 16, 64, (4, 8)), (2, 48, 40, 70, None), (1, 5, 3, 1100, (2, 5)), (2, 1, 1, 1, (1, 1))]
LOOP = [0, 1, 2, 1, 2, 1]

pytestmark = pytest.mark.usefixtures("poisoned")


def masters(n: int, d: int, k: int, m: int, gates, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    shapes = [(2 * n, d, d), (2 * n, k, d), (n, m, d), (n, d, m), (2 * n, d), gates and (n, *gates)]
    return [shape and torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_() for shape in shapes]


def flat(op: Callable, leaves: list, dtype: torch.dtype, order: list[int]) -> list[torch.Tensor]:
    return [matrix for matrices in op(*leaves, dtype, order) for matrix in matrices]


def gradients(outputs: list, leaves: list, douts: list) -> list[torch.Tensor | None]:
    """Of all masters, from gradients of the matrices, where there are any."""
    pairs = [(out, dout.to(out.dtype)) for out, dout in zip(outputs, douts, strict=True) if dout is not None]
    given = [leaf for leaf in leaves if leaf is not None]
    outputs, douts = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, given, douts, allow_unused=True))


def random_douts(outputs: list) -> list[torch.Tensor]:
    """In any memory order, and numbers that bfloat16 has."""
    made = [torch.randn(out.shape, device=DEVICE).bfloat16().to(out.dtype) for out in outputs]
    return [dout.mT.contiguous().mT if i % 3 == 1 else dout for i, dout in enumerate(made)]


def assert_exact(leaves: list, douts: list, order: list[int], outputs: list) -> None:
    """Gradients in the masters' precision: those of float64 from the same gradients of the matrices."""
    doubles = [leaf if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = gradients(flat(layer_weights_reference, doubles, torch.float64, order), doubles, douts)
    got = gradients(outputs, leaves, douts)
    for i, (a, b, leaf) in enumerate(zip(got, exact, (leaf for leaf in leaves if leaf is not None), strict=True)):
        assert (a.dtype, a.shape) == (leaf.dtype, leaf.shape)
        bound = 6e-7 if leaf.dtype == torch.float32 else 3e-15  # measured 2e-7 and 5e-16
        b = torch.zeros_like(leaf) if b is None else b
        assert (a - b).norm() <= bound * b.norm(), f"gradient {i}: {(a - b).norm() / b.norm():.1e}"


@pytest.mark.parametrize("sizes, dtype", covering(SIZES, DTYPES, strength=1), ids=str)
def test_matrices(sizes, dtype: torch.dtype) -> None:
    """Bit for bit the reference's, and by the formulas."""
    n, d, k, m, gates = sizes
    order = [*range(n), 0]
    leaves = masters(*sizes, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        plain = flat(layer_weights, leaves, dtype, order)
    got, expected = (flat(op, leaves, dtype, order) for op in (layer_weights, layer_weights_reference))
    for a, b, c in zip(got, expected, plain, strict=True):
        assert a.dtype == dtype and torch.equal(a, b) and torch.equal(a, c)
    qo, kv, up, down, scales, _ = leaves
    inputs, out, *_ = got[:4]
    assert torch.equal(inputs[d : d + k], kv[0].to(dtype)) and torch.equal(got[2], up[0].to(dtype))
    assert torch.equal(out, (scales[0][:, None] * qo[n]).to(dtype))
    assert len(inputs) % 16 == 0 and not inputs[d + 2 * k + (gates[0] if gates else 0) :].any()


@needs_kernels
@pytest.mark.parametrize("sizes, dtype", covering(SIZES, DTYPES, strength=1), ids=str)
def test_gradients_are_sums_over_passes_in_the_masters_precision(sizes, dtype: torch.dtype) -> None:
    order = [i for i in LOOP if i < sizes[0]]
    leaves = masters(*sizes, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    outputs = flat(layer_weights, leaves, dtype, order)
    assert_exact(leaves, random_douts(outputs), order, outputs)


@needs_kernels
@pytest.mark.parametrize("kept", ["one layer", "one matrix", "no inputs"])
def test_gradients_that_are_missing_are_zero(kept: str) -> None:
    """Of some passes, of all passes through a layer (nobody writes uninitialised memory), of a matrix of all layers."""
    leaves, order = masters(*SIZES[0]), [1, 2, 1, 1]
    outputs = flat(layer_weights, leaves, torch.bfloat16, order)
    keep = {"one layer": range(8, 12), "one matrix": [2], "no inputs": [k for k in range(16) if k % 4]}[kept]
    assert_exact(leaves, [d if k in keep else None for k, d in enumerate(random_douts(outputs))], order, outputs)


class NoGradient(torch.autograd.Function):
    """The identity that hands no gradient back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, dx: torch.Tensor) -> None:
        return None


@needs_kernels
def test_no_gradient_at_all() -> None:
    leaves = masters(*SIZES[0])
    out = NoGradient.apply(flat(layer_weights, leaves, torch.float32, [0])[0])
    assert torch.autograd.grad(out.sum(), leaves, allow_unused=True) == (None,) * 6


@needs_kernels
def test_padding_is_not_read() -> None:
    """The gates' gradients beyond the columns that they read may be anything, and so may those of rows of padding."""
    leaves, order = masters(*SIZES[0]), [0, 1, 2]
    outputs = flat(layer_weights, leaves, torch.float32, order)
    clean = random_douts(outputs)
    dirty = [dout.clone() for dout in clean]
    for dout in dirty[::4]:
        dout[64:, 8:] = dout[68:] = torch.nan
    again = flat(layer_weights, leaves, torch.float32, order)
    for a, b in zip(gradients(again, leaves, dirty), gradients(outputs, leaves, clean), strict=True):
        assert torch.equal(a, b)


@needs_kernels
def test_gradcheck() -> None:
    leaves = masters(2, 3, 2, 4, (2, 2), dtype=torch.float64)
    function = lambda *leaves: tuple(flat(layer_weights, leaves, torch.float64, [0, 1, 0]))  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@needs_kernels
@pytest.mark.parametrize("grad", [True, False])
def test_passes_share_memory_and_have_tensors_of_their_own(grad: bool) -> None:
    leaves = masters(*SIZES[0])
    with torch.set_grad_enabled(grad):
        first, second, other = layer_weights(*leaves, torch.bfloat16, [1, 1, 2])
    for a, b, c in zip(first, second, other, strict=True):
        assert a.data_ptr() == b.data_ptr() != c.data_ptr() and a is not b and a.requires_grad == grad
        assert a.untyped_storage().data_ptr() == c.untyped_storage().data_ptr()
    inputs, out, up, down = first
    assert all(matrix.is_contiguous() for matrix in (inputs, out.mT, up, down.mT))


@needs_kernels
def test_masters_of_any_strides_and_without_gradients() -> None:
    leaves, order = masters(*SIZES[0]), [0, 2, 2, 1]
    strided = [torch.stack([leaf, leaf], -1)[..., 0].detach() for leaf in leaves]
    for k in (0, 3, 5):
        strided[k].requires_grad_()
    outputs = flat(layer_weights, strided, torch.bfloat16, order)
    douts = random_douts(outputs)
    expected = gradients(flat(layer_weights, leaves, torch.bfloat16, order), leaves, douts)
    got = torch.autograd.grad(outputs, [strided[k] for k in (0, 3, 5)], [d.to(torch.bfloat16) for d in douts])
    for k, gradient in zip((0, 3, 5), got, strict=True):
        assert torch.equal(gradient, expected[k])


@needs_kernels
def test_an_unaligned_gradient() -> None:
    leaves = masters(*SIZES[0])
    outputs = flat(layer_weights, leaves, torch.bfloat16, [0])
    douts = [torch.randn(dout.numel() + 1, device=DEVICE).bfloat16()[1:].view(dout.shape) for dout in outputs]
    assert_exact(leaves, douts, [0], outputs)


@needs_kernels
def test_the_same_bits_every_time() -> None:
    leaves = masters(*SIZES[0])
    outputs = flat(layer_weights, leaves, torch.bfloat16, LOOP)
    douts = random_douts(outputs)
    first, *others = (
        gradients(flat(layer_weights, leaves, torch.bfloat16, LOOP), leaves, douts)
        for _ in range(2 + 8 * (DEVICE == "cuda"))
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
def test_the_operators_are_registered_as_they_behave() -> None:
    ops = torch.ops.pgolf
    for sizes in ((2, 8, 4, 12, (2, 4)), (2, 8, 4, 12, None)):
        leaves = masters(*sizes)
        library.opcheck(ops.layer_weights.default, (*leaves, torch.bfloat16))
        outputs = flat(layer_weights, leaves, torch.bfloat16, [0, 1, 1])
        douts = [None if k == 5 else dout for k, dout in enumerate(random_douts(outputs))]
        leaves = [leaf if leaf is None else leaf.detach() for leaf in leaves]
        library.opcheck(ops.layer_weights_backward.default, (douts, [0, 1, 1], *leaves))


@pytest.mark.parametrize("gates", [(4, 8), None])
def test_compiles_whole(gates) -> None:
    leaves = masters(3, 16, 8, 24, gates)
    torch._dynamo.reset()
    whole = torch.compile(lambda *v: flat(layer_weights, v, torch.float32, LOOP), fullgraph=True, backend="aot_eager")
    plain, compiled = flat(layer_weights, leaves, torch.float32, LOOP), whole(*leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    douts = random_douts(plain)
    for a, b in zip(*(gradients(outputs, leaves, douts) for outputs in (plain, compiled)), strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-5)


@needs_kernels
def test_second_derivative_is_refused() -> None:
    leaves = masters(*SIZES[0])
    out = layer_weights(*leaves, torch.float32, [0])[0][1]
    (dscales,) = torch.autograd.grad(out.square().sum(), leaves[4], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dscales.sum().backward()


def test_errors_name_the_argument() -> None:
    qo, kv, up, down, scales, gates = tensors = [leaf.detach().cpu() for leaf in masters(2, 16, 8, 24, (2, 4))]
    names = ("qo_bank", "kv_bank", "up_bank", "down_bank", "scales", "gates")
    for i, name in enumerate(names[1:], 1):
        for error, wrong, message in (
            (ValueError, tensors[i][..., 0], f"{name} must "),
            (TypeError, tensors[i].bfloat16(), f"{name} must have qo_bank's dtype torch.float32, got torch.bfloat16"),
            (ValueError, tensors[i].to("meta"), f"{name} must be on qo_bank's device cpu, got meta"),
        ):
            with pytest.raises(error, match=message):
                layer_weights(*tensors[:i], wrong, *tensors[i + 1 :], torch.bfloat16, [0])
    with pytest.raises(TypeError, match="qo_bank must be float32 or float64, got torch.bfloat16"):
        layer_weights(qo.bfloat16(), kv, up, down, scales, gates, torch.bfloat16, [0])
    with pytest.raises(ValueError, match=r"qo_bank must have shape \[4, 16, 16\], got \[3, 16, 16\]"):
        layer_weights(qo[:3], kv, up, down, scales, gates, torch.bfloat16, [0])
    with pytest.raises(ValueError, match=r"kv_bank must have shape \[4, any, 16\], got \[4, 8, 15\]"):
        layer_weights(qo, kv[..., 1:], up, down, scales, gates, torch.bfloat16, [0])
    with pytest.raises(ValueError, match=r"down_bank must be \[n, d, m\] with n >= 1, got shape \(0, 16, 24\)"):
        layer_weights(qo, kv, up, down[:0], scales, gates, torch.bfloat16, [0])
    with pytest.raises(ValueError, match="gates must have at most 16 columns, got 17"):
        layer_weights(qo, kv, up, down, scales, torch.ones(2, 2, 17), torch.bfloat16, [0])
    with pytest.raises(TypeError, match="dtype must be bfloat16, float16, float32 or float64, got torch.int8"):
        layer_weights(qo, kv, up, down, scales, gates, torch.int8, [0])
    with pytest.raises(ValueError, match=r"order must have layers from 0 to 1, got \[0, 2\]"):
        layer_weights(qo, kv, up, down, scales, gates, torch.bfloat16, [0, 2])
