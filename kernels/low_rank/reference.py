"""The reference of `low_rank` in plain PyTorch, and the named tuple that its functions return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..common.operators import traced

Tensor = torch.Tensor


class LowRank(NamedTuple):
    """What `low_rank` returns."""

    y: Tensor
    x: Tensor  # the argument; pass it to later readers


def low_rank_reference(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor | None,
    residual: Tensor | None,
    scale: float,
    parts: Sequence[int],
    width: int,
) -> LowRank:
    """Compute `low_rank` in plain PyTorch on groups padded to the longest one, or to T rows each if traced."""
    groups, rank = A.size(0), B.size(2)
    if offsets is None:
        rows = x.reshape(groups, -1, x.size(-1))
    else:
        flat = x.reshape(-1, x.size(-1))
        bounds = offsets.long().clamp(0, flat.size(0))
        tokens = torch.arange(flat.size(0), device=x.device)
        starts, ends = bounds[:-1], bounds[1:]
        longest = flat.size(0) if traced((x, offsets)) else max(int((ends - starts).max()), 0)
        places = starts[:, None] + torch.arange(longest, device=x.device)
        valid = (places < ends[:, None])[:, :, None]
        rows = torch.where(valid, flat[places.clamp(max=max(flat.size(0) - 1, 0))], 0) if longest else flat[places]
    h = torch.bmm(rows, A.mT)
    pairs = zip(h.split(rank, dim=2), B.split(list(parts), dim=1), strict=True)
    y = torch.cat([scale * torch.bmm(hidden, b.mT) for hidden, b in pairs], dim=2)
    y = F.pad(y, (0, width - y.size(2)))
    if offsets is not None:
        group = torch.searchsorted(bounds, tokens, right=True) - 1
        inside, group = ((group >= 0) & (group < groups))[:, None], group.clamp(0, groups - 1)
        if longest:
            y = torch.where(inside, y[group, (tokens - starts[group]).clamp(0, longest - 1)], 0)
        else:  # no group has a row
            y = y.new_zeros(flat.size(0), width) + 0 * y.sum()
    y = y.reshape(*x.shape[:-1], width)
    return LowRank(y if residual is None else residual + y, x)
