"""The grids of dion's and gram-newton-schulz's tests, for newton_schulz and `pgolf.optim.Muon`."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from pgolf.kernels.common.backend import using
from pgolf.kernels.newton_schulz import (
    POLAR_EXPRESS,
    QUINTIC,
    newton_schulz,
    newton_schulz_reference,
)
from pgolf.optim import Muon
from tests.processes import run_processes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)

pytestmark = pytest.mark.usefixtures("poisoned")

# microsoft/dion at 0a059a4, tests/test_newton_shulz.py, 13 cases: 6 of X Xᵀ, 3 of β A + α A², 2 of the iteration, each
# with a matrix and a stack. The 2 others are of a helper of its kernels.
SIZES = {"square": (256, 256), "wide": (256, 1024)} if ON_GPU else {"square": (48, 48), "wide": (48, 192)}
GRAM_PRODUCTS = list(itertools.product(SIZES, DTYPES))
POLYNOMIALS = list(itertools.product(["square"], DTYPES))
ITERATIONS = list(SIZES)
TUPLES_OF_FIVE = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]

# tests/test_polar_express.py, 18 cases, and tests/test_gram_newton_schulz.py at 3597e63, 66 cases: without and with the
# Gram form, in PyTorch and by kernels.
SHAPES = [(64, 128), (128, 64), (128, 128)]
ALL_SHAPES = [*SHAPES, (4, 64, 128), (4, 128, 64)]
WAYS = list(itertools.product(("symmetric", "gram"), ("reference", "auto")))  # auto: kernels, if they can run
OWN = list(itertools.product(ALL_SHAPES, ("reference", "auto")))
TUPLES = {"newton_schulz": TUPLES_OF_FIVE, "polar_express": POLAR_EXPRESS}
GRAM = list(itertools.product(ALL_SHAPES, WAYS))
AGAINST = list(itertools.product(SHAPES, WAYS, TUPLES))
ORTHOGONALITY = 0.15  # of any element, theirs

# tests/test_megabatch_empty_shard.py, 6 cases: rows, ranks and parameters. One is of an argument of its own.
SHARDS = [(1, 2, 8), (3, 2, 8), (5, 4, 8), (2, 4, 8), (15, 4, 8)]

# tests/test_normuon_conv_flatten.py at 0aaf137, 120 cases. 33 have no meaning here: 8 of damaged checkpoints and 2 of
# a setting that changes, both held by a version in its state, and 23 of low-rank optimizers.
KERNELS = [(6, 3, 5), (8, 4, 3, 3), (6, 2, 3, 3, 3), (12, 2, 1, 1), (8, 1, 3, 3), (4, 1, 1, 1)]
FLATTENED = list(itertools.product(KERNELS, (1, 2, 3, 5), ("match_rms_adamw", "original", None)))
CHECKPOINTS = [((8, 4, 3, 3), True), ((4, 1, 1, 1), True), ((5, 7), True), ((8, 3, 3), False)]
LINEAR = [(5, 7), (7, 5)]

# gram-newton-schulz at f08f25e, tests/stress_test.py: 10 spectra five times and 5 of a Gamma distribution, at 768 of
# 3,072 rows.
DRAWS, STRESSED = 5, 768 if ON_GPU else 44
SPECTRA = {
    "line": lambda n: torch.linspace(0, 0.5, n),
    **{f"{decades} decades": lambda n, d=decades: torch.logspace(0, -d, n) for decades in (3, 5, 7, 9)},
    "two decades, then zeros": lambda n: torch.cat([torch.logspace(0, -2, n // 2), torch.zeros(n - n // 2)]),
    "ten large, then zeros": lambda n: torch.cat([torch.logspace(0, -1, 10), torch.zeros(n - 10)]),
    "two large, then zeros": lambda n: torch.cat([torch.logspace(0, -0.5, 2), torch.zeros(n - 2)]),
    "two large, then small ones": lambda n: torch.cat([torch.logspace(0, -0.5, 2), torch.logspace(-4, -7, n - 2)]),
    "ten decades, the last of them twice": lambda n: torch.cat(
        [torch.logspace(0, -10, n - n // 11), torch.logspace(-4, -10, n // 11)]
    ),
}
STRESS = [*itertools.product(SPECTRA, range(DRAWS)), *itertools.product(["gamma"], range(DRAWS))]


def test_the_grids_have_the_peers_counts() -> None:
    assert len(GRAM_PRODUCTS) + len(POLYNOMIALS) + len(ITERATIONS) == 13 - 2
    assert len(OWN) + len(ALL_SHAPES) + len(SHAPES) == 18
    assert len(GRAM) + 2 * len(ALL_SHAPES) + len(WAYS) * len(SHAPES) + len(AGAINST) == 66
    assert len(SHARDS) == 6 - 1
    assert len(FLATTENED) + 2 + len(KERNELS) + len(LINEAR) + 1 + len(CHECKPOINTS) == 120 - 33
    assert len(STRESS) == 55


def exact(G: Tensor, *arguments, **settings) -> Tensor:
    return newton_schulz_reference(G.double(), *arguments, algorithm="standard", dtype=torch.float64, **settings)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def matrix_and_stack(size: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*lead, *SIZES[size], device=DEVICE).to(dtype) for lead in ((), (4,))]


def assert_as_precise(G: Tensor, steps: int, coefficients, algorithm: str) -> None:
    """The error is at most that of plain bfloat16, and some rounding of the result."""
    expected = exact(G, steps, coefficients)
    plain = newton_schulz_reference(G, steps, coefficients, algorithm="standard")
    error = relative_error(newton_schulz(G, steps, coefficients, algorithm=algorithm), expected)
    assert error <= relative_error(plain, expected) + 2**-9


@pytest.mark.parametrize("size, dtype", GRAM_PRODUCTS)
def test_peers_gram_products(size: str, dtype: torch.dtype) -> None:
    """A step with (0, 1, 0) gives X Xᵀ X."""
    for G in matrix_and_stack(size, dtype):
        assert_as_precise(G, 1, (0.0, 1.0, 0.0), "symmetric")


@pytest.mark.parametrize("size, dtype", POLYNOMIALS)
def test_peers_polynomials(size: str, dtype: torch.dtype) -> None:
    """A step with (0, β, α) gives (β A + α A²) X, here of symmetric matrices as theirs are."""
    alpha, beta = torch.randn(2).tolist()
    for G in matrix_and_stack(size, dtype):
        assert_as_precise((G + G.mT) / 2, 1, (0.0, beta, alpha), "symmetric")


@pytest.mark.parametrize("size", ITERATIONS)
def test_peers_iteration(size: str) -> None:
    for G in matrix_and_stack(size, FP32):
        plain = newton_schulz_reference(G, 5, TUPLES_OF_FIVE, algorithm="standard")
        assert (newton_schulz(G, 5, TUPLES_OF_FIVE).float() - plain.float()).abs().max() < 0.02
        assert_as_precise(G, 5, TUPLES_OF_FIVE, "auto")


def orthogonality_error(X: Tensor) -> float:
    """Return the largest element of X Xᵀ - I, or of Xᵀ X - I of tall X."""
    X = X.float()
    product = X @ X.mT if X.size(-2) <= X.size(-1) else X.mT @ X
    return float((product - torch.eye(product.size(-1), device=X.device)).abs().max())


def drawn(shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(42)
    return torch.randn(shape).to(DEVICE)


def computed(shape: tuple[int, ...], algorithm: str, backend: str, coefficients=POLAR_EXPRESS) -> tuple[Tensor, Tensor]:
    """Return G and the result by an algorithm and a backend."""
    G = drawn(shape)
    with using(backend) if backend == "reference" else nullcontext():  # else kernels, if they can run
        return G, newton_schulz(G, 5, coefficients, algorithm=algorithm, norm_scale=1.02, eps=1e-6)


@pytest.mark.parametrize("shape, backend", OWN)
def test_peers_polar_express_is_orthogonal(shape, backend: str) -> None:
    G, X = computed(shape, "auto", backend)
    assert X.shape == G.shape and orthogonality_error(X) < ORTHOGONALITY


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_peers_polar_express_in_pytorch_and_by_kernels(shape) -> None:
    plain, kernels = (computed(shape, "auto", backend)[1].float() for backend in ("reference", "auto"))
    assert (plain - kernels).abs().max() < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_peers_polar_express_and_newton_schulz(shape) -> None:
    for tuples in TUPLES.values():
        _, X = computed(shape, "auto", "auto", tuples)
        assert orthogonality_error(X) < ORTHOGONALITY


@pytest.mark.parametrize("shape, way", GRAM)
def test_peers_gram_form_is_orthogonal(shape, way: tuple[str, str]) -> None:
    _, X = computed(shape, *way)
    assert orthogonality_error(X) < ORTHOGONALITY


@pytest.mark.parametrize("algorithm", ["symmetric", "gram"])
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_peers_gram_form_in_pytorch_and_by_kernels(shape, algorithm: str) -> None:
    plain, kernels = (computed(shape, algorithm, backend)[1].float() for backend in ("reference", "auto"))
    assert (plain - kernels).abs().max() < (0.01 if algorithm == "gram" else 0.03)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_peers_gram_form_keeps_the_shape(shape, way: tuple[str, str]) -> None:
    G, X = computed(shape, *way)
    assert X.shape == G.shape and X.is_contiguous()


@pytest.mark.parametrize("shape, way, tuples", AGAINST)
def test_peers_gram_form_and_the_formula(shape, way: tuple[str, str], tuples: str) -> None:
    G, X = computed(shape, *way, TUPLES[tuples])
    expected = exact(G, 5, TUPLES[tuples], norm_scale=1.02, eps=1e-6)
    assert (X.double() - expected).abs().max() < 0.15


def _stepped_shards(rank: int, size: int, rows: int, ranks: int, count: int) -> list[Tensor]:
    """Return a step's change of ``count`` parameters whose rows ``ranks`` share, whole, by each of them."""
    generator = torch.Generator().manual_seed(rows)
    whole = [torch.randn(rows, 16, generator=generator) for _ in range(2 * count)]
    if size == 1:
        made = whole
    else:
        mesh = DeviceMesh("cpu", list(range(ranks)))
        if rank >= ranks:
            return []
        made = []
        for tensor in whole:
            chunks = tensor.chunk(ranks)
            local = chunks[rank] if rank < len(chunks) else tensor[:0]
            made.append(DTensor.from_local(local, mesh, [Shard(0)], shape=tensor.shape, stride=(16, 1)))
    parameters = [nn.Parameter(tensor) for tensor in made[:count]]
    for parameter, gradient in zip(parameters, made[count:], strict=True):
        parameter.grad = gradient
    shapes = [p.to_local().shape if isinstance(p, DTensor) else p.shape for p in parameters]
    Muon(parameters, lr=0.1, ns_coefficients=POLAR_EXPRESS).step()
    assert shapes == [p.to_local().shape if isinstance(p, DTensor) else p.shape for p in parameters]
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in parameters]


def _all_shards(rank: int, size: int) -> list[list[Tensor]]:
    return [_stepped_shards(rank, size, *case) for case in SHARDS]


def test_peers_empty_shards(tmp_path: Path) -> None:
    """All cases in one start of four processes, of which some hold no row: the result is one process's."""
    expected = _all_shards(0, 1)
    for rank, result in enumerate(run_processes(_all_shards, 4, tmp_path)):
        for (_, ranks, count), got, want in zip(SHARDS, result, expected, strict=True):
            assert len(got) == (count if rank < ranks else 0)
            assert all((a - b).abs().max() < 1e-2 for a, b in zip(got, want, strict=False))


def normuon(parameters, **settings) -> Muon:
    chosen = dict(lr=7e-4, weight_decay=1e-2, nesterov=True, flatten=True, adjust_lr_fn="match_rms_adamw")
    return Muon(parameters, **(chosen | dict(normuon_beta2=0.95, ns_coefficients=QUINTIC) | settings))


def in_float64(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def stepped_alike(kernels: list[nn.Parameter], gradients, **settings) -> None:
    """Three steps of kernels, and of the matrices that they are flattened to, agree with their state."""
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in kernels]
    ours, plain = normuon(kernels, **settings), normuon(matrices, **settings)
    for step in range(3):
        for i, (p, q) in enumerate(zip(kernels, matrices, strict=True)):
            p.grad = gradients(step, i, p)
            q.grad = p.grad.flatten(1).clone()
        ours.step()
        plain.step()
        for p, q in zip(kernels, matrices, strict=True):
            assert p.isfinite().all()
            torch.testing.assert_close(p.flatten(1), q, rtol=1e-10, atol=1e-12)
            for name, value in plain.state[q].items():
                torch.testing.assert_close(ours.state[p][name].flatten(1), value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape, count, adjust", FLATTENED)
def test_peers_convolutions_step_as_their_matrices(shape, count: int, adjust: str | None) -> None:
    kernels = [in_float64(*shape) for _ in range(count)]
    stepped_alike(kernels, lambda step, i, p: torch.randn_like(p) * (i + step + 1), adjust_lr_fn=adjust)


@pytest.mark.parametrize("nesterov", [False, True])
def test_peers_zero_rank_one_and_strided_gradients(nesterov: bool) -> None:
    kernels = [in_float64(8, 3, 3, 3) for _ in range(3)]
    strided = torch.randn(8, 3, 3, 3, 2, dtype=torch.float64)[..., 0]
    given = [torch.zeros_like(kernels[0]), torch.ones_like(kernels[0]), strided]
    assert not strided.is_contiguous()
    stepped_alike(kernels, lambda step, i, p: given[i], nesterov=nesterov)


@pytest.mark.parametrize("shape", KERNELS)
def test_peers_without_flatten(shape) -> None:
    """Three dimensions are a stack of matrices. More are refused, where dion takes them as stacks of stacks."""
    if len(shape) > 3:
        with pytest.raises(ValueError, match="flatten=True makes a matrix"):
            normuon([in_float64(*shape)], flatten=False)
        return
    stack = in_float64(*shape)
    matrices = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    ours, plain = normuon([stack], flatten=False), normuon(matrices, flatten=False)
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for matrix, gradient in zip(matrices, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        plain.step()
        torch.testing.assert_close(stack.detach(), torch.stack([*matrices]).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", LINEAR)
def test_peers_flatten_leaves_matrices(shape) -> None:
    first = in_float64(*shape)
    second = nn.Parameter(first.detach().clone())
    flat, plain = normuon([first], flatten=True), normuon([second], flatten=False)
    for _ in range(3):
        first.grad = torch.randn_like(first)
        second.grad = first.grad.clone()
        flat.step()
        plain.step()
        assert torch.equal(first, second)
        for name, value in plain.state[second].items():
            assert torch.equal(flat.state[first][name], value)


def test_peers_groups_flatten_as_each_says() -> None:
    kernel, late = in_float64(8, 4, 3, 3), in_float64(8, 4, 3, 3)
    stack, scalar = in_float64(8, 3, 3), in_float64(8, 4, 3, 3)
    optimizer = normuon(
        [dict(params=[kernel], flatten=True), dict(params=[stack]), dict(params=[scalar], use_muon=False)],
        flatten=False,
    )
    optimizer.add_param_group(dict(params=[late], flatten=True))
    before = late.detach().clone()
    for parameter in (kernel, stack, scalar):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    means = "second_momentum_buffer"
    assert optimizer.state[kernel][means].shape == (8, 1) and optimizer.state[stack][means].shape == (8, 3, 1)
    assert means not in optimizer.state[scalar] and torch.equal(late, before) and late not in optimizer.state


@pytest.mark.parametrize("shape, flatten", CHECKPOINTS)
def test_peers_checkpoints(shape, flatten: bool) -> None:
    """Their fourth case has four dimensions without flatten, which are refused here: it has three."""
    first = in_float64(*shape)
    optimizer = normuon([first], flatten=flatten)
    first.grad = torch.randn_like(first)
    optimizer.step()
    second = nn.Parameter(first.detach().clone())
    loaded = normuon([second], flatten=flatten)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        first.grad = torch.randn_like(first)
        second.grad = first.grad.clone()
        optimizer.step()
        loaded.step()
        assert torch.equal(first, second)
        states = [each.state_dict() for each in (optimizer, loaded)]
        groups = [state["param_groups"][0] for state in states]
        assert all(groups[1][name] == value for name, value in groups[0].items())
        for name, value in states[0]["state"][0].items():
            assert torch.equal(value, states[1]["state"][0][name])


@pytest.mark.parametrize("spectrum, draw", STRESS)
def test_peers_stress(spectrum: str, draw: int) -> None:
    """No singular value blows up, and the Gram form's error is at most that of the plain loop in bfloat16."""
    torch.manual_seed(draw)
    n = STRESSED
    values = torch.distributions.Gamma(3.0, 0.5).sample((n,)) if spectrum == "gamma" else SPECTRA[spectrum](n)
    U, V = (torch.linalg.qr(torch.randn(rows, n, dtype=torch.float64))[0] for rows in (4 * n, n))
    G = ((U * values.double()) @ V.mT).float().to(DEVICE)
    expected = exact(G)
    plain = relative_error(newton_schulz_reference(G, algorithm="standard"), expected)
    for algorithm in ("gram", "auto"):
        X = newton_schulz(G, algorithm=algorithm).double()
        assert X.isfinite().all() and torch.linalg.matrix_norm(X, 2) < 1.16
        assert relative_error(X, expected) <= 1.1 * plain
