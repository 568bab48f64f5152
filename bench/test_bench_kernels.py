"""The kernel benchmarks by pytest-benchmark: ``pytest bench/ --benchmark-only``; on a CPU small, as a smoke test.

pytest-benchmark times calls from the outside, with waiting for the GPU. The times that count, by events with the L2
cache flushed, are in each benchmark's ``extra_info``.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import pytest
import torch

from bench.__main__ import BENCHES
from bench.harness import OURS, REFERENCE, as_tensors, check, limits, measure, require
from bench.timing import default_device, measure_ceilings

DEVICE = default_device()
SMALL = DEVICE.type != "cuda"
CASES = [(bench, name) for bench, builders in BENCHES.items() for name in builders]
ceilings = cache(measure_ceilings)


@pytest.mark.parametrize("provider", [OURS, REFERENCE])
@pytest.mark.parametrize(("bench", "name"), CASES)
def test_speed(benchmark, bench: str, name: str, provider: str) -> None:
    torch.manual_seed(0)
    case = BENCHES[bench][name](DEVICE, SMALL)
    exact = as_tensors(case.exact())
    function = case.providers[provider]()
    reference_errors = check(REFERENCE, case.providers[REFERENCE](), exact)
    require(check(provider, function, exact), limits(provider, reference_errors))
    if not SMALL:
        rows, _ = measure(bench, name, case, ceilings(DEVICE), DEVICE, providers=[provider])
        benchmark.extra_info.update(asdict(rows[0]))

    def call() -> None:
        function()
        if not SMALL:
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=3 if SMALL else 50, warmup_rounds=1 if SMALL else 5)
