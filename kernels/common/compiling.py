"""Triton's compiler, where there is one: `jit`, constants of modules, and compiling many kernels at once."""

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

if not TYPE_CHECKING and tl is None:

    class constexpr:
        """A number that kernels read from their module."""

        def __init__(self, value: float) -> None:
            self.value = value

else:

    class constexpr(tl.constexpr):
        """A number that kernels read from their module."""

        # Triton compares a kernel's constants with those it was compiled with at each launch: a microsecond for each.
        def __ne__(self, other: object) -> bool:
            return self.value != getattr(other, "value", other)


def jit(function: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`; where there is no Triton the function stays as it is and is never called."""
    if function is None:
        return partial(jit, **options)
    return function if triton is None else compiled_ahead(triton.jit(function, **options))


_compiling: Any = None  # Triton's mode of compiling by threads, inside `compiling_ahead`


def compiled_ahead(kernel: Any) -> Any:
    """The kernel, which `compiling_ahead` can compile without launching it."""
    if INTERPRETED:
        return kernel

    def run(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if _compiling is None:
            return type(kernel).run(kernel, *args, grid=grid, warmup=warmup, **options)
        token = active_mode.set(_compiling)  # the backward runs in a thread of its own
        try:
            return type(kernel).run(kernel, *args, grid=grid, warmup=True, **options)
        finally:
            active_mode.reset(token)

    kernel.run = run
    return kernel


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, Triton kernels are compiled by as many threads as there are cores, and not launched.

    Run in it once what will be launched later, for its results mean nothing: kernels leave outputs as they were. Ends
    when all are compiled and loaded. Compiling them one after the other, as they are launched, takes several times as
    long.
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
            mode.__exit__(None, None, None)  # waits, and takes over what was compiled
        list(threads.map(partial(_load, torch.cuda.current_device()), mode.future_kernels.values()))


def _load(device: int, compiled: Any) -> None:
    """Load a kernel, for which Triton has a C compiler make the function that launches it."""
    torch.cuda.set_device(device)
    compiled.result().run  # noqa: B018  a property that loads
