"""The audit of a run's folder: its data, its stages, and the program that it ships."""

from __future__ import annotations

import json
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact.weights import load_artifact
from pgolf.audit.checks import FAILED, NOT_CHECKED, NOTED, PASSED, Finding, check_scorer
from pgolf.audit.data import complete, denominators, disjoint, stated_counts
from pgolf.audit.ours import EvaluationScorer, TrainingForward, TTTScorer
from pgolf.audit.program import contained, run_contained, sizes, wall_time
from pgolf.audit.protocol import Documents, Scorer
from pgolf.audit.replay import Examined
from pgolf.audit.sample import sample
from pgolf.common.files import read_json, write_aside
from pgolf.common.folder import RunFolder, RunFolderError
from pgolf.common.progress import format_duration, format_table, progress
from pgolf.common.runtime import World, describe_environment
from pgolf.config import RunConfig
from pgolf.data import case_coding
from pgolf.data.bpb import ByteCounter
from pgolf.data.manifest import check_unchanged, operators_place, recorded_dataset, sha256_of
from pgolf.data.shards import (
    ShardError,
    dataset_dir,
    read_shard,
    shard_files,
    sidecar_path,
    tokenizer_path,
    write_shard,
)
from pgolf.data.tokenizer import load_tokenizer
from pgolf.data.validation import validation_data
from pgolf.model.build import model_with
from pgolf.model.gpt import GPT
from pgolf.report.page import html_page, html_section, html_table
from pgolf.scoring.evaluate import evaluate_packed, evaluate_sliding

COMPARED_TOKENS = 20_000_000  # of the training data, without --full
RECORD_CHECKS = ("ledger", "once each", "reported score")  # those that need no replay
EVIDENCE_WIDTH = 72  # characters
# Relative; a score of one process again on such a CPU, and that of several, or of CUDA graphs, which pad streams.
REPRODUCED = 1e-6, 1e-4


class _Stages(NamedTuple):
    """The scorers of a run with some settings, those that are only compared with them, and the loss of training."""

    scores: dict[str, EvaluationScorer | TTTScorer]
    in_stream_order: TTTScorer | None
    training: list[TrainingForward]


def audit_run(folder: RunFolder, config: RunConfig, world: World, full: bool = False) -> list[Finding]:
    """Audit a run; write audit.json, audit.html and the ledgers into its folder, and return the findings.

    Args:
        full: also score the whole split, with a ledger, and compare all training documents.

    An artifact with the settings in a config.json is enough; what else a run has and this one lacks is not checked.
    Raises FileError if the artifact or the data are missing, or the data are not those that the run checked, and
    ValueError for several processes.
    """
    if world.size > 1:
        raise ValueError("the audit runs in one process: start it without torchrun")
    begun = time.perf_counter()
    artifact = folder.need(folder.artifact(config), "quantize")
    if checked := folder.checked_files():
        check_unchanged(config.data_dir, config.vocab_size, checked, splits=("val",))
    tokens, counter = validation_data(config)
    documents = _documents(tokens, counter, config)
    few, settings = sample(documents, config)
    few_counter = counter if few.sidecar is None else _PlacedBytes(few.sidecar, config.vocab_size)
    model = model_with(config, world, load_artifact(config, folder, world))

    findings = _data(documents, folder, config, counter, full)
    if config.case_coding:
        place = operators_place(config.data_dir, config.vocab_size)
        evidence = (
            f"case-coded, operators {place}; scores divide by the original text's bytes, which the sidecar states"
        )
        findings.append(Finding("case coding", "data", "validation split", NOTED, evidence))
    with _one_thread():
        found, by_ttt = _sample(_stages(model, settings, few_counter), few, folder, world)
        findings += found
    findings += _whole_split(model, config, counter, documents, folder, world) if full else [_not_reproduced()]
    if folder.program.exists():
        findings.append(sizes([artifact, folder.program]))
        findings += _program(folder, config, settings, few, by_ttt)
    else:
        checks = {"sizes": "budget", "runs alone": "self-containment"}
        why = f"there is no program {folder.program}"
        findings += [Finding(check, what, "the program", NOT_CHECKED, why) for check, what in checks.items()]
    environment = read_json(folder.environment) if folder.environment.exists() else {}
    findings.append(wall_time(folder.summary(), environment))
    _write(folder, findings, few, full, time.perf_counter() - begun)
    return findings


def _documents(tokens: Tensor, counter: ByteCounter, config: RunConfig) -> Documents:
    """Return the validation split's documents; case-coded ones with the bytes of their sidecar, and decoded twice."""
    path = tokenizer_path(config.data_dir, config.vocab_size)
    tokenizer = load_tokenizer(path, config.vocab_size, case_coding=config.case_coding)
    stream = tokens.numpy().astype(np.int64)
    if not config.case_coding:
        return Documents(stream, tokenizer.decode)
    sidecar = np.append(0, counter.of_stream(tokens).numpy())  # the first token is a BOS
    return Documents(stream, lambda ids: _uncoded(tokenizer.decode(ids)), sidecar=sidecar)


def _uncoded(code: str) -> str:
    """Return the text of a code, without operators where the tokenizer's normalisation has changed what follows."""
    try:
        return case_coding.decode(code)
    except ValueError:
        return code.translate(dict.fromkeys(map(ord, case_coding.OPERATORS)))


class _PlacedBytes(ByteCounter):
    """Counts by place, whatever token is there: replays change tokens, and their scores are not compared."""

    def __init__(self, counts: np.ndarray, vocab_size: int) -> None:
        self._counts, self._vocab_size = torch.from_numpy(counts).long(), vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def of_targets(self, stream: Tensor, places: Tensor) -> Tensor:
        return self._counts[places]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: a sample's matrices are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sample(stages: _Stages, few: Documents, folder: RunFolder, world: World) -> tuple[list[Finding], Examined | None]:
    """Check all scorers on the sample, and write ledgers. Returns also what test-time training did."""
    findings: list[Finding] = []
    examined: dict[str, Examined] = {}
    for name, scorer in stages.scores.items():
        world.log(f"{scorer.name}: {few.starts.size} documents, {few.stream.size:,} tokens")
        found, examined[name] = check_scorer(scorer, few)
        findings += found
        examined[name].first[0].write(folder.path / f"ledger-{name}.jsonl.gz")
    if stages.in_stream_order is not None:
        findings.append(_stream_order(stages.in_stream_order, examined["ttt"]))
    for forward in stages.training:
        findings += check_scorer(forward, few, ("isolation",))[0]
    return findings, examined.get("ttt")


def _stages(model: GPT, config: RunConfig, counter: ByteCounter) -> _Stages:
    scores: dict[str, EvaluationScorer | TTTScorer] = {}
    in_stream_order = None
    scores["eval"] = EvaluationScorer("evaluation", evaluate_packed, model, config, counter)
    if config.sliding_window_enabled:
        scores["sliding"] = EvaluationScorer("sliding window", evaluate_sliding, model, config, counter)
    if config.ttt_enabled:
        scores["ttt"] = TTTScorer("test-time training", model, config, counter)
        if config.ttt_order != "stream":
            ordered = config.replace(ttt_order="stream")
            in_stream_order = TTTScorer("test-time training", model, ordered, counter)
    loops = (False, True) if config.num_loops else (False,)
    return _Stages(scores, in_stream_order, [TrainingForward(model, config, looping) for looping in loops])


def _data(
    documents: Documents, folder: RunFolder, config: RunConfig, counter: ByteCounter, full: bool
) -> list[Finding]:
    entry = recorded_dataset(config.data_dir, config.vocab_size)
    counted = int(counter.of_stream(torch.from_numpy(documents.stream)).sum())
    findings = [
        complete(documents, stated_counts(entry), "repository" in entry),
        denominators(documents, counted, _reported(folder), "repository" in entry),
    ]
    try:
        files = shard_files(config.data_dir, config.vocab_size, "train")
    except ShardError as absent:
        return [*findings, Finding("disjoint", "data", "training and validation", NOT_CHECKED, str(absent))]
    tokens = sum(read_shard(file).size for file in files)
    shards = (read_shard(file) for file in files)
    return [*findings, disjoint(documents, shards, tokens, None if full else COMPARED_TOKENS)]


def _reported(folder: RunFolder) -> dict[str, tuple[float, float]]:
    """Return loss and bits per byte of every score in the run's summary."""
    summary = folder.summary()
    evaluation = summary.get("eval", {})
    blocks = {"before": evaluation.get("before"), "eval": evaluation.get("quantized")}
    blocks |= {"sliding": evaluation.get("sliding"), "ttt": summary.get("ttt")}
    try:
        return {name: (float(b["loss"]), float(b["bits_per_byte"])) for name, b in blocks.items() if b is not None}
    except (LookupError, TypeError, ValueError) as error:
        raise RunFolderError(f"{folder.summary_file} is damaged: a score lacks a number ({error!r})") from error


def _stream_order(scorer: Scorer, by_length: Examined) -> Finding:
    """Score in the order of the stream, check that no later document matters there, and put the scores side by side."""
    ordered = Examined(scorer, by_length.documents)
    place = ordered.one_of_each(0)[ordered.documents.starts.size // 2]
    places = np.arange(ordered.documents.stream.size)
    compared = ordered.compare(places >= place, places <= place, learning=False, last=place)
    scores = f"{ordered.first[1]:.6f} bits per byte in the stream's order, {by_length.first[1]:.6f} in the order used"
    if compared.difference:
        return Finding("stream order", "C1 causality", scorer.name, FAILED, f"{scores}; {compared.difference}")
    evidence = f"{scores}, in which documents wait for later ones, as in every accepted record of phased training; "
    evidence += f"in the stream's order {compared.losses:,} losses before a change stay equal to the bit"
    return Finding("stream order", "C1 causality", scorer.name, NOTED, evidence)


def _whole_split(
    model: GPT, config: RunConfig, counter: ByteCounter, documents: Documents, folder: RunFolder, world: World
) -> list[Finding]:
    """Score the whole split with the run's settings, compare the scores with the run's, and score in stream order."""
    findings, scores = [], dict[str, float]()
    stages = _stages(model, config, counter)
    run, reported = folder.summary().get("run", {}), _reported(folder)
    chip = describe_environment(world)["chip"]
    for name, scorer in stages.scores.items():
        world.log(f"{scorer.name}: the whole split")
        scorer.name += ", whole split"
        scorer.progress = progress
        found, examined = check_scorer(scorer, documents, RECORD_CHECKS)
        examined.first[0].write(folder.path / f"ledger-{name}.jsonl.gz")
        now = scores[name] = examined.first[1]
        verdict, evidence = NOT_CHECKED, f"{now:.8f} bits per byte; the run has no result of this stage"
        if name in reported:
            was = reported[name][1]
            evidence = f"{now:.8f} bits per byte, and the run reports {was:.8f}"
            if run.get("device") != chip:
                evidence += f", on {run.get('device')}, which rounds in other ways than {chip}"
            else:
                rounded = run.get("world_size") != 1 or world.device.type == "cuda"
                bound = REPRODUCED[rounded] * was
                verdict = PASSED if abs(now - was) <= bound else FAILED
        findings += [*found, Finding("reproduced", "C4 once each", scorer.name, verdict, evidence)]
    if (ordered := stages.in_stream_order) is not None:
        world.log(f"{ordered.name}: the whole split in the order of the stream")
        ordered.name, ordered.progress = f"{ordered.name}, whole split", progress
        bits = ordered.score(documents.stream, (), lambda _: None)
        evidence = f"{bits:.8f} bits per byte in the stream's order, {scores['ttt']:.8f} in the order used"
        findings.append(Finding("stream order", "C1 causality", ordered.name, NOTED, evidence))
    return findings


def _not_reproduced() -> Finding:
    return Finding(
        "reproduced",
        "C4 once each",
        "the run's scores",
        NOT_CHECKED,
        "a sample was scored; --full scores the whole split",
    )


def _program(
    folder: RunFolder, config: RunConfig, settings: RunConfig, documents: Documents, scored: Examined | None
) -> list[Finding]:
    """Run the shipped program on the sample, in a folder that has nothing else, and compare its score."""
    if scored is None:
        why = "the program's stage eval also scores ema.pt, which is not shipped, and ttt is off"
        return [Finding("runs alone", "self-containment", "the program", NOT_CHECKED, why)]
    with tempfile.TemporaryDirectory(prefix="pgolf-audit-") as name:
        alone = Path(name)
        program = Path(shutil.copy(folder.program, alone))
        run = RunFolder(alone / "run")
        own = settings.replace(data_dir="data", artifact_dir="")
        run.create(own, {})
        # The program may be older than this package, and refuses settings that it does not know.
        known = read_json(folder.config_file)
        values = {name: value for name, value in read_json(run.config_file).items() if name in known}
        write_aside(run.config_file, json.dumps(values, indent=1))
        shutil.copy(folder.artifact(config), run.artifact(own))
        tokenizer = tokenizer_path(alone / "data", config.vocab_size)
        shard = dataset_dir(alone / "data", config.vocab_size) / "fineweb_val_000000.bin"
        tokenizer.parent.mkdir(parents=True)
        shard.parent.mkdir(parents=True)
        shutil.copy(tokenizer_path(config.data_dir, config.vocab_size), tokenizer)
        write_shard(shard, documents.stream)
        written = [tokenizer, shard]
        if documents.sidecar is not None:
            write_shard(sidecar_path(shard), documents.sidecar)
            written.append(sidecar_path(shard))
        stats = {path: path.stat() for path in written}
        files = {
            path.name: {"sha256": sha256_of(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            for path, stat in stats.items()
        }
        run.record("data", {"files": files})
        # Settings in the program come before the folder's, and those of the command line before both.
        shipped = folder.config()
        changed = {name: value for name, value in vars(own).items() if value != getattr(shipped, name)}
        pairs = [f"{name}={value}" for name, value in (changed | {"data_dir": "data", "cuda_graphs": "off"}).items()]
        arguments = ["ttt", "--run-dir", "run", *(part for pair in pairs for part in ("--set", pair))]
        done = run_contained(program, arguments, alone, threads=1)
        findings = contained(done)
        if done.status:
            return findings
        bits, expected = run.summary()["ttt"]["bits_per_byte"], scored.first[1]
    verdict = PASSED if abs(bits - expected) <= REPRODUCED[0] * expected else FAILED
    evidence = f"{bits:.8f} bits per byte of the sample, and the package's stage {expected:.8f}"
    return [*findings, Finding("same score", "self-containment", "the program", verdict, evidence)]


def _write(folder: RunFolder, findings: list[Finding], few: Documents, full: bool, seconds: float) -> None:
    scope = f"{few.starts.size} documents with {few.stream.size:,} tokens{', and the whole split' if full else ''}"
    content: dict[str, Any] = {
        "verdict": verdict(findings),
        "seconds": round(seconds, 1),
        "documents": scope,
        "findings": [finding._asdict() for finding in findings],
    }
    write_aside(folder.path / "audit.json", json.dumps(content, indent=1) + "\n")
    name = folder.path.resolve().name
    rows = [(f.verdict, f.condition, f.check, f.subject, f.evidence) for f in findings]
    table = html_table(["Verdict", "Condition", "Check", "Of", "Evidence"], rows)
    about = f"{verdict(findings)} · {scope} · {format_duration(seconds)}"
    page = html_page(f"audit {name}", f"Audit of {name}", about, [html_section("Findings", table)])
    write_aside(folder.path / "audit.html", page)


def findings_table(findings: list[Finding]) -> str:
    """Format findings as aligned text, with the evidence in lines of EVIDENCE_WIDTH."""
    rows: list[tuple[str, ...]] = []
    for f in findings:
        first, *others = textwrap.wrap(f.evidence, EVIDENCE_WIDTH)
        rows.append((f.verdict, f.condition, f.check, f.subject, first))
        rows += [("", "", "", "", line) for line in others]
    return format_table(rows, ("verdict", "condition", "check", "of", "evidence"))


def verdict(findings: list[Finding]) -> str:
    """Return how many findings there are of each verdict, in words."""
    counts = {
        kind: sum(finding.verdict == kind for finding in findings) for kind in (PASSED, FAILED, NOT_CHECKED, NOTED)
    }
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
