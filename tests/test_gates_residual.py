"""What the residual stream's kernels become on GPUs that need not be there, in their shipped configuration."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pgolf.kernels.residual import lanes as two_lanes
from pgolf.kernels.residual import triton as stream
from tests.conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("the compiler is for the process without the interpreter", allow_module_level=True)
pytest.importorskip("triton")

from tests.gates import check, compiling

TOKENS, WIDTH, EPS = 98_304, 512, 1e-6
# registers, warps an SM that these and the shared memory must leave room for (of bf16 on sm_90)
LAUNCHES = {
    "mix_forward": (80, 24),
    "join_mix_forward": (128, 16),
    "join_forward": (72, 24),
    "mix_backward": (160, 12),
    "mix_backward_carry": (160, 12),
    "join_mix_backward": (160, 12),
    "mix_backward_one": (160, 12),
    "join_mix_backward_one": (160, 12),
    "enter_lanes_forward": (128, 16),
    "enter_lanes_backward": (168, 12),
    "join_backward": (104, 16),
    "norm_forward": (64, 28),
    "norm_forward_mean": (64, 28),
    "norm_backward": (64, 28),
    "norm_backward_mean": (64, 28),
    "lanes_forward": (64, 24),
    "lanes_backward": (80, 16),
    "lanes_norm_forward": (104, 16),
    "lanes_norm_join_forward": (128, 16),
    "lanes_norm_backward": (168, 8),
    "lanes_norm_join_backward": (232, 8),
    "lanes_mean_forward": (64, 24),
    "lanes_mean_backward": (128, 16),
    "mix_backward_carry_frozen": (88, 20),
    "join_mix_backward_frozen": (80, 24),
    "enter_lanes_backward_frozen": (80, 24),
    "join_backward_frozen": (80, 24),
    "lanes_backward_frozen": (72, 24),
    "lanes_norm_backward_frozen": (80, 20),
    "lanes_norm_join_backward_frozen": (104, 16),
    "lanes_mean_backward_frozen": (72, 20),
    "mix_backward_carry_frozen_x": (160, 12),
    "enter_lanes_forward_gated": (128, 16),
    "enter_lanes_backward_gated": (168, 12),
    "norm_forward_gated": (80, 24),
    "norm_backward_gated": (128, 16),
    "lanes_norm_forward_gated": (128, 16),
    "lanes_norm_join_forward_gated": (128, 16),
    "lanes_norm_backward_gated": (200, 8),
    "lanes_norm_join_backward_gated": (255, 8),
    "lanes_norm_join_backward_gated_frozen": (128, 16),
}
FROZEN = [name for name in LAUNCHES if "frozen" in name]


# The largest of each sort: for other dtypes and widths, and some of them for other widths and chips.
FOR_OTHERS = [
    "join_mix_forward",
    "join_mix_backward",
    "enter_lanes_forward",
    "enter_lanes_backward",
    "norm_backward",
    "lanes_norm_join_forward",
    "lanes_norm_join_backward",
    "enter_lanes_backward_frozen",
    "lanes_norm_join_backward_frozen",
    "enter_lanes_backward_gated",
    "norm_backward_gated",
    "lanes_norm_join_backward_gated",
]
OF_WIDTH_768 = ["join_mix_forward", "join_mix_backward", "norm_backward", "lanes_norm_join_backward"]
ON_OTHER_CHIPS = [
    ("join_mix_forward", 80),
    ("join_mix_backward", 80),
    ("lanes_norm_join_forward", 80),
    ("lanes_norm_join_backward", 80),
    ("enter_lanes_forward", 100),
    ("enter_lanes_backward", 100),
    ("norm_backward", 100),
    ("lanes_norm_join_backward", 100),
    ("lanes_norm_join_backward_frozen", 100),
    ("lanes_norm_join_backward_gated", 80),
    ("lanes_norm_join_backward_gated", 100),
]
SUMS = ["_partial_sums_kernel"]


def has_sums(name: str) -> bool:
    """Whether a launch leaves parts of parameters' gradients, which a second kernel adds."""
    return "backward" in name and not name.endswith("_frozen") and (not name.startswith("norm") or "gated" in name)


def launch(name: str, dtype: torch.dtype, width: int = WIDTH) -> None:
    x, vector, scale = torch.empty(1, TOKENS, width, dtype=dtype), torch.empty(width, dtype=dtype), torch.ones(())
    mix, join, rstd = torch.empty(2, width, dtype=dtype), (x, vector, vector), torch.empty(1, TOKENS)
    none, lanes = (None,) * 3, (x, x, x, x, torch.empty(2, 2), torch.empty(2))
    backward, lanes_backward, variant = stream.mix_backward, two_lanes.lanes_backward, name.partition("_frozen")
    if variant[1]:  # a frozen x0 has no later gradient to add
        frozen = dict(need_x=False) if variant[2] else dict(need_x0=False, need_parameters=False)
        backward, lanes_backward = partial(backward, **frozen), partial(lanes_backward, **frozen)
    later = None if variant[1] else x
    case = variant[0].removesuffix("_gated")
    row = None if case == variant[0] else torch.empty(13)
    u_and_n = dict(keep_u=True, keep_n=True)
    {
        "mix_forward": lambda: stream.mix_forward(x, x, mix, *none, scale, row, EPS, **u_and_n),
        "join_mix_forward": lambda: stream.mix_forward(x, x, mix, *join, scale, row, EPS, **u_and_n),
        "enter_lanes_forward": lambda: stream.mix_forward(
            x, x, mix, *join, scale, row, EPS, keep_joined=True, keep_n=True, keep_n1=True
        ),
        "join_forward": lambda: stream.mix_forward(x, None, None, *join, None, row, EPS, keep_joined=True),
        "mix_backward": lambda: backward(None, x, x, None, None, None, x, x, mix, *none, scale, row, EPS),
        "mix_backward_carry": lambda: backward(None, x, x, None, x, later, x, x, mix, *none, scale, row, EPS),
        "join_mix_backward": lambda: backward(None, x, x, None, None, later, x, x, mix, *join, scale, row, EPS),
        "mix_backward_one": lambda: backward(
            None, x, x, None, None, x, x, x, mix, *none, scale, row, EPS, x0_is_x=True
        ),
        "join_mix_backward_one": lambda: backward(
            None, x, x, None, None, x, x, x, mix, *join, scale, row, EPS, skip_is_x=True
        ),
        "enter_lanes_backward": lambda: backward(x, None, x, x, x, later, x, x, mix, *join, scale, row, EPS),
        "join_backward": lambda: backward(x, None, None, None, None, None, x, None, None, *join, None, row, EPS),
        "norm_forward": lambda: stream.norm_forward(x, None, scale, EPS, row),
        "norm_forward_mean": lambda: stream.norm_forward(x, x, None, EPS),
        "norm_backward": lambda: stream.norm_backward(x, x, x, rstd, scale, row, need_parameters=True),
        "norm_backward_mean": lambda: stream.norm_backward(None, x, x, rstd, None, None, mean=True),
        "lanes_forward": lambda: two_lanes.lanes_forward(None, *lanes, None, *none, None, row, EPS),
        "lanes_backward": lambda: lanes_backward(None, x, x, *none, *lanes, None, *none, None, row, EPS),
        "lanes_norm_forward": lambda: two_lanes.lanes_forward(x, *lanes, mix, *none, scale, row, EPS),
        "lanes_norm_join_forward": lambda: two_lanes.lanes_forward(x, *lanes, mix, *join, scale, row, EPS),
        "lanes_norm_backward": lambda: lanes_backward(later, *[x] * 5, *lanes, mix, *none, scale, row, EPS),
        "lanes_norm_join_backward": lambda: lanes_backward(later, *[x] * 5, *lanes, mix, *join, scale, row, EPS),
        "lanes_mean_forward": lambda: two_lanes.lanes_forward(None, *lanes, None, *none, None, row, EPS, mean=True),
        "lanes_mean_backward": lambda: lanes_backward(*none, x, None, None, *lanes, None, *none, None, row, EPS),
    }[case]()


@pytest.mark.parametrize("name", LAUNCHES)
def test_shipped(name: str) -> None:
    with compiling(90) as compiled:
        launch(name, torch.bfloat16)
    kernel, *sums = compiled
    registers, warps = LAUNCHES[name]
    check(kernel, registers=registers, streams=True)
    assert [of_parts.name for of_parts in sums] == SUMS * has_sums(name)
    for of_parts in sums:
        check(of_parts, registers=64)
        # Rows of sums with the lanes' or the row gate's are not of whole 16 bytes.
        assert name.startswith("lanes") or "gated" in name or of_parts.count(r"LDG\.E\.128") >= 4
    assert warps * 32 * -(-kernel.registers // 8) * 8 <= 65_536
    assert kernel.count(r"LDGSTS\.E\S*\.128") >= 4, "no asynchronous copies of 16 bytes"  # of rows to come
    in_a_program = 2 if name.startswith(("join_mix", "enter_lanes", "lanes_norm")) and "backward" in name else 1
    assert warps // in_a_program * (kernel.shared_bytes + 1024) <= 233_472


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_inputs_take_less(name: str) -> None:
    """Fewer loads and stores, but that the final norm's gradient needs all that was read."""
    with compiling(90) as compiled:
        launch(name, torch.bfloat16)
        launch(name.partition("_frozen")[0], torch.bfloat16)
    frozen, whole = ([kernel.count("LDG"), kernel.count("STG")] for kernel in compiled if kernel.name not in SUMS)
    assert frozen[0] < whole[0] or "mean" in name
    assert frozen[1] < whole[1]


@pytest.mark.parametrize("name, capability", ON_OTHER_CHIPS)
def test_other_chips(name: str, capability: int) -> None:
    with compiling(capability) as compiled:
        launch(name, torch.bfloat16)
    check(compiled[0], streams=True)
    assert [of_parts.name for of_parts in compiled[1:]] == SUMS * has_sums(name)
    for of_parts in compiled[1:]:
        check(of_parts)


@pytest.mark.parametrize(
    "name, dtype, width",
    [
        *((name, torch.float32, WIDTH) for name in FOR_OTHERS),
        *((name, torch.bfloat16, 768) for name in OF_WIDTH_768),
        *((name, torch.bfloat16, 1024) for name in FOR_OTHERS),
    ],
    ids=str,
)
def test_other_dtypes_and_widths(name: str, dtype: torch.dtype, width: int) -> None:
    with compiling(90) as compiled:
        launch(name, dtype, width)
    check(compiled[0], streams=True)
    assert [of_parts.name for of_parts in compiled[1:]] == SUMS * has_sums(name)
    for of_parts in compiled[1:]:
        check(of_parts)
