"""The report of a run: one HTML page with plots, from the files in the run's folder; and the plot of an artifact.

The page leaves out stages that have not run. The same folder gives the same bytes. Plots need matplotlib (the extra
``report``); without it the page has the tables and says what to install.
"""

from __future__ import annotations

import dataclasses
import html
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf.common.files import FileError, read_json, write_aside
from pgolf.common.progress import format_bytes, format_duration
from pgolf.config import FIELDS, PRESETS, RunConfig
from pgolf.report.results import artifact_rows, score_rows

log = logging.getLogger(__name__)
Row = dict[str, Any]
STAGES = {
    "data": "Data",
    "train": "Training",
    "quantize": "Quantisation",
    "eval": "Evaluation",
    "ttt": "Test-time training",
}
STAGE_PARTS = {
    "startup": "compile and warm-up",
    "hessian": "Hessians",
    "sensitivity": "sensitivities",
    "export": "the program",
    "prepare": "factors",
    "quantize": "codes",
    "compress": "the file",
}


@dataclass
class RunRecord:
    """The content of a run's folder: its JSON files, the metrics by kind, and notes for the reader."""

    folder: Path
    config: Row
    environment: Row
    summary: Row
    train: list[Row]
    validation: list[Row]
    notes: list[str] = field(default_factory=list)


def write_report(run_dir: Path | str) -> Path:
    """Write ``run_dir``/report.html from the run's JSON files and metrics, and return its path.

    Leaves out an incomplete last line of metrics.jsonl, with a note in the report. Raises FileError if ``run_dir`` is
    no run's folder or a file in it is damaged.
    """
    record = read_run(run_dir)
    plots: dict[str, str] = {}
    try:
        from pgolf.report.plots import draw_plots  # needs matplotlib
    except ModuleNotFoundError as missing:
        record.notes.append(f"The plots are missing because {missing.name} is: pip install 'pgolf[report]'")
    else:
        plots = draw_plots(record.train, record.validation, record.summary)
    for note in record.notes:
        log.warning("report: %s", note)
    path = record.folder / "report.html"
    write_aside(path, render_html(record, plots))
    return path


def write_artifact_plot(path: Path | str, histograms: Mapping[str, Mapping[int, int]], matrices: Sequence[Row]) -> None:
    """Write `draw_artifact`'s plot as an SVG file that has the page's colours inside.

    Raises FileError for a path that does not end in .svg or cannot be written, and ImportError without matplotlib.
    """
    if Path(path).suffix != ".svg":
        raise FileError(f"{path} must end in .svg: plots are SVG files")
    try:
        from pgolf.report.plots import draw_artifact
    except ModuleNotFoundError as missing:
        raise ImportError(f"plots need {missing.name}: pip install 'pgolf[report]'") from missing
    head, tag_end, rest = draw_artifact(histograms, matrices).partition(">")
    style = f"{_COLOURS}:root {{ color: var(--text); background: var(--page); }}"
    write_aside(path, f"{head}{tag_end}<style>{style}</style>{rest}")


def read_run(run_dir: Path | str) -> RunRecord:
    """Read a run's folder. Raises FileError as `write_report` does."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileError(f"there is no run folder {folder}; `pgolf run --run-dir {folder}` makes one")
    if not (folder / "config.json").is_file():
        raise FileError(f"{folder} is no run folder: it has no config.json")
    notes: list[str] = []
    rows = _read_metrics(folder / "metrics.jsonl", notes)
    return RunRecord(
        folder,
        config=_read_object(folder / "config.json"),
        environment=_read_object(folder / "environment.json"),
        summary=_read_object(folder / "summary.json"),
        train=_latest_by_step(row for row in rows if row.get("kind") == "train"),
        validation=_latest_by_step(row for row in rows if row.get("kind") == "val"),
        notes=notes,
    )


def _read_object(path: Path) -> Row:
    """Read the JSON object in ``path``; return an empty one if there is no file."""
    return read_json(path) if path.is_file() else {}


def _read_metrics(path: Path, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"kind": row["kind"], "step": int(row["step"]), **row})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise FileError(f"{path}, line {number}, is no metrics row: {line[:80]!r}") from None
            notes.append(f"The last line of {path.name} (line {number}) is cut off and left out.")
    return rows


def _latest_by_step(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of each step, in order: a resumed run repeats the steps after its checkpoint."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def render_html(record: RunRecord, plots: Mapping[str, str]) -> str:
    """Return the page's HTML. ``plots`` maps captions to SVG text."""
    run = record.summary.get("run", {})
    title = str(run.get("run_id") or record.config.get("run_id") or record.folder.name)
    sections = [
        _headline(record.summary),
        "".join(f'<p class="note">{_escape(note)}</p>' for note in record.notes),
        _figures(plots),
        html_section("Stages", _stage_table(record.summary)),
        html_section("Settings that differ from the preset", _settings_table(record.config)),
        html_section("Environment", html_table(["", ""], _flatten(record.environment)) if record.environment else ""),
    ]
    return html_page(f"run {title}", title, _about(record), sections)


def html_page(name: str, title: str, about: str, sections: Iterable[str]) -> str:
    """Return a page of sections. ``name`` is what a window shows, after pgolf; ``about`` stands below the title."""
    texts = {key: _escape(text) for key, text in (("name", name), ("title", title), ("about", about))}
    return _PAGE.format(**texts, style=_COLOURS + _STYLE, body="\n".join(sections))


def _figures(plots: Mapping[str, str]) -> str:
    figures = (f"<figure><figcaption>{_escape(name)}</figcaption>{svg}</figure>" for name, svg in plots.items())
    return f"<div class='plots'>{''.join(figures)}</div>" if plots else ""


def _about(record: RunRecord) -> str:
    """Return the line below the title: preset, parameters, processes, data."""
    run, data = record.summary.get("run", {}), record.summary.get("data", {})
    facts = [f"preset {record.config.get('preset_name', 'unknown')}", f"seed {record.config.get('seed', 'unknown')}"]
    if "parameters" in run:
        facts.append(f"{run['parameters']:,} parameters")
    if "world_size" in run:
        facts.append(f"{run['world_size']} × {run.get('device', 'device')}")
    for key, label in (("train_tokens", "training tokens"), ("val_tokens", "validation tokens")):
        if key in data:
            facts.append(f"{data[key]:,} {label}")
    if record.config.get("case_coding"):
        facts.append("case-coded documents, their bytes by sidecars")
    return " · ".join(facts)


def _headline(summary: Mapping[str, Any]) -> str:
    artifact = artifact_rows(summary)
    tiles = score_rows(summary) + artifact[-1:]
    if artifact:
        (_, weights, _), (_, code, _), (label, total, share) = artifact
        tiles[-1] = (label, total, f"{share}: weights {weights}, code {code}")
    cells = "".join(
        f"<div><dt>{_escape(label)}</dt><dd>{_escape(value)}</dd><dd class='change'>{_escape(note)}</dd></div>"
        for label, value, note in tiles
    )
    return f"<dl class='tiles'>{cells}</dl>" if cells else "<p class='note'>No stage has finished yet.</p>"


def _stage_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for key, label in STAGES.items():
        block = summary.get(key)
        if not block:
            continue
        parts = [
            f"{name} {format_duration(block[f'{part}_seconds'])}"
            for part, name in STAGE_PARTS.items()
            if block.get(f"{part}_seconds") is not None
        ]
        seconds, memory = block.get("seconds"), block.get("peak_memory_bytes")
        rows.append(
            (
                label,
                "" if seconds is None else format_duration(seconds),
                "" if memory is None else format_bytes(memory),
                ", ".join(parts),
            )
        )
    return html_table(["Stage", "Time", "Peak memory", "Of which"], rows) if rows else ""


def _settings_table(config: Row) -> str:
    """Return a table of the settings that differ from the preset's, including names that this version lacks."""
    name = config.get("preset_name")
    preset = dataclasses.asdict(RunConfig.preset(name)) if name in PRESETS else {}
    rows = []
    for key, value in config.items():
        if key in ("run_id", "preset_name") or (key in preset and preset[key] == value):
            continue
        known = FIELDS[key].metadata["help"] if key in FIELDS else "unknown to this version of pgolf"
        rows.append((key, preset.get(key, "—"), value, known))
    if not rows:
        return "<p>None.</p>"
    return html_table(["Setting", "Preset", "This run", "Meaning"], rows)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            rows += _flatten(entry, f"{prefix}{key}.")
        elif isinstance(entry, list):
            rows.append((f"{prefix}{key}", ", ".join(map(str, entry)) or "—"))
        else:
            rows.append((f"{prefix}{key}", "—" if entry is None else str(entry)))
    return rows


def html_section(title: str, body: str) -> str:
    """Return a section of a page; nothing without a body."""
    return f"<section><h2>{_escape(title)}</h2>{body}</section>" if body else ""


def html_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; its cells are escaped."""
    head = "".join(f"<th>{_escape(name)}</th>" for name in headers)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table>{f'<thead><tr>{head}</tr></thead>' if any(headers) else ''}{body}</table></div>"


def _escape(value: Any) -> str:
    return html.escape(str(value))


_COLOURS = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2330; --soft: #667085; --line: #e3e7ee; --card: #f6f8fb;
  --one: #2563c9; --two: #c2570c; --warn: #fff4dc; }
@media (prefers-color-scheme: dark) { :root { --page: #12161d; --text: #e6eaf1; --soft: #98a3b5; --line: #2b3340;
  --card: #1a2029; --one: #78a9ff; --two: #ff9d5c; --warn: #3a2f14; } }
"""
_STYLE = """\
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { margin: 0; font-size: 1.7rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
.about { color: var(--soft); margin: .2rem 0 1.5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem;
  margin: 0 0 1.5rem; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; }
dt { color: var(--soft); font-size: .82rem; } dd { margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.3; }
dd.change { font-size: .85rem; font-weight: 400; color: var(--soft); }
.note { background: var(--warn); border-radius: .4rem; padding: .5rem .9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; overflow: visible; } figcaption { font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; color: var(--soft); font-weight: 500; } th, td { padding: .35rem 1.2rem .35rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: break-word; }
td:first-child { white-space: nowrap; } td:last-child { width: 60%; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pgolf {name}</title><style>{style}</style></head>
<body>
<h1>{title}</h1>
<p class="about">{about}</p>
{body}
</body>
</html>
"""
