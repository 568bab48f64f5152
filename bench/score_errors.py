"""How exact scores are: ``python -m bench.score_errors --run-dir DIR --data-dir DIR``.

A run's artifact is scored by the kernels and by the references in the run's dtype (bfloat16 on a GPU), and by the
references in float32, whose products are not TF32's: once as a fixed model, once with test-time training without
phases. References launch every operation by itself, so that test-time training of all documents would take them an
hour: ``--batches`` names those that are compared.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.results_files import add_options, describe, results_path, write
from bench.timing import chip_name
from pgolf.artifact.weights import load_artifact
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_table, progress
from pgolf.common.runtime import World, start_world
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter
from pgolf.data.validation import validation_data
from pgolf.model.build import build_model
from pgolf.scoring.evaluate import evaluate_packed
from pgolf.scoring.ttt import engine

WAYS = {
    "float32": dict(kernels="reference", compute_dtype="float32", attention_backend="sdpa"),
    "kernels": dict(kernels="auto"),
    "references": dict(kernels="reference"),
}


def losses(
    config: RunConfig, weights: dict[str, Tensor], world: World, tokens: Tensor, table: ByteCounter
) -> tuple[float, Tensor]:
    """Score as a fixed model, and with test-time training: mean nats, and nats by target (NaN where not scored)."""
    model = build_model(config, world, weights)
    model.looping_active = config.num_loops > 0
    mean, _ = evaluate_packed(model.eval(), config, tokens, table)
    return mean, engine.test_time_training(model, config, tokens, table, progress=progress).token_nats.double()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the results."""
    parser = argparse.ArgumentParser("python -m bench.score_errors", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="a run with an artifact")
    parser.add_argument("--data-dir", help="folder with datasets/ and tokenizers/ (default: the run's)")
    parser.add_argument("--batches", default="1,4,7", help="of test-time training (default: 1,4,7)")
    add_options(parser, "score_errors.json")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.run_dir)
    config = folder.config().replace(ttt_eval_batches=arguments.batches, phased_ttt_enabled=False)
    config = config.replace(**({"data_dir": arguments.data_dir} if arguments.data_dir else {}))
    world = start_world(config)
    torch.set_float32_matmul_precision("highest")  # a run allows TF32
    weights = load_artifact(config, folder, world)
    tokens, table = validation_data(config)
    target = arguments.results or results_path(chip_name(world.device), "score_errors")
    results: dict[str, Any] = {
        "meta": describe("score_errors", world.device, arguments.commit),
        "batches": arguments.batches,
        "rows": [],
    }
    for name, settings in WAYS.items():
        begun = time.perf_counter()
        mean, nats = losses(config.replace(**settings), weights, world, tokens, table)
        if name == "float32":
            exact_mean, exact = mean, nats
        error = (nats - exact)[~exact.isnan()]
        results["rows"].append(
            {
                "way": name,
                "seconds": time.perf_counter() - begun,
                "evaluation": {"loss": mean, "error": mean - exact_mean},
                "test_time_training": {
                    "targets": error.numel(),
                    "loss": float(nats[~nats.isnan()].mean()),
                    "error": float(error.mean()),
                    "rms_error": float(error.square().mean().sqrt()),
                },
            }
        )
        write(target, **results)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    headers = "way", "evaluation", "error", "test-time training", "error", "rms of a target's"
    lines = [
        (
            row["way"],
            f"{row['evaluation']['loss']:.6f}",
            f"{row['evaluation']['error']:+.2e}",
            f"{row['test_time_training']['loss']:.6f}",
            f"{row['test_time_training']['error']:+.2e}",
            f"{row['test_time_training']['rms_error']:.1e}",
        )
        for row in results["rows"]
    ]
    print(
        f"nats of a target, {tokens.numel() - 1:,} targets, of test-time training "
        f"{results['rows'][0]['test_time_training']['targets']:,}\n{format_table(lines, headers)}"
    )
    return results


if __name__ == "__main__":
    main()
