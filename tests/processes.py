"""Run a function in several processes joined by gloo, as torchrun would.

They are forked from a process that has done the imports once, and nothing else: there CUDA has not been started.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["torch._dynamo", "pgolf.training.train", "pgolf.scoring.ttt.engine", "bench.gradient_errors", __name__]
multiprocessing.set_forkserver_preload(IMPORTED)


def run_processes(function: Callable[[int, int], Any], size: int, folder: Path) -> list[Any]:
    """``function(rank, size)`` in each of ``size`` processes; their results (tensors and plain values) by rank."""
    mp.start_processes(_process, args=(function, size, str(folder)), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(size)]


def _process(rank: int, function: Callable[[int, int], Any], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(function(rank, size), Path(folder) / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
