"""The schedule's formulas."""

from __future__ import annotations

import time

import pytest

from pgolf.config import ConfigError, RunConfig
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

RECORD = RunConfig.preset("record")
BY_STEP = RECORD.replace(max_wallclock_seconds=0, iterations=160)


def test_fraction_is_of_the_clock_less_the_reserve_or_of_the_steps() -> None:
    assert training_fraction(RECORD, 7, 298.0) == pytest.approx(0.5)
    assert training_fraction(BY_STEP, 56, 1e9) == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("fraction", "scale"), [(0, 1), (0.2499, 1), (0.25, 1), (0.625, 0.5), (0.925, 0.1), (0.97, 0.1), (1.2, 0.1)]
)
def test_learning_rate_falls_to_its_floor(fraction: float, scale: float) -> None:
    assert learning_rate_scale(RECORD, fraction) == pytest.approx(scale)


def test_learning_rate_without_floor_or_warmdown() -> None:
    assert learning_rate_scale(RECORD.replace(min_lr=0), 1.0) == 0
    assert learning_rate_scale(RECORD.replace(warmdown_frac=0), 1.0) == 1


def test_momentum_rises() -> None:
    assert [muon_momentum(RECORD, step) for step in (0, 750, 1500, 9000)] == pytest.approx([0.92, 0.945, 0.97, 0.97])
    assert muon_momentum(RECORD.replace(muon_momentum_warmup_steps=0), 0) == 0.97


def test_loop_starts_and_training_ends() -> None:
    assert not looping_starts(BY_STEP, 55 / 160) and looping_starts(BY_STEP, 56 / 160)
    assert not looping_starts(BY_STEP.replace(num_loops=0), 0.9)
    assert is_over(RECORD, 5, 596.0) and not is_over(RECORD, 5, 595.9) and is_over(RECORD, 20_000, 1.0)
    assert is_over(BY_STEP, 160, 0.0) and not is_over(BY_STEP, 159, 1e9)


def test_weight_decay_falls_at_the_end() -> None:
    tapered = RECORD.replace(wd_taper_final_mult=0.5)
    scales = [weight_decay_scale(tapered, fraction) for fraction in (0.0, 0.7, 0.85, 1.0, 1.1)]
    assert scales == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    assert weight_decay_scale(RECORD, 0.99) == weight_decay_scale(tapered.replace(wd_taper_start_frac=1), 1.1) == 1


def test_segments_grow_with_training() -> None:
    grown = RECORD.replace(train_seq_len=3072, train_seq_schedule="1024@0.100, 2048@0.700, 3072@1.000")
    lengths = [longest_segment(grown, fraction) for fraction in (0.0, 0.0999, 0.1, 0.6999, 0.7, 1.0, 1.2)]
    assert lengths == [1024, 1024, 2048, 2048, 3072, 3072, 3072]
    assert longest_segment(RECORD, 0.5) == 2048


@pytest.mark.parametrize("text", ["1024", "1024@x,2048@1", "1024@0.5,2048@0.5", "1024@0.5", "3072@1", "1@0.5,2048@1"])
def test_schedules_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="like 1024@0.1,2048@1, and"):
        RECORD.replace(train_seq_schedule=text)


def test_snapshots_are_taken_at_the_end() -> None:
    blended = RECORD.replace(swa_blend=0.5)
    steps = (100, 0.9499, 0), (99, 0.96, 0), (99, 0.96, 1), (100, 0.96, 1)
    taken = [step for step in steps if takes_snapshot(blended, *step)]
    assert taken == [(99, 0.96, 0), (100, 0.96, 1)] and not takes_snapshot(RECORD, 100, 0.96, 0)


def test_tuning_takes_the_end_of_the_clock() -> None:
    tuned = RECORD.replace(average_tuning=0.01)
    assert training_fraction(tuned, 5, 0.99 * 596.0) == pytest.approx(1.0)
    assert not is_over(tuned, 5, 595.9) and is_over(tuned, 5, 596.0)
    scales = [tuning_rate_scale(tuned, 5, elapsed) for elapsed in (0.99 * 596.0, 0.995 * 596.0, 596.0, 599.0)]
    assert scales == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-9)


def test_clock_counts_only_while_it_runs() -> None:
    clock = Clock(100.0)
    assert clock.elapsed() == 100.0
    clock.start()
    time.sleep(0.01)
    clock.stop()
    stopped = clock.elapsed()
    assert stopped > 100.0
    time.sleep(0.01)
    assert clock.elapsed() == stopped


def test_micro_batches_are_dealt_evenly_or_not_at_all() -> None:
    assert [RECORD.gradient_accumulation(size) for size in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="cannot be dealt evenly to 3"):
        RECORD.gradient_accumulation(3)
