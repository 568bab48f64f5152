"""What all kernel families share: the choice of code, the registration of operators, launch parameters by chip.

Every op lists its implementations and asks `select` at each call. ``auto`` takes Triton for CUDA tensors where the op
has a kernel, and the reference otherwise; ``triton`` insists and says so where there is none; the environment variable
``PGOLF_KERNELS`` overrides what the program chose with `set_backend`. Under ``TRITON_INTERPRET=1`` kernels take CPU
tensors, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import library

try:
    import triton
    import triton.language as tl
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
except ImportError:  # no Triton for this platform: the references serve
    triton = tl = None


class _Constant(object if tl is None else tl.constexpr):
    """Triton compares a kernel's constants with those it was compiled with at each launch: a microsecond for each."""

    def __ne__(self, other: object) -> bool:
        return self.value != getattr(other, "value", other)


constexpr = int if tl is None else _Constant  # of integers that kernels read from their module

RMS_EPS = torch.finfo(torch.float32).eps  # of every RMSNorm, as torch has it for float32
BACKENDS = ("auto", "reference", "triton")
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
TUNED = Path(__file__).with_name("tuned")
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


def jit(function: Callable | None = None, **options: Any) -> Callable:
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


def operator(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    mutates: tuple[str, ...] = (),
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Register ``implementation`` as an operator with PyTorch and return the function that calls it.

    ``schema`` is ``name(arguments) -> results`` in PyTorch's notation of operators; the op is ``pgolf::name``.
    ``fake`` gives the results' shapes, ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *gradients)`` the
    derivative. The function returned calls ``implementation`` directly in eager mode, through an autograd function
    where a gradient is wanted, since the dispatcher costs more than a small kernel; compilers and tracers get the op.
    """
    name, parenthesis, arguments = schema.partition("(")
    op = library.custom_op(
        f"pgolf::{name.strip()}", implementation, mutates_args=mutates, schema=parenthesis + arguments
    )
    op.register_fake(fake)
    direct = implementation
    if mutates:
        places = [k for k, argument in enumerate(op._opoverload._schema.arguments) if argument.name in mutates]

        def direct(*args: Any) -> Any:
            result = implementation(*args)
            for place in places:  # as the dispatcher does, so that autograd sees that a saved tensor was overwritten
                torch.autograd.graph.increment_version(args[place])
            return result

    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:  # a class with a setup_context binds a signature at each call
            output = implementation(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": forward, "backward": backward}
        function = type(
            f"{name.strip()}_function", (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()}
        )

        def direct(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return implementation(*args)
            if any(tensor.requires_grad for a in args if isinstance(a, list) for tensor in _tensors([a])):
                return op(*args)  # an autograd function does not look into lists
            wanted = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
            return function.apply(*args) if wanted else implementation(*args)

    def call(*args: Any) -> Any:
        return (op if _traced(args) else direct)(*args)

    return call


def carrying(
    schema: str, implementation: Callable, fake: Callable, setup_context: Callable, backward: Callable, carried: int
) -> Callable:
    """An `operator` that hands tensors through: its function returns its first ``carried`` arguments after the outputs.

    In eager mode the gradients of what is handed through come to ``backward`` behind those of the outputs. An argument
    that requires no gradient is returned itself: it requires none afterwards, and None comes in its place. Under a
    compiler or tracer all arguments are returned themselves, since an operator may not return them.
    """
    op = operator(schema, implementation, fake, setup_context=setup_context, backward=backward)

    def forward(ctx: Any, *args: Any) -> tuple:
        outputs = implementation(*args)
        setup_context(ctx, args, outputs)
        return *outputs, *(a if need else None for a, need in zip(args[:carried], ctx.needs_input_grad, strict=False))

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"{schema.partition('(')[0]}_function", (torch.autograd.Function,), members)

    def call(*args: Any) -> tuple:
        if _traced(args) or not torch.is_grad_enabled():
            return *op(*args), *args[:carried]
        results = function.apply(*args)
        handed = (a if result is None else result for a, result in zip(args, results[-carried:], strict=False))
        return *results[:-carried], *handed

    return call


def overwriting(implementation: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """An `operator`'s function where ``implementation(*args, inplace=True)`` overwrites args[0] and returns it first.

    `may_overwrite` says where that is possible.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = implementation(*args, inplace=True)
        ctx.mark_dirty(args[0])
        setup_context(ctx, args, outputs)
        return outputs

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{implementation.__name__}_inplace", (torch.autograd.Function,), members).apply


def may_overwrite(args: tuple) -> bool:
    """Whether the first argument is there and contiguous, and nobody traces the call."""
    return args[0] is not None and args[0].is_contiguous() and not _traced(args)


def _traced(args: tuple) -> bool:
    """Whether a compiler, tracer or dispatch mode (selective checkpointing, say) is looking on."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in _tensors(args))


def readable(*tensors: torch.Tensor) -> bool:
    """Whether the tensors' values may be looked at: a GPU would have to be waited for, a tracer has none."""
    return all(tensor.device.type == "cpu" for tensor in tensors) and not _traced(tensors)


def _tensors(args: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among arguments and in lists among them."""
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, list | tuple):
            yield from (item for item in a if isinstance(item, torch.Tensor))


def odd_addresses(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Addresses in elements, times 2 plus 1: Triton compiles anew for integers that 16 divides and for those it does
    not, and all of these are odd."""
    return tuple(2 * (tensor.data_ptr() // tensor.element_size()) + 1 for tensor in tensors)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 132, an H100's, for a CPU that stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def chip(device: torch.device) -> str:
    """Whose table of launch parameters a device takes: its own, the H100's on other Hopper chips, else the default."""
    if device.type != "cuda":
        return "h100"  # which a CPU stands in for where kernels are interpreted or only compiled
    name = torch.cuda.get_device_name(device).lower()
    own = [path.stem for path in TUNED.glob("*.json") if path.stem in name]
    return own[0] if own else "h100" if torch.cuda.get_device_capability(device)[0] == 9 else "default"


@lru_cache
def launch_parameters(family: str, case: str, device: torch.device) -> dict[str, int]:
    """Launch parameters of one case of a kernel family on this chip, from ``tuned/<chip>.json``.

    Cases that a chip's table lacks come from the H100's; a table's ``meta`` says how its own were found, and
    `bench.tune` measures them. Raises KeyError for a case that is in neither.
    """
    tables = [json.loads((TUNED / f"{name}.json").read_text(encoding="utf-8")) for name in (chip(device), "h100")]
    found = [table["cases"][family][case] for table in tables if case in table["cases"].get(family, {})]
    if not found:
        raise KeyError(f"no table in {TUNED} has launch parameters for {family}, {case}")
    return found[0]


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: kernels come as {', '.join(BACKENDS)}, and {name!r} is none of them")
    return name
