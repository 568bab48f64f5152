"""The score that 8 H100s would reach, predicted: ``python -m bench.prediction``; a part of the results page.

No such machine has run this package. The prediction starts from the published runs of PR #1874 and adds what differs:
steps, by the speed measured on one GPU and two laws through published runs; the tax of quantisation, by the share of
the public rule's that was measured on the same weights; and for the preset ``frontier`` levers whose gain published
paired runs state. Every contribution is a range, and ranges add as independent errors do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.results_files import RESULTS, read_all
from bench.results_sections import (
    CASES,
    Results,
    by_provider,
    cell,
    judged_quantization,
    lookup,
    of_bench,
    parts_of,
    table,
)
from pgolf.config import PRESETS as ALL_PRESETS
from pgolf.config import RunConfig

# Of PR #1874, means of its three seeds.
PUBLIC_STEPS, PUBLIC_BPB, PUBLIC_TAX = 4954, 1.06766, 0.0096
# Bits per byte before quantisation after so many steps: #1950 seed 42, #1979 (60 minutes), #2008 (4 hours).
CURVE = (4962, 1.06445), (16_001, 1.03969), (29_888, 1.03546)
TTT_GAIN = (4962, 0.0127), (16_001, 0.0096)  # of the first two
GPUS = 8
# Guesses. Two H200s had 0.99 to 1.02 of one's speed each, with four micro-batches a step; eight have one micro-batch.
EFFICIENCY = 0.94, 0.99
PRESETS = "record", "frontier"
OTHER_PRESETS = [name for name in ALL_PRESETS if name not in PRESETS]  # the budget has their settings alone
SCORING_LIMIT = 600.0  # seconds
AROUND_SCORING = 45.0  # 20 of evaluation without test-time training, 25 of reading, compiling and capturing
SECONDS = "{:.1f} s".format


class Contribution(NamedTuple):
    """What adds to the score, in bits per byte."""

    what: str
    best: float
    worst: float
    source: str
    frontier: bool = False  # not in the preset record

    @property
    def middle(self) -> float:
        """The middle of the range, which counts."""
        return (self.best + self.worst) / 2


LEVERS = (
    Contribution("logits in float32 at test time", -0.0015, -0.0010, "#1923, #1945, 3 pairs"),
    Contribution("case coding", -0.0060, -0.0050, "#1729, #1736", True),
    Contribution(
        "operators before the space",
        -0.0015,
        -0.0003,
        "#2109's fused tokens, -8.5 % tokens, 3 pairs; here -10.8 %",
        True,
    ),
    Contribution("context of 2,560", -0.0009, -0.0002, "#1953, with no adapters on q and v", True),
    Contribution("chunks by length", -0.0003, -0.0001, "#2014, #2067", True),
    Contribution("output gate of the MLPs", -0.0010, -0.0005, "#1941, 3 pairs", True),
    Contribution("β₂, warmdown, the adapters' rank, β₂ and decay", -0.0006, -0.0001, "#1855, #1925, with clips", True),
    Contribution("weight decay that falls", -0.0006, 0.0, "#1729, #2020", True),
    Contribution("snapshots in the average", -0.0004, 0.0, "#2049", True),
    Contribution(
        "n-gram tilt, counted in the document",
        -0.0005,
        0.0,
        "#1514 in the stream; here -0.0003 and -0.0001, each ± 0.0001",
        True,
    ),
)


SCORED_LONGER = "context of 2,560", "chunks by length"  # what `frontier` spends more seconds of scoring on


def fitted() -> tuple[float, float, float]:
    """Return a, b and k of bpb = a + b steps^-k through the three points of CURVE."""
    (s1, y1), (s2, y2), (s3, y3) = CURVE

    def excess(k: float) -> float:
        return (s1**-k - s2**-k) * (y2 - y3) - (y1 - y2) * (s2**-k - s3**-k)

    low, high = 0.1, 4.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(low) * excess(middle) <= 0 else (middle, high)
    b = (y1 - y2) / (s1**-low - s2**-low)
    return y1 - b * s1**-low, b, low


def along_log(points: tuple[tuple[int, float], ...], steps: float) -> float:
    """Interpolate between the first two points, linearly in the logarithm of the steps."""
    (s1, y1), (s2, y2) = points[:2]
    return y1 + (y2 - y1) * math.log(steps / s1) / math.log(s2 / s1)


def from_steps(steps: float) -> tuple[float, float]:
    """Return what ``steps`` in place of PUBLIC_STEPS change after test-time training, by either law.

    Test-time training gains less from a better model: this is taken off both.
    """
    a, b, k = fitted()
    lost = along_log(TTT_GAIN, PUBLIC_STEPS) - along_log(TTT_GAIN, steps)
    by_power = b * (steps**-k - PUBLIC_STEPS**-k)
    return by_power + lost, along_log(CURVE, steps) - along_log(CURVE, PUBLIC_STEPS) + lost


def clock_seconds(config: RunConfig) -> float:
    """Return the seconds of the clock in which steps are made."""
    return config.max_wallclock_seconds - config.gptq_reserve_seconds


def steps_in_time(before_loop: float, after_loop: float, efficiency: float, config: RunConfig) -> float:
    """Return the steps of 8 GPUs within the clock, from one's tokens a second before and after the loop."""
    start = config.enable_looping_at
    speed = GPUS * efficiency * (start * before_loop + (1 - start) * after_loop)
    return clock_seconds(config) * speed / config.train_batch_tokens


def newest_score(results: Results) -> Mapping[str, Any] | None:
    """Return the newest results of `bench.score` in which all of PRESETS are scored to the end, or None."""
    whole = [
        found
        for found in of_bench(results, "score").values()
        if all(lookup(found, f"variants.{preset}.ttt") for preset in PRESETS)
    ]
    return max(whole, key=lambda found: found["meta"]["date"], default=None)


def relative_speeds(results: Results, preset: str) -> list[float]:
    """Return a preset's tokens a second over record's, before and after the loop, as measured side by side; else 1."""
    found = newest_score(results)
    paths = [f"train.tokens_per_second_{when}_loop" for when in ("before", "after")]
    speeds = [[lookup(found, f"variants.{each}.{path}") for path in paths] for each in (preset, PRESETS[0])]
    return [own / base if own and base else 1.0 for own, base in zip(*speeds, strict=True)]


def predict(results: Results, preset: str) -> tuple[list[Contribution], float, float]:
    """Return the contributions, the score and its error. Raises LookupError without the results that they need."""
    config = RunConfig.preset(preset)
    rows = by_provider(results["h100/train_step"]["rows"])["pgolf"]
    relative = relative_speeds(results, preset)
    speeds = [float(rows[case]["tokens_per_s"]) * own for case, own in zip(CASES, relative, strict=True)]
    most, least = (steps_in_time(*speeds, efficiency, config) for efficiency in EFFICIENCY[::-1])
    shares = {lookup(found, "weights.steps"): tax_share(found) for found in judged_quantization(results).values()}
    if not shares:
        raise LookupError("no results of bench.quantization with test-time training")
    kept = min(shares.values()), max(shares.values())
    weights = " and ".join(f"{steps:,}" for steps in sorted(shares))
    beside = "" if preset == PRESETS[0] else ", by the share of record's speed measured beside it"
    contributions = [
        Contribution("PR #1874, three seeds", PUBLIC_BPB, PUBLIC_BPB, "its logs"),
        Contribution(
            f"{least:,.0f} to {most:,.0f} steps in place of {PUBLIC_STEPS:,}",
            min(from_steps(most)),
            max(from_steps(least)),
            f"{speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s on one H100{beside}; two laws through #1950, #1979, #2008",
        ),
        Contribution(
            " to ".join(f"{share:.0%}" for share in kept) + " of the public rule's tax",
            *(-(1 - share) * PUBLIC_TAX for share in kept),
            f"both on weights of {weights} steps, which saw their data four times and more",
        ),
        *(lever for lever in LEVERS if not lever.frontier or preset == "frontier"),
    ]
    error = math.sqrt(sum(((each.worst - each.best) / 2) ** 2 for each in contributions))
    return contributions, sum(each.middle for each in contributions), error


def tax_share(found: Mapping[str, Any]) -> float:
    """Return the tax of the last way to quantise over that of the first, each at its most bytes."""
    most: dict[str, Mapping[str, Any]] = {}
    for row in found["rows"]:
        most.setdefault(row["way"], row)
    taxes = [row["tax"] for row in most.values()]
    return taxes[-1] / taxes[0]


def slope_at_the_cap(found: Mapping[str, Any]) -> float:
    """Return by how much bits per byte fall with a byte, between the two largest sizes of the last way to quantise."""
    finest, next_finest = [row for row in found["rows"] if row["way"] == found["rows"][-1]["way"]][:2]
    return (next_finest["tax"] - finest["tax"]) / (finest["bytes"] - next_finest["bytes"])


def budget(results: Results) -> str:
    """Write what the presets use of the challenge's seconds and bytes, and what one more would bring."""
    config = RunConfig.preset("record")
    rows = by_provider(results["h100/train_step"]["rows"])["pgolf"]
    steps = steps_in_time(*(float(rows[case]["tokens_per_s"]) for case in CASES), sum(EFFICIENCY) / 2, config)
    clock = clock_seconds(config)
    longer, now = (sum(from_steps(steps * seconds / clock)) / 2 for seconds in (clock + 1, clock))
    parts = next(part for found in of_bench(results, "prove").values() if (part := parts_of(found)))
    scoring = float(parts["test_time_training"]["figures"]["mix"]["full_split_seconds_on_8_gpus"])
    score = newest_score(results)

    def measured(*paths: str) -> list[float | None]:
        """Return the sum of the seconds at the paths, for each preset; None where one of them was not measured."""
        found = [[lookup(score, f"variants.{preset}.{path}") for path in paths] for preset in PRESETS]
        return [None if None in seconds else sum(seconds) for seconds in found]

    calibrated = measured("quantize.hessian_seconds", "quantize.sensitivity_seconds")
    written = measured(*(f"quantize.{part}_seconds" for part in ("export", "prepare", "quantize", "compress")))
    scored = measured("ttt.seconds")
    frontier = worth = "–"
    spare = [f"{1 - (scoring + AROUND_SCORING) / SCORING_LIMIT:.0%}", "–"]
    if scored[0] and scored[1]:
        seconds = scoring * scored[1] / scored[0]
        frontier, spare[1] = f"{seconds:.0f} s", f"{1 - (seconds + AROUND_SCORING) / SCORING_LIMIT:.0%}"
        gain = sum(lever.middle for lever in LEVERS if lever.what in SCORED_LONGER)
        worth = f"{gain / (seconds - scoring):+.1e} bpb a second, of context and chunks together"
    slopes = sorted(slope_at_the_cap(found) for found in judged_quantization(results).values())
    configs = [RunConfig.preset(name) for name in (*PRESETS, *OTHER_PRESETS)]
    clocks = [f"{clock_seconds(config):.0f} s" for config in configs]
    others = ["–"] * len(OTHER_PRESETS)
    calibrating, writing = ([cell(seconds, SECONDS) for seconds in each] for each in (calibrated, written))
    return table(
        ["", "of", *PRESETS, *OTHER_PRESETS, "one more brings"],
        [
            ["training", "600 s", *clocks, f"{longer - now:+.1e} bpb a second"],
            ["calibration, which reads training data", "in these", *calibrating, *others, "–"],
            ["quantising and writing the artifact", "–", *writing, *others, "–"],
            ["scoring at test time", "600 s", f"{scoring:.0f} s", frontier, *others, worth],
            ["left of it, less evaluation, reading, compiling and capturing", "", *spare, *others, ""],
            [
                "bytes",
                "16,000,000",
                *map(aim_of, configs),
                " to ".join(f"{-1e3 * slope:+.1e}" for slope in slopes) + " bpb a kilobyte",
            ],
        ],
    )


def aim_of(config: RunConfig) -> str:
    """Say how many bytes a configuration's artifact is quantised to."""
    if config.quantizer == "gptq":
        return "as they come"
    return f"{config.weight_bytes:,} and the program" if config.weight_bytes else "all"


def section(results: Results) -> str:
    """Write the prediction of the presets ``record`` and ``frontier``."""
    blocks = []
    for preset in PRESETS:
        contributions, score, error = predict(results, preset)
        rows = [
            [each.what, f"{each.middle:+.4f}", f"{each.best:+.4f} to {each.worst:+.4f}", each.source]
            for each in contributions
        ]
        rows[0][1:3] = [f"{PUBLIC_BPB:.4f}", "–"]
        rows.append([f"**{preset}**", f"**{score:.4f}**", f"± {error:.4f}", ""])
        blocks.append(table(["", "bpb", "range", "from"], rows))
    return f"""## Prediction for 8 H100s

`python -m bench.prediction`: no such machine has run this package. Gains of single levers are those that published
paired runs state; one GPU here cannot resolve them. Eight GPUs are taken to be 8 × {EFFICIENCY[0]} to
{EFFICIENCY[1]} times as fast as one, a guess. `frontier` is meant with data of `--case before-space`. The best accepted
public score is 1.0565.

{blocks[0]}
{blocks[1]}
Seconds of scoring are those of the whole split on 8 GPUs at the proof's speed, `frontier`'s in proportion to its time
beside `record`'s; evaluation without it takes some 20 s more, reading, compiling and capturing some 25. Calibration and
quantising are those of one GPU, the first of the two with a cold cache of kernels. The worth of a kilobyte is that of
finer steps at the cap, on the weights that the tax was measured on.

{budget(results)}"""


def main() -> int:
    """Print the section."""
    print(section(read_all(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
