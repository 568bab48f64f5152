"""The folder of a run, in which each stage finds the results of the stages before it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgolf.common.files import FileError, read_json, remove_leftovers, write_aside
from pgolf.config import ConfigError, RunConfig

IMPORTED = time.monotonic()


class RunFolderError(FileError):
    """A run's folder lacks a file that a stage needs, or holds a run that the stage would overwrite."""


class RunFolder:
    """Gives the paths of a run's files, and reads and writes the small ones.

    config.json         settings
    environment.json    versions, chip, commit
    metrics.jsonl       one JSON object for each training step and each validation
    summary.json        results of each stage
    train_state.pt      training checkpoint
    ema.pt              final weights: the moving average
    sensitivities.pt    what rounding costs, row by row: quantizer=trellis spent its bytes by them
    model.pgolf         artifact (model.int6.ptz with quantizer=gptq)
    train_gpt.py        program that is submitted with the artifact
    tokenizer.model     copy of the tokenizer
    report.html         report
    audit.json          findings of the audit; audit.html shows them, ledger-*.jsonl.gz are its ledgers
    """

    recorded = 0.0  # age of this process when it last recorded a stage

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.checkpoint = self.path / "train_state.pt"
        self.ema = self.path / "ema.pt"
        self.sensitivities = self.path / "sensitivities.pt"
        self.program = self.path / "train_gpt.py"
        self.tokenizer = self.path / "tokenizer.model"
        self.report = self.path / "report.html"
        self._unwritten: list[str] = []  # lines of metrics.jsonl that could not be written yet

    def artifact(self, config: RunConfig) -> Path:
        """Return the artifact's path: in ``artifact_dir`` if that is set, else in the run's folder."""
        name = "model.pgolf" if config.quantizer == "trellis" else "model.int6.ptz"
        return Path(config.artifact_dir or self.path) / name

    def files(self) -> list[Path]:
        """Return the paths of all of a run's files; config.json, which marks the folder as a run's, comes first."""
        small = [self.config_file, self.environment, self.metrics, self.summary_file, self.tokenizer, self.report]
        return [
            *small,
            self.checkpoint,
            self.ema,
            self.sensitivities,
            self.program,
            self.path / "model.pgolf",
            self.path / "model.int6.ptz",
            self.path / "audit.json",
            self.path / "audit.html",
            *self.path.glob("ledger-*.jsonl.gz"),
        ]

    def clear(self) -> None:
        """Delete the files of an earlier run, and no others."""
        for path in self.files():
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, lock it against other processes, and remove temporary files that killed processes left.

        The operating system releases the lock when the process ends. Raises RunFolderError, naming the process that
        holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ".lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200) or "another process"
                raise RunFolderError(f"{self.path} is in use by {holder}: wait, or take another folder") from None
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise RunFolderError(f"another process has just changed {self.path}; try again")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            for other in self.files():
                remove_leftovers(other)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def create(self, config: RunConfig, environment: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        """Create the folder; write the environment, the summary's entry ``run`` and, last, the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_aside(self.environment, json.dumps(environment, indent=1))
        if about is not None:
            self.record("run", about)
        write_aside(self.config_file, config.to_json())

    def config(self) -> RunConfig:
        """Read the settings that the run was started with. Raises FileError if there are none or they are damaged."""
        if not self.config_file.exists():
            raise RunFolderError(f"{self.path} holds no run (no config.json); start one with `pgolf run`")
        try:
            return RunConfig().replace(**read_json(self.config_file))
        except ConfigError as error:
            raise RunFolderError(f"{self.config_file} is damaged: {error}") from error

    def need(self, path: Path, stage: str) -> Path:
        """Return ``path`` if it exists. Raises RunFolderError, naming the stage that writes it, otherwise."""
        if not path.exists():
            raise RunFolderError(f"{path} is not there yet; run `pgolf {stage} --run-dir {self.path}` first")
        return path

    def summary(self) -> dict[str, Any]:
        """Read the results of the stages that have finished, by stage."""
        summary = read_json(self.summary_file) if self.summary_file.exists() else {}
        for stage, results in summary.items():
            if not isinstance(results, dict):
                raise RunFolderError(f"{self.summary_file} is damaged: its entry {stage!r} is no JSON object")
        return summary

    def checked_files(self) -> dict[str, Any]:
        """Return the record of each data file that the stage ``data`` left in the summary; empty before that stage."""
        files = self.summary().get("data", {}).get("files")
        return files if isinstance(files, dict) else {}

    def record(self, stage: str, results: dict[str, Any]) -> None:
        """Write a stage's results into the summary.

        Results with ``seconds``, those of the stage's own clock, also get ``process_seconds``: until now from the end
        of the stage that this process recorded before, or from the start of this process if there is none.
        Raises RunFolderError for a number that is not finite.
        """
        if "seconds" in results:
            age = process_age()
            results = {"process_seconds": age - RunFolder.recorded, **results}
            RunFolder.recorded = age
        try:
            text = json.dumps({**self.summary(), stage: results}, indent=1, allow_nan=False)
        except ValueError as error:
            raise RunFolderError(f"the stage {stage} has a result that is no finite number: {results}") from error
        write_aside(self.summary_file, text)

    def log_metrics(self, entries: list[dict[str, Any]]) -> None:
        """Append entries to metrics.jsonl, one line each.

        Raises FileError if they cannot be written; they are then kept and written by the next call.
        """
        self._unwritten += [json.dumps(entry, allow_nan=False) + "\n" for entry in entries]
        try:
            with self.metrics.open("ab", buffering=0) as file:
                size, data = file.tell(), "".join(self._unwritten).encode()
                if (written := file.write(data)) < len(data):
                    file.truncate(size)
                    raise OSError(f"only {written} of {len(data)} bytes fit")
        except OSError as error:
            raise FileError(f"{self.metrics} cannot be written: {error.strerror or error}") from error
        self._unwritten.clear()

    def cut_metrics(self, last_step: int) -> list[dict[str, Any]]:
        """Remove the lines that a run resumed after step ``last_step`` will write again, and an incomplete last line.

        The resumed run repeats the validation at ``last_step`` and all later steps. Returns the entries that remain.
        Raises RunFolderError, naming the line, for a damaged one.
        """
        entries = []
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if entry["step"] < last_step or (entry["step"] == last_step and entry["kind"] == "train"):
                    entries.append(entry)
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines) or line.endswith(b"\n"):
                    raise RunFolderError(
                        f"{self.metrics}, line {number}, is damaged: {line[:80]!r}; mend or delete it"
                    ) from error
        write_aside(self.metrics, "".join(json.dumps(entry) + "\n" for entry in entries))
        return entries


def process_age() -> float:
    """Return the seconds since this process started; where the system does not tell, since this module's import."""
    since_import = time.monotonic() - IMPORTED
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return since_import
    return max(age, since_import)
