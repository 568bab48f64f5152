"""The choice of the code that computes an op: Triton kernels, or their PyTorch references.

Every op lists its implementations and asks `select` at each call. ``auto`` takes Triton for CUDA tensors where the op
has a kernel, and the reference otherwise. ``triton`` insists, and raises an error where there is no kernel. The
environment variable ``PGOLF_KERNELS`` overrides what the program chose with `set_backend`. Under
``TRITON_INTERPRET=1`` kernels take CPU tensors, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

try:
    import triton
except ImportError:  # no Triton for this platform: the references serve
    triton = None

BACKENDS = ("auto", "reference", "triton")
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
_chosen = "auto"
_forced = ""


def set_backend(name: str) -> None:
    """Choose ``auto``, ``reference`` or ``triton`` for every kernel family. Raises ValueError for another name."""
    global _chosen
    _chosen = _checked(name, "set_backend")


def backend() -> str:
    """The choice in force: that of `using`, else ``PGOLF_KERNELS`` if set, else what `set_backend` was given last."""
    return _forced or _checked(os.environ.get("PGOLF_KERNELS") or _chosen, "PGOLF_KERNELS")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, ``name`` is the choice in force, whatever was chosen before or in the environment."""
    global _forced
    before, _forced = _forced, _checked(name, "using")
    try:
        yield
    finally:
        _forced = before


def runs_kernels(device: torch.device) -> bool:
    """Whether the choice in force computes ops that have a kernel with Triton on ``device``."""
    name = backend()
    return name == "triton" or (name == "auto" and device.type == "cuda" and triton is not None)


def select(op: str, implementations: Mapping[str, Callable], tensor: torch.Tensor) -> Callable:
    """The implementation of ``op`` to run on ``tensor``.

    Raises RuntimeError when Triton is asked for and is not installed, the family has no kernel, or the tensor is not
    on a GPU.
    """
    kernel = implementations.get("triton")
    if not runs_kernels(tensor.device) or (kernel is None and backend() == "auto"):
        return implementations["reference"]
    if triton is None:
        raise RuntimeError(f"{op}: Triton is not installed; use PGOLF_KERNELS=auto or PGOLF_KERNELS=reference")
    if kernel is None:
        raise RuntimeError(f"{op} has no Triton kernel; use PGOLF_KERNELS=auto or PGOLF_KERNELS=reference")
    if not tensor.is_cuda and not INTERPRETED:
        raise RuntimeError(f"{op}: Triton kernels need CUDA tensors, got {tensor.device}; use PGOLF_KERNELS=auto")
    return kernel


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: kernels come as {', '.join(BACKENDS)}, and {name!r} is none of them")
    return name
