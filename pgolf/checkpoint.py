"""Training checkpoints: everything a run needs to go on to the same bytes."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf.config import RunConfig
from pgolf.loader import DocumentPackingLoader
from pgolf.model import GPT
from pgolf.optim import ModelOptimizer
from pgolf.runtime import World, random_state, set_random_state
from pgolf.schedule import Clock

FORMAT = "pgolf training checkpoint 1"
# What may differ between the run that wrote a checkpoint and the one that goes on from it.
_MAY_DIFFER = {"run_id", "artifact_dir", "data_dir", "train_log_every", "checkpoint_minutes", "device"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or belongs to other settings."""


@dataclass
class TrainingState:
    """What training changes."""

    model: GPT
    optimizer: ModelOptimizer
    ema: dict[str, torch.Tensor]  # float32, by state-dict name
    loader: DocumentPackingLoader
    clock: Clock
    step: int = 0


def save_checkpoint(path: Path, state: TrainingState, config: RunConfig, world: World) -> None:
    """Write a checkpoint aside and rename it; call it on every rank, rank 0 writes."""
    optimizer, loader = state.optimizer.state_dict(), state.loader.state_dict()
    if world.is_main:
        payload = {
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "step": state.step,
            "elapsed": state.clock.elapsed(),
            "looping": state.model.looping_active,
            "model": state.model.state_dict(),
            "ema": state.ema,
            "optimizer": optimizer,
            "loader": loader,
            "random": random_state(),
        }
        save_aside(path, payload)
    world.barrier()


def load_checkpoint(path: Path, state: TrainingState, config: RunConfig, world: World) -> None:
    """Put a checkpoint's contents into ``state``; any number of ranks may read what any number wrote.

    Raises CheckpointError for a file that is no checkpoint, or one of other settings (named).
    """
    payload = load_tensors(path)
    if payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no training checkpoint of this version; delete it and train anew")
    now = dataclasses.asdict(config)
    before = payload["config"]
    changed = [name for name in now if name not in _MAY_DIFFER and now[name] != before.get(name)]
    if changed:
        shown = ", ".join(f"{name} {before.get(name)!r} → {now[name]!r}" for name in changed)
        raise CheckpointError(f"{path} was written with other settings: {shown}; set them back, or train anew")
    state.model.load_state_dict(payload["model"])
    state.model.looping_active = payload["looping"]
    state.optimizer.load_state_dict(payload["optimizer"])
    for name, average in state.ema.items():
        average.copy_(payload["ema"][name])
    state.loader.load_state_dict(payload["loader"])
    state.clock = Clock(payload["elapsed"])
    state.step = payload["step"]
    set_random_state(payload["random"])


def save_aside(path: Path, payload: dict) -> None:
    """torch.save whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(payload, aside)
    os.replace(aside, path)


def load_tensors(path: Path) -> dict:
    """Read a file of tensors onto the CPU, without running code from it. Raises CheckpointError if it is broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it may be cut short: delete it and run again"
        ) from error
