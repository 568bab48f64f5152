"""The stages of a run and their sequence: data, train, quantize, eval, ttt, report.

A stage reads the files that earlier stages left in the run's folder, writes its own, and puts its results into the
summary.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial

import torch

from pgolf.artifact.sizes import expected_size
from pgolf.artifact.stage import run_quantize
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_bytes, format_duration
from pgolf.common.runtime import Interrupted, World, on_terminate
from pgolf.config import RunConfig
from pgolf.data.manifest import SPLITS, check_unchanged
from pgolf.data.stage import run_data
from pgolf.report.stage import run_report
from pgolf.scoring.stage import run_eval, run_ttt
from pgolf.training.train import train

Stage = Callable[[RunConfig, RunFolder, World, bool], None]  # settings, folder, processes, whether to resume
STAGES: dict[str, Stage] = {
    "data": run_data,
    "train": train,
    "quantize": run_quantize,
    "eval": run_eval,
    "ttt": run_ttt,
    "report": run_report,
}
# Stages that read data, and the splits that they read: a program that only scores needs no training data.
READING = {"train": SPLITS, "quantize": SPLITS, "eval": ("val",), "ttt": ("val",)}


def run_stages(config: RunConfig, folder: RunFolder, world: World, resume: bool = False) -> None:
    """Run all stages in order. With ``resume``, skip those whose results are in the summary."""
    for name, stage in STAGES.items():
        if resume and name in world.on_main(folder.summary) and name != "report":
            world.log(f"[{name}] done before")
            continue
        run_stage(name, stage, config, folder, world, resume=resume)


def run_stage(name: str, stage: Stage, config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Run one stage, log a line before and after it, and release the device's cached memory.

    Before a stage that reads data, runs the stage ``data`` if the run lacks it, and checks that the data have not
    changed since.

    Args:
        resume: continue from a checkpoint if there is one; for training only.
    """
    if name in READING and not world.on_main(folder.checked_files):
        run_stage("data", run_data, config, folder, world, resume=False)
    world.log(f"[{name}]")
    if name == "train":
        world.log(expected_size(config))
    begun = time.perf_counter()
    with on_terminate(partial(_stop, name)):  # training replaces this handler while it steps
        if name in READING:
            files = world.on_main(folder.checked_files)
            check = partial(
                check_unchanged,
                config.data_dir,
                config.vocab_size,
                files,
                copied=not world.is_main,
                splits=READING[name],
            )
            world.on_each_host(check)
        stage(config, folder, world, resume)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    peak = folder.summary().get(name, {}).get("peak_memory_bytes") if world.is_main else None
    memory = f", peak memory {format_bytes(peak)}" if peak else ""
    world.log(f"[{name}] {format_duration(time.perf_counter() - begun)}{memory}")


def _stop(name: str, number: signal.Signals) -> None:
    again = "which begins anew: run it again, or `run --resume`"
    raise Interrupted(f"stopped by {number.name} in the stage {name}, {again}", number)
