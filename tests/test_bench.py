"""The benchmark of a training step runs in small form and reports what it says."""

from __future__ import annotations

import json
from pathlib import Path

from bench.train_step import main


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
