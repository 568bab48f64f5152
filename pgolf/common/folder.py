"""The folder of a run: where each stage finds what the ones before it left."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgolf.common.files import FileError, read_json, remove_leftovers, write_aside
from pgolf.config import ConfigError, RunConfig


class RunFolderError(FileError):
    """A run's folder lacks something a stage needs, or holds something it would overwrite."""


class RunFolder:
    """Paths and small files of one run.

    ``config.json`` the settings; ``environment.json`` versions, chip, commit; ``metrics.jsonl`` one object a training
    step or validation; ``summary.json`` the results of every stage; ``train_state.pt`` the training checkpoint;
    ``ema.pt`` the final weights; ``model.int6.ptz`` the artifact; ``train_gpt.py`` the program that is shipped with
    it; ``tokenizer.model``; ``report.html``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.checkpoint = self.path / "train_state.pt"
        self.ema = self.path / "ema.pt"
        self.program = self.path / "train_gpt.py"
        self.tokenizer = self.path / "tokenizer.model"
        self.report = self.path / "report.html"
        self._unwritten: list[str] = []  # lines of the metrics for which the disk had no room

    def artifact(self, config: RunConfig) -> Path:
        """The quantised model's file: in ``artifact_dir`` where that is set."""
        return Path(config.artifact_dir or self.path) / "model.int6.ptz"

    def files(self) -> list[Path]:
        """The files of a run, the one that makes the folder a run's first."""
        small = [self.config_file, self.environment, self.metrics, self.summary_file, self.tokenizer, self.report]
        return [*small, self.checkpoint, self.ema, self.program, self.path / "model.int6.ptz"]

    def clear(self) -> None:
        """Delete the files of an earlier run in this folder, and nothing else."""
        for path in self.files():
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the folder, which is made, and remove what killed ones left half done.

        The lock ends with the process, however that ends. Raises RunFolderError that names the process which has it.
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
        """Make the folder and write the environment, the summary's entry ``run`` and, last, the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_aside(self.environment, json.dumps(environment, indent=1))
        if about is not None:
            self.record("run", about)
        write_aside(self.config_file, config.to_json())

    def config(self) -> RunConfig:
        """The settings the run was started with.

        Raises FileError where there is no run, or the file holds something else.
        """
        if not self.config_file.exists():
            raise RunFolderError(f"{self.path} holds no run (no config.json); start one with `pgolf run`")
        try:
            return RunConfig().replace(**read_json(self.config_file))
        except ConfigError as error:
            raise RunFolderError(f"{self.config_file} is damaged: {error}") from error

    def need(self, path: Path, stage: str) -> Path:
        """``path``, or a RunFolderError that names the stage which makes it."""
        if not path.exists():
            raise RunFolderError(f"{path} is not there yet; run `pgolf {stage} --run-dir {self.path}` first")
        return path

    def summary(self) -> dict[str, Any]:
        """Results so far, by stage."""
        summary = read_json(self.summary_file) if self.summary_file.exists() else {}
        for stage, results in summary.items():
            if not isinstance(results, dict):
                raise RunFolderError(f"{self.summary_file} is damaged: its entry {stage!r} is no JSON object")
        return summary

    def checked_files(self) -> dict[str, Any]:
        """What the stage ``data`` found of each file; empty where the summary does not tell."""
        files = self.summary().get("data", {}).get("files")
        return files if isinstance(files, dict) else {}

    def record(self, stage: str, results: dict[str, Any]) -> None:
        """Put a stage's results into the summary. Raises RunFolderError for a number that is not finite."""
        try:
            text = json.dumps({**self.summary(), stage: results}, indent=1, allow_nan=False)
        except ValueError as error:
            raise RunFolderError(f"the stage {stage} has a result that is no finite number: {results}") from error
        write_aside(self.summary_file, text)

    def log_metrics(self, entries: list[dict[str, Any]]) -> None:
        """Append lines to the metrics.

        Raises FileError where they cannot be written, and then keeps them for the next call: no line is lost or cut.
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
        """Forget what a run that goes on from ``last_step`` writes again, and a line that was not written to its end.

        Those are later steps and the validation at that step. Returns the lines that are kept. Raises RunFolderError
        naming a damaged line.
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
