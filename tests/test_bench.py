"""The benchmark of a training step runs in small form and reports what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import reference_runs
from bench.train_step import main
from pgolf.config import RunConfig
from pgolf.folder import RunFolder


def test_train_step_reports_both_loop_states(tmp_path: Path) -> None:
    sizes = "device=cpu vocab_size=300 model_dim=32 num_heads=2 num_kv_heads=1 rope_dims=4 gate_attn_width=8"
    batch = "smear_gate_width=4 micro_batch_tokens=256 train_batch_tokens=512 train_seq_len=64"
    settings = [part for pair in f"{sizes} {batch}".split() for part in ("--set", pair)]
    file = tmp_path / "step.json"
    results = main(["--preset", "demo", *settings, "--repeats", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(results))
    for case in ("before_loop", "after_loop"):
        measured = results["cases"][case]
        seconds = 2 * measured["micro_batch_seconds"] + measured["optimizer_seconds"]
        assert measured["tokens_per_s"] == 512 / seconds


def test_reference_runs_are_presets_with_settings_that_exist(tmp_path: Path) -> None:
    for name, run in reference_runs.RUNS.items():
        RunConfig.preset(run.preset).replace(**run.settings)
        lines = reference_runs.commands(name, tmp_path, "data", 2, ["seed=7"])
        assert len(lines) == len(run.stages) and "--nproc_per_node=2" in lines[0]
        assert lines[0][-2:] == ["--set", "seed=7"] and "--fresh" in lines[0]
        assert all(line[-1] == str(tmp_path / name) for line in lines[1:])


def test_reference_runs_are_collected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, loss in (("a", 9.0), ("b", 8.5)):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.create(RunConfig(), {"chip": "NVIDIA X1", "versions": {}})
        folder.record("run", {"world_size": 2})
        folder.log_metrics([{"kind": "train", "step": 1, "loss": loss}, {"kind": "val", "step": 1, "loss": 3.0}])
    target = tmp_path / "runs.json"
    assert reference_runs.main(["--out", str(tmp_path / "runs"), "--json", str(target)]) == 0
    runs = json.loads(target.read_text())["runs"]
    assert runs["a"]["loss_by_step"] == {"1": 9.0} and runs["b"]["processes"] == 2
    assert "1  9.0000  8.5000" in capsys.readouterr().out
