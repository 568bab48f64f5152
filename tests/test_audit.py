"""The audit: every planted violation is found by the right check and by no other, and what is honest passes."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.audit import reader
from pgolf.audit.checks import CHECKS, FAILED, check_scorer, failed
from pgolf.audit.ours import EvaluationScorer, TrainingForward, TTTScorer
from pgolf.audit.program import wall_time
from pgolf.audit.protocol import Documents
from pgolf.audit.replay import Examined
from pgolf.audit.run import _sample, _Stages, audit_run
from pgolf.common import folder
from pgolf.common.folder import RunFolder
from pgolf.common.runtime import World
from pgolf.config import RunConfig
from pgolf.scoring.evaluate import evaluate_packed, evaluate_sliding
from pgolf.scoring.ttt.scorer import ChunkScorer
from tests import audit_exam
from tests.audit_exam import PLANTED, SUBMISSIONS, Honest, Planted, Submission
from tests.test_docs import python_blocks

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "audit.md"


def found(scorer: Honest, checks: tuple[str, ...] = tuple(CHECKS)) -> set[str]:
    return {finding.check for finding in failed(check_scorer(scorer, audit_exam.documents(), checks)[0])}


def test_the_honest_scorer_passes_everything() -> None:
    findings, _ = check_scorer(Honest(), audit_exam.documents())
    assert [(f.check, f.verdict) for f in findings] == [(name, "passed") for name in CHECKS], findings


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.what)
def test_what_is_planted_is_found(planted: Planted) -> None:
    assert found(planted.scorer()) == planted.found_by


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_is_needed(check: str) -> None:
    """Without it, a violation that it alone finds goes unnoticed."""
    alone = [planted for planted in PLANTED if planted.found_by == {check}]
    assert alone
    others = tuple(name for name in CHECKS if name != check)
    assert all(found(planted.scorer(), others) == set() for planted in alone)


@pytest.mark.parametrize("planted", SUBMISSIONS, ids=lambda planted: planted.what)
def test_what_is_planted_in_a_submission_is_found(planted: Submission, tmp_path: Path) -> None:
    twins = []
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        twins.append(planted.judge(folder, bool(number)))
    assert failed(twins[0]) == []
    assert {(finding.check, finding.condition) for finding in failed(twins[1])} == {
        (planted.found_by, planted.condition)
    }


@pytest.mark.parametrize(
    "count, each, verdict", [(10_000, 15_108, "failed"), (50_000, 3_000, "failed"), (50_000, 3_022, "passed")]
)
def test_only_what_the_challenge_s_split_has_tells_another_split_with_a_manifest(
    count: int, each: int, verdict: str
) -> None:
    """By its manifest alone each is complete."""
    text = audit_exam.fineweb_split(count, each)
    (fineweb,), (other,) = (audit_exam.complete_by_its_manifest(text, fineweb) for fineweb in (True, False))
    assert fineweb.verdict == verdict and other.verdict == "passed"
    wrong = "50,000 documents" if count < 50_000 else "about 151.08 million bytes"
    assert verdict == "passed" or fineweb.evidence.endswith(f"the challenge's split has {wrong}")


def test_weights_that_were_trained_on_validation_elsewhere_go_unnoticed() -> None:
    """docs/audit.md says so: hashes of documents are all that the audit sees of training."""
    assert found(audit_exam.TrainedElsewhere()) == set()
    assert "an artifact that was trained on validation elsewhere" in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("kv_cache, checks", [(False, tuple(CHECKS)), (True, ("charged loss", "reported score"))])
def test_test_time_training_passes(kv_cache: bool, checks: tuple[str, ...]) -> None:
    """Also without the mask, whose leak is in packed rows only, with a cache, and where it learns from chunks twice.

    With a tilt and two softcaps, which change distributions, and weighted targets.
    """
    changed = dict(smear_gate_bos_mask=False, ttt_kv_cache=kv_cache, ttt_grad_steps=1 + kv_cache, ttt_lanes=2)
    changed |= dict(ngram_tilt_boost=2.0, ngram_tilt_order=2, ngram_tilt_threshold=0.3, ttt_conf_weighted=True)
    changed |= dict(logit_softcap=4.0, logit_softcap_negative=2.0)
    model, config, table, text = audit_exam.model_and_text(**changed)
    findings, examined = check_scorer(TTTScorer("ttt", model, config, table), text, checks)
    assert [(f.check, f.verdict) for f in findings] == [(name, "passed") for name in checks], findings
    assert examined.reading.updates > 2 * config.phased_ttt_num_phases
    assert examined.reading.states == 1 + config.ttt_batch_size


def test_windows_that_slide_pass() -> None:
    model, config, table, text = audit_exam.model_and_text(eval_seq_len=24, eval_stride=5)
    findings, examined = check_scorer(EvaluationScorer("sliding", evaluate_sliding, model, config, table), text)
    assert [(f.check, f.verdict) for f in findings] == [(name, "passed") for name in CHECKS], findings
    assert examined.reading.scores > text.starts.size


def test_learning_before_the_score_shows_in_test_time_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of a step after its update are no entries of the distributions before it."""
    compute = ChunkScorer._compute

    def learns_first(scorer: ChunkScorer, *step: object) -> torch.Tensor:
        compute(scorer, *step)
        return compute(scorer, *step)

    monkeypatch.setattr(ChunkScorer, "_compute", learns_first)
    model, config, table, text = audit_exam.model_and_text(phased_ttt_enabled=False)
    (finding,) = check_scorer(TTTScorer("ttt", model, config, table), text, ("charged loss",))[0]
    assert finding.verdict == FAILED and "nats are charged, and the distribution says" in finding.evidence


def test_in_the_stream_s_order_no_later_document_matters() -> None:
    model, config, table, text = audit_exam.model_and_text()
    differences = []
    for order in ("stream", "length"):
        tilt = dict(ngram_tilt_boost=2.0, ngram_tilt_order=2)
        if order == "stream":
            tilt |= dict(ngram_tilt_scope="stream", ttt_batch_size=1, ttt_lanes=1)
        examined = Examined(TTTScorer("ttt", model, config.replace(ttt_order=order, **tilt), table), text)
        places, middle = np.arange(text.stream.size), examined.one_of_each(0)[text.starts.size // 2]
        differences.append(examined.compare(places >= middle, places <= middle, learning=False).difference)
    assert differences[0] == "" and "moves" in differences[1]


class LearnsFromTheLastDocument(Honest):
    def begin(self) -> None:
        last = self.stream[self.starts[-1] :]
        np.add.at(self.base, (last[:-1], last[1:]), 1)


@pytest.mark.parametrize("ordered, verdict", [(Honest, "noted"), (LearnsFromTheLastDocument, "failed"), (None, None)])
def test_what_looks_at_later_documents_in_the_stream_s_order_is_found(
    ordered: type[Honest] | None, verdict: str | None, tmp_path: Path
) -> None:
    """By nothing but the check of that order, if the order used is honest: without it, the violation goes unnoticed."""
    stages = _Stages({"ttt": Honest()}, ordered and ordered(), [])
    world = World(0, 1, torch.device("cpu"))
    findings = {f.check: f for f in _sample(stages, audit_exam.documents(), RunFolder(tmp_path), world)[0]}
    finding = findings.pop("stream order", None)
    assert {f.verdict for f in findings.values()} == {"passed"}
    assert (finding and finding.verdict) == verdict
    if verdict == "failed":
        assert re.search(r"in the order used; the loss at \d+ moves from", finding.evidence)


def test_the_public_evaluation_s_truncation_is_found() -> None:
    model, config, table, text = audit_exam.model_and_text(eval_public_truncation=True, val_batch_tokens=8 * 144)
    (finding,) = check_scorer(EvaluationScorer("", evaluate_packed, model, config, table), text, ("once each",))[0]
    assert finding.verdict == FAILED and "targets are not scored" in finding.evidence


def ledger(path: Path, *lines: dict) -> reader.Reading:
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return reader.read_ledger(path)


HEAD = {"targets": 6, "documents": [0, 4]}  # documents of four targets and of two
SCORES = [{"score": [1, 3], "states": {"a": "0"}}, {"score": [3, 7], "states": {"a": "1"}}]
UPDATE = {"update": "a", "fingerprint": "1", "learned": [[1, 3]]}


def test_the_reader_reads_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = ledger(tmp_path / "ledger", HEAD, SCORES[0], UPDATE, SCORES[1])
    assert found == reader.Reading(2, 6, 1, 1, [], [])
    assert reader.main([str(tmp_path / "ledger")]) == 0
    assert capsys.readouterr().out.endswith("2 scores of 6 targets, 1 updates of 1 states\n")


@pytest.mark.parametrize(
    "lines, early, wrong",
    [
        ((SCORES[0], SCORES[1]), "line 3: a has changed without an update", ""),
        ((UPDATE, {**SCORES[0], "states": {"a": "1"}}, SCORES[1]), "line 2: a learns from targets 1 to 3", ""),
        ((SCORES[0], {**UPDATE, "learned": [[1, 4]]}, SCORES[1]), "line 3: a learns from targets 1 to 4", ""),
        ((SCORES[0], UPDATE), "", "4 of 6 targets are not scored, the first at 3"),
        ((SCORES[0], UPDATE, SCORES[1], {**SCORES[1], "score": [2, 3]}), "", "line 5: targets 2 to 3 are scored again"),
        (({**SCORES[1], "states": {}}, {**SCORES[0], "states": {}}), "", "line 2: target 3 is not the next one"),
    ],
)
def test_the_reader_finds_what_is_wrong(tmp_path: Path, lines: tuple, early: str, wrong: str) -> None:
    path = tmp_path / "ledger"
    found = ledger(path, HEAD, *lines)
    for expected, shown in ((early, found.learned_too_early), (wrong, found.not_once)):
        assert shown[0].startswith(expected) if expected else shown == []
    assert reader.main([str(path)]) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"text", gzip.compress(b"", mtime=0), gzip.compress(b"{}\n", mtime=0)],
    ids=["nothing", "text", "no lines", "an empty line"],
)
def test_the_reader_refuses_what_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger").write_bytes(content)
    with pytest.raises(ValueError, match="is no ledger"):
        reader.read_ledger(tmp_path / "ledger")


@pytest.mark.parametrize("name", ["reader", "watch"])
def test_what_reads_and_watches_shares_no_code(name: str) -> None:
    source = (ROOT / "pgolf" / "audit" / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (pgolf|numpy|torch)", source, re.MULTILINE)


def test_the_document_s_example_passes() -> None:
    space: dict = {}
    exec(compile(python_blocks(DOCUMENT), "docs/audit.md", "exec"), space)
    assert failed(space["findings"]) == [] and len(space["findings"]) == len(CHECKS)


def test_the_document_has_every_planted_violation() -> None:
    assert audit_exam.table() in DOCUMENT.read_text(encoding="utf-8")
    assert len(PLANTED) + len(SUBMISSIONS) >= 14


def test_documents_must_begin_with_bos() -> None:
    with pytest.raises(ValueError, match="begins with BOS"):
        Documents(np.array([5, 1, 7]), str)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kv_cache", [False, True])
def test_kernels_are_causal_and_isolated_to_the_bit_on_cuda(kv_cache: bool) -> None:
    model, config, table, text = audit_exam.model_and_text(ttt_kv_cache=kv_cache)
    model = model.cuda()
    scorers = [
        EvaluationScorer("evaluation", evaluate_packed, model, config, table),
        TTTScorer("test-time training", model, config, table),
        TrainingForward(model, config, looping=True),
    ]
    for scorer in scorers:
        checks = ("causality", "isolation") if isinstance(scorer, TrainingForward) else tuple(CHECKS)
        findings = check_scorer(scorer, text, checks)[0]
        assert [(f.check, f.verdict) for f in findings] == [(name, "passed") for name in checks], findings


TIMED = """
import time
time.sleep(0.2)  # as if for imports
from pgolf.common.folder import RunFolder, process_age
folder = RunFolder("{}")
folder.record("data", {{"seconds": 0.1}})
folder.record("run", {{"about": "no stage"}})
time.sleep(0.1)
folder.record("ttt", {{"seconds": 0.1}})
print(process_age())
"""


def test_stages_are_timed_from_the_start_of_their_process(tmp_path: Path) -> None:
    """The first from the start of the process on, the next one from the end of the one before."""
    begun = time.monotonic()
    code = TIMED.format(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    took, summary = time.monotonic() - begun, RunFolder(tmp_path).summary()
    data, ttt = (summary[stage]["process_seconds"] for stage in ("data", "ttt"))
    # The kernel counts the start of a process in hundredths of a second.
    assert data > 0.2 and 0.1 < ttt < data + ttt <= float(done.stdout) < took + 0.02
    assert summary["run"] == {"about": "no stage"}


def test_without_proc_the_age_of_a_process_is_that_of_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.process_age() > time.monotonic() - folder.IMPORTED  # pytest itself started before
    monkeypatch.setattr(folder, "Path", lambda name: Path("/nowhere", *Path(name).parts[1:]))
    assert abs(time.monotonic() - folder.IMPORTED - folder.process_age()) < 0.1


TIMES = {
    "train": {"clock_seconds": 596.0, "seconds": 660.0, "process_seconds": 670.0},
    "quantize": {"hessian_seconds": 3.4, "seconds": 90.0, "process_seconds": 91.0},
    "ttt": {"seconds": 585.0, "process_seconds": 590.0},
}


@pytest.mark.parametrize(
    "chip, changed, verdict, evidence",
    [
        ("NVIDIA H100 80GB HBM3", {}, "passed", "test-time training 9 min 50 s"),
        (
            "NVIDIA H100 80GB HBM3",
            {"ttt": {"seconds": 585.0}},
            "not checked",
            "before ttt a start that the run did not",
        ),
        ("NVIDIA H100 80GB HBM3", {"ttt": {"seconds": 610.0}}, "failed", "test-time training 10 min 10 s"),
        ("NVIDIA H100 80GB HBM3", {"ttt": {}}, "not checked", "have not all run; whole stages from the start"),
        (
            "NVIDIA H200",
            {},
            "not checked",
            "whole stages from the start of the process on: train 11 min 10 s, quantize",
        ),
    ],
)
def test_the_wall_time_is_that_from_the_start_of_the_process(
    chip: str, changed: dict, verdict: str, evidence: str
) -> None:
    finding = wall_time({**TIMES, **changed}, {"chip": chip, "devices": 8})
    assert finding.verdict == verdict and evidence in finding.evidence


def test_an_audit_runs_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start it without torchrun"):
        audit_run(RunFolder(tmp_path), RunConfig.preset("demo"), World(0, 2, torch.device("cpu")))
