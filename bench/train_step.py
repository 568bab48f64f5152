"""Time a training step, our kernels against the references, in both loop states: ``python -m bench.train_step``.

Providers are `pgolf` (all kernels) and `reference` (plain PyTorch, torch.compile, FlashAttention-2), with and without
CUDA graphs, timed one after the other in the same process on the same random tokens, in documents of about 400.
Printed: the median time of a micro-batch (forward and backward) and of the optimizer's step with its average, tokens a
second of a whole step, peak memory; and for one micro-batch the time by families of kernels, with the time that the
chip's measured ceilings allow for each. Under torchrun tokens a second are those of a process, gradients reduced.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.compiled_model import compiled_blocks
from bench.results_files import add_options, describe, results_path, write
from bench.timing import chip_name, measure_ceilings
from pgolf.common.progress import format_bytes, format_table
from pgolf.common.runtime import World, peak_memory_bytes, reset_peak_memory, start_world, stop_world
from pgolf.config import PRESETS, RunConfig
from pgolf.data.loader import SEGMENT_ENTRIES, Batch, segment_boundaries
from pgolf.model.build import build_model
from pgolf.model.gpt import GPT
from pgolf.model.graphs import uses_graphs
from pgolf.training.gradient import MeanGradient
from pgolf.training.optim import ModelOptimizer

PROVIDERS = {
    "pgolf": dict(kernels="triton", cuda_graphs="on"),
    "pgolf_launched": dict(kernels="triton", cuda_graphs="off"),
    "reference": dict(kernels="reference", cuda_graphs="off"),
    "reference_graph": dict(kernels="reference", cuda_graphs="on"),
}
MEDIAN_DOCUMENT, SPREAD = 400, 0.8  # tokens, lognormal
FAMILIES = (  # by the kernels' names, the first that fits
    ("attention", r"flash|_attention_"),
    ("head", r"cross_entropy|softmax|nll_loss|log_softmax"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|_product|ping_pong|splitK|_gate_logits"),
    ("optimizer", r"newton_schulz|_tasks_kernel|multi_tensor|adam|_(place|momentum|apply|squares|sum|clip)_kernel"),
    ("communication", r"nccl"),
    ("copies", r"[Mm]emcpy|[Mm]emset"),
    ("between", r""),
)


def random_batch(config: RunConfig, device: torch.device) -> Batch:
    """A packed micro-batch of random tokens in documents of random lengths."""
    tokens = config.micro_batch_tokens
    ids = torch.randint(4, config.vocab_size, (1, tokens + 1))
    lengths = torch.empty(tokens // 16).log_normal_(torch.tensor(MEDIAN_DOCUMENT).log().item(), SPREAD)
    starts = lengths.long().clamp(min=16).cumsum(0)
    ids[0, 0] = ids[0, starts[starts < tokens]] = 1
    boundaries = segment_boundaries(ids[0, :-1], config.train_seq_len, pad_multiple=SEGMENT_ENTRIES)
    return Batch(ids[:, :-1], ids[:, 1:], boundaries, config.train_seq_len).to(device)


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of ``function`` with the device waited for, after two untimed calls."""
    return statistics.median([_timed(function, device)[1] for _ in range(repeats + 2)][2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_step(model: GPT, config: RunConfig, world: World, batch: Batch, repeats: int) -> dict[str, Any]:
    """Times of the model in its present loop state, seconds and tokens a second of this process."""
    optimizer = ModelOptimizer(model, config, world.size)
    averages = {name: value.detach().float().clone() for name, value in model.state_dict().items()}
    gradient = MeanGradient(model, config.gradient_accumulation(world.size), uses_graphs(config, model))

    def micro_batch() -> None:
        gradient([batch])

    def update() -> None:
        optimizer.step(1.0, config.muon_momentum, averages, config.ema_decay)

    def step() -> None:
        gradient([batch] * gradient.count)
        update()

    reset_peak_memory(world.device)
    first, launching = (_timed(micro_batch, world.device) for _ in range(2))
    # Steps first: products with the zeros that training starts from take less power, and so less time.
    whole = median_seconds(step, world.device, max(2, repeats // 2))
    compute = median_seconds(micro_batch, world.device, repeats)
    optimizing = median_seconds(update, world.device, repeats)
    result = {
        "step_seconds": whole,
        "tokens_per_s": gradient.count * config.micro_batch_tokens / whole,
        "micro_batch_seconds": compute,
        "optimizer_seconds": optimizing,
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "first_micro_batch_seconds": first[1],
        "launch_seconds": launching[0],  # of the CPU, until it has handed a micro-batch to the device
    }
    if world.device.type == "cuda":
        result["milliseconds_by_family"], result["kernels"] = by_family(step, gradient.count)
    return result


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds until ``function`` returns, and until the device has done what it was given."""
    begun = time.perf_counter()
    function()
    returned = time.perf_counter()
    _wait(device)
    return returned - begun, time.perf_counter() - begun


def by_family(step: Callable[[], None], count: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Milliseconds of a micro-batch in a step of ``count`` by family, and [ms, calls] of a step by kernel.

    ``idle`` is the time in which the device does nothing. The chip runs at its power limit, so kernels are as slow as
    they are within whole steps.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    families = dict.fromkeys((name for name, _ in FAMILIES), 0.0)
    idle = end = 0.0
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        begun, over = event.time_range.start, event.time_range.end
        idle += max(0.0, begun - end) if end else 0.0
        busy, end = max(0.0, over - max(begun, end)), max(end, over)
        families[next(name for name, pattern in FAMILIES if re.search(pattern, event.name))] += busy / 1e3 / count
        figures = kernels.setdefault(event.name[:120], [0.0, 0])
        figures[0], figures[1] = figures[0] + (over - begun) / 1e3, figures[1] + 1
    slowest = sorted(kernels.items(), key=lambda item: -item[1][0])
    return families | {"idle": idle / 1e3 / count}, dict(slowest[:60])


def floors(config: RunConfig, batch: Batch, looping: bool, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Least milliseconds by family: products and attention at the matrix rate, the rest at the copy rate.

    Between the products a layer reads or writes 22 tensors [T, d] at least if nothing is fused into a product:
    6 forward and 11 backward in the residual stream, 5 of the heads; the MLP's activations ride on its products.
    """
    tokens, d = batch.input_ids.numel(), config.model_dim
    layers = config.num_layers + (config.num_loops * (config.loop_end - config.loop_start + 1) if looping else 0)
    layer = 2 * d * d + 2 * d * config.num_kv_heads * config.head_dim + 2 * d * config.mlp_dim
    head = config.vocab_size * d
    lengths = batch.cu_seqlens.diff().double()
    pairs = float((lengths * (lengths + 1) / 2).sum())
    rate, copy = ceilings["matmul_tflop_per_s"] * 1e9, ceilings["copy_gb_per_s"] * 1e6
    return {
        "products": 6 * tokens * (layers * layer + head) / rate,
        "attention": layers * (4 + 10) * pairs * d / rate,
        "head": 2 * 2 * tokens * config.vocab_size / copy,
        "between": layers * 22 * 2 * tokens * d / copy,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line of the benchmark; returns what it prints."""
    parser = argparse.ArgumentParser("python -m bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="record")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, default=[], dest="providers")
    parser.add_argument("--repeats", type=int, default=10)
    add_options(parser, "train_step.json", ", of all providers by the preset record as it is")
    arguments = parser.parse_args(argv)
    settings = dict(pair.split("=", 1) for pair in arguments.settings)
    config = RunConfig.preset(arguments.preset).replace(**settings)
    world = start_world(config)
    ceilings = measure_ceilings(world.device, quick=world.device.type != "cuda")
    batch = random_batch(config, world.device)
    meta = {**describe("train_step", world.device, arguments.commit, world.size), "ceilings": ceilings}
    target = arguments.results
    if target is None and config == RunConfig.preset("record") and not arguments.providers:
        target = results_path(chip_name(world.device), "train_step", world.size)
    least = {case: floors(config, batch, case == "after_loop", ceilings) for case in ("before_loop", "after_loop")}
    rows: list[dict[str, Any]] = []
    results = {"meta": meta, "preset": arguments.preset, "floors_milliseconds": least, "rows": rows}
    for provider in arguments.providers or PROVIDERS:
        on_cpu = dict(kernels="reference", cuda_graphs="off")
        own = config.replace(**(PROVIDERS[provider] if world.device.type == "cuda" else on_cpu))
        model = build_model(own, world).train()
        compiled = own.kernels == "reference" and world.device.type == "cuda"
        for case, looping in (("before_loop", False), ("after_loop", True)):
            model.looping_active = looping
            with compiled_blocks() if compiled else nullcontext():
                figures = time_step(model, own, world, batch, arguments.repeats)
            rows.append({"case": case, "provider": provider, **figures})
            model.zero_grad(set_to_none=True)
            if world.is_main:  # whatever happens to the others
                write(target, **results)
        del model
        gc.collect()
    world.log(f"{meta['chip']}, torch {torch.__version__}\n{_table(rows)}\n\n{_family_table(rows, least)}")
    stop_world(world)
    return results


def _table(rows: list[dict[str, Any]]) -> str:
    reference = {row["case"]: row["tokens_per_s"] for row in rows if row["provider"] == "reference"}
    headers = (
        "case",
        "provider",
        "micro-batch ms",
        "optimizer ms",
        "tokens/s",
        "ratio",
        "peak memory",
        "first, s",
        "CPU, ms",
    )
    lines = [
        (
            row["case"],
            row["provider"],
            f"{row['micro_batch_seconds'] * 1e3:.1f}",
            f"{row['optimizer_seconds'] * 1e3:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / reference[row['case']]:.2f}" if row["case"] in reference else "",
            format_bytes(row["peak_memory_bytes"]),
            f"{row['first_micro_batch_seconds']:.1f}",
            f"{row['launch_seconds'] * 1e3:.0f}",
        )
        for row in sorted(rows, key=lambda row: row["case"] != "before_loop")
    ]
    return format_table(lines, headers)


def _family_table(rows: list[dict[str, Any]], least: Mapping[str, Mapping[str, float]]) -> str:
    measured = [row for row in rows if "milliseconds_by_family" in row]
    families = dict.fromkeys(name for row in measured for name in row["milliseconds_by_family"])
    lines = [
        (
            case,
            family,
            *(f"{row['milliseconds_by_family'][family]:.2f}" for row in measured if row["case"] == case),
            f"{least[case][family]:.2f}" if family in least[case] else "",
        )
        for case in least
        for family in families
    ]
    providers = list(dict.fromkeys(row["provider"] for row in measured))
    return format_table(lines, ("case", "ms of a micro-batch", *providers, "floor")) if lines else ""


if __name__ == "__main__":
    main()
