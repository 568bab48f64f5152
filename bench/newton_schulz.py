"""Newton-Schulz, five steps with the Polar Express tuples, bf16 in and out: ``python -m bench.newton_schulz``.

`banks_full` is an optimizer step of the record model on one GPU, `banks_eighth` one GPU's share of eight. `list_24` and
so on are that many matrices, 768×768 and 768×3072 by turns, one by one as optimizers hold them: `pgolf_stacked` and
`compile_gram` have them in two stacks, and spend no time on making these. The other cases are named by their shape. The
rates count the least arithmetic known: the symmetric products alone, in the
standard form or, where it is less, in the Gram form with one restart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, compiled, main
from pgolf.kernels.newton_schulz import POLAR_EXPRESS, newton_schulz_banks

STEPS = len(POLAR_EXPRESS)
Shape = tuple[int, int, int]
BANKS = {
    "banks_full": ((22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048)),
    "banks_eighth": ((3, 512, 512), (3, 256, 512), (2, 2048, 512), (2, 512, 2048)),
    "12x768x3072": ((12, 768, 3072),),  # GPT-2 small
    "24x1024x4096": ((24, 1024, 4096),),  # GPT-2 medium
    "8x384x1536": ((8, 384, 1536),),
    "8x512x1280": ((8, 512, 1280),),
    "8x130x70": ((8, 130, 70),),
}


LISTS = {f"list_{count}": count for count in (24, 72, 300)}
OF_LISTS = (768, 768), (768, 3072)


def operations(shape: Shape) -> int:
    """Multiplications and additions of the least arithmetic known for a bank, two for each product."""
    count, m, n = shape[0], min(shape[1:]), max(shape[1:])
    standard = STEPS * (3 * m * m * n + m**3)
    gram = 6 * m * m * n + (3 * STEPS - 1) * m**3
    return count * min(standard, gram)


def each(function: Callable, banks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``function`` of every bank."""
    return [function(bank) for bank in banks]


def wide_and_normalised(iterate: Callable, dtype: torch.dtype, G: torch.Tensor) -> torch.Tensor:
    """``iterate`` of G, transposed if tall and divided by its norm, in ``dtype``; float16 gives bfloat16."""
    half = dtype == torch.float16
    tall = G.size(-2) > G.size(-1)
    X = G.to(torch.float32 if half else dtype)
    X = X.mT if tall else X
    X = iterate((X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype).contiguous())
    X = X.to(torch.bfloat16) if half else X
    return X.mT if tall else X


def iterate_plain(X: torch.Tensor) -> torch.Tensor:
    """The public arithmetic."""
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        B = b * A + c * (A @ A)
        X = a * X + B @ X
    return X


def iterate_gram(X: torch.Tensor) -> torch.Tensor:
    """The Gram form with a restart after two steps, as published."""
    identity = torch.eye(X.size(-2), dtype=X.dtype, device=X.device)
    for steps in (POLAR_EXPRESS[:2], POLAR_EXPRESS[2:]):
        R = X @ X.mT
        for step, (a, b, c) in enumerate(steps):
            Z = torch.baddbmm(R, R, R, beta=b, alpha=c)
            Q = torch.baddbmm(Q, Q, Z, beta=a) if step else Z + a * identity  # noqa: F821
            if step + 1 < len(steps):
                W = torch.baddbmm(R, R, Z, beta=a)
                R = torch.baddbmm(W, W, Z, beta=a)
        X = Q @ X
    return X


def build(shapes: Sequence[Shape], device: torch.device, quick: bool) -> Case:
    """The case of these banks; an eighth of the rows and columns and fewer matrices where it is small."""
    if quick or device.type != "cuda":
        shapes = [(min(count, 2), -(-rows // 8), -(-columns // 8)) for count, rows, columns in shapes]
    banks = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes]
    exact = partial(wide_and_normalised, iterate_plain, torch.float64)
    plain = partial(each, partial(wide_and_normalised, iterate_plain, torch.bfloat16))
    gram = partial(each, partial(wide_and_normalised, iterate_gram, torch.float16))
    providers = {
        "eager": lambda: partial(plain, banks),
        "compile": lambda: partial(compiled(plain, device), banks),
        "compile_gram": lambda: partial(compiled(gram, device), banks),
        "gram_newton_schulz": partial(_gram_newton_schulz, banks, True),
        "gram_newton_schulz_torch": partial(_gram_newton_schulz, banks, False),
        "dion": partial(_dion, banks),
        "flash_muon": partial(_flash_muon, banks),
        "pgolf": partial(_pgolf, banks),
    }
    moved = sum(2 * bank.nbytes for bank in banks)
    return Case(providers, lambda: each(exact, banks), moved, sum(map(operations, shapes)))


def build_list(count: int, device: torch.device, quick: bool) -> Case:
    """The case of a list of so many matrices; six of an eighth of the rows and columns where it is small."""
    small = quick or device.type != "cuda"
    count, divisor = (6, 8) if small else (count, 1)
    shapes = [(count // 2, rows // divisor, columns // divisor) for rows, columns in OF_LISTS]
    stacks = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes]
    matrices = [matrix.clone() for matrix in by_turns(stacks)]
    exact, plain = (
        partial(each, partial(wide_and_normalised, iterate_plain, dtype)) for dtype in (torch.float64, torch.bfloat16)
    )
    gram = compiled(partial(each, partial(wide_and_normalised, iterate_gram, torch.float16)), device)
    providers = {
        "eager": lambda: partial(plain, matrices),
        "compile_gram": lambda: lambda: by_turns(gram(stacks)),
        "pgolf": lambda: _pgolf(matrices),
        "pgolf_stacked": lambda: lambda: by_turns(newton_schulz_banks(stacks)),
    }
    moved = sum(2 * stack.nbytes for stack in stacks)
    return Case(providers, lambda: exact(matrices), moved, sum(map(operations, shapes)))


def by_turns(stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first matrix of every stack, then the second of every stack, and so on."""
    return [matrix for matrices in zip(*stacks, strict=True) for matrix in matrices]


CASES: dict[str, Builder] = {name: partial(build, shapes) for name, shapes in BANKS.items()}
CASES |= {name: partial(build_list, count) for name, count in LISTS.items()}
_CHOICES = dict(
    tile=(64, 128),
    columns=(64, 128, 256),
    depth=(32, 64, 128),
    warps=(4, 8),
    num_stages=(2, 3, 4, 5, 6),
    programs=(1, 2, 3, 4),
    maxnreg=(80, 128, 160, 255),
    norm_rows=(4, 8, 16, 32),
    stagger=(0, 20, 40, 80),
)
TUNING = {
    "large": Tuning(CASES["banks_full"], _CHOICES),
    "small": Tuning(CASES["banks_eighth"], _CHOICES),
    "odd": Tuning(CASES["8x130x70"], _CHOICES),
}


def _pgolf(banks: Sequence[torch.Tensor]) -> Function:
    return partial(newton_schulz_banks, banks)


def _gram_newton_schulz(banks: Sequence[torch.Tensor], kernels: bool) -> Function:
    from gram_newton_schulz import GramNewtonSchulz

    orthogonalize = GramNewtonSchulz(
        ns_epsilon=1e-7,
        ns_use_kernels=kernels,
        ns_coefficients=[list(abc) for abc in POLAR_EXPRESS],
        gram_newton_schulz_reset_iterations=[2],
    )

    def run() -> list[torch.Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # it is compiled with CUDA graphs, which reuse their outputs
        return each(orthogonalize, banks)

    return run


def _dion(banks: Sequence[torch.Tensor]) -> Function:
    from dion.newton_schulz_triton import ns_line_1, ns_line_2

    def iterate(X: torch.Tensor) -> torch.Tensor:
        for a, b, c in POLAR_EXPRESS:
            X = torch.baddbmm(X, ns_line_2(ns_line_1(X), alpha=c, beta=b), X, beta=a)
        return X

    return partial(each, partial(wide_and_normalised, iterate, torch.bfloat16), banks)


def _flash_muon(banks: Sequence[torch.Tensor]) -> Function:
    from flash_muon.matmul_transpose_triton import matmul_transpose

    def iterate(bank: torch.Tensor) -> torch.Tensor:
        results = []
        for X in bank:
            for a, b, c in POLAR_EXPRESS:
                A = matmul_transpose(X)
                X = torch.addmm(X, b * A + c * matmul_transpose(A), X, beta=a)
            results.append(X)
        return torch.stack(results)

    return partial(each, partial(wide_and_normalised, iterate, torch.bfloat16), banks)


if __name__ == "__main__":
    sys.exit(main({"newton_schulz": CASES}, __doc__.splitlines()[0]))
