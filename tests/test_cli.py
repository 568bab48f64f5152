"""The command line: a whole tiny run, single stages, resuming, and errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgolf import run
from pgolf.cli import main
from pgolf.corpus import embedded_documents
from pgolf.folder import RunFolder

TINY = dict(
    vocab_size=400, model_dim=32, num_heads=2, num_kv_heads=1, rope_dims=4, gate_attn_width=8, smear_gate_width=4,
    train_batch_tokens=512, micro_batch_tokens=512, train_seq_len=64, eval_seq_len=64, val_batch_tokens=8192,
    max_wallclock_seconds=0, iterations=3, gptq_passthrough_numel=500, gptq_calibration_batches=2,
    gptq_calibration_tokens=512, lqer_asym_group=16, ttt_lora_rank=4, ttt_eval_seq_len=64, ttt_batch_size=4,
    phased_ttt_prefix_docs=4, global_ttt_chunk_tokens=512, sliding_window_enabled=1, eval_stride=32,
)  # fmt: skip


def settings(data: Path, **changed) -> list[str]:
    pairs = {**TINY, "data_dir": data, "device": "cpu", **changed}
    return [part for name, value in pairs.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    texts = [document[:1500] for document in embedded_documents()[:50]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def data(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder made by the command line: a tokenizer, then shards."""
    folder = tmp_path_factory.mktemp("data")
    model = folder / "my.model"
    assert main(["data", "tokenizer", "--docs", str(documents), "--vocab-size", "400", "--out", str(model)]) == 0
    build = ["data", "build", "--docs", str(documents), "--tokenizer", str(model), "--out", str(folder)]
    assert main([*build, "--val-docs", "6"]) == 0
    assert main(["data", "check", "--set", f"data_dir={folder}", "--set", "vocab_size=400"]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    assert main(["run", "--preset", "demo", "--run-dir", str(folder.path), *settings(data)]) == 0
    return folder


def test_a_run_leaves_everything(finished: RunFolder) -> None:
    names = {path.name for path in finished.path.iterdir()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "summary.json", "ema.pt", "model.int6.ptz", "train_gpt.py",
        "tokenizer.model", "report.html",
    }  # fmt: skip
    summary = finished.summary()
    assert list(summary) == ["run", "data", "train", "quantize", "eval", "ttt"]
    before, quantized = summary["eval"]["before"], summary["eval"]["quantized"]
    assert abs(quantized["bits_per_byte"] - before["bits_per_byte"]) < 0.05
    assert summary["ttt"]["tokens"] == summary["data"]["val_tokens"] - 1
    size = (finished.path / "model.int6.ptz").stat().st_size + finished.program.stat().st_size
    assert summary["quantize"]["total_bytes"] == size
    assert all(summary[stage]["seconds"] > 0 for stage in ("data", "train", "quantize", "eval", "ttt"))


def test_stages_can_be_repeated_with_other_settings(finished: RunFolder, capsys: pytest.CaptureFixture) -> None:
    before = finished.summary()["ttt"]
    run = ["--run-dir", str(finished.path)]
    assert main(["ttt", *run]) == 0
    again = finished.summary()["ttt"]
    assert again["bits_per_byte"] == before["bits_per_byte"]
    assert main(["ttt", *run, "--set", "ttt_lora_lr=0.05"]) == 0
    assert finished.summary()["ttt"]["bits_per_byte"] != before["bits_per_byte"]
    assert main(["report", *run]) == 0
    assert "After test-time training" in capsys.readouterr().out
    assert main(["ttt", *run]) == 0


@pytest.mark.parametrize("stage", ["eval", "ttt"])
def test_an_interrupted_stage_says_so_and_leaves_the_run(
    stage: str, finished: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finished.summary()

    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setitem(run.STAGES, stage, stopped)
    assert main([stage, "--run-dir", str(finished.path)]) == 143
    assert f"stopped by SIGTERM in the stage {stage}, which begins anew" in capsys.readouterr().err
    assert finished.summary() == before


def test_resuming_a_finished_run_does_nothing_again(finished: RunFolder, capsys: pytest.CaptureFixture) -> None:
    written = finished.ema.stat().st_mtime_ns
    assert main(["run", "--run-dir", str(finished.path), "--resume"]) == 0
    assert finished.ema.stat().st_mtime_ns == written
    assert "[train] done before" in capsys.readouterr().out


def test_the_shipped_program_scores_the_same(finished: RunFolder, data: Path, tmp_path: Path) -> None:
    """The exported file alone, from another folder, evaluates the artifact to the same number."""
    expected = finished.summary()["eval"]["quantized"]
    command = [sys.executable, str(finished.program), "eval", "--run-dir", str(finished.path)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # where it unpacks itself
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    scored = finished.summary()["eval"]["quantized"]
    assert scored["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-9)


def test_inspect_shows_the_classes(finished: RunFolder, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(finished.path / "model.int6.ptz")]) == 0
    shown = capsys.readouterr().out
    assert "attention" in shown and "int6" in shown and "int7" in shown and "of the cap" in shown


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_errors_say_what_to_do(
    finished: RunFolder, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["run", "--preset", "demo", "--run-dir"]
    for stage in ("run", "train"):
        there = fails([stage, "--run-dir", str(finished.path)], capsys)
        assert "--resume goes on with it, --fresh deletes it" in there
    assert "nearest: ttt_lora_rank" in fails([*run, str(tmp_path / "a"), "--set", "ttt_lora_rnk=3"], capsys)
    assert "--set takes name=value" in fails([*run, str(tmp_path / "a"), "--set", "seed"], capsys)
    assert "holds no run" in fails(["ttt", "--run-dir", str(tmp_path / "b")], capsys)
    assert "change single ones with --set" in fails(
        ["eval", "--preset", "demo", "--run-dir", str(finished.path)], capsys
    )
    missing = fails(["run", "--run-dir", str(tmp_path / "c"), "--set", f"data_dir={tmp_path}"], capsys)
    assert "pgolf data fineweb" in missing
    monkeypatch.setenv("PGOLF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no tokenizer"):
        main(["run", "--fresh", "--run-dir", str(tmp_path / "c"), "--set", f"data_dir={tmp_path}"])
    monkeypatch.delenv("PGOLF_TRACEBACK")
    broken = tmp_path / "broken.ptz"
    broken.write_bytes((finished.path / "model.int6.ptz").read_bytes()[:-100])
    assert "cut short" in fails(["inspect", str(broken)], capsys)
    monkeypatch.setenv("TTT_LORA_RNK", "3")
    assert "TTT_LORA_RNK looks like a setting" in fails([*run, str(tmp_path / "d")], capsys)


def test_a_stage_before_its_time_names_the_one_before(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert main(["data", "--preset", "demo", "--run-dir", str(folder), *settings(data, iterations=1)]) == 0
    assert list(RunFolder(folder).summary()) == ["run", "data"]
    assert main(["train", "--run-dir", str(folder)]) == 0
    assert "run `pgolf quantize" in fails(["eval", "--run-dir", str(folder)], capsys)
    monkeypatch.setattr("pgolf.artifact.ArtifactSize.__init__.__defaults__", (1000,))
    message = fails(["quantize", "--run-dir", str(folder)], capsys)
    assert "bytes over the cap" in message and "embed_clip_sigmas" in message


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["data"], ["data", "fineweb"], ["data", "build"], ["data", "tokenizer"], ["data", "check"], ["train"],
     ["quantize"], ["eval"], ["ttt"], ["report"], ["config"], ["inspect"], ["env"]],
    ids=" ".join,
)  # fmt: skip
def test_every_help_reads(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith("usage: pgolf") and len(shown.splitlines()) >= 4


def test_config_lists_every_setting(capsys: pytest.CaptureFixture) -> None:
    from pgolf.config import FIELDS

    assert main(["config", "--preset", "demo"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(FIELDS) <= listed


def test_module_and_command_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "pgolf", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("pgolf ")
