"""Packing of codes into words for units of 8 rows and 8 columns, and of factors into the kernels' layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrix import LowRankFactors, PackedFactors, QuantizedMatrix, as_matrix, check_values, require

BITS = (4, 6, 7, 8)
# First bits of the fields of a word; a field that passes the last bit continues at the first. With 4 bits a word is a
# row of 8 codes. With 6 bits three words are two rows: each has five codes and, at REST, two bits of the 16th code.
# With 7 bits the upper bits of the codes lie in a plane of their own.
NIBBLES, SIXES, REST = (12, 16, 20, 24, 28, 0, 4, 8), (11, 17, 23, 31, 5), 29


def pack(
    codes: Tensor,
    bits: int,
    scale: Tensor,
    zero: Tensor | None = None,
    low_rank: LowRankFactors | tuple[Tensor, Tensor] | None = None,
) -> QuantizedMatrix:
    """Pack codes into planes, and bring the factors of a correction into the kernels' layout.

    Packing reads the values, which waits for a GPU: keep it off hot paths.

    Args:
        codes: int8 in [-2^(bits-1), 2^(bits-1)) or uint8 in [0, 2^bits), [rows, columns].
        bits: 4, 6, 7 or 8. With 8 bits contiguous codes are taken without a copy.
        scale: float16, bfloat16 or float32, of a magnitude below 2^100, [rows] or [rows, groups]. A group is
            ``columns / groups`` columns. With several groups that must be a multiple of 16.
        zero: zeros in the dtype and shape of scale; None stands for 0.
        low_rank: factors of rank 1 to 8, quantised, or floats (A [rows, rank], B [rank, columns]) of one dtype. They
            are stored as float32 values.

    Raises ValueError or TypeError that names the wrong argument, also where a number is not finite.
    """
    require(bits in BITS, "bits", bits, "4, 6, 7 or 8")
    q = as_matrix(codes, scale, zero, low_rank)
    check_values(q)
    if codes.numel() and bits < 8:
        low, high = (int(end) for end in codes.aminmax())
        least = -(1 << bits - 1) if q.signed else 0
        inside = least <= low and high < least + (1 << bits)
        require(inside, "codes", f"{low} to {high}", f"in [{least}, {least + (1 << bits)}) for {bits} bits")
    if low_rank is not None:
        q = q._replace(low_rank=packed_factors(q))
    whole = scale.dtype != torch.float32 and (zero is None or bool(((zero == zero.round()) & (zero.abs() < 256)).all()))
    return q._replace(bits=bits, planes=_pack_planes(codes, bits), whole=whole)


def unpack(q: QuantizedMatrix) -> Tensor:
    """Return the codes of a packed matrix, int8 or uint8 [rows, columns]."""
    if q.bits == 8:
        return q.planes
    down, across = -(-q.rows // 8), -(-q.columns // 8)
    words = q.planes.long() & 0xFFFFFFFF
    if q.bits == 4:
        codes = _split(words.view(2, -1, 4).transpose(0, 1), NIBBLES, 15)
    else:
        sixes, tops = words[: 12 * down * across].view(3, -1, 4).permute(1, 2, 0), words[12 * down * across :]
        rest = _split(sixes, (REST,), 3)[..., 0] << 2 * torch.arange(3, device=words.device)
        codes = torch.cat([_split(sixes, SIXES, 63).flatten(2), rest.sum(2, keepdim=True)], 2)
        if q.bits == 7:
            codes = codes.flatten(1) + (_split(tops.view(-1, 2), range(32), 1).flatten(1) << 6)
    codes = codes.reshape(down, across, 8, 8).transpose(1, 2).reshape(8 * down, 8 * across)[: q.rows, : q.columns]
    return (codes - (1 << q.bits - 1)).to(torch.int8) if q.signed else codes.to(torch.uint8)


def _pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Return the int32 words of codes, or codes of 8 bits themselves."""
    if bits == 8:
        return codes.contiguous()
    unsigned = codes.long() + (1 << bits - 1 if codes.dtype == torch.int8 else 0)
    unsigned = F.pad(unsigned, (0, -codes.size(1) % 8, 0, -codes.size(0) % 8))
    down, across = unsigned.size(0) // 8, unsigned.size(1) // 8
    units = unsigned.view(down, 8, across, 8).transpose(1, 2).reshape(down * across, 8, 8)
    if bits == 4:
        return _join(units, NIBBLES).reshape(-1, 2, 4).transpose(0, 1).flatten()
    pairs = (units & 63).reshape(-1, 4, 16)
    rest = (pairs[..., 15:] >> 2 * torch.arange(3, device=codes.device)) & 3
    fields = torch.cat([pairs[..., :15].unflatten(2, (3, 5)), rest[..., None]], 3)
    words = _join(fields, (*SIXES, REST)).permute(2, 0, 1).flatten()
    return words if bits == 6 else torch.cat([words, _join((units >> 6).reshape(-1, 2, 32), range(32)).flatten()])


def _join(fields: Tensor, places: Sequence[int]) -> Tensor:
    """Return int32 words in which the last dimension's fields begin at these places."""
    words = (fields << torch.tensor(list(places), device=fields.device)).sum(-1)
    return ((words & 0xFFFFFFFF) + (words >> 32)).to(torch.int32)


def _split(words: Tensor, places: Sequence[int], mask: int) -> Tensor:
    """Return the fields that begin at these places of int64 words."""
    return ((words | words << 32)[..., None] >> torch.tensor(list(places), device=words.device)) & mask


def packed_factors(q: QuantizedMatrix) -> PackedFactors:
    """Return the factors, given in any form, in the layout that kernels read."""
    if isinstance(q.low_rank, PackedFactors):
        return q.low_rank
    A, B = (factor.float() for factor in factor_values(q))
    more = -A.size(1) % 4
    B = F.pad(B, (0, -q.columns % 256, 0, more)).view(A.size(1) + more, -1, 32, 2, 4)
    return PackedFactors(F.pad(A, (0, more, 0, -q.rows % 8)).contiguous(), B.permute(1, 0, 3, 2, 4).contiguous())


def factor_values(q: QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """Return A and B as floats, from factors in any form."""
    assert q.low_rank is not None
    if isinstance(q.low_rank, PackedFactors):
        A, B = q.low_rank
        return A[: q.rows], B.permute(1, 0, 3, 2, 4).flatten(1)[:, : q.columns]
    if len(q.low_rank) == 2:
        return q.low_rank
    qA, sA, qB, sB = q.low_rank
    return scaled_codes(qA, sA.reshape(-1)), scaled_codes(qB, sB)


def scaled_codes(q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Return (codes - zero) · scale in float32; every scale applies to an equal run of the flattened codes."""
    runs = q.float().reshape(scale.numel(), -1 if q.numel() else 0)
    runs = runs if zero is None else runs - zero.reshape(-1, 1).float()
    return (runs * scale.reshape(-1, 1).float()).reshape(q.shape)
