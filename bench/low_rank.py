"""Adapters of low rank, a set for each of 64 groups, bf16, width 512: ``python -m bench.low_rank``.

`attention` and `mlp` are the record model's projections at 131,072 rows, `head` its vocabulary at 3,072; groups have as
many rows each but in `ragged`, where they have from a few to almost twice the mean; `residual` is `mlp` added to one.
`eager` goes group by group, `bmm`
makes batched products, in `ragged` of groups padded to the longest, and `compile` compiles these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from pgolf.kernels.low_rank import low_rank, low_rank_reference

GROUPS, WIDTH, SCALE = 64, 512, 0.5
Tensor = torch.Tensor


def _lengths(rows: int, groups: int, equal: bool) -> list[int]:
    """Return how many rows each group has."""
    each = rows // groups
    if equal:
        return [each] * groups
    half = [i * each // (groups // 2) for i in range(groups // 2)]
    return [length for more in half for length in (each - more, each + more)]


def build(
    rows: int,
    rank: int,
    parts: Sequence[int],
    width: int,
    device: torch.device,
    quick: bool,
    *,
    backward: bool = True,
    equal: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    onto: bool = False,
) -> Case:
    """Make a case of the forward or, with ``backward``, also of the gradients of x, A and B.

    Groups have ``equal`` lengths, or else a mixture. ``onto`` adds a residual without gradient.
    """
    groups, d = GROUPS, WIDTH
    if quick or device.type != "cuda":
        groups, d, rank = 4, 32, 16
        rows, parts, width = rows // 256, [part // 32 for part in parts], width // 32
    lengths = _lengths(rows, groups, equal)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    shapes = (rows, d), (groups, len(parts) * rank, d), (groups, sum(parts), rank)
    sizes = 1, d**-0.5, rank**-0.5
    leaves = [(size * torch.randn(shape, device=device)).to(dtype) for shape, size in zip(shapes, sizes, strict=True)]
    dy, residual = torch.randn(1 + onto, rows, width, device=device).to(dtype).split((1, onto))
    dy, residual = dy[0], residual[0] if onto else None
    places = torch.arange(max(lengths), device=device)
    valid = places < bounds.diff()[:, None]
    source = (bounds[:-1, None] + places).clamp(max=rows - 1)
    target = valid.flatten().nonzero()[:, 0]

    def dense(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank_reference(x, A, B, None, None, SCALE, parts, width).y

    def added(y: Tensor) -> Tensor:
        return y if residual is None else residual.to(y.dtype) + y

    def loop(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        triples = zip(x.split(lengths), A.split(1), B.split(1), strict=True)
        return added(torch.cat([dense(part[None], a, b)[0] for part, a, b in triples]))

    def batched(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if equal:
            return added(dense(x.view(groups, -1, d), A, B).view(rows, width))
        return added(dense(torch.where(valid[:, :, None], x[source], 0), A, B).flatten(0, 1)[target])

    offsets = bounds.int()

    def ours(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank(x, A, B, offsets, SCALE, parts=parts, width=width, residual=residual).y

    def run(op: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
        y = op(*inputs)
        return (y.detach(), *torch.autograd.grad(y, inputs, dout)) if backward else (y,)

    def provider(op: Callable[..., Tensor], dtype: torch.dtype = dtype) -> Function:
        return partial(run, op, [leaf.to(dtype).requires_grad_(backward) for leaf in leaves], dy.to(dtype))

    providers = {
        "eager": lambda: provider(loop),
        "compile": lambda: provider(compiled(batched, device)),
        "bmm": lambda: provider(batched),
        "pgolf": lambda: provider(ours),
    }
    activations, weights = leaves[0].nbytes + dy.nbytes, leaves[1].nbytes + leaves[2].nbytes
    operations = 2 * rows * rank * (len(parts) * d + sum(parts))
    if backward:  # y and dx are written, too, and gradients of both weights
        activations, weights, operations = 2 * activations, 2 * weights, 3 * operations
    moved = activations + weights + (dy.nbytes if onto else 0)
    return Case(providers, provider(loop, torch.float64), moved, operations)


_SHAPES = {
    "attention": (131_072, 128, (512, 256, 256), 1088),
    "mlp": (131_072, 128, (512,), 512),
    "head": (3072, 128, (8192,), 8192),
}
CASES: dict[str, Builder] = {
    **{f"{name}_forward": partial(build, *shape, backward=False) for name, shape in _SHAPES.items()},
    **{f"{name}_forward_backward": partial(build, *shape) for name, shape in _SHAPES.items()},
    "ragged_forward_backward": partial(build, *_SHAPES["attention"], equal=False),
    "residual_forward_backward": partial(build, *_SHAPES["mlp"], onto=True),
    "rank256_forward_backward": partial(build, 32_768, 256, (512,), 512),
    "float32_forward_backward": partial(build, 8192, 64, (512,), 512, dtype=torch.float32),
}
_CHOICES = dict(rows=(64, 128, 256), columns=(64, 128, 256), depth=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4))
TUNING = {
    "forward": Tuning(CASES["attention_forward"], _CHOICES),
    **{name: Tuning(CASES["attention_forward_backward"], _CHOICES) for name in ("hidden", "input", "weights")},
    "short": Tuning(CASES["head_forward_backward"], _CHOICES),
    "wide": Tuning(CASES["rank256_forward_backward"], _CHOICES),
    "float32": Tuning(CASES["float32_forward_backward"], dict(rows=(16, 32, 64), columns=(16, 32, 64))),
}

if __name__ == "__main__":
    sys.exit(main({"low_rank": CASES}, __doc__.splitlines()[0]))
