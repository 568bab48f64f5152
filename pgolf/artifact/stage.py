"""The stage ``quantize``: calibrate, quantise, write the artifact and the program, and check them against the cap.

Sensitivities stay in the run's folder for `pgolf inspect`; no other stage reads them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pgolf.artifact.container import CAP_BYTES, content
from pgolf.artifact.hessians import collect_hessians
from pgolf.artifact.quantize import quantize_model
from pgolf.artifact.rate import prepare, quantize_to_fit
from pgolf.artifact.sensitivity import Sensitivities, collect_sensitivities
from pgolf.artifact.sizes import ArtifactSize, bytes_by_class
from pgolf.common.files import remove_leftovers, write_aside
from pgolf.common.folder import RunFolder
from pgolf.common.runtime import World, peak_memory_bytes, reset_peak_memory
from pgolf.common.tensors import save_tensors
from pgolf.config import RunConfig
from pgolf.data.loader import calibration_batches
from pgolf.data.shards import read_shard, shard_files
from pgolf.model.build import model_with
from pgolf.model.gpt import GPT
from pgolf.model.weights import load_weights, unbank
from pgolf.submission.export import exported_program

SENSITIVITY_TOKENS = 10_000_000  # of the first training shard: where sequences come from, and tokens' frequencies


def run_quantize(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Calibrate; on rank 0 quantise, and write the artifact and the program.

    Raises ArtifactError, after writing them, if they exceed the cap.
    """
    begun = time.perf_counter()
    reset_peak_memory(world.device)
    weights = world.on_main(lambda: load_weights(folder.need(folder.ema, "train"), config))
    model = model_with(config, world, weights)
    started = time.perf_counter()
    hessians = calibrate(model, config, world)
    results: dict[str, Any] = {"hessian_seconds": time.perf_counter() - started}
    sensitivities = None
    if config.quantizer == "trellis":
        started = time.perf_counter()
        sensitivities = collect_sensitivities(model, config, sensitivity_tokens(config), world)
        save_tensors(folder.sensitivities, sensitivities._asdict(), world)
        results["sensitivity_seconds"] = time.perf_counter() - started
    del model
    if world.is_main:
        if sensitivities is None:
            folder.sensitivities.unlink(missing_ok=True)  # of an earlier quantisation, with the other quantizer
        results |= _quantize_and_save(config, folder, world, weights, hessians, sensitivities)
        results |= {"peak_memory_bytes": peak_memory_bytes(world.device), "seconds": time.perf_counter() - begun}
        folder.record("quantize", results)
        size = ArtifactSize(results["weight_bytes"], results["code_bytes"])
        world.log(f"artifact: {size.total_bytes:,} of {size.cap_bytes:,} bytes ({size.share:.2%})")
        size.check()
    world.barrier()


def calibrate(model: GPT, config: RunConfig, world: World) -> dict[str, torch.Tensor]:
    """Return the Hessians of the products' inputs, averaged over all ranks' calibration batches."""
    batches = calibration_batches(
        _training_files(config),
        tokens=config.gptq_calibration_tokens,
        max_segment=config.train_seq_len,
        count=config.gptq_calibration_batches,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        seed=config.seed,
        documents=config.gptq_calibration_documents,
    )
    return collect_hessians(model, batches)


def sensitivity_tokens(config: RunConfig) -> torch.Tensor:
    """Return the training tokens from which sequences for sensitivities are taken: a shard's first, or all of them."""
    return torch.from_numpy(read_shard(_training_files(config)[0], config.vocab_size)[:SENSITIVITY_TOKENS].copy())


def _training_files(config: RunConfig) -> list[Path]:
    return shard_files(config.data_dir, config.vocab_size, "train")


def _quantize_and_save(
    config: RunConfig,
    folder: RunFolder,
    world: World,
    weights: dict[str, torch.Tensor],
    hessians: dict[str, torch.Tensor],
    sensitivities: Sensitivities | None,
) -> dict[str, Any]:
    path = folder.artifact(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    begun = time.perf_counter()
    code = exported_program(config)
    tensors, seconds = unbank(weights, config.num_layers), {"export_seconds": time.perf_counter() - begun}
    begun = time.perf_counter()
    if sensitivities is None:
        quantized = quantize_model(tensors, hessians, config, world.device)
        seconds["quantize_seconds"] = time.perf_counter() - begun
        world.log(f"writing the artifact with {config.compressor}")
        begun = time.perf_counter()
        blob = content(path, quantized, config.compressor)
        seconds["compress_seconds"] = time.perf_counter() - begun
    else:
        matrices = prepare(tensors, hessians, sensitivities, config, world.device)
        seconds["prepare_seconds"] = time.perf_counter() - begun
        target = config.weight_bytes or CAP_BYTES - len(code)
        fitted = quantize_to_fit(tensors, matrices, config, world.device, path, target)
        quantized, blob = fitted.quantized, fitted.blob
        seconds |= {"quantize_seconds": fitted.code_seconds, "compress_seconds": fitted.file_seconds}
    write_aside(path, blob)
    write_aside(folder.program, code)
    return seconds | {
        "weight_bytes": len(blob),
        "code_bytes": len(code),
        "total_bytes": len(blob) + len(code),
        "cap_bytes": CAP_BYTES,
        "bytes_by_class": bytes_by_class(quantized),
        "lqer_tensors": [name for name, mark in quantized.meta.items() if "+lqer" in mark],
    }
