"""Sweep the kernels' launch parameters on this chip: ``python -m bench.tune [family]``.

Starts at the parameters in force and changes one at a time while that gains, or tries all combinations of the choices
with ``--exhaustive``. Every candidate is checked against float64 before it is timed; what does not compile, does not
fit or is wrong is skipped with a line. The winners go into ``kernels/tuned/<chip>.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from bench.__main__ import FAMILIES as MODULES
from bench.harness import OURS, REFERENCE, Case, Tuning, as_tensors, check, limits, one_line, require
from bench.results_files import describe, write
from bench.timing import capture, chip_name, default_device, time_calls
from pgolf.common.progress import format_table
from pgolf.kernels.common import backend, launch

FAMILIES: dict[str, Mapping[str, Tuning]] = {
    module.__name__.removeprefix("bench."): module.TUNING for module in MODULES if module.TUNING
}
GAIN = 0.995  # a candidate replaces the best one only below so much of its time
Parameters = dict[str, int]


class Result(NamedTuple):
    """Best parameters found for an entry, with their time and that of the parameters before."""

    family: str
    entry: str
    parameters: Parameters
    before_us: float
    after_us: float


@contextmanager
def overridden(family: str, entry: str, device: torch.device, parameters: Parameters) -> Iterator[None]:
    """Inside, kernels on ``device`` get ``parameters`` for this entry.

    `launch_parameters` hands out one dictionary for each entry and device, and it is that one which changes. What
    kernels have made of the parameters and cached is forgotten.
    """
    table = launch.launch_parameters(family, entry, device)
    before = dict(table)
    table.update(parameters)
    _forget()
    try:
        yield
    finally:
        table.update(before)
        _forget()


def _forget() -> None:
    modules = [module for name, module in sys.modules.items() if name.startswith("pgolf.kernels.")]
    for value in (value for module in modules for value in vars(module).values()):
        if hasattr(value, "cache_clear") and value is not launch.launch_parameters:
            value.cache_clear()


def neighbours(name: str, value: int, choices: Mapping[str, Sequence[int]]) -> list[int]:
    """Values to try for a parameter instead of ``value``."""
    if name in choices:
        return [choice for choice in choices[name] if choice != value]
    if value > 1 and value & (value - 1) == 0:
        return [value // 2, value * 2]
    return [other for other in (value - 1, value + 1) if other > 0]


class Sweep:
    """Times the candidates of one entry, each once."""

    def __init__(self, family: str, entry: str, case: Case, device: torch.device, quick: bool = False) -> None:
        self.family, self.entry, self.case, self.device, self.quick = family, entry, case, device, quick
        self.exact = as_tensors(case.exact())
        self.allowed = limits(OURS, check(REFERENCE, case.providers[REFERENCE](), self.exact))
        self.times: dict[tuple[tuple[str, int], ...], float] = {}

    def time(self, parameters: Parameters) -> float:
        """Microseconds with these parameters; infinite where they do not work."""
        key = tuple(sorted(parameters.items()))
        if key not in self.times:
            try:
                self.times[key] = self._time(parameters)
                text = f"{self.times[key]:.1f} µs"
            except Exception as reason:  # out of resources, a shape that does not compile, a wrong result
                self.times[key] = float("inf")
                text = f"skipped: {one_line(reason)}"
            settings = " ".join(f"{name}={value}" for name, value in parameters.items())
            print(f"{self.family} {self.entry} {len(self.times)}: {settings}: {text}", flush=True)
        return self.times[key]

    def _time(self, parameters: Parameters) -> float:
        with overridden(self.family, self.entry, self.device, parameters):
            function = self.case.providers[OURS]()
            require(check(OURS, function, self.exact), self.allowed)
            if self.device.type == "cuda":  # a graph leaves out the gaps, which no launch parameter changes
                function = capture(function)[0].replay
            return time_calls(function, self.device, self.quick).median_us

    def climb(self, start: Parameters, choices: Mapping[str, Sequence[int]]) -> Parameters:
        """The best parameters on the way of single changes from ``start``."""
        best, improved = dict(start), True
        while improved:
            improved = False
            for name in start:
                for value in neighbours(name, best[name], choices):
                    candidate = {**best, name: value}
                    if self.time(candidate) < GAIN * self.time(best):
                        best, improved = candidate, True
        return best

    def exhaust(self, start: Parameters, choices: Mapping[str, Sequence[int]]) -> Parameters:
        """The best of ``start`` and all combinations of choices and neighbours."""
        values = [[start[name], *neighbours(name, start[name], choices)] for name in start]
        candidates = [dict(zip(start, combination, strict=True)) for combination in itertools.product(*values)]
        return min(candidates, key=self.time)


def tune(
    family: str, entry: str, tuning: Tuning, device: torch.device, *, exhaustive: bool = False, quick: bool = False
) -> Result:
    """Sweep one entry."""
    torch.manual_seed(0)
    sweep = Sweep(family, entry, tuning.builder(device, quick), device, quick)
    start = dict(launch.launch_parameters(family, entry, device))
    before = sweep.time(start)
    best = (sweep.exhaust if exhaustive else sweep.climb)(start, tuning.choices)
    return Result(family, entry, best, before, sweep.time(best))


def write_table(folder: Path, chip: str, meta: Mapping[str, object], results: Sequence[Result]) -> Path:
    """Put the winners into the chip's table; a new one starts as a copy of the H100's. Returns its path."""
    path = folder / f"{chip}.json"
    table = json.loads((path if path.exists() else folder / "h100.json").read_text(encoding="utf-8"))
    for result in results:
        if result.after_us < float("inf"):
            table["cases"][result.family][result.entry] = result.parameters
    write(path, meta, cases=table["cases"])
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 where an entry has no parameters that work, 2 without a GPU, else 0."""
    parser = argparse.ArgumentParser("python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], metavar="family", help=", ".join(FAMILIES))
    parser.add_argument("--entry", action="append", default=[], dest="entries", help="only this entry of the table")
    parser.add_argument("--exhaustive", action="store_true", help="all combinations of the choices")
    parser.add_argument("--dry-run", action="store_true", help="leave the table as it is")
    arguments = parser.parse_args(argv)
    device = default_device()
    if device.type != "cuda":
        print("launch parameters are tuned on a CUDA GPU, and there is none", file=sys.stderr)
        return 2
    backend.set_backend("triton")  # `auto` may take a reference
    meta = describe("tune", device)
    results = []
    for family in arguments.families or FAMILIES:
        for entry, tuning in FAMILIES[family].items():
            if not arguments.entries or entry in arguments.entries:
                results.append(tune(family, entry, tuning, device, exhaustive=arguments.exhaustive))
                if not arguments.dry_run:
                    print(write_table(launch.TUNED, chip_name(device), meta, results[-1:]), flush=True)
    lines = [
        (family, entry, f"{before:.1f}", f"{after:.1f}", json.dumps(parameters))
        for family, entry, parameters, before, after in results
    ]
    print(format_table(lines, ("family", "entry", "µs before", "after", "parameters")))
    return 0 if all(result.after_us < float("inf") for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
