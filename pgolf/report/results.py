"""The results of a run as a table, from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgolf.common.progress import format_duration, format_table


def summary_table(summary: Mapping[str, Any]) -> str:
    """Format the run's results as aligned text, without lines for stages that have not run."""
    return format_table([(label, value, note) for label, value, note in score_rows(summary) + artifact_rows(summary)])


def score_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (label, value, note) for the steps of training and for each score in the summary."""
    rows: list[tuple[str, str, str]] = []
    train = summary.get("train", {})
    if "steps" in train:
        rows.append(
            ("Steps", f"{train['steps']:,}", f"in {format_duration(train.get('clock_seconds', train['seconds']))}")
        )
    previous = None
    for label, block in scores(summary).items():
        score = block["bits_per_byte"]
        change = "" if previous is None else f"{score - previous:+.4f}".replace("-", "\u2212")
        rows.append((f"{label}, bpb", f"{score:.4f}", change))
        if "sliding" not in label:  # later scores have less context than a sliding window: do not compare them
            previous = score
    return rows


def scores(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the blocks of the summary with a score, by what was scored, in the order of the stages."""
    evaluation = summary.get("eval", {})
    blocks = {
        "Before quantisation": evaluation.get("before", {}),
        "Quantised": evaluation.get("quantized", {}),
        "Quantised, sliding window": evaluation.get("sliding", {}),
        "After test-time training": summary.get("ttt", {}),
    }
    return {label: block for label, block in blocks.items() if block.get("bits_per_byte") is not None}


def artifact_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (label, value, note) for the artifact's bytes; empty before quantisation."""
    sizes = summary.get("quantize", {})
    if "total_bytes" not in sizes:
        return []
    total, cap = sizes["total_bytes"], sizes["cap_bytes"]
    return [
        ("Weights, bytes", f"{sizes['weight_bytes']:,}", ""),
        ("Code, bytes", f"{sizes['code_bytes']:,}", ""),
        ("Artifact, bytes", f"{total:,}", f"{total / cap:.2%} of {cap:,}"),
    ]
