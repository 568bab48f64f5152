"""The run, stage by stage: data, train, quantize, eval, ttt, report.

Every stage reads what the ones before it left in the run's folder, leaves its own, and puts its results into the
summary; `run_stages` does them in order and can skip what is done.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial

import torch

from pgolf.artifact.stage import run_quantize
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_bytes, format_duration
from pgolf.common.runtime import Interrupted, World, on_terminate
from pgolf.config import RunConfig
from pgolf.data.manifest import check_unchanged
from pgolf.data.stage import run_data
from pgolf.report.stage import run_report
from pgolf.scoring.stage import run_eval, run_ttt
from pgolf.training.train import train

STAGES: dict[str, Callable[[RunConfig, RunFolder, World, bool], None]] = {
    "data": run_data,
    "train": train,
    "quantize": run_quantize,
    "eval": run_eval,
    "ttt": run_ttt,
    "report": run_report,
}
READING = ("train", "quantize", "eval", "ttt")  # stages that read data


def run_stages(config: RunConfig, folder: RunFolder, world: World, resume: bool = False) -> None:
    """All stages in order. With ``resume``, those whose results are in the summary are skipped."""
    for name, stage in STAGES.items():
        if resume and name in world.on_main(folder.summary) and name != "report":
            world.log(f"[{name}] done before")
            continue
        run_stage(name, stage, config, folder, world, resume)


def run_stage(name: str, stage: Callable, config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """One stage, with a line before and after it, and the device's memory given back.

    Those that read data do the stage ``data`` first where it was not done, and else make sure that they have not
    changed since.
    """
    if name in READING and not world.on_main(folder.checked_files):
        run_stage("data", run_data, config, folder, world, False)
    world.log(f"[{name}]")
    begun = time.perf_counter()
    with on_terminate(partial(_stop, name)):  # training has its own while it steps
        if name in READING:
            files = world.on_main(folder.checked_files)
            world.on_each_host(lambda: check_unchanged(config.data_dir, config.vocab_size, files, not world.is_main))
        stage(config, folder, world, resume)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    peak = folder.summary().get(name, {}).get("peak_memory_bytes") if world.is_main else None
    memory = f", peak memory {format_bytes(peak)}" if peak else ""
    world.log(f"[{name}] {format_duration(time.perf_counter() - begun)}{memory}")


def _stop(name: str, number: signal.Signals) -> None:
    again = "which begins anew: run it again, or `run --resume`"
    raise Interrupted(f"stopped by {number.name} in the stage {name}, {again}", number)
