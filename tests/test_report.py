"""The report and what a terminal shows: numbers in their places, stages absent until they ran, broken files."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pgolf.common import progress as progress_module
from pgolf.common.files import FileError
from pgolf.common.progress import TrainingProgress, format_bytes, format_duration, format_table, progress
from pgolf.config import RunConfig
from pgolf.report.page import read_run, write_report
from pgolf.report.results import summary_table

SUMMARY = {
    "run": {"run_id": "a<b", "preset": "demo", "world_size": 2, "device": "cpu", "parameters": 1_234_567},
    "data": {"seconds": 4.25, "train_tokens": 3_000_000, "val_tokens": 99_000, "peak_memory_bytes": 250_000_000},
    "train": {
        "steps": 1200,
        "seconds": 125.0,
        "startup_seconds": 2.5,
        "peak_memory_bytes": 1_500_000_000,
        "final_loss": 2.5,
        "val_loss": 2.75,
        "bits_per_byte": 1.95,
    },
    "quantize": {
        "seconds": 20.0,
        "hessian_seconds": 7.0,
        "quantize_seconds": 11.0,
        "compress_seconds": 2.0,
        "peak_memory_bytes": 800_000_000,
        "weight_bytes": 1_500_000,
        "code_bytes": 30_000,
        "total_bytes": 1_530_000,
        "cap_bytes": 16_000_000,
        "bytes_by_class": {"mlp": 900_000, "attention": 600_000},
        "lqer_tensors": [],
    },
    "eval": {
        "seconds": 9.0,
        "peak_memory_bytes": 700_000_000,
        "before": {"loss": 2.7, "bits_per_byte": 1.9},
        "quantized": {"loss": 2.71, "bits_per_byte": 1.9123},
    },
    "ttt": {
        "seconds": 41.0,
        "peak_memory_bytes": 900_000_000,
        "loss": 2.65,
        "bits_per_byte": 1.8765,
        "by_length": [
            {"low": 0, "high": 256, "documents": 3, "tokens": 400, "bits_per_byte": 2.25},
            {"low": 256, "high": 512, "documents": 0, "tokens": 0, "bits_per_byte": None},
            {"low": 512, "high": None, "documents": 7, "tokens": 9000, "bits_per_byte": 1.85},
        ],
    },
}


def train_row(step: int, **fields: object) -> dict:
    return {
        "kind": "train",
        "step": step,
        "loss": 6.0 / step,
        "lr_scale": 1.0,
        "muon_momentum": 0.92,
        "grad_norm": 1.0,
        "tokens": 100 * step,
        "elapsed_seconds": 0.5 * step,
        "tokens_per_second": 200.0,
        "looping": step > 4,
        **fields,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = RunConfig.preset("demo").replace(seed=42, lqer_rank=8, run_id="a<b")
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "environment.json").write_text(json.dumps({"torch": "2.13", "git": {"commit": "abc"}, "gpus": []}))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    rows = [train_row(step) for step in range(1, 9)] + [{"kind": "val", "step": 8, "loss": 0.9, "bits_per_byte": 1.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def report_text(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def test_report_holds_every_number(run_dir: Path) -> None:
    text = report_text(run_dir)
    for shown in (
        "a&lt;b",
        "1,200",
        "2 min 05 s",
        "1.9000",
        "1.9123",
        "+0.0123",
        "1.8765",
        "\u22120.0358",
        "1,530,000",
        "9.56%",
        "16,000,000",
        "1,234,567 parameters",
        "1.50 GB",
        "codes 11.0 s",
        "git.commit",
        "loops on, step 5",
        "512 and more tokens, 7 documents",
        "900,000",
    ):
        assert shown in text, shown
    assert "a<b" not in text and "256 to 512" not in text and "case-coded" not in text
    config = RunConfig.preset("demo").replace(case_coding=True)
    (run_dir / "config.json").write_text(config.to_json())
    assert "case-coded documents, their bytes by sidecars" in report_text(run_dir)


def test_plots_are_valid_described_and_self_contained(run_dir: Path) -> None:
    text = report_text(run_dir)
    plots = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(plots) == text.count("<figure>") == 6
    for plot in plots:
        root = ElementTree.fromstring(plot)
        assert root.get("role") == "img" and len(root.get("aria-label")) > 20
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) and "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)


def test_referenced_parts_exist(run_dir: Path) -> None:
    text = report_text(run_dir)
    used = {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    assert used and used <= set(re.findall(r'\bid="([^"]+)"', text))


def test_same_folder_same_bytes(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()
    assert not list(run_dir.glob("*.tmp"))


def test_only_changed_settings_are_listed(run_dir: Path) -> None:
    section = report_text(run_dir).split("Settings that differ from the preset")[1].split("</section>")[0]
    names = re.findall(r"<tr><td>(\w+)</td>", section)
    assert names == ["seed", "lqer_rank"]
    assert "<td>lqer_rank</td><td>4</td><td>8</td>" in section


def test_stages_that_have_not_run_are_absent(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text(json.dumps({name: SUMMARY[name] for name in ("run", "data", "train")}))
    text = report_text(run_dir)
    assert "Training" in text and "1,200" in text
    assert "Quantised" not in text and "Artifact" not in text and "Test-time" not in text


def test_nothing_but_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(RunConfig().to_json())
    text = report_text(tmp_path)
    assert "No stage has finished" in text and "<svg" not in text


def test_long_runs_stay_small(run_dir: Path) -> None:
    rows = (json.dumps(train_row(step)) for step in range(1, 6001))
    (run_dir / "metrics.jsonl").write_text("\n".join(rows))
    assert len(read_run(run_dir).train) == 6000
    assert write_report(run_dir).stat().st_size < 400_000


def test_without_matplotlib_the_page_says_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pgolf.report.plots", None)
    text = report_text(run_dir)
    assert "pip install &#x27;pgolf[report]&#x27;" in text and "<svg" not in text and "1.8765" in text


def test_cut_off_last_line_is_a_note(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "train", "step": 9, "lo')
    assert "line 10) is cut off" in report_text(run_dir)
    assert len(read_run(run_dir).train) == 8


def test_broken_line_inside_is_an_error(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text("garbage\n" + metrics.read_text())
    with pytest.raises(FileError, match="line 1, is no metrics row: 'garbage'"):
        write_report(run_dir)


def test_resumed_steps_count_once(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(train_row(7, loss=0.125)) + "\n")
    rows = read_run(run_dir).train
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[6]["loss"] == 0.125


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_summary_is_an_error(run_dir: Path, content: str) -> None:
    (run_dir / "summary.json").write_text(content)
    with pytest.raises(FileError, match="summary.json"):
        write_report(run_dir)


def test_missing_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no run folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(FileError, match="no config.json"):
        write_report(tmp_path)


def test_summary_table() -> None:
    lines = summary_table(SUMMARY).splitlines()
    assert lines[0].split() == ["Steps", "1,200", "in", "2", "min", "05", "s"]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "Before quantisation, bpb",
        "Quantised, bpb",
        "After test-time training, bpb",
    ]
    assert lines[-1].endswith("1,530,000  9.56% of 16,000,000")
    assert summary_table({}) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.00 s"),
        (9.99, "9.99 s"),
        (9.999, "10.0 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3780, "1 h 03 min"),
    ],
)
def test_format_duration(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (15_947_047, "15.9 MB"),
        (1.4e9, "1.40 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_format_bytes(count: float, shown: str) -> None:
    assert format_bytes(count) == shown


def test_format_table_aligns_numbers_right() -> None:
    table = format_table([("a", 5, "x"), ("bcd", 1234, "")], ["name", "n", "note"])
    assert table == "name     n  note\n----------------\na        5  x\nbcd   1234"
    with pytest.raises(ValueError, match="of one length"):
        format_table([("a",), ("b", "c")])


def test_progress_in_a_log_is_sparse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert list(progress(range(50), description="quick")) == list(range(50))
    assert capsys.readouterr().err == ""
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    assert sum(progress(range(200), description="docs", unit="documents")) == sum(range(200))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "docs: 20 of 200 documents, 20.0 s, 3 min 00 s left"
    assert len(lines) == 10 and lines[-1].startswith("docs: 200 documents, done in")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_training_lines_in_a_log() -> None:
    stream = io.StringIO()
    shown = TrainingProgress(log_every=10, stream=stream)
    for step in range(1, 26):
        shown.step(step, 3.5, 41234.4, seconds_left=65.0, total_steps=25)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[1] == "step 10/25     loss  3.5000       41,234 tokens/s  1 min 05 s left"


def test_training_line_on_a_terminal_gives_way() -> None:
    stream = Terminal()
    shown = TrainingProgress(log_every=100, stream=stream)
    for step in (1, 2, 3):
        shown.step(step, 3.5, 100.0)
        shown._live_at = 0.0
    shown.message("saved")
    screen = stream.getvalue()
    assert "\rstep 2 " in screen and "\rstep 3 " in screen
    assert screen.endswith("\rsaved\n") and screen.count("\n") == 2


def test_progress_uses_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    used: dict = {}
    monkeypatch.setattr(tqdm, "tqdm", lambda iterable, **options: used.update(options) or iterable)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([1, 2], description="shards", unit="files")) == [1, 2]
    assert used["total"] == 2 and used["desc"] == "shards" and used["unit"] == " files"
