"""The fused step of a stack of adapters, against PyTorch's optimizers; kernels run on a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, library

from pgolf.kernels.adapter_update import adapter_update_, adapter_update_reference_
from pgolf.kernels.common.backend import INTERPRETED, using
from tests.conftest import covering, of_the_reference

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
# Less than a block, several, rows that vectors of 4 divide and that they do not, one element.
SHAPES = [(3, 4, 32), (2, 70, 24), (4, 7, 5), (1, 1, 1), (2, 33, 6)]
ADAMW = dict(optimizer="adamw", lr=0.03, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.2)
ADAMW_WITHOUT_FIRST = ADAMW | dict(beta1=0.0, beta2=0.999, eps=1e-10)
SGD = dict(optimizer="sgd", lr=0.03, beta1=0.9, weight_decay=0.2)
SGD_WITHOUT_FIRST = SGD | dict(beta1=0.0)
RULES = {"adamw": ADAMW, "adamw without m": ADAMW_WITHOUT_FIRST, "sgd": SGD, "sgd without m": SGD_WITHOUT_FIRST}

pytestmark = pytest.mark.usefixtures("poisoned")


class Stack:
    """A random stack of adapters with what its optimizer keeps."""

    def __init__(self, shape, device, rule: dict, dtype=torch.float32, scaled: bool = False) -> None:
        self.rule = rule
        self.master = torch.randn(shape, device=device)
        self.row_scale = torch.rand(shape[1], device=device) + 0.5 if scaled else None
        self.copy = torch.full(shape, 7.0, device=device, dtype=dtype)
        self.learning = torch.ones(shape[0], device=device, dtype=torch.bool)
        self.first_moment = torch.zeros(shape, device=device) if rule["beta1"] else None
        self.second_moment = torch.zeros(shape, device=device) if rule["optimizer"] == "adamw" else None

    def clone(self) -> Stack:
        other = object.__new__(Stack)
        vars(other).update({k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        return other

    def update(self, gradient: Tensor, step: int, function: Callable = adapter_update_) -> None:
        count = torch.tensor(float(step), device=self.master.device)
        moments = dict(first_moment=self.first_moment, second_moment=self.second_moment)
        function(
            self.master, gradient, self.copy, self.learning, count, row_scale=self.row_scale, **moments, **self.rule
        )

    @property
    def tensors(self) -> list[Tensor]:
        tensors = (self.master, self.copy, self.first_moment, self.second_moment)
        return [tensor for tensor in tensors if tensor is not None]


def gradients(shape, device, dtype=torch.float32, count: int = 4) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


def optimizer_of(parameter: Tensor, rule: dict) -> torch.optim.Optimizer:
    rule = dict(rule)
    name, beta1 = rule.pop("optimizer"), rule.pop("beta1")
    if name == "sgd":
        return torch.optim.SGD([parameter], momentum=beta1, **rule)
    return torch.optim.AdamW([parameter], betas=(beta1, rule.pop("beta2")), **rule)


@pytest.mark.parametrize("rule, shape, scaled", covering(RULES, SHAPES, [False, True]))
def test_it_is_torchs_optimizer(device, rule: str, shape, scaled: bool) -> None:
    stack = Stack(shape, device, RULES[rule], scaled=scaled)
    scale = stack.row_scale[:, None].double() if scaled else 1.0
    parameter = torch.nn.Parameter(stack.master.double())
    optimizer = optimizer_of(parameter, RULES[rule])
    for step, gradient in enumerate(gradients(shape, device, count=5), 1):
        stack.update(gradient, step)
        parameter.grad = scale * gradient.double()
        optimizer.step()
        assert torch.allclose(stack.master.double(), parameter, rtol=2e-6, atol=2e-6)
        assert torch.allclose(stack.copy.double(), scale * parameter, rtol=3e-6, atol=3e-6)
    state = optimizer.state[parameter]
    for moment, name in (
        (stack.first_moment, "momentum_buffer" if stack.second_moment is None else "exp_avg"),
        (stack.second_moment, "exp_avg_sq"),
    ):
        if moment is not None:
            assert torch.allclose(moment.double(), state[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [1, 2, 17, 250, 10_000])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.999, 0.99999])
def test_bias_corrections_at_any_update(device, step: int, beta2: float) -> None:
    """No cancellation in 1 - βᵗ, near 0 nor near 1."""
    rule = ADAMW | dict(beta1=0.99, beta2=beta2, weight_decay=0.0, lr=1.0)
    stack, gradient = Stack((1, 2, 8), device, rule), torch.rand(1, 2, 8, device=device) + 0.1
    before = stack.master.double()
    stack.first_moment.copy_((1 - 0.99 ** (step - 1)) * gradient.double())
    stack.second_moment.copy_((1 - beta2 ** (step - 1)) * gradient.double() ** 2)
    stack.update(gradient, step)
    assert torch.allclose(before - stack.master, torch.ones_like(before), atol=2e-6)


@pytest.mark.parametrize("of_gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_rounded_masters(device, dtype: torch.dtype, of_gradient: torch.dtype) -> None:
    stack = Stack((2, 9, 8), device, ADAMW, dtype, scaled=True)
    plain = stack.clone()
    for step, gradient in enumerate(gradients((2, 9, 8), device, of_gradient), 1):
        stack.update(gradient, step)
        plain.update(gradient, step, adapter_update_reference_)
        assert torch.equal(stack.copy, (stack.row_scale[:, None] * stack.master).to(dtype))
        assert torch.allclose(stack.master, plain.master, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_groups_that_rest_are_left_alone(device, rule: str) -> None:
    """Whatever is in them: a NaN stays one, and nothing else changes."""
    shape = (5, 6, 8)
    stack = Stack(shape, device, RULES[rule], torch.bfloat16, scaled=True)
    stack.learning[torch.tensor([0, 3])] = False
    for tensor in stack.tensors:
        tensor[3] = float("nan")
    before = stack.clone()
    alone = Stack((3, *shape[1:]), device, RULES[rule], torch.bfloat16)
    alone.row_scale, alone.master = stack.row_scale, stack.master[stack.learning]
    for step, gradient in enumerate(gradients(shape, device), 1):
        gradient[0] = float("inf")
        stack.update(gradient, step)
        alone.update(gradient[stack.learning], step)
    for tensor, old, other in zip(stack.tensors, before.tensors, alone.tensors, strict=True):
        assert torch.equal(tensor[stack.learning], other)
        assert torch.equal(tensor[0], old[0]) and tensor[3].isnan().all()
        assert not torch.equal(tensor[1], old[1])


@pytest.mark.parametrize("columns", [8, 5])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_slices_of_larger_stacks(device, rule: str, columns: int) -> None:
    """Of stacks whose groups lie apart; the gradient may lie anyhow."""
    shape = (6, 4, columns)
    wide = Stack((6, 9, columns), device, RULES[rule], scaled=True)
    wholes = wide.clone()
    part = wide.clone()
    part.row_scale, part.learning = wide.row_scale[:4], wide.learning[2:5]
    for name in ("master", "copy", "first_moment", "second_moment"):
        if getattr(part, name) is not None:
            setattr(part, name, getattr(wholes, name)[2:5, 3:7])
    plain = part.clone()
    for step, gradient in enumerate(gradients((columns, *shape[:2]), device), 1):
        gradient = gradient.permute(1, 2, 0)[2:5]
        part.update(gradient, step)
        plain.update(gradient, step, adapter_update_reference_)
    for got, expected in zip(part.tensors, plain.tensors, strict=True):
        assert torch.allclose(got, expected, rtol=3e-6, atol=3e-6)
    for whole, old in zip(wholes.tensors, wide.tensors, strict=True):
        outside = torch.ones(whole.shape, device=device, dtype=torch.bool)
        outside[2:5, 3:7] = False
        assert torch.equal(whole[outside], old[outside]) and not torch.equal(whole, old)


def test_sgds_buffer_is_not_read_at_the_first_update(device) -> None:
    stack = Stack((2, 3, 4), device, SGD)
    stack.first_moment.fill_(float("nan"))
    (gradient,) = gradients((2, 3, 4), device, count=1)
    expected = gradient + 0.2 * stack.master
    stack.update(gradient, 1)
    assert torch.allclose(stack.first_moment, expected, atol=1e-6) and stack.master.isfinite().all()


def test_a_first_moment_for_a_beta_of_0(device) -> None:
    """Is the gradient."""
    stack = Stack((2, 3, 4), device, ADAMW_WITHOUT_FIRST)
    other = stack.clone()
    other.first_moment = torch.zeros_like(stack.master)
    for step, gradient in enumerate(gradients((2, 3, 4), device), 1):
        stack.update(gradient, step)
        other.update(gradient, step)
        assert torch.equal(other.first_moment, gradient) and torch.allclose(stack.master, other.master, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing(device, shape) -> None:
    stack = Stack(shape, device, ADAMW)
    stack.update(torch.zeros(shape, device=device), 1)


def test_parameters_that_want_gradients(device) -> None:
    stack = Stack((2, 3, 4), device, ADAMW)
    stack.master.requires_grad_()
    stack.copy.requires_grad_()
    versions = [tensor._version for tensor in stack.tensors]
    stack.update(torch.ones(2, 3, 4, device=device), 1)
    assert all(tensor._version > version for tensor, version in zip(stack.tensors, versions, strict=True))
    assert stack.master.is_leaf and stack.copy.is_leaf


def test_the_same_bits_every_time(device) -> None:
    stack, changes = Stack((3, 40, 32), device, ADAMW, torch.bfloat16), gradients((3, 40, 32), device)
    results = []
    for _ in range(3):
        mine = stack.clone()
        for step, gradient in enumerate(changes, 1):
            mine.update(gradient, step)
        results.append(mine.tensors)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@needs_kernels
def test_offsets_beyond_32_bits() -> None:
    """The second group begins behind element 2³¹."""
    stride = 2**31 + 64

    def far(dtype: torch.dtype) -> Tensor:
        if DEVICE == "cpu":  # pages never touched take no memory
            of_numpy = np.float32 if dtype == torch.float32 else np.float16
            memory = torch.from_numpy(np.zeros(stride + 64, of_numpy))
        else:
            memory = torch.zeros(stride + 64, device=DEVICE, dtype=dtype)
        return memory.as_strided((2, 4, 8), (stride, 8, 1))

    stack = Stack((2, 4, 8), DEVICE, SGD_WITHOUT_FIRST, torch.float16)
    plain, (gradient,) = stack.clone(), gradients((2, 4, 8), DEVICE, count=1)
    stack.master, stack.copy = far(torch.float32).copy_(stack.master), far(torch.float16)
    stack.update(gradient, 1)
    plain.update(gradient, 1, adapter_update_reference_)
    assert torch.allclose(stack.master, plain.master, atol=1e-6) and torch.allclose(stack.copy, plain.copy, atol=1e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_replays_with_the_number_on_the_device() -> None:
    stack, count = Stack((3, 40, 32), DEVICE, ADAMW, torch.bfloat16), torch.ones((), device=DEVICE)
    plain, (gradient,) = stack.clone(), gradients((3, 40, 32), DEVICE, count=1)
    stack.clone().update(gradient, 1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moments = dict(first_moment=stack.first_moment, second_moment=stack.second_moment)
        adapter_update_(stack.master, gradient, stack.copy, stack.learning, count, **moments, **ADAMW)
        count += 1
    for step in (1, 2, 3):
        plain.learning[1] = stack.learning[1] = step != 2
        graph.replay()
        plain.update(gradient, step, adapter_update_reference_)
    assert torch.allclose(stack.master, plain.master, rtol=1e-5, atol=1e-5)


# --- errors ---


def call(change: dict) -> None:
    shape = (2, 3, 4)
    given = dict(master=torch.zeros(shape), gradient=torch.zeros(shape), copy=torch.zeros(shape))
    given |= dict(learning=torch.ones(2, dtype=torch.bool), step=torch.ones(()), lr=0.1)
    adapter_update_(**given | dict(second_moment=torch.zeros(shape)) | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(master=torch.zeros(3, 4)), ValueError, r"master must be \[G, R, C\], got shape \(3, 4\)"),
        (dict(master=torch.zeros(2, 3, 4).double()), TypeError, "master must be float32, got torch.float64"),
        (dict(master=torch.zeros(2, 4, 3).mT), ValueError, "master must be contiguous in each group"),
        (dict(gradient=torch.zeros(2, 3, 5)), ValueError, r"gradient must have master's shape \(2, 3, 4\), got"),
        (dict(gradient=torch.zeros(2, 3, 4).int()), TypeError, "gradient must be bfloat16, float16 or float32, got"),
        (dict(copy=torch.zeros(2, 3, 4).double()), TypeError, "copy must be bfloat16, float16 or float32"),
        (dict(copy=torch.zeros(2, 3, 4, device="meta")), ValueError, "copy must be on master's device cpu, got meta"),
        (dict(learning=torch.ones(2)), TypeError, "learning must be bool, got torch.float32"),
        (dict(learning=torch.ones(3, dtype=torch.bool)), ValueError, r"learning must have shape \(2,\), got \(3,\)"),
        (dict(step=torch.ones(1)), ValueError, r"step must have shape \(\), got \(1,\)"),
        (dict(step=torch.ones((), dtype=torch.long)), TypeError, "step must be float32, got torch.int64"),
        (dict(step=torch.ones((), device="meta")), ValueError, "step must be on master's device cpu, got meta"),
        (dict(row_scale=torch.ones(4)), ValueError, r"row_scale must have shape \(3,\), got \(4,\)"),
        (dict(row_scale=torch.ones(3).half()), TypeError, "row_scale must be float32, got torch.float16"),
        (dict(second_moment=None), ValueError, "second_moment must be given for 'adamw'"),
        (dict(optimizer="sgd"), ValueError, "second_moment must be None for 'sgd'"),
        (dict(beta1=0.5), ValueError, "first_moment must be given for beta1 0.5"),
        (dict(first_moment=torch.zeros(2, 3, 4).half()), TypeError, "first_moment must be float32"),
        (dict(beta2=1.0), ValueError, "beta2 must be at least 0 and below 1, got 1.0"),
        (dict(optimizer="adam"), ValueError, "optimizer must be 'adamw' or 'sgd', got 'adam'"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(change)


# --- registration ---


@needs_kernels
@pytest.mark.parametrize("rule, scaled", covering(RULES, [False, True], strength=1))
def test_operators(rule: str, scaled: bool) -> None:
    stack = Stack((2, 3, 4), DEVICE, RULES[rule], torch.bfloat16, scaled)
    (gradient,) = gradients((2, 3, 4), DEVICE, count=1)
    moments = [[] if m is None else [m] for m in (stack.first_moment, stack.second_moment)]
    number = torch.tensor(2.0, device=DEVICE)
    rates = (stack.rule["optimizer"] == "adamw", 0.1, stack.rule["beta1"], 0.9, 1e-8, 0.1)
    arguments = (stack.master, gradient, stack.copy, stack.learning, number, *moments, stack.row_scale, *rates)
    library.opcheck(torch.ops.pgolf.adapter_update.default, arguments)


@pytest.mark.parametrize(
    "backend", [pytest.param("reference", marks=of_the_reference), pytest.param("triton", marks=needs_kernels)]
)
@pytest.mark.parametrize("rule", RULES)
def test_compiles_whole(rule: str, backend: str) -> None:
    plain = Stack((2, 3, 4), DEVICE, RULES[rule], torch.bfloat16, scaled=True)
    stack, count = plain.clone(), torch.tensor(1.0, device=DEVICE)

    def step(gradient, count, master, copy, first_moment, second_moment):
        moments = dict(first_moment=first_moment, second_moment=second_moment)
        adapter_update_(master, gradient, copy, stack.learning, count, row_scale=stack.row_scale, **moments, **rates)

    rates = RULES[rule]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with using(backend):
        for number, gradient in enumerate(gradients((2, 3, 4), DEVICE, count=2), 1):
            compiled(gradient, count, stack.master, stack.copy, stack.first_moment, stack.second_moment)
            count += 1
            plain.update(gradient, number)
    for a, b in zip(stack.tensors, plain.tensors, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
