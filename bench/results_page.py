"""Write ``docs/results.md`` and the README's table from the results files: ``python -m bench.results_page``.

Every figure on the page is read from ``bench/results``; the README's table lies between two marker lines. ``--check``
writes nothing and says which of the two files is not what the results files give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import prediction
from bench.results_files import read_all
from bench.results_sections import (
    CASES,
    COUNT,
    SECTIONS,
    Results,
    by_provider,
    cell,
    commit,
    compare,
    judged_quantization,
    lookup,
    of_bench,
    parts_of,
    table,
)
from pgolf.common.files import write_aside

ROOT = Path(__file__).resolve().parent.parent
PAGE, README = Path("docs", "results.md"), Path("README.md")
MARKERS = "<!-- results: python -m bench.results_page -->", "<!-- /results -->"
HEADLINES = {  # of the README's table: a kernel's case, and its words there
    ("newton_schulz", "banks_full"): "Newton-Schulz of all the record's matrices",
    ("varlen_attention", "forward_backward"): "Attention, forward and backward",
    ("residual_mlp", "forward_backward"): "MLP, forward and backward",
    ("linear_cross_entropy", "forward_backward"): "Head and cross-entropy, forward and backward",
    ("dequant", "record_model"): "Dequantising the record model",
}
INTRODUCTION = """# Results

`python -m bench.results_page` writes this page from the files in `bench/results`, which the measuring tools wrote; do
not edit it. Each file also has its versions, date and command, where its tool recorded them. A dash is what was not
measured. Every ratio is one of numbers of the same call on the same chip. `bpb` is bits per byte of validation text;
"Before the loop" and "after the loop" are the model's two states: at some step training switches looped layers on.
"""


def page(results: Results) -> str:
    """Build the text of ``docs/results.md``."""
    blocks = [INTRODUCTION]
    for chip in dict.fromkeys(name.partition("/")[0] for name in results):
        own = {name: found for name, found in results.items() if name.startswith(f"{chip}/")}
        metas = [found["meta"] for found in own.values()]
        versions = sorted({f"torch {meta['versions']['torch']}, triton {meta['versions']['triton']}" for meta in metas})
        blocks.append(f"## {metas[0]['chip']}\n\nMeasured with {'; '.join(versions)}.\n")
        blocks += [block for section in SECTIONS for block in section(own)]
    with suppress(LookupError):  # without what it is made of
        blocks.append(prediction.section(results))
    return "\n".join(blocks)


def newest(results: Results, bench: str, name: str, part: str = "meta") -> Mapping[str, Any] | None:
    """Select a benchmark's newest results of one file name, with this part, over all chips; no date is the oldest."""
    named = {path: each for path, each in of_bench(results, bench).items() if path.endswith(f"/{name}")}
    found = {path: each for path, each in named.items() if lookup(each, part)}
    return found[max(found, key=lambda path: (found[path]["meta"]["date"] or "", path))] if found else None


def headlines(results: Results) -> str:
    """Build the README's table: the newest figures, each with its chip and commit."""
    return table(["", "", "chip", "commit"], _headlines(results))


def _headlines(results: Results) -> Iterator[list[str]]:
    def row(what: str, figure: str, meta: Mapping[str, Any]) -> list[str]:
        return [what, figure, meta["chip"].removeprefix("NVIDIA ").partition(" ")[0], commit(meta)]

    def both(figures: Iterable[float], form: str) -> str:
        return " / ".join(cell(figure, form) for figure in figures)

    parts = parts_of(newest(results, "prove", "proof") or {"meta": {}, "parts": {}})
    if tests := lookup(parts, "tests.figures"):
        failed = tests["failed"] + tests["error"]
        yield row("GPU tests", f"{tests['passed']:,} passed, {failed} failed", parts["tests"]["meta"])
    steps = lookup(parts, "train_step.figures") or {}
    if steps.keys() >= CASES.keys():
        speeds = both((steps[case]["tokens_per_s"] for case in CASES), COUNT)
        yield row("Training step, before / after the loop", f"{speeds} tokens/s", parts["train_step"]["meta"])
    if step := newest(results, "train_step", "train_step"):
        ours, theirs = (
            [lookup(by_provider(step["rows"]), f"{provider}.{case}.tokens_per_s") for case in CASES]
            for provider in ("pgolf", "reference")
        )
        if all((*ours, *theirs)):
            ratios = both((a / b for a, b in zip(ours, theirs, strict=True)), ".2f")
            figure = f"{both(ours, COUNT)} tokens/s, {ratios} × as fast as torch.compile with FlashAttention-2"
            yield row("the same beside its opponent", figure, step["meta"])
    for (bench, case), what in HEADLINES.items():
        found = newest(results, bench, bench, f"cases.{case}")
        entry = lookup(found, f"cases.{case}")
        if entry and (compared := compare(bench, entry["rows"])):
            figure = f"{compared['ours']['graph_us']:,.0f} µs, {compared['ratio']:.2f} × as fast as"
            yield row(what, f"{figure} {compared['opponent']}", entry.get("meta", found["meta"]))
    if whole := newest(results, "gpt2_small", "gpt2_small"):
        theirs, ours = whole["rows"]
        times = ours["median_milliseconds"], theirs["median_milliseconds"] / ours["median_milliseconds"]
        figure = f"{times[0]:.1f} ms, {times[1]:.2f} × as fast as torch.compile with FlashAttention-2"
        yield row("GPT-2 small by these kernels, a training step", figure, whole["meta"])
    if mix := lookup(parts, "test_time_training.figures.mix"):
        figure = f"{mix['tokens_per_s']:,.0f} tokens/s"
        yield row("Test-time training, FineWeb's mix of lengths", figure, parts["test_time_training"]["meta"])
    taxes = []
    for found in judged_quantization(results).values():
        first: dict[str, Mapping[str, Any]] = {}
        for each in found["rows"]:
            first.setdefault(each["way"], each)
        theirs, ours = list(first.values())[0], list(first.values())[-1]
        figure = f"{ours['tax']:.4f} ({theirs['tax']:.4f}) bpb after {found['weights']['steps']:,} steps"
        taxes.append(row(f"Quantisation's tax ({theirs['way']}), 15.9 MB", figure, found["meta"]))
    if taxes:  # one line, with every chip and commit
        yield ["; ".join(dict.fromkeys(column)) for column in zip(*taxes, strict=True)]
    several = max(of_bench(results, "distributed").values(), key=lambda found: found["meta"]["date"], default=None)
    if several and lookup(part := parts_of(several).get("run"), "figures.bits_per_byte.ttt"):
        paths = "last_weights", "quantized", "ttt"
        figure = both((part["figures"]["bits_per_byte"][path] for path in paths), ".4f")
        seconds, count = part["figures"]["clock_seconds"], several["meta"]["processes"]
        what = f"bpb after {seconds:.0f} s on {count} GPUs: last weights / average, quantised / trained at test time"
        yield row(what, figure, part["meta"])


def insert(readme: str, text: str) -> str:
    """Put a table between the README's marker lines. Raises ValueError where they are not there."""
    before, first, rest = readme.partition(f"{MARKERS[0]}\n")
    _, second, after = rest.partition(MARKERS[1])
    if not first or not second:
        raise ValueError(f"{README} lacks the lines {MARKERS[0]} and {MARKERS[1]}, between which its table goes")
    return f"{before}{first}{text}{second}{after}"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; returns 1 where a file is stale (``--check``) or the README has no markers, else 0."""
    parser = argparse.ArgumentParser("python -m bench.results_page", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which file is not what the results files give")
    arguments = parser.parse_args(argv)
    results = read_all(root / "bench" / "results")
    texts, status = {PAGE: page(results)}, 0
    try:
        texts[README] = insert((root / README).read_text(encoding="utf-8"), headlines(results))
    except ValueError as reason:
        print(reason, file=sys.stderr)
        status = 1
    for path, text in texts.items():
        file = root / path
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        if arguments.check:
            print(f"{path} is stale: run python -m bench.results_page", file=sys.stderr)
            status = 1
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_aside(file, text)
            print(path)
    return status


if __name__ == "__main__":
    sys.exit(main())
