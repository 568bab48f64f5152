"""Triton's compiler: `jit`, module constants, and compiling many kernels at once; importable without Triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .backend import INTERPRETED, triton

if triton is not None or TYPE_CHECKING:
    import triton.language as tl
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
else:
    tl = None

if INTERPRETED:
    from .interpreter import mend

    mend()

if not TYPE_CHECKING and tl is None:

    class constexpr:
        """A number that kernels read from their module; this class replaces Triton's where there is no Triton."""

        def __init__(self, value: float) -> None:
            self.value = value

else:

    class constexpr(tl.constexpr):
        """A number that kernels read from their module."""

        # At each launch Triton compares the constants with those of the compilation; its own comparison takes 1 µs.
        def __ne__(self, other: object) -> bool:
            return self.value != getattr(other, "value", other)


def jit(function: Callable | None = None, **options: Any) -> Any:
    """Apply `triton.jit`; without Triton, return the function, which is then never called."""
    if function is None:
        return partial(jit, **options)
    return function if triton is None else compiled_ahead(triton.jit(function, **options))


_compiling: Any = None  # Triton's asynchronous compile mode, inside `compiling_ahead`


def compiled_ahead(kernel: Any) -> Any:
    """Make a kernel one that `compiling_ahead` compiles without launching, and return it."""
    if INTERPRETED:
        return kernel

    def run(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if _compiling is None:
            return type(kernel).run(kernel, *args, grid=grid, warmup=warmup, **options)
        token = active_mode.set(_compiling)  # set here, as autograd runs backward in another thread
        try:
            return type(kernel).run(kernel, *args, grid=grid, warmup=True, **options)
        finally:
            active_mode.reset(token)

    kernel.run = run
    return kernel


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Compile the kernels launched inside the context, by as many threads as there are cores, without running them.

    Run the program's step once inside: its outputs are uninitialised. The context ends when all kernels are compiled
    and loaded. Compiling each kernel at its first launch instead takes several times as long.
    """
    global _compiling
    if triton is None or INTERPRETED:
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        _compiling = mode = AsyncCompileMode(threads)
        try:
            yield
        finally:
            _compiling = None
            mode.__exit__(None, None, None)  # waits for all, and puts them into the kernels' caches
        list(threads.map(partial(_load, torch.cuda.current_device()), mode.future_kernels.values()))


def _load(device: int, compiled: Any) -> None:
    """Load a kernel onto the device; Triton compiles its launcher with a C compiler here."""
    torch.cuda.set_device(device)
    compiled.result().run  # noqa: B018  reading the property loads the kernel
