"""The run, stage by stage: data, train, quantize, eval, ttt, report.

Every stage reads what the ones before it left in the run's folder, leaves its own, and puts its results into the
summary; `run_stages` does them in order and can skip what is done.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pgolf import artifact, evaluate
from pgolf.bpb import ByteTable
from pgolf.config import RunConfig
from pgolf.export import export_program
from pgolf.files import FileError, remove_leftovers, write_aside
from pgolf.folder import RunFolder
from pgolf.kernels.common.backend import set_backend
from pgolf.kernels.common.compiling import compiling_ahead
from pgolf.loader import calibration_batches
from pgolf.manifest import check_dataset, check_unchanged
from pgolf.model import GPT, rebank, unbank
from pgolf.progress import format_bytes, format_duration, progress
from pgolf.quantize import collect_hessians, dequantize_model, quantize_model
from pgolf.results import summary_table
from pgolf.runtime import Interrupted, World, on_terminate, peak_memory_bytes, reset_peak_memory
from pgolf.shards import dataset_dir, shard_files, tokenizer_path
from pgolf.train import build_model, load_weights, train, validation_data
from pgolf.ttt import test_time_training


def run_data(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Check every shard and the tokenizer; build them first from the embedded corpus where the settings say so.

    What the later stages need to know the files again goes into the summary.
    """
    begun = time.perf_counter()
    if world.is_main:
        if config.data_source == "embedded" and not dataset_dir(config.data_dir, config.vocab_size).is_dir():
            from pgolf.dataset import build_embedded  # here, as the exported program goes without it

            build_embedded(config.data_dir, config.vocab_size)
        results, files = check_data(config)
        write_aside(folder.tokenizer, tokenizer_path(config.data_dir, config.vocab_size).read_bytes())
        folder.record("data", {**results, "seconds": time.perf_counter() - begun, "files": files})
        world.log(f"{results['train_tokens']:,} training and {results['val_tokens']:,} validation tokens")
    world.barrier()


def check_data(config: RunConfig) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """See `pgolf.manifest.check_dataset`; ``val_tokens`` and ``val_bytes`` are of the documents that are scored."""
    show = partial(progress, description="checking")
    counts, files = check_dataset(config.data_dir, config.vocab_size, show)
    tokens, table = validation_data(config)
    counted = table.count(tokens[:-1].long(), tokens[1:].long()).sum()
    return {**counts, "val_tokens": tokens.numel(), "val_bytes": int(counted)}, files


def run_train(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Train; see `pgolf.train.train`."""
    train(config, folder, world, resume)


def run_quantize(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Calibrate, quantise on rank 0, write the artifact and the program, and hold them against the cap."""
    begun = time.perf_counter()
    reset_peak_memory(world.device)
    weights = world.on_main(lambda: load_weights(folder.need(folder.ema, "train"), config))
    hessians = calibrate(config, world, weights)
    results: dict[str, Any] = {"hessian_seconds": time.perf_counter() - begun}
    if world.is_main:
        results |= _quantize_and_save(config, folder, world, weights, hessians)
        results |= {"peak_memory_bytes": peak_memory_bytes(world.device), "seconds": time.perf_counter() - begun}
        folder.record("quantize", results)
        size = artifact.ArtifactSize(results["weight_bytes"], results["code_bytes"])
        world.log(f"artifact: {size.total_bytes:,} of {size.cap_bytes:,} bytes ({size.share:.2%})")
        size.check()
    world.barrier()


def calibrate(config: RunConfig, world: World, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hessians of the products' inputs, averaged over all ranks' calibration batches."""
    model = _model_with(config, world, weights)
    batches = calibration_batches(
        shard_files(config.data_dir, config.vocab_size, "train"),
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


def _quantize_and_save(
    config: RunConfig, folder: RunFolder, world: World, weights: dict, hessians: dict
) -> dict[str, Any]:
    begun = time.perf_counter()
    quantized = quantize_model(unbank(weights, config.num_layers), hessians, config, world.device)
    solved = time.perf_counter()
    path = folder.artifact(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    world.log(f"compressing with {config.compressor}")
    weight_bytes = artifact.save(path, quantized, config.compressor)
    compressed = time.perf_counter()
    code_bytes = export_program(folder.program, config)
    return {
        "gptq_seconds": solved - begun,
        "compress_seconds": compressed - solved,
        "weight_bytes": weight_bytes,
        "code_bytes": code_bytes,
        "total_bytes": weight_bytes + code_bytes,
        "cap_bytes": artifact.CAP_BYTES,
        "bytes_by_class": artifact.bytes_by_class(quantized),
        "lqer_tensors": [name for name, mark in quantized.meta.items() if "+lqer" in mark],
    }


def run_eval(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Score the weights before quantisation and the artifact, every validation token once."""
    begun = time.perf_counter()
    reset_peak_memory(world.device)
    tokens, table = validation_data(config)
    before = world.on_main(lambda: load_weights(folder.need(folder.ema, "train"), config))
    quantized = load_artifact(config, folder, world)
    results: dict[str, Any] = {}
    for name, weights in (("before", before), ("quantized", quantized)):
        started = time.perf_counter()
        model = _model_with(config, world, weights)
        results[name] = _score(evaluate.evaluate_packed, model, config, tokens, table, world)
        results[name]["seconds"] = time.perf_counter() - started
        world.log(f"{name}: {results[name]['bits_per_byte']:.5f} bits per byte")
    if config.sliding_window_enabled:
        results["sliding"] = _score(evaluate.evaluate_sliding, model, config, tokens, table, world)
    results |= {"peak_memory_bytes": peak_memory_bytes(world.device), "seconds": time.perf_counter() - begun}
    if world.is_main:
        folder.record("eval", results)
    world.barrier()


def _score(
    function: Callable, model: GPT, config: RunConfig, tokens: torch.Tensor, table: ByteTable, world: World
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
    model = _model_with(config, world, load_artifact(config, folder, world))
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


def run_report(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Write the report and print the table of results."""
    if world.is_main:
        try:
            world.log(f"\n{summary_table(folder.summary())}\n")
            from pgolf.report import write_report  # here, as the exported program lacks it

            world.log(f"report: {write_report(folder.path)}")
        except ModuleNotFoundError:
            world.log(f"the report's page is not part of this program: pgolf report --run-dir {folder.path}")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, FileError):
                raise
            shown = f"{type(error).__name__}: {error}"
            raise FileError(f"{folder.summary_file} or {folder.metrics} is damaged or incomplete ({shown})") from error
    world.barrier()


def load_artifact(config: RunConfig, folder: RunFolder, world: World) -> dict[str, torch.Tensor]:
    """The artifact's weights by state-dict name: rank 0 reads them, and every rank dequantises them on its device."""
    set_backend(config.kernels)
    with torch.device("meta"):
        weights = GPT(config).state_dict()
    # Not empty_like: of a meta tensor it loads sympy, which takes seconds.
    template = {name: torch.empty(like.shape, dtype=like.dtype, device=world.device) for name, like in weights.items()}
    quantized = world.on_main(lambda: artifact.load(folder.need(folder.artifact(config), "quantize")))
    if world.device.type == "cuda":
        with compiling_ahead():  # one kernel after the other they would take seconds
            dequantize_model(quantized, unbank(template, config.num_layers))
    return rebank(dequantize_model(quantized, unbank(template, config.num_layers)), template)


def _model_with(config: RunConfig, world: World, weights: dict[str, torch.Tensor]) -> GPT:
    """A model with the given weights, as it is after training: looping, in eval mode."""
    model = build_model(config, world, weights)
    model.looping_active = config.num_loops > 0
    return model.eval()


STAGES: dict[str, Callable[[RunConfig, RunFolder, World, bool], None]] = {
    "data": run_data,
    "train": run_train,
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


def clear(folder: Path) -> None:
    """Delete what an earlier run left in its folder, and nothing else."""
    for path in RunFolder(folder).files():
        path.unlink(missing_ok=True)
