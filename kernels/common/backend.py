"""The choice between an op's implementations: Triton kernels or their PyTorch references.

Every op lists its implementations and calls `select` at each call. ``auto`` selects Triton for CUDA tensors where the
op has a kernel, and the reference otherwise. ``triton`` raises an error where there is no kernel. The environment
variable ``PGOLF_KERNELS`` overrides `set_backend`. Under ``TRITON_INTERPRET=1`` kernels also accept CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

try:
    import triton
except ImportError:  # no Triton for this platform: the references are used
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
    """Return the choice in force: that of `using`, else of ``PGOLF_KERNELS``, else of the last `set_backend`."""
    return _forced or _checked(os.environ.get("PGOLF_KERNELS") or _chosen, "PGOLF_KERNELS")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Put ``name`` in force inside the context, whatever `set_backend` or the environment say."""
    global _forced
    before, _forced = _forced, _checked(name, "using")
    try:
        yield
    finally:
        _forced = before


def runs_kernels(device: torch.device) -> bool:
    """Return whether ops that have a kernel run it on ``device`` under the choice in force."""
    name = backend()
    return name == "triton" or (name == "auto" and device.type == "cuda" and triton is not None)


def select(op: str, implementations: Mapping[str, Callable], tensor: torch.Tensor) -> Callable:
    """Return the implementation of ``op`` to run on ``tensor``, of those named ``reference`` and ``triton``.

    Raises RuntimeError if the choice is ``triton`` and Triton is not installed, the op has no kernel, or the tensor is
    not on a GPU.
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
