"""Which code computes a kernel family: the PyTorch reference beside it, or a Triton kernel.

Every op lists its implementations and asks `select` at each call. ``auto`` takes Triton for CUDA tensors where the
family has a kernel, and the reference otherwise; ``triton`` insists and says so where there is none; the environment
variable ``PGOLF_KERNELS`` overrides what the program chose with `set_backend`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

if not __name__.startswith("pgolf."):
    raise ImportError(
        f"import pgolf.kernels.<op>, not {__name__.partition('.')[0]}.<op>: a second copy of a kernel module would "
        "register its operators twice"
    )

BACKENDS = ("auto", "reference", "triton")
_chosen = "auto"


def set_backend(name: str) -> None:
    """Choose ``auto``, ``reference`` or ``triton`` for every kernel family. Raises ValueError for another name."""
    global _chosen
    _chosen = _checked(name, "set_backend")


def backend() -> str:
    """The choice in force: ``PGOLF_KERNELS`` if set, else what `set_backend` was given last."""
    return _checked(os.environ.get("PGOLF_KERNELS") or _chosen, "PGOLF_KERNELS")


def select(op: str, implementations: Mapping[str, Callable], tensor: torch.Tensor) -> Callable:
    """The implementation of ``op`` to run on ``tensor``.

    Raises RuntimeError when Triton is asked for and the family has no kernel, or the tensor is not on a GPU.
    """
    name = backend()
    if name == "triton":
        if "triton" not in implementations:
            raise RuntimeError(f"{op} has no Triton kernel; use PGOLF_KERNELS=auto or PGOLF_KERNELS=reference")
        if not tensor.is_cuda:
            raise RuntimeError(f"{op}: Triton kernels need CUDA tensors, got {tensor.device}; use PGOLF_KERNELS=auto")
    if name == "auto":
        name = "triton" if tensor.is_cuda and "triton" in implementations else "reference"
    return implementations[name]


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: kernels come as {', '.join(BACKENDS)}, and {name!r} is none of them")
    return name
