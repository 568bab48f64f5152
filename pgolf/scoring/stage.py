"""The stages ``eval`` and ``ttt``: score the weights and the artifact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from pgolf.artifact.weights import load_artifact
from pgolf.common.files import FileError
from pgolf.common.folder import RunFolder
from pgolf.common.progress import progress
from pgolf.common.runtime import World, peak_memory_bytes, reset_peak_memory
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter
from pgolf.data.validation import validation_data
from pgolf.model.build import model_with
from pgolf.model.gpt import GPT
from pgolf.model.weights import load_weights
from pgolf.scoring.evaluate import evaluate_packed, evaluate_sliding
from pgolf.scoring.ttt.engine import test_time_training


def run_eval(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Score the weights before quantisation and the artifact on the validation tokens."""
    begun = time.perf_counter()
    reset_peak_memory(world.device)
    tokens, table = validation_data(config)
    before = world.on_main(lambda: load_weights(folder.need(folder.ema, "train"), config))
    quantized = load_artifact(config, folder, world)
    results: dict[str, Any] = {}
    for name, weights in (("before", before), ("quantized", quantized)):
        started = time.perf_counter()
        model = model_with(config, world, weights)
        results[name] = _score(evaluate_packed, model, config, tokens, table, world)
        results[name]["seconds"] = time.perf_counter() - started
        world.log(f"{name}: {results[name]['bits_per_byte']:.5f} bits per byte")
    if config.sliding_window_enabled:
        results["sliding"] = _score(evaluate_sliding, model, config, tokens, table, world)
    results |= {"peak_memory_bytes": peak_memory_bytes(world.device), "seconds": time.perf_counter() - begun}
    if world.is_main:
        folder.record("eval", results)
    world.barrier()


def _score(
    function: Callable[..., tuple[float, float]],
    model: GPT,
    config: RunConfig,
    tokens: torch.Tensor,
    table: ByteCounter,
    world: World,
) -> dict[str, float]:
    show = progress if world.is_main else None
    loss, bits = function(model, config, tokens, table, rank=world.rank, world_size=world.size, progress=show)
    if not math.isfinite(loss):
        raise FileError(f"the model's loss is {loss}")
    return {"loss": loss, "bits_per_byte": bits}


def run_ttt(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Score the artifact with test-time training."""
    if not config.ttt_enabled:
        world.log("test-time training is off (ttt_enabled)")
        return
    begun = time.perf_counter()
    reset_peak_memory(world.device)
    tokens, table = validation_data(config)
    model = model_with(config, world, load_artifact(config, folder, world))
    scored = test_time_training(
        model,
        config,
        tokens,
        table,
        rank=world.rank,
        world_size=world.size,
        progress=progress if world.is_main else None,
    )
    if world.is_main:
        results = {key: value for key, value in scored._asdict().items() if key != "token_nats"}
        results |= {"peak_memory_bytes": peak_memory_bytes(world.device), "seconds": time.perf_counter() - begun}
        folder.record("ttt", results)
        world.log(f"after test-time training: {scored.bits_per_byte:.5f} bits per byte")
    world.barrier()
