"""The runs behind the README's tables, by name: ``python -m bench.reference_runs record_160 --data-dir data``.

Each is a series of `pgolf` commands in a folder of its own. Afterwards summaries, losses and environment of all runs
in ``--out`` go into ``bench/results/<chip>_runs.json`` and a table of the losses is printed. Several processes:
``--nproc-per-node 2``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pgolf.folder import RunFolder
from pgolf.progress import format_table

RESULTS = Path(__file__).resolve().parent / "results"
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


def collect(out: Path) -> dict[str, Any]:
    """Environment, summaries and losses by step of all runs in ``out``."""
    runs: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    for path in sorted(out.iterdir()):
        folder = RunFolder(path)
        if not folder.config_file.exists():
            continue
        environment = json.loads(folder.environment.read_text())
        entries = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        losses = {entry["step"]: round(entry["loss"], 5) for entry in entries if entry["kind"] == "train"}
        summary = folder.summary()
        runs[path.name] = {"processes": summary["run"]["world_size"], "summary": summary, "loss_by_step": losses}
    meta = {key: environment.get(key) for key in ("chip", "versions", "git_commit", "platform")}
    return {"meta": meta, "runs": runs}


def loss_table(results: dict[str, Any]) -> str:
    """Losses of all runs side by side."""
    runs = results["runs"]
    steps = [step for step in TABLE_STEPS if any(step in run["loss_by_step"] for run in runs.values())]
    rows = [(step, *(f"{r['loss_by_step'][step]:.4f}" if step in r["loss_by_step"] else "" for r in runs.values()))
            for step in steps]  # fmt: skip
    return format_table(rows, ("step", *runs))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the first exit status that is not 0, else 0."""
    parser = argparse.ArgumentParser("python -m bench.reference_runs", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="runs to make; none: only collect")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--json", type=Path, help="where the results go (default: bench/results/<chip>_runs.json)")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in arguments.names:
        for line in commands(name, arguments.out, arguments.data_dir, arguments.nproc_per_node, arguments.settings):
            status = status or subprocess.run(line).returncode
    results = collect(arguments.out)
    chip = str(results["meta"]["chip"]).lower().replace("nvidia ", "").replace(" ", "_")
    target = arguments.json or RESULTS / f"{chip}_runs.json"
    target.write_text(json.dumps(results, indent=1))
    print(f"{loss_table(results)}\n\n{target}")
    return status


if __name__ == "__main__":
    sys.exit(main())
