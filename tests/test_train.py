"""Training: the same bytes twice and after an interruption, the same losses on any number of processes."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import gradient_errors, moved_weights, results_files
from pgolf.common.folder import RunFolder
from pgolf.common.progress import TrainingProgress
from pgolf.common.runtime import Interrupted, World, describe_environment, seed_everything, start_world
from pgolf.common.tensors import TensorFileError, load_tensors
from pgolf.config import RunConfig
from pgolf.data.dataset import build_dataset
from pgolf.data.loader import Batch, DocumentPackingLoader
from pgolf.data.shards import tokenizer_path
from pgolf.data.tokenizer import train_tokenizer
from pgolf.model.gpt import GPT
from pgolf.model.weights import load_weights
from pgolf.training import train as training
from pgolf.training.optim import ModelOptimizer
from pgolf.training.train import train
from tests.corpus import embedded_documents
from tests.processes import run_processes

CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny model on a little real text, scheduled by step so that nothing depends on the clock."""
    folder = tmp_path_factory.mktemp("data")
    documents = [document[:2000] for document in embedded_documents()[:60]]
    train_tokenizer(documents, 400, tokenizer_path(folder, 400))
    build_dataset(documents, tokenizer_path(folder, 400), folder, val_docs=8)
    return RunConfig.preset("demo").replace(
        data_dir=str(folder),
        device="cpu",
        vocab_size=400,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=4,
        num_layers=5,  # banks that neither 2 nor 4 processes share evenly
        loop_start=1,
        loop_end=2,
        parallel_start_layer=3,
        gate_attn_width=8,
        smear_gate_width=4,
        train_batch_tokens=1024,
        micro_batch_tokens=256,
        train_seq_len=64,
        eval_seq_len=64,
        val_batch_tokens=4096,
        max_wallclock_seconds=0,
        iterations=6,
        ema_decay=0.75,
    )


def trained(config: RunConfig, path: Path, resume: bool = False, world: World = CPU) -> dict[str, torch.Tensor]:
    folder = RunFolder(path)
    if world.is_main and not resume:
        folder.create(config, describe_environment(world))
    world.barrier()
    seed_everything(config.seed)
    train(config, folder, world, resume)
    return load_weights(folder.ema)


def losses(path: Path) -> list[float]:
    entries = [json.loads(line) for line in RunFolder(path).metrics.read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == list(range(1, 7))
    return [entry["loss"] for entry in entries if entry["kind"] == "train"]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="session")
def uninterrupted(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("uninterrupted")
    return path, trained(config, path)


def test_training_learns_and_records(uninterrupted, config: RunConfig) -> None:
    path, weights = uninterrupted
    curve = losses(path)
    assert curve[0] == pytest.approx(5.9915, abs=0.01) and curve[-1] < curve[0]
    summary = RunFolder(path).summary()["train"]
    assert summary["steps"] == 6 and summary["tokens_per_second_after_loop"] > 0
    assert summary["bits_per_byte"] > 0 and weights["qo_bank"].dtype == torch.float32


def test_steps_follow_the_schedule_and_the_average_follows_the_weights(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each step the rate, Muon's momentum, the loop and every micro-batch; then `ema.pt`, from the weights alone."""
    steps, batches, averages = [], [], {}
    step, next_batch = ModelOptimizer.step, DocumentPackingLoader.next_batch

    def recorded(self: ModelOptimizer, lr_scale: float, momentum: float, *rest) -> torch.Tensor:
        (model,) = models
        steps.append((lr_scale, momentum, model.looping_active, len(batches)))
        if not averages:
            averages.update({name: value.detach().double() for name, value in model.named_parameters()})
        norm = step(self, lr_scale, momentum, *rest)
        for name, value in model.named_parameters():
            averages[name].mul_(0.75).add_(value.detach().double(), alpha=0.25)
        return norm

    def counted(self: DocumentPackingLoader) -> Batch:
        batches.append(next_batch(self))
        return batches[-1]

    models = []
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *args: models.append(build(*args)) or models[-1])
    monkeypatch.setattr(ModelOptimizer, "step", recorded)
    monkeypatch.setattr(DocumentPackingLoader, "next_batch", counted)
    weights = trained(config, tmp_path)
    # Fractions 0, 1/6 ... 5/6: the rate falls from 1/4 on, the loop starts at 0.35, momentum rises over 100 steps.
    assert [lr for lr, *_ in steps] == pytest.approx([1, 1, 8 / 9, 2 / 3, 4 / 9, 2 / 9], rel=1e-6)
    assert [each[1] for each in steps] == pytest.approx([0.92 + 0.05 * n / 100 for n in range(6)], rel=1e-9)
    assert [each[2:] for each in steps] == [(n >= 3, 4 * (n + 1)) for n in range(6)]
    assert len({tuple(batch.input_ids.flatten().tolist()) for batch in batches}) == 24
    for name, value in weights.items():
        assert (value - averages[name]).abs().max() < 1e-6, name  # float32: weights up to 5, six roundings
    assert_same(weights, uninterrupted[1])


def test_same_seed_same_bytes(uninterrupted, config: RunConfig, tmp_path: Path) -> None:
    assert_same(trained(config, tmp_path), uninterrupted[1])


def test_warm_up_leaves_no_trace(uninterrupted, config: RunConfig, tmp_path: Path) -> None:
    assert_same(trained(config.replace(warmup_steps=2), tmp_path), uninterrupted[1])


@pytest.mark.parametrize("stop_after", [1, 4])
def test_resuming_gives_the_same_bytes(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    show = TrainingProgress.step

    def step_then_terminate(self: TrainingProgress, step: int, *arguments) -> None:
        show(self, step, *arguments)
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingProgress, "step", step_then_terminate)
    with pytest.raises(Interrupted, match="--resume"):
        trained(config, tmp_path)
    monkeypatch.undo()
    assert not RunFolder(tmp_path).ema.exists()
    assert_same(trained(config, tmp_path, resume=True), uninterrupted[1])
    assert losses(tmp_path) == losses(uninterrupted[0])


def test_checkpoints_of_other_settings_or_cut_short_are_errors(config: RunConfig, tmp_path: Path) -> None:
    trained(config.replace(checkpoint_minutes=1000), tmp_path)
    with pytest.raises(TensorFileError, match="matrix_lr 0.026 → 0.5"):
        trained(config.replace(matrix_lr=0.5), tmp_path, resume=True)
    checkpoint = RunFolder(tmp_path).checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(TensorFileError, match="cannot be read"):
        trained(config, tmp_path, resume=True)


def _train_in_group(
    config: RunConfig, path: Path, rank: int, size: int, resume: bool = False
) -> dict[str, torch.Tensor]:
    return trained(config, path, resume, start_world(config))


def test_several_processes_give_the_same_losses(uninterrupted, config: RunConfig, tmp_path: Path) -> None:
    """Up to the order of float32 sums: losses within 1e-4 over six steps at full learning rate."""
    weights = run_processes(partial(_train_in_group, config, tmp_path), 4, tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted[0]), abs=1e-4)
    for other in weights[1:]:
        assert_same(other, weights[0])


def test_two_processes_go_on_from_the_checkpoint_of_one(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingProgress, "step", lambda self, step, *_: step == 3 and os.kill(os.getpid(), 15))
    with pytest.raises(Interrupted):
        trained(config, tmp_path)
    monkeypatch.undo()
    run_processes(partial(_train_in_group, config, tmp_path, resume=True), 2, tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted[0]), abs=1e-4)


LEVERS = dict(
    train_seq_schedule="16@0.5,64@1", wd_taper_final_mult=0.5, wd_taper_start_frac=0.5, swa_blend=0.25, swa_interval=1
)


def test_segments_grow_decay_falls_and_snapshots_are_blended(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = config.replace(**LEVERS, swa_window_frac=0.5)
    decays, longest, weights = [], [], []
    step, next_batch = ModelOptimizer.step, DocumentPackingLoader.next_batch

    def recorded(self: ModelOptimizer, *arguments) -> torch.Tensor:
        norm = step(self, *arguments)
        decays.append([group["weight_decay"] for group in (*self.muon.param_groups, *self.adamw.param_groups)])
        weights.append({name: parameter.detach().clone() for parameter, name in self.names.items()})
        averages.append({name: average.clone() for name, average in arguments[2].items()})
        return norm

    def counted(self: DocumentPackingLoader) -> Batch:
        batch = next_batch(self)
        longest.append(int(batch.cu_seqlens.diff().max()))
        assert batch.max_seqlen == 64
        return batch

    averages: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(ModelOptimizer, "step", recorded)
    monkeypatch.setattr(DocumentPackingLoader, "next_batch", counted)
    found = trained(changed, tmp_path / "whole")
    monkeypatch.undo()
    assert longest == [16] * 12 + [64] * 12
    scales = [1, 1, 1, 1, 1 - 0.5 / 3, 1 - 0.5 * 2 / 3]
    muon, embedding, small = (list(group) for group in zip(*decays, strict=True))
    assert muon == pytest.approx([config.muon_wd * scale for scale in scales])
    assert small == pytest.approx([config.adam_wd * scale for scale in scales])
    assert embedding == [config.embed_wd] * 6
    for name, average in averages[-1].items():
        mean = torch.stack([each[name].double() for each in weights[3:]]).mean(0)
        torch.testing.assert_close(found[name].double(), 0.75 * average.double() + 0.25 * mean, rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(TrainingProgress, "step", lambda self, step, *_: step == 4 and os.kill(os.getpid(), 15))
    with pytest.raises(Interrupted):
        trained(changed, tmp_path / "stopped")
    monkeypatch.undo()
    assert_same(trained(changed, tmp_path / "stopped", resume=True), found)
    assert_same(trained(changed, tmp_path / "stopped", resume=True), found)  # from the end: they are blended once


TUNED = dict(average_tuning=0.34, average_tuning_lr=0.01)  # 4 steps of training, and 2 of tuning


def test_the_average_s_small_tensors_are_tuned(config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    """At a rate of 0 nothing moves; else matrices stay, and each step is AdamW's at a rate that falls to 0."""
    config = config.replace(swa_blend=0.25, swa_window_frac=1.0, swa_interval=2)  # blended before, and once
    still = trained(config.replace(**TUNED | dict(average_tuning_lr=0.0)), tmp_path / "still")
    tuned = trained(config.replace(**TUNED), tmp_path / "tuned")
    entries = [json.loads(line) for line in RunFolder(tmp_path / "tuned").metrics.read_text().splitlines()]
    scales = [entry["lr_scale"] for entry in entries if entry["kind"] == "train" and entry["muon_momentum"] == 0]
    assert scales == pytest.approx([(1 - 4 / 6) / 0.34, (1 - 5 / 6) / 0.34])
    for name, value in still.items():
        moved = (tuned[name] - value).abs().max()
        if name.endswith(("_bank", "tok_emb.weight")):
            assert moved == 0, name
        elif name != "smear_gate.weight" and "resid_mix" not in name:
            assert 0 < moved <= 0.01 * sum(scales) * 1.05, name  # AdamW's steps are at most the rate
    assert losses(tmp_path / "tuned")[:5] == losses(tmp_path / "still")[:5]
    show = TrainingProgress.step

    def step_then_terminate(self: TrainingProgress, step: int, *arguments) -> None:
        show(self, step, *arguments)
        if step == 4:  # the next step, the first of tuning, is undone
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingProgress, "step", step_then_terminate)
    with pytest.raises(Interrupted, match="after step 4; go on with --resume"):
        trained(config.replace(**TUNED), tmp_path / "stopped")
    monkeypatch.undo()
    assert_same(trained(config.replace(**TUNED), tmp_path / "stopped", resume=True), tuned)
    assert_same(trained(config.replace(**TUNED), tmp_path / "stopped", resume=True), tuned)  # from the end
    assert losses(tmp_path / "stopped") == losses(tmp_path / "tuned")


def test_processes_tune_alike(config: RunConfig, tmp_path: Path) -> None:
    alone = trained(config.replace(**TUNED), tmp_path / "alone")
    group = run_processes(partial(_train_in_group, config.replace(**TUNED), tmp_path / "group"), 2, tmp_path)
    assert_same(*group)
    assert losses(tmp_path / "group") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    for name, value in alone.items():
        assert torch.allclose(group[0][name], value, atol=2e-3), name


NEWTON = dict(newton_muon=True, newton_muon_every=2, newton_muon_decay=0.5)


def test_newton_muon_learns_and_resumes_to_the_same_bytes(
    uninterrupted, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after a step whose next one measures nothing, and after one whose next one does."""
    on = config.replace(**NEWTON)
    whole = trained(on, tmp_path / "whole")
    curve = losses(tmp_path / "whole")
    assert curve[-1] < curve[0] == losses(uninterrupted[0])[0] and curve != losses(uninterrupted[0])
    assert_same(trained(on.replace(warmup_steps=2), tmp_path / "warm"), whole)
    for stop in (3, 4):
        monkeypatch.setattr(TrainingProgress, "step", lambda self, n, *_, s=stop: n == s and os.kill(os.getpid(), 15))
        with pytest.raises(Interrupted):
            trained(on, tmp_path / f"{stop}")
        monkeypatch.undo()
        assert_same(trained(on, tmp_path / f"{stop}", resume=True), whole)
        assert losses(tmp_path / f"{stop}") == curve


def test_newton_muon_on_two_processes_and_from_the_checkpoint_of_one(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = config.replace(**NEWTON)
    trained(on, tmp_path / "alone")
    group = run_processes(partial(_train_in_group, on, tmp_path / "group"), 2, tmp_path)
    assert_same(*group)
    assert losses(tmp_path / "group") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    monkeypatch.setattr(TrainingProgress, "step", lambda self, step, *_: step == 3 and os.kill(os.getpid(), 15))
    with pytest.raises(Interrupted):
        trained(on, tmp_path / "stopped")
    monkeypatch.undo()
    run_processes(partial(_train_in_group, on, tmp_path / "stopped", resume=True), 2, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


def test_moved_weights(config: RunConfig, tmp_path: Path) -> None:
    """A run goes on from weights that are at most a unit of bfloat16 away from its seed's."""
    folder = RunFolder(tmp_path)
    folder.create(config, describe_environment(CPU))
    assert moved_weights.main([str(tmp_path), "5"]) == 0
    assert moved_weights.main([str(tmp_path), "5"]) == 2  # which has weights now
    seed_everything(config.seed)
    fresh, payload = GPT(config).state_dict(), load_tensors(folder.checkpoint)
    before, after = (
        torch.cat([weights[name].float().flatten() for name in fresh]) for weights in (fresh, payload["model"])
    )
    units = (after.view(torch.int32) >> 16) - (before.view(torch.int32) >> 16)
    assert units.unique().tolist() == [-1, 0, 1] and not after[before == 0].any()
    assert 0.45 < float((units[before != 0] != 0).double().mean()) < 0.55
    assert all(torch.equal(payload["ema"][name], value.float()) for name, value in payload["model"].items())
    trained(config, tmp_path, resume=True)
    moved = losses(tmp_path)
    trained(config, tmp_path / "not_moved")
    difference = torch.tensor(moved) - torch.tensor(losses(tmp_path / "not_moved"))
    assert difference.any() and difference.abs().max() < 0.05


def test_gradient_errors(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In bfloat16 gradients are near the float32 model's, and every bank has its line in both loop states."""
    trained(config.replace(iterations=1, compute_dtype="bfloat16", ema_decay=0.0), tmp_path)
    file = tmp_path / "errors.json"
    results = gradient_errors.main([str(tmp_path), "--batches", "2", "--results", str(file)])
    written = results_files.read(file)
    assert written["after_loop"]["kernels"]["kv_bank"] == list(results["after_loop"]["kernels"]["kv_bank"])
    assert written["meta"]["bench"] == "gradient_errors" and written["batches"] == 2
    for ways in results.values():
        assert ways["kernels"] == ways["references"]  # on a CPU
        for group in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "tok_emb"):
            assert 1e-4 < ways["kernels"][group][0] < 0.1
    assert list(results) == ["before_loop", "after_loop"] and "kv_bank" in capsys.readouterr().out
