"""How exact gradients are where a training has led: ``python -m bench.gradient_errors RUN_DIR``.

The averaged weights of a run (its last ones with ``ema_decay=0``) get the gradients of a few of its own micro-batches
from the kernels and from the compiled references, in the run's dtype (bfloat16 on a GPU), and from the references in
float32, whose products are not TF32's. Printed by group of parameters, before and after the loop's activation: the mean
over tensors of a gradient's relative error, and of the part of it along the gradient, <g - exact, exact> / <exact,
exact>. On a CPU, which has no kernels, the first column is the references' once more. A GPU needs some 100 GB for the
record model at 49,152 tokens.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from bench.compiled_model import compiled_blocks
from bench.results_files import add_options, describe, results_path, write
from bench.timing import chip_name
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_table
from pgolf.common.runtime import World, start_world
from pgolf.config import RunConfig
from pgolf.data.loader import Batch
from pgolf.model.build import build_model
from pgolf.model.gpt import GPT
from pgolf.model.weights import load_weights
from pgolf.training.train import start

Gradients = dict[str, torch.Tensor]
WAYS = {
    "kernels": dict(kernels="auto"),
    "references": dict(kernels="reference"),
    "float32": dict(kernels="reference", compute_dtype="float32", attention_backend="sdpa"),
}


def gradients(model: GPT, batch: Batch) -> Gradients:
    """Of the mean loss, float32 on the CPU; a bank is one tensor for each of its matrices."""
    model.zero_grad(set_to_none=True)
    model(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen).backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts = gradient.float().cpu().unbind() if name.endswith("_bank") else [gradient.float().cpu()]
        found |= {f"{name}.{i}" if len(parts) > 1 else name: part for i, part in enumerate(parts)}
    model.zero_grad(set_to_none=True)
    return found


def by_group(found: list[Gradients], exact: list[Gradients]) -> dict[str, tuple[float, float]]:
    """Relative error and its part along the gradient, over all micro-batches, mean over a group's tensors."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name in exact[0]:
        pairs = [(a[name].double(), b[name].double()) for a, b in zip(found, exact, strict=True)]
        size = sum(float(b.square().sum()) for _, b in pairs)
        if size:
            error = sum(float((a - b).square().sum()) for a, b in pairs)
            along = sum(float(((a - b) * b).sum()) for a, b in pairs)
            group = ".".join(
                part for part in name.split(".") if not part.isdecimal() and part not in ("blocks", "weight")
            )
            groups.setdefault(group, []).append(((error / size) ** 0.5, along / size))
    return {name: tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) for name, rows in groups.items()}


def _every_way(
    config: RunConfig, world: World, weights: Gradients, batches: list[Batch], looping: bool
) -> Iterator[tuple[str, list[Gradients]]]:
    for name, settings in WAYS.items():
        model = build_model(config.replace(**settings), world, weights).train()
        model.looping_active = looping
        with compiled_blocks() if name == "references" and world.device.type == "cuda" else nullcontext():
            found = [gradients(model, batch) for batch in batches]
        yield name, found
        del model
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """Command line; returns the figures by loop state, way and group."""
    parser = argparse.ArgumentParser("python -m bench.gradient_errors", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="a run that has been trained")
    parser.add_argument("--batches", type=int, default=3, help="micro-batches (default: 3)")
    add_options(parser, "gradient_errors.json")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.run_dir)
    config = folder.config()
    weights = load_weights(folder.need(folder.ema, "train"))
    world = start_world(config)
    torch.set_float32_matmul_precision("highest")  # a run allows TF32
    meta = describe("gradient_errors", world.device, arguments.commit)
    target = arguments.results or results_path(chip_name(world.device), "gradient_errors")
    loader = start(config, world).loader
    batches = [loader.next_batch() for _ in range(arguments.batches)]
    loader.close()
    results: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for looping in (False, True) if config.num_loops else (False,):
        found = dict(_every_way(config, world, weights, batches, looping))
        state = "after_loop" if looping else "before_loop"
        results[state] = {name: by_group(found[name], found["float32"]) for name in ("kernels", "references")}
        ways = results[state]
        rows = [
            (
                group,
                *(f"{way[group][0]:.5f}" for way in ways.values()),
                *(f"{way[group][1]:+.5f}" for way in ways.values()),
            )
            for group in ways["kernels"]
        ]
        headers = "gradients of", *(f"error of {way}" for way in ways), *(f"along, of {way}" for way in ways)
        print(f"{state}\n{format_table(rows, headers)}\n")
        write(target, meta, batches=arguments.batches, **results)
    return results


if __name__ == "__main__":
    main()
