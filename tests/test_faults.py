"""What goes wrong while a run trains: nothing is lost, and no number goes wrong without a word."""

# ruff: noqa: F811  the fixtures of test_train.py, which are imported and then taken as arguments

from __future__ import annotations

import errno
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgolf.common import files
from pgolf.common.files import FileError
from pgolf.common.folder import RunFolder
from pgolf.common.progress import TrainingProgress
from pgolf.common.runtime import Interrupted, start_world
from pgolf.common.tensors import DivergedError, TensorFileError, load_tensors, not_finite
from pgolf.config import RunConfig
from pgolf.data.shards import ShardError, shard_files, write_shard
from pgolf.model.weights import load_weights
from pgolf.training import train as training
from pgolf.training.train import _Trainer
from tests.processes import run_processes
from tests.test_train import assert_same, config, losses, trained, uninterrupted  # noqa: F401  fixtures


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics, which must be JSON without NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in RunFolder(path).metrics.read_text().splitlines()]


def damage_step(monkeypatch: pytest.MonkeyPatch, step: int, change) -> None:
    """Call ``change(state)`` in the backward pass of this step, before its update."""
    backward = training.MeanGradient.__call__
    done = [0]

    def damaged(self, batches):
        loss = backward(self, batches)
        done[0] += 1
        if done[0] == step:
            change(self.model)
        return loss

    monkeypatch.setattr(training.MeanGradient, "__call__", damaged)


def one_nan(model: torch.nn.Module) -> None:
    next(iter(model.parameters())).grad.view(-1)[5] = float("nan")


# --- Numbers that are not finite --------------------------------------------------------------------------------------


def test_one_nan_in_a_gradient_stops_the_run_and_the_last_checkpoint_stays(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(checkpoint_minutes=1e-9)  # one a step
    damage_step(monkeypatch, 5, one_nan)
    with pytest.raises(DivergedError, match=r"step 5 has the loss \d.* and the gradient norm nan.*learning rates"):
        trained(config, tmp_path)
    folder = RunFolder(tmp_path)
    assert [entry["step"] for entry in strict_lines(tmp_path)] == [1, 2, 3, 4]
    assert load_tensors(folder.checkpoint)["step"] == 4 and not folder.ema.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_nan_stops_a_run_of_graphs_on_cuda(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is a step behind; the checkpoint that was written before the NaN was known is of the step before it."""
    sizes = dict(model_dim=64, rope_dims=8, warmup_steps=1, iterations=12, ema_decay=0.9)
    config = config.replace(device="cuda", cuda_graphs="on", checkpoint_minutes=1e-9, **sizes)
    poisoned = []

    def poison(self, *arguments, step=training._Trainer._scheduled_step):
        if self.state.step == 4:
            poisoned.append(self.gradient)
            with torch.no_grad():
                self.state.model.skip_weights[0, 5] = float("nan")
        step(self, *arguments)

    monkeypatch.setattr(training._Trainer, "_scheduled_step", poison)
    with pytest.raises(DivergedError, match="step 5 has the loss nan and the gradient norm nan"):
        trained(config, tmp_path, world=start_world(config))
    folder = RunFolder(tmp_path)
    assert [entry["step"] for entry in strict_lines(tmp_path)] == [1, 2, 3, 4]
    assert load_tensors(folder.checkpoint)["step"] == 4 and not folder.ema.exists()
    assert len(poisoned) == 1


def test_going_on_from_that_checkpoint_gives_the_same_bytes(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_step(monkeypatch, 5, one_nan)
    with pytest.raises(DivergedError):
        trained(config.replace(checkpoint_minutes=1e-9), tmp_path)
    monkeypatch.undo()
    assert_same(trained(config, tmp_path, resume=True), uninterrupted[1])
    assert losses(tmp_path) == losses(uninterrupted[0])


@pytest.mark.parametrize("rates", [{"matrix_lr": 1e30}, {"scalar_lr": 1e30, "tied_embed_lr": 1e30}])
def test_rates_that_are_too_high(config: RunConfig, tmp_path: Path, rates: dict) -> None:
    with pytest.raises(DivergedError, match="training has diverged: "):
        trained(config.replace(checkpoint_minutes=1e-9, **rates), tmp_path)
    folder = RunFolder(tmp_path)
    strict_lines(tmp_path)
    assert not folder.ema.exists() and "train" not in folder.summary()
    if folder.checkpoint.exists():
        assert not not_finite(load_tensors(folder.checkpoint))


def test_weights_that_only_the_last_step_destroys_are_not_written(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss and norm are finite: the weights themselves are looked at before they are written."""
    step = training.ModelOptimizer.step
    calls = [0]

    def last_breaks(self, *arguments):
        norm = step(self, *arguments)
        calls[0] += 1
        if calls[0] == 6:
            with torch.no_grad():
                self.replicated[0].view(-1)[0] = float("inf")
        return norm

    monkeypatch.setattr(training.ModelOptimizer, "step", last_breaks)
    with pytest.raises(DivergedError, match="model.* not finite after step 6|validation loss after step 6"):
        trained(config, tmp_path)
    assert not RunFolder(tmp_path).checkpoint.exists()


def test_an_average_that_is_not_finite_is_not_written(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = _Trainer._finish

    def break_average(self) -> None:
        self.state.ema["tok_emb.weight"][3, 3] = float("nan")
        finish(self)

    monkeypatch.setattr(_Trainer, "_finish", break_average)
    with pytest.raises(DivergedError, match="weights.tok_emb.weight has numbers that are not finite after step 6"):
        trained(config, tmp_path)
    assert not RunFolder(tmp_path).ema.exists()


def test_results_that_are_no_numbers_are_not_recorded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.record("eval", {"loss": 1.0})
    with pytest.raises(FileError, match="stage eval has a result that is no finite number"):
        folder.record("eval", {"loss": float("nan")})
    assert folder.summary() == {"eval": {"loss": 1.0}}


# --- Work is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_leave_a_checkpoint(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = signal.Signals[name]
    monkeypatch.setattr(TrainingProgress, "step", lambda self, step, *_: step == 3 and os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"stopped by {name} after step .*--resume") as stopped:
        trained(config, tmp_path)
    assert stopped.value.status == 128 + number
    monkeypatch.undo()
    assert_same(trained(config, tmp_path, resume=True), uninterrupted[1])


def test_a_signal_that_nohup_ignores_stays_ignored(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingProgress, "step", lambda self, *_: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert_same(trained(config, tmp_path), uninterrupted[1])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def several_shards(config: RunConfig, tmp_path: Path) -> RunConfig:
    """The same data in training shards of 2,000 tokens, of which the run comes to the third in its fourth step."""
    folder = tmp_path / "data"
    (source,) = shard_files(config.data_dir, config.vocab_size, "train")
    tokens = np.fromfile(source, dtype="<u2", offset=1024)
    target = folder / "datasets" / source.parent.name
    target.mkdir(parents=True)
    for index in range(8):
        write_shard(target / f"fineweb_train_{index:06d}.bin", tokens[2000 * index : 2000 * index + 2000])
    for path in [*shard_files(config.data_dir, config.vocab_size, "val")]:
        (target / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizers").mkdir()
    (model,) = (Path(config.data_dir) / "tokenizers").iterdir()
    (folder / "tokenizers" / model.name).write_bytes(model.read_bytes())
    return config.replace(data_dir=str(folder))


@pytest.mark.parametrize("fault", ["removed", "cut", "other"])
def test_an_error_in_a_later_shard_leaves_a_checkpoint(
    several_shards: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    whole = trained(several_shards, tmp_path / "whole")
    shard = shard_files(several_shards.data_dir, several_shards.vocab_size, "train")[2]
    content, stat = shard.read_bytes(), shard.stat()
    step = _Trainer._scheduled_step

    def damage(self, elapsed: float) -> None:
        if self.state.step == 0:
            if fault == "removed":
                shard.unlink()
            else:
                shard.write_bytes(content[:-100] if fault == "cut" else content[:-2] + b"\x05\x00")
                os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        step(self, elapsed)

    monkeypatch.setattr(_Trainer, "_scheduled_step", damage)
    run = tmp_path / "run"
    with pytest.raises(FileError, match=f"{shard.name} has been changed or removed.*go on with --resume"):
        trained(several_shards, run)
    monkeypatch.undo()
    assert 1 <= load_tensors(RunFolder(run).checkpoint)["step"] < 6
    shard.write_bytes(content)
    assert_same(trained(several_shards, run, resume=True), whole)
    assert losses(run) == losses(tmp_path / "whole")


def test_a_defect_in_the_reading_thread_is_shown_as_one(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgolf.data.loader.packed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(config, tmp_path)


def test_the_average_is_written_before_the_last_validation(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_, **__) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(training, "evaluate_packed", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        trained(config, tmp_path)
    assert_same(load_weights(RunFolder(tmp_path).ema), uninterrupted[1])
    monkeypatch.undo()
    trained(config, tmp_path, resume=True)  # only validates
    assert_same_results(tmp_path, uninterrupted[0])


def assert_same_results(path: Path, expected: Path) -> None:
    """The same average, metrics and summary, times aside."""
    ours, theirs = RunFolder(path), RunFolder(expected)
    assert ours.ema.read_bytes() == theirs.ema.read_bytes()
    assert not ours.checkpoint.exists() and not theirs.checkpoint.exists()

    def without_times(entry: dict) -> dict:
        return {k: v for k, v in entry.items() if "second" not in k and k != "peak_memory_bytes"}

    assert [*map(without_times, strict_lines(path))] == [*map(without_times, strict_lines(expected))]
    ours_train, theirs_train = ours.summary()["train"], theirs.summary()["train"]
    assert ours_train.keys() == theirs_train.keys() and without_times(ours_train) == without_times(theirs_train)


@pytest.mark.parametrize("moment", ["ema.pt", "train_state.pt", "validation", "summary.json"])
def test_killed_at_the_end_it_resumes_to_the_same_results(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Just before each write of the end; what has run in the process till then is forgotten."""

    class Killed(BaseException):
        pass

    def kill(*_) -> None:
        raise Killed

    def write(path: Path, content) -> None:
        (kill if path.name == moment else files.write_aside)(path, content)

    monkeypatch.setattr("pgolf.common.tensors.write_aside", write)
    monkeypatch.setattr("pgolf.common.folder.write_aside", write)
    if moment == "validation":
        monkeypatch.setattr(_Trainer, "_validate", kill)
    with pytest.raises(Killed):
        trained(config, tmp_path)
    monkeypatch.undo()
    trained(config, tmp_path, resume=True)
    assert_same_results(tmp_path, uninterrupted[0])


@pytest.mark.parametrize("split", ["val", "train"])
def test_data_that_cannot_be_read_is_known_before_the_first_step(
    several_shards: RunConfig, tmp_path: Path, split: str
) -> None:
    shard = shard_files(several_shards.data_dir, several_shards.vocab_size, split)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match=shard.name):
        trained(several_shards, tmp_path / "run")
    assert not RunFolder(tmp_path / "run").metrics.exists()


# --- Full disks -------------------------------------------------------------------------------------------------------


def full_disk_for(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    write = files.write_aside

    def limited(path: Path, content) -> None:
        def half(file) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write(path, half if Path(path).name in names else content)

    monkeypatch.setattr("pgolf.common.tensors.write_aside", limited)


def test_a_full_disk_costs_checkpoints_but_not_the_run(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    full_disk_for(monkeypatch, "train_state.pt")
    weights = trained(config.replace(checkpoint_minutes=1e-9), tmp_path)
    assert_same(weights, uninterrupted[1])
    shown = capsys.readouterr().out
    assert "warning: no checkpoint at step 3: " in shown and "No space left on device" in shown
    assert not list(tmp_path.glob(".*")) and not RunFolder(tmp_path).checkpoint.exists()


def test_a_full_disk_at_the_end_is_a_message(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk_for(monkeypatch, "ema.pt")
    with pytest.raises(FileError, match="ema.pt cannot be written: No space left on device"):
        trained(config.replace(checkpoint_minutes=1e-9), tmp_path)
    assert load_tensors(RunFolder(tmp_path).checkpoint)["step"] == 5, "the last one before the end"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_wait_for_room(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    log = RunFolder.log_metrics

    def limited(self: RunFolder, entries: list[dict]) -> None:
        full = any(entry["step"] in (2, 3) for entry in entries)
        path, self.metrics = self.metrics, Path("/dev/full") if full else self.metrics
        try:
            log(self, entries)
        finally:
            self.metrics = path

    monkeypatch.setattr(RunFolder, "log_metrics", limited)
    trained(config, tmp_path)
    assert losses(tmp_path) == losses(uninterrupted[0])
    assert capsys.readouterr().out.count("/dev/full cannot be written") == 1


# --- Checkpoints that do not fit --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("stopped")
    trained(config.replace(checkpoint_minutes=1000, iterations=2), path)
    return load_tensors(RunFolder(path).checkpoint)


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("model", "qo_bank"), lambda t: t[:1].clone(), r"qo_bank is \[1, "),
        (("model", "qo_bank"), lambda t: t.fill_(float("nan")), "qo_bank has numbers that are not finite"),
        (("ema", "tok_emb.weight"), lambda t: t.half(), "tok_emb.weight is .* torch.float16, expected .*float32"),
        (("ema",), lambda _: {}, "belongs to another model: it lacks "),
        (("optimizer", "adamw", "state", 0, "exp_avg"), lambda t: t[1:].clone(), "exp_avg of tok_emb.weight has the"),
        (("optimizer", "muon", "state", 0, "momentum_buffer"), lambda t: t[:, 1:].clone(), "momentum_buffer of "),
        (("optimizer", "adamw", "state", 1, "exp_avg_sq"), lambda t: t * float("inf"), "exp_avg_sq has numbers"),
        (("optimizer", "adamw"), lambda _: None, "does not fit this run"),
        (("step",), lambda _: -1, "its step and seconds are -1"),
        (("elapsed",), lambda _: float("nan"), "its step and seconds are 2 and nan"),
        (("loader", "micro_batch"), lambda _: "x", "does not fit this run"),
        (("random", "torch"), lambda t: t[1:], "does not fit this run"),
        (("random",), lambda _: {}, "it has no entry 'python'"),
        (("config",), lambda _: 5, "no training checkpoint of this version"),
    ],
)
def test_checkpoints_that_do_not_fit_are_messages(
    stopped: dict, config: RunConfig, tmp_path: Path, where: tuple, value, words: str
) -> None:
    payload = inner = torch.load(_saved(stopped, tmp_path / "copy"), weights_only=True)
    *parents, last = where
    for key in parents:
        inner = inner[key]
    inner[last] = value(inner[last])
    folder = RunFolder(tmp_path)
    _saved(payload, folder.checkpoint)
    with pytest.raises(TensorFileError, match=f"train_state.pt .*{words}"):
        trained(config.replace(checkpoint_minutes=1000, iterations=2), tmp_path, resume=True)


def _saved(payload: dict, path: Path) -> Path:
    torch.save(payload, path)
    return path


@pytest.mark.parametrize(
    "content, words",
    [
        ({"weights": {"a": torch.zeros(1)}}, "belongs to another model"),
        ({"weights": 3}, "holds a int"),
        ({}, "holds a NoneType"),
        ([], "cannot be read: it holds a list"),
    ],
)
def test_averages_of_something_else_are_messages(config: RunConfig, tmp_path: Path, content, words: str) -> None:
    with pytest.raises(TensorFileError, match=f"ema.pt .*{words}"):
        load_weights(_saved(content, tmp_path / "ema.pt"), config)
    (tmp_path / "ema.pt").write_text("hello\n")
    with pytest.raises(TensorFileError, match="ema.pt cannot be read"):
        load_weights(tmp_path / "ema.pt", config)


# --- Several processes ------------------------------------------------------------------------------------------------


def _outcome(config: RunConfig, path: Path, rank: int, size: int) -> str:
    try:
        trained(config, path, world=start_world(config))
    except (FileError, DivergedError) as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def test_all_processes_stop_after_the_same_step_when_one_cannot_read(several_shards: RunConfig, tmp_path: Path) -> None:
    shard = shard_files(several_shards.data_dir, several_shards.vocab_size, "train")[2]
    tokens = np.fromfile(shard, dtype="<u2", offset=1024)
    tokens[-1] = 5000  # known when the shard is opened
    write_shard(shard, tokens)
    outcomes = run_processes(partial(_outcome, several_shards, tmp_path / "run"), 2, tmp_path)
    step = load_tensors(RunFolder(tmp_path / "run").checkpoint)["step"]
    assert 1 <= step < 6 and any(f"{shard.name} holds token 5000" in outcome for outcome in outcomes)
    assert all(f"stopped after step {step}; go on with --resume" in outcome for outcome in outcomes)


def test_all_processes_stop_when_training_diverges(config: RunConfig, tmp_path: Path) -> None:
    config = config.replace(matrix_lr=1e30, checkpoint_minutes=1e-9)
    outcomes = run_processes(partial(_outcome, config, tmp_path / "run"), 2, tmp_path)
    assert outcomes[0] == outcomes[1] and outcomes[0].startswith("DivergedError: training has diverged")
    assert not RunFolder(tmp_path / "run").ema.exists()
