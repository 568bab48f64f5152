"""The command line: a whole tiny run, single stages, resuming, and errors that say what to do."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import quantization, results_sections, score
from bench.results_files import read
from pgolf import run
from pgolf.artifact import container
from pgolf.artifact.quantize import dequantize_model
from pgolf.audit import replay, sample
from pgolf.audit import run as audit_stages
from pgolf.audit.checks import CHECKS, Finding, check_scorer
from pgolf.audit.program import Contained
from pgolf.audit.reader import read_ledger
from pgolf.cli import main
from pgolf.common.files import read_json
from pgolf.common.folder import RunFolder
from pgolf.data.validation import validation_data
from pgolf.model.gpt import GPT
from pgolf.model.weights import load_weights, rebank, unbank
from pgolf.scoring.evaluate import evaluate_packed, evaluate_sliding
from pgolf.scoring.ttt import engine
from pgolf.submission.export import export_program
from tests.corpus import embedded_documents

TINY = dict(
    vocab_size=400,
    num_layers=4,
    loop_start=1,
    loop_end=2,
    parallel_start_layer=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    gate_attn_width=8,
    smear_gate_width=4,
    train_batch_tokens=512,
    micro_batch_tokens=512,
    train_seq_len=64,
    eval_seq_len=64,
    val_batch_tokens=8192,
    max_wallclock_seconds=0,
    iterations=3,
    gptq_passthrough_numel=500,
    gptq_calibration_batches=2,
    gptq_calibration_tokens=512,
    lqer_asym_group=16,
    ttt_lora_rank=4,
    ttt_eval_seq_len=64,
    ttt_batch_size=4,
    phased_ttt_prefix_docs=4,
    global_ttt_chunk_tokens=512,
    sliding_window_enabled=1,
    eval_stride=32,
)


def settings(data: Path, **changed) -> list[str]:
    pairs = {**TINY, "data_dir": data, "device": "cpu", **changed}
    return [part for name, value in pairs.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    texts = [document[:900] for document in embedded_documents()[:50]]
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
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "ema.pt",
        "sensitivities.pt",
        "model.pgolf",
        "train_gpt.py",
        "tokenizer.model",
        "report.html",
    }
    summary = finished.summary()
    assert list(summary) == ["run", "data", "train", "quantize", "eval", "ttt"]
    assert summary["ttt"]["tokens"] == summary["data"]["val_tokens"] - 1
    size = (finished.path / "model.pgolf").stat().st_size + finished.program.stat().st_size
    assert summary["quantize"]["total_bytes"] == size
    assert all(results["process_seconds"] > results["seconds"] > 0 for results in list(summary.values())[1:])


def scores(summary: dict[str, dict]) -> dict[str, float]:
    scored = {name: summary["eval"][name]["bits_per_byte"] for name in ("before", "quantized", "sliding")}
    return {**scored, "ttt": summary["ttt"]["bits_per_byte"]}


def test_every_score_is_that_of_the_weights_it_is_named_after(finished: RunFolder) -> None:
    """Of the averaged weights, of what the artifact holds, by windows, and with test-time training: all with the loop.

    The run that these are read from is the command line's; here the same functions get the weights from the files.
    """
    config, summary = finished.config(), finished.summary()
    tokens, table = validation_data(config)
    averaged = load_weights(finished.ema)
    layers = unbank(averaged, config.num_layers)
    kept = rebank(dequantize_model(container.load(finished.path / "model.pgolf"), layers), averaged)

    def model(weights: dict[str, torch.Tensor]) -> GPT:
        model = GPT(config)
        model.load_state_dict(weights)
        model.looping_active = True
        return model.eval()

    found = {
        "before": evaluate_packed(model(averaged), config, tokens, table)[1],
        "quantized": evaluate_packed(model(kept), config, tokens, table)[1],
        "sliding": evaluate_sliding(model(kept), config, tokens, table)[1],
        "ttt": engine.test_time_training(model(kept), config, tokens, table).bits_per_byte,
    }
    scored = scores(summary)
    assert scored == pytest.approx(found, abs=1e-9)
    # The nearest two, "before" and "sliding", are 1.8e-6 apart.
    assert all(after - before > 1e-6 for before, after in pairwise(sorted(scored.values()))), "two are one"
    without_loop = model(averaged)
    without_loop.looping_active = False
    assert abs(evaluate_packed(without_loop, config, tokens, table)[1] - scored["before"]) > 1e-4  # measured 2.1e-4
    assert abs(scored["quantized"] - scored["before"]) < 1e-4, "codes lose little: measured 4.7e-6"


def test_stages_can_be_repeated_with_other_settings(finished: RunFolder, capsys: pytest.CaptureFixture) -> None:
    before = finished.summary()["ttt"]
    run = ["--run-dir", str(finished.path)]
    assert main(["ttt", *run]) == 0
    again = finished.summary()["ttt"]
    assert again["bits_per_byte"] == before["bits_per_byte"]
    assert main(["ttt", *run, "--set", "ttt_lora_lr=0.05"]) == 0
    assert finished.summary()["ttt"]["bits_per_byte"] != before["bits_per_byte"]
    assert main(["ttt", *run, "--set", "logit_softcap_negative=1e-3"]) == 0
    assert finished.summary()["ttt"]["bits_per_byte"] != before["bits_per_byte"]
    assert main(["report", *run]) == 0
    assert "After test-time training" in capsys.readouterr().out
    assert main(["ttt", *run]) == 0


@pytest.mark.parametrize("stage, name", [("eval", "SIGTERM"), ("ttt", "SIGINT"), ("report", "SIGHUP")])
def test_an_interrupted_stage_says_so_and_leaves_the_run(
    stage: str, name: str, finished: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finished.summary()

    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(10)

    monkeypatch.setitem(run.STAGES, stage, stopped)
    assert main([stage, "--run-dir", str(finished.path)]) == 128 + signal.Signals[name]
    assert f"stopped by {name} in the stage {stage}, which begins anew" in capsys.readouterr().err
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


def test_the_audit_of_a_run(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "COUNT", 3)
    monkeypatch.setattr(sample, "BATCH", 1)
    monkeypatch.setattr(replay, "CUTS", 2)
    monkeypatch.setattr("pgolf.audit.checks.DRAWS", 1)
    folder = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    command = ["audit", "--run-dir", str(folder.path), "--full", "--json", "--set", "sliding_window_enabled=0"]
    assert main(command) == 0, capsys.readouterr().out
    audit = json.loads(capsys.readouterr().out)
    assert audit == json.loads((folder.path / "audit.json").read_text())
    verdicts = {(f["check"], f["subject"]): f["verdict"] for f in audit["findings"]}
    unsure = {name for name, verdict in verdicts.items() if verdict != "passed"}
    whole = [f"{name}, whole split" for name in ("evaluation", "test-time training")]
    noted = {("stream order", "test-time training"), ("stream order", whole[1])}
    assert unsure <= noted | {("wall time", "the run"), ("network", "the program")}
    assert noted == {name for name, verdict in verdicts.items() if verdict == "noted"}
    (ordered,) = (f["evidence"] for f in audit["findings"] if (f["check"], f["subject"]) == ("stream order", whole[1]))
    bits = [float(number) for number in re.findall(r"\d\.\d{8}", ordered)]
    assert bits[1] == pytest.approx(scores(folder.summary())["ttt"], abs=1e-7) and abs(bits[0] - bits[1]) > 1e-7
    assert all(verdicts["reproduced", name] == verdicts["ledger", name] == "passed" for name in whole)
    assert verdicts["same score", "the program"] == "passed"
    for name in ("eval", "ttt"):
        found = read_ledger(folder.path / f"ledger-{name}.jsonl.gz")
        assert found.targets == folder.summary()["data"]["val_tokens"] - 1
        assert found.learned_too_early == found.not_once == [] and (found.updates > 0) == (name == "ttt")
    assert "reproduced" in (folder.path / "audit.html").read_text()


def failing(audit: dict) -> set[tuple[str, str]]:
    return {(f["check"], f["subject"]) for f in audit["findings"] if f["verdict"] == "failed"}


def test_a_score_that_the_run_did_not_reach_is_not_reproduced(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss to match, no other check sees it; without one, the bytes by which it divides are wrong, too."""
    monkeypatch.setattr("pgolf.audit.run._sample", lambda *_: ([], None))  # reads no summary
    folder = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    command = ["audit", "--run-dir", str(folder.path), "--json", "--set", "sliding_window_enabled=0"]
    honest, found = folder.summary()["ttt"], []
    forged = {"bits_per_byte": 0.999 * honest["bits_per_byte"]}
    for changed, full in ((forged | {"loss": 0.999 * honest["loss"]}, True), (forged, False)):
        folder.record("ttt", honest | changed)
        assert main([*command, *["--full"] * full]) == 1
        found.append(failing(json.loads(capsys.readouterr().out)))
    assert found == [{("reproduced", "test-time training, whole split")}, {("denominators", "validation split")}]


def test_a_program_that_scores_another_artifact_has_another_score(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks of the package's own stages, which do not see the program, are left out."""
    monkeypatch.setattr(sample, "COUNT", 3)
    monkeypatch.setattr("pgolf.audit.run.check_scorer", lambda scorer, few, *_: check_scorer(scorer, few, ()))
    monkeypatch.setattr("pgolf.audit.run._stream_order", lambda *_: Finding("stream order", "", "", "noted", ""))
    folder, other = (RunFolder(shutil.copytree(finished.path, tmp_path / name)) for name in ("run", "other"))
    artifact = container.load(other.path / "model.pgolf")
    name = next(name for name, tensor in artifact.tensors.items() if tensor.dtype.is_floating_point)
    artifact.tensors[name] *= 1.5
    container.save(other.path / "model.pgolf", artifact)
    # Its program could be an older one, which does not know all settings of this package.
    known = {name: value for name, value in read_json(other.config_file).items() if name != "trellis_shrink"}
    other.config_file.write_text(json.dumps(known))
    run, given = audit_stages.run_contained, []

    def spy(script: Path, arguments: list, alone: Path, **more: int) -> Contained:
        given.extend(read_json(alone / "run" / "config.json"))
        return run(script, arguments, alone, **more)

    monkeypatch.setattr("pgolf.audit.run.run_contained", spy)
    program = audit_stages._program
    monkeypatch.setattr("pgolf.audit.run._program", lambda _, *rest: program(other, *rest))
    assert main(["audit", "--run-dir", str(folder.path), "--json"]) == 1
    assert failing(json.loads(capsys.readouterr().out)) == {("same score", "the program")}
    assert set(given) == set(known)


def test_an_artifact_with_its_settings_alone_can_be_audited(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run has and this folder lacks is not checked."""
    monkeypatch.setattr(sample, "COUNT", 3)
    monkeypatch.setattr(sample, "BATCH", 1)
    monkeypatch.setattr(replay, "CUTS", 1)
    monkeypatch.setattr("pgolf.audit.checks.DRAWS", 0)
    for name in ("config.json", "model.pgolf"):
        shutil.copy(finished.path / name, tmp_path)
    command = ["audit", "--run-dir", str(tmp_path), "--json", "--set", "sliding_window_enabled=0"]
    assert main(command) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    absent = {f["check"] for f in findings if f["verdict"] == "not checked"}
    assert absent == {"reproduced", "sizes", "runs alone", "wall time"}
    passed = {f["check"] for f in findings if f["verdict"] == "passed"}
    assert passed == {*CHECKS, "complete", "denominators", "disjoint"}


def test_an_audit_that_finds_a_violation_exits_with_1(
    finished: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding("sizes", "budget", "shipped files", "failed", "16,000,001 of 16,000,000 bytes: " + "long " * 20)
    monkeypatch.setattr("pgolf.audit.run.audit_run", lambda *_: [finding])
    assert main(["audit", "--run-dir", str(finished.path)]) == 1
    assert re.search(r"^failed +budget +sizes +shipped files +16,000,001 of", capsys.readouterr().out, re.MULTILINE)
    assert main(["audit", "--run-dir", str(finished.path / "none")]) == 2


def test_inspect_shows_the_classes(finished: RunFolder, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(finished.path / "model.pgolf")]) == 0
    shown = capsys.readouterr().out
    assert "attention" in shown and "trellis" in shown and "of the cap" in shown
    total = finished.summary()["quantize"]["total_bytes"]
    assert f"together: {total:,} bytes" in shown and "sensitivities: none" not in shown


def test_a_submission_s_program_scores_alone(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of two seeds; the second is the first with another seed in its settings and in its program."""
    other = RunFolder(shutil.copytree(finished.path, tmp_path / "other"))
    config = other.config().replace(seed=42)
    other.config_file.write_text(config.to_json())
    quantized = other.summary()["quantize"]
    other.record("quantize", {**quantized, "code_bytes": export_program(other.program, config)})
    out = tmp_path / "submission"
    assert main(["pack", str(finished.path), str(other.path), "--out", str(out), "--documents", "2"]) == 0
    own, packed = (
        json.loads(path.read_text("latin-1").split("\n")[1]) for path in (finished.program, out / "train_gpt.py")
    )
    assert own.pop("DATA_DIR") == str(finished.config().data_dir) and packed == own and "SEED" not in own
    fields = json.loads((out / "submission.json").read_text())
    assert fields["seeds"] == [42, 1337] and fields["val_bpb"] == pytest.approx(scores(finished.summary())["ttt"])
    checks = (out / "README.md").read_text().partition("## Check")[2]
    assert len(scored := re.findall(r"^\| \d+ \| (\S+) \| (\S+) \|$", checks, re.MULTILINE)) == 2
    assert all(program == package for program, package in scored)


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
    broken.write_bytes((finished.path / "model.pgolf").read_bytes()[:-100])
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
    monkeypatch.setattr("pgolf.artifact.sizes.ArtifactSize.__init__.__defaults__", (1000,))
    message = fails(["quantize", "--run-dir", str(folder)], capsys)
    assert "bytes over the cap" in message and "embed_clip_sigmas" in message


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["data"],
        ["data", "fineweb"],
        ["data", "build"],
        ["data", "tokenizer"],
        ["data", "check"],
        ["train"],
        ["quantize"],
        ["eval"],
        ["ttt"],
        ["report"],
        ["config"],
        ["inspect"],
        ["convert"],
        ["pack"],
        ["env"],
    ],
    ids=" ".join,
)
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


# --- One command that starts or goes on -------------------------------------------------------------------------------


def test_one_command_starts_and_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = RunFolder(tmp_path / "run")
    command = ["train", "--preset", "demo", "--resume", "--run-dir", str(folder.path), *settings(data, iterations=1)]
    assert main(command) == 0
    written = folder.summary()["train"]
    assert folder.config().preset_name == "demo" and written["steps"] == 1
    whole = ["run", *command[1:]]
    folder.record("quantize", {})  # as if that were done, and the rest
    folder.record("eval", {})
    folder.record("ttt", {})
    assert main(whole) == 0
    assert "[train] done before" in capsys.readouterr().out and folder.summary()["train"] == written
    assert "change single ones with --set" in fails(["run", "--preset", "record", *whole[3:]], capsys)


def test_resuming_nothing_does_not_start_the_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    message = fails(["run", "--resume", "--run-dir", str(tmp_path / "typo")], capsys)
    assert "finds no run in" in message and "with a --preset it starts one there" in message
    assert "name" in fails(["run", "--resume", "--preset", "demo"], capsys)
    assert not (tmp_path / "typo").exists()


def test_a_second_start_leaves_the_first_alone(finished: RunFolder, capsys: pytest.CaptureFixture) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.path.iterdir()}
    with finished.locked():
        for more in (["--resume"], ["--fresh", "--preset", "demo"]):
            message = fails(["run", "--run-dir", str(finished.path), *more], capsys)
            assert f"in use by process {os.getpid()} on" in message
        assert main(["report", "--run-dir", str(finished.path)]) == 0, "which may watch a run that goes on"
    after = {path.name: path.stat().st_mtime_ns for path in finished.path.iterdir()}
    assert {**after, "report.html": 0} == {**before, "report.html": 0}


# --- What comes from outside is no traceback --------------------------------------------------------------------------


def test_a_run_scores_the_files_that_were_checked(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copied, folder = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    assert main(["data", "--preset", "demo", "--run-dir", str(folder), *settings(copied, iterations=1)]) == 0
    (shard,) = copied.rglob("fineweb_val_*.bin")
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + b"\x09\x00")
    assert "is not as it was when this run's data were checked" in fails(["train", "--run-dir", str(folder)], capsys)
    check = ["data", "check", "--set", f"data_dir={copied}", "--set", "vocab_size=400"]
    assert "sha256 of fineweb_val_000000.bin is" in fails(check, capsys)
    shard.write_bytes(content)
    assert main(["train", "--run-dir", str(folder)]) == 0 and main(check) == 0


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a number from 1 to"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a number from 1 to"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK must be a number from 0 to 1, and it is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the processes do not find each other: .*MASTER_ADDR"),
    ],
)
def test_a_strange_environment(
    variables: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    message = fails(["run", "--preset", "demo", "--run-dir", str(tmp_path / "a"), "--set", "device=cpu"], capsys)
    assert re.search(words, message)


@pytest.mark.parametrize("coding", [["--case"], ["--case", "before-space"]])
def test_case_coded_data(
    coding: list[str], data: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By the command line, and that a run takes data of its own coding only."""
    model, out = tmp_path / "coded.model", tmp_path / "coded"
    train = ["data", "tokenizer", "--docs", str(documents), "--vocab-size", "400", "--out", str(model)]
    build = ["data", "build", "--docs", str(documents), "--val-docs", "6", "--tokenizer"]
    assert main([*train, *coding]) == 0
    assert main([*build, str(model), "--out", str(out), *coding]) == 0
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()[:6]]
    assert "val: 6 documents, " in (printed := capsys.readouterr().out)
    assert f"{sum(len(text.encode()) for text in texts):,} bytes" in printed
    check = ["data", "check", "--set", f"data_dir={out}", "--set", "vocab_size=400"]
    assert main([*check, "--set", "case_coding=1"]) == 0
    shown = capsys.readouterr().out
    assert "val decoded bytes" in shown and re.search(r"case operators +(before|after) the space", shown)
    assert "turn case coding on" in fails(check, capsys)
    assert "turn case coding on" in fails([*build, str(model), "--out", str(tmp_path / "x")], capsys)
    run = ["data", "--preset", "demo", "--run-dir"]
    assert "turn case coding on" in fails([*run, str(tmp_path / "a"), *settings(out)], capsys)
    assert "is not for case-coded" in fails([*run, str(tmp_path / "b"), *settings(data, case_coding=1)], capsys)
    assert main([*run, str(tmp_path / "c"), *settings(out, case_coding=1)]) == 0
    summary = RunFolder(tmp_path / "c").summary()["data"]
    assert summary["val_bytes"] == sum(len(text.encode()) for text in texts)
    assert "fineweb_val_bytes_000000.bin" in summary["files"]
    if "before-space" in coding:
        fewer = dict(trellis_states=8, trellis_rows=64, sensitivity_sequences=8, sensitivity_tokens=64, warmup_steps=0)
        fewer |= dict(sliding_window_enabled=0, swa_window_frac=0.5)
        run = ["run", "--preset", "frontier", "--run-dir", str(tmp_path / "frontier")]
        assert main([*run, *settings(out, **fewer)]) == 0
        assert "1 snapshots are blended into the average" in capsys.readouterr().out
        found = RunFolder(tmp_path / "frontier").summary()
        assert found["ttt"]["bits_per_byte"] < found["eval"]["quantized"]["bits_per_byte"]


def test_files_and_folders_in_each_other_s_place(
    data: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    assert "Is a directory" in fails(["inspect", str(tmp_path)], capsys)
    run = ["data", "--preset", "demo", *settings(data), "--run-dir"]
    for where in (plain, plain / "below"):
        assert str(plain) in fails([*run, str(where)], capsys)
    (tmp_path / "run" / "summary.json").mkdir(parents=True)
    assert "summary.json" in fails([*run, str(tmp_path / "run")], capsys)
    model = data / "tokenizers" / "fineweb_400_bpe.model"
    build = ["data", "build", "--docs", str(documents), "--tokenizer", str(model), "--val-docs", "3", "--out"]
    assert "workers must be at least 1, got -1" in fails([*build, str(tmp_path / "out"), "--workers", "-1"], capsys)
    assert str(plain) in fails([*build, str(plain)], capsys)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(5, "bad disk")])
def test_what_the_machine_lacks_is_a_message(
    error: Exception, finished: RunFolder, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setitem(run.STAGES, "report", fail)
    assert (str(error) or "not enough memory") in fails(["report", "--run-dir", str(finished.path)], capsys)
    monkeypatch.setitem(run.STAGES, "report", lambda *_: {}["a defect"])
    with pytest.raises(KeyError):
        main(["report", "--run-dir", str(finished.path)])


def test_damaged_files_of_a_run_are_messages(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = RunFolder(shutil.copytree(finished.path, tmp_path / "run"))
    run = ["--run-dir", str(folder.path)]
    folder.ema.write_text("hello\n")
    assert "ema.pt cannot be read: it was not written by torch.save" in fails(["quantize", *run], capsys)
    folder.summary_file.write_text(json.dumps({**finished.summary(), "train": {"steps": "many"}}))
    assert "summary.json" in fails(["report", *run], capsys)
    folder.summary_file.write_text("")
    for stage in ("eval", "report"):
        assert "summary.json is damaged: it is no JSON object" in fails([stage, *run], capsys)
    folder.config_file.write_bytes(b"\xff")
    assert "config.json is damaged" in fails(["ttt", *run], capsys)


@pytest.mark.parametrize("command", [["config"], ["env"]])
def test_a_reader_that_goes_away(command: list[str]) -> None:
    """`pgolf config | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "pgolf", *command], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, "pgolf: nothing reads the output any more\n")


def test_what_quantisation_costs_is_measured(finished: RunFolder, tmp_path: Path, monkeypatch) -> None:
    found = {}
    for way in list(quantization.PARTS)[:2]:
        found[way] = quantization.PARTS[way]
    monkeypatch.setattr(quantization, "PARTS", found)
    monkeypatch.setattr(quantization, "RECORD", way)
    monkeypatch.setattr(quantization, "PUBLIC_STEPS", (1.0,))
    file = tmp_path / "quantization.json"
    monkeypatch.setattr(quantization, "TUNING_STEPS", 2)
    options = ["--run-dir", str(finished.path), "--sizes", "90000", "--ttt", "--times", "--tune"]
    results = quantization.main([*options, "--results", str(file)])
    assert [row["way"] for row in results["tuned"]] == [quantization.PUBLIC, way]
    assert all(row["tax"] != other["tax"] for row, other in zip(results["tuned"], results["rows"][::2], strict=True))
    ways = [quantization.PUBLIC, *found]
    assert [row["way"] for row in results["rows"]] == ways
    adapted = [row["way"] for row in results["test_time_training"]]
    assert adapted == [ways[0], way, f"{ways[0]}, tuned", f"{way}, tuned"]
    assert all(abs(row["tax"]) < 0.1 and row["error"] > 0 for row in results["rows"])
    assert results["bits_per_byte"] == pytest.approx(scores(finished.summary())["before"], abs=1e-6)
    assert min(results["times"].values()) > 0
    assert read(file)["rows"] == results["rows"]


def test_scores_are_divided_by_the_original_text_s_bytes() -> None:
    """Plain data count the bytes of the normalised text, of which there may be fewer."""
    plain = {"preset": "record", "settings": {}, "name": "record", "ttt": {"nats": [6.0, 3.0], "bytes": [8.0, 4.0]}}
    coded = plain | {"preset": "frontier", "name": "frontier", "ttt": {"nats": [5.0, 3.0], "bytes": [9.0, 4.0]}}
    rows = score.compare({"record": plain, "frontier": coded})
    assert [row["bits_per_byte"] * math.log(2) for row in rows] == pytest.approx([9 / 13, 8 / 13])
    assert rows[1]["difference"] * math.log(2) == pytest.approx(-1 / 13)
    assert score.compare({"record": plain})[0]["bits_per_byte"] * math.log(2) == pytest.approx(9 / 12)
    fewer = plain | {"ttt": {"nats": [6.0], "bytes": [8.0]}}
    with pytest.raises(ValueError, match="record was scored on 1 documents, and frontier on 2"):
        score.compare({"frontier": coded, "record": fewer})


def test_presets_are_compared_by_documents(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls = []

    def call(self: score.Proof, *words: str) -> str:
        calls.append(words[2])
        assert main([str(word) for word in words[2:]]) == 0
        return ""

    monkeypatch.setattr(score.Proof, "call", call)
    pairs = settings(data, quantizer="gptq", compressor="lzma")[1::2]
    options = [
        "--data-dir",
        str(data),
        "--run-dir",
        str(tmp_path),
        "--seconds",
        "0",
        "--results",
        str(tmp_path / "s.json"),
    ]
    options += [part for pair in pairs for part in ("--set", pair)]
    options += ["--variant", "demo", "--variant", "slower: demo; matrix_lr=0.001"]
    results = score.main([*options, "--limit", "30"])  # less than a stage needs
    assert not calls and score.compare(results["variants"]) == []
    rows = score.compare(score.main(options)["variants"])
    assert calls == ["train", "quantize"] * 2
    assert [(row["variant"], row["stage"]) for row in rows] == [
        (n, s) for n in ("demo", "slower") for s in score.STAGES
    ]
    assert all(row["difference"] == row["error"] == 0 for row in rows[:3])
    assert all(row["difference"] > 0 and row["error"] > 0 for row in rows[3:])
    page = "".join(results_sections.presets({"x1/score": score.main(options)}))
    assert len(calls) == 4, "all was done"
    turned = [*options[:-4], "--variant", "slower: demo; matrix_lr=0.001", "--variant", "demo: demo; matrix_lr=0.002"]
    found = score.main([*turned, "--limit", "30"])["variants"]
    assert list(found) == ["slower", "demo"] and "train" in found["slower"] and "train" not in found["demo"]
    assert "| slower | " in page and " 0.0000 |" in page and "`max_wallclock_seconds=0`" in page
    with pytest.raises(argparse.ArgumentTypeError, match="neither a preset nor"):
        score.variant("nothing")
    with pytest.raises(SystemExit):
        score.main([*options, "--variant", "coded: demo; case_coding=1"])
    assert "coded needs case-coded documents: --case-data-dir DIR" in capsys.readouterr().err
