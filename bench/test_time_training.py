"""Time test-time training by document length: ``python -m bench.test_time_training``.

Each batch holds ttt_batch_size documents of one length and is scored without phases. The time counts from the first
chunk to the last; kernels are compiled and graphs captured before, once for all lengths. The floor is the arithmetic
of the matrices at the matrix rate that the chip reaches in the same run. From the times follow tokens a second on
FineWeb's mix of lengths, and the seconds of the whole validation split on 8 GPUs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.results_files import add_options, describe, results_path, write
from bench.timing import chip_name, measure_ceilings
from pgolf.artifact.weights import load_artifact
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_bytes, format_table
from pgolf.common.runtime import peak_memory_bytes, reset_peak_memory, start_world
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteTable
from pgolf.data.shards import BOS_ID, read_shard, shard_files
from pgolf.model.build import build_model
from pgolf.model.gpt import GPT
from pgolf.scoring.ttt import engine

LENGTHS = (150, 250, 424, 800, 1440, 2600, 5700)  # tokens, BOS included
QUICK_LENGTHS, QUICK_DOCUMENTS = (20, 100), 4
DOCUMENT_LENGTHS = Path(__file__).with_name("document_lengths.json")
SPLIT_TARGETS, GPUS = 40_540_802, 8  # FineWeb's whole validation split, on the challenge's machine
FLOP_PER_WEIGHT = 4  # and window token: a product forward, one backward to the activations
SPREAD = 0.02  # standard deviation of random weights: products with zeros take less power, and so less time


def documents_of_length(length: int, count: int, vocab_size: int, text: np.ndarray | None = None) -> torch.Tensor:
    """Make a stream of ``count`` documents of ``length`` tokens: BOS and random ids, or BOS and pieces of ``text``."""
    if text is None:
        body = np.random.default_rng(length).integers(4, vocab_size, (count, length - 1))
    else:
        body = np.resize(text, (count, length - 1))
    return torch.from_numpy(np.insert(body.astype(np.int32), 0, BOS_ID, axis=1)).flatten()


def window_tokens(targets: int, config: RunConfig) -> int:
    """Count the tokens of all chunks' windows of a document with so many targets."""
    ends = np.arange(config.ttt_chunk_size, targets + config.ttt_chunk_size, config.ttt_chunk_size)
    return int(np.minimum(ends, targets).clip(max=config.ttt_eval_seq_len).sum())


def matrix_weights(config: RunConfig, passes: int) -> int:
    """Count the matrices' weights that a token meets in ``passes`` layers."""
    d = config.model_dim
    return passes * (2 * d * d + 2 * d * config.num_kv_heads * config.head_dim + 2 * d * config.mlp_dim)


def floor_seconds(length: int, model: GPT, config: RunConfig, tflop_per_s: float) -> float:
    """Compute the least seconds of one batch, from the products' arithmetic alone."""
    passes = sum(len(part) for part in model.execution_lists(looping=config.num_loops > 0))
    tokens = config.ttt_batch_size * window_tokens(length, config)
    return FLOP_PER_WEIGHT * matrix_weights(config, passes) * tokens / (tflop_per_s * 1e12)


def time_lengths(
    model: GPT,
    config: RunConfig,
    lengths: Sequence[int],
    tflop_per_s: float,
    report: Callable[[dict[str, Any]], None],
    text: np.ndarray | None = None,
) -> None:
    """Score one batch of documents of each length, the longest first, and report what each takes when it is done."""
    device = next(model.parameters()).device
    config = config.replace(phased_ttt_enabled=False, ttt_eval_batches="", ttt_lanes=1)
    count, left = config.ttt_batch_size, sorted(lengths)
    tokens = torch.cat([documents_of_length(length, count, config.vocab_size, text) for length in left])
    no_flags = [False] * config.vocab_size
    table = ByteTable([1] * config.vocab_size, no_flags, no_flags)  # bytes do not matter here

    def watch(steps: Iterable[None], **_: Any) -> Iterator[None]:
        setup, begun, chunks = time.perf_counter() - called, time.perf_counter(), 0
        for step in steps:
            chunks += 1
            # A document's last target is the next one's BOS, so there are as many as tokens.
            if chunks == -(-left[-1] // config.ttt_chunk_size):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                length, chunks, seconds = left.pop(), 0, time.perf_counter() - begun
                floor = floor_seconds(length, model, config, tflop_per_s)
                report(
                    {
                        "length": length,
                        "documents": count,
                        "seconds": seconds,
                        "tokens_per_s": length * count / seconds,
                        "window_tokens": count * window_tokens(length, config),
                        "floor_seconds": floor,
                        "floor_share": floor / seconds,
                        "setup_seconds": setup,
                        "peak_memory_bytes": peak_memory_bytes(device),
                    }
                )
                begun = time.perf_counter()
            yield step

    reset_peak_memory(device)
    called = time.perf_counter()
    engine.test_time_training(model, config, tokens, table, progress=watch)


def predict(seconds_per_token: Mapping[int, float], documents: Sequence[int]) -> dict[str, float]:
    """Predict the speed on ``documents`` (their lengths) from the seconds a token of some lengths.

    Each document takes the seconds a token of the length that is nearest to its own in the logarithm.
    """
    known, lengths = np.array(list(seconds_per_token)), np.array(documents)
    nearest = np.abs(np.log(lengths[:, None] / known)).argmin(1)
    per_token = (lengths * np.array(list(seconds_per_token.values()))[nearest]).sum() / lengths.sum()
    return {
        "tokens_per_s": float(1 / per_token),
        "full_split_seconds_on_8_gpus": float(SPLIT_TARGETS * per_token / GPUS),
    }


def fineweb_lengths() -> list[int]:
    """Read the lengths of FineWeb's first 601 validation documents, in tokens."""
    return json.loads(DOCUMENT_LENGTHS.read_text(encoding="utf-8"))["tokens"]


def fill_randomly(model: GPT) -> None:
    """Draw the matrices that a fresh model starts at zero, so that every product computes something."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_bank"):
                weight.normal_(std=SPREAD)


def read_text(data_dir: str, vocab_size: int) -> np.ndarray:
    """Read the validation tokens without their BOS."""
    tokens = np.concatenate([read_shard(path, vocab_size) for path in shard_files(data_dir, vocab_size, "val")])
    return tokens[tokens != BOS_ID]


def main(argv: list[str] | None = None, config: RunConfig | None = None) -> dict[str, Any]:
    """Run the command line and return the results; ``config`` takes the place of the record preset."""
    parser = argparse.ArgumentParser("python -m bench.test_time_training", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="cut the documents from this validation split (default: random tokens)")
    parser.add_argument("--run-dir", help="score with this run's artifact and settings (default: random weights)")
    parser.add_argument("--lengths", help=f"tokens of the documents (default: {','.join(map(str, LENGTHS))})")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--quick", action="store_true", help="a few short documents: a smoke test")
    add_options(parser, "test_time_training.json")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.run_dir) if arguments.run_dir else None
    config = config or (folder.config() if folder else RunConfig.preset("record"))
    if arguments.quick:
        config = config.replace(ttt_batch_size=QUICK_DOCUMENTS)
    config = config.replace(**dict(pair.split("=", 1) for pair in arguments.settings))
    lengths = [int(part) for part in arguments.lengths.split(",")] if arguments.lengths else LENGTHS
    if arguments.quick and not arguments.lengths:
        lengths = QUICK_LENGTHS
    world = start_world(config)
    ceilings = measure_ceilings(world.device, arguments.quick)
    gc.collect()
    model = build_model(config, world, folder and load_artifact(config, folder, world))
    if not folder:
        fill_randomly(model)
    text = read_text(arguments.data_dir, config.vocab_size) if arguments.data_dir else None

    target = arguments.results
    if target is None and not arguments.quick:
        target = results_path(chip_name(world.device), "test_time_training")
    meta = {**describe("test_time_training", world.device, arguments.commit), "ceilings": ceilings}
    meta |= {"weights": "artifact" if folder else "random", "tokens": "random" if text is None else "validation"}
    results: dict[str, Any] = {"meta": meta, "mix": None, "rows": []}

    def report(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        print(f"{row['length']:,} tokens: {row['seconds']:.3f} s", flush=True)
        if len(results["rows"]) == len(lengths):
            per_token = {row["length"]: 1 / row["tokens_per_s"] for row in results["rows"]}
            results["mix"] = predict(per_token, fineweb_lengths())
        write(target, **results)

    time_lengths(model, config, lengths, ceilings["matmul_tflop_per_s"], report, text)
    print(f"\n{meta['chip']}, {ceilings['matmul_tflop_per_s']:,.4g} TFLOP/s in products\n{_table(results)}")
    return results


def _table(results: dict[str, Any]) -> str:
    headers = ("length", "seconds", "setup", "tokens/s", "floor, s", "of floor", "peak memory")
    lines = [
        (
            f"{row['length']:,}",
            f"{row['seconds']:.3f}",
            f"{row['setup_seconds']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['floor_seconds']:.3f}",
            f"{row['floor_share']:.1%}",
            format_bytes(row["peak_memory_bytes"]),
        )
        for row in results["rows"]
    ]
    mix = results["mix"]
    return (
        f"{format_table(lines, headers)}\n\nFineWeb's mix: {mix['tokens_per_s']:,.0f} tokens/s; "
        f"the full split on {GPUS} GPUs: {mix['full_split_seconds_on_8_gpus']:,.1f} s"
    )


if __name__ == "__main__":
    main()
    sys.exit(0)
