"""The processes of a run: what one raises all raise, and none waits for one that is no more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf.common.files import FileError
from pgolf.common.runtime import World, side_by_side, start_world, stop_world
from pgolf.config import RunConfig
from tests.conftest import DEVICES
from tests.processes import run_processes

ROOT = Path(__file__).resolve().parent.parent


def refuse(what: str) -> None:
    raise FileError(f"{what} is damaged")


KINDS = torch.int8, torch.int16, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64


def several(rank: int) -> dict:
    """Tensors of all kinds within other things: transposed, of one number, of none."""
    turned = [((1 - 2 * rank) * torch.arange(6)).view(2, 3).T.to(kind) for kind in KINDS]
    return {"tensors": [*turned, torch.tensor(2.5 - rank), torch.zeros(rank, 3)], "more": ("text", rank)}


def _shared(rank: int, size: int) -> dict:
    world = World(rank, size, torch.device("cpu"), torch.distributed.group.WORLD)
    return world.share(several(rank))


def test_tensors_are_shared_as_they_are(tmp_path: Path) -> None:
    expected = several(0)
    for found in run_processes(_shared, 2, tmp_path):
        for a, b in zip(found["tensors"], expected["tensors"], strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
        assert found["more"] == expected["more"]


def _outcomes(rank: int, size: int) -> list:
    world = start_world(RunConfig(device="cpu"))
    asked: list[int] = []
    found = [world.on_main(lambda: asked.append(rank) or {"a": torch.arange(3)})["a"].tolist(), asked]
    for call in (
        lambda: world.on_main(lambda: refuse(f"ema.pt of rank {rank}")),
        lambda: world.on_each_host(lambda: refuse(f"shard of rank {rank}")),
    ):
        try:
            call()
        except FileError as error:
            found.append(str(error))
    host = World(rank, size, world.device, world.control, local_rank=1 - rank)  # the second rank's
    try:
        host.on_each_host(lambda: refuse(f"shard of rank {rank}"))
    except FileError as error:
        found.append(str(error))
    world.pulse.stop()
    return found


def test_what_rank_0_reads_or_raises_all_have(tmp_path: Path) -> None:
    errors = ["ema.pt of rank 0 is damaged", "shard of rank 0 is damaged", "shard of rank 1 is damaged"]
    assert run_processes(_outcomes, 2, tmp_path) == [[[0, 1, 2], [rank][rank:], *errors] for rank in (0, 1)]


def test_one_process_needs_no_group() -> None:
    world = World(0, 1, torch.device("cpu"))
    assert world.on_main(lambda: 5) == 5
    for call in (world.on_main, world.on_each_host):
        with pytest.raises(FileError, match="x is damaged"):
            call(lambda: refuse("x"))
    stop_world(world)


WAITS = """
import os, signal, sys
from pgolf.common import runtime
from pgolf.config import RunConfig
runtime.PULSE_SECONDS = 0.1
world = runtime.start_world(RunConfig(device="cpu", dist_timeout_seconds=1))
if sys.argv[1] == "finish":
    runtime.stop_world(world)
elif world.is_main:
    world.barrier()
else:
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize("what", ["finish", "stop"])
def test_a_process_that_does_not_answer_ends_the_others(what: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", WAITS, what],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    try:
        shown = first.communicate(timeout=120)[1]
        if what == "stop":
            assert first.returncode == 2 and "pgolf: another process does not answer: " in shown
            assert "Traceback" not in shown
        else:
            assert (first.returncode, second.wait(timeout=120)) == (0, 0), shown
    finally:
        second.send_signal(signal.SIGKILL)
        second.communicate()


@pytest.mark.parametrize("device", DEVICES)
def test_calls_side_by_side_return_what_they_return_alone(device: str) -> None:
    given = [torch.randn(600, 600, device=device) for _ in range(5)]

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = (x + 1).sin()
        return x

    alone = [chain(x) for x in given]
    for _ in range(3):
        together = side_by_side([lambda x=x: chain(x) for x in given], torch.device(device))
        noise = [torch.randn(600, 600, device=device) for _ in range(5)]  # may not take the results' memory
        assert all(torch.equal(found, exact) for found, exact in zip(together, alone, strict=True))
        del noise
