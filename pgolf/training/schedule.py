"""The progress of training, and the learning rate, momentum and loop state that follow from it."""

from __future__ import annotations

import time

from pgolf.config import RunConfig


class Clock:
    """Counts the seconds of training; it is stopped for work that does not count, such as validation."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self._before = elapsed
        self._started: float | None = None

    def start(self) -> None:
        """Start or continue counting."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop counting."""
        self._before, self._started = self.elapsed(), None

    def elapsed(self) -> float:
        """Return the seconds counted so far."""
        return self._before + (time.perf_counter() - self._started if self._started is not None else 0.0)


def run_fraction(config: RunConfig, step: int, elapsed: float) -> float:
    """Return the fraction of training, its tuning included, that is done before ``step``.

    It is elapsed / (max_wallclock_seconds - gptq_reserve_seconds), or without a clock step / iterations.
    """
    if config.max_wallclock_seconds > 0:
        return elapsed / (config.max_wallclock_seconds - config.gptq_reserve_seconds)
    return step / config.iterations


def training_fraction(config: RunConfig, step: int, elapsed: float) -> float:
    """Return the fraction of the training before the tuning of the average; 1 or more: that is over."""
    return run_fraction(config, step, elapsed) / (1 - config.average_tuning)


def tuning_rate_scale(config: RunConfig, step: int, elapsed: float) -> float:
    """Return the scale of the rate at which the average is tuned: from 1 linearly to 0."""
    return min(max((1 - run_fraction(config, step, elapsed)) / config.average_tuning, 0.0), 1.0)


def is_over(config: RunConfig, step: int, elapsed: float) -> bool:
    """Return whether training ends before ``step``, because the steps or the clock have run out."""
    out_of_time = config.max_wallclock_seconds > 0 and run_fraction(config, step, elapsed) >= 1
    return step >= config.iterations or out_of_time


def learning_rate_scale(config: RunConfig, fraction: float) -> float:
    """Return the learning rate's scale: 1, then linear to 0 over the last warmdown_frac, but at least min_lr."""
    if fraction < 1 - config.warmdown_frac or config.warmdown_frac == 0:
        return 1.0
    return max((1 - fraction) / config.warmdown_frac, config.min_lr)


def weight_decay_scale(config: RunConfig, fraction: float) -> float:
    """Return the weight decay's scale: 1 up to wd_taper_start_frac, then linear to wd_taper_final_mult at the end."""
    start, fraction = config.wd_taper_start_frac, min(fraction, 1.0)
    done = (fraction - start) / (1 - start) if fraction > start else 0.0
    return 1 + done * (config.wd_taper_final_mult - 1)


def longest_segment(config: RunConfig, fraction: float) -> int:
    """Return the longest attention segment at this fraction of training."""
    pairs = config.segments_by_fraction()
    return next((length for length, end in pairs if fraction < end), pairs[-1][0])


def takes_snapshot(config: RunConfig, step: int, fraction: float, taken: int) -> bool:
    """Return whether the weights after step number ``step``, counted from 1, are one of the snapshots for SWA.

    The first of the window always are: of a short training, none else may be. ``taken`` is the number so far.
    """
    inside = config.swa_blend > 0 and fraction >= 1 - config.swa_window_frac
    return inside and (taken == 0 or step % config.swa_interval == 0)


def muon_momentum(config: RunConfig, step: int) -> float:
    """Return Muon's momentum at a step: it rises linearly over ``muon_momentum_warmup_steps``."""
    if config.muon_momentum_warmup_steps == 0:
        return config.muon_momentum
    done = min(step / config.muon_momentum_warmup_steps, 1.0)
    return config.muon_momentum_warmup_start + done * (config.muon_momentum - config.muon_momentum_warmup_start)


def looping_starts(config: RunConfig, fraction: float) -> bool:
    """Return whether the loop runs at this fraction of training."""
    return config.num_loops > 0 and fraction >= config.enable_looping_at
