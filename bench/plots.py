"""Plots of results files: ``python -m bench.plots bench/results/h100/newton_schulz.json``.

One PNG for each file. Of a kernel benchmark: a panel a case, a bar a provider with its median, a tick where a CUDA
graph brings it, and a line at the time that the chip's measured ceilings allow. Of `bench.quantization`: the tax by
bytes, a line for each way.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import OURS
from bench.results_files import read

COLOURS = {True: "#1b7837", False: "#9e9e9e"}  # ours, others
LABELS = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "compile_graph": "torch.compile + CUDA graph",
    "compile_gram": "torch.compile, Gram form",
    "compile_gram_graph": "torch.compile, Gram form + CUDA graph",
    "pgolf_atomic": "pgolf, atomics",
}
MAIN_CASES = {
    "newton_schulz": ("banks_full", "banks_eighth"),
    "dequant": ("packed6_g64_lqer", "record_model"),
    "smear_gate": ("forward", "forward_backward", "prologue_forward", "prologue_forward_backward"),
}
ORDER = [case for cases in MAIN_CASES.values() for case in cases]


def plot(panels: Mapping[str, Sequence[Mapping[str, Any]]], title: str, path: Path) -> None:
    """Draw the rows of a benchmark's cases into ``path``."""
    from matplotlib.figure import Figure

    cases = sorted(panels, key=lambda case: ORDER.index(case) if case in ORDER else len(ORDER))
    columns = min(2, len(cases))
    lines = [cases[i : i + columns] for i in range(0, len(cases), columns)]
    heights = [max(len(panels[case]) for case in line) * 0.32 + 0.9 for line in lines]
    figure = Figure(figsize=(6 * columns, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights).ravel()
    for axis, case in zip(axes, cases, strict=False):
        _panel(axis, case, sorted(panels[case], key=lambda row: -row["median_us"]))
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def plot_quantization(results: Mapping[str, Any], path: Path) -> None:
    """Draw the tax of each way by its bytes into ``path``, with an error of the mean either way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for way in dict.fromkeys(row["way"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["way"] == way]
        sizes, taxes, errors = zip(*((row["bytes"] / 1e6, row["tax"], row["error"]) for row in rows), strict=True)
        axis.errorbar(sizes, taxes, errors, marker="o", markersize=3, linewidth=1.2, label=way)
    axis.set_yscale("log")
    axis.set_xlabel("megabytes of weights")
    axis.set_ylabel("bits per byte over those before quantisation")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    steps, bits = results["weights"]["steps"], results["bits_per_byte"]
    axis.set_title(f"Quantisation of weights after {steps:,} steps, {bits:.4f} bits per byte", fontsize=10)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, case: str, rows: Sequence[Mapping[str, Any]]) -> None:
    times = [row["median_us"] for row in rows]
    ours = [row["provider"].partition("_")[0] == OURS for row in rows]
    bars = axis.barh(range(len(rows)), times, color=[COLOURS[own] for own in ours], height=0.7)
    axis.bar_label(bars, [f" {time:,.0f} µs" if time >= 99.5 else f" {time:.1f} µs" for time in times], fontsize=8)
    for position, row in enumerate(rows):
        if row["graph_us"] is not None:
            axis.plot([row["graph_us"]] * 2, [position - 0.35, position + 0.35], color="black", linewidth=1.5)
    axis.axvline(rows[-1]["ceiling_share"] * times[-1], color="#b2182b", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), [LABELS.get(row["provider"], row["provider"]) for row in rows], fontsize=8)
    axis.set_xlim(0, max(times) * 1.18)
    axis.set_title(case, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: one PNG for each results file, beside it or in ``--out``."""
    parser = argparse.ArgumentParser("python -m bench.plots", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder (default: the results file's)")
    parser.add_argument("--all", action="store_true", help="all cases, not the main ones alone")
    arguments = parser.parse_args(argv)
    for file in arguments.results:
        results = read(file)
        bench, chip = results["meta"]["bench"], results["meta"]["chip"]
        out = arguments.out or file.parent
        out.mkdir(parents=True, exist_ok=True)
        if bench == "quantization":  # of several weights
            path = out / f"{file.stem}.png"
            plot_quantization(results, path)
            print(path)
            continue
        path = out / f"{bench}.png"
        panels = {case: entry["rows"] for case, entry in results["cases"].items()}
        main_ones = {case: panels[case] for case in MAIN_CASES.get(bench, ()) if case in panels}
        title = f"{bench} on one {chip}: median, in a CUDA graph (tick), at the ceilings (dashed)"
        plot(panels if arguments.all or not main_ones else main_ones, title, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
