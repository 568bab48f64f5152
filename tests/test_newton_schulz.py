"""Newton-Schulz and its coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import library

from pgolf.kernels import newton_schulz as family
from pgolf.kernels.common import backend, launch
from pgolf.kernels.newton_schulz import (
    ALGORITHMS,
    POLAR_EXPRESS,
    QUINTIC,
    newton_schulz,
    newton_schulz_banks,
    newton_schulz_reference,
    polar_express_coefficients,
    tasks,
)
from tests.conftest import INTERPRETED, covering

pytestmark = pytest.mark.usefixtures("poisoned")
lists_tasks = pytest.mark.skipif(backend.triton is None, reason="lists the kernel's tasks")

# The tuples of parameter-golf PR #1344 / #1874 (specification 3.1).
PUBLIC = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def scalar_map(coefficients, sigma: np.ndarray) -> np.ndarray:
    for a, b, c in coefficients:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def test_generator_gives_the_public_tuples() -> None:
    assert np.abs(np.array(POLAR_EXPRESS) - np.array(PUBLIC)).max() < 1e-12


@pytest.mark.parametrize(("steps", "width"), [(3, 0.9), (5, 0.15), (6, 0.05), (8, 0.021), (12, 0.021)])
def test_any_number_of_steps_drives_singular_values_to_one(steps: int, width: float) -> None:
    mapped = scalar_map(polar_express_coefficients(steps), np.geomspace(3e-3, 1, 10_000))
    assert np.abs(mapped - 1).max() < width


def test_fixed_and_polar_bands() -> None:
    sigma = np.geomspace(1e-3, 1, 100_000)
    low, high = (f(scalar_map(POLAR_EXPRESS, sigma)) for f in (np.min, np.max))
    assert (low, high) == (pytest.approx(0.859, abs=1e-3), pytest.approx(1.141, abs=1e-3))
    fixed = scalar_map((QUINTIC,) * 5, sigma)
    assert (fixed.min(), fixed.max()) == (pytest.approx(0.47, abs=1e-2), pytest.approx(1.20, abs=1e-2))


@pytest.mark.parametrize("layout", ["wide", "tall"])
def test_golden(device, golden, layout: str) -> None:
    G = torch.from_numpy(golden("optim")["ns/in"]).to(device)
    G = G if layout == "wide" else G.mT
    public = torch.from_numpy(golden("optim")[f"ns/out_bf16_{layout}"]).to(device)
    assert relative_error(newton_schulz_reference(G), public.double()) < 2e-2
    assert relative_error(newton_schulz(G), exact(G)) <= relative_error(public, exact(G))


SPECTRA = {
    "gaussian": None,
    "four decades": lambda m: torch.logspace(0, -4, m, dtype=torch.float64),
    "two decades": lambda m: torch.logspace(0, -2, m, dtype=torch.float64),
    "rank an eighth": lambda m: (torch.arange(m) < -(-m // 8)).double(),
    "rank one": lambda m: (torch.arange(m) < 1).double(),
    "heavy tails": None,
}
GENERAL = [name for name in SPECTRA if not name.startswith("rank")]


def matrices(spectrum: str, *shape: int) -> torch.Tensor:
    """Float64 matrices with these singular values, or of normal or heavy-tailed elements."""
    if spectrum == "gaussian":
        return torch.randn(shape, dtype=torch.float64)
    if spectrum == "heavy tails":
        return torch.distributions.StudentT(1.2).sample(shape).double()
    U, _, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return U * SPECTRA[spectrum](U.size(-1)) @ V


def exact(G: torch.Tensor, *arguments, **settings) -> torch.Tensor:
    settings |= dict(algorithm="standard", dtype=torch.float64)
    return newton_schulz_reference(G.double(), *arguments, **settings)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(2, 64, 64), (70, 150), (200, 40)], ids=str)
def test_error_is_at_most_that_of_plain_bf16(device, algorithm, spectrum, shape) -> None:
    if INTERPRETED and spectrum not in ("gaussian", "rank one") and (len(shape) == 2 or algorithm != "auto"):
        pytest.skip("auto with (2, 64, 64) shows it")
    G = matrices(spectrum, *shape).to(device, torch.bfloat16)
    expected = exact(G)
    plain = relative_error(newton_schulz_reference(G, algorithm="standard"), expected)
    error = relative_error(newton_schulz(G, algorithm=algorithm), expected)
    assert error <= plain * (1.001 if spectrum in GENERAL else 1.1)


def of_training(m: int, n: int, spread: float, generator: torch.Generator) -> torch.Tensor:
    """[m, n] with singular values as momentum has them after some steps; left vectors lie in few rows if spread > 0."""

    def orthogonal(rows: int, power: float) -> torch.Tensor:
        sizes = torch.arange(1, rows + 1, dtype=torch.float64) ** -power
        sizes = sizes[torch.randperm(rows, generator=generator)]
        return torch.linalg.qr(sizes[:, None] * torch.randn(rows, m, dtype=torch.float64, generator=generator))[0]

    large = torch.tensor([0.8, 0.27, 0.22, 0.19, 0.1], dtype=torch.float64)
    values = torch.cat([large, torch.logspace(-1.1, -3.2, m - 5, dtype=torch.float64)])
    return (orthogonal(m, spread) * values) @ orthogonal(n, 0.0).mT


@pytest.mark.parametrize(
    "shape, spread, row_normalize",
    covering([(64, 64), (64, 128), (32, 160), (512, 2048)], [0.0, 1.0, 2.0], [False, True], strength=1),
    ids=str,
)
def test_a_few_large_singular_values(device, shape, spread: float, row_normalize: bool) -> None:
    """As training makes them: Gram forms that restart later have let singular values of updates grow to 3,000."""
    if device.type != "cuda" and shape[0] > 64:
        pytest.skip("takes minutes on a CPU")
    share = 0.5 if shape == (64, 64) else 0.3  # measured 0.46 and 0.15
    generator = torch.Generator().manual_seed(0)
    G = torch.stack(
        [of_training(*shape, spread, generator) for _ in range(2 if INTERPRETED else 4)]
    ).mT  # normalised rows are columns of X
    G = G.to(device, torch.bfloat16)
    expected = exact(G, row_normalize=row_normalize)
    plain = newton_schulz_reference(G, algorithm="standard", row_normalize=row_normalize)
    runs = [(newton_schulz_reference, "gram"), (newton_schulz, "gram")]
    if INTERPRETED or device.type == "cuda":  # elsewhere `auto` is plain
        runs.append((newton_schulz, "auto"))
    for run, algorithm in runs:
        update = run(G, algorithm=algorithm, row_normalize=row_normalize)
        for one, plain_one, expected_one in zip(update, plain, expected, strict=True):
            assert relative_error(one, expected_one) <= share * relative_error(plain_one, expected_one)
            assert torch.linalg.matrix_norm(one.double(), 2) < 1.16


def test_one_singular_value_far_above_the_others(device) -> None:
    """As gradients have early in training."""
    rows = 512 if device.type == "cuda" else 128  # bfloat16 products take a CPU half a minute there
    values = torch.logspace(-1, -5, rows, dtype=torch.float64)
    values[0] = 1.0
    U, _, V = torch.linalg.svd(torch.randn(rows, 4 * rows, dtype=torch.float64), full_matrices=False)
    G = (U * values @ V).to(device, torch.bfloat16)
    expected = exact(G)
    plain = relative_error(newton_schulz_reference(G, algorithm="standard"), expected)
    assert relative_error(newton_schulz_reference(G, algorithm="gram"), expected) <= 0.3 * plain
    if not INTERPRETED:  # there it takes minutes
        assert relative_error(newton_schulz(G), expected) <= plain


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_gram_restarts_keep_the_error_below_that_of_plain_bf16(device, steps: int) -> None:
    G = matrices("two decades", 48, 100).to(device, torch.bfloat16)
    expected = exact(G, steps)
    plain = relative_error(newton_schulz_reference(G, steps, algorithm="standard"), expected)
    assert relative_error(newton_schulz(G, steps, algorithm="gram"), expected) <= plain


EMPTY = [(0, 4, 5), (0, 7), (7, 0), (3, 0, 5)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (24, 40), (3, 40, 24), (6, 16, 16), *EMPTY], ids=str)
def test_shapes_and_dtypes(device, shape: tuple[int, ...]) -> None:
    G = torch.randn(shape, device=device)
    expected = exact(G)
    assert expected.shape == G.shape and expected.dtype == torch.float64
    fp32 = newton_schulz(G, dtype=torch.float32)
    assert (fp32.double() - expected).norm() <= 1e-3 * expected.norm() + 1e-9
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for dtype, out_dtype in covering(dtypes, (torch.bfloat16, torch.float16), strength=1):
        out = newton_schulz(G.to(dtype), dtype=out_dtype)
        assert out.dtype == out_dtype and out.shape == G.shape and out.is_contiguous()
        plain = newton_schulz_reference(G.to(dtype), algorithm="standard")
        error, allowed = ((x.double() - expected).norm() for x in (out, plain))
        assert error <= 1.5 * allowed + 1e-2 * expected.norm()


def test_banks_go_together_or_one_by_one_to_the_same_bits(device) -> None:
    shapes = [(2, 40, 100), (2 if INTERPRETED else 3, 130, 64), (0, 8, 8), (1, 5), (2, 16, 16)]
    banks = [torch.randn(shape, device=device) for shape in shapes]
    banks[1] = banks[1].bfloat16()  # another dtype, another launch
    together = newton_schulz_banks(banks, row_normalize=True)
    for G, out in zip(banks, together, strict=True):
        assert torch.equal(out, newton_schulz(G, row_normalize=True))
        for matrix, one in zip(G.view(-1, *G.shape[-2:]), out.view(-1, *G.shape[-2:]), strict=True):
            assert torch.equal(newton_schulz(matrix, row_normalize=True), one)
    assert newton_schulz_banks([]) == []


@pytest.mark.parametrize("aligned", [True, False])
def test_a_list_of_matrices_and_a_stack_of_them_to_the_same_bits(device, monkeypatch, aligned: bool) -> None:
    """Their addresses are written down in several launches, the last of which has few.

    The stack begins where they do: norms of what is not aligned are summed in another order.
    """
    monkeypatch.setattr(family.triton, "PLACED", 2)
    start = 0 if aligned else 1
    stack = torch.randn(5 * 16 * 32 + start, device=device)[start:].view(5, 16, 32)
    memory = [torch.full((16 * 32 + 2,), 7.0, device=device) for _ in range(10)]
    places = [each[start : start + 16 * 32].view(16, 32) for each in memory]
    banks, outs = places[:5], places[5:]
    for bank, matrix in zip(banks, stack, strict=True):
        bank.copy_(matrix)
    newton_schulz_banks(banks, out=outs)
    assert torch.equal(torch.stack(outs).bfloat16(), newton_schulz(stack))
    assert torch.equal(torch.stack(banks), stack)
    assert all((each[:start] == 7).all() and (each[start + 16 * 32 :] == 7).all() for each in memory)


@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs CUDA")
def test_many_matrices_in_a_cuda_graph() -> None:
    """The graph holds the addresses of its capture, whatever other calls with such a list have since."""
    device = torch.device("cuda")
    banks = [torch.randn(shape, device=device) for shape in [(64, 96), (128, 64)] * 50]
    newton_schulz_banks(banks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = newton_schulz_banks(banks)
    for _ in range(10):
        kept = [torch.randn_like(bank) for bank in banks]
        newton_schulz_banks(kept)
        for bank, out in zip(banks, outs, strict=True):
            bank.normal_()
            out.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, outs, newton_schulz_banks(banks)))


def test_generators_are_lists_of_matrices(device) -> None:
    banks = [torch.randn(16, 24, device=device), torch.randn(2, 24, 8, device=device)]
    outs = [torch.empty_like(G) for G in banks]
    expected = newton_schulz_banks(banks)
    given = newton_schulz_banks((G for G in banks), out=(out for out in outs))
    for out, one, plain in zip(outs, given, expected, strict=True):
        assert one is out and torch.equal(out.bfloat16(), plain)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_matrices_are_returned_beside_others(device, algorithm: str) -> None:
    """As ranks get them that hold no row of a sharded weight."""
    empty = [torch.randn(shape, device=device, requires_grad=True) for shape in EMPTY]
    G = torch.randn(8, 12, device=device)
    *given, last = newton_schulz_banks([*empty, G], algorithm=algorithm, row_normalize=True)
    assert [(out.shape, out.dtype) for out in given] == [(shape, torch.bfloat16) for shape in EMPTY]
    assert torch.equal(last, newton_schulz(G, algorithm=algorithm, row_normalize=True))
    sum(out.sum() for out in given).backward()
    assert all(one.grad.shape == one.shape for one in empty)
    with torch.no_grad():
        assert newton_schulz(empty[1], out=(out := torch.empty_like(empty[1]))) is out


def test_one_tuple_serves_all_steps(device) -> None:
    """Flat as packages have it, alone in a sequence, or written out, in tuples or lists."""
    G = torch.randn(12, 20, device=device)
    expected = newton_schulz(G, 3, (QUINTIC,) * 3)
    for coefficients in (QUINTIC, list(QUINTIC), (QUINTIC,), [list(QUINTIC)], [list(QUINTIC)] * 3, np.array(QUINTIC)):
        assert torch.equal(newton_schulz(G, 3, coefficients), expected)
    lists = [list(abc) for abc in POLAR_EXPRESS]
    assert torch.equal(newton_schulz(G, 3, lists), newton_schulz(G, 3)), "generated for three steps"


def test_a_convolution_s_weight_is_flattened_by_the_caller(device) -> None:
    weight = torch.randn(8, 4, 3, 3, device=device)
    with pytest.raises(ValueError, match=r"flatten\(1\) makes a convolution's weight a matrix"):
        newton_schulz(weight)
    update = newton_schulz(weight.flatten(1)).view_as(weight)
    assert torch.equal(update, newton_schulz(weight.view(8, 36)).view(8, 4, 3, 3))


@pytest.mark.parametrize(
    "case, algorithm", [("large", "standard"), ("large", "gram"), ("small", "symmetric"), ("small", "gram")]
)
def test_parameters_of_the_h100(device, monkeypatch, case: str, algorithm: str) -> None:
    if not INTERPRETED and device.type == "cpu":
        pytest.skip("needs the kernels")
    monkeypatch.setattr(launch, "chip", lambda device: "h100")
    launch.launch_parameters.cache_clear()
    parameters = launch.launch_parameters("newton_schulz", case, device)
    monkeypatch.setattr(tasks, "launch_parameters", lambda *case: parameters)
    tasks.plan.cache_clear()
    for shape in ((140, 200), (1, 200, 40)) if INTERPRETED else ((200, 300), (1, 300, 40)):
        G = torch.randn(shape, device=device)
        plain = relative_error(newton_schulz_reference(G, algorithm="standard"), exact(G))
        assert relative_error(newton_schulz(G, algorithm=algorithm), exact(G)) <= plain
    launch.launch_parameters.cache_clear()
    tasks.plan.cache_clear()


@pytest.mark.parametrize(("change", "shape"), [(dict(tile=128, columns=64), (128, 192)), (dict(depth=128), (64, 192))])
def test_nothing_is_written_beside_out(device, monkeypatch, change: dict[str, int], shape: tuple[int, int]) -> None:
    """With parameters whose padding none of the tables needs."""
    parameters = launch.launch_parameters("newton_schulz", "odd", device) | change
    monkeypatch.setattr(tasks, "launch_parameters", lambda *case: parameters)
    tasks.plan.cache_clear()
    G, memory = torch.randn(shape, device=device), torch.full((3, *shape), 7.0, device=device)
    newton_schulz(G, out=memory[1])
    assert (memory[0] == 7).all() and (memory[2] == 7).all()
    plain = relative_error(newton_schulz_reference(G, algorithm="standard"), exact(G))
    assert relative_error(memory[1], exact(G)) <= plain
    tasks.plan.cache_clear()


@pytest.mark.parametrize("shape", [(2, 24, 40), (40, 24)], ids=str)
def test_row_normalization_is_inside(device, shape) -> None:
    G = torch.randn(shape, device=device) * torch.logspace(-3, 3, shape[-2], device=device)[:, None]
    G[..., 5, :] = 0
    rows = G.double().norm(dim=-1, keepdim=True).clamp_min(1e-7)
    expected = exact(G / rows)
    assert relative_error(newton_schulz(G, row_normalize=True, dtype=torch.float32), expected) < 1e-3
    plain = relative_error(newton_schulz_reference((G / rows).bfloat16(), algorithm="standard"), expected)
    assert relative_error(newton_schulz(G, row_normalize=True), expected) <= 1.2 * plain


def test_scale_and_eps_of_the_norm(device) -> None:
    G = torch.randn(20, 50, device=device)
    for settings in (dict(norm_scale=1.02), dict(eps=3.0), dict(norm_scale=2.0, eps=0.5)):
        expected = exact(G, **settings)
        plain = relative_error(newton_schulz_reference(G, algorithm="standard", **settings), expected)
        assert relative_error(newton_schulz(G, **settings), expected) <= plain


@pytest.mark.parametrize("norm", [1e-40, 1e-30, 1e-20, 1e-10, 1e-7, 1e6, 1e25])
def test_any_norm(device, norm: float) -> None:
    G = torch.randn(24, 40)
    G = (G / G.norm()).mul(norm).to(device)
    expected = exact(G)
    assert relative_error(newton_schulz(G), expected) < 0.1
    settled = exact(G, eps=0.0)
    assert relative_error(newton_schulz(G, eps=0.0), settled) < 0.1


def test_result_is_semi_orthogonal(device) -> None:
    out = newton_schulz(torch.randn(4, 32, 96, device=device), dtype=torch.float32)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.85 and values.max() < 1.15


def test_zero_stays_zero_and_nan_stays_in_its_matrix(device) -> None:
    G = torch.randn(3, 8, 16, device=device)
    G[0] = 0
    G[1, 2, 3] = float("nan")
    out = newton_schulz(G)
    assert (out[0] == 0).all() and out[1].isnan().any() and not out[2].isnan().any()
    assert torch.equal(out[2], newton_schulz(G[2]))


def test_same_input_same_bits(device) -> None:
    banks = [torch.randn(3, 40, 24, device=device), torch.randn(2, 16, 80, device=device)]
    first = newton_schulz_banks(banks)
    for _ in range(100 if device.type == "cuda" else 2):
        for out, again in zip(first, newton_schulz_banks(banks), strict=True):
            assert torch.equal(out, again)


def test_non_contiguous_input_and_out(device) -> None:
    G = torch.randn(2, 24, 90, device=device)
    expected = newton_schulz(G[:, :, ::3].contiguous())
    assert torch.equal(newton_schulz(G[:, :, ::3]), expected)
    assert torch.equal(newton_schulz(G.mT), newton_schulz(G.mT.contiguous()))
    out = torch.full((2, 30, 24), float("nan"), device=device, dtype=torch.bfloat16).mT
    assert newton_schulz(G[:, :, ::3], out=out) is out
    assert torch.equal(out, expected)
    unaligned = torch.empty(1 + expected.numel(), device=device, dtype=torch.float32)[1:].view(expected.shape)
    newton_schulz(G[:, :, ::3], out=unaligned)
    assert torch.equal(unaligned.bfloat16(), expected)


@lists_tasks
@pytest.mark.parametrize("stagger", [0, 40, 300])
def test_tasks_come_after_what_they_need(monkeypatch, stagger: int) -> None:
    parameters = launch.launch_parameters("newton_schulz", "small", torch.device("cpu")) | dict(stagger=stagger)
    monkeypatch.setattr(tasks, "launch_parameters", lambda *case: parameters)
    shapes = ((3, 512, 512), (3, 256, 512), (2, 2048, 512), (2, 512, 2048), (1, 70, 130))
    work = tasks.plan.__wrapped__(shapes, "auto", POLAR_EXPRESS, torch.device("cpu"))
    records = work.tasks.numpy()
    matrix, needed, kind = (records[:, int(field)] for field in (tasks.MATRIX, tasks.NEEDED, tasks.KIND))
    finished, total = np.zeros(work.matrices, int), np.bincount(matrix)
    for position in range(len(records)):
        assert finished[matrix[position]] >= needed[position]
        finished[matrix[position]] += 1
    last = (kind & int(tasks.LAST)) > 0
    for number in range(11):
        mine = needed[matrix == number]
        assert (mine[last[matrix == number]] == mine.max()).all(), "the last level is that of the result"
        assert total[number] - (mine == mine.max()).sum() == mine.max(), "and waits for all others"


@lists_tasks
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_levels_read_what_is_there_and_keep_it(gram: bool, steps: int) -> None:
    written = {"X0"}
    for level in tasks.product_levels(polar_express_coefficients(steps), gram):
        reads = {name for product in level for name in (product.a, product.b)}
        writes = [product.c for product in level]
        assert reads <= written and not reads & set(writes) and len(writes) == len(set(writes))
        written |= set(writes)


@lists_tasks
def test_a_list_s_tasks_are_a_stack_s_but_for_the_places(monkeypatch) -> None:
    monkeypatch.setattr(launch, "chip", lambda device: "h100")
    launch.launch_parameters.cache_clear()
    records, places = [], []
    for shapes in (((24, 256, 256), (24, 256, 512)), ((1, 256, 256), (1, 256, 512)) * 24):
        work = tasks.plan.__wrapped__(shapes, "auto", POLAR_EXPRESS, torch.device("cpu"))
        table = work.tasks.numpy().copy()
        places.append((table[:, int(tasks.KIND)] >> int(tasks.BANK), table[:, int(tasks.IN_BANK)].copy()))
        table[:, int(tasks.KIND)] &= 2 ** int(tasks.BANK) - 1
        table[:, int(tasks.IN_BANK)] = 0
        records.append((table, work[1:]))
    launch.launch_parameters.cache_clear()
    assert (records[0][0] == records[1][0]).all() and records[0][1] == records[1][1]
    (stack, matrix), (bank, first) = places
    assert (bank == 2 * matrix + stack).all() and not first.any()


@lists_tasks
def test_workspace_may_pass_two_to_the_31_elements() -> None:
    parameters = dict(tile=128, columns=128, depth=64)
    stack = tasks.Stack(np.zeros((2, 2), int), (512, 2048), (512, 2048), 0, 0, 2**34)
    product = tasks.product_levels(POLAR_EXPRESS, False)[0][0]
    assert stack.product_tasks(product, parameters)[0, int(tasks.A)] == 2**30
    with pytest.raises(ValueError, match="fewer at once"):
        stack._replace(start=2**36).product_tasks(product, parameters)


def test_op_is_registered(device) -> None:
    banks = [torch.randn(2, 8, 12, device=device), torch.randn(6, 4, device=device)]
    flat = [value for values in POLAR_EXPRESS for value in values]
    settings = (flat, "auto", torch.bfloat16, 1.0, 1e-7, False)
    library.opcheck(torch.ops.pgolf.newton_schulz.default, (banks, *settings))
    out = [torch.empty(G.shape, device=device) for G in banks]
    library.opcheck(torch.ops.pgolf.newton_schulz_out.default, (banks, out, *settings))


@pytest.mark.skipif(INTERPRETED, reason="compilers run in the normal process")
def test_compiles_without_a_graph_break(device) -> None:
    G = torch.randn(2, 8, 12, device=device)
    out = torch.zeros(2, 8, 12, device=device, dtype=torch.bfloat16)

    def orthogonalize(G: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        newton_schulz(2 * G, out=out)
        return newton_schulz(G) + newton_schulz_banks([G, G.mT], steps=3, coefficients=(QUINTIC,))[0]

    expected = orthogonalize(G, torch.empty_like(out))
    compiled = torch.compile(orthogonalize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(G, out), expected)
    assert torch.equal(out, newton_schulz(2 * G))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(newton_schulz(G), newton_schulz(G))


def test_gradient(device) -> None:
    G = torch.randn(2, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    tall = torch.randn(3, 2, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *banks: tuple(newton_schulz_banks(banks, 2, dtype=torch.float64, algorithm="gram")), [G, tall]
    )
    first, second = newton_schulz_banks([torch.randn(2, 3, device=device), G.float()])
    assert second.grad_fn is not None
    saved = torch.randn(3, 4, device=device, requires_grad=True)
    square = saved.detach().clone()
    product = saved * square
    newton_schulz(torch.randn(3, 4, device=device), out=square)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    narrow = torch.randn(8, 12, device=device, requires_grad=True)
    newton_schulz(narrow).float().square().sum().backward()
    assert narrow.grad.isfinite().all() and narrow.grad.norm() > 0


def test_errors_name_the_argument() -> None:
    G = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"G must be \[m, n\] or \[N, m, n\], got shape \(4,\)$"):
        newton_schulz(G[0])
    with pytest.raises(TypeError, match="floating point"):
        newton_schulz(G.long())
    with pytest.raises(ValueError, match="algorithm"):
        newton_schulz(G, algorithm="fast")
    with pytest.raises(ValueError, match="2 tuples for 5 steps; pass steps=2, or a single tuple"):
        newton_schulz(G, coefficients=(QUINTIC, QUINTIC))
    with pytest.raises(ValueError, match=r"8 tuples for 5 steps; pass steps=8, or coefficients\[:5\]"):
        newton_schulz(G, coefficients=polar_express_coefficients(8))
    for wrong in ((), (1.0, 2.0), (QUINTIC[:2],) * 5):
        with pytest.raises(ValueError, match=r"coefficients must be \(a, b, c\)"):
            newton_schulz(G, coefficients=wrong)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        newton_schulz(G, 0, QUINTIC)
    with pytest.raises(ValueError, match="out must be"):
        newton_schulz(G, out=torch.empty(3, 4))
    with pytest.raises(ValueError, match="out takes no gradient"):
        newton_schulz(G.requires_grad_(), out=torch.empty(4, 4))
    with pytest.raises(ValueError, match="at least 1"):
        polar_express_coefficients(0)
