"""Trellis coded GPTQ: the trellis itself, the reference against brute force and theory, the kernel against it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pgolf.kernels.trellis import STATES, trellis, trellis_gptq, trellis_gptq_reference
from pgolf.kernels.trellis.reference import nearest_path
from pgolf.kernels.trellis.tables import predecessors
from tests.conftest import INTERPRETED, covering


def walk(codes: list[int], states: int) -> bool:
    """Whether codes are on a path from state 0."""
    parity, following = trellis(states)
    state = 0
    for code in codes:
        if (code - parity[state]) % 2:
            return False
        state = following[state][(code - parity[state]) // 2 % 2]
    return True


@pytest.mark.parametrize("states", [s for s in STATES if s > 1])
def test_a_trellis_joins_every_state_to_two_others(states: int) -> None:
    parity, following = trellis(states)
    assert sorted(itertools.chain(*following)) == sorted(2 * list(range(states)))
    assert sum(parity) == states // 2
    for state, (a, code_a, b, code_b) in enumerate(predecessors(states)):
        for before, code in ((a, code_a), (b, code_b)):
            assert following[before][(code - parity[before]) // 2] == state and code % 2 == parity[before]
    assert all(code_a != code_b for _, code_a, _, code_b in predecessors(states)), "two ways into a state must differ"


@pytest.mark.parametrize("states", [4, 8, 16])
def test_the_nearest_path_is_the_nearest(states: int) -> None:
    x = torch.randn(3, 7) * 2
    found = nearest_path(x, states, 16)
    parity, following = trellis(states)
    for row, codes in zip(x.tolist(), found.tolist(), strict=True):
        best = {0: 0.0}
        for value in row:  # every state's cost, by all codes near the value
            after: dict[int, float] = {}
            for state, cost in best.items():
                for code in range(math.floor(value) - 4, math.ceil(value) + 5):
                    if (code - parity[state]) % 2 == 0:
                        to = following[state][(code - parity[state]) // 2 % 2]
                        after[to] = min(after.get(to, math.inf), cost + (value - code) ** 2)
            best = after
        distance = sum((a - b) ** 2 for a, b in zip(row, codes, strict=True))
        assert walk([int(code) for code in codes], states)
        assert distance == pytest.approx(min(best.values()), abs=1e-4)


def test_more_states_come_nearer_to_shannon() -> None:
    """Mean squared distances at 256 rows a path, per base step; a scalar quantiser of step 2 has 1/3."""
    x = torch.randn(16, 1024) * 5
    distances = [(x - nearest_path(x, states, 256)).square().mean().item() for states in STATES if states > 1]
    assert distances == sorted(distances, reverse=True)
    assert 0.24 < distances[-1] < distances[1] < 0.268 and distances[0] < 0.275


def problem(device: torch.device, B: int, R: int, C: int) -> dict[str, torch.Tensor]:
    W, X = torch.randn(B, R, C), torch.randn(B, 4 * C, C) * (torch.rand(C) + 0.3)
    H = X.transpose(1, 2) @ X / C + 0.01 * torch.eye(C)
    factor = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True).float()
    tensors = dict(
        weight=W,
        factor=factor,
        row_step=torch.rand(B, R) * 0.2 + 0.1,
        column_step=torch.rand(B, C) + 0.5,
        shrink=torch.rand(B, R) * 0.1 + 0.9,
    )
    return {name: tensor.to(device) for name, tensor in tensors.items()}


SHAPES = [(2, 40, 37, 16), (1, 16, 4, 32), (3, 33, 40, 16)]


HERE = ([(2, 9, 35, 16), (1, 21, 35, 16)], [1, 4, 8, 16]) if INTERPRETED else (SHAPES, STATES)


@pytest.mark.parametrize("shape, states", covering(*HERE, strength=1), ids=str)
def test_codes_are_those_of_the_reference(device: torch.device, shape: tuple[int, int, int, int], states: int) -> None:
    B, R, C, length = shape
    given = problem(device, B, R, C)
    codes = trellis_gptq(**given, states=states, path_length=length)
    expected = trellis_gptq_reference(**given, states=states, path_length=length)
    assert codes.dtype == torch.int16 and codes.shape == (B, R, C)
    # A tie that rounding breaks otherwise changes the rest of a path: few columns may differ, and no error may grow.
    assert (codes != expected).float().mean() < 0.05
    for chosen in (codes, expected):
        for matrix in chosen.cpu():
            for column, start in itertools.product(range(C), range(0, R, length)):
                assert states == 1 or walk(matrix[start : start + length, column].tolist(), states)
    ours, theirs = outputs_error(given, codes), outputs_error(given, expected)
    assert ours <= theirs * 1.02


def test_compilers_take_it_whole(device: torch.device) -> None:
    given = problem(device, 1, 16, 4)

    def code(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return trellis_gptq(**given, states=8, path_length=16)

    assert torch.equal(torch.compile(code, fullgraph=True, backend="aot_eager")(given), code(given))
    if device.type == "cuda" or INTERPRETED:
        torch.library.opcheck(torch.ops.pgolf.trellis_gptq.default, (*given.values(), 8, 16))


def outputs_error(given: dict[str, torch.Tensor], codes: torch.Tensor) -> float:
    """tr(E H Eᵀ) of all matrices, with H⁻¹ = Fᵀ F."""
    given = {name: tensor.double() for name, tensor in given.items()}
    error = given["weight"] - codes.double() * given["row_step"][:, :, None] * given["column_step"][:, None]
    return torch.linalg.solve_triangular(given["factor"], error, upper=True, left=False).square().sum().item()


@pytest.mark.skipif(INTERPRETED, reason="of the reference")
def test_errors_are_made_good_by_later_columns() -> None:
    given = problem(torch.device("cpu"), 1, 64, 48)
    alone = given | {"factor": torch.diag_embed(given["factor"].diagonal(dim1=1, dim2=2)).contiguous()}
    with_feedback, without = (trellis_gptq(**g, states=8, path_length=64) for g in (given, alone))
    assert outputs_error(given, with_feedback) < 0.9 * outputs_error(given, without)


@pytest.mark.skipif(INTERPRETED, reason="of the checks")
@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"weight": torch.zeros(3, 4)}, ValueError, "weight must be"),
        ({"factor": torch.zeros(1, 4, 3)}, ValueError, "factor must be"),
        ({"row_step": torch.ones(1, 9)}, ValueError, "row_step must be"),
        ({"column_step": torch.ones(1, 9)}, ValueError, "column_step must be"),
        ({"shrink": torch.ones(2, 8)}, ValueError, "shrink must be"),
        ({"weight": torch.zeros(1, 8, 4, dtype=torch.float64)}, TypeError, "weight must be float32"),
        ({"row_step": torch.full((1, 8), 1e-6)}, ValueError, "must stay below 16384, and a weight is"),
        ({"weight": torch.full((1, 8, 4), float("nan"))}, ValueError, "must stay below"),
        ({"states": 6}, ValueError, "states must be one of 1, 4, 8"),
        ({"path_length": 24}, ValueError, "path_length must be"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    given = problem(torch.device("cpu"), 1, 8, 4) | {"states": 8, "path_length": 16}
    with pytest.raises(error, match=message):
        trellis_gptq(**(given | change))
