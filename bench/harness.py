"""Runs the cases of the kernel benchmarks: correctness first, then the time, a table, and a results file.

A case is one problem on random data that several providers solve: `pgolf` is ours (`pgolf_…` a variant), `eager` plain
PyTorch, `compile` torch.compile of it, `compile_graph` that in a CUDA graph; and public packages that are installed.
Every provider's results are compared with float64 first, and a provider that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.results_files import add_options, describe, read_entries, results_path, write
from bench.timing import capture, chip_name, default_device, measure_ceilings, time_calls
from pgolf.common.progress import format_table
from pgolf.kernels.common.backend import set_backend

OURS, REFERENCE = "pgolf", "eager"
OURS_TOLERANCE, TOLERANCE = 1.5, 4.0  # a result's error against float64 may be so many times the reference's,
ROUNDING = 2.0**-8  # and this more: by luck a scalar can be exact in the reference

Function = Callable[[], Any]


@dataclass
class Case:
    """One problem.

    providers: by name a function that makes the function to time; it may raise ImportError for a package that is
    absent. exact: the results in float64. moved_bytes, operations: the least that any algorithm known moves and
    computes; they give the rates and, with the chip's ceilings, the floor of the time. trainings: by provider a
    function that trains with it and returns the losses of all steps.
    """

    providers: dict[str, Callable[[], Function]]
    exact: Callable[[], Any]
    moved_bytes: int
    operations: int = 0
    trainings: dict[str, Callable[[], list[float]]] = field(default_factory=dict)

    def floor_us(self, ceilings: Mapping[str, float]) -> float:
        """Time at the chip's ceilings."""
        copy = self.moved_bytes / ceilings["copy_gb_per_s"] / 1e3
        return max(copy, self.operations / ceilings["matmul_tflop_per_s"] / 1e6)


@dataclass
class Row:
    """One provider's result.

    ratio: its time over ours; in our row the best opponent's, replayed or not, over ours. peak_mib: the most memory
    that a call holds beyond its arguments; None on a CPU and for a graph, which holds its memory for good. losses: of a
    training with it, where the case has one.
    """

    provider: str
    median_us: float
    p20_us: float
    p80_us: float
    graph_us: float | None
    ceiling_share: float
    ratio: float | None
    error: float
    peak_mib: float | None = None
    losses: list[float] | None = None


Builder = Callable[[torch.device, bool], Case]  # (device, quick) -> Case, smaller if quick or on a CPU


class Tuning(NamedTuple):
    """How one entry of ``kernels/tuned`` is tuned: a case whose `pgolf` provider uses it, and values to try.

    A parameter without choices is tried at half and twice its value if it is a power of two, else at one less and more.
    """

    builder: Builder
    choices: Mapping[str, Sequence[int]] = {}


def as_tensors(results: Any) -> list[torch.Tensor]:
    """A function's results as a list: one tensor or a sequence of them."""
    return [results] if isinstance(results, torch.Tensor) else list(results)


def relative_errors(results: Any, exact: Sequence[torch.Tensor]) -> list[float]:
    """‖result - exact‖ / ‖exact‖ of each result; infinite where something is not a number."""
    errors = []
    for got, want in zip(as_tensors(results), exact, strict=True):
        if got.shape != want.shape:
            raise ValueError(f"a result of shape {tuple(got.shape)}, and it should be {tuple(want.shape)}")
        error = (got.double() - want).norm() / want.norm().clamp_min(1e-300)
        errors.append(float(error.nan_to_num(float("inf"))))
    return errors


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile of ``function``; on a CPU it is only traced, for smoke tests."""
    backend = "inductor" if device.type == "cuda" else "eager"
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def with_backward(
    function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], dy: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the result of ``function`` and the gradients of its inputs for the result's gradient ``dy``."""
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def on_inputs(
    function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], dy: torch.Tensor, *, backward: bool
) -> Function:
    """Bind ``function`` to its inputs: `with_backward`, or without gradients if there is no ``backward``."""
    if not backward:
        return partial(torch.no_grad()(function), *inputs)
    return partial(with_backward, function, tuple(value.requires_grad_() for value in inputs), dy)


class _Poisoned:
    """Memory that torch.empty gives is NaN inside, so that what a kernel leaves out shows."""

    def __enter__(self) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)


def check(name: str, function: Function, exact: Sequence[torch.Tensor]) -> list[float]:
    """Run ``function`` once, as provider ``name``, and return its results' errors."""
    with _Poisoned() if _is_ours(name) else nullcontext():
        return relative_errors(function(), exact)


def limits(provider: str, reference_errors: Sequence[float]) -> list[float]:
    """The largest errors that a provider's results may have, given those of the reference."""
    factor = OURS_TOLERANCE if _is_ours(provider) else TOLERANCE
    return [factor * error + ROUNDING for error in reference_errors]


def require(errors: Sequence[float], limits: Sequence[float]) -> float:
    """The largest of ``errors``. Raises ArithmeticError where one is above its limit or not a number."""
    for error, limit in zip(errors, limits, strict=True):
        if not error <= limit:
            raise ArithmeticError(f"wrong, an error of {error:.1e}, and {limit:.1e} is allowed")
    return max(errors)


def one_line(reason: Exception) -> str:
    """An exception for a line of the log."""
    return f"{type(reason).__name__}: {(str(reason).strip() or '-').splitlines()[0][:200]}"


def measure(
    bench: str,
    name: str,
    case: Case,
    ceilings: Mapping[str, float],
    device: torch.device,
    *,
    providers: Sequence[str] = (),
    quick: bool = False,
) -> tuple[list[Row], bool]:
    """Check and time a case's providers, all or those named; the second result says whether ours was right."""
    torch.compiler.reset()
    exact = as_tensors(case.exact())
    floor = case.floor_us(ceilings)
    rows: list[Row] = []
    right = True
    reference_errors = check(REFERENCE, case.providers[REFERENCE](), exact)

    def add(provider: str, timing: Sequence[float], graph: float | None, error: float, *others: Any) -> None:
        rows.append(Row(provider, *timing, graph, floor / timing[0], None, error, *others))

    for provider, build in case.providers.items():
        if providers and provider not in providers:
            continue
        try:
            function = build()
            allowed = limits(provider, reference_errors)
            require(check(provider, function, exact), allowed)
            timing = time_calls(function, device, quick)
            error = require(relative_errors(function(), exact), allowed)  # what it computes in a row, too
            peak = peak_mib(function, device)
            losses = case.trainings[provider]() if provider in case.trainings else None
        except Exception as reason:  # whatever a package or kernel does, the others are still timed
            _skipped(bench, name, provider, reason)
            right = right and not _is_ours(provider)
            continue
        graph = _time_graph(function, exact, allowed, device, quick, f"{bench} {name} {provider}")
        add(provider, timing, graph and graph[0], error, peak, losses)
        if provider.startswith("compile") and graph:
            add(f"{provider}_graph", graph, graph[0], error)
    _set_ratios(rows)
    return rows, right


def peak_mib(function: Function, device: torch.device) -> float | None:
    """The most memory that a call of ``function`` holds beyond what is held before it, in MiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _time_graph(
    function: Function,
    exact: Sequence[torch.Tensor],
    allowed: Sequence[float],
    device: torch.device,
    quick: bool,
    where: str,
) -> Sequence[float] | None:
    """Times of ``function`` replayed from a CUDA graph; None on a CPU and for what cannot be captured."""
    if device.type != "cuda":
        return None
    try:
        graph, results = capture(function)
        graph.replay()
        require(relative_errors(results, exact), allowed)
        return time_calls(graph.replay, device, quick)
    except Exception as reason:
        torch.cuda.synchronize()
        print(f"{where}: not timed in a CUDA graph: {one_line(reason)}", file=sys.stderr)
        return None


def _is_ours(provider: str) -> bool:
    return provider.partition("_")[0] == OURS  # pgolf, and variants of it as pgolf_atomic


def _set_ratios(rows: list[Row]) -> None:
    ours = next((row for row in rows if row.provider == OURS), None)
    if ours is None:
        return
    for row in rows:
        row.ratio = row.median_us / ours.median_us
    if others := [row for row in rows if not _is_ours(row.provider)]:
        ours.ratio = min(min(row.median_us, row.graph_us or row.median_us) for row in others) / ours.median_us


def _skipped(bench: str, name: str, provider: str, reason: Exception) -> None:
    if isinstance(reason, ImportError):
        _say_once(f"{bench}: {provider} skipped: {reason.name or reason} is not installed")
    else:
        print(f"{bench} {name}: {provider} skipped: {one_line(reason)}", file=sys.stderr)


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def table(rows: Iterable[Row], moved_bytes: int, operations: int) -> str:
    """Format the rows of one case, the fastest first; TFLOP/s where it computes, otherwise GB/s."""
    rows = sorted(rows, key=lambda row: row.median_us)
    computes, trains = operations > 0, any(row.losses for row in rows)
    headers = (
        "provider",
        "µs",
        "p20",
        "p80",
        "graph µs",
        "TFLOP/s" if computes else "GB/s",
        "of ceiling",
        "ratio",
        "error",
        "peak MiB",
        *(["last loss"] if trains else []),
    )
    work = operations / 1e6 if computes else moved_bytes / 1e3
    lines = [
        (
            row.provider,
            f"{row.median_us:.1f}",
            f"{row.p20_us:.1f}",
            f"{row.p80_us:.1f}",
            "" if row.graph_us is None else f"{row.graph_us:.1f}",
            f"{work / row.median_us:,.4g}",
            f"{row.ceiling_share:.1%}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.error:.1e}",
            "" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
            *([f"{row.losses[-1]:.4f}" if row.losses else ""] if trains else []),
        )
        for row in rows
    ]
    return format_table(lines, headers)


def write_case(path: Path, meta: Mapping[str, Any], case: str, rows: Sequence[Row], cases: Container[str]) -> None:
    """Write the rows of a case; a file of earlier calls keeps its other cases, except what has left ``cases``."""
    kept = {name: entry for name, entry in read_entries(path, meta, "cases").items() if name in cases}
    write(path, meta, cases=kept | {case: {"rows": [*map(_as_written, rows)]}})


def _as_written(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != "losses" or value}


def main(benches: Mapping[str, Mapping[str, Builder]], description: str, argv: Sequence[str] | None = None) -> int:
    """Command line of one or several benchmarks; returns 1 where ours failed or was wrong, else 0."""
    parser = argparse.ArgumentParser(description=description)
    cases = sorted({name for builders in benches.values() for name in builders})
    parser.add_argument("--case", action="append", default=[], choices=cases, dest="cases", metavar="NAME")
    parser.add_argument("--provider", action="append", default=[], dest="providers", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small problems and few calls: a smoke test")
    add_options(parser, "", "; a folder, with a file for each family")
    arguments = parser.parse_args(argv)
    device, quick = default_device(), arguments.quick
    if device.type == "cuda":
        set_backend("triton")  # `auto` may take a reference
    ceilings = measure_ceilings(device, quick)
    print(f"{chip_name(device)}: " + ", ".join(f"{name} {value:,.4g}" for name, value in ceilings.items()))
    right = True
    for bench, builders in benches.items():
        meta = {**describe(bench, device, arguments.commit), "ceilings": ceilings}
        target = None if quick or arguments.providers else results_path(chip_name(device), bench)
        if arguments.results:
            target = arguments.results / f"{bench}.json"
        for name in (name for name in builders if not arguments.cases or name in arguments.cases):
            rows, fine = _run(bench, name, builders[name], ceilings, device, arguments.providers, quick)
            right = right and fine
            if target is not None:
                write_case(target, meta, name, rows, builders)
        if target is not None:
            print(f"\n{target}")
    return 0 if right else 1


def _run(
    bench: str,
    name: str,
    build: Builder,
    ceilings: Mapping[str, float],
    device: torch.device,
    providers: Sequence[str],
    quick: bool,
) -> tuple[list[Row], bool]:
    torch.manual_seed(0)
    try:
        case = build(device, quick)
        quick = quick or device.type != "cuda"
        rows, right = measure(bench, name, case, ceilings, device, providers=providers, quick=quick)
    except Exception as reason:  # as out of memory: the other cases are still measured
        print(f"{bench} {name} failed: {one_line(reason)}", file=sys.stderr)
        return [], False
    print(f"\n{bench} {name}\n{table(rows, case.moved_bytes, case.operations)}", flush=True)
    return rows, right
