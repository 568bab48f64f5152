"""Linear cross-entropy, bf16: ``python -m bench.linear_cross_entropy``.

`forward` and `forward_backward` have the record model's 98,304 tokens of width 512 and its vocabulary of 8192; the
other cases end in tokens x width x vocabulary. All are softcapped but those that end in `_uncapped`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, compiled, main, on_inputs
from pgolf.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

SOFTCAP = 30.0
EXACT_TOKENS = 4096  # float64 logits of more than these would not fit
Tensor = torch.Tensor


def build(
    backward: bool, tokens: int, width: int, vocabulary: int, softcap: float | None, device: torch.device, quick: bool
) -> Case:
    if quick or device.type != "cuda":
        tokens, vocabulary = -(-tokens // 256), vocabulary // 16
    # A trained model's: logits of some units, targets likelier than others.
    table = torch.randn(vocabulary, width, device=device).bfloat16()
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    h = (0.1 * torch.randn(tokens, width, device=device) + 0.01 * table[targets]).bfloat16()
    inputs, one = (h, table), torch.ones((), device=device)

    def plain(h: Tensor, table: Tensor, targets: Tensor = targets) -> Tensor:
        return linear_cross_entropy_reference(h, table, targets, softcap)

    def provider(op: Callable[[Tensor, Tensor], Tensor], compiles: bool = False) -> Function:
        run = compiled(op, device) if compiles else op
        return on_inputs(run, inputs, one, backward=backward)

    def exact() -> tuple[Tensor, ...]:
        double = table.detach().double().requires_grad_()
        total, gradients = torch.zeros((), device=device, dtype=torch.float64), []
        double.grad = torch.zeros_like(double)
        for rows, part in zip(h.detach().split(EXACT_TOKENS), targets.split(EXACT_TOKENS), strict=True):
            leaf = rows.double().requires_grad_()
            loss = plain(leaf, double, part) * (part.numel() / tokens)
            loss.backward()
            total += loss.detach()
            gradients.append(leaf.grad)
        return (total, torch.cat(gradients), double.grad) if backward else (total,)

    def ours(**options: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, table: linear_cross_entropy(h, table, targets, softcap, **options)

    providers = {
        "eager": lambda: provider(plain),
        "compile": lambda: provider(plain, compiles=True),
        "liger": lambda: provider(_liger(targets, softcap)),
        "pgolf": lambda: provider(ours()),
        "pgolf_chunks": lambda: provider(ours(chunk_tokens=-(-tokens // 4))),
    }
    factor = 3 if backward else 1
    return Case(providers, exact, factor * (h.nbytes + table.nbytes), factor * 2 * tokens * width * vocabulary)


def _liger(targets: Tensor, softcap: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(h: Tensor, table: Tensor) -> Tensor:
        result = liger_fused_linear_cross_entropy(h, table, targets, softcap=softcap)
        return result if isinstance(result, Tensor) else result[0]

    return loss


SHAPES = {
    "": (98_304, 512, 8192, SOFTCAP),
    "_16384x768x50304": (16_384, 768, 50_304, SOFTCAP),
    "_16384x768x50304_uncapped": (16_384, 768, 50_304, None),
    "_32768x768x50304": (32_768, 768, 50_304, SOFTCAP),
    "_8192x2048x131072": (8192, 2048, 131_072, SOFTCAP),
}
CASES: dict[str, Builder] = {
    f"forward{'_backward' * backward}{name}": partial(build, backward, *shape)
    for name, shape in SHAPES.items()
    for backward in (False, True)
    if backward or not name
}
TUNING = {
    "loss": Tuning(CASES["forward"], dict(columns_per_warp=(256, 512, 1024, 2048))),
    "gradient": Tuning(CASES["forward_backward"], dict(columns_per_warp=(256, 512, 1024, 2048))),
    "blocks": Tuning(
        CASES["forward_backward_32768x768x50304"],
        dict(columns_per_warp=(256, 512, 1024), block=(2048, 4096, 8192, 16_384)),
    ),
}

if __name__ == "__main__":
    sys.exit(main({"linear_cross_entropy": CASES}, __doc__.splitlines()[0]))
