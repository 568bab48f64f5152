"""The stage ``train``: warm up, start the clock, step until it runs out, write the moving average of the weights.

With ``average_tuning`` the last part of the clock tunes the average's small tensors (`pgolf.training.tuning`).
"""

from __future__ import annotations

import copy
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pgolf.common.files import FileError
from pgolf.common.folder import RunFolder
from pgolf.common.progress import TrainingProgress
from pgolf.common.runtime import Interrupted, World, on_terminate, peak_memory_bytes, reset_peak_memory
from pgolf.common.tensors import diverged
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter
from pgolf.data.loader import Batch, DocumentPackingLoader
from pgolf.data.shards import shard_files
from pgolf.data.validation import validation_data
from pgolf.kernels.common.compiling import compiling_ahead
from pgolf.model.build import build_model
from pgolf.model.graphs import uses_graphs
from pgolf.model.weights import save_weights
from pgolf.scoring.evaluate import evaluate_packed
from pgolf.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from pgolf.training.gradient import MeanGradient
from pgolf.training.optim import ModelOptimizer
from pgolf.training.schedule import (
    Clock,
    is_over,
    learning_rate_scale,
    longest_segment,
    looping_starts,
    muon_momentum,
    takes_snapshot,
    training_fraction,
    tuning_rate_scale,
    weight_decay_scale,
)
from pgolf.training.tuning import AverageTuning

DATA_ERROR = 255  # a reason to stop, beside the numbers of signals


def train(config: RunConfig, folder: RunFolder, world: World, resume: bool = False) -> None:
    """Train, from the start or with ``resume`` from the folder's checkpoint, and write ``ema.pt``.

    Raises Interrupted after a signal and FileError for data that cannot be read, both after writing a checkpoint.
    Raises DivergedError, without a checkpoint, for a loss, gradient norm or weight that is not finite.
    """
    begun = time.perf_counter()
    reset_peak_memory(world.device)
    validation = validation_data(config)
    state = start(config, world)
    trainer = _Trainer(config, folder, world, state, validation)
    if world.share(resume and folder.checkpoint.exists()):
        load_checkpoint(folder.checkpoint, state, config, world)
        world.log(f"going on from step {state.step}")
    if world.is_main:
        trainer.remember(folder.cut_metrics(state.step))
    if config.warmup_steps > 0 and not training_is_over(config, state):
        trainer.warm_up()
    startup = time.perf_counter() - begun
    try:
        signals: list[int] = []
        with on_terminate(signals.append):
            trainer.run(signals)
    finally:
        state.loader.close()
    if world.is_main:
        folder.log_metrics([])  # write lines that the disk had no room for
        folder.record("train", trainer.results(startup, time.perf_counter() - begun))
        if config.checkpoint_minutes == 0:
            folder.checkpoint.unlink(missing_ok=True)
    world.barrier()


def training_is_over(config: RunConfig, state: TrainingState) -> bool:
    """Return whether the state is at the end of training, as one loaded from a checkpoint of the end is."""
    return is_over(config, state.step, state.clock.elapsed())


def final_weights(state: TrainingState) -> dict[str, torch.Tensor]:
    """Return the averaged weights in float32 on the CPU, rounded to the dtypes of the master weights."""
    return {name: state.ema[name].to(value.dtype).float().cpu() for name, value in state.model.state_dict().items()}


def start(config: RunConfig, world: World) -> TrainingState:
    """Return the state before the first step: new weights, optimizer and average, and the start of the data."""
    model = build_model(config, world)
    optimizer = ModelOptimizer(model, config, world.size)
    ema = {name: value.detach().float().clone() for name, value in model.state_dict().items()}
    return TrainingState(model, optimizer, ema, _training_loader(config, world), Clock())


def _training_loader(config: RunConfig, world: World) -> DocumentPackingLoader:
    return DocumentPackingLoader(
        shard_files(config.data_dir, config.vocab_size, "train"),
        micro_batch_tokens=config.micro_batch_tokens,
        max_segment=max(length for length, _ in config.segments_by_fraction()),
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        vocab_size=config.vocab_size,
    )


class _Trainer:
    """The loop and what it measures."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        world: World,
        state: TrainingState,
        validation: tuple[torch.Tensor, ByteCounter],
    ) -> None:
        self.config, self.folder, self.world, self.state = config, folder, world, state
        self.validation_data = validation
        count = config.gradient_accumulation(world.size)
        self.gradient = MeanGradient(state.model, count, graphs=uses_graphs(config, state.model))
        self.progress = TrainingProgress(config.train_log_every) if world.is_main else None
        self.step_seconds: dict[bool, list[float]] = {False: [], True: []}
        self.waiting: list[tuple[dict[str, Any], torch.Tensor, Any]] = []  # steps launched, but not logged
        self.last_mark: Any = None  # the end of the last logged step
        # Python runs one step ahead of a GPU, which then never waits for it. A CPU finishes a step before it returns.
        self.steps_behind = 1 if world.device.type == "cuda" else 0
        self.validation: dict[str, float] = {}
        self.last_loss: float | None = None
        self.tuning: AverageTuning | None = None  # from when it begins
        self.complained = False  # whether it has warned that the metrics cannot be written

    def remember(self, entries: list[dict[str, Any]]) -> None:
        """Add the metrics of the steps before a checkpoint to the statistics. Raises FileError for damaged ones."""
        for entry in entries:
            try:
                if entry["kind"] == "train":
                    seconds = self.config.train_batch_tokens / entry["tokens_per_second"]
                    self.step_seconds[entry["looping"]].append(seconds)
                    self.last_loss = entry["loss"]
            except (KeyError, TypeError, ZeroDivisionError) as error:
                raise FileError(f"{self.folder.metrics} is damaged in step {entry['step']}: {error!r}") from error

    def run(self, signals: list[int]) -> None:
        """Step until the schedule ends, then write the average and validate.

        With the clock stopped, also validates and writes checkpoints at the intervals of the settings, and writes one
        before it stops for a signal or for data that cannot be read.

        Args:
            signals: signals that have arrived; a handler appends to it.
        """
        config, state, world = self.config, self.state, self.world
        saved_at = time.monotonic()
        state.model.train()
        self._start_clock()
        while True:
            self._wait(self.steps_behind)
            failure = state.loader.failure(self.gradient.count)
            elapsed, stop = world.agree(state.clock.elapsed(), DATA_ERROR if failure else max(signals, default=0))
            self._log_finished(elapsed, self.steps_behind)
            over = is_over(config, state.step, elapsed)
            if over:
                self._off_the_clock(self._finish)
            if over or (config.val_loss_every and state.step and state.step % config.val_loss_every == 0):
                self._off_the_clock(self._validate)
            if over:
                return
            if stop:
                self._off_the_clock(self._save_for_later)
                self._stop(stop, failure)
            if config.average_tuning and training_fraction(config, state.step, elapsed) >= 1:
                self._tuning_step(elapsed)
                continue
            if config.checkpoint_minutes > 0:
                _, due = world.agree(0.0, time.monotonic() - saved_at > 60 * config.checkpoint_minutes)
                if due:
                    self._off_the_clock(self._save_if_possible)
                    saved_at = time.monotonic()
            self._scheduled_step(elapsed)

    def _stop(self, reason: int, failure: BaseException | None) -> None:
        """Raise the error that ends the run early; the checkpoint has been written."""
        after = f"after step {self.state.step}; go on with --resume"
        if reason != DATA_ERROR:
            raise Interrupted(f"stopped by {signal.Signals(reason).name} {after}", reason)
        if failure is None or isinstance(failure, FileError | OSError):
            raise FileError(f"{failure or 'another process cannot read the data'}: stopped {after}") from failure
        raise failure

    def _scheduled_step(self, elapsed: float) -> None:
        config, state = self.config, self.state
        fraction = training_fraction(config, state.step, elapsed)
        if looping_starts(config, fraction) and not state.model.looping_active:
            state.model.looping_active = True
            if self.progress:
                self.progress.message(f"the loop starts at step {state.step + 1}")
        state.loader.limit_segments(longest_segment(config, fraction))
        scale, momentum = learning_rate_scale(config, fraction), muon_momentum(config, state.step)
        measured = self._step(scale, momentum, state.ema, weight_decay_scale(config, fraction))
        state.step += 1
        if takes_snapshot(config, state.step, fraction, state.snapshot_count):
            self._take_snapshot()
        self._expect(measured, lr_scale=scale, muon_momentum=momentum)

    @torch.no_grad()
    def _take_snapshot(self) -> None:
        state = self.state
        for name, value in state.model.state_dict().items():
            if name in state.snapshots:
                state.snapshots[name] += value
            else:
                state.snapshots[name] = value.float().clone()
        state.snapshot_count += 1

    @torch.no_grad()
    def _blend_snapshots(self) -> None:
        """Blend the mean of the snapshots into the average: ema ← (1 - swa_blend) ema + swa_blend mean."""
        state = self.state
        for name, total in state.snapshots.items():
            state.ema[name].lerp_(total / state.snapshot_count, self.config.swa_blend)
        if self.config.swa_blend and not state.snapshot_count and self.tuning is None:
            self._say("warning: no step began in the last swa_window_frac of training: swa_blend has no snapshots")
        if state.snapshot_count:
            self._say(f"{state.snapshot_count} snapshots are blended into the average")
        state.snapshots, state.snapshot_count = {}, 0

    def _tuning_step(self, elapsed: float) -> None:
        """Launch a step of the average's tuning."""
        config, state = self.config, self.state
        if self.tuning is None:
            self._blend_snapshots()
            self.tuning = AverageTuning(state, config, self.world.size)
            if self.progress:
                self.progress.message(f"the average is tuned from step {state.step + 1} on")
        scale = tuning_rate_scale(config, state.step, elapsed)
        loss = self.gradient(state.loader.next_batch() for _ in range(self.gradient.count))
        norm = self.tuning.step(scale)
        measured = self._start_copy(torch.stack([self.world.mean(loss), norm]))
        state.step += 1
        self._expect(measured, lr_scale=scale, muon_momentum=0.0)

    def _expect(self, measured: torch.Tensor, **scales: float) -> None:
        """Remember a launched step, to be logged when the device has finished it."""
        entry = {
            "kind": "train",
            "step": self.state.step,
            **scales,
            "tokens": self.state.step * self.config.train_batch_tokens,
            "looping": self.state.model.looping_active,
        }
        self.waiting.append((entry, measured, self._mark()))

    def _step(
        self,
        lr_scale: float,
        momentum: float,
        averages: dict[str, torch.Tensor] | None = None,
        weight_decay_scale: float = 1.0,
    ) -> torch.Tensor:
        """Launch one optimizer step, which also updates the averages; return a tensor (mean loss, gradient norm)."""
        state, config = self.state, self.config
        batches: Iterable[Batch] = (state.loader.next_batch() for _ in range(self.gradient.count))
        if config.newton_muon and state.step % config.newton_muon_every == 0:
            batches = list(batches)
            state.optimizer.observe_inputs(state.model, batches)
        loss = self.gradient(batches)
        norm = state.optimizer.step(lr_scale, momentum, averages, config.ema_decay, weight_decay_scale)
        return self._start_copy(torch.stack([self.world.mean(loss), norm]))

    def _start_copy(self, measured: torch.Tensor) -> torch.Tensor:
        """Start to copy a tensor to the CPU; the copy is complete when the device has finished the step."""
        if measured.device.type != "cuda":
            return measured
        return torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True).copy_(measured, non_blocking=True)

    def _wait(self, steps_behind: int) -> None:
        """Wait until the device is at most ``steps_behind`` steps behind, so that the clock covers finished steps."""
        for _, _, mark in self.waiting[: len(self.waiting) - steps_behind]:
            if not isinstance(mark, float):
                mark.synchronize()

    def _log_finished(self, elapsed: float, steps_behind: int) -> None:
        """Log all but the last ``steps_behind`` steps; the device has finished these."""
        entries: list[dict[str, Any]] = []
        while len(self.waiting) > steps_behind:
            entry, measured, mark = self.waiting.pop(0)
            loss, norm = measured.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._write_metrics(entries)
                raise diverged(f"step {entry['step']} has the loss {loss} and the gradient norm {norm}")
            self.last_loss = loss
            seconds = max(self._seconds_since_last(mark), 1e-9)
            self.step_seconds[entry["looping"]].append(seconds)
            speed = self.config.train_batch_tokens / seconds
            entry |= {"loss": loss, "grad_norm": norm, "elapsed_seconds": elapsed, "tokens_per_second": speed}
            entries.append(entry)
        self._write_metrics(entries)
        if self.progress and entries:
            self.progress.step(entries[-1]["step"], loss, speed, *self._time_left(elapsed))

    def _write_metrics(self, entries: list[dict[str, Any]]) -> None:
        """Append to the metrics; if they cannot be written, warn once and keep the lines for the next call."""
        if not self.world.is_main or not entries:
            return
        try:
            self.folder.log_metrics(entries)
        except FileError as error:
            if not self.complained:
                self._say(f"warning: {error}; training goes on")
            self.complained = True

    def _time_left(self, elapsed: float) -> tuple[float, int | None]:
        config, step = self.config, self.state.step
        if config.max_wallclock_seconds > 0:
            return config.max_wallclock_seconds - config.gptq_reserve_seconds - elapsed, None
        recent = [*self.step_seconds[False], *self.step_seconds[True]][-20:]
        return statistics.median(recent) * (config.iterations - step), config.iterations

    def _off_the_clock(self, action: Callable[[], None]) -> None:
        """Call ``action`` with the clock stopped and all steps finished and logged."""
        self._wait(steps_behind=0)
        self.state.clock.stop()
        self._log_finished(self.state.clock.elapsed(), steps_behind=0)
        action()
        self._start_clock()

    def _finish(self) -> None:
        """Write the average, and a checkpoint of the end, after which --resume only validates."""
        if self.tuning is not None:
            self.tuning.end()
        self._blend_snapshots()
        weights = final_weights(self.state) if self.world.is_main else None
        save_weights(self.folder.ema, weights, self.state.step, self.world)
        self._save_if_possible(shown=self.config.checkpoint_minutes > 0)

    def _start_clock(self) -> None:
        self.state.clock.start()
        self.last_mark = self._mark()

    def _mark(self) -> Any:
        """Mark the present point of the device's work: by an event on a GPU, by the time on a CPU."""
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_since_last(self, mark: Any) -> float:
        """Return the device's seconds between the last mark and this one, which becomes the last."""
        before, self.last_mark = self.last_mark, mark
        return (mark - before) if isinstance(mark, float) else before.elapsed_time(mark) / 1000

    def _save_for_later(self) -> None:
        """Write a checkpoint in the middle of training; tuning, which takes seconds, begins again then."""
        if self.tuning is not None:
            self.tuning.undo()
        self._save()

    def _save(self, shown: bool = True) -> None:
        save_checkpoint(self.folder.checkpoint, self.state, self.config, self.world)
        if shown:
            self._say(f"checkpoint at step {self.state.step}")

    def _save_if_possible(self, shown: bool = True) -> None:
        try:
            self._save(shown)
        except FileError as error:
            self._say(f"warning: no checkpoint at step {self.state.step}: {error}; training goes on")

    def _validate(self) -> None:
        config, world = self.config, self.world
        tokens, table = self.validation_data
        loss, bits = evaluate_packed(self.state.model, config, tokens, table, rank=world.rank, world_size=world.size)
        self.state.model.train()
        if not math.isfinite(loss):
            raise diverged(f"the validation loss after step {self.state.step} is {loss}")
        self.validation = {"val_loss": loss, "bits_per_byte": bits}
        if world.is_main:
            step = self.state.step
            self._write_metrics([{"kind": "val", "step": step, "loss": loss, "bits_per_byte": bits}])
            self._say(f"validation at step {step}: loss {loss:.4f}, {bits:.5f} bits per byte")

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.message(text)

    def warm_up(self) -> None:
        """Run steps in both loop states on the run's data, then restore the state."""
        state, world = self.state, self.world
        weights = {name: value.cpu().clone() for name, value in state.model.state_dict().items()}
        optimizer, loop_state = copy.deepcopy(state.optimizer.state_dict()), state.model.looping_active
        loader, state.loader = state.loader, _training_loader(self.config, world)
        loop_states = (False, True) if self.config.num_loops > 0 else (False,)
        if world.device.type == "cuda":
            with compiling_ahead(), self.gradient.without_graphs():
                for state.model.looping_active in loop_states:
                    self._step(1.0, muon_momentum(self.config, 0))
        for state.model.looping_active in loop_states:
            for step in range(self.config.warmup_steps):
                self._step(1.0, muon_momentum(self.config, step))
        state.loader.close()
        state.loader, state.model.looping_active = loader, loop_state
        state.model.load_state_dict(weights)
        state.optimizer.zero_grad()
        state.optimizer.load_state_dict(optimizer)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        self._say(f"warmed up with {self.config.warmup_steps} steps in each loop state, and undid them")

    def results(self, startup: float, seconds: float) -> dict[str, Any]:
        """Return the results of training for the summary."""
        speeds = {
            name: self.config.train_batch_tokens / statistics.median(self.step_seconds[looping])
            for name, looping in (("tokens_per_second_before_loop", False), ("tokens_per_second_after_loop", True))
            if self.step_seconds[looping]
        }
        return {
            "steps": self.state.step,
            "seconds": seconds,
            "clock_seconds": self.state.clock.elapsed(),
            "startup_seconds": startup,
            **({} if self.last_loss is None else {"final_loss": self.last_loss}),
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
            **speeds,
            **self.validation,
        }
