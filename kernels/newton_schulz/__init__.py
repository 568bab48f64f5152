"""Newton-Schulz orthogonalisation with per-step coefficients, for Muon.

For a matrix G the iteration drives all singular values towards 1 and keeps the singular vectors:

    X = G / (norm_scale ‖G‖_F + eps)
    for (a, b, c) in coefficients:   A = X Xᵀ;   B = b A + c A²;   X = a X + B X

so a step maps every singular value σ to a σ + b σ³ + c σ⁵. The Polar Express tuples (Amsel et al., arXiv 2505.16932)
are the minimax-optimal choice for a given number of steps and lower bound on σ; `polar_express_coefficients` computes
them. With the defaults they are the tuples of modded-nanogpt and parameter-golf PR #1344 / #1874 to 1e-12, and map σ in
[1e-3, 1] into [0.859, 1.141].

Shapes: G is a matrix [m, n] or a stack of them [N, m, n]. Tall matrices (m > n) are iterated as their transpose. Of
empty matrices, which ranks may hold of a sharded weight, the result is as empty. More dimensions are refused: they are
mostly a convolution's weight [out, in, height, width], whose matrix is [out, in height width], so that the call is
`newton_schulz(weight.flatten(1)).view_as(weight)`; a stack of stacks becomes one by `flatten(0, -3)`.

Algorithms. ``standard`` is the formula above. ``symmetric`` computes one triangle of A and B and mirrors it. ``gram``
(gram-newton-schulz, Dao-AILab 2026) iterates on the small matrix R = X Xᵀ and applies the product Q of the steps'
polynomials to X at the end, 9 m²n + 11 m³ operations instead of 15 m²n + 5 m³ for five steps:

    P = a I + b R + c R²;   Q = Q P;   W = R P;   R = W P

It restarts from X = Q X after the first step and then after every second step. The restarts keep its error in float16
at half the error of ``standard`` in bfloat16 at most, and at a fifth from 256 rows on. They are needed because the
first polynomial takes large singular values down from 8 to 0.2 times themselves: the rounding errors that remain in R
then couple large and small directions and make eigenvalues negative, which later steps amplify. With a first restart
after three steps, updates in training had singular values up to 3,000 where momentum has a few large ones; after two
steps, emulated, up to 1.5.

On a GPU one launch computes all matrices of all banks. It works through a list of tasks in topological order: row norms
of a matrix; normalisation, cast and transposition into a zero-padded workspace; and the tiles of all products. Each
program takes tasks by an atomic ticket, waits until the task's matrix has finished the level before, and counts the
task as finished. A task waits for tasks with smaller tickets only, and those are finished or held by programs that will
come to them. So there is no deadlock however few programs run, and other streams may hold any part of the GPU.

The kernel reads from a table where the banks lie, so that one compiled kernel serves any number of them. A short
launch before it, one for every 64 banks, writes the table from its arguments and zeroes the counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..common.backend import select
from ..common.operators import operator
from .polar_express import (
    POLAR_EXPRESS,
    QUINTIC,
    AnyCoefficients,
    Coefficients,
    coefficients_by_step,
    polar_express_coefficients,
)
from .reference import Settings, banks_reference, newton_schulz_reference, orthogonalize
from .triton import banks_triton

ALGORITHMS = ("auto", "standard", "symmetric", "gram")
_IMPLEMENTATIONS = {"reference": banks_reference, "triton": banks_triton}


def newton_schulz(
    G: torch.Tensor,
    steps: int = 5,
    coefficients: AnyCoefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    row_normalize: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Orthogonalise every matrix of ``G``.

    Args:
        G: [m, n] or [N, m, n] floating point, any sizes. Its norms may take any value that float32 holds. With eps > 0
            a zero matrix stays zero. A NaN fills its own matrix only.
        steps: number of iterations, 1 or more. The default coefficients are generated for this number.
        coefficients: a tuple (a, b, c) for all steps, or a sequence of one for each step.
        algorithm: ``standard``, ``symmetric`` or ``gram`` (see above), or ``auto``: the fastest that is at least as
            accurate as ``standard`` in bfloat16. On a GPU that is ``gram`` or, for nearly square matrices,
            ``symmetric``, both stored in float16. Where the coefficients could overflow float16 (those of the Polar
            Express cannot) it is ``symmetric`` in bfloat16, and without a GPU ``standard``.
        dtype: dtype of the result, and of the arithmetic except where the algorithm stores in float16. None is
            bfloat16. PyTorch computes float32 and float64 on every device.
        norm_scale: factor on the Frobenius norm before dividing (1.02 in modded-nanogpt, 1 in PR #1874).
        eps: number added to the scaled norm.
        row_normalize: divide each row by its norm first (MuonEq-R).
        out: floating point, in the shape of G, takes the result.

    Returns the orthogonalised matrices in ``dtype`` (or ``out``) and the shape of G. The reference gives the
    derivative. Raises ValueError or TypeError for a wrong shape, dtype, device, algorithm or number of tuples.
    """
    outs = newton_schulz_banks(
        [G],
        steps,
        coefficients,
        algorithm=algorithm,
        dtype=dtype,
        norm_scale=norm_scale,
        eps=eps,
        row_normalize=row_normalize,
        out=None if out is None else [out],
    )
    return outs[0]


def newton_schulz_banks(
    banks: Iterable[torch.Tensor],
    steps: int = 5,
    coefficients: AnyCoefficients = POLAR_EXPRESS,
    *,
    algorithm: str = "auto",
    dtype: torch.dtype | None = None,
    norm_scale: float = 1.0,
    eps: float = 1e-7,
    row_normalize: bool = False,
    out: Iterable[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Compute `newton_schulz` of several banks: on a GPU one launch, whatever their number and shapes.

    ``banks`` and ``out`` are lists, or generators, of what `newton_schulz` takes, on one device. Matrices need not be
    stacked: equal ones are worked through as a stack of them is, to the same bits. Banks of different dtypes take one
    launch for each dtype. No tensor of ``out`` may overlap the bank of another. The first call with a list of shapes
    copies a table of tasks to the GPU, where it stays: make this call before capturing a graph. Addresses may change
    at every call; a graph keeps those of its capture.
    """
    banks, out = list(banks), None if out is None else list(out)
    dtype = dtype or torch.bfloat16
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    if out is not None and len(out) != len(banks):
        raise ValueError(f"out must have one tensor for each of the {len(banks)} banks, got {len(out)}")
    for position, G in enumerate(banks):
        if G.ndim not in (2, 3):
            advice = "; flatten(1) makes a convolution's weight a matrix, flatten(0, -3) a stack of stacks one stack"
            advice = advice if G.ndim > 3 else ""
            raise ValueError(f"G must be [m, n] or [N, m, n], got shape {tuple(G.shape)}{advice}")
        if not G.is_floating_point():
            raise TypeError(f"G must be floating point, got {G.dtype}")
        if G.device != banks[0].device:
            raise ValueError(f"banks must be on one device, got {banks[0].device} and {G.device}")
        target = G if out is None else out[position]
        if target.shape != G.shape or target.device != G.device or not target.is_floating_point():
            raise ValueError(
                f"out must be floating point {tuple(G.shape)} on {G.device}, got {target.dtype} "
                f"{tuple(target.shape)} on {target.device}"
            )
    tuples = coefficients_by_step(coefficients, steps)
    if not banks:
        return []
    if out is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (*banks, *out)):
        raise ValueError("out takes no gradient: leave it out, or call under torch.no_grad()")
    values = [value for abc in tuples for value in abc], algorithm, dtype, float(norm_scale), float(eps), row_normalize
    if out is None:
        return _banks_op(banks, *values)
    _banks_out_op(banks, out, *values)
    return out


# The operators choose the implementation: compilers and tracers see them on every device.


def _settings(coefficients: Sequence[float], *others: Any) -> Settings:
    """Return the settings from an operator's arguments, whose coefficients are flat."""
    numbers = iter(coefficients)
    return Settings(tuple(zip(numbers, numbers, numbers, strict=True)), *others)


def _run_into(banks: Sequence[torch.Tensor], out: Sequence[torch.Tensor], *values: Any) -> None:
    settings = _settings(*values)
    has_kernel = settings.dtype.itemsize == 2
    run = select("newton_schulz", _IMPLEMENTATIONS, banks[0]) if has_kernel else banks_reference
    run(banks, out, settings)


def _run(banks: Sequence[torch.Tensor], *values: Any) -> list[torch.Tensor]:
    out = _fake(banks, *values)
    _run_into(banks, out, *values)
    return out


def _fake(banks: Sequence[torch.Tensor], *values: Any) -> list[torch.Tensor]:
    dtype = _settings(*values).dtype
    return [torch.empty(G.shape, dtype=dtype, device=G.device) for G in banks]


def _setup_context(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    banks, *ctx.values = inputs
    ctx.save_for_backward(*banks)


def _backward(ctx: Any, gradients: Sequence[torch.Tensor]) -> tuple:
    """Return the reference's derivative, in float32 or better."""
    settings = _settings(*ctx.values)
    if settings.dtype.itemsize == 2:
        settings = settings._replace(dtype=torch.float32)
    with torch.enable_grad():
        banks = [G.detach().requires_grad_() for G in ctx.saved_tensors]
        outs = [orthogonalize(G, settings) for G in banks]
    gradients = [gradient.to(settings.dtype) for gradient in gradients]
    return list(torch.autograd.grad(outs, banks, gradients)), *[None] * len(settings)


_ARGUMENTS = "float[] coefficients, str algorithm, ScalarType dtype, float norm_scale, float eps, bool row_normalize"
_banks_op = operator(
    f"newton_schulz(Tensor[] banks, {_ARGUMENTS}) -> Tensor[]",
    _run,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_banks_out_op = operator(
    f"newton_schulz_out(Tensor[] banks, Tensor(a!)[] out, {_ARGUMENTS}) -> ()",
    _run_into,
    lambda *arguments: None,
    mutates=("out",),
)

__all__ = [
    "ALGORITHMS",
    "POLAR_EXPRESS",
    "QUINTIC",
    "AnyCoefficients",
    "Coefficients",
    "newton_schulz",
    "newton_schulz_banks",
    "newton_schulz_reference",
    "polar_express_coefficients",
]
