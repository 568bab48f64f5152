"""Registration of operators with PyTorch: fake implementation, autograd, and direct calls past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import library


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
    ``fake`` returns empty results of the right shapes. ``setup_context(ctx, inputs, output)`` and
    ``backward(ctx, *gradients)`` are the derivative, given both or neither.

    In eager mode the returned function calls ``implementation`` directly, through an autograd function if a gradient
    is needed, since the dispatcher takes longer than a small kernel. Compilers and tracers see the op.
    """
    name, parenthesis, arguments = schema.partition("(")
    name = name.strip()
    op = library.custom_op(f"pgolf::{name}", implementation, mutates_args=mutates, schema=parenthesis + arguments)
    op.register_fake(fake)
    direct = implementation
    if backward is not None:
        assert setup_context is not None
        op.register_autograd(backward, setup_context=setup_context)
        direct = _differentiable(name, op, implementation, setup_context, backward)
    elif mutates:
        places = [k for k, argument in enumerate(op._opoverload._schema.arguments) if argument.name in mutates]
        direct = _mutating(implementation, places)

    def call(*args: Any) -> Any:
        return (op if traced(args) else direct)(*args)

    return call


def _differentiable(
    name: str, op: Callable, implementation: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    """Return an eager function that differentiates ``implementation`` by ``backward``."""

    def forward(ctx: Any, *args: Any) -> Any:  # a class with a setup_context binds a signature at each call
        output = implementation(*args)
        setup_context(ctx, args, output)
        return output

    apply = _autograd_function(f"{name}_function", forward, backward)

    def direct(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return implementation(*args)
        if any(tensor.requires_grad for a in args if isinstance(a, list) for tensor in _tensors([a])):
            return op(*args)  # an autograd function does not look into lists
        needs_gradient = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return (apply if needs_gradient else implementation)(*args)

    return direct


def _mutating(implementation: Callable, places: list[int]) -> Callable:
    """Return an eager function that reports the arguments at ``places`` as overwritten."""

    def direct(*args: Any) -> Any:
        result = implementation(*args)
        for place in places:  # as the dispatcher does, so that autograd detects an overwritten saved tensor
            torch.autograd.graph.increment_version(args[place])
        return result

    return direct


def _autograd_function(name: str, forward: Callable, backward: Callable) -> Callable:
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    return function.apply


def carrying(
    schema: str, implementation: Callable, fake: Callable, setup_context: Callable, backward: Callable, carried: int
) -> Callable:
    """Register an `operator` whose function also returns its first ``carried`` arguments, after the outputs.

    Pass the returned arguments to later readers. In eager mode their gradients then reach ``backward`` behind those of
    the outputs, where a kernel can add them; otherwise autograd launches an addition for each. An argument that
    requires no gradient is returned unchanged, and its gradient is None. Under a compiler or tracer all arguments are
    returned unchanged, since an operator must not return its inputs.
    """
    op = operator(schema, implementation, fake, setup_context=setup_context, backward=backward)

    def forward(ctx: Any, *args: Any) -> tuple:
        outputs = implementation(*args)
        setup_context(ctx, args, outputs)
        return *outputs, *(a if need else None for a, need in zip(args[:carried], ctx.needs_input_grad, strict=False))

    apply = _autograd_function(f"{schema.partition('(')[0]}_function", forward, backward)

    def call(*args: Any) -> tuple:
        if traced(args) or not torch.is_grad_enabled():
            return *op(*args), *args[:carried]
        results = apply(*args)
        passed = (a if result is None else result for a, result in zip(args, results[-carried:], strict=False))
        return *results[:-carried], *passed

    return call


def overwriting(implementation: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """Return an eager function that overwrites its first argument by ``implementation(*args, inplace=True)``.

    ``implementation`` returns that argument as its first output. Call the function only where `may_overwrite` allows.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = implementation(*args, inplace=True)
        ctx.mark_dirty(args[0])
        setup_context(ctx, args, outputs)
        return outputs

    return _autograd_function(f"{implementation.__name__}_inplace", forward, backward)


def may_overwrite(args: tuple) -> bool:
    """Return whether the first argument is a contiguous tensor and the call is not traced."""
    return args[0] is not None and args[0].is_contiguous() and not traced(args)


def traced(args: Iterable) -> bool:
    """Return whether a compiler, tracer or dispatch mode (such as selective checkpointing) records the call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in _tensors(args))


def readable(*tensors: torch.Tensor) -> bool:
    """Return whether the host may read the tensors' values: they are on the CPU, and the call is not traced."""
    return all(tensor.device.type == "cpu" for tensor in tensors) and not traced(tensors)


def _tensors(args: Iterable) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments and in lists or tuples among them."""
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, list | tuple):
            yield from (item for item in a if isinstance(item, torch.Tensor))
