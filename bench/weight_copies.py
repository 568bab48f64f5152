"""Copies of a run's average in few megabytes, from which later measurements start: ``python -m bench.weight_copies``.

    python -m bench.weight_copies save --run-dir RUN --copies DIR     # after training
    python -m bench.weight_copies save --run-dir RUN --copies DIR --checkpoint RUN/train_state.pt   # in its middle
    python -m bench.weight_copies load --run-dir NEW --copies DIR     # a run that `pgolf quantize` goes on with

Matrices become integers from -511 to 511 with a float32 scale a row, ten bits a weight; everything else stays float32.
The copies' own error is that of rounding to 1/511 of a row's largest weight, which `save` prints beside the matrices'
size. The record's average takes 45 MB, in files of at most 15 MiB.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf.common.files import read_json, write_aside
from pgolf.common.folder import RunFolder
from pgolf.common.progress import format_bytes
from pgolf.common.runtime import start_world
from pgolf.common.tensors import load_tensors
from pgolf.model.weights import load_weights, save_weights

LARGEST = 511  # of a code
PART_BYTES = 15 << 20
LEAST_NUMBERS = 65_536  # a smaller tensor stays as it is
RUN = "run.json"  # settings and summary, beside the parts
LOW, HIGH, SCALE, SHAPE = "/low", "/high", "/scale", "/shape"


def pack(weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return arrays from which `unpack` makes the weights again, matrices with ten bits a number."""
    arrays: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or weight.numel() < LEAST_NUMBERS:
            arrays[name] = weight.numpy()
            continue
        scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-30) / LARGEST
        codes = (torch.round(weight / scale).to(torch.int16) + LARGEST).flatten().numpy()
        high = np.zeros(-(-codes.size // 4) * 4, np.uint8)
        high[: codes.size] = codes >> 8
        quarters = high.reshape(-1, 4)
        arrays[name + LOW] = (codes & 255).astype(np.uint8)
        arrays[name + HIGH] = quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6
        arrays[name + SCALE], arrays[name + SHAPE] = scale.numpy(), np.array(weight.shape)
    return arrays


def unpack(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the float32 weights that `pack` made arrays of, matrices rounded."""
    weights: dict[str, Tensor] = {}
    for key in arrays:
        name, _, part = key.rpartition("/")
        if not part or f"/{part}" not in (LOW, HIGH, SCALE, SHAPE):
            weights[key] = torch.from_numpy(np.array(arrays[key]))
        elif f"/{part}" == LOW:
            low, packed = arrays[key], arrays[name + HIGH]
            high = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).reshape(-1)[: low.size]
            codes = torch.from_numpy((high.astype(np.int16) << 8 | low) - LARGEST).float()
            weights[name] = codes.view(*arrays[name + SHAPE].tolist()) * torch.from_numpy(arrays[name + SCALE])
    return weights


def save(folder: RunFolder, copies: Path, checkpoint: Path | None = None) -> float:
    """Write the copies of a run's average, or of a checkpoint's; returns the error's share of the matrices' size."""
    if checkpoint is None:
        weights, step = load_weights(folder.ema, folder.config()), folder.summary()["train"].get("steps", 0)
    else:
        held = load_tensors(checkpoint)
        weights, step = {name: value.float() for name, value in held["ema"].items()}, held["step"]
    buffer = io.BytesIO()
    arrays = pack(weights)
    np.savez(buffer, **arrays)
    blob = buffer.getvalue()
    copies.mkdir(parents=True, exist_ok=True)
    parts = -(-len(blob) // PART_BYTES)
    for number in range(parts):
        write_aside(copies / f"average.{number}", blob[number * PART_BYTES : (number + 1) * PART_BYTES])
    summary = {stage: results for stage, results in folder.summary().items() if stage in ("run", "data", "train")}
    about = {"config": json.loads(folder.config().to_json()), "summary": summary, "step": step, "parts": parts}
    write_aside(copies / RUN, json.dumps(about, indent=1))
    again = unpack(arrays)
    matrices = [name for name, weight in weights.items() if name + LOW in arrays]
    squares = [
        sum(float(value.square().sum()) for value in values)
        for values in ((weights[name] - again[name] for name in matrices), (weights[name] for name in matrices))
    ]
    share = (squares[0] / max(squares[1], 1e-30)) ** 0.5
    print(f"step {step}: {format_bytes(len(blob))} in {parts} parts; error {share:.2e} of the matrices' size")
    return share


def load(folder: RunFolder, copies: Path) -> None:
    """Make a run of copies: its settings, its summary and its average."""
    about = read_json(copies / RUN)
    blob = b"".join((copies / f"average.{number}").read_bytes() for number in range(about["parts"]))
    with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
        weights = unpack({name: arrays[name] for name in arrays.files})
    folder.path.mkdir(parents=True, exist_ok=True)
    write_aside(folder.summary_file, json.dumps(about["summary"], indent=1))
    write_aside(folder.config_file, json.dumps(about["config"], indent=1))
    config = folder.config()
    save_weights(folder.ema, weights, about["step"], start_world(config.replace(device="cpu")))
    load_weights(folder.ema, config)  # checks them
    print(f"{folder.path}: the average after step {about['step']}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m bench.weight_copies", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("save", "load"))
    parser.add_argument("--run-dir", type=Path, required=True, help="the run to copy, or to make")
    parser.add_argument("--copies", type=Path, required=True, help="folder of the copies")
    parser.add_argument("--checkpoint", type=Path, help="save: its average in place of the final one")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.run_dir)
    if arguments.what == "load":
        load(folder, arguments.copies)
    else:
        save(folder, arguments.copies, arguments.checkpoint)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
