"""Muon's momentum, norm and application for lists of tensors; kernels run on a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import library

from pgolf.kernels.common.backend import INTERPRETED, using
from pgolf.kernels.muon_update import (
    apply_update,
    apply_update_reference,
    clip_factor,
    clip_factor_reference,
    momentum_update,
    momentum_update_reference,
    squared_norm,
    squared_norm_reference,
)
from pgolf.kernels.muon_update.triton import MAX_TENSORS
from pgolf.training.optim import Muon
from tests.conftest import covering, of_the_reference

Tensor = torch.Tensor
FLOOR = {torch.bfloat16: 1e-4, torch.float16: 1e-5, torch.float32: 3e-7, torch.float64: 1e-15}  # of a relative error
# Less than a chunk, many chunks, whole vectors and not, none, one element, tall and wide.
SHAPES = [(3, 40, 32), (2, 7, 5), (0, 4, 4), (1, 1, 1), (5, 17, 99), (1, 64, 128)]
MIXED = {
    "float32 to bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
    "float32 to float16": (torch.float32, torch.float16),
    "bfloat16 to float32": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
}
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")

pytestmark = pytest.mark.usefixtures("poisoned")


def random(dtype: torch.dtype, device, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().clone() for tensor in tensors]


def assert_as_precise(got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Results are as near to float64's as the reference's are."""
    for a, b, c in zip(got, plain, exact, strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        size = c.norm().clamp(min=1e-30)
        error, allowed = (float((t.double() - c).norm() / size) for t in (a, b))
        assert error <= 1.5 * allowed + FLOOR[a.dtype], f"{error} where the reference has {allowed}"


# --- momentum_update ---


@pytest.mark.parametrize(
    "dtypes, scale, nesterov", covering(MIXED, ["one", "number", "tensor", "vector"], [True, False])
)
def test_momentum(device, dtypes: str, scale: str, nesterov: bool) -> None:
    of_gradient, of_buffer = MIXED[dtypes]
    gradients, buffers = random(of_gradient, device), random(of_buffer, device)
    number = 1.0 if scale == "one" else 0.34
    given = {"tensor": torch.tensor(number, device=device), "vector": torch.tensor([number], device=device)}
    given = given.get(scale, number)
    mine, plain, exact = copies(buffers), copies(buffers), doubles(buffers)
    rounded = doubles([gradient.to(of_buffer) for gradient in gradients])
    updates = momentum_update(gradients, mine, 0.95, given, nesterov)
    plain_updates = momentum_update_reference(gradients, plain, 0.95, number, nesterov)
    for g, b in zip(rounded, exact, strict=True):
        b.copy_(0.95 * b + number * g)
    exact_updates = [number * g + 0.95 * b if nesterov else b for g, b in zip(rounded, exact, strict=True)]
    if dtypes != "float64":  # where the tensor's float32 is less
        assert_as_precise([*mine, *updates], [*plain, *plain_updates], [*exact, *exact_updates])
    assert all((update is buffer) != nesterov for update, buffer in zip(updates, mine, strict=True))


def test_the_reference_is_the_sequence_of_old(device) -> None:
    """Bit for bit: cast, scale, multiply, add, add."""
    gradients, buffers, scale = random(torch.float32, device), random(torch.bfloat16, device), torch.tensor(0.3)
    mine, old = copies(buffers), copies(buffers)
    updates = momentum_update_reference(gradients, mine, 0.97, scale.to(device))
    for gradient, buffer, update, after in zip(gradients, old, updates, mine, strict=True):
        gradient = gradient.to(torch.bfloat16) * scale.to(device)
        buffer.mul_(0.97).add_(gradient)
        assert torch.equal(buffer, after) and torch.equal(update, gradient.add(buffer, alpha=0.97))


# --- squared_norm, clip_factor ---


@pytest.mark.parametrize(
    "dtype, count",
    covering([torch.float32, torch.bfloat16, torch.float16, torch.float64], [120, 70, 5, 1], strength=1),
)
def test_squared_norm(device, dtype: torch.dtype, count: int) -> None:
    sizes = [(12_345,), (40, 64), (8,), (3, 1, 2), (0,), *[(k % 19,) for k in range(count)]][-count:]
    tensors = random(dtype, device, sizes)
    got, plain = squared_norm(tensors), squared_norm_reference(tensors)
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    assert got.shape == () and got.dtype == torch.float32 and got.device == tensors[0].device
    assert_as_precise([got], [plain], [exact])
    assert torch.equal(got, squared_norm(tensors))


def test_squared_norm_of_several_dtypes(device) -> None:
    tensors = [tensor for dtype in (torch.float32, torch.bfloat16, torch.float16) for tensor in random(dtype, device)]
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    assert squared_norm(tensors).item() == pytest.approx(exact.item(), rel=1e-6)


def test_squared_norm_of_nothing_and_of_nan(device) -> None:
    assert squared_norm([torch.empty(0, 3, device=device)]).item() == 0
    tensors = random(torch.float32, device)
    tensors[4][-1, -1, -1] = float("nan")
    assert squared_norm(tensors).isnan()


@pytest.mark.parametrize("norm", [0.0, 0.1, 0.3, 4.0, 1e15, float("inf"), float("nan")])
def test_clip_factor(device, norm: float) -> None:
    squares = torch.tensor(norm, device=device).square()
    got, plain = clip_factor(squares, 0.3), clip_factor_reference(squares, 0.3)
    for a, b in zip(got, plain, strict=True):
        assert a.shape == () and a.dtype == torch.float32
        assert torch.allclose(a, b, rtol=3e-7, atol=0, equal_nan=True)
    if norm == 4.0:
        assert got[1].item() == pytest.approx(0.3 / 4, rel=1e-6)


# --- apply_update ---


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("dtypes", MIXED)
def test_apply(device, dtypes: str, averaged: bool) -> None:
    dtype, of_update = MIXED[dtypes]
    parameters, updates = random(dtype, device), random(of_update, device)
    averages = random(torch.promote_types(dtype, torch.float32), device) if averaged else None
    results = []
    for function, convert in (
        (apply_update, copies),
        (apply_update_reference, copies),
        (apply_update_reference, doubles),
    ):
        moved, means = convert(parameters), convert(averages) if averaged else None
        function(moved, updates if convert is copies else doubles(updates), 0.03, 0.7, means, 0.9)
        results.append([*moved, *(means or ())])
    assert_as_precise(*results)
    expected = parameters[0].double() * (1 - 0.03 * 0.7) - 0.03 * (40 / 32) ** 0.5 * updates[0].double()
    assert torch.allclose(results[2][0], expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [2, [0.5, 1.5, 0.0, -1.0, 2.0, 3.0, 0.25]], ids=["one", "each"])
def test_apply_with_other_scales(device, scale) -> None:
    """Of any shape, beside tensors of other dtypes and empty ones."""
    parameters = [*random(torch.float32, device), torch.randn(9, device=device)]
    parameters[1] = parameters[1].bfloat16()
    updates = [torch.randn_like(parameter) for parameter in parameters]
    moved = [copies(parameters), copies(parameters), doubles(parameters)]
    apply_update(moved[0], updates, 0.03, 0.7, scale=scale)
    apply_update_reference(moved[1], updates, 0.03, 0.7, scale=scale)
    for k, (parameter, update) in enumerate(zip(moved[2], updates, strict=True)):
        factor = scale[k] if isinstance(scale, list) else scale
        parameter.mul_(1 - 0.03 * 0.7).sub_(0.03 * factor * update.double())
    assert_as_precise(*moved)


def test_averages_follow_what_is_stored(device) -> None:
    parameters, updates = random(torch.bfloat16, device), random(torch.bfloat16, device)
    averages = [torch.zeros(parameter.shape, device=device) for parameter in parameters]
    apply_update(parameters, updates, 0.1, 0.1, averages, 0.0)
    assert all(torch.equal(a, p.float()) for a, p in zip(averages, parameters, strict=True))


def test_parameters_that_want_gradients(device) -> None:
    parameters = [tensor.requires_grad_() for tensor in random(torch.float32, device)]
    versions = [parameter._version for parameter in parameters]
    apply_update(parameters, random(torch.bfloat16, device), 0.1)
    assert all(p._version > version for p, version in zip(parameters, versions, strict=True) if p.numel())
    assert all(p.requires_grad and p.is_leaf for p in parameters)


# --- all ---


def test_nothing(device) -> None:
    assert momentum_update([], [], 0.9) == []
    apply_update([], [], 0.1)
    empty = [torch.empty(0, 2, 2, device=device), torch.empty(3, 0, device=device)]
    assert [update.shape for update in momentum_update(empty, empty, 0.9)] == [(0, 2, 2), (3, 0)]
    apply_update(empty, empty, 0.1, averages=empty)


def within(tensor: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The same values in the middle of a larger tensor of sevens, which comes second."""
    whole = torch.full((tensor.numel() + 2 * offset,), 7.0, dtype=tensor.dtype, device=tensor.device)
    inner = whole[offset : offset + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, whole


@pytest.mark.parametrize("offset", [1, 16])
def test_neighbours_stay_as_they_are(device, offset: int) -> None:
    """At any address, of 16 bytes or not."""
    shapes = [shape for shape in SHAPES if 0 not in shape]
    gradients, buffers, parameters, averages = (random(torch.float32, device, shapes) for _ in range(4))
    pairs = [[within(tensor, offset) for tensor in list_] for list_ in (gradients, buffers, parameters, averages)]
    inner, wholes = ([[pair[k] for pair in list_] for list_ in pairs] for k in (0, 1))
    updates = momentum_update(inner[0], inner[1], 0.9)
    apply_update(inner[2], updates, 0.1, 0.1, inner[3], 0.5)
    apply_update_reference(parameters, momentum_update_reference(gradients, buffers, 0.9), 0.1, 0.1, averages, 0.5)
    for got, plain in zip(inner, (gradients, buffers, parameters, averages), strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, plain, strict=True))
    for whole in (whole for list_ in wholes for whole in list_):
        assert (whole[:offset] == 7).all() and (whole[-offset:] == 7).all()
    squares = sum(tensor.square().sum() for tensor in inner[0])
    assert squared_norm(inner[0]).item() == pytest.approx(squares.item(), rel=1e-5)


def test_tensors_that_are_not_contiguous(device) -> None:
    def strided() -> list[Tensor]:
        return [tensor.transpose(1, 2) for tensor in random(torch.float32, device)]

    gradients, buffers, parameters, averages = strided(), strided(), strided(), strided()
    before = copies(gradients), copies(buffers), copies(parameters), copies(averages)
    apply_update(parameters, momentum_update(gradients, buffers, 0.9), 0.1, 0.1, averages, 0.5)
    apply_update_reference(before[2], momentum_update_reference(*before[:2], 0.9), 0.1, 0.1, before[3], 0.5)
    for got, plain in zip((gradients, buffers, parameters, averages), before, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, plain, strict=True))


def test_more_tensors_than_a_launch_takes(device) -> None:
    shapes = [(1, 2, k % 5 + 1) for k in range(MAX_TENSORS + 3)]
    gradients, buffers = random(torch.float32, device, shapes), random(torch.float32, device, shapes)
    plain = copies(buffers)
    updates, expected = momentum_update(gradients, buffers, 0.9), momentum_update_reference(gradients, plain, 0.9)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip([*updates, *buffers], [*expected, *plain], strict=True))


@needs_kernels
def test_muon_with_kernels_and_without() -> None:
    shapes, results = [(2, 24, 40), (1, 40, 16), (16, 16)], []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        parameters = [torch.nn.Parameter(tensor) for tensor in random(torch.float32, DEVICE, shapes)]
        averages = {parameter: parameter.detach().clone() for parameter in parameters}
        optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        with using(backend):
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step(gradient_scale=torch.tensor(0.5, device=DEVICE), averages=averages, decay=0.5)
        buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        results.append([*(p.detach() for p in parameters), *averages.values(), *buffers])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_same_bits_every_time() -> None:
    shapes = [(22, 512, 512), (11, 2048, 512), (512,), (8,)]
    gradients, buffers = random(torch.float32, DEVICE, shapes), random(torch.bfloat16, DEVICE, shapes)
    results = []
    for _ in range(20):
        mine = copies(buffers)
        norm, factor = clip_factor(squared_norm(gradients), 0.3)
        results.append([norm, factor, *momentum_update(gradients, mine, 0.9, factor), *mine])
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


# --- errors ---


def bank(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.zeros(shape or (1, 2, 3), dtype=dtype, device=device)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: momentum_update(bank(), [], 0.9), ValueError, "buffers must have one tensor for each of the 1 grad"),
        (lambda: momentum_update([], bank(), 0.9), ValueError, "buffers must have .* the 0 gradients, got 1"),
        (lambda: momentum_update(bank(), bank(2), 0.9), ValueError, r"buffers\[0\] must have shape \[1, 2, 3\] as gra"),
        (lambda: momentum_update(bank(dtype=torch.int8), bank(), 0.9), TypeError, r"gradients\[0\] must be bfloat16"),
        (lambda: momentum_update(bank(), bank(device="meta"), 0.9), ValueError, r"buffers\[0\] must be on cpu .* meta"),
        (lambda: momentum_update(bank(), bank(), 0.9, torch.ones(2)), ValueError, "gradient_scale must be one float"),
        (
            lambda: momentum_update(bank(), bank(), 0.9, torch.ones((), device="meta")),
            ValueError,
            "gradient_scale must be on cpu as the tensors, got meta",
        ),
        (lambda: squared_norm([]), ValueError, "tensors must be one tensor at least"),
        (lambda: squared_norm(bank() + bank(dtype=torch.long)), TypeError, r"tensors\[1\] must be .* got torch.int64"),
        (lambda: squared_norm(bank() + bank(device="meta")), ValueError, r"tensors\[1\] must be on cpu .* got meta"),
        (lambda: clip_factor(torch.ones(2), 1.0), ValueError, r"squares must be a float32 scalar, got .* \[2\]"),
        (lambda: clip_factor(torch.ones(()), 0.0), ValueError, "limit must be above 0, got 0.0"),
        (lambda: apply_update(bank(), bank(2), 0.1), ValueError, r"updates\[0\] must have shape \[1, 2, 3\] as param"),
        (lambda: apply_update(bank(), bank(), 0.1, averages=[]), ValueError, "averages must have one tensor for each"),
        (lambda: apply_update(bank(2), bank(2), 0.1), ValueError, r"parameters\[0\] must be \[..., rows, columns\]"),
        (lambda: apply_update(bank(), bank(), 0.1, scale=[1.0, 2.0]), ValueError, "one for each of 1 param.*, got 2"),
        (lambda: apply_update(bank(), bank(dtype=torch.bool), 0.1), TypeError, r"updates\[0\] must be .* torch.bool"),
    ],
)
def test_errors(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- registration ---


@needs_kernels
def test_operators() -> None:
    shapes = [(2, 3, 5), (1, 4, 4)]
    scale = torch.tensor(0.5, device=DEVICE)

    def lists(count: int) -> list[list[Tensor]]:
        return [random(torch.float32, DEVICE, shapes) for _ in range(count)]

    ops = torch.ops.pgolf
    library.opcheck(ops.momentum_update.default, (*lists(3), 0.9, scale, 1.0))
    library.opcheck(ops.momentum_update.default, (*lists(2), [], 0.9, None, 0.5))
    library.opcheck(ops.apply_update.default, (*lists(3), 0.1, 0.1, 0.5, [1.0, 2.0]))
    library.opcheck(ops.apply_update.default, (*lists(2), [], 0.1, 0.1, 0.5, [1.0, 2.0]))
    library.opcheck(ops.squared_norm.default, lists(1))
    library.opcheck(ops.clip_factor.default, (scale, 0.3))


@pytest.mark.parametrize(
    "backend", [pytest.param("reference", marks=of_the_reference), pytest.param("triton", marks=needs_kernels)]
)
def test_compiles_whole(backend: str) -> None:
    def step(gradients, buffers, parameters, averages):
        norm, factor = clip_factor(squared_norm(gradients), 0.3)
        updates = momentum_update(gradients, buffers, 0.9, factor)
        apply_update(parameters, updates, 0.1, 0.1, averages, 0.5)
        apply_update(parameters, updates, 0.1, scale=0.5)
        return norm

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    lists = [random(torch.float32, DEVICE, [(2, 3, 5), (1, 4, 4)]) for _ in range(4)]
    plain = [copies(list_) for list_ in lists]
    with using(backend):
        assert torch.allclose(compiled(*lists), step(*plain))
    for a, b in zip(sum(lists, []), sum(plain, []), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
