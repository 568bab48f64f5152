"""Training checkpoints: the state from which a run continues to the same bytes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from pgolf.common.runtime import World, random_state, set_random_state
from pgolf.common.tensors import TensorFileError, check_tensors, load_tensors, not_finite, save_tensors
from pgolf.config import RunConfig
from pgolf.data.loader import DocumentPackingLoader
from pgolf.model.gpt import GPT
from pgolf.training.optim import ModelOptimizer
from pgolf.training.schedule import Clock

FORMAT = "pgolf training checkpoint 2"
# Settings that may differ between the run that wrote a checkpoint and the run that continues from it.
_MAY_DIFFER = {
    "run_id",
    "artifact_dir",
    "data_dir",
    "train_log_every",
    "checkpoint_minutes",
    "device",
    "dist_timeout_seconds",
}


@dataclass
class TrainingState:
    """Everything that training changes."""

    model: GPT
    optimizer: ModelOptimizer
    ema: dict[str, torch.Tensor]  # float32, by state-dict name
    loader: DocumentPackingLoader
    clock: Clock
    step: int = 0
    snapshots: dict[str, torch.Tensor] = field(default_factory=dict)  # float32, their sum; empty without any
    snapshot_count: int = 0


def save_checkpoint(path: Path, state: TrainingState, config: RunConfig, world: World) -> None:
    """Write a checkpoint atomically; call it on every rank, rank 0 writes.

    Raises DivergedError and FileError as `save_tensors` does; the earlier file is then unchanged.
    """
    optimizer, loader = state.optimizer.state_dict(), state.loader.state_dict()
    payload = None
    if world.is_main:
        payload = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "step": state.step,
            "elapsed": state.clock.elapsed(),
            "looping": state.model.looping_active,
            "model": state.model.state_dict(),
            "ema": state.ema,
            "snapshots": state.snapshots,
            "snapshot_count": state.snapshot_count,
            "optimizer": optimizer,
            "loader": loader,
            "random": random_state(),
        }
    save_tensors(path, payload, world)


def load_checkpoint(path: Path, state: TrainingState, config: RunConfig, world: World) -> None:
    """Load a checkpoint, which rank 0 reads, into ``state``.

    The number of ranks may differ from that of the run that wrote it. Raises TensorFileError for a file that is no
    checkpoint, and for one of other settings, which it names.
    """
    payload = world.on_main(partial(load_tensors, path))
    if payload.get("format") != FORMAT or not isinstance(payload.get("config"), dict):
        raise TensorFileError(f"{path} is no training checkpoint of this version; delete it and train anew")
    now = dataclasses.asdict(config)
    before = payload["config"]
    changed = [name for name in now if name not in _MAY_DIFFER and now[name] != before.get(name)]
    if changed:
        shown = ", ".join(f"{name} {before.get(name)!r} → {now[name]!r}" for name in changed)
        raise TensorFileError(f"{path} was written with other settings: {shown}; set them back, or train anew")
    try:
        _apply(payload, state)
    except Exception as error:  # a part that does not fit raises almost anything
        shown = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise TensorFileError(f"{path} does not fit this run: {shown}; delete it and train anew") from error


def _apply(payload: dict, state: TrainingState) -> None:
    step, elapsed, looping = payload["step"], payload["elapsed"], payload["looping"]
    if type(step) is not int or step < 0 or type(elapsed) is not float or not 0 <= elapsed < math.inf:
        raise TensorFileError(f"its step and seconds are {step!r} and {elapsed!r}")
    state.model.load_state_dict(check_tensors(payload["model"], state.model.state_dict()))
    state.model.looping_active = bool(looping)
    if name := not_finite(payload["optimizer"]):
        raise TensorFileError(f"the optimizer's {name} has numbers that are not finite")
    state.optimizer.load_state_dict(payload["optimizer"])
    for name, average in check_tensors(payload["ema"], state.ema).items():
        state.ema[name].copy_(average)
    state.snapshot_count = int(payload["snapshot_count"])
    expected = state.ema if state.snapshot_count else {}
    sums = check_tensors(payload["snapshots"], expected)
    state.snapshots = {name: sums[name].to(average.device) for name, average in expected.items()}
    state.loader.load_state_dict(payload["loader"])
    state.clock, state.step = Clock(elapsed), step
    set_random_state(payload["random"])
