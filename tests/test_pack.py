"""`pgolf pack`: what a submission's folder holds, which runs are refused, and how the program is checked alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from pgolf import pack as packing
from pgolf import run
from pgolf.artifact.container import ArtifactError
from pgolf.cli import main
from pgolf.common.folder import RunFolder, RunFolderError
from pgolf.common.runtime import start_world
from pgolf.config import RunConfig
from pgolf.pack import PackError, check, pack, read_run
from pgolf.report.seeds import Heading, seed_result, seed_table, track
from pgolf.submission import sources
from pgolf.submission.export import export_program

SMALL = {"pgolf/__init__.py": "", "pgolf/cli.py": "def main(arguments):\n return 3\n"}
HEADING = Heading("A name", "An author", "someone", "2026-05-01")
BITS = {7: 1.25, 42: 1.5, 1337: 1.75}
WEIGHTS = b"weights" * 100


def summary(seed: int) -> dict[str, dict]:
    files = {"fineweb_val_000000.bin": {"sha256": "ab", "bytes": 8, "mtime_ns": seed}}
    return {
        "run": {"run_id": f"seed{seed}"},
        "data": {"val_documents": 6, "val_tokens": 5000, "files": files},
        "train": {"steps": 100, "clock_seconds": 50.0, "seconds": 60.0},
        "quantize": {"hessian_seconds": 2.0, "sensitivity_seconds": 3.0, "cap_bytes": 16_000_000},
        "eval": {
            "before": {"loss": 3.0, "bits_per_byte": 1.9},
            "quantized": {"loss": 3.1, "bits_per_byte": 1.95},
            "seconds": 9.0,
            "process_seconds": 11.0,
        },
        "ttt": {"loss": 2 * BITS[seed], "bits_per_byte": BITS[seed], "seconds": 40.0, "process_seconds": 44.0},
    }


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    """``finished(seed, setting=value)`` is a folder of a finished run, whose program has two files."""
    monkeypatch.setattr(sources, "package_sources", lambda: dict(SMALL))
    monkeypatch.setattr(packing, "package_sources", lambda: dict(SMALL))
    monkeypatch.setattr(sources, "absent_modules", list)

    def make(seed: int, **settings: object) -> RunFolder:
        folder = RunFolder(tmp_path / f"seed{seed}")
        config = RunConfig().replace(seed=seed, device="cpu", **settings)
        chip = {"chip": "NVIDIA H100 80GB HBM3", "devices": 8, "versions": {"pgolf": "0.1.0", "torch": "2.13.0"}}
        folder.create(config, {**chip, "git_commit": "abc"})
        results = summary(seed)
        results["quantize"] |= {"weight_bytes": len(WEIGHTS), "code_bytes": export_program(folder.program, config)}
        for stage, block in results.items():
            folder.record(stage, block)
        folder.artifact(config).parent.mkdir(exist_ok=True)
        folder.artifact(config).write_bytes(WEIGHTS)
        folder.ema.write_bytes(b"average")
        folder.log_metrics([{"kind": "train", "step": 1, "loss": 6.0}])
        return folder

    return make


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check finds what it should."""
    monkeypatch.setattr(packing, "check", lambda *_: (1.95, 1.95))


def test_a_submission_has_the_challenge_s_files(finished, unchecked, tmp_path: Path) -> None:
    folders, out = [finished(seed) for seed in (1337, 42, 7)], tmp_path / "new" / "submission"
    results = pack([folder.path for folder in folders], out, HEADING, documents=2)
    logs = [f"train_seed{seed}.log" for seed in (7, 42, 1337)]
    assert {path.name for path in out.iterdir()} == {"README.md", "submission.json", "train_gpt.py", *logs}
    assert [path.name for path in out.parent.iterdir()] == ["submission"], "nothing is left aside"
    program = (out / "train_gpt.py").read_bytes()
    assert program == folders[0].program.read_bytes(), "1337 is the default, which no setting names"
    fields = json.loads((out / "submission.json").read_text())
    assert [fields[name] for name in ("name", "author", "github_id", "date")] == [*HEADING]
    assert fields["val_bpb"] == 1.5 and fields["val_loss"] == 3.0
    assert fields["val_bpb_std"] == pytest.approx(statistics.stdev(BITS.values())) == 0.25
    assert fields["seeds"] == [7, 42, 1337] and fields["seed_results"]["42"]["val_bpb"] == 1.5
    assert (fields["bytes_code"], fields["bytes_total"]) == (len(program), len(program) + len(WEIGHTS))
    assert (fields["track"], fields["hardware"]) == ("10min_16mb", "8 × NVIDIA H100 80GB HBM3")
    text = (out / "README.md").read_text()
    assert seed_table(results) in text and "SEED=7 torchrun --standalone --nproc_per_node=8 train_gpt.py" in text
    log = [json.loads(line) for line in (out / logs[1]).read_text().splitlines()]
    assert [entry["kind"] for entry in log] == ["settings", "environment", "train", *["results"] * 6]
    assert (log[0]["seed"], log[2]["loss"], log[-1]["stage"]) == (42, 6.0, "ttt")


def test_the_order_of_the_runs_changes_no_byte(finished, unchecked, tmp_path: Path) -> None:
    paths = [finished(seed).path for seed in (7, 42)]
    for name, order in (("a", paths), ("b", paths[::-1])):
        pack(order, tmp_path / name, HEADING, documents=2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_one_seed_has_no_standard_deviation(finished, unchecked, tmp_path: Path) -> None:
    (result,) = pack([finished(42).path], tmp_path / "out", HEADING._replace(name=""), documents=100)
    assert "deviation" not in seed_table([result])
    fields = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert "val_bpb_std" not in fields and fields["name"] == "pgolf, preset record"
    assert "first 6 validation documents" in (tmp_path / "out" / "README.md").read_text(), "there are no more"


def test_means_and_deviations_of_the_table() -> None:
    environment = {"chip": "CPU", "devices": 1, "versions": {"pgolf": "0.1.0"}}
    results = [seed_result(seed, summary(seed), environment, 1000 + seed, 200) for seed in (7, 42)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in seed_table(results).splitlines()]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines}
    assert [table[seed]["After test-time training, bpb"] for seed in ("7", "42")] == ["1.25000", "1.50000"]
    assert table["mean"]["After test-time training, bpb"] == "1.37500"
    assert table["standard deviation"]["After test-time training, bpb"] == "0.17678"
    assert table["42"]["Artifact, bytes"] == "1,242" and table["mean"]["Calibration, s"] == "5.0"
    fast = results[0]._replace(chip="NVIDIA H100 80GB HBM3", devices=8)
    assert track([fast]) == "10min_16mb" and track([fast, results[1]]) == "non_record_16mb"
    for slow in (fast._replace(train_seconds=596.0), fast._replace(eval_seconds=601.0), fast._replace(devices=4)):
        assert track([slow]) == "non_record_16mb", "calibration takes 5 s of training's"


def refused(match: str | None, *folders: RunFolder, error: type[Exception] = PackError) -> None:
    out = folders[0].path.parent / "out"
    with pytest.raises(error, match=match):
        pack([folder.path for folder in folders], out, HEADING, documents=2)
    assert not out.exists() and not list(out.parent.glob(".out*"))


def test_runs_that_are_not_finished_are_refused(finished, unchecked) -> None:
    folder, whole = finished(42), summary(42)
    results = folder.summary()
    for stage in ("train", "ttt"):
        folder.summary_file.write_text(json.dumps({name: block for name, block in results.items() if name != stage}))
        refused(f"is not finished, it lacks the results of {stage}: go on with `pgolf run --resume", folder)
    folder.summary_file.write_text(json.dumps({**results, "train": {"steps": "many"}}))
    refused("is damaged or incomplete", folder)
    folder.summary_file.write_text(json.dumps({**results, "quantize": whole["quantize"]}))
    refused("the run's results are of None: run `pgolf quantize", folder)
    folder.summary_file.write_text(json.dumps(results))
    folder.ema.unlink()
    refused("run `pgolf train", folder, error=RunFolderError)
    refused("holds no run", RunFolder(folder.path / "nothing"), error=RunFolderError)


def test_a_run_without_test_time_training_is_finished_without_it(finished, unchecked, tmp_path: Path) -> None:
    folder = finished(42, ttt_enabled=False)
    folder.summary_file.write_text(json.dumps({k: v for k, v in folder.summary().items() if k != "ttt"}))
    pack([folder.path], tmp_path / "out", HEADING, documents=2)
    fields = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert fields["val_bpb"] == 1.95 and fields["seed_results"]["42"]["eval_seconds"] == 11.0


def test_runs_over_the_cap_are_refused(finished, unchecked) -> None:
    folder = finished(42)
    weights = b"x" * 16_000_000
    folder.artifact(folder.config()).write_bytes(weights)
    refused("model.pgolf has 16000000 bytes, and the run's results are of 700: run `pgolf quantize", folder)
    folder.record("quantize", {**folder.summary()["quantize"], "weight_bytes": len(weights)})
    refused("seed42: the artifact is .* bytes over the cap.*lower weight_bytes", folder, error=ArtifactError)


def test_runs_that_differ_in_more_than_the_seed_are_refused(finished, unchecked, tmp_path: Path) -> None:
    refused("different settings .muon_momentum 0.97 and 0.9.: pack", finished(7), finished(42, muon_momentum=0.9))
    refused("a part of the validation documents", finished(7, val_doc_fraction=0.5))
    one, other = finished(7), finished(42)
    shutil.copytree(one.path, tmp_path / "copy")
    refused("have the seeds 7, 7: pack one run of each seed", one, RunFolder(tmp_path / "copy"))
    data = other.summary()["data"]
    other.record("data", {**data, "files": {"fineweb_val_000000.bin": {"sha256": "cd"}}})
    refused("different data", one, other)


def test_runs_may_differ_in_what_is_of_a_machine(finished, unchecked, tmp_path: Path) -> None:
    folders = [finished(7, run_id="a"), finished(42, run_id="b", cuda_graphs="off", dist_timeout_seconds=60)]
    assert len(pack([folder.path for folder in folders], tmp_path / "out", HEADING, documents=2)) == 2


def test_programs_of_another_tree_are_refused(finished, unchecked, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(42)
    changed = folder.config().replace(muon_momentum=0.9)
    folder.record("quantize", {**folder.summary()["quantize"], "code_bytes": export_program(folder.program, changed)})
    refused(r"exported with other settings than the run's \(MUON_MOMENTUM\): run `pgolf quantize", folder)
    folder = finished(42)
    monkeypatch.setattr(packing, "package_sources", lambda: {**SMALL, "pgolf/new.py": ""})
    refused(
        r"is of another tree \(commit abc, Python .*\): pgolf/new.py differ. Pack it with that tree, or run", folder
    )
    content = folder.program.read_bytes()
    for damaged in (content[:-1] + b"x", b"print()".ljust(len(content)), content[:-40].ljust(len(content))):
        folder.program.write_bytes(damaged)
        refused("is no exported program, or is damaged", folder)


def test_programs_in_other_bytes_are_refused(finished, unchecked, monkeypatch: pytest.MonkeyPatch) -> None:
    one = finished(7)
    monkeypatch.setattr(sources, "package_sources", lambda: dict(reversed(SMALL.items())))
    refused("the same sources in different bytes", one, finished(42))


def test_what_is_there_stays(finished, unchecked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(42)
    (tmp_path / "out").mkdir()
    with pytest.raises(PackError, match="out is there already: delete it"):
        pack([folder.path], tmp_path / "out", HEADING, documents=2)
    (tmp_path / "out").rmdir()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "check", stopped)
    refused(None, folder, error=KeyboardInterrupt)
    with pytest.raises(PackError, match="at least one document, got 0"):
        pack([folder.path], tmp_path / "out", HEADING, documents=0)


# --- The check --------------------------------------------------------------------------------------------------------

ALONE = """
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
folder = Path(arguments[2])
found = {"arguments": arguments[:2], "here": os.listdir(), "isolated": sys.flags.isolated, "variables": [*os.environ]}
found |= {"config": json.loads((folder / "config.json").read_text()), "files": sorted(os.listdir(folder))}
found |= {"artifact": (folder / "model.pgolf").read_text(), "home": os.listdir(os.environ["HOME"])}
summary = json.loads((folder / "summary.json").read_text())
summary |= {"eval": {"quantized": {"bits_per_byte": 1.5}}, "ttt": {"bits_per_byte": 1.5}}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def scored(monkeypatch: pytest.MonkeyPatch, bits: float) -> list[RunConfig]:
    """Let the package score with so many bits per byte; its settings are in the list afterwards."""
    seen: list[RunConfig] = []

    def stage(name: str, _: object, config: RunConfig, folder: RunFolder, *__: object, **___: object) -> None:
        seen.append(config)
        found = {"bits_per_byte": bits}
        folder.record(name, found if name == "ttt" else {"quantized": found})

    monkeypatch.setattr(run, "run_stage", stage)
    return seen


@pytest.mark.parametrize("stage, apart", [("eval", 9e-7), ("ttt", 4e-5)])
def test_the_program_is_alone(
    finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, apart: float
) -> None:
    adapts = stage == "ttt"
    found = read_run(finished(42, artifact_dir=str(tmp_path / "elsewhere"), data_dir="data", ttt_enabled=adapts).path)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("SEED", "5")
    seen, result = scored(monkeypatch, 1.5 + apart), tmp_path / "result"
    program = ALONE + f"Path({str(result)!r}).write_text(json.dumps(found))\n"
    assert check(found, program.encode(), start_world(found.config), 2) == (1.5, 1.5 + apart)
    (config,), alone = seen, json.loads(result.read_text())
    assert (alone["arguments"], alone["here"], alone["isolated"]) == ([stage, "--run-dir"], ["train_gpt.py"], 1)
    assert not {"PYTHONPATH", "SEED"} & {*alone["variables"]} and alone["home"] == []
    assert alone["files"] == ["config.json", "ema.pt", "environment.json", "model.pgolf", "summary.json"]
    assert alone["artifact"] == WEIGHTS.decode() and alone["config"] == dataclasses.asdict(config)
    expected = {"val_doc_fraction": 2 / 6, "data_dir": os.path.abspath("data"), "artifact_dir": ""}
    assert config == found.config.replace(**expected, sliding_window_enabled=False, eval_public_truncation=False)


def test_a_program_that_scores_otherwise_is_refused(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_run(finished(42, ttt_enabled=False).path)
    scored(monkeypatch, 1.5 + 2e-6)
    with pytest.raises(PackError, match=r"first 2 validation documents with 1.50000000 .* the package with 1.50000200"):
        check(found, ALONE.encode(), start_world(found.config), 2)


def test_a_program_that_fails_is_refused(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_run(finished(42).path)
    scored(monkeypatch, 1.5)
    with pytest.raises(PackError, match="fails alone, with status 3:\nno such module"):
        check(found, b"import sys\nprint('no such module', file=sys.stderr)\nsys.exit(3)", start_world(found.config), 2)


def test_the_command_line(finished, unchecked, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["pack", str(finished(42).path), "--out", str(tmp_path / "out"), "--author", "A", "--date", "2026-05-01"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "| 42 | 100 |" in shown and "fill in submission.json: --github had no value" in shown
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
