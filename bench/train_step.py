"""Time one training step of a preset, in both loop states: ``python -m bench.train_step --preset record``.

Random tokens in documents of about 400, packed as in training. Prints the median time of a micro-batch (forward and
backward), of the optimizer's step, tokens a second of a whole step, and peak memory; ``--json FILE`` keeps them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pgolf.config import PRESETS, RunConfig
from pgolf.loader import Batch, segment_boundaries
from pgolf.model import GPT
from pgolf.optim import ModelOptimizer
from pgolf.progress import format_bytes, format_table
from pgolf.runtime import World, describe_environment, peak_memory_bytes, reset_peak_memory, start_world
from pgolf.train import build_model

DOCUMENT_TOKENS = 400


def random_batch(config: RunConfig, device: torch.device) -> Batch:
    """A packed micro-batch of random tokens in documents of DOCUMENT_TOKENS."""
    ids = torch.randint(4, config.vocab_size, (1, config.micro_batch_tokens + 1))
    ids[0, ::DOCUMENT_TOKENS] = 1
    boundaries = segment_boundaries(ids[0, :-1], config.train_seq_len)
    return Batch(ids[:, :-1], ids[:, 1:], boundaries, config.train_seq_len).to(device)


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of ``function`` with the device waited for, after one untimed call."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def time_step(model: GPT, config: RunConfig, world: World, repeats: int) -> dict[str, float]:
    """Times of the model in its present loop state, seconds and tokens a second of this process."""
    optimizer = ModelOptimizer(model, config, world.size)
    batch = random_batch(config, world.device)

    def micro_batch() -> None:
        model(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen).backward()

    reset_peak_memory(world.device)
    compute = median_seconds(micro_batch, world.device, repeats)
    update = median_seconds(lambda: optimizer.step(1.0, config.muon_momentum), world.device, repeats)
    accumulation = config.gradient_accumulation(world.size)
    tokens = accumulation * config.micro_batch_tokens
    return {
        "micro_batch_seconds": compute,
        "optimizer_seconds": update,
        "tokens_per_s": tokens / (accumulation * compute + update),
        "peak_memory_bytes": peak_memory_bytes(world.device),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Command line of the benchmark; returns what it prints."""
    parser = argparse.ArgumentParser("python -m bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="record")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args(argv)
    config = RunConfig.preset(arguments.preset).replace(**dict(pair.split("=", 1) for pair in arguments.settings))
    world = start_world(config)
    model = build_model(config, world).train()
    cases: dict[str, dict[str, float]] = {}
    for name, looping in (("before_loop", False), ("after_loop", True)):
        model.looping_active = looping
        cases[name] = time_step(model, config, world, arguments.repeats)
    results = {"meta": describe_environment(world), "preset": arguments.preset, "cases": cases}
    headers = ("case", "micro-batch ms", "optimizer ms", "tokens/s", "peak memory")
    rows = [
        (
            name,
            f"{case['micro_batch_seconds'] * 1e3:.1f}",
            f"{case['optimizer_seconds'] * 1e3:.1f}",
            f"{case['tokens_per_s']:,.0f}",
            format_bytes(case["peak_memory_bytes"]),
        )
        for name, case in cases.items()
    ]
    print(f"{results['meta']['chip']}, torch {torch.__version__}\n{format_table(rows, headers)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
