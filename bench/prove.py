"""Prove that this tree works on this machine's GPU: ``python -m bench.prove --data-dir DIR``.

The parts, each in processes of its own:

- ``run``: some seconds of the record's training and every stage after it, to the report.
- ``tests``: every test that uses the GPU.
- ``program``: the exported ``train_gpt.py``, alone, scores that run's artifact as the run did.
- ``audit``: `pgolf audit` finds no condition of the challenge that the run fails.
- ``train_step``: the speed of a training step (`bench.train_step`).
- ``test_time_training``: its speed by document length (`bench.test_time_training`).

``tests``, ``program`` and ``audit`` run beside one another; what measures time has the machine to itself.
``bench/results/<chip>/proof.json`` is written whenever a part begins or ends. It says of which trees it is a proof, and
a later call adds its parts to a proof of the same trees. ``--check`` says whether the newest proof is of this tree.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.results_files import RESULTS, add_options, describe, read, read_entries, results_path, write
from bench.trees import ROOT, TREES, tree_hashes
from pgolf.common.files import read_json
from pgolf.common.folder import RunFolder
from pgolf.config import ALIASES, FIELDS
from pgolf.submission.export import export_program

COMMAND = "python -m bench.prove --data-dir DIR"
SECONDS = 600.0
LEAST_SECONDS = 5.0  # a part does not begin with less time left
SECONDS_TO_STOP = 15.0  # a process that is told to stop may take so long
TESTS_AT_ONCE = 16  # on a GPU, each with a CUDA context of its own
RUN_SETTINGS = dict(
    max_wallclock_seconds=20,
    warmup_steps=1,
    ema_decay=0.9,
    train_log_every=10,
    phased_ttt_prefix_docs=64,
    phased_ttt_num_phases=1,
)
STAGES = ("data", "train", "quantize", "eval", "ttt")
# The program's bits per byte may differ by so much from the run's. Scoring a fixed model only rounds, but an order of
# summation that changes from call to call moves what test-time training learns.
EVAL_TOLERANCE, TTT_TOLERANCE = 1e-5, 5e-5


class PartFailed(RuntimeError):
    """A part's answer is no."""


class PartSkipped(RuntimeError):
    """A part lacks what it needs."""


def check_line(results: Path = RESULTS, root: Path = ROOT) -> str:
    """Say in one line whether the newest proof in ``results`` is of the tree in ``root``."""
    proofs = []
    for path in sorted(results.glob("*/proof.json")):
        with suppress(ValueError, KeyError, TypeError):  # what cannot be read proves nothing
            proof = read(path)
            name = f"{path.parent.name}/{path.name}"
            proofs.append((proof["meta"]["date"] or "", name, proof["meta"], proof["parts"]))
    if not proofs:
        return f"no proof yet: {COMMAND} on a machine with a GPU"
    date, name, meta, parts = max(proofs, key=lambda proof: proof[:2])
    commit = (meta.get("commit") or "unknown")[:7] + ("+" if meta.get("dirty") else "")
    about = f"proof {name} of {date[:10]}, commit {commit}"
    here, proved = tree_hashes(root), meta.get("trees", {})
    if other := [tree for tree in TREES if proved.get(tree) != here[tree]]:
        differ = " and ".join(f"{tree}/ ({str(proved.get(tree))[:7]}, here {here[tree][:7]})" for tree in other)
        return f"{about}: is of another {differ}, prove this one: {COMMAND}"
    open_parts = [
        f"{part} {parts[part]['status'] if part in parts else 'not run'}"
        for part in PARTS
        if parts.get(part, {}).get("status") != "ok"
    ]
    return f"{about}: this tree" + (f", but {', '.join(open_parts)}" if open_parts else "")


@dataclass
class Proof:
    """A proof under way: what its parts need, and the file that holds what they found."""

    file: Path
    meta: dict[str, Any]
    run_dir: Path
    data_dir: Path | None = None
    settings: Sequence[str] = ()
    limit: float = SECONDS
    processes: int = 1  # of the run, one a GPU
    table: Mapping[str, Part] = field(default_factory=lambda: PARTS)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limit
        self.lock, self.running = threading.Lock(), set[subprocess.Popen]()
        self.log = self.file.with_suffix(".log")
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def continue_earlier(self) -> None:
        """Take over the parts of the file, if it is a proof of the same trees, chip and versions."""
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            earlier = read(self.file)["meta"]
            if all(earlier[key] == self.meta[key] for key in ("trees", "chip", "versions")):
                self.parts = read_entries(self.file, self.meta, "parts")
                return
        self.log.unlink(missing_ok=True)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with self.lock:
            write(self.file, self.meta, parts=self.parts)

    def prove_all(self, names: Sequence[str]) -> bool:
        """Do these parts in order, those of `BESIDE` at the same time; True if the answer of all is yes."""
        answers = []
        beside = [name for name in names if name in BESIDE]
        for name in names:
            if name not in BESIDE:
                answers.append(self.prove(name))
            elif name == beside[0]:
                with ThreadPoolExecutor(len(beside)) as threads:
                    try:
                        answers += list(threads.map(self.prove, beside))
                    except BaseException:  # threads would wait for their processes
                        for process in list(self.running):
                            _end(process)
                        raise
        return all(answers)

    def prove(self, name: str) -> bool:
        """Do one part; True if its answer is yes. Without time left, an earlier call's answer stays in the file."""
        figures: dict[str, Any] = {}
        entry: dict[str, Any] = {"status": "running", "date": _now(), "seconds": 0.0, "message": "", "figures": figures}
        begun = time.monotonic()
        if self.deadline - begun < LEAST_SECONDS:
            entry.update(status="skipped", message=f"nothing is left of the limit of {self.limit:g} s")
            self.parts.setdefault(name, entry)
            self.write()
            print(f"[{name}] skipped: {entry['message']}", flush=True)
            return False
        self.parts[name] = entry
        self.write()
        print(f"[{name}]", flush=True)
        try:
            self.table[name](self, figures)
            entry["status"] = "ok"
        except PartSkipped as reason:
            entry.update(status="skipped", message=str(reason))
        except PartFailed as reason:
            entry.update(status="failed", message=str(reason))
        except Exception as error:  # a defect of one part costs the others nothing
            entry.update(status="failed", message=f"{type(error).__name__}: {error}"[:500])
        except BaseException:
            entry.update(status="failed", message="stopped from outside")
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - begun, 2)
            self.write()
            print(f"[{name}] {entry['status']}, {entry['seconds']:.0f} s {entry['message']}".rstrip(), flush=True)
        return entry["status"] == "ok"

    def call(self, *command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
        """Run a Python command to its end and return its output, which also goes into the log.

        Raises PartFailed with the last lines where it fails, and where the limit ends first.
        """
        words = [sys.executable, *map(str, command)]
        with tempfile.TemporaryFile() as printed:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=clean_environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            late = False
            self.running.add(process)
            try:
                process.wait(max(self.deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                late = True
            finally:
                _end(process)
                self.running.discard(process)
            printed.seek(0)
            output = printed.read().decode(errors="replace")
        with self.lock, self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(['python', *words[1:]])}\n{output}")
        if late or process.returncode:
            why = f"the limit of {self.limit:g} s ended it" if late else f"exit status {process.returncode}"
            raise CallFailed(f"{why}: {_tail(output)}", output, process.returncode)
        return output


class CallFailed(PartFailed):
    """A command failed; ``status`` is -15 or -9 where the limit ended it."""

    def __init__(self, message: str, output: str, status: int) -> None:
        super().__init__(message)
        self.output, self.status = output, status


def clean_environment() -> dict[str, str]:
    """Return the environment without what would make a proof of other settings or other code."""
    names = {"PGOLF_KERNELS", "TRITON_INTERPRET", *(name.upper() for name in (*FIELDS, *ALIASES))}
    return {name: value for name, value in os.environ.items() if name not in names}


def launched(processes: int, module: str) -> list[str]:
    """Return Python's arguments that run a module, by torchrun where there are several processes."""
    several = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    return ["-m", *(several if processes > 1 else []), module]


def _end(process: subprocess.Popen) -> None:
    """Stop what is left of a command's process group: ask first, then insist."""
    for number, seconds in ((signal.SIGTERM, SECONDS_TO_STOP), (signal.SIGKILL, None)):
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(seconds)
    with suppress(ProcessLookupError, PermissionError):  # what it started and left behind
        os.killpg(process.pid, signal.SIGKILL)


def _tail(output: str) -> str:
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    return " | ".join(lines[-4:])[-600:]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def gpu_test_modules(tests: Path = ROOT / "tests") -> list[str]:
    """Find the test modules whose tests take the GPU without saying so in their names."""
    pattern = re.compile(r'^DEVICE = "cuda" if|skipif\(not torch\.cuda\.is_available', re.MULTILINE)
    return sorted(path.name for path in tests.rglob("test_*.py") if pattern.search(path.read_text(encoding="utf-8")))


def prove_tests(proof: Proof, figures: dict[str, Any]) -> None:
    """Run every test with "cuda" in its name, and all of the modules that choose the GPU themselves."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-k", " or ".join(["cuda", *gpu_test_modules()])]
    if importlib.util.find_spec("xdist"):
        at_once = min(os.cpu_count() or 1, TESTS_AT_ONCE * proof.meta.get("gpus", 1))
        command += ["-n", str(at_once), "--dist", "worksteal"]
    try:
        output = proof.call(*command, OMP_NUM_THREADS="1")
    except CallFailed as failure:
        figures.update(_test_counts(failure.output))
        raise
    figures.update(_test_counts(output))
    if not figures["passed"]:
        raise PartFailed("no test has run on a GPU")


def _test_counts(output: str) -> dict[str, Any]:
    counts = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for line in output.splitlines():
        if re.search(r"\d+ \w+.* in [\d.]+s", line):
            counts |= {name.removesuffix("s"): int(n) for n, name in re.findall(r"(\d+) (\w+)", line.split(" in ")[0])}
    failures = [line[:300] for line in output.splitlines() if re.match(r"(FAILED|ERROR) ", line)]
    return {**{name: counts[name] for name in ("passed", "failed", "skipped", "error")}, "failures": failures[:40]}


def prove_run(proof: Proof, figures: dict[str, Any]) -> None:
    """Run all stages of a short record run, from the data to the report."""
    settings = [f"{name}={value}" for name, value in RUN_SETTINGS.items()]
    settings = [f"data_dir={proof.data_dir}", *settings, *proof.settings]
    folder = RunFolder(proof.run_dir)
    options = [part for pair in settings for part in ("--set", pair)]
    (folder.path / "summary.json").unlink(missing_ok=True)  # an earlier run's figures are not this one's
    try:
        start = ("run", "--preset", "record", "--run-dir", folder.path, "--fresh", *options)
        proof.call(*launched(proof.processes, "pgolf"), *start)
        figures["rc"] = 0
    except CallFailed as failure:
        figures["rc"] = failure.status
        raise
    finally:
        figures.update(run_figures(folder.summary()))
    if missing := [stage for stage in STAGES if stage not in figures["stage_seconds"]]:
        raise PartFailed(f"the summary lacks {', '.join(missing)}")
    if not folder.report.is_file():
        raise PartFailed("there is no report.html")
    bits = figures["bits_per_byte"]
    if not all(map(math.isfinite, bits.values())) or bits["ttt"] >= bits["quantized"]:
        raise PartFailed(f"test-time training must improve on finite bits per byte: {bits}")


def run_figures(summary: dict[str, Any]) -> dict[str, Any]:
    """Pick the figures of a run's summary; stages that did not end are left out."""
    train, quantize, scored = (summary.get(stage, {}) for stage in ("train", "quantize", "eval"))
    bits = {"last_weights": train, "before": scored.get("before", {}), "quantized": scored.get("quantized", {})}
    bits["ttt"] = summary.get("ttt", {})
    stages = {stage: summary[stage] for stage in STAGES if stage in summary}
    kept = (
        "steps",
        "clock_seconds",
        "startup_seconds",
        "tokens_per_second_before_loop",
        "tokens_per_second_after_loop",
    )
    sizes = "weight_bytes", "code_bytes", "total_bytes"
    steps = (f"{step}_seconds" for step in ("hessian", "sensitivity", "prepare", "quantize", "compress"))
    return {
        "stage_seconds": {name: results.get("seconds") for name, results in stages.items()},
        "peak_memory_bytes": {n: r["peak_memory_bytes"] for n, r in stages.items() if "peak_memory_bytes" in r},
        "bits_per_byte": {name: r["bits_per_byte"] for name, r in bits.items() if "bits_per_byte" in r},
        **{name: train[name] for name in kept if name in train},
        **{name: quantize[name] for name in (*sizes, *steps) if name in quantize},
    }


def prove_program(proof: Proof, figures: dict[str, Any]) -> None:
    """Score the run's artifact with its exported program, away from this package, and compare."""
    folder = RunFolder(proof.run_dir)
    expected = run_figures(folder.summary())["bits_per_byte"]
    if not folder.program.is_file() or not {"quantized", "ttt"} <= expected.keys():
        raise PartSkipped("there is no whole run in --run-dir: prove the part run first")
    config = folder.config()
    with tempfile.TemporaryDirectory() as name:
        alone, scored, unpacked = (Path(name, part) for part in ("alone", "scored", "unpacked"))
        for path in (alone, scored, unpacked):
            path.mkdir()
        if "run" not in proof.parts:  # then the run may be of another tree
            export_program(unpacked / "again.py", config)
            if (unpacked / "again.py").read_bytes() != folder.program.read_bytes():
                raise PartFailed("the program in --run-dir is not of this tree")
        shutil.copy(folder.program, alone)
        for path in (folder.config_file, folder.artifact(config), folder.ema):  # eval scores the average, too
            shutil.copy(path, scored)
        for stage, key, tolerance in (("eval", "quantized", EVAL_TOLERANCE), ("ttt", "ttt", TTT_TOLERANCE)):
            options = (stage, "--run-dir", scored, "--set", "artifact_dir=")
            proof.call(folder.program.name, *options, cwd=alone, TMPDIR=str(unpacked))
            got = run_figures(RunFolder(scored).summary())["bits_per_byte"][key]
            difference = got - expected[key]
            figures[stage] = {"bits_per_byte": got, "difference": difference, "tolerance": tolerance}
            if not abs(difference) <= tolerance:
                raise PartFailed(f"{stage}: the program has {got:.6f} bits per byte, the run {expected[key]:.6f}")


def prove_audit(proof: Proof, figures: dict[str, Any]) -> None:
    """Audit the run on a sample."""
    folder = RunFolder(proof.run_dir)
    if not folder.config_file.is_file() or not folder.artifact(folder.config()).is_file():
        raise PartSkipped("there is no artifact in --run-dir: prove the part run first")
    file = folder.path / "audit.json"
    file.unlink(missing_ok=True)
    try:
        proof.call("-m", "pgolf", "audit", "--run-dir", folder.path)
    except PartFailed as failure:
        raise PartFailed("; ".join(_audited(file, figures)) or str(failure)) from failure
    _audited(file, figures)


def _audited(file: Path, figures: dict[str, Any]) -> list[str]:
    """Count an audit's findings into ``figures``, and name what did not pass; return what failed."""
    findings = read_json(file)["findings"] if file.is_file() else []
    figures.update(Counter(finding["verdict"] for finding in findings))
    told = [(f["verdict"], f"{f['check']}, {f['subject']}: {f['evidence']}") for f in findings]
    figures["failed_checks"] = [text for verdict, text in told if verdict == "failed"]
    figures["other_checks"] = [f"{verdict}: {text}" for verdict, text in told if verdict not in ("passed", "failed")]
    return figures["failed_checks"]


def prove_train_step(proof: Proof, figures: dict[str, Any]) -> None:
    """Measure a training step of the record in both loop states."""
    found = measured(proof, "bench.train_step", "--provider", "pgolf", "--repeats", "4")
    left_out = ("kernels", "case", "provider")
    for row in found["rows"]:
        figures[row["case"]] = {name: value for name, value in row.items() if name not in left_out}
    require(found, set(figures) >= {"before_loop", "after_loop"})


def prove_test_time_training(proof: Proof, figures: dict[str, Any]) -> None:
    """Measure test-time training by document length, with the run's artifact where there is one."""
    folder, options = RunFolder(proof.run_dir), []
    if folder.config_file.is_file() and folder.artifact(folder.config()).is_file():
        options = ["--run-dir", folder.path]
    found = measured(proof, "bench.test_time_training", *options)
    figures.update(mix=found.get("mix"), rows=found["rows"], meta=found.get("meta", {}))
    figures["meta"] = {name: figures["meta"].get(name) for name in ("ceilings", "weights", "tokens")}
    require(found, found.get("mix") is not None)


def measured(proof: Proof, module: str, *options: str | Path, processes: int = 1) -> dict[str, Any]:
    """Run a benchmark and read what it wrote, also where it failed: then with the failure."""
    with tempfile.TemporaryDirectory() as name:
        file, failure = Path(name, "results.json"), None
        try:
            proof.call(*launched(processes, module), "--results", file, *options)
        except PartFailed as reason:
            failure = reason
        found = read(file) if file.is_file() else {"rows": []}
        return {**found, "failure": failure}


def require(found: dict[str, Any], whole: bool) -> None:
    """Raise the failure that `measured` found, or PartFailed unless ``whole``."""
    if found["failure"]:
        raise found["failure"]
    if not whole:
        raise PartFailed("the benchmark ended without all of its results")


Part = Callable[[Proof, dict[str, Any]], None]
PARTS: dict[str, Part] = {
    "run": prove_run,
    "tests": prove_tests,
    "program": prove_program,
    "audit": prove_audit,
    "train_step": prove_train_step,
    "test_time_training": prove_test_time_training,
}
BESIDE = ("tests", "program", "audit")


def describe_machine(bench: str, commit: str = "", processes: int = 1) -> tuple[str, dict[str, Any]] | None:
    """Return the chip's short name and the proof's ``meta``; None without a GPU."""
    import torch  # here, so that --check does not wait for it

    if not torch.cuda.is_available():
        return None
    from bench.timing import chip_name, default_device

    meta = describe(bench, default_device(), commit, processes)
    dirty = None if commit else meta["commit"].endswith("+")
    meta |= {"commit": meta["commit"].rstrip("+"), "dirty": dirty, "gpus": torch.cuda.device_count()}
    return chip_name(default_device()), meta


def parse_options(
    parser: argparse.ArgumentParser, parts: Mapping[str, Part], results: str, run_dir: str, argv: list[str] | None
) -> argparse.Namespace:
    """Add the options of a proof that has these parts, and parse the command line."""

    def names(text: str) -> list[str]:
        given = [part.strip() for part in text.split(",") if part.strip()]
        if unknown := [name for name in given if name not in parts]:
            raise argparse.ArgumentTypeError(f"there is no part {', '.join(unknown)}; parts: {', '.join(parts)}")
        if not given:
            raise argparse.ArgumentTypeError(f"name at least one part of {', '.join(parts)}")
        return [name for name in parts if name in given]

    folder = ROOT / "runs" / run_dir
    parser.add_argument("--data-dir", type=Path, help="folder with datasets/ and tokenizers/, for what trains")
    parser.add_argument("--run-dir", type=Path, default=folder, help=f"folder of runs (runs/{run_dir})")
    parser.add_argument("--parts", type=names, default=list(parts), help=f"default: {','.join(parts)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts (default: {SECONDS:g})")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="of the run")
    add_options(parser, f"{results}.json", "; the log lies beside it")
    return parser.parse_args(argv)


def prove_parts(
    arguments: argparse.Namespace, parts: Mapping[str, Part], bench: str, results: str, processes: int = 1
) -> int:
    """Prove the chosen parts of ``bench`` into the chip's file ``results``.

    Returns 0 where all are ok, 1 where one is not, 2 without a GPU.
    """
    machine = describe_machine(bench, arguments.commit, processes)
    if machine is None:
        print(f"bench.{bench}: torch finds no GPU here, and this is about GPUs", file=sys.stderr)
        return 2
    chip, meta = machine
    proof = Proof(
        (arguments.results or results_path(chip, results, processes)).resolve(),
        meta,
        arguments.run_dir.resolve(),
        arguments.data_dir and arguments.data_dir.resolve(),
        arguments.settings,
        arguments.seconds,
        processes,
        parts,
    )
    proof.continue_earlier()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    proved = proof.prove_all(arguments.parts)
    print(proof.file)
    return 0 if proved else 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 where all parts are ok, 1 where one is not, 2 for what cannot be proved here."""
    parser = argparse.ArgumentParser("python -m bench.prove", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the newest proof is of this tree")
    arguments = parse_options(parser, PARTS, "proof", "proof", argv)
    if arguments.check:
        print(check_line())
        return 0
    if "run" in arguments.parts and arguments.data_dir is None:
        parser.error("the part run needs --data-dir")
    return prove_parts(arguments, PARTS, "prove", "proof")


if __name__ == "__main__":
    sys.exit(main())
