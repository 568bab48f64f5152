"""Compute the bytes of a packed artifact without coding it, from the models of `pgolf.artifact.entropy`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact.entropy import (
    CLASSES,
    ESCAPE,
    LANES,
    PRECISION,
    PRIOR,
    PRIOR_ENERGY,
    REACH,
    REFRESH,
    Columns,
    frequencies,
)
from pgolf.artifact.packed_format import HEAD, coded, side_block
from pgolf.artifact.quantized import CODES, QuantizedModel, is_trellised

BITS_OF_A_STATE = 8  # mean bits in a coder's last state, which has 16 bits above `LOWEST`
LOSS = 1.2e-3  # bits a code that states of 32 bits cost over the ideal; measured: 0.8e-3 to 1.3e-3


class PackedSize(NamedTuple):
    """The bytes of a packed artifact: of its codes with their coders' states, and of all else."""

    codes: int
    side: int

    @property
    def total(self) -> int:
        """Return the bytes of the whole file."""
        return self.codes + self.side


def packed_size(quantized: QuantizedModel, device: torch.device, side: int | None = None) -> PackedSize:
    """Return how many bytes `pgolf.artifact.packed_format.pack` makes, within 3e-5 bytes a code and 300 bytes.

    Codes are not checked for being on a path of their trellis.

    Args:
        side: the bytes of all but codes, if known; at other steps the same model has some hundred more or fewer. None
            compresses them, which takes a few tenths of a second.
    """
    bits, widest, classes = 0.0, 0, {}
    for name in quantized.tensors:
        if name.endswith(CODES):
            widest = max(widest, quantized.tensors[name].size(1))
            trellised = is_trellised(quantized.meta[name.removesuffix(CODES)])
            found, row_class = code_bits(torch.from_numpy(coded(name, quantized)).to(device), trellised=trellised)
            bits += found
            classes[name] = row_class
    if side is None:
        side = HEAD.size + len(side_block(quantized, classes)[0])
    return PackedSize(round(4 * LANES + (bits - BITS_OF_A_STATE * min(LANES, widest)) / 8), side)


def code_bits(codes: Tensor, *, trellised: bool) -> tuple[float, np.ndarray]:
    """Return the bits that a matrix of codes [R, C] takes, escapes included, and the classes of its rows, int8 [R]."""
    device, first = codes.device, CLASSES[0]
    u = codes.to(torch.int64)
    squares = u * u
    mean = squares.double().mean(1).clamp_min(1e-9)
    row_class = torch.round(4 * mean.log2()).clamp(first, CLASSES[-1]).to(torch.int64)
    # `Columns.energy` before each block of `REFRESH` rows: the prior plus the sum over the blocks above.
    energy = squares * torch.from_numpy(Columns.weights).to(device)[row_class - first, None]
    blocks = -(-len(u) // REFRESH)
    energy = torch.nn.functional.pad(energy, (0, 0, 0, blocks * REFRESH - len(u))).view(blocks, REFRESH, -1).sum(1)
    energy = energy.cumsum(0) - energy + PRIOR_ENERGY
    rows = PRIOR + REFRESH * torch.arange(blocks, device=device)[:, None]
    thresholds = torch.from_numpy(Columns.thresholds).to(device)
    offset = torch.searchsorted(thresholds, energy // rows, right=True) - Columns.MOST
    offset = offset.repeat_interleave(REFRESH, 0)[: len(u)]
    model = (offset + row_class[:, None] - first).clamp(0, len(CLASSES) - 1)
    parity = u & 1 if trellised else torch.zeros_like(u)
    k = u - parity >> 1 if trellised else u
    symbol = torch.where(k.abs() < REACH, k, ESCAPE) + REACH
    lengths = torch.stack([_lengths(kind) for kind in ((1, 2) if trellised else (0,))]).to(device)
    bits = float(lengths[parity, model, symbol].double().sum()) + LOSS * u.numel()
    return bits, row_class.to(torch.int8).cpu().numpy()


def _lengths(kind: int) -> Tensor:
    """Return the bits of each symbol by class, float32 [classes, 2 REACH].

    The first is an escape, behind which the code follows in 16 bits; so is one without a frequency.
    """
    counts = torch.from_numpy(frequencies(kind).astype(np.int64))
    bits = PRECISION - counts.clamp_min(1).double().log2()
    bits[:, 0] += 16
    return torch.where(counts > 0, bits, bits[:, :1]).float()
