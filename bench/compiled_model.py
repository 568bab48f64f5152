"""The opponent of the model's kernels: its references through torch.compile.

`compiled_blocks` compiles the blocks and the head of `pgolf.model.gpt` one by one, as the public script does.
``python -m bench.compiled_model run ...`` is ``python -m pgolf run ...`` with them. It needs ``kernels=reference``: the
compiler has nothing to fuse in kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pgolf.cli import main
from pgolf.model import gpt

BLOCKS = "serial_block", "enter_lanes", "parallel_block", "mix_into_next", "leave_lanes", "linear_cross_entropy"
RECOMPILATIONS = 64  # first and last layers, skips and both loop states differ in which tensors are the same


@contextmanager
def compiled_blocks() -> Iterator[None]:
    """Inside, every model's blocks and head are compiled at their first call."""
    plain = {name: getattr(gpt, name) for name in BLOCKS}
    limit, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, RECOMPILATIONS
    try:
        for name, function in plain.items():
            setattr(gpt, name, torch.compile(function, fullgraph=True))
        yield
    finally:
        for name, function in plain.items():
            setattr(gpt, name, function)
        torch._dynamo.config.recompile_limit = limit


if __name__ == "__main__":
    with compiled_blocks():
        sys.exit(main())
