"""The partial key offset of `gated_attention`: unrotated dimensions of keys that come one token late, and its backward.

Token t of a segment, from 0, reads dimension c of its key from token t - late(t, c), with late = 1 for c >= 2 P and
t > 0, else 0: rotated dimensions and the first token's are its own.
"""

from __future__ import annotations

import torch

from ..common.compiling import jit, tl
from ..varlen_attention.segments import attention_parameters, tiles_of_size
from ..varlen_attention.triton import Prologue, through_prologue, tile_of

Tensor = torch.Tensor


@jit
def _offset_kernel(
    k,
    offset,
    tiles,
    k_t,
    k_h,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the offset keys of a tile of tokens and a head; tokens in no segment get zeros."""
    head = (tl.program_id(0) % K).to(tl.int64)
    start, length, first = tile_of(tiles, tl.program_id(0) // K)
    tokens, columns = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, D)[None, :]
    late = ((columns >= 2 * HALF) & (tokens > 0)).to(tl.int64)
    k += head * k_h + (start + tokens - late) * k_t + columns
    offset += ((start + tokens) * K + head) * D + columns
    tl.store(offset, tl.load(k, mask=tokens < length, other=0), mask=tokens < tl.abs(length))


@jit
def _offset_backward_kernel(
    doffset,
    k,
    dk,
    inverse_rms,
    cos,
    sin,
    tiles,
    k_t,
    k_h,
    dk_t,
    dk_h,
    T,
    period,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the gradient of the projection's keys, of a tile of tokens and a head; tokens in no segment get zeros."""
    head = (tl.program_id(0) % K).to(tl.int64)
    start, length, first = tile_of(tiles, tl.program_id(0) // K)
    rows = first + tl.arange(0, TOKENS)
    tokens, columns, inside = rows[:, None], tl.arange(0, D)[None, :], rows < length
    rest = columns >= 2 * HALF
    doffset += ((start + tokens) * K + head) * D + columns
    own = tl.load(doffset, mask=inside[:, None] & ((columns < 2 * HALF) | (tokens == 0)), other=0).to(tl.float32)
    g = own + tl.load(doffset + K * D, mask=rest & (tokens + 1 < length), other=0).to(tl.float32)
    k = tl.load(k + head * k_h + (start + tokens) * k_t + columns, mask=inside[:, None], other=0)
    inverse = tl.load(inverse_rms + (H + head) * T + start + rows, mask=inside, other=0)
    g, _ = through_prologue(g, 1.0, k, inverse, None, cos, sin, start + rows, inside, period, D, HALF)
    dk += head * dk_h + (start + tokens) * dk_t + columns
    tl.store(dk, tl.where(inside[:, None], g, 0).to(dk.dtype.element_ty), mask=tokens < tl.abs(length))


def _tiles(tiles: Tensor, k: Tensor, group: int) -> tuple[Tensor, int]:
    """Return the tiles of the size that the attention's backward has for keys, and the size."""
    size = attention_parameters("keys", k.dtype, k.size(2), group, k.device)[0]["keys"]
    return tiles_of_size(tiles, size, k, group), size


def offset_keys(k: Tensor, tiles: Tensor, half: int, group: int) -> Tensor:
    """Return the offset keys [T, K, D], contiguous, of keys k^ [T, K, D], whose heads are contiguous.

    ``tiles`` is the result of `attention_tiles`, ``half`` is P and ``group`` is H / K.
    """
    tokens, heads, width = k.shape
    offset = k.new_empty(tokens, heads, width)
    with torch.cuda.device_of(k):  # Triton launches on the current device
        tiles, size = _tiles(tiles, k, group)
        _offset_kernel[(tiles.size(0) * heads,)](
            k, offset, tiles, *k.stride()[:2], K=heads, D=width, HALF=half, TOKENS=size
        )
    return offset


def offset_keys_backward(doffset: Tensor, k: Tensor, dk: Tensor, tiles: Tensor, prologue: Prologue, group: int) -> None:
    """Write dk, the gradient of the prologue's input, from that of the offset keys, doffset [T, K, D], contiguous.

    k is what the prologue made of the input; its heads and those of dk are contiguous.
    """
    tokens, heads, width = k.shape
    inverse_rms, gain, cos, sin = prologue
    with torch.cuda.device_of(k):
        tiles, size = _tiles(tiles, k, group)
        _offset_backward_kernel[(tiles.size(0) * heads,)](
            doffset,
            k,
            dk,
            inverse_rms,
            cos,
            sin,
            tiles,
            *k.stride()[:2],
            *dk.stride()[:2],
            tokens,
            None if cos.size(0) == tokens else cos.size(0),
            H=gain.size(0),
            K=heads,
            D=width,
            HALF=cos.size(1),
            TOKENS=size,
        )
