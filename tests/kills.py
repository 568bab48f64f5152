"""Runs that are killed: ``python -m tests.kills`` or ``make kills``; `test_kills.py` does a few.

A tiny run goes through all stages, from building its data to the report, with a checkpoint after every step. Its
process gets SIGKILL, ``--resume`` goes on, is killed again, and goes on to the end. What is then in the run's folder
and in its data must be what a run leaves that nobody kills: the same bytes, but for times in summary and metrics.
Kills come

    at writes    before every opening for writing, renaming, removing and making of a file or folder; where one is
                 renamed or appended to, a second time with half of it written
    at moments   of the clock

Processes are forked, so that they need not import torch again, pack a program of one module, and draw no plots.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch  # noqa: F401  imported before the forks, as all of this is

import pgolf.run  # noqa: F401
from pgolf.cli import main as pgolf_main
from pgolf.data import dataset
from pgolf.report import page, plots  # noqa: F401
from pgolf.submission import sources

SETTINGS = dict(
    data_dir="data",
    device="cpu",
    vocab_size=400,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    num_layers=2,
    loop_start=0,
    loop_end=1,
    parallel_start_layer=1,
    gate_attn_width=8,
    smear_gate_width=4,
    train_batch_tokens=256,
    micro_batch_tokens=256,
    train_seq_len=64,
    eval_seq_len=64,
    val_batch_tokens=4096,
    max_wallclock_seconds=0,
    iterations=6,
    val_loss_every=3,
    checkpoint_minutes=1e-9,
    ema_decay=0.5,
    gptq_passthrough_numel=200,
    gptq_calibration_batches=1,
    gptq_calibration_tokens=256,
    lqer_asym_group=16,
    ttt_lora_rank=2,
    ttt_eval_seq_len=64,
    ttt_batch_size=4,
    ttt_chunk_size=64,
    phased_ttt_prefix_docs=1,
    phased_ttt_num_phases=1,
    global_ttt_chunk_tokens=256,
)
COMMAND = ["run", "--preset", "demo", "--resume", "--run-dir", "run"]
COMMAND += [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
# What differs between two runs: times, speeds, and the memory of a process.
NOT_COMPARED = {"tokens_per_second", "peak_memory_bytes", "mtime_ns"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killer:
    """Counts a process's changes to files in a folder, and kills it at one of them."""

    def __init__(self, folder: Path, at: int | None = None, torn: bool = False) -> None:
        self.folder, self.at, self.torn, self.busy = str(folder), at, torn, False
        self.seen: list[tuple[str, bool]] = []  # what was changed, and whether half of that can be done

    def __call__(self, event: str, arguments: tuple) -> None:
        """Take an event of `sys.addaudithook`, which comes before what it is about."""
        if self.busy or not (event in CHANGES or (event == "open" and arguments[2] & WRITES)):
            return
        path = os.path.abspath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else ""
        if path.startswith(self.folder):
            appends = event == "open" and bool(arguments[2] & os.O_APPEND) and path.endswith(".jsonl")
            if len(self.seen) == self.at:
                self.busy = True
                if self.torn:
                    self._tear(Path(path), appends)
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.append((f"{event} {path}", appends or (event == "os.rename" and os.path.isfile(path))))

    @staticmethod
    def _tear(path: Path, appends: bool) -> None:
        if appends:
            with path.open("ab") as file:
                file.write(b'{"kind": "tra')
        else:
            os.truncate(path, path.stat().st_size // 2)


def start(folder: Path, prepare: Callable[[], object] = int, finish: Callable[[], object] = int) -> int:
    """Fork a process that runs the command in ``folder``, with a call before and one after it. Returns its id."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        os.chdir(folder)
        with open("log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["pgolf", *COMMAND]
        prepare()
        status = pgolf_main(COMMAND)
        finish()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(process: int) -> bool:
    """Wait for a process. Returns whether it came to the end; False if it was killed.

    Raises AssertionError if it failed.
    """
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a process ended with {status}"
    return status == 0


def results(folder: Path) -> dict[str, Any]:
    """What a run has left in its folder and its data: digests of the files, and what is compared of the others."""
    found: dict[str, Any] = {}
    for path in sorted(path for name in ("run", "data") for path in (folder / name).rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            found[name] = [_compared(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "summary.json":
            found[name] = _compared(json.loads(path.read_text()))
        elif path.name == "report.html":  # shows times
            found[name] = True
        elif path.name == "train_state.pt":  # has the seconds of the clock
            found[name] = {key: value for key, value in torch.load(path, weights_only=True)["loader"].items()}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _compared(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if "second" not in key and key not in NOT_COMPARED}
        # Which entries there are is compared of all.
        return {**{key: _compared(part) for key, part in kept.items()}, "keys": sorted(value)}
    return [_compared(part) for part in value] if isinstance(value, list) else value


class Kills:
    """A run that nobody kills, in ``root``, and others that are held against it."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.seed, self.kills, self.runs = root, seed, 0, 0
        documents = [text[:500] for text in list(topics.values())[:50]]
        dataset.embedded_documents, sources.package_sources = lambda: documents, lambda: {"pgolf/__init__.py": ""}
        plots.draw_plots = lambda *_: {}
        whole, counted = root / "whole", root / "writes.json"
        killer = Killer(whole)
        begun = time.monotonic()
        process = start(whole, partial(sys.addaudithook, killer), lambda: counted.write_text(json.dumps(killer.seen)))
        assert ended(process), (whole / "log").read_text()
        self.seconds = time.monotonic() - begun
        self.expected = results(whole)
        self.writes: list[tuple[str, bool]] = json.loads(counted.read_text())

    def at_writes(self) -> list[tuple[int, bool]]:
        """Every write to kill a run at, and whether half of it is done by then."""
        return [
            (at, torn) for at, (_, tears) in enumerate(self.writes) for torn in ((False, True) if tears else (False,))
        ]

    def kill_at_write(self, at: int, torn: bool) -> None:
        """Kill a run at a write, the process that goes on at another, and hold the end against the expected one."""
        other = random.Random(f"{self.seed} {at} {torn}").randrange(len(self.writes))

        def processes() -> Iterator[bool]:
            for moment in ((at, torn), (other, False), (None, False)):
                yield ended(start(folder, partial(sys.addaudithook, Killer(folder, *moment))))

        half = "half of " if torn else ""
        folder = self.root / str(self.runs)
        self._compare(folder, processes(), f"write {at} ({half}{self.writes[at][0]}) and write {other}")

    def kill_at_moments(self, number: int, most: int = 4) -> None:
        """Kill a run up to ``most`` times whenever it is, and hold the end against the expected one."""
        generator = random.Random(f"{self.seed} {number}")

        def processes() -> Iterator[bool]:
            for kill in range(most + 1):
                process = start(folder)
                if kill < most:
                    time.sleep(generator.uniform(0, self.seconds))
                    os.kill(process, signal.SIGKILL)
                yield ended(process)

        folder = self.root / str(self.runs)
        self._compare(folder, processes(), f"moments {number}")

    def _compare(self, folder: Path, processes: Iterator[bool], what: str) -> None:
        """Let processes run one after another to the end of the run. Raises AssertionError where it differs."""
        self.runs += 1
        try:
            for finished in processes:
                if finished:
                    break
                self.kills += 1
            found = results(folder)
            different = [
                name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
            ]
            assert not different, f"{', '.join(sorted(different))} differ"
        except AssertionError as error:
            raise AssertionError(f"killed at {what}, seed {self.seed}: {error}; see {folder}/log") from error
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Kill runs and print what came of it; the exit status is 1 when one was not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--writes", type=int, help="runs that are killed at writes (default: at each once)")
    parser.add_argument("--moments", type=int, default=30, help="runs that are killed at moments of the clock")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    root, failures = Path(tempfile.mkdtemp()), 0
    kills = Kills(root, arguments.seed)
    writes = kills.at_writes()
    print(f"a whole run: {kills.seconds:.1f} s, {len(kills.writes)} writes", flush=True)
    chosen = random.Random(arguments.seed).sample(writes, min(len(writes), arguments.writes or len(writes)))
    actions = [(kills.kill_at_write, moment) for moment in sorted(chosen)]
    actions += [(kills.kill_at_moments, (number,)) for number in range(arguments.moments)]
    for done, (action, moment) in enumerate(actions, 1):
        try:
            action(*moment)
        except AssertionError as error:
            failures += 1
            print(f"FAILED: {error}", flush=True)
        if done % 20 == 0 or done == len(actions):
            print(f"{done} of {len(actions)} runs, {kills.kills} kills, {failures} failed", flush=True)
    if not failures:
        shutil.rmtree(root)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
