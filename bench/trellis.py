"""Codes on a trellis for a block of columns of the record model's MLP matrices: ``python -m bench.trellis``.

32 columns of eleven matrices of 2,048 rows are what one launch codes; a whole model is some 200 of them and products.
PyTorch steps down the rows of a path one by one, which torch.compile would unroll, so that it has no part here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, main
from pgolf.kernels.trellis import trellis_gptq, trellis_gptq_reference

COLUMNS = 32


def build(states: int, path_length: int, device: torch.device, quick: bool) -> Case:
    """Gaussian weights with steps of half their deviation, and a factor of correlated inputs."""
    matrices, rows = (2, 32) if quick or device.type != "cuda" else (11, 2048)
    weight = torch.randn(matrices, rows, COLUMNS, device=device)
    factor = (torch.eye(COLUMNS, device=device) + 0.1 * torch.randn(matrices, COLUMNS, COLUMNS, device=device)).triu()
    row_step = 0.2 + 0.1 * torch.rand(matrices, rows, device=device)
    column_step = 1 + 0.5 * torch.rand(matrices, COLUMNS, device=device)
    tensors = weight, factor, row_step, column_step

    def provider(op: Callable, dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> Function:
        return partial(op, *(x.to(dtype) for x in tensors), states=states, path_length=path_length, **more)

    providers = {
        "eager": lambda: provider(trellis_gptq_reference, shrink=torch.ones_like(row_step)),
        "pgolf": lambda: provider(trellis_gptq),
    }
    exact = provider(trellis_gptq_reference, torch.float64, shrink=torch.ones_like(row_step).double())
    return Case(providers, lambda: exact().double(), sum(x.nbytes for x in tensors) + weight.nbytes // 2)


CASES: dict[str, Builder] = {
    "scalar": partial(build, 1, 16),
    "8_states": partial(build, 8, 256),
    "128_states": partial(build, 128, 512),
}

TUNING: dict[str, Tuning] = {}  # the launch follows from the number of states

if __name__ == "__main__":
    sys.exit(main({"trellis": CASES}, __doc__.splitlines()[0]))
