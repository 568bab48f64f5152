"""Runs on several hosts, and runs that lose a process: ``python -m tests.nodes``. It takes some minutes.

equal      two torchruns on this host, each with its own folder, as two hosts have, give the numbers of one torchrun
           with two processes; losses of one process differ by the order of sums, and its weights are calibrated on half
               as many batches
killed     one of two processes gets SIGKILL in a stage: how long until all have ended, and what they say
stopped    the same with SIGSTOP
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.distributed import process_of_rank
from pgolf.common.folder import RunFolder
from pgolf.data.corpus import embedded_documents
from pgolf.data.dataset import build_dataset
from pgolf.data.shards import tokenizer_path
from pgolf.data.tokenizer import train_tokenizer
from tests.kills import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 10  # dist_timeout_seconds


def run(folders: list[Path], data: Path, processes: int, **changed: object) -> list[subprocess.Popen]:
    """Start a run of ``processes`` processes on each of as many torchruns as there are folders."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {**SETTINGS, "data_dir": data, "train_batch_tokens": 512, "dist_timeout_seconds": TIMEOUT, **changed}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(folders)), "--rdzv_backend", "c10d"]
    command += ["--nproc_per_node", str(processes), "--rdzv_endpoint", f"localhost:{port}", "-m", "pgolf"]
    command += ["run", "--preset", "demo", *(f"--set={name}={value}" for name, value in settings.items()), "--run-dir"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []
    for folder in folders:
        folder.mkdir(parents=True)
        with (folder / "log").open("w") as log:
            started.append(
                subprocess.Popen([*command, "run"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def numbers(folder: Path) -> dict[str, float]:
    """The numbers of a finished run."""
    summary = RunFolder(folder / "run").summary()
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {
        **{f"loss {entry['kind']} {entry['step']}": entry["loss"] for entry in map(json.loads, lines)},
        **{f"bpb {name}": summary["eval"][name]["bits_per_byte"] for name in ("before", "quantized")},
        "bpb ttt": summary["ttt"]["bits_per_byte"],
        "artifact": summary["quantize"]["weight_bytes"],
    }


def equal(root: Path, data: Path) -> bool:
    """Hold two hosts against one, and one process against both."""
    runs = {}
    for name, folders, processes in (("hosts", ["a", "b"], 1), ("host", ["one"], 2), ("process", ["single"], 1)):
        paths = [root / folder for folder in folders]
        if statuses := [status for process in run(paths, data, processes) if (status := process.wait())]:
            print(f"equal: FAILED, {name} ended with {statuses}\n" + "\n".join((p / "log").read_text() for p in paths))
            return False
        runs[name] = numbers(paths[0])
    left = sorted(path.name for path in (root / "b").iterdir())
    same = runs["hosts"] == runs["host"]
    far = {
        kind: max(abs(runs["process"][name] - value) for name, value in runs["host"].items() if name.startswith(kind))
        for kind in ("loss", "bpb before", "bpb")
    }
    shown = ", ".join(f"{kind} {value:.1e}" for kind, value in far.items())
    print(f"equal: two hosts {'like' if same else 'UNLIKE'} one; one process is away by: {shown}")
    print(f"equal: in the second host's folder: {left}")
    if not same:
        print(json.dumps(runs, indent=1))
    return same and far["loss"] < 1e-4


def lose(root: Path, data: Path, number: signal.Signals, rank: int, stage: str) -> bool:
    """Send a signal to one of two processes in a stage; whether all end, with a message."""
    folder = root / f"{number.name}-{rank}-{stage}"
    (launcher,) = run([folder], data, 2, iterations=10**6 if stage == "train" else 6)
    log = folder / "log"
    while launcher.poll() is None and f"[{stage}]" not in log.read_text():
        time.sleep(0.02)
    time.sleep(1.0 if stage == "train" else 0)
    workers = [process_of_rank(launcher.pid, of) for of in range(2)]
    os.kill(workers[rank], number)
    begun = time.monotonic()
    other = Path("/proc") / str(workers[1 - rank])
    while other.exists() and other.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    status = launcher.wait()
    text = log.read_text()
    messages = [line[:150] for line in re.findall(r"^(?:\[rank\d+\]:)?\s*(pgolf: .*)$", text, re.MULTILINE)]
    traces = text.count("Traceback (most recent call last)")
    print(
        f"{number.name} rank {rank} in {stage}: the other ended after {seconds:.1f} s, torchrun ({status}) after "
        f"{time.monotonic() - begun:.1f} s, {traces} tracebacks, says {messages}",
        flush=True,
    )
    return status != 0 and bool(messages)


def main(argv: list[str] | None = None) -> int:
    """Try it all and print what came of it; the exit status is 1 when something was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.nodes", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--parts", nargs="+", choices=("equal", "killed", "stopped"), default=("equal", "killed", "stopped")
    )
    parser.add_argument("--stages", nargs="+", default=("data", "train", "quantize", "eval", "ttt"))
    arguments = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp())
    data = root / "data"
    documents = [document[:1000] for document in embedded_documents()[:50]]
    train_tokenizer(documents, SETTINGS["vocab_size"], tokenizer_path(data, SETTINGS["vocab_size"]))
    build_dataset(documents, tokenizer_path(data, SETTINGS["vocab_size"]), data, val_docs=4)
    good = "equal" not in arguments.parts or equal(root, data)
    for part, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        if part in arguments.parts:
            for stage in arguments.stages:
                for rank in (1, 0):
                    good &= lose(root / part, data, number, rank, stage)
    print(f"logs: {root}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
