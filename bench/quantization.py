"""What quantisation costs by its bytes: ``python -m bench.quantization --run-dir DIR --data-dir DIR``.

A run's averaged weights are quantised in several ways, each with one part more than the one before, to several sizes,
and scored on the validation documents; ``tax`` is bits per byte over those of the weights themselves, and its error is
that of a bootstrap over documents. Sizes are those of a ``.pgolf`` file with everything in it. PR #1874's rule has no
size to aim at: its steps are multiplied. ``--ttt`` also scores with test-time training, without phases. ``--times``
measures what the record's way and PR #1874's take. ``--tune`` also trains the tensors that are not quantised on
training data afterwards, at the first size; what that takes off the tax is no error of quantisation, but what the
average left to gain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.results_files import add_options, describe, results_path, write
from bench.timing import chip_name
from bench.ttt_variants import paired_difference
from pgolf.artifact import packed_format, public_format
from pgolf.artifact.code_length import packed_size
from pgolf.artifact.quantize import dequantize_model, quantize_model
from pgolf.artifact.quantized import QuantizedModel
from pgolf.artifact.rate import prepare, quantize_by_rate
from pgolf.artifact.sensitivity import Sensitivities, collect_sensitivities
from pgolf.artifact.stage import calibrate, sensitivity_tokens
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_table
from pgolf.common.runtime import World, start_world
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter
from pgolf.data.loader import DocumentPackingLoader, segment_boundaries
from pgolf.data.shards import shard_files
from pgolf.data.validation import validation_data
from pgolf.model.build import model_with
from pgolf.model.gpt import GPT
from pgolf.model.weights import load_weights, rebank, unbank
from pgolf.scoring.stream import PUBLIC_RANKS, find_documents
from pgolf.scoring.ttt import engine
from pgolf.training.tuning import BETAS, NOT_TUNED

PUBLIC = "PR #1874's rule"
PUBLIC_STEPS = (1.0, 1.35, 1.8, 2.4)  # times the rule's own
TUNING_STEPS, TUNING_TOKENS = 40, 65_536
SIZES = (15_880_000, 14_400_000, 13_000_000, 11_600_000)


NO_STEPS = dict(trellis_row_steps=False, trellis_column_steps=False)
# Settings, each with one part more.
PARTS: dict[str, dict[str, Any]] = {
    "a step a matrix by sensitivity": NO_STEPS | dict(trellis_states=1),
    "+ a step a row": dict(trellis_column_steps=False, trellis_states=1),
    "+ column steps": dict(trellis_states=1),
    "+ a trellis of 8 states": dict(trellis_states=8),
    "128 states (record)": {},
}
RECORD = list(PARTS)[-1]


def token_nats(model: GPT, config: RunConfig, tokens: Tensor) -> np.ndarray:
    """Compute the nats of every target, float64, in the segments of `evaluate_packed`."""
    found, width = [], config.val_batch_tokens // PUBLIC_RANKS // config.eval_seq_len * config.eval_seq_len
    with torch.no_grad():
        for start in range(0, tokens.numel() - 1, width):
            span = tokens[start : start + width + 1].long().to(model.qo_bank.device)
            bounds = segment_boundaries(span[:-1], config.eval_seq_len)
            found.append(model.token_losses(span[None, :-1], span[None, 1:], bounds, config.eval_seq_len)[0])
    return torch.cat(found).double().cpu().numpy()


class Judge:
    """Scores weights on the validation documents, in pairs with the weights before quantisation."""

    def __init__(self, config: RunConfig, world: World, weights: Mapping[str, Tensor]) -> None:
        self.config, self.world = config, world
        self.tokens, self.table = validation_data(config)
        self.model = model_with(config, world, dict(weights))
        self.template = unbank(self.model.state_dict(), config.num_layers)
        self.starts, _ = find_documents(self.tokens)
        self.byte_counts = self._by_document(self.table.of_stream(self.tokens).double().numpy())
        self.before = self._by_document(token_nats(self.model, config, self.tokens))

    def _by_document(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self.starts)

    def bits_per_byte(self) -> float:
        """Bits per byte before quantisation."""
        return float(self.before.sum() / np.log(2.0) / self.byte_counts.sum())

    def load(self, quantized: QuantizedModel) -> None:
        """Give the model what an artifact holds."""
        weights = rebank(dequantize_model(quantized, self.template), self.model.state_dict())
        self.model.load_state_dict(weights)

    def tax(self) -> dict[str, float]:
        """Bits per byte of the model's present weights over those before quantisation, with their standard error."""
        nats = self._by_document(token_nats(self.model, self.config, self.tokens))
        tax, error = paired_difference(nats, self.before, self.byte_counts)
        return {"tax": tax, "error": error}

    def adapted(self) -> np.ndarray:
        """Nats by document of the model's present weights with test-time training."""
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        table: ByteCounter = self.table
        scored = engine.test_time_training(self.model, self.config, self.tokens, table)
        self.model.load_state_dict(kept)
        self.model.requires_grad_(False)
        return self._by_document(scored.token_nats.double().numpy())

    def tune(self) -> None:
        """Train the model's small tensors on some batches of training data, at a rate that falls to 0."""
        config, model = self.config, self.model
        loader = DocumentPackingLoader(
            shard_files(config.data_dir, config.vocab_size, "train"),
            micro_batch_tokens=min(TUNING_TOKENS, config.micro_batch_tokens),
            max_segment=config.train_seq_len,
            rank=0,
            world_size=1,
            device=self.world.device,
            vocab_size=config.vocab_size,
        )
        tensors = [p for name, p in model.named_parameters() if not name.endswith(NOT_TUNED)]
        optimizer = torch.optim.AdamW(tensors, lr=config.average_tuning_lr, betas=BETAS, weight_decay=0.0)
        for tensor in tensors:
            tensor.requires_grad_(True)
        for step in range(TUNING_STEPS):
            batch = loader.next_batch()
            model(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen).backward()
            optimizer.param_groups[0]["lr"] = config.average_tuning_lr * (1 - step / TUNING_STEPS)
            optimizer.step()
            optimizer.zero_grad()
        model.requires_grad_(False)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Call a function; returns its result and its seconds to the device's end."""
    begun = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begun


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the results."""
    parser = argparse.ArgumentParser("python -m bench.quantization", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="a run that has been trained")
    parser.add_argument("--data-dir", help="folder with datasets/ and tokenizers/ (default: the run's)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes to quantise to")
    parser.add_argument("--ttt", action="store_true", help="also with test-time training, at the first size")
    parser.add_argument("--times", action="store_true", help="also the seconds of each step")
    parser.add_argument("--tune", action="store_true", help="also with small tensors trained on afterwards")
    add_options(parser, "quantization.json")
    arguments = parser.parse_args(argv)
    if arguments.times and find_spec("brotli") is None:
        parser.error("--times compresses PR #1874's file with brotli: pip install 'brotli>=1.2'")
    folder = RunFolder(arguments.run_dir)
    config = folder.config().replace(**({"data_dir": arguments.data_dir} if arguments.data_dir else {}))
    config = config.replace(phased_ttt_enabled=False)
    world = start_world(config)
    device = world.device
    target = arguments.results or results_path(chip_name(device), "quantization")
    weights = load_weights(folder.need(folder.ema, "train"), config)
    judge = Judge(config, world, weights)
    results: dict[str, Any] = {
        "meta": describe("quantization", device, arguments.commit),
        "weights": {name: folder.summary()["train"].get(name) for name in ("steps", "clock_seconds")},
        "documents": len(judge.starts),
        "bits_per_byte": judge.bits_per_byte(),
        "rows": [],
        "tuned": [],
        "test_time_training": [],
        "times": {},
    }

    def measure() -> tuple[dict[str, Tensor], Sensitivities]:
        model = model_with(config, world, weights)
        hessians, seconds = timed(lambda: calibrate(model, config, world), device)
        found, more = timed(lambda: collect_sensitivities(model, config, sensitivity_tokens(config), world), device)
        results["times"] |= {"hessians": seconds, "sensitivities": more}
        return hessians, found

    measure()  # compiles
    hessians, sensitivities = measure()
    tensors = unbank(weights, config.num_layers)
    _, seconds = timed(lambda: prepare(tensors, hessians, sensitivities, config, device), device)
    results["times"]["prepare"] = seconds

    tuned: dict[str, dict[str, Tensor]] = {}

    def report(way: str, quantized: QuantizedModel, size: int, **more: Any) -> None:
        judge.load(quantized)
        row = {"way": way, "bytes": size, **judge.tax(), **more}
        results["rows"].append(row)
        write(target, **results)
        print(f"{way}: {size:,} bytes, tax {row['tax']:.5f} ± {row['error']:.5f}", flush=True)
        if arguments.tune and way in (PUBLIC, RECORD) and way not in tuned:
            _, seconds = timed(judge.tune, device)
            tuned[way] = {name: value.clone() for name, value in judge.model.state_dict().items()}
            row = {"way": way, "bytes": size, **judge.tax(), "seconds": seconds}
            results["tuned"].append(row)
            write(target, **results)
            print(f"{way}, tuned: {row['tax']:.5f} ± {row['error']:.5f}", flush=True)

    kept: dict[str, QuantizedModel] = {}
    public = config.replace(quantizer="gptq")
    for factor in PUBLIC_STEPS:
        steps = {name: getattr(public, name) * factor for name in CLIPS}
        quantized, seconds = timed(
            lambda steps=steps: quantize_model(tensors, hessians, public.replace(**steps), device), device
        )
        kept.setdefault(PUBLIC, quantized)
        report(PUBLIC, quantized, packed_size(quantized, device).total, steps=factor, seconds=seconds)
    compressing = _Compressing(kept[PUBLIC]) if arguments.times else None
    for way, settings in PARTS.items():
        own = config.replace(**settings)
        matrices = prepare(tensors, hessians, sensitivities, own, device)
        for size in arguments.sizes:
            quantized, seconds = timed(
                lambda m=matrices, c=own, b=size: quantize_by_rate(tensors, m, c, device, b), device
            )
            kept.setdefault(way, quantized)
            report(way, quantized, packed_size(quantized, device).total, seconds=seconds)
    if arguments.ttt:
        judge.model.load_state_dict(model_with(config, world, weights).state_dict())
        before = judge.adapted()
        bits = float(before.sum() / np.log(2.0) / judge.byte_counts.sum())

        def report_adapted(way: str) -> None:
            tax, error = paired_difference(judge.adapted(), before, judge.byte_counts)
            results["test_time_training"].append({"way": way, "before": bits, "tax": tax, "error": error})
            write(target, **results)
            print(f"{way}: tax after test-time training {tax:.5f} ± {error:.5f}", flush=True)

        for way in (PUBLIC, RECORD):
            judge.load(kept[way])
            report_adapted(way)
        for way, state in tuned.items():
            judge.model.load_state_dict(state)
            report_adapted(f"{way}, tuned")
    if compressing is not None:
        torch.set_num_threads(1)
        blob, results["times"]["pack"] = timed(lambda: packed_format.pack(kept[RECORD]), torch.device("cpu"))
        _, results["times"]["unpack"] = timed(lambda: packed_format.unpack(blob), torch.device("cpu"))
        compressing.join()
        results["times"] |= {"brotli": compressing.seconds, "brotli_bytes": compressing.bytes}
        write(target, **results)
    rows = [
        (r["way"], f"{r['bytes']:,}", f"{r['tax']:.5f}", f"{r['error']:.5f}", f"{r['seconds']:.1f}")
        for r in results["rows"]
    ]
    print(format_table(rows, ("way", "bytes", "tax", "error", "s")))
    print(results["times"])
    return results


CLIPS = ("embed_clip_sigmas", "mlp_clip_sigmas", "attn_clip_sigmas", "matrix_clip_sigmas")


class _Compressing(Thread):
    """Brotli at work on PR #1874's file beside everything else, as it takes longer than all of it."""

    def __init__(self, quantized: QuantizedModel) -> None:
        super().__init__(daemon=True)
        self.quantized, self.seconds, self.bytes = quantized, 0.0, 0
        self.start()

    def run(self) -> None:
        pooled = QuantizedModel(public_format.pooled(self.quantized.tensors), self.quantized.meta)
        begun = time.perf_counter()
        self.bytes = len(public_format.serialize(pooled))
        self.seconds = time.perf_counter() - begun


if __name__ == "__main__":
    main()
