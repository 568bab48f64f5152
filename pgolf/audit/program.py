"""The conditions of what is shipped: its bytes, and that the program scores alone in a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pgolf.artifact.container import CAP_BYTES
from pgolf.audit import watch
from pgolf.audit.checks import FAILED, NOT_CHECKED, PASSED, Finding
from pgolf.common.progress import format_duration

SHOWN = 4  # of the files, processes and connections that a program should not have
STAGES = ("data", "train", "quantize", "eval", "ttt")  # those that record their time
LIMIT_SECONDS = 600.0  # of training, and of evaluation, on 8 H100s
SYSTEM = ("/proc", "/sys", "/dev", "/run", "/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin")
# What compiling kernels and describing a machine start: part of the machine, not of a submission.
COMPILERS = {"gcc", "g++", "cc", "c++", "clang", "ld", "objdump", "ptxas", "cuobjdump", "nvdisasm"}
TOOLS = COMPILERS | {"ldconfig", "lscpu", "nvidia-smi", "git", "uname", "file"}
KEPT = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "OMP_NUM_THREADS", "LANG")
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]


class Contained(NamedTuple):
    """What a program did that ran alone in a folder."""

    status: int
    errors: str  # the end of what it wrote to stderr
    read: list[str]  # of the files that were in the folder before
    files: list[str]  # outside the folder, the machine and Python
    processes: list[str]  # other than Python and TOOLS
    connections: list[str]
    network: bool  # whether it could have reached a network
    seconds: float  # from the start of its process


def sizes(files: Collection[Path], cap: int = CAP_BYTES) -> Finding:
    """Sum the bytes of the shipped files as they lie on the disk, and hold them against the cap."""
    found = {path.name: path.stat().st_size for path in files}
    total = sum(found.values())
    parts = ", ".join(f"{name} {size:,}" for name, size in found.items())
    verdict = PASSED if total <= cap else FAILED
    return Finding("sizes", "budget", "shipped files", verdict, f"{total:,} of {cap:,} bytes: {parts}")


def run_contained(program: Path, arguments: Sequence[str], folder: Path, threads: int | None = None) -> Contained:
    """Run a Python program in ``folder``, without this package, and where Linux allows it without any network.

    The program's home and temporary directory are in the folder.

    Args:
        threads: of its OpenMP; None: as many as it likes.
    """
    log = folder / ".watched"
    for name in ("home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    given = {str(path.resolve()) for path in folder.rglob("*")}
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    prefix = NAMESPACE if _namespaces() else []
    begun = time.perf_counter()
    done = subprocess.run(
        [*prefix, sys.executable, watch.__file__, str(log), str(program), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    events = {"open": set[str](), "process": set[str](), "connection": set[str]()}
    for line in log.read_text().splitlines() if log.exists() else ():
        kind, detail = json.loads(line)
        events[kind].add(detail)
    root, package = str(folder.resolve()), str(Path(watch.__file__).parents[1])
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), *_site_packages()}
    opened = {path for path in events["open"] if path != watch.__file__}
    # The installed package is among Python's, and must not help the program.
    foreign = {path for path in opened if _below(path, [package]) or not _below(path, (root, *SYSTEM, *python))}
    started = {
        name for name in events["process"] if not _below(name, python) and Path(name.split()[0]).name not in TOOLS
    }
    return Contained(
        done.returncode,
        done.stderr[-2000:].strip(),
        sorted(os.path.relpath(path, root) for path in opened & given),
        sorted(foreign),
        sorted(started),
        sorted(events["connection"]),
        not prefix,
        seconds,
    )


def contained(run: Contained, subject: str = "the program") -> list[Finding]:
    """Judge a run: the program scores alone, opens nothing from outside, starts nothing and connects to nothing."""

    def finding(check: str, verdict: str, evidence: str) -> Finding:
        return Finding(check, "self-containment", subject, verdict, evidence)

    took = format_duration(run.seconds)
    findings = [finding("runs alone", PASSED, f"scores in an empty folder, {took} from the start of its process")]
    if run.status:
        last = run.errors.splitlines()[-1] if run.errors else "it says nothing"
        findings = [finding("runs alone", FAILED, f"ends with status {run.status}: {last}")]
    own = ", ".join(run.read)
    for check, found, what in (
        (
            "files",
            run.files,
            f"reads {own}, and opens otherwise only Python and the machine's libraries (as Python announces)",
        ),
        ("processes", run.processes, "starts no program but compilers"),
    ):
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        findings.append(finding(check, FAILED if found else PASSED, ", ".join(found[:SHOWN]) + more if found else what))
    if run.connections:
        findings.append(finding("network", FAILED, f"connects to {', '.join(run.connections[:SHOWN])}"))
    elif run.network:
        evidence = "it announces no connection, but namespaces are not allowed here, so that it had the network"
        findings.append(finding("network", NOT_CHECKED, evidence))
    else:
        findings.append(finding("network", PASSED, "runs in a namespace without a network"))
    return findings


def wall_time(summary: Mapping[str, Any], environment: Mapping[str, Any]) -> Finding:
    """Hold what counts of a run's time against the two limits, if it ran on 8 H100s.

    Of training the clock counts, and all reading of training data after it, for calibration and sensitivities. Of
    evaluation all of the stage that scores counts: from the start of its process, or from the end of the stage before
    it in the same process, with imports, the check of the data and what it compiles. Rounding, packing and diagnostic
    evaluations do not count.

    Args:
        summary, environment: of the run's folder.
    """
    train, quantize, ttt = (summary.get(stage, {}) for stage in ("train", "quantize", "ttt"))
    training = [train.get("clock_seconds"), quantize.get("hessian_seconds"), quantize.get("sensitivity_seconds", 0.0)]
    whole = {name: seconds for name in STAGES if (seconds := _whole_seconds(summary.get(name, {}))) is not None}
    listed = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in whole.items())
    unknown = [name for name in whole if "process_seconds" not in summary[name]]
    if unknown:
        listed += f", and before {', '.join(unknown)} a start that the run did not record"

    def finding(verdict: str, evidence: str) -> Finding:
        evidence += f"; whole stages from the start of the process on: {listed}" if listed else ""
        return Finding("wall time", "budget", "the run", verdict, evidence)

    if None in training or "ttt" not in whole:
        return finding(NOT_CHECKED, "training, quantisation and test-time training have not all run")
    counted = {"training with all reading of training data": sum(training), "test-time training": whole["ttt"]}
    against = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in counted.items())
    evidence = f"against {LIMIT_SECONDS:.0f} s each count {against}"
    chip, devices = environment.get("chip"), environment.get("devices")
    if "H100" not in str(chip) or devices != 8:
        return finding(NOT_CHECKED, f"the limits are for 8 H100s, and this ran on {devices} × {chip}; {evidence}")
    if max(counted.values()) > LIMIT_SECONDS:
        return finding(FAILED, evidence)
    return finding(NOT_CHECKED if "ttt" in unknown else PASSED, evidence)


def _whole_seconds(results: Mapping[str, Any]) -> float | None:
    """Return a stage's seconds from the start of its process, in older runs those of the stage's own clock."""
    return results.get("process_seconds", results.get("seconds"))


def _namespaces() -> bool:
    """Return whether this user may start a process in a namespace without a network."""
    if shutil.which(NAMESPACE[0]) is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


def _site_packages() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _below(path: str, folders: Collection[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)
