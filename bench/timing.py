"""How a function is timed, and the ceilings of the chip it runs on.

On CUDA: events around each call, the L2 cache flushed before it, so every call finds its data in memory as the first
one of a step does. The time between the events includes gaps where the CPU launches too slowly; the same function
replayed from a CUDA graph has none. On a CPU: the clock, a few calls, for smoke tests.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 << 20  # more than any L2 cache
LEAST_CALLS, MOST_CALLS = 50, 500
SECONDS = 0.25  # of timed calls, within those bounds
WARM_UP_CALLS = 5


class Timing(NamedTuple):
    """Median and quantiles of the calls, in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float


def time_calls(function: Callable[[], Any], device: torch.device, quick: bool = False) -> Timing:
    """Time ``function`` after a warm-up: at least LEAST_CALLS calls, a few if ``quick``."""
    clock = _event_times if device.type == "cuda" else _clock_times
    estimate = statistics.median(clock(function, 2 if quick else WARM_UP_CALLS))
    calls = min(max(LEAST_CALLS, int(SECONDS * 1e6 / max(estimate, 1.0))), MOST_CALLS)
    times = clock(function, 5 if quick else calls)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[-1])


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``function`` as a CUDA graph, and the tensors that a replay writes its results to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up at the first call must not be part of the graph
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def measure_ceilings(device: torch.device, quick: bool = False) -> dict[str, float]:
    """What this chip does at best: device copy, bytes read and written, and a bf16 matrix product."""
    small = quick or device.type != "cuda"
    source = torch.randn(1 << (22 if small else 29), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = time_calls(partial(target.copy_, source), device, quick)
    n = 512 if small else 8192
    a, b = source[: n * n].view(n, n), torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product = time_calls(partial(torch.matmul, a, b), device, quick)
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy.median_us / 1e3,
        "matmul_tflop_per_s": 2 * n**3 / product.median_us / 1e6,
    }


def default_device() -> torch.device:
    """The current GPU with its number, as tensors on it name it, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def chip_name(device: torch.device) -> str:
    """Return the chip's short name, as in ``kernels/tuned``; ``cpu`` for a CPU."""
    return short_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def short_name(chip: str) -> str:
    """Shorten a GPU's name: ``h100`` of NVIDIA H100 80GB HBM3."""
    words = re.split(r"[^a-z0-9]+", chip.lower())
    models = [word for word in words if re.fullmatch(r"[a-z]+\d+[a-z]*", word)]
    numbers = [word for word in words if re.fullmatch(r"\d+[a-z]*", word)]
    return (models or numbers or words)[0]


def _event_times(function: Callable[[], Any], calls: int) -> list[float]:
    cache = _flush_buffer()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        cache.zero_()  # also gives the CPU a lead
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _clock_times(function: Callable[[], Any], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        function()
        times.append((time.perf_counter() - begun) * 1e6)
    return times


@lru_cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
