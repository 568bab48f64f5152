"""Initial weights moved by rounding alone: ``python -m bench.moved_weights RUN_DIR SEED``, then `pgolf train --resume`.

RUN_DIR is of a run that has its settings and no weights yet (`pgolf data --run-dir`). It gets a checkpoint of step 0
with a quarter of all weights that are not zero one unit of bfloat16 up, a quarter one down, drawn with SEED. Models
that differ by so little follow the same loss curve until what is chaotic in training has grown: how far such runs of
the same code end apart is what a curve of other code can be held against.
"""

from __future__ import annotations

import sys

import torch

from pgolf.common.folder import RunFolder
from pgolf.common.runtime import start_world
from pgolf.training.checkpoint import save_checkpoint
from pgolf.training.train import start


def moved(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``weights``, rounded towards zero to bfloat16, and 0, 0, 1 or -1 units in the last place more; zeros stay."""
    steps = torch.tensor([0, 0, 1, -1])[torch.randint(0, 4, weights.shape, generator=generator)]
    bits = (weights.float().view(torch.int32) >> 16) + steps.int()
    return torch.where(weights == 0, 0.0, (bits << 16).view(torch.float32)).to(weights.dtype)


def main(argv: list[str]) -> int:
    """Write the checkpoint; returns the exit status."""
    if len(argv) != 2 or not argv[1].isdecimal():
        print("usage: python -m bench.moved_weights RUN_DIR SEED", file=sys.stderr)
        return 2
    folder = RunFolder(argv[0])
    if folder.checkpoint.exists() or folder.ema.exists():
        print(f"{folder.path} has weights already; take a run that has not begun", file=sys.stderr)
        return 2
    config = folder.config().replace(device="cpu", kernels="reference", attention_backend="auto")
    world = start_world(config)
    state, generator = start(config, world), torch.Generator().manual_seed(int(argv[1]))
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.copy_(moved(parameter, generator))
    for name, value in state.model.state_dict().items():
        state.ema[name].copy_(value)
    save_checkpoint(folder.checkpoint, state, folder.config(), world)
    state.loader.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
