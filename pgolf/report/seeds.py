"""The results of several seeds: their table, and the texts of a submission in the challenge's form."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pgolf.report.results import scores

RECORD_SECONDS = 600.0  # of the challenge, for training, and again for evaluation
RECORD_DEVICES, RECORD_CHIP = 8, "H100"
DIGITS = 8  # of losses and bits per byte in submission.json


class SeedResult(NamedTuple):
    """The results of one seed's run.

    Attributes:
        seed, steps: its seed, and how many steps it trained.
        scores: loss in nats a token and bits per byte, by what was scored; the last one is the run's.
        documents, tokens: of the validation data.
        weight_bytes, code_bytes, cap_bytes: of the artifact, of the program that is submitted, and what both may have.
        train_seconds: of the clock of training.
        calibration_seconds: in which quantisation read training data.
        eval_seconds: of the stage that gave the last score, from the start of its process or from the end of
            the stage before.
        chip, devices: what it ran on.
        versions: of Python and packages.
    """

    seed: int
    steps: int
    scores: dict[str, tuple[float, float]]
    documents: int
    tokens: int
    weight_bytes: int
    code_bytes: int
    cap_bytes: int
    train_seconds: float
    calibration_seconds: float
    eval_seconds: float
    chip: str
    devices: int
    versions: dict[str, str]

    @property
    def total_bytes(self) -> int:
        """The bytes of weights and code."""
        return self.weight_bytes + self.code_bytes


class Heading(NamedTuple):
    """What a submission says besides its results."""

    name: str
    author: str
    github: str
    date: str


def seed_result(
    seed: int, summary: Mapping[str, Any], environment: Mapping[str, Any], weight_bytes: int, code_bytes: int
) -> SeedResult:
    """Take a run's results out of its summary and environment.

    Raises KeyError, TypeError, ValueError or AttributeError if they lack a result or it is no number.
    """
    train, quantize, last = summary["train"], summary["quantize"], summary["ttt" if "ttt" in summary else "eval"]
    scored = {name: (float(block["loss"]), float(block["bits_per_byte"])) for name, block in scores(summary).items()}
    return SeedResult(
        seed,
        steps=int(train["steps"]),
        scores=scored,
        documents=int(summary["data"]["val_documents"]),
        tokens=int(summary["data"]["val_tokens"]),
        weight_bytes=weight_bytes,
        code_bytes=code_bytes,
        cap_bytes=int(quantize["cap_bytes"]),
        train_seconds=float(train["clock_seconds"]),
        calibration_seconds=float(quantize["hessian_seconds"]) + float(quantize.get("sensitivity_seconds", 0)),
        eval_seconds=float(last["process_seconds"]),
        chip=str(environment["chip"]),
        devices=int(environment["devices"]),
        versions=dict(environment["versions"]),
    )


def seed_table(results: Sequence[SeedResult]) -> str:
    """Return a Markdown table with a row for each seed and, of several, their means and sample standard deviations."""
    columns: list[tuple[str, list[float], str]] = [("Steps", [run.steps for run in results], ",.0f")]
    for label in results[0].scores:
        columns.append((f"{label}, bpb", [run.scores[label][1] for run in results], ".5f"))
    columns += [
        ("Weights, bytes", [run.weight_bytes for run in results], ",.0f"),
        ("Code, bytes", [run.code_bytes for run in results], ",.0f"),
        ("Artifact, bytes", [run.total_bytes for run in results], ",.0f"),
        (f"Share of {results[0].cap_bytes:,}", [run.total_bytes / run.cap_bytes for run in results], ".2%"),
        ("Training, s", [run.train_seconds for run in results], ".1f"),
        ("Calibration, s", [run.calibration_seconds for run in results], ".1f"),
        ("Evaluation, s", [run.eval_seconds for run in results], ".1f"),
    ]
    rows = [["Seed", *(label for label, _, _ in columns)], ["---", *("--:" for _ in columns)]]
    for index, run in enumerate(results):
        rows.append([str(run.seed), *(format(values[index], form) for _, values, form in columns)])
    if len(results) > 1:
        for name, function in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
            rows.append([name, *(format(function(values), form) for _, values, form in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def track(results: Sequence[SeedResult]) -> str:
    """Return the challenge's track: that of records if every run kept to its times and chips, else the other one."""
    kept = all(
        run.devices == RECORD_DEVICES
        and RECORD_CHIP in run.chip
        and run.train_seconds + run.calibration_seconds <= RECORD_SECONDS
        and run.eval_seconds <= RECORD_SECONDS
        for run in results
    )
    return "10min_16mb" if kept else "non_record_16mb"


def submission_fields(results: Sequence[SeedResult], heading: Heading) -> dict[str, Any]:
    """Return the content of submission.json. Its losses and bits per byte are means of the runs' last scores."""
    losses, bits = zip(*(_last(run) for run in results), strict=True)
    versions = results[0].versions
    spread = {}
    if len(results) > 1:
        spread = {"val_loss_std": _rounded(statistics.stdev(losses)), "val_bpb_std": _rounded(statistics.stdev(bits))}
    return {
        "author": heading.author,
        "github_id": heading.github,
        "name": heading.name,
        "blurb": _blurb(results),
        "date": heading.date,
        "track": track(results),
        "val_loss": _rounded(statistics.mean(losses)),
        "val_bpb": _rounded(statistics.mean(bits)),
        **spread,
        "seeds": [run.seed for run in results],
        "seed_results": {str(run.seed): _seed_fields(run) for run in results},
        "bytes_total": max(run.total_bytes for run in results),
        "bytes_code": results[0].code_bytes,
        "hardware": _hardware(results),
        "python_version": versions.get("python"),
        "pytorch_version": versions.get("torch"),
        "triton_version": versions.get("triton"),
        **({"cuda_version": versions["cuda"]} if "cuda" in versions else {}),
    }


def _seed_fields(run: SeedResult) -> dict[str, Any]:
    loss, bits = _last(run)
    return {
        "val_loss": _rounded(loss),
        "val_bpb": _rounded(bits),
        "artifact_bytes": run.total_bytes,
        "steps": run.steps,
        "step_avg_ms": round(1000 * run.train_seconds / max(run.steps, 1), 2),
        "train_seconds": round(run.train_seconds, 1),
        "calibration_seconds": round(run.calibration_seconds, 1),
        "eval_seconds": round(run.eval_seconds, 1),
    }


def submission_readme(
    results: Sequence[SeedResult],
    heading: Heading,
    *,
    settings: Mapping[str, str],
    checked: Mapping[int, tuple[float, float]],
    documents: int,
) -> str:
    """Return the text of a submission's README.md.

    Args:
        settings: of the program, as environment variables, without the seed.
        checked: by seed, bits per byte of the first ``documents`` validation documents, by the program alone and by
            the package.
    """
    versions = ", ".join(f"{name} {version}" for name, version in results[0].versions.items() if name != "pgolf")
    chosen = "\n".join(f"{name}={value}" for name, value in sorted(settings.items()))
    shown = f"\nOf its settings these are no defaults:\n\n```\n{chosen}\n```\n" if chosen else ""
    devices, seed = results[0].devices, results[0].seed
    launch = f"torchrun --standalone --nproc_per_node={devices} train_gpt.py" if devices > 1 else "python train_gpt.py"
    checks = "\n".join(f"| {seed} | {alone:.8f} | {package:.8f} |" for seed, (alone, package) in checked.items())
    return f"""# {heading.name}

{_blurb(results)}.

{seed_table(results)}

- Bits per byte (bpb) are of all {results[0].documents:,} validation documents, {results[0].tokens:,} tokens; the last
  score is the submission's.
- Code is `train_gpt.py`, counted as it is. Artifact is weights and code together.
- Training is its clock; calibration, the time in which quantisation read training data; evaluation, the stage of the
  last score with everything that it compiled. All ran on {_hardware(results)}.

## Run

```bash
SEED={seed} {launch} --run-dir runs/{seed}
```

`train_gpt.py` holds all that it needs of pgolf, compressed. Shards and tokenizer are expected in `DATA_DIR`, and the
artifact is left in the folder of the run. The runs had {versions}.
{shown}
## Files

- `train_gpt.py`: the program
- `submission.json`: the results
- `train_seed<seed>.log`: JSON lines: settings, environment, every step and validation of training, results of stages

## Check

The program, alone in an empty folder (`python -I`), and the package scored the first {documents} validation documents
with every artifact, as the score was made, in bits per byte:

| Seed | program | package |
| --- | --: | --: |
{checks}
"""


def _blurb(results: Sequence[SeedResult]) -> str:
    bits = [_last(run)[1] for run in results]
    label = [*results[0].scores][-1].lower()
    score = f"{statistics.mean(bits):.5f} bits per byte {label}"
    if len(results) == 1:
        return f"pgolf {results[0].versions['pgolf']}: {score}, one seed"
    spread = f"mean of {len(results)} seeds, standard deviation {statistics.stdev(bits):.5f}"
    return f"pgolf {results[0].versions['pgolf']}: {score}, {spread}"


def _last(run: SeedResult) -> tuple[float, float]:
    return [*run.scores.values()][-1]


def _hardware(results: Sequence[SeedResult]) -> str:
    return ", ".join(dict.fromkeys(f"{run.devices} × {run.chip}" for run in results))


def _rounded(value: float) -> float:
    return round(value, DIGITS)
