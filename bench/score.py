"""Two or more configurations, trained for equal seconds and scored in pairs: ``python -m bench.score --data-dir DIR``.

Each variant is a preset, with settings of its own if it has any:

    python -m bench.score --data-dir DIR --seconds 240 --variant record --variant "tuned: record; average_tuning=0.02"
    python -m bench.score --data-dir DIR --case-data-dir DIR  # record and frontier, which is on case-coded documents

Training and quantising are the package's stages, each in a process of its own; then the average, the artifact, and the
artifact with test-time training are scored on the same validation documents. Differences are to the first variant, in
bits per byte of the original text; their errors are those of a bootstrap over documents. The results file says what is
done: a later call with the same run folder goes on from there, also in the middle of a training.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.prove import CallFailed, Proof
from bench.quantization import token_nats
from bench.results_files import add_options, describe, read, results_path, write
from bench.timing import chip_name, default_device
from bench.ttt_variants import paired_difference
from pgolf.artifact.weights import load_artifact
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_table, progress
from pgolf.common.runtime import World, start_world
from pgolf.config import PRESETS, RunConfig
from pgolf.data.manifest import manifest_path, sha256_of
from pgolf.data.validation import validation_data
from pgolf.model.build import build_model, model_with
from pgolf.model.weights import load_weights
from pgolf.scoring.stream import find_documents
from pgolf.scoring.ttt import engine

STAGES = ("average", "quantized", "ttt")
LEAST_SECONDS = 45.0  # a stage does not begin with less left of the limit


class Variant(NamedTuple):
    """A configuration that takes part."""

    name: str
    preset: str
    settings: dict[str, str]


def variant(text: str) -> Variant:
    """Read ``PRESET``, or ``NAME: PRESET; SETTING=VALUE; ...``. Raises argparse.ArgumentTypeError."""
    name, given, rest = text.partition(":")
    preset, *pairs = [part.strip() for part in (rest if given else name).split(";")]
    if preset not in PRESETS or not all("=" in pair for pair in pairs if pair):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a preset nor 'NAME: PRESET; SETTING=VALUE; ...'; presets: {', '.join(PRESETS)}"
        )
    return Variant(name.strip(), preset, dict(pair.split("=", 1) for pair in pairs if pair))


def is_coded(entry: Mapping[str, Any]) -> bool:
    """Return whether a variant, by its preset and settings, is on case-coded documents."""
    return RunConfig.preset(entry["preset"]).replace(**entry["settings"]).case_coding


def data_of(folder: Path) -> dict[str, str]:
    """Return what tells one data folder from another: its name, and the hash of its manifest if it has one."""
    manifest = manifest_path(folder)
    return {"folder": folder.name, "manifest": sha256_of(manifest)[:16] if manifest.is_file() else ""}


class Scored(NamedTuple):
    """Nats and bytes of each document; seconds: from the first score of test-time training on."""

    nats: np.ndarray
    byte_counts: np.ndarray
    seconds: float | None


def score(stage: str, config: RunConfig, folder: RunFolder, world: World) -> Scored:
    """Score a run's weights as one of `STAGES` does."""
    tokens, table = validation_data(config)
    starts, _ = find_documents(tokens)
    byte_counts = table.of_stream(tokens)
    nats: Tensor | np.ndarray
    seconds = None
    if stage == "ttt":
        model = build_model(config, world, load_artifact(config, folder, world))
        begun = time.monotonic()
        scored = engine.test_time_training(model, config, tokens, table, progress=progress)
        seconds = time.monotonic() - begun - scored.first_score_seconds
        nats = scored.token_nats.double().numpy()
    else:
        weights = load_weights(folder.ema, config) if stage == "average" else load_artifact(config, folder, world)
        model = model_with(config, world, weights)
        nats = token_nats(model, config, tokens)
    del model
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return Scored(np.add.reduceat(nats, starts), np.add.reduceat(byte_counts.double().numpy(), starts), seconds)


def command(stage: str, chosen: Variant, folder: RunFolder, settings: Sequence[str]) -> list[str]:
    """Return Python's arguments that run a stage, which goes on from a checkpoint if there is one."""
    own = [f"{name}={value}" for name, value in chosen.settings.items()]
    options = [part for pair in (*settings, *own) for part in ("--set", pair)]
    if stage != "train" or folder.checkpoint.is_file():
        resume = ["--resume"] if stage == "train" else []
        return ["-m", "pgolf", stage, "--run-dir", str(folder.path), *resume]
    return ["-m", "pgolf", stage, "--preset", chosen.preset, "--run-dir", str(folder.path), "--fresh", *options]


def entry_of(
    chosen: Variant, earlier: Mapping[str, dict[str, Any]], run_dir: Path, data: Mapping[str, str]
) -> dict[str, Any]:
    """Return the variant's entry of an earlier call, if it is whole or its run is in the folder; else a new one."""
    entry, new = earlier.get(chosen.name, {}), {**chosen._asdict(), "data": data}
    whole = {"train", "quantize", *STAGES} <= entry.keys() or RunFolder(run_dir / chosen.name).config_file.is_file()
    return entry if whole and all(entry.get(name) == value for name, value in new.items()) else new


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the results."""
    parser = argparse.ArgumentParser("python -m bench.score", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with datasets/ and tokenizers/")
    parser.add_argument("--case-data-dir", type=Path, help="the same of case-coded documents, for variants on these")
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "score"), help="of all runs (default: runs/score)")
    parser.add_argument(
        "--variant", type=variant, action="append", help="PRESET or 'NAME: PRESET; SETTING=VALUE; ...'; repeatable"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="of each training's clock (default: 300)")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="of all variants")
    parser.add_argument(
        "--limit", type=float, default=1e9, help="seconds after which this call ends, to be gone on from"
    )
    add_options(parser, "score.json")
    arguments = parser.parse_args(argv)
    variants = arguments.variant or [variant("record"), variant("frontier")]
    if len({each.name for each in variants}) < len(variants):
        parser.error("two variants have one name: give one another, as in 'NAME: PRESET'")
    run_dir = arguments.run_dir.resolve()  # stages run in another folder
    folders = {False: arguments.data_dir.resolve(), True: arguments.case_data_dir and arguments.case_data_dir.resolve()}
    coded = {each.name: is_coded(each._asdict()) for each in variants}
    if without := [name for name, of in coded.items() if folders[of] is None]:
        parser.error(
            f"{', '.join(without)} needs case-coded documents: --case-data-dir DIR (docs/running.md makes them)"
        )
    device = default_device()
    target = arguments.results or results_path(chip_name(device), "score") or run_dir / "score.json"
    settings = [f"max_wallclock_seconds={arguments.seconds:g}", *arguments.set]
    meta = {**describe("score", device, arguments.commit), "settings": settings}
    results: dict[str, Any] = {"meta": meta, "variants": {}}
    same = {"trees", "settings", "chip", "versions"}
    if target.is_file() and (earlier := read(target)) and all(earlier["meta"].get(k) == meta[k] for k in same):
        results["variants"] = earlier["variants"]
    process = Proof(target, meta, run_dir, limit=arguments.limit)

    def do(entry: dict[str, Any], part: str, action: Callable[[], dict[str, Any]]) -> bool:
        """Do a part that is not done; False where no time is left for it."""
        if part in entry:
            return True
        if process.deadline - time.monotonic() < LEAST_SECONDS:
            return False
        begun = time.monotonic()
        try:
            found = action()
        except CallFailed as failure:
            if process.deadline > time.monotonic():
                raise SystemExit(f"{entry['name']}, {part}: {failure}") from None
            return False  # a training has left a checkpoint
        entry[part] = {**found, "wall_seconds": round(time.monotonic() - begun, 2)}
        write(target, **results)
        print(f"{entry['name']}, {part}: {entry[part]['wall_seconds']:.0f} s", flush=True)
        return True

    known = results["variants"]
    own = {each.name: entry_of(each, known, run_dir, data_of(folders[coded[each.name]])) for each in variants}
    results["variants"] = own | {name: entry for name, entry in known.items() if name not in own}
    for chosen in variants:
        entry, folder = results["variants"][chosen.name], RunFolder(run_dir / chosen.name)

        def run_stage(stage: str, chosen: Variant = chosen, folder: RunFolder = folder) -> dict[str, Any]:
            of_data = f"data_dir={folders[coded[chosen.name]]}"
            process.call(*command(stage, chosen, folder, [of_data, *settings]))
            return folder.summary()[stage]

        def score_stage(stage: str, folder: RunFolder = folder) -> dict[str, Any]:
            config = folder.config()
            scored = score(stage, config, folder, start_world(config))
            found = {"nats": scored.nats.tolist(), "bytes": scored.byte_counts.tolist()}
            return found if scored.seconds is None else {"seconds": scored.seconds, **found}

        done = do(entry, "train", lambda run=run_stage: run("train"))
        done = done and do(entry, "quantize", lambda run=run_stage: run("quantize"))
        for stage in STAGES:
            done = done and do(entry, stage, lambda stage=stage, one=score_stage: one(stage))
        if not done:
            print(f"nothing is left of {arguments.limit:g} s: the same command goes on from here", flush=True)
            break
    results["comparison"] = compare(results["variants"])
    write(target, **results)
    print(comparison(results["comparison"]))
    return results


def compare(variants: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each variant and stage that is scored: bits per byte, and the difference to the first's.

    All are divided by the bytes of the original text, which case-coded documents have beside them; where none of the
    variants is on these, by the bytes of the normalised text.
    """
    rows = []
    first = next(iter(variants.values()), {})
    scored = [
        (is_coded(entry), entry[stage]["bytes"]) for entry in variants.values() for stage in STAGES if stage in entry
    ]
    counts = np.array(max(scored, key=lambda each: each[0])[1]) if scored else np.empty(0)
    for name, entry in variants.items():
        for stage in STAGES:
            if stage not in entry or stage not in first:
                continue
            nats, base = np.array(entry[stage]["nats"]), np.array(first[stage]["nats"])
            if not len(nats) == len(base) == len(counts):
                raise ValueError(f"{name} was scored on {len(nats):,} documents, and {first['name']} on {len(base):,}")
            difference, error = paired_difference(nats, base, counts)
            bits = float(nats.sum() / np.log(2.0) / counts.sum())
            rows.append(
                {"variant": name, "stage": stage, "bits_per_byte": bits, "difference": difference, "error": error}
            )
    return rows


def comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows of `compare` for a reader."""
    headers = ("variant", "stage", "bits per byte", "difference", "± error")
    lines = [
        (
            row["variant"],
            row["stage"],
            f"{row['bits_per_byte']:.5f}",
            f"{row['difference']:+.5f}",
            f"{row['error']:.5f}",
        )
        for row in rows
    ]
    return format_table(lines, headers)


if __name__ == "__main__":
    main()
