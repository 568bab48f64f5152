"""Plots of a run and of an artifact as SVG text in the page's font and colours, light or dark. Needs matplotlib."""

from __future__ import annotations

import html
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Row = dict[str, Any]
Summary = Mapping[str, Any]
POINTS = 400  # of a curve; a longer one is averaged in 400 bins

# Placeholders for the page's colours, which `_svg` replaces.
TEXT, SOFT, LINE, ONE, TWO = "#010101", "#020202", "#030303", "#040404", "#050505"
PAGE_COLOURS = {TEXT: "currentColor", SOFT: "var(--soft)", LINE: "var(--line)", ONE: "var(--one)", TWO: "var(--two)"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pgolf",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.6,
}


def draw_plots(train: Sequence[Row], validation: Sequence[Row], summary: Summary) -> dict[str, str]:
    """Return the SVG text, by caption in reading order, of each plot for which there are numbers.

    Args:
        train, validation: rows of metrics.jsonl of that kind, by step.
        summary: the content of summary.json.
    """
    plots: dict[str, str] = {}
    with matplotlib.style.context(["default", STYLE]):
        if train:
            plots["Training loss, nats a token"] = _loss(train, validation)
            plots["Learning rate (share of peak), momentum"] = _schedule(train)
            plots["Throughput, tokens a second"] = _throughput(train)
        scores = _stage_scores(summary)
        if scores:
            plots["Bits per byte after every stage"] = _scores(scores, "bits per byte")
        by_length = [row for row in summary.get("ttt", {}).get("by_length", []) if row["documents"]]
        if by_length:
            plots["Bits per byte by length of document"] = _by_length(by_length)
        classes = summary.get("quantize", {}).get("bytes_by_class", {})
        if classes:
            plots["Bytes of the artifact by class of tensor"] = _bytes_by_class(classes)
    return plots


def draw_artifact(histograms: Mapping[str, Mapping[int, int]], matrices: Sequence[Row]) -> str:
    """Return the SVG text of an artifact: a histogram of codes by class, and matrices' bits against sensitivity.

    Args:
        histograms: by class of matrix, how often each code occurs.
        matrices: rows with ``kind``, ``spent_bits`` (else ``entropy_bits``) and ``sensitivity``; without any
            sensitivity the second kind of plot is left out.
    """
    points = [row for row in matrices if row["sensitivity"]]
    count = len(histograms) + bool(points)
    rows = -(-count // 2)
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(8.4, 2.6 * rows), layout="constrained")
        cells = iter(figure.subplots(rows, 2, squeeze=False).flat)
        for (kind, histogram), axes in zip(histograms.items(), cells, strict=False):
            codes = range(min(histogram), max(histogram) + 1)
            total = sum(histogram.values())
            axes.stairs(
                [histogram.get(code, 0) / total for code in codes],
                [code - 0.5 for code in (*codes, codes[-1] + 1)],
                fill=True,
                color=ONE,
            )
            axes.set_title(f"{kind}, {total:,} codes", loc="left", fontsize=10, color=TEXT)
            axes.set_xlabel("code")
        if points:
            _bits_by_sensitivity(next(cells), points)
        for axes in cells:
            axes.set_axis_off()
        described = ", ".join(f"{kind} from {min(found)} to {max(found)}" for kind, found in histograms.items())
        also = f"; scatter plot of the bits of {len(points)} matrices against their sensitivity" if points else ""
        return _svg(figure, f"Histograms of codes: {described}{also}.")


def _bits_by_sensitivity(axes: Axes, points: Sequence[Row]) -> None:
    for kind, marker in zip(dict.fromkeys(row["kind"] for row in points), "os^Dv", strict=False):
        of_kind = [row for row in points if row["kind"] == kind]
        bits = [row["entropy_bits"] if row["spent_bits"] is None else row["spent_bits"] for row in of_kind]
        axes.plot([row["sensitivity"] for row in of_kind], bits, marker, color=ONE, alpha=0.7, markersize=4, label=kind)
    axes.set_xscale("log")
    axes.set_title("bits a weight against sensitivity", loc="left", fontsize=10, color=TEXT)
    axes.set_xlabel("second derivative of the loss, nats a token")
    axes.legend(frameon=False, fontsize=8)


def _loss(train: Sequence[Row], validation: Sequence[Row]) -> str:
    figure, axes = _axes()
    _curve(axes, train, "loss", ONE, "training")
    if validation:
        axes.plot(
            [row["step"] for row in validation], [row["loss"] for row in validation], "o", color=TWO, label="validation"
        )
        axes.legend(frameon=False)
    _mark_looping(axes, train)
    last = train[-1]
    return _svg(figure, f"Line plot of the training loss over {last['step']:,} steps; it ends at {last['loss']:.3f}.")


def _schedule(train: Sequence[Row]) -> str:
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, key, colour, label in ((upper, "lr_scale", ONE, "rate"), (lower, "muon_momentum", TWO, "momentum")):
        _curve(axes, train, key, colour, label)
        axes.set_ylabel(label)
    upper.set_ylim(bottom=0)
    _finish_steps(lower)
    return _svg(figure, "Two line plots over the steps: the learning rate's scale and Muon's momentum.")


def _throughput(train: Sequence[Row]) -> str:
    figure, axes = _axes()
    _curve(axes, train, "tokens_per_second", ONE, "tokens a second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    _mark_looping(axes, train)
    speeds = sorted(row["tokens_per_second"] for row in train if row.get("tokens_per_second") is not None)
    median = f"; the median is {speeds[len(speeds) // 2]:,.0f}" if speeds else ""
    return _svg(figure, f"Line plot of tokens a second over the steps{median}.")


def _stage_scores(summary: Summary) -> list[tuple[str, float]]:
    evaluation = summary.get("eval", {})
    stages = {
        "last weights": summary.get("train", {}),
        "averaged weights": evaluation.get("before", {}),
        "quantised": evaluation.get("quantized", {}),
        "quantised, sliding": evaluation.get("sliding", {}),
        "test-time training": summary.get("ttt", {}),
    }
    return [(name, block["bits_per_byte"]) for name, block in stages.items() if block.get("bits_per_byte") is not None]


def _by_length(rows: Sequence[Row]) -> str:
    points = [
        (f"{_interval(row['low'], row['high'])} tokens, {row['documents']:,} documents", row["bits_per_byte"])
        for row in rows
    ]
    return _scores(points, "bits per byte")


def _interval(low: int, high: int | None) -> str:
    return f"{low:,} and more" if high is None else f"{low:,} to {high:,}"


def _scores(points: Sequence[tuple[str, float]], label: str) -> str:
    """Draw dots instead of bars, because the differences are small and the axis does not start at 0."""
    figure, axes = _rows([name for name, _ in points])
    values = [value for _, value in points]
    axes.plot(values, range(len(values)), "o", color=ONE, markersize=7)
    for index, value in enumerate(values):
        axes.annotate(f"{value:.4f}", (value, index), (8, 0), textcoords="offset points", va="center", color=TEXT)
    axes.set_xlabel(label)
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return _svg(figure, f"Dot plot of {label}: " + ", ".join(f"{name} {value:.4f}" for name, value in points) + ".")


def _bytes_by_class(classes: Mapping[str, int]) -> str:
    points = sorted(classes.items(), key=lambda item: -item[1])
    figure, axes = _rows([name for name, _ in points])
    axes.barh(range(len(points)), [size for _, size in points], height=0.62, color=ONE)
    for index, (_, size) in enumerate(points):
        axes.annotate(f"{size:,}", (size, index), (6, 0), textcoords="offset points", va="center", color=TEXT)
    axes.set_xlim(0, 1.28 * max(size for _, size in points))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("bytes")
    return _svg(figure, "Bar plot of bytes: " + ", ".join(f"{name} {size:,}" for name, size in points) + ".")


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.6), layout="constrained")
    axes = figure.subplots()
    _finish_steps(axes)
    return figure, axes


def _rows(names: Sequence[str]) -> tuple[Figure, Axes]:
    """Return axes with one labelled row for each name, the first on top."""
    figure = Figure(figsize=(6.2, max(2.2, 0.9 + 0.42 * len(names))), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names, color=TEXT)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _finish_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _curve(axes: Axes, rows: Sequence[Row], key: str, colour: str, label: str) -> None:
    """Draw a line through the means of at most POINTS bins and, if bins hold several steps, a band of their range."""
    rows = [row for row in rows if row.get(key) is not None]
    size = -(-len(rows) // POINTS) or 1
    bins = [rows[start : start + size] for start in range(0, len(rows), size)]

    def each(reduce: Callable[[Sequence[float]], float], name: str) -> list[float]:
        return [reduce([row[name] for row in part]) for part in bins]

    steps = each(_mean, "step")
    if size > 1:
        axes.fill_between(steps, each(min, key), each(max, key), color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, each(_mean, key), color=colour, label=label)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mark_looping(axes: Axes, train: Sequence[Row]) -> None:
    """Draw a dashed line at the step at which the loop started."""
    first = next((row["step"] for row in train if row.get("looping")), None)
    if first is None or first == train[0]["step"]:
        return
    axes.axvline(first, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.annotate(
        f"loops on, step {first:,}",
        (first, 1),
        (4, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        color=SOFT,
    )


def _short(value: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def _svg(figure: Figure, description: str) -> str:
    """Return the figure as an <svg> element in the page's colours and font, with a description for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for placeholder, colour in PAGE_COLOURS.items():
        text = text.replace(placeholder, colour)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)  # matplotlib's font and its fallbacks
    prefix = f"p{zlib.crc32(description.encode()):x}-"
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
