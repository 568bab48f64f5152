"""What settings of test-time training earn and cost: ``python -m bench.ttt_variants --run-dir DIR --data-dir DIR``.

A run's artifact is scored on the validation documents once for each variant. Variants are compared in pairs on the
same documents: the standard error of a difference is that of a bootstrap over documents. Seconds are those of one
process from the first score to the last; compiling and capturing come before. ``--variant`` adds one or, alone, names
a few of the table.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.results_files import add_options, describe, results_path, write
from bench.timing import chip_name
from pgolf.artifact.weights import load_artifact
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_bytes, format_table, progress
from pgolf.common.runtime import World, peak_memory_bytes, reset_peak_memory, start_world
from pgolf.config import FIELDS, RunConfig
from pgolf.data.bpb import ByteCounter
from pgolf.data.validation import validation_data
from pgolf.model.build import build_model
from pgolf.scoring.stream import find_documents
from pgolf.scoring.ttt import engine

BASE = "no phases"  # what others are compared with: phases add seconds that do not depend on the variant
NO_PHASES = dict(phased_ttt_enabled=False)
BY_LENGTH = dict(ttt_chunks_by_length="256:8,2000:24")
KV_CACHE = dict(ttt_kv_cache=True)
NO_QV = dict(ttt_q_lora=False, ttt_v_lora=False)
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: NO_PHASES,
    "record": {},
    "chunks by length": NO_PHASES | BY_LENGTH,
    "no q, v": NO_PHASES | NO_QV,
    "context 2,560": NO_PHASES | dict(ttt_eval_seq_len=2560),
    "context 4,096": NO_PHASES | dict(ttt_eval_seq_len=4096),
    "one lane": NO_PHASES | dict(ttt_lanes=1),
    "one lane, cold A": NO_PHASES | dict(ttt_lanes=1, ttt_warm_start_a=False),
    "chunks by length, context 2,560": NO_PHASES | BY_LENGTH | dict(ttt_eval_seq_len=2560),
    "chunk 16": NO_PHASES | dict(ttt_chunk_size=16),
    "targets by confidence": NO_PHASES | dict(ttt_conf_weighted=True),
    "n-gram tilt": NO_PHASES | dict(ngram_tilt_boost=2.625),
    "n-gram tilt, 8 tokens": NO_PHASES | dict(ngram_tilt_boost=2.0, ngram_tilt_order=8),
    "rank 192, decay 2": NO_PHASES | dict(ttt_lora_rank=192, ttt_lora_alpha=216.0, ttt_weight_decay=2.0),
    "kv cache": NO_PHASES | KV_CACHE,
    "kv cache, context 8,192": NO_PHASES | KV_CACHE | dict(ttt_eval_seq_len=8192),
    "kv cache, chunk 16": NO_PHASES | KV_CACHE | dict(ttt_chunk_size=16),
    "kv cache, chunks by length": NO_PHASES | KV_CACHE | BY_LENGTH,
}
RESAMPLES = 10_000


def paired_difference(nats: np.ndarray, base: np.ndarray, byte_counts: np.ndarray) -> tuple[float, float]:
    """Compute bits per byte over ``base``'s, and the bootstrap standard error; arguments by document."""
    bits, rng = (nats - base) / np.log(2.0), np.random.default_rng(0)
    drawn = rng.integers(len(bits), size=(RESAMPLES, len(bits)))
    resampled = bits[drawn].sum(1) / byte_counts[drawn].sum(1)
    return float(bits.sum() / byte_counts.sum()), float(resampled.std())


def score(
    config: RunConfig, weights: Mapping[str, torch.Tensor], world: World, tokens: torch.Tensor, table: ByteCounter
) -> tuple[dict[str, Any], np.ndarray]:
    """Score the documents; returns what the table needs, and the nats of each document."""
    model = build_model(config, world, weights)
    reset_peak_memory(world.device)
    begun = time.perf_counter()
    scored = engine.test_time_training(model, config, tokens, table, progress=progress)
    seconds = time.perf_counter() - begun
    starts, _ = find_documents(tokens)
    row = {
        "bits_per_byte": scored.bits_per_byte,
        "seconds": seconds - scored.first_score_seconds,
        "first_score_seconds": scored.first_score_seconds,
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "tokens": scored.tokens,
    }
    del model
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return row, np.add.reduceat(scored.token_nats.double().numpy(), starts)


def _variant(text: str) -> tuple[str, dict[str, Any]]:
    name, given, settings = text.partition(":")
    if given:
        pairs = [pair.strip().partition("=") for pair in settings.split(";") if pair.strip()]
        if wrong := [setting for setting, equal, _ in pairs if not equal or setting not in FIELDS]:
            raise argparse.ArgumentTypeError(f"NAME: SETTING=VALUE; ... names settings, and {wrong[0]!r} is none")
        return name.strip(), {setting: value for setting, _, value in pairs}
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(
            f"no variant {name!r}; there are {'; '.join(VARIANTS)}, or NAME: SETTING=VALUE"
        )
    return name, VARIANTS[name]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the results."""
    parser = argparse.ArgumentParser("python -m bench.ttt_variants", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="a run with an artifact")
    parser.add_argument("--data-dir", help="folder with datasets/ and tokenizers/ (default: the run's)")
    parser.add_argument(
        "--variant",
        type=_variant,
        action="append",
        metavar="NAME[: SETTING=VALUE; ...]",
        help=f"one of the table or another, instead of all; the first is always '{BASE}'; repeatable",
    )
    add_options(parser, "ttt_variants.json")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.run_dir)
    config = folder.config().replace(**({"data_dir": arguments.data_dir} if arguments.data_dir else {}))
    variants = {BASE: NO_PHASES} | dict(arguments.variant or VARIANTS)
    world = start_world(config)
    weights = load_artifact(config, folder, world)
    tokens, table = validation_data(config)
    starts, lengths = find_documents(tokens)
    byte_counts = np.add.reduceat(table.of_stream(tokens).numpy(), starts, dtype=np.int64)
    target = arguments.results or results_path(chip_name(world.device), "ttt_variants")
    meta = {
        **describe("ttt_variants", world.device, arguments.commit),
        "documents": len(starts),
        "train": folder.summary().get("train"),
    }
    results: dict[str, Any] = {"meta": meta, "rows": []}
    base = None
    for name, settings in variants.items():
        row, nats = score(config.replace(**settings), weights, world, tokens, table)
        base = nats if base is None else base
        difference, error = paired_difference(nats, base, byte_counts)
        results["rows"].append(
            {"variant": name, "settings": settings, **row, "difference": difference, "standard_error": error}
        )
        print(f"{name}: {row['bits_per_byte']:.5f} bits per byte, {row['seconds']:.1f} s", flush=True)
        write(target, **results)
    print(f"\n{meta['chip']}, {len(starts)} documents\n{variants_table(results)}")
    return results


def variants_table(results: Mapping[str, Any]) -> str:
    """The results for a reader."""
    headers = ("variant", "bits per byte", f"over '{BASE}'", "± error", "seconds", "before", "peak memory")
    lines = [
        (
            row["variant"],
            f"{row['bits_per_byte']:.5f}",
            f"{row['difference']:+.5f}",
            f"{row['standard_error']:.5f}",
            f"{row['seconds']:.1f}",
            f"{row['first_score_seconds']:.1f}",
            format_bytes(row["peak_memory_bytes"]),
        )
        for row in results["rows"]
    ]
    return format_table(lines, headers)


if __name__ == "__main__":
    main()
