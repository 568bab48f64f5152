"""Registration of operators with PyTorch: fake implementation, autograd, and a short way past the dispatcher."""

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
