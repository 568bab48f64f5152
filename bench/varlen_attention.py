"""Variable-length causal attention with grouped heads, bf16: ``python -m bench.varlen_attention``.

The cases `forward` and `forward_backward` are the record model's: 98,304 tokens, 8 query and 4 key heads of width 64,
documents of log-normal length (median 400, cut at 2048). `long` has segments of 8192 tokens, `wide` heads of width 128,
`widest` of 256. The cases of `sequence` are one of 32,768 tokens with 16 query and 4 key heads; with a `window` a token
attends to 1,024. `eager` is PyTorch's varlen attention (FlashAttention-2) on a GPU, `fa3` and `fa4` later ones where
installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

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


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor | None, cu_seqlens: Tensor, left: int
) -> tuple[Tensor, ...]:
    """o, and with ``do`` the gradients of q, k and v, in q's dtype; a block of queries holds its scores at a time."""
    scale, group, bounds = q.size(2) ** -0.5, q.size(1) // k.size(1), cu_seqlens.tolist()
    o, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    blocks = [(low, at, min(at + 1024, high)) for low, high in pairwise(bounds) for at in range(low, high, 1024)]
    for (low, at, end), head in product(blocks, range(k.size(1))):
        begin = low if left < 0 else max(low, at - left)
        rows, keys, heads = slice(at, end), slice(begin, end), slice(head * group, (head + 1) * group)
        query, key, value = q[rows, heads].transpose(0, 1), k[keys, head], v[keys, head]
        places = torch.arange(begin, end, device=q.device)
        ahead = places - places[at - begin :, None]
        hidden = (ahead > 0) | (ahead < -left if left >= 0 else False)
        p = (scale * query @ key.T).masked_fill(hidden, -torch.inf).softmax(-1)
        out = p @ value
        o[rows, heads] = out.transpose(0, 1)
        if do is None:
            continue
        gradient = do[rows, heads].transpose(0, 1)
        ds = scale * p * (gradient @ value.T - (gradient * out).sum(-1, keepdim=True))
        dq[rows, heads] = (ds @ key).transpose(0, 1)
        dk[keys, head] += torch.einsum("hij,hid->jd", ds, query)
        dv[keys, head] += torch.einsum("hij,hid->jd", p, gradient)
    return (o,) if do is None else (o, dq, dk, dv)


def build(
    backward: bool,
    tokens: int,
    segment: int,
    heads: int,
    key_heads: int,
    width: int,
    device: torch.device,
    quick: bool,
    window: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """A case with segments of ``segment`` tokens, or documents where it is 0; a ``window`` has so many keys, 0 all."""
    if quick or device.type != "cuda":
        tokens, segment, window = tokens // 128, segment // 128, window // 128
    left = window - 1
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

    def ours(attention: Callable) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: attention(q, k, v, cu_seqlens, longest, window_size=(left, -1))

    def eager() -> Function:
        if device.type != "cuda" or dtype == torch.float32:
            return provider(ours(varlen_attention_reference))
        return provider(lambda q, k, v: flash_attention(q, k, v, cu_seqlens, longest, window_size=(left, 0)))

    def flash(module: str) -> Function:
        function = _flash(module)
        settings = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest)
        return provider(lambda q, k, v: _first(function(q, k, v, **settings, causal=True, window_size=(left, 0))))

    def exact() -> tuple[Tensor, ...]:
        double = (x.detach().double() for x in inputs)
        return exact_attention(*double, do.double() if backward else None, cu_seqlens.unique_consecutive(), left)

    providers = {
        "eager": eager,
        "fa3": partial(flash, "flash_attn_interface"),
        "fa4": partial(flash, "flash_attn.cute"),
        "pgolf": lambda: provider(ours(varlen_attention)),
    }
    forward_bytes = 2 * q.nbytes + k.nbytes + v.nbytes
    backward_bytes = 4 * q.nbytes + 2 * (k.nbytes + v.nbytes)  # q, o, do read, dq written
    lengths = cu_seqlens.diff().double()
    seen = lengths.clamp(max=window or torch.inf)  # a window's keys, of which its first queries have fewer
    pairs = int((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())
    operations = (4 + 10 * backward) * pairs * heads * width
    return Case(providers, exact, forward_bytes + backward * backward_bytes, operations)


SHAPES: dict[str, tuple[int, ...]] = {  # tokens, tokens of a segment, H, K, D
    "": (98_304, 0, 8, 4, 64),
    "_long": (32_768, 8192, 8, 4, 64),
    "_wide": (98_304, 0, 4, 2, 128),
    "_widest": (98_304, 0, 2, 1, 256),
    "_sequence": (32_768, 32_768, 16, 4, 64),
    "_sequence_wide": (32_768, 32_768, 16, 4, 128),
}
CASES: dict[str, Builder] = {
    f"forward{'_backward' * backward}{name}": partial(build, backward, *shape)
    for name, shape in SHAPES.items()
    for backward in (False, True)
}
CASES |= {
    f"forward{'_backward' * backward}{name}_window": partial(build, backward, *SHAPES[name], window=1024)
    for name in ("_sequence", "_sequence_wide")
    for backward in (False, True)
}
_CHOICES = dict(
    rows=(32, 64, 128, 256), heads=(1, 2), keys=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4), maxnreg=(128, 168, 255)
)
_MAXIMUM, _K_IN_REGISTERS = dict(plain=(0, 1)), dict(held=(0, 1))
TUNING = {
    f"{entry}{name}": Tuning(CASES[f"{case}{name}"], _CHOICES | switch)
    for name in ("", "_wide", "_widest")
    for entry, case, switch in (
        ("forward", "forward", _MAXIMUM),
        ("queries", "forward_backward", {}),
        ("keys", "forward_backward", _K_IN_REGISTERS),
    )
}
TUNING |= {
    name: Tuning(partial(build, True, 16_384, 512, *heads, dtype=torch.float32), _CHOICES | _MAXIMUM)
    for name, heads in (("float32", (8, 4, 64)), ("float32_widest", (2, 1, 256)))
}


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
