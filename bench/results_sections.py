"""The sections of ``docs/results.md`` (`bench.results_page`): from a chip's results files to Markdown tables."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pgolf.common.progress import format_bytes

Results = Mapping[str, Mapping[str, Any]]  # by <chip>/<name>, as read_all gives them
Column = tuple[str, str, str | Callable[[Any], str]]  # header, path into a row, format

COUNT, TENTHS = ",.0f", ",.1f"
CASES = {"before_loop": "before the loop", "after_loop": "after the loop"}
STAGES = ("train", "quantize", "eval", "ttt")
LOSS_STEPS = (1, 2, 3, 5, 10, 20, 40, 80, 160, 300, 500)
MEANS_OF_STEPS = ((21, 40), (101, 120), (161, 180), (181, 200), (201, 220), (301, 320), (401, 420), (481, 500))
OPPONENTS = {
    "eager": "PyTorch",
    "compile": "torch.compile",
    "compile_gram": "torch.compile, Gram form",
    "fla": "flash-linear-attention",
    "liger": "Liger",
    "torch_muon": "torch.optim.Muon",
    "kellerjordan": "KellerJordan's Muon",
    "gram_newton_schulz": "gram-newton-schulz",
    "gram_newton_schulz_torch": "gram-newton-schulz in PyTorch",
    "pgolf": "ours",
    "pgolf_chunks": "ours, in chunks",
    "pgolf_stacked": "ours, stacked before",
}
PYTORCH_OF = {"varlen_attention": "FlashAttention-2"}  # what PyTorch's own operator is there
WHOLE = {  # cases by family of which every provider is shown
    "linear_cross_entropy": "16384x768x50304",
    "newton_schulz": "^list_",
    "optimizer_step": "",
    "varlen_attention": "_sequence",
}


def cell(value: Any, form: str | Callable[[Any], str] = "") -> str:
    """Format a figure for a cell of a table; a dash where there is none."""
    return "–" if value is None else form(value) if callable(form) else format(value, form)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table; columns of numbers go right."""
    rows = [[*row] for row in rows]
    right = [all(re.match(r"[-+−–]?\d|–", row[i]) for row in rows) for i in range(len(headers))]
    lines = [[*headers], ["--:" if number else "---" for number in right], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tabulate(rows: Iterable[Mapping[str, Any]], *columns: Column) -> str:
    """Format a Markdown table of nested rows; ``a.b`` is the path of row["a"]["b"], and what is absent a dash."""
    return table(
        [header for header, _, _ in columns],
        [[cell(lookup(row, path), form) for _, path, form in columns] for row in rows],
    )


def lookup(row: Any, path: str) -> Any:
    """Return what a path of keys leads to; None where it leads nowhere."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, Mapping) else None
    return row


def link(name: str) -> str:
    """Link a results file from the page."""
    return f"[{name.partition('/')[2]}](../bench/results/{name}.json)"


def commit(meta: Mapping[str, Any]) -> str:
    """Shorten the commit that was measured, with + where it had local changes."""
    full = meta["commit"] or ""
    return (full[:7] + ("+" if full.endswith("+") or meta.get("dirty") else "")) or "–"


def origin(name: str, meta: Mapping[str, Any]) -> str:
    """Name a results file with its commit and date, for the sentence above a table."""
    return f"{link(name)}, commit {commit(meta)}" + (f", {meta['date'][:10]}" if meta["date"] else "")


def of_bench(results: Results, bench: str) -> dict[str, Mapping[str, Any]]:
    """Select the results of one benchmark; each gets its link as ``file`` and its commit as ``commit``."""
    return {
        name: {"file": link(name), "commit": commit(found["meta"]), **found}
        for name, found in results.items()
        if found["meta"]["bench"] == bench
    }


def parts_of(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the parts of a proof, each with the ``meta`` of its own call; only those that are ok have all figures."""
    parts = {name: {"meta": found["meta"], **part} for name, part in found["parts"].items()}
    return {
        name: part if part["status"] == "ok" or name == "tests" else part | {"figures": {}}
        for name, part in parts.items()
    }


def answers(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a proof's parts and their answers."""
    rows = [
        [
            name,
            ": ".join(filter(None, (part["status"], part["message"].replace("|", "·")))),
            cell(part["seconds"], COUNT),
            part["date"][:10],
            commit(part["meta"]),
        ]
        for name, part in parts.items()
    ]
    return table(["part", "answer", "seconds", "date", "commit"], rows)


def proof(results: Results) -> Iterator[str]:
    """Write the proof: its parts, the GPU's tests, and what its short run found."""
    for name, found in of_bench(results, "prove").items():
        parts, trees = parts_of(found), found["meta"]["trees"]
        yield f"""### Proof

`python -m bench.prove --data-dir DIR` shows that one tree works on this chip ({origin(name, found["meta"])};
{", ".join(f"`{tree}/` {digest[:7]}" for tree, digest in trees.items())}).
"""
        yield answers(parts)
        if tests := lookup(parts, "tests.figures"):
            yield "GPU tests: " + ", ".join(f"{tests[key]:,} {key}" for key in ("passed", "failed", "skipped")) + ".\n"
        if run := lookup(parts, "run.figures"):
            yield "Its run, some seconds of training and every stage after it:\n"
            yield short_run(run)
        if program := lookup(parts, "program.figures"):
            differences = (f"{scored['difference']:+.1e} bpb ({stage})" for stage, scored in program.items())
            yield f"The exported program alone differs from that run by {', '.join(differences)}.\n"
        if audit := lookup(parts, "audit.figures"):
            verdicts = (f"{count} {verdict}" for verdict, count in audit.items() if isinstance(count, int))
            yield f"Its audit: {', '.join(verdicts)}.\n"
            if others := audit.get("other_checks"):
                yield "".join(f"- {finding}\n" for finding in others)
        if steps := lookup(parts, "train_step.figures"):
            yield "A training step there:\n"
            yield tabulate(
                [{"case": CASES[case], **figures} for case, figures in steps.items()],
                ("", "case", ""),
                ("tokens/s", "tokens_per_s", COUNT),
                ("step, s", "step_seconds", ".4f"),
                ("peak memory", "peak_memory_bytes", format_bytes),
            )


def short_run(figures: Mapping[str, Any]) -> str:
    """Format the figures that `bench.prove` keeps of a run."""
    return tabulate(
        [figures],
        ("steps", "steps", COUNT),
        *((f"tokens/s {words}", f"tokens_per_second_{case}", COUNT) for case, words in CASES.items()),
        ("bpb, last weights", "bits_per_byte.last_weights", ".4f"),
        ("average", "bits_per_byte.before", ".4f"),
        ("quantised", "bits_per_byte.quantized", ".4f"),
        ("after test-time training", "bits_per_byte.ttt", ".4f"),
        ("bytes", "total_bytes", COUNT),
        *((f"{stage}, s", f"stage_seconds.{stage}", TENTHS) for stage in STAGES),
    )


def training_step(results: Results) -> Iterator[str]:
    """Write the speeds of a training step against its opponents, and its milliseconds by family."""
    files = of_bench(results, "train_step")
    if not files:
        return
    yield """### Training step

`python -m bench.train_step` times whole steps of the record on random tokens: forward, backward, optimizer, average.
`pgolf` is ours, in CUDA graphs (`pgolf_launched` without them), `reference` PyTorch with torch.compile and
FlashAttention-2 (`reference_graph` in CUDA graphs), `public_pr1874` the public script with FlashAttention-2. The ratio
is ours over that line's, in tokens a second of the same call. With several GPUs, speeds are those of each.
"""
    rows = []
    for found in files.values():
        providers = by_provider(found["rows"])
        for provider, cases in providers.items():
            ratios = {}
            for case, row in cases.items():
                if provider != "pgolf" and (ours := lookup(providers, f"pgolf.{case}.tokens_per_s")):
                    ratios[case] = ours / row["tokens_per_s"]
            peak = max(row.get("peak_memory_bytes", 0) for row in cases.values()) or None
            rows.append({**found, **cases, "provider": provider, "ratios": ratios, "peak": peak})
    yield tabulate(
        rows,
        ("file", "file", ""),
        ("GPUs", "meta.processes", COUNT),
        ("provider", "provider", ""),
        *(
            column
            for case, words in CASES.items()
            for column in ((f"tokens/s {words}", f"{case}.tokens_per_s", COUNT), ("ratio", f"ratios.{case}", ".2f"))
        ),
        ("peak memory", "peak", format_bytes),
        ("commit", "commit", ""),
    )
    yield from notes(files)
    for found in files.values():
        measured = [row for row in found["rows"] if "milliseconds_by_family" in row]
        if len({row["provider"] for row in measured}) < 2 or not found["floors_milliseconds"]:
            continue
        yield f"Milliseconds of a micro-batch, and what the chip's measured rates allow ({found['file']}):\n"
        by_case = {
            case: {row["provider"]: row["milliseconds_by_family"] for row in measured if row["case"] == case}
            for case in CASES
        }
        yield tabulate(
            [
                {"case": CASES[case], "family": family, "floor": found["floors_milliseconds"][case].get(family)}
                | {provider: families[family] for provider, families in by_case[case].items()}
                for case in CASES
                for family in measured[0]["milliseconds_by_family"]
            ],
            ("", "case", ""),
            ("family", "family", ""),
            *((provider, provider, ".2f") for provider in dict.fromkeys(row["provider"] for row in measured)),
            ("floor", "floor", ".2f"),
        )


def judged_quantization(results: Results) -> dict[str, Mapping[str, Any]]:
    """Select the results of `bench.quantization` that also have the tax after test-time training.

    Without it a call was made for its seconds, and the weights may be of no training that came to its end.
    """
    return {name: found for name, found in of_bench(results, "quantization").items() if found["test_time_training"]}


def by_provider(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Sort the rows of a training step by provider, then case."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["provider"], {})[row["case"]] = row
    return found


def kernels(results: Results) -> Iterator[str]:
    """Write the kernels by family and case, each with its best opponent."""
    files = {name: found for name, found in results.items() if "cases" in found}
    rows = [
        {"file": link(name), "case": case, "commit": commit(entry.get("meta", found["meta"]))} | compared
        for name, found in files.items()
        for case, entry in found["cases"].items()
        if (compared := compare(found["meta"]["bench"], entry["rows"]))
    ]
    if rows:
        yield """### Kernels

`python -m bench` times all families, `python -m bench.newton_schulz` one: medians in microseconds, called and replayed
from a CUDA graph. The opponent is the fastest other provider of the same call; its time and the ratio are those of
graphs. The ceiling is the chip's measured rate of copies or of products.
"""
        yield tabulate(
            rows,
            ("family", "file", ""),
            ("case", "case", ""),
            ("ours, called", "ours.median_us", TENTHS),
            ("in a graph", "ours.graph_us", TENTHS),
            ("best opponent", "opponent", ""),
            ("its time", "time", TENTHS),
            ("ratio", "ratio", ".2f"),
            ("ours of the ceiling", "ours.ceiling_share", ".0%"),
            ("commit", "commit", ""),
        )
    yield from all_providers(files)


def all_providers(files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Write every provider of some cases with its memory and its error, and the losses of optimizers."""
    rows = []
    for name, found in files.items():
        bench = found["meta"]["bench"]
        for case, entry in found["cases"].items():
            if bench not in WHOLE or not re.search(WHOLE[bench], case):
                continue
            peaks = {row["provider"]: row.get("peak_mib") for row in entry["rows"]}
            rows += [
                {"file": link(name), "case": case, **row, "provider": provider_name(bench, row["provider"])}
                | {"peak_ratio": peak and ours and peak / ours}
                for row in entry["rows"]
                if not row["provider"].endswith("_graph")
                for peak, ours in [(peaks[row["provider"]], peaks.get("pgolf"))]
            ]
    if rows:
        yield """All providers of some cases: times as above, the most memory that a call holds beyond its arguments,
that over ours (below 1: less memory than ours), and the largest relative error of a result against float64.
"""
        yield tabulate(
            rows,
            ("family", "file", ""),
            ("case", "case", ""),
            ("provider", "provider", ""),
            ("called", "median_us", TENTHS),
            ("in a graph", "graph_us", TENTHS),
            ("peak, MiB", "peak_mib", COUNT),
            ("over ours", "peak_ratio", ".2f"),
            ("error", "error", ".1e"),
        )
    if trained := [row for row in rows if row.get("losses")]:
        yield "Losses of a small model that each optimizer trains, from the same weights on the same tokens:\n"
        last = max(len(row["losses"]) for row in trained)
        steps = [*(step for step in LOSS_STEPS if step < last), last]
        yield table(
            ["case", "provider", *map(str, steps)],
            [[row["case"], row["provider"], *(cell(loss(row, step), ".4f") for step in steps)] for row in trained],
        )


def provider_name(bench: str, provider: str) -> str:
    """Return the name of a provider for readers."""
    return PYTORCH_OF.get(bench, "PyTorch") if provider == "eager" else OPPONENTS.get(provider, provider)


def gpt2_small(results: Results) -> Iterator[str]:
    """Write a training of GPT-2 small by PyTorch and by the kernels."""
    for name, found in of_bench(results, "gpt2_small").items():
        theirs, ours = found["rows"]
        differences = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        yield f"""### GPT-2 small, with and without the kernels

`python -m bench.gpt2_small` trains GPT-2 small, with relu² and rotary positions, from the same weights on the same
documents, {found["tokens"]:,} tokens a step, both compiled whole ({origin(name, found["meta"])}). PyTorch has
FlashAttention-2, torch.optim.Muon and AdamW. Over {len(differences)} steps losses differ by {max(differences):.4f} at
most.
"""
        yield tabulate(
            [
                {
                    **row,
                    "first": row["losses"][0],
                    "last": row["losses"][-1],
                    "ratio": theirs["median_milliseconds"] / row["median_milliseconds"],
                }
                for row in (theirs, ours)
            ],
            ("", "provider", ""),
            ("first loss", "first", ".4f"),
            ("last loss", "last", ".4f"),
            ("ms a step", "median_milliseconds", TENTHS),
            ("ratio", "ratio", ".2f"),
            ("peak memory", "peak_memory_bytes", format_bytes),
        )


def compare(bench: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare our row of a case with the fastest opponent's, in CUDA graphs; empty where one of them is missing."""
    ours = next((row for row in rows if row["provider"] == "pgolf" and row["graph_us"]), None)
    others = [row for row in rows if row["provider"].partition("_")[0] != "pgolf" and row["graph_us"]]
    if not ours or not others:
        return {}
    best = min(others, key=lambda row: row["graph_us"])
    opponent = provider_name(bench, best["provider"].removesuffix("_graph"))
    return {"ours": ours, "opponent": opponent, "time": best["graph_us"], "ratio": best["graph_us"] / ours["graph_us"]}


def runs(results: Results) -> Iterator[str]:
    """Write whole runs, the losses of all at some steps, and the spread of those that rounding moved."""
    files = of_bench(results, "reference_runs")
    if not files:
        return
    yield """### Runs

`python -m bench.reference_runs NAME --data-dir DIR` makes each, up to the last stage that has figures. Tokens a second
are those of all GPUs, and left out where other programs shared the GPU.
"""
    for run in files.values():
        run["speeds"] = {} if run["meta"].get("shared_gpu") else run["summary"].get("train")
    yield tabulate(
        files.values(),
        ("run", "file", ""),
        ("GPUs", "meta.processes", COUNT),
        ("steps", "losses", lambda losses: f"{len(losses):,}"),
        *((f"tokens/s {words}", f"speeds.tokens_per_second_{case}", COUNT) for case, words in CASES.items()),
        ("bpb, last weights", "summary.train.bits_per_byte", ".4f"),
        ("average", "summary.eval.before.bits_per_byte", ".4f"),
        ("quantised", "summary.eval.quantized.bits_per_byte", ".4f"),
        ("after test-time training", "summary.ttt.bits_per_byte", ".4f"),
        ("bytes", "summary.quantize.total_bytes", COUNT),
        ("commit", "commit", ""),
    )
    yield from notes(files)
    if whole := [run for run in files.values() if "quantize" in run["summary"]]:
        yield "Seconds of the stages, of them training's start (compiling, warming up), and peak memory:\n"
        yield tabulate(
            whole,
            ("run", "name", ""),
            ("start", "summary.train.startup_seconds", TENTHS),
            *((stage, f"summary.{stage}.seconds", TENTHS) for stage in STAGES),
            *((f"{stage}, peak", f"summary.{stage}.peak_memory_bytes", format_bytes) for stage in STAGES),
        )
    yield "Training losses by step, nats a token:\n"
    losses = ([run["name"], *(cell(loss(run, step), ".4f") for step in LOSS_STEPS)] for run in files.values())
    yield table(["run", *map(str, LOSS_STEPS)], losses)
    moved: dict[str, list[Mapping[str, Any]]] = {}
    for run in files.values():
        if group := re.fullmatch(r"(.+)_moved\d+", run["name"]):
            moved.setdefault(group[1], []).append(run)
    if moved:
        yield """Runs whose initial weights rounding has moved (`bench.moved_weights`): mean and standard deviation over
the runs of the mean loss of some steps, and of the bpb of the last weights.
"""
        windows = [
            [
                f"steps {first} to {last}",
                *(spread(run["losses"][first - 1 : last] for run in group) for group in moved.values()),
            ]
            for first, last in MEANS_OF_STEPS
        ]
        bits = [
            spread([bits] for run in group if (bits := lookup(run, "summary.train.bits_per_byte")))
            for group in moved.values()
        ]
        headers = [f"{name}, {len(group)} runs" for name, group in moved.items()]
        yield table(["", *headers], [*windows, ["bpb", *bits]])


def loss(run: Mapping[str, Any], step: int) -> float | None:
    """Return a run's loss at a step, counted from 1; None where there is none."""
    return run["losses"][step - 1] if step <= len(run["losses"]) else None


def spread(values: Iterable[Sequence[float]]) -> str:
    """Format mean and standard deviation of the means of several runs; a dash for fewer than two."""
    means = [statistics.fmean(each) for each in values if each]
    return f"{statistics.fmean(means):.4f} ± {statistics.stdev(means):.4f}" if len(means) > 1 else "–"


def notes(files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Write the notes of results files as a list, files with the same one together."""
    by_note: dict[str, list[str]] = {}
    for name, found in files.items():
        if note := found["meta"].get("note"):
            by_note.setdefault(note, []).append(name.partition("/")[2])
    if by_note:
        yield "".join(f"- {', '.join(names)}: {note}.\n" for note, names in by_note.items())


def test_time_training(results: Results) -> Iterator[str]:
    """Write test-time training by document length, and what its settings earn and cost."""
    timed = [(origin(name, found["meta"]), found) for name, found in of_bench(results, "test_time_training").items()]
    for name, found in of_bench(results, "prove").items():
        part = parts_of(found).get("test_time_training", {})
        if lookup(part, "figures.rows"):
            timed.append((origin(name, part["meta"]), part["figures"]))
    variants = of_bench(results, "ttt_variants")
    if timed or variants:
        yield "### Test-time training\n"
    for source, found in timed:
        yield f"""`python -m bench.test_time_training`, also a part of the proof, scores batches of equally long
documents. The floor is the arithmetic of the matrices at the chip's measured rate ({source}).
"""
        yield tabulate(
            sorted(found["rows"], key=lambda row: row["length"]),
            ("tokens of a document", "length", COUNT),
            ("documents", "documents", COUNT),
            ("seconds", "seconds", ".3f"),
            ("tokens/s", "tokens_per_s", COUNT),
            ("of the floor", "floor_share", ".0%"),
            ("peak memory", "peak_memory_bytes", format_bytes),
        )
        if mix := found.get("mix"):
            yield f"""On FineWeb's mix of lengths that is {mix["tokens_per_s"]:,.0f} tokens/s; the whole validation
split on 8 GPUs would take {mix["full_split_seconds_on_8_gpus"]:.0f} s.
"""
    if variants:
        yield """`python -m bench.ttt_variants --run-dir DIR` scores the same documents once for each variant: the
difference is to the first line, its error that of a bootstrap over documents. Seconds count from the first score on;
compiling and capturing come before.
"""
    for name, found in variants.items():
        trained = lookup(found, "meta.train.steps")
        weights = f", weights after {trained} steps" if trained else ""
        yield f"{origin(name, found['meta'])}, {found['meta']['documents']} documents{weights}:\n"
        yield tabulate(
            found["rows"],
            ("variant", "variant", ""),
            ("bpb", "bits_per_byte", ".5f"),
            ("difference", "difference", "+.5f"),
            ("± error", "standard_error", ".5f"),
            ("seconds", "seconds", TENTHS),
            ("before", "first_score_seconds", TENTHS),
            ("peak memory", "peak_memory_bytes", format_bytes),
        )


def presets(results: Results) -> Iterator[str]:
    """Write what presets reach in equal seconds."""
    for name, found in of_bench(results, "score").items():
        settings = ", ".join(f"`{setting}`" for setting in found["meta"]["settings"])
        seconds = next((s.partition("=")[2] for s in found["meta"]["settings"] if s.startswith("max_wall")), "equal")
        yield f"""### Presets, trained for {seconds} s each

`python -m bench.score` ({origin(name, found["meta"])}) trains each with {settings}, and scores the same documents, in
bits per byte of the original text. Differences are to the first, their errors those of a bootstrap over documents.
Seconds of scoring count from test-time training's first score on.
"""
        rows = []
        trained = {variant: entry for variant, entry in found["variants"].items() if "train" in entry}
        for variant, entry in trained.items():
            steps = {row["stage"]: row for row in found["comparison"] if row["variant"] == variant}
            rows.append({"variant": variant, **entry, "compared": steps})
        yield tabulate(
            rows,
            ("", "variant", ""),
            ("steps", "train.steps", COUNT),
            ("tokens/s before", "train.tokens_per_second_before_loop", COUNT),
            ("and after the loop", "train.tokens_per_second_after_loop", COUNT),
            ("average", "compared.average.bits_per_byte", ".4f"),
            ("quantised", "compared.quantized.bits_per_byte", ".4f"),
            ("after test-time training", "compared.ttt.bits_per_byte", ".4f"),
            ("difference", "compared.ttt.difference", "+.4f"),
            ("± error", "compared.ttt.error", ".4f"),
            ("seconds of scoring", "ttt.seconds", TENTHS),
            ("bytes with code", "quantize.total_bytes", COUNT),
        )


def quantization(results: Results) -> Iterator[str]:
    """Write what quantisation costs by its bytes, and what it takes."""
    measured = of_bench(results, "quantization")
    if measured:
        yield """### Quantisation

`python -m bench.quantization --run-dir DIR --ttt --times`. The tax is bpb over that of the weights before quantisation,
its error that of a bootstrap over documents. Bytes are those of a `.pgolf` file; lines from the second way on have one
part more than the way before.
"""
    for name, found in measured.items():
        weights = found["weights"]
        yield f"""Weights after {weights["steps"]:,} steps, {found["bits_per_byte"]:.5f} bpb on {found["documents"]}
documents ({origin(name, found["meta"])}; [plot](../bench/results/{name}.png)):
"""
        yield tabulate(
            found["rows"],
            ("way", "way", ""),
            ("bytes", "bytes", COUNT),
            ("tax", "tax", ".5f"),
            ("± error", "error", ".5f"),
            ("seconds", "seconds", TENTHS),
        )
        if tuned := found.get("tuned"):
            yield "With the tensors that are not quantised trained on afterwards, 40 steps of 65,536 tokens:\n"
            yield tabulate(
                tuned,
                ("way", "way", ""),
                ("bytes", "bytes", COUNT),
                ("tax", "tax", ".5f"),
                ("± error", "error", ".5f"),
                ("seconds of training", "seconds", TENTHS),
            )
        for row in found["test_time_training"]:
            yield f"""With test-time training without phases ({row["before"]:.5f} bpb before quantisation) the tax of
{row["way"]} is {row["tax"]:.5f} ± {row["error"]:.5f}.
"""
        if times := found["times"]:
            parts = f"Hessians {times['hessians']:.1f}, sensitivities {times['sensitivities']:.1f}"
            if "prepare" in times:
                codes = next(row["seconds"] for row in found["rows"] if row["way"] == found["rows"][-1]["way"])
                whole = times["hessians"] + times["sensitivities"] + times["prepare"] + codes
                parts += f", factors {times['prepare']:.1f}, record's steps and codes {codes:.1f}: {whole:.1f} in all"
            yield f"""Seconds: {parts}; the
record's file is packed in {times["pack"]:.1f} and read in {times["unpack"]:.1f} on one core.
"""
            if times["brotli_bytes"]:
                yield f"PR #1874's file takes brotli {times['brotli']:.0f} s and {times['brotli_bytes']:,} bytes.\n"


def errors(results: Results) -> Iterator[str]:
    """Write how exact scores are, and gradients where they were compared."""
    scored, graded = of_bench(results, "score_errors"), of_bench(results, "gradient_errors")
    if scored or graded:
        yield "### Errors against float32\n"
    if scored:
        yield """`python -m bench.score_errors --run-dir DIR`: mean nats of a target in bfloat16 and their error against
the references in float32, as a fixed model and with test-time training of some batches.
"""
        yield tabulate(
            [{**found, **row} for found in scored.values() for row in found["rows"]],
            ("file", "file", ""),
            ("way", "way", ""),
            ("fixed model", "evaluation.loss", ".5f"),
            ("error", "evaluation.error", "+.1e"),
            ("test-time training", "test_time_training.loss", ".5f"),
            ("error", "test_time_training.error", "+.1e"),
            ("rms error of a target", "test_time_training.rms_error", ".1e"),
            ("targets", "test_time_training.targets", COUNT),
            ("commit", "commit", ""),
        )
    for name, found in graded.items():
        yield f"""`python -m bench.gradient_errors RUN_DIR`: gradients' relative errors by group of parameters
({origin(name, found["meta"])}).
"""
        yield tabulate(
            [
                {"case": CASES[case], "group": group, "kernels": ours[0], "references": ways["references"][group][0]}
                for case in CASES
                if (ways := found.get(case))
                for group, ours in ways["kernels"].items()
            ],
            ("", "case", ""),
            ("group", "group", ""),
            ("kernels", "kernels", ".4f"),
            ("references", "references", ".4f"),
        )


def distributed(results: Results) -> Iterator[str]:
    """Write what was found on several GPUs."""
    for name, found in of_bench(results, "distributed").items():
        parts, everyone = parts_of(found), f"on_{found['meta']['processes']}"
        yield f"""### {found["meta"]["processes"]} GPUs

`python -m bench.distributed --data-dir DIR`, on one machine ({origin(name, found["meta"])}).
"""
        yield answers(parts)
        pairs = {batch: (pair, "on_1", everyone) for batch, pair in (lookup(parts, "steps.figures") or {}).items()}
        if lookup(parts, "nodes.figures.on_1_node"):
            pairs["record, two nodes of torchrun"] = (parts["nodes"]["figures"], "on_1_node", "on_2_nodes")
        if pairs:
            yield """The same steps on one GPU and on all, with the record's batch and with a micro-batch for each;
then on two nodes and on one. The ratio is that of tokens a second and GPU before the loop, the difference the largest
of the losses in the first 20 steps, nats.
"""
            rows = []
            for batch, (pair, *ways) in pairs.items():
                for way in ways:
                    losses = {f"step {step}": loss(pair[way], step) for step in (1, 10, 20)}
                    compared = pair if way == ways[1] else {}
                    rows.append({**compared, **pair[way], **losses, "batch": batch, "way": way.replace("_", " ")})
            yield tabulate(
                rows,
                ("batch", "batch", ""),
                ("", "way", ""),
                *((f"loss, step {step}", f"step {step}", ".4f") for step in (1, 10, 20)),
                ("tokens/s and GPU", "tokens_per_second_each_before_loop", COUNT),
                ("ratio", "ratio_before_loop", ".3f"),
                ("difference", "largest_difference", ".4f"),
            )
        if profile := lookup(parts, "profile.figures"):
            yield "A step with a micro-batch for each GPU, and its collectives:\n"
            yield tabulate(
                [
                    {**figures, "case": CASES[case], "collective": f"`{kernel.partition('(')[0]}`"}
                    | {"ms": milliseconds, "calls": calls}
                    for case, figures in profile.items()
                    for kernel, (milliseconds, calls) in figures["collectives"].items()
                ],
                ("", "case", ""),
                ("step, s", "step_seconds", ".4f"),
                ("tokens/s and GPU", "tokens_per_s", COUNT),
                ("collective", "collective", ""),
                ("ms", "ms", ".2f"),
                ("calls", "calls", COUNT),
            )
        if run := lookup(parts, "run.figures"):
            yield "All stages:\n"
            yield short_run(run)
        if scores := lookup(parts, "scores.figures"):
            yield f"""Test-time training on one GPU and on all: the losses of {scores["differing"]:,} of
{scores["targets"]:,} targets differ, and their mean by {scores["mean_difference"]:.1e} nats.
"""
            yield tabulate(
                [{"way": way.replace("_", " "), **scores[way]} for way in ("on_1", everyone)],
                ("", "way", ""),
                ("bpb", "bits_per_byte", ".5f"),
                ("seconds", "seconds", TENTHS),
                ("busy, each GPU", "busy_seconds", lambda each: ", ".join(f"{seconds:.1f}" for seconds in each)),
            )
        if stopped := lookup(parts, "stopped.figures"):
            yield "Seconds until all processes have ended after one was killed, or halted by SIGSTOP:\n"
            yield tabulate(
                [{"stage": stage, **ways} for stage, ways in stopped.items()],
                ("stage", "stage", ""),
                ("killed", "killed.seconds", TENTHS),
                ("halted", "halted.seconds", TENTHS),
            )


SECTIONS = (
    proof,
    training_step,
    kernels,
    gpt2_small,
    runs,
    presets,
    quantization,
    test_time_training,
    errors,
    distributed,
)
