"""Variable-length causal attention with grouped heads, bf16: ``python -m bench.varlen_attention``.

The cases `forward` and `forward_backward` are the record model's: 98,304 tokens, 8 query and 4 key heads of width 64,
documents of log-normal length (median 400, cut at 2048). `long` has segments of 8192 tokens, `wide` heads of width 128.
`eager` is PyTorch's varlen attention (FlashAttention-2) on a GPU, `fa3` and `fa4` later ones where installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from bench.harness import Builder, Case, Function, Tuning, main
from pgolf.kernels.gated_attention import flash_attention
from pgolf.kernels.varlen_attention import varlen_attention, varlen_attention_reference

Tensor = torch.Tensor
MEDIAN_TOKENS, SPREAD, LONGEST, BOUNDARIES = 400, 1.2, 2048, 192


def document_boundaries(tokens: int, device: torch.device) -> Tensor:
    """cu_seqlens of documents packed as the loader does, with empty segments at the end."""
    generator = torch.Generator().manual_seed(1)
    bounds = [0]
    while bounds[-1] < tokens:
        length = int(MEDIAN_TOKENS * torch.exp(SPREAD * torch.randn((), generator=generator))) + 2
        while length > 0 and bounds[-1] < tokens:
            piece = min(length, LONGEST, tokens - bounds[-1])
            bounds.append(bounds[-1] + piece)
            length -= piece
    if device.type == "cuda":
        bounds += [tokens] * (-len(bounds) % BOUNDARIES)
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """In q's dtype, segment by segment and head by head."""
    group, bounds, outs = q.size(1) // k.size(1), cu_seqlens.tolist(), []
    for low, high in zip(bounds, bounds[1:], strict=False):
        if low == high:
            continue
        later = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
        heads = []
        for head in range(q.size(1)):
            scores = q[low:high, head] @ k[low:high, head // group].T * q.size(2) ** -0.5
            heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v[low:high, head // group])
        outs.append(torch.stack(heads, 1))
    return torch.cat(outs)


def build(
    backward: bool,
    tokens: int,
    segment: int,
    heads: int,
    key_heads: int,
    width: int,
    device: torch.device,
    quick: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """A case with segments of ``segment`` tokens, or documents where it is 0."""
    if quick or device.type != "cuda":
        tokens, segment = tokens // 128, segment // 128
    cu_seqlens = document_boundaries(tokens, device)
    if segment:
        cu_seqlens = torch.arange(0, tokens + 1, segment, dtype=torch.int32, device=device)
    longest = min(segment or LONGEST, tokens)
    q, do = (torch.randn(tokens, heads, width, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens, key_heads, width, device=device).to(dtype) for _ in range(2))
    inputs = (q, k, v)

    def provider(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
        if not backward:
            return partial(torch.no_grad()(attention), *inputs)
        leaves = tuple(x.requires_grad_() for x in inputs)

        def both() -> tuple[Tensor, ...]:
            o = attention(*leaves)
            return o.detach(), *torch.autograd.grad(o, leaves, do)

        return both

    def eager() -> Function:
        if device.type != "cuda" or dtype == torch.float32:
            return provider(lambda q, k, v: varlen_attention_reference(q, k, v, cu_seqlens, longest))
        return provider(lambda q, k, v: flash_attention(q, k, v, cu_seqlens, longest))

    def flash(module: str) -> Function:
        function = _flash(module)
        settings = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest)
        return provider(lambda q, k, v: _first(function(q, k, v, **settings, causal=True)))

    def exact() -> tuple[Tensor, ...]:
        double = [x.detach().double().requires_grad_() for x in inputs]
        results = []
        bounds = cu_seqlens.unique_consecutive().tolist()
        for low, high in zip(bounds, bounds[1:], strict=False):  # a graph for each: the scores of all are too many
            part = [x[low:high] for x in double]
            o = exact_attention(*part, torch.tensor([0, high - low]))
            gradients = torch.autograd.grad(o, part, do[low:high].double()) if backward else ()
            results.append((o.detach(), *gradients))
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    providers = {
        "eager": eager,
        "fa3": partial(flash, "flash_attn_interface"),
        "fa4": partial(flash, "flash_attn.cute"),
        "pgolf": lambda: provider(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, longest)),
    }
    forward_bytes = 2 * q.nbytes + k.nbytes + v.nbytes
    backward_bytes = 4 * q.nbytes + 2 * (k.nbytes + v.nbytes)  # q, o, do read, dq written
    lengths = cu_seqlens.diff().double()
    pairs = int((lengths * (lengths + 1) / 2).sum())
    operations = (4 + 10 * backward) * pairs * heads * width
    return Case(providers, exact, forward_bytes + backward * backward_bytes, operations)


SHAPES = {"": (98_304, 0, 8, 4, 64), "_long": (32_768, 8192, 8, 4, 64), "_wide": (98_304, 0, 4, 2, 128)}
CASES: dict[str, Builder] = {
    f"forward{'_backward' * backward}{name}": partial(build, backward, *shape)
    for name, shape in SHAPES.items()
    for backward in (False, True)
}
_CHOICES = dict(
    rows=(32, 64, 128, 256), heads=(1, 2), keys=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4), maxnreg=(128, 168, 255)
)
_MAXIMUM, _K_IN_REGISTERS = dict(plain=(0, 1)), dict(held=(0, 1))
TUNING = {
    f"{entry}{name}": Tuning(CASES[f"{case}{name}"], _CHOICES | switch)
    for name in ("", "_wide")
    for entry, case, switch in (
        ("forward", "forward", _MAXIMUM),
        ("queries", "forward_backward", {}),
        ("keys", "forward_backward", _K_IN_REGISTERS),
    )
} | {"float32": Tuning(partial(build, True, 16_384, 512, 8, 4, 64, dtype=torch.float32), _CHOICES | _MAXIMUM)}


def _flash(module: str) -> Callable:
    """The varlen function of FlashAttention-3 or -4."""
    if module == "flash_attn_interface":
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn.cute import flash_attn_varlen_func
    return flash_attn_varlen_func


def _first(results: Tensor | tuple) -> Tensor:
    return results if isinstance(results, torch.Tensor) else results[0]


if __name__ == "__main__":
    sys.exit(main({"varlen_attention": CASES}, __doc__.splitlines()[0]))
