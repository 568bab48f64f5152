"""The folder of a run: where each stage finds what the ones before it left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pgolf.config import RunConfig


class RunFolderError(RuntimeError):
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

    def artifact(self, config: RunConfig) -> Path:
        """The quantised model's file: in ``artifact_dir`` where that is set."""
        return Path(config.artifact_dir or self.path) / "model.int6.ptz"

    def create(self, config: RunConfig, environment: dict[str, Any]) -> None:
        """Make the folder and write the settings and the environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_aside(self.config_file, config.to_json())
        write_aside(self.environment, json.dumps(environment, indent=1))

    def config(self) -> RunConfig:
        """The settings the run was started with. Raises RunFolderError where there is no run."""
        if not self.config_file.exists():
            raise RunFolderError(f"{self.path} holds no run (no config.json); start one with `pgolf run`")
        return RunConfig.from_json(self.config_file.read_text())

    def need(self, path: Path, stage: str) -> Path:
        """``path``, or a RunFolderError that names the stage which makes it."""
        if not path.exists():
            raise RunFolderError(f"{path} is not there yet; run `pgolf {stage} --run-dir {self.path}` first")
        return path

    def summary(self) -> dict[str, Any]:
        """Results so far, by stage."""
        return json.loads(self.summary_file.read_text()) if self.summary_file.exists() else {}

    def record(self, stage: str, results: dict[str, Any]) -> None:
        """Put a stage's results into the summary."""
        write_aside(self.summary_file, json.dumps({**self.summary(), stage: results}, indent=1))

    def log_metrics(self, entries: list[dict[str, Any]]) -> None:
        """Append lines to the metrics."""
        with self.metrics.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def cut_metrics(self, last_step: int) -> None:
        """Forget metrics after ``last_step``, and a line that was not written to its end: a resumed run writes them."""
        kept = []
        if self.metrics.exists():
            for line in self.metrics.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break
                if entry["step"] <= last_step:
                    kept.append(line + "\n")
        write_aside(self.metrics, "".join(kept))


def write_aside(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)
