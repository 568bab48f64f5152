"""The runs of ``docs/results.md``, by name: ``python -m bench.reference_runs record_160 --data-dir data``.

Each is a series of `pgolf` commands in a folder of its own. Afterwards every run in ``--out`` has a results file with
its summary and losses, ``bench/results/<chip>/run_<name>.json``, and a table of the losses is printed. Several
processes: ``--nproc-per-node 2``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bench.results_files import provenance, results_path, write
from bench.timing import short_name
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_table

TABLE_STEPS = (1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 60, 80, 100, 120, 140, 160, 200, 250, 300, 400, 500)
FOR_160_STEPS = dict(iterations=160, max_wallclock_seconds=0, warmup_steps=0, ema_decay=0.95, train_log_every=10)
# With kernels, and twice without them: the two differ by the noise of atomics alone. An eighth of the record's batch.
FOR_300_STEPS = FOR_160_STEPS | dict(iterations=300, train_batch_tokens=98_304, train_log_every=50)
# Of other seeds too, for the spread between them, and from initial weights moved by rounding (`bench.moved_weights`),
# for that of one seed; half a micro-batch a step.
FOR_500_STEPS = FOR_300_STEPS | dict(iterations=500, train_batch_tokens=49_152, micro_batch_tokens=49_152)
MOVED = {"": None, "_moved1": 1001, "_moved2": 1002, "_moved3": 1003, "_moved4": 1004}


class ReferenceRun(NamedTuple):
    """What is run: a preset, what differs from it, up to which stage, and the seed that moves its initial weights."""

    preset: str
    settings: dict[str, Any]
    stages: tuple[str, ...]
    moved: int | None = None


RUNS = {
    "public_160": ReferenceRun("public_1874", FOR_160_STEPS, ("train", "quantize", "eval")),
    "record_160": ReferenceRun("record", FOR_160_STEPS, ("train", "quantize", "eval")),
    "triton_300": ReferenceRun("record", FOR_300_STEPS | dict(kernels="triton"), ("train",)),
    "reference_300": ReferenceRun("record", FOR_300_STEPS | dict(kernels="reference"), ("train",)),
    "reference_300_again": ReferenceRun("record", FOR_300_STEPS | dict(kernels="reference"), ("train",)),
    **{
        f"{kernels}_500_seed{seed}{suffix}": ReferenceRun(
            "record", FOR_500_STEPS | dict(kernels=kernels, seed=seed), ("train",), moved
        )
        for kernels in ("triton", "reference")
        for seed in (1337, 42, 7)
        for suffix, moved in MOVED.items()
    },
    "five_minutes": ReferenceRun(
        "record", dict(max_wallclock_seconds=300, warmup_steps=2, train_log_every=50), ("run",)
    ),
    "short": ReferenceRun(
        "record",
        dict(
            max_wallclock_seconds=30,
            warmup_steps=1,
            ema_decay=0.9,
            train_log_every=10,
            mlp_clip_sigmas=12.2,  # so few steps leave weights of more entropy than the record's
            val_doc_fraction=0.25,
            phased_ttt_prefix_docs=64,
            phased_ttt_num_phases=1,
        ),
        ("run",),
    ),
}


def commands(name: str, out: Path, data_dir: str, processes: int, settings: list[str]) -> list[list[str]]:
    """The command lines of a run, in order."""
    run = RUNS[name]
    chosen = [f"{key}={value}" for key, value in run.settings.items()] + [f"data_dir={data_dir}", *settings]
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    folder = str(out / name)
    stages = run.stages if run.moved is None else ("data", *run.stages)
    program = "bench.compiled_model" if run.settings.get("kernels") == "reference" else "pgolf"
    lines = [[*python, program, stage, "--run-dir", folder] for stage in stages]
    lines[0] += ["--fresh", "--preset", run.preset, *(part for pair in chosen for part in ("--set", pair))]
    if run.moved is not None:
        lines[1].append("--resume")
        lines.insert(1, [sys.executable, "-m", "bench.moved_weights", folder, str(run.moved)])
    return lines


def collect(out: Path) -> dict[str, dict[str, Any]]:
    """Read every run in ``out``, by name: what made it and when, its summary, and the losses of steps 1, 2, …"""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(out.iterdir()):
        folder = RunFolder(path)
        if not folder.config_file.exists():
            continue
        environment = json.loads(folder.environment.read_text())
        entries = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        losses = {entry["step"]: round(entry["loss"], 5) for entry in entries if entry["kind"] == "train"}
        ended = datetime.fromtimestamp(folder.summary_file.stat().st_mtime, UTC)
        runs[path.name] = {
            "meta": provenance("reference_runs", environment, environment.get("command", "").split(" "), ended),
            "name": path.name,
            "summary": folder.summary(),
            "losses": [losses.get(step) for step in range(1, max(losses, default=0) + 1)],
        }
    return runs


def loss_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the losses of all runs side by side; an empty cell where a run has none of that step."""
    steps = [step for step in TABLE_STEPS if any(loss_at(run, step) for run in runs.values())]
    rows = [(step, *(loss_at(run, step) for run in runs.values())) for step in steps]
    return format_table(rows, ("step", *runs))


def loss_at(run: Mapping[str, Any], step: int) -> str:
    """Format a run's loss at a step, counted from 1; empty where it has none."""
    losses = run["losses"]
    return f"{losses[step - 1]:.4f}" if step <= len(losses) and losses[step - 1] is not None else ""


def default_path(run: Mapping[str, Any]) -> Path | None:
    """Return where a run's results go by default; None for a CPU."""
    meta = run["meta"]
    chip = short_name(meta["chip"]) if "cuda" in meta["versions"] else "cpu"
    return results_path(chip, f"run_{run['name']}", meta["processes"])


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the first exit status that is not 0, else 0."""
    parser = argparse.ArgumentParser("python -m bench.reference_runs", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="runs to make; none: only collect")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--results", type=Path, help="folder (default on CUDA: bench/results/<chip>)")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in arguments.names:
        for line in commands(name, arguments.out, arguments.data_dir, arguments.nproc_per_node, arguments.settings):
            status = status or subprocess.run(line).returncode
    runs = collect(arguments.out)
    for name, run in runs.items():
        write(arguments.results / f"run_{name}.json" if arguments.results else default_path(run), **run)
    print(loss_table(runs))
    return status


if __name__ == "__main__":
    sys.exit(main())
