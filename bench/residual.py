"""The residual stream between the matrix products, bf16: ``python -m bench.residual``.

At the record model's 98,304 tokens of width 512. `mix_norm` begins a layer, `join_mix_norm` one with a skip,
`enter_lanes` the first parallel one; `lanes` ends a parallel layer, `lanes_norm` begins the next one with it,
`lanes_final` ends the last one with the final norm, which is `norm_of_mean` alone. With `carry` the inputs are handed
through and have later readers, whose gradients autograd adds for the opponents. `linear` is a product without residual
(attention's, 512 inputs), `linear_norm` one with the norm, also with a gate of each row; `layer` is the stream through
a whole serial layer with its products onto the residual (512 and 2048 inputs).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, as_tensors, compiled, main
from pgolf.kernels import residual

TOKENS, WIDTH, HIDDEN = 98_304, 512, 2048
Tensor = torch.Tensor
Op = Callable[[str], Callable]  # an op, or its reference, by name


def _join(leaves: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("skip", "weight", "gate"), leaves, strict=False))


def _mix(op: Op, scale: Tensor, x, x0, mix, *join):
    return op("residual_mix_norm")(x, x0, mix, scale, **_join(join))


def _linear_norm(op: Op, scale: Tensor, x, out, row_gate=None):
    return op("residual_linear_norm")(None, x, out, scale, row_gate=row_gate)


def _layer(op: Op, scale: Tensor, x, x0, mix, attention, out, hidden, down):
    u, n, _, x0 = _mix(op, scale, x, x0, mix)
    v, normed = op("residual_linear_norm")(u, attention, out, scale, inplace=True)
    return op("residual_linear")(v, hidden, down, inplace=True), n, normed, x0


# Leaves by name: activations and parameters.
SHAPES = {
    "x": (1, TOKENS, WIDTH),
    "hidden": (1, TOKENS, HIDDEN),
    "mix": (2, WIDTH),
    "vector": (WIDTH,),
    "out": (WIDTH, WIDTH),
    "down": (WIDTH, HIDDEN),
    "post": (2, 2),
    "resid": (2,),
    "row_gate": (13,),
}
# By name: the function, its leaves, and how many [T, d] it reads and writes forward and backward.
OPS: dict[str, tuple[Callable, tuple[str, ...], int, int]] = {
    "mix_norm": (lambda *arguments: _mix(*arguments)[:2], ("x", "x", "mix"), 4, 6),
    "mix_norm_carry": (_mix, ("x", "x", "mix"), 4, 8),
    "join_mix_norm_carry": (
        lambda *arguments: [part for part in _mix(*arguments) if part is not None],
        ("x", "x", "mix", "x", "vector", "vector"),
        5,
        9,
    ),
    "join": (lambda op, scale, *leaves: op("join_skip")(*leaves), ("x", "x", "vector", "vector"), 3, 5),
    "norm": (lambda op, scale, x: op("scaled_rms_norm")(x, scale), ("x",), 2, 3),
    "enter_lanes_carry": (
        lambda op, scale, *leaves: op("enter_lanes_norm")(*leaves[:3], scale, **_join(leaves[3:])),
        ("x", "x", "mix", "x", "vector", "vector"),
        6,
        11,
    ),
    "norm_of_mean": (lambda op, scale, x, y: op("scaled_rms_norm")(x, None, y), ("x", "x"), 3, 3),
    "lanes": (lambda op, scale, *leaves: op("mix_lanes")(*leaves), ("x", "x", "x", "x", "post", "resid"), 6, 10),
    "lanes_norm_carry": (
        lambda op, scale, *leaves: op("mix_lanes_norm")(*leaves[:8], scale, **_join(leaves[8:])),
        ("x", "x", "x", "x", "post", "resid", "x", "mix", "x", "vector", "vector"),
        10,
        17,
    ),
    "lanes_final": (
        lambda op, scale, *leaves: op("mix_lanes_final")(*leaves),
        ("x", "x", "x", "x", "post", "resid"),
        5,
        9,
    ),
    "linear": (lambda op, scale, *leaves: op("residual_linear")(None, *leaves), ("x", "out"), 2, 4),
    "linear_norm": (_linear_norm, ("x", "out"), 4, 8),
    "linear_norm_gated": (_linear_norm, ("x", "out", "row_gate"), 4, 8),
    "layer": (_layer, ("x", "x", "mix", "x", "out", "hidden", "down"), 15, 26),
}


def with_backward(function: Callable, leaves: list[Tensor], douts: list[Tensor]) -> tuple[Tensor, ...]:
    """The results of ``function`` and the gradients of its leaves for these of the results."""
    outputs = as_tensors(function(*leaves))
    douts = [dout.to(outputs[0].dtype) for dout in douts[: len(outputs)]]
    gradients = torch.autograd.grad(outputs, leaves, douts)
    return *(out.detach() for out in outputs), *gradients


def build(name: str, backward: bool, device: torch.device, quick: bool) -> Case:
    """A case of `OPS`."""
    function, kinds, read_written, read_written_backward = OPS[name]
    tokens = -(-TOKENS // 256) if quick or device.type != "cuda" else TOKENS

    def random(*shape: int) -> Tensor:
        return torch.randn([tokens if size == TOKENS else size for size in shape], device=device).bfloat16()

    leaves = [random(*SHAPES[kind]) for kind in kinds]
    for leaf, kind in zip(leaves, kinds, strict=True):
        if kind in ("out", "down"):
            leaf *= SHAPES[kind][1] ** -0.5
    scale = torch.full((), 0.5, device=device)
    # A share of what is multiplied with them, without which the parameters' gradients are sums of noise.
    douts = [random(1, TOKENS, WIDTH) + 0.5 * leaves[0] for _ in range(5)]

    def call(suffix: str) -> Callable:
        return partial(function, lambda op: getattr(residual, op + suffix), scale)

    def provider(run: Callable) -> Function:
        if not backward:
            return partial(torch.no_grad()(lambda: as_tensors(run(*leaves))))
        return partial(with_backward, run, [leaf.requires_grad_() for leaf in leaves], douts)

    def exact() -> tuple[Tensor, ...]:
        double = [leaf.detach().double().requires_grad_() for leaf in leaves]
        if backward:
            return with_backward(call("_reference"), double, douts)
        with torch.no_grad():
            return tuple(as_tensors(call("_reference")(*double)))

    providers = {
        "eager": lambda: provider(call("_reference")),
        "compile": lambda: provider(compiled(call("_reference"), device)),
        "pgolf": lambda: provider(call("")),
    }
    passes = read_written + backward * read_written_backward
    products = sum(
        2 * tokens * leaf.numel() for leaf, kind in zip(leaves, kinds, strict=True) if kind in ("out", "down")
    )
    return Case(providers, exact, passes * 2 * tokens * WIDTH, (1 + 2 * backward) * products)


CASES: dict[str, Builder] = {
    f"{name}_forward{'_backward' * backward}": partial(build, name, backward)
    for name in OPS
    for backward in (False, True)
}
_CHOICES = dict(
    chunk=(1, 2, 4, 8, 16, 32, 64), programs=(4, 6, 8, 12, 16), columns_per_warp=(128, 256, 512), stages=(1, 2, 3, 4, 5)
)
_ENTRIES = {
    "mix_forward": "mix_norm_forward",
    "join_mix_forward": "join_mix_norm_carry_forward",
    "join_forward": "join_forward",
    "mix_backward": "mix_norm_carry_forward_backward",
    "join_mix_backward": "join_mix_norm_carry_forward_backward",
    "join_backward": "join_forward_backward",
    "norm_forward": "norm_forward",
    "norm_backward": "norm_forward_backward",
    "lanes_forward": "lanes_forward",
    "lanes_backward": "lanes_forward_backward",
    "lanes_norm_forward": "lanes_norm_carry_forward",
    "lanes_norm_backward": "lanes_norm_carry_forward_backward",
    "lanes_mean_forward": "lanes_final_forward",
    "lanes_mean_backward": "lanes_final_forward_backward",
}
TUNING = {entry: Tuning(CASES[case], _CHOICES) for entry, case in _ENTRIES.items()}

if __name__ == "__main__":
    sys.exit(main({"residual": CASES}, __doc__.splitlines()[0]))
