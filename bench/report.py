"""What the kernel benchmarks report: rows, tables, the run's description, and one JSON file for each chip."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pgolf.progress import format_table
from pgolf.runtime import World, describe_environment

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "gram-newton-schulz",
    "quack-kernels",
    "dion",
    "flash-muon",
    "liger-kernel",
    "flash-linear-attention",
    "torchao",
    "gemlite",
)


@dataclass
class Row:
    """One provider's result. ratio: its time over ours; in our row the best opponent's, replayed or not, over ours."""

    bench: str
    case: str
    provider: str
    median_us: float
    p20_us: float
    p80_us: float
    graph_us: float | None
    ceiling_share: float
    ratio: float | None
    error: float


def table(rows: Iterable[Row], moved_bytes: int, operations: int) -> str:
    """The rows of one case for a reader, the fastest first; TFLOP/s where it computes, otherwise GB/s."""
    computes = operations > 0
    headers = ("provider", "µs", "p20", "p80", "graph µs", "TFLOP/s" if computes else "GB/s", "of ceiling", "ratio",
               "error")  # fmt: skip
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
        )
        for row in sorted(rows, key=lambda row: row.median_us)
    ]
    return format_table(lines, headers)


def describe(device: torch.device, commit: str = "") -> dict[str, Any]:
    """Chip, versions of what takes part, commit and date. ``commit`` tells it where this is not that checkout."""
    environment = describe_environment(World(0, 1, device))
    versions = dict(environment["versions"])
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "chip": environment["chip"],
        "versions": versions,
        "commit": commit or environment["git_commit"],
        "date": date,
    }


def write_json(
    path: Path, meta: Mapping[str, Any], rows: Sequence[Row], bench: str, case: str, cases: Container[str]
) -> None:
    """Write ``meta`` and the rows of a case; an older file keeps those of other cases, except what left ``cases``."""
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    kept = [row for row in old if row["bench"] != bench or (row["case"] != case and row["case"] in cases)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"meta": {**meta}, "rows": [*kept, *map(asdict, rows)]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
