"""Products for Hopper: their barriers, simulated anywhere; their numbers, on a GPU of that kind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from bench.timing import capture
from pgolf.kernels.common import hopper_product as hopper
from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.residual_mlp import triton as family

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and hopper.gluon and not INTERPRETED
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and Triton 3.6")
EPILOGUES = [family.SQUARE, family.MARKED_SQUARE, family.GRADIENT]


class Barrier:
    """One arrival ends a phase; to wait is for the number of phases to have another parity."""

    def __init__(self) -> None:
        self.phases = self.seen = 0

    def arrive(self) -> None:
        self.phases += 1
        assert self.phases <= self.seen + 1, "a phase ended before the one before was seen"

    def done(self, parity: int) -> bool:
        over = self.phases % 2 != parity
        if over:
            self.seen = self.phases
        return over


def simulate(
    tiles: int, start: int, across: int, depth: int, stages: int, choose: random.Random, turns: bool = True
) -> None:
    """One program: the kernel's waits, arrivals, loads and products, which end late, in any order that they allow."""
    full, empty = ([Barrier() for _ in range(stages)] for _ in range(2))
    turn = [Barrier(), Barrier()]
    left, right = [None] * depth, [None] * stages  # what is in shared memory, and how many products read it
    reading = {("left", k): 0 for k in range(depth)} | {("right", k): 0 for k in range(stages)}
    products = []

    def load(memory: list, name: str, place: int, value: tuple) -> None:
        assert not reading[name, place], f"{name} {place} overwritten while it is read"
        memory[place] = value

    def produce() -> Iterator:
        step = 0
        for tile in range(start, start + tiles):
            for k in range(depth):
                stage, phase = step % stages, step // stages & 1
                yield lambda stage=stage, phase=phase: empty[stage].done(phase ^ 1)
                arrivals = [(right, "right", stage, (tile % across, k))]
                if tile == start or tile % across == 0:
                    arrivals.append((left, "left", k, (tile // across, k)))
                for place in arrivals:
                    load(place[0], *place[1:3], None)  # the old contents are lost when the load begins
                flying.append((full[stage], arrivals))
                step += 1

    def consume(which: int) -> Iterator:
        for tile in range(which, tiles, 2):
            step, begun = tile * depth, []
            if turns:
                yield lambda tile=tile: turn[which].done((tile // 2 & 1) ^ (1 - which))
            for k in range(depth):
                stage, phase = (step + k) % stages, (step + k) // stages & 1
                yield lambda stage=stage, phase=phase: full[stage].done(phase)
                for name, place in (("left", k), ("right", stage)):
                    reading[name, place] += 1
                begun.append((k, stage))
                if k:
                    yield None
                    finish(*begun.pop(0), tile)
                if turns and k == depth - 1:
                    turn[1 - which].arrive()
            yield None
            finish(*begun.pop(0), tile)
            yield None  # the epilogue

    def finish(k: int, stage: int, tile: int) -> None:
        """A product is done: it read what it was to read, from its beginning to now."""
        products.append((tile, k))
        assert left[k] == ((start + tile) // across, k) and right[stage] == ((start + tile) % across, k)
        for name, place in (("left", k), ("right", stage)):
            reading[name, place] -= 1
        empty[stage].arrive()

    flying: list = []
    agents = {name: [agent, None] for name, agent in (("p", produce()), (0, consume(0)), (1, consume(1)))}
    while agents or flying:
        ready = [name for name, (_, wait) in agents.items() if wait is None or wait()]
        assert ready or flying, f"all wait: {list(agents)}"
        if flying and (not ready or choose.random() < 0.3):
            barrier, arrivals = flying.pop(choose.randrange(len(flying)))
            for place in arrivals:
                load(*place)
            barrier.arrive()
        else:
            name = choose.choice(ready)
            try:
                agents[name][1] = next(agents[name][0])
            except StopIteration:
                del agents[name]
    assert sorted(products) == [(tile, k) for tile in range(tiles) for k in range(depth)]


@pytest.mark.parametrize("depth, stages", [(1, 1), (2, 2), (4, 4), (5, 4), (8, 6), (8, 2), (8, 8), (10, 4)])
def test_barriers_neither_hang_nor_let_anything_be_overwritten(depth: int, stages: int) -> None:
    choose = random.Random(depth)
    for tiles in (0, 1, 2, 3, 7, 12):
        for across, start in ((1, 0), (2, 1), (3, 5), (16, 13)):
            for _ in range(3):
                simulate(tiles, start, across, depth, stages, choose)


def test_the_simulation_sees_what_is_wrong() -> None:
    with pytest.raises(AssertionError, match="overwritten"):  # more stages than depth: a's parts are not yet read
        for seed in range(50):
            simulate(6, 0, 1, 2, 4, random.Random(seed))
    with pytest.raises(AssertionError, match="all wait"):  # a stage is given back when the next is there
        simulate(1, 0, 1, 2, 1, random.Random(0))
    a, b = torch.empty(1, 832).half(), torch.empty(128, 832).half()
    if hopper.gluon:
        with pytest.raises(ValueError, match="stages must be 2 or more, .* got 1 for K = 832"):
            hopper.ping_pong(family.SQUARE.value, a, b, a, a, constants=(0.5,), stages=6)
    with pytest.raises(AssertionError):  # the second tile's consumer takes a new barrier for its stage's second use
        for seed in range(50):
            simulate(6, 0, 1, 8, 6, random.Random(seed), turns=False)


def test_order_of_rows() -> None:
    """Four pairs of neighbours, 8 apart among the products' columns, are eight neighbours."""
    rows = torch.arange(64)
    ordered = rows.view(2, 4, 4, 2).transpose(1, 2).reshape(-1)
    assert ordered[:10].tolist() == [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    assert torch.equal(ordered.view(2, 4, 4, 2).transpose(1, 2).reshape(-1), rows)  # as the kernel puts them back
    for lane in range(4):  # columns that a thread has of 32
        mine = [int(ordered[8 * pair + 2 * lane + k]) for pair in range(4) for k in range(2)]
        assert mine == list(range(8 * lane, 8 * lane + 8))


def test_order_of_rows_for_pairs() -> None:
    """Of a head's 64 columns a lane has 16 neighbours: in the first lane both dimensions of the pairs that turn."""
    rows = torch.arange(128)
    ordered = rows.view(2, 4, 2, 4, 2).permute(0, 2, 3, 1, 4).reshape(-1)
    assert torch.equal(ordered.view(2, 2, 4, 4, 2).permute(0, 3, 1, 2, 4).reshape(-1), rows)
    for lane in range(4):
        mine = [int(ordered[8 * pair + 2 * lane + k]) for pair in range(16) for k in range(2)]
        assert sorted(mine) == [64 * head + 16 * lane + k for head in range(2) for k in range(16)]


def run(epilogue: int, a, b, aux, stages: int = 6, copies: bool = False, slope: float = 0.5) -> torch.Tensor:
    """The product, in the middle of a matrix whose other rows stay as they are."""
    room = torch.full((a.size(0) + 256, b.size(0)), torch.nan, device="cuda", dtype=a.dtype)
    out = room[128:-128]
    aux = out if aux is None else aux
    hopper.ping_pong(epilogue, a, b, aux, out, constants=(slope,), stages=stages, copies=copies)
    assert room[:128].isnan().all() and room[-128:].isnan().all() and not out.isnan().any()
    return out


def operands(epilogue: int, M: int, N: int, K: int, dtype: torch.dtype) -> tuple:
    a, b = (torch.randn(rows, K, device="cuda").to(dtype) for rows in (M, N))
    marked = family.unfused_product(family.MARKED_SQUARE.value, a.flip(0), b, None)
    return a, b, marked if epilogue == family.GRADIENT.value else None


@needs_hopper
@pytest.mark.parametrize("epilogue", [epilogue.value for epilogue in EPILOGUES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slope", [0.5, 0.0])
@pytest.mark.parametrize(
    "M, N, K", [(1, 128, 128), (100, 256, 64), (128, 256, 512), (257, 384, 512), (8500, 256, 320), (4099, 2048, 512)]
)
def test_ping_pong(epilogue: int, dtype: torch.dtype, slope: float, M: int, N: int, K: int) -> None:
    given = operands(epilogue, M, N, K, dtype)
    got, plain = run(epilogue, *given, slope=slope), family.unfused_product(epilogue, *given, slope=slope)
    # The sums are of one precision in another order: one unit in the last place, more where a sum is nearly zero.
    unit, largest = torch.finfo(dtype).eps, plain.double().abs().max()
    assert ((got.double() - plain.double()).abs() <= 2 * unit * plain.double().abs() + 1e-4 * largest).all()


@needs_hopper
@pytest.mark.parametrize("stages, copies", [(2, False), (3, True), (6, False), (6, True)])
def test_parameters_and_repeats_bit_for_bit(stages: int, copies: bool) -> None:
    for epilogue in (family.MARKED_SQUARE.value, family.GRADIENT.value):
        given = operands(epilogue, 4099, 2048, 512, torch.bfloat16)
        first = run(epilogue, *given)
        assert all(torch.equal(first, run(epilogue, *given, stages, copies)) for _ in range(20))


@needs_hopper
def test_in_a_graph() -> None:
    a, b, aux = operands(family.GRADIENT.value, 1000, 512, 512, torch.bfloat16)
    graph, out = capture(lambda: family.fused_product("gradient", family.GRADIENT.value, a, b, aux))
    expected = out.clone().fill_(torch.nan)
    graph.replay()
    expected.copy_(out)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected) and torch.equal(out, run(family.GRADIENT.value, a, b, aux))


def projection(T: int, H: int, K: int, period: int, dtype: torch.dtype) -> tuple:
    """Arguments of `project`, with gains of all kinds, and two rows of zeros among the projected ones."""
    x = torch.randn(T, 512, device="cuda").to(dtype)
    x[:2] = 0
    weight = (torch.randn((H + 2 * K) * 64, 512, device="cuda") / 16).to(dtype)
    angles = torch.rand(period, 8, device="cuda") * 7
    gain = 5.25 * torch.randn(H, device="cuda")
    gain[: H // 2] = torch.tensor([0.0, -0.0, 1e-30, 1.0], device="cuda")[: H // 2]
    return x, weight, angles.cos().to(dtype), angles.sin().to(dtype), gain


def projected_reference(x, weight, cos, sin, gain, update, H: int, K: int, eps: float, unit: float) -> tuple:
    """unit q^, k^ and v in float64, [T, H + 2 K, 64], and 1 / rms."""
    T = x.size(0)
    whole = x.double() @ weight.double().t() + (0 if update is None else update.double())
    whole = whole.view(T, H + 2 * K, 64)
    inverse = (whole.square().mean(2) + eps).rsqrt()
    cos, sin = (t.double().repeat(-(-T // t.size(0)), 1)[:T, None] for t in (cos, sin))
    moved = torch.where(gain.abs() < 2.0**-24, torch.where(gain < 0, -(2.0**-24), 2.0**-24), gain).double()
    y = whole * inverse[:, :, None]
    y = torch.cat([y[..., :8] * cos + y[..., 8:16] * sin, y[..., 8:16] * cos - y[..., :8] * sin, y[..., 16:]], 2)
    y[:, :H] *= unit * moved[:, None]
    return torch.cat([y[:, : H + K], whole[:, H + K :]], 1), inverse[:, : H + K].t()


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T, H, K, period", [(1, 8, 4, 1), (100, 8, 4, 100), (4099, 8, 4, 4099), (514, 2, 2, 257)])
@pytest.mark.parametrize("updated", [False, True])
def test_project(T: int, H: int, K: int, period: int, dtype: torch.dtype, updated: bool) -> None:
    width, eps, unit, rest = (H + 2 * K) * 64, 1e-7, 0.18, 16
    update = torch.randn(T, width, device="cuda").to(dtype) if updated else None
    given = *projection(T, H, K, period, dtype), update
    room = torch.full((T + 256, width + rest), torch.nan, device="cuda", dtype=dtype)
    inverse = torch.full((H + K + 2, T), torch.nan, device="cuda")
    assert hopper.projection_fits(*given[:3], room, H, K, 64, 6)
    hopper.normalised_projection(*given, room[128:-128], inverse[1:-1], eps=eps, unit=unit, stages=6)
    assert room[:128].isnan().all() and room[-128:].isnan().all() and room[:, width:].isnan().all()
    assert inverse[0].isnan().all() and inverse[-1].isnan().all()
    expected, of_rms = projected_reference(*given, H, K, eps, unit)
    got = room[128:-128, :width].view(T, H + 2 * K, 64).double()
    error = (got - expected).abs().amax(2)
    assert (error <= torch.finfo(dtype).eps * expected.abs().amax(2) + 6e-8 * (dtype == torch.float16)).all()
    torch.testing.assert_close(inverse[1:-1].double(), of_rms, rtol=1e-5, atol=0)
    again = torch.full_like(room, torch.nan)
    for _ in range(20):
        hopper.normalised_projection(*given, again[128:-128], inverse[1:-1], eps=eps, unit=unit, stages=6)
        assert torch.equal(again[128:-128, :width], room[128:-128, :width])
