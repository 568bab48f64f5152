"""`trellis_gptq` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .tables import predecessors

BLOCK_COLUMNS = 32  # columns that are coded before one product corrects all later columns


def trellis_gptq_reference(
    weight: Tensor,
    factor: Tensor,
    row_step: Tensor,
    column_step: Tensor,
    *,
    states: int = 8,
    path_length: int = 256,
    shrink: Tensor,
) -> Tensor:
    """Compute `trellis_gptq` in plain PyTorch, with the same arguments."""

    def code_block(work: Tensor, factor: Tensor, column_step: Tensor, codes: Tensor) -> Tensor:
        errors = torch.empty_like(work)
        for j in range(work.size(1)):
            step = row_step * column_step[:, j, None]
            u = nearest_path(work[:, j] * (shrink / step), states, path_length)
            codes[:, j] = u
            errors[:, j] = (work[:, j] - u * step) / factor[:, j, j, None]
            work[:, j + 1 :] -= factor[:, j, j + 1 :, None] * errors[:, j, None]
        return errors

    return by_blocks(weight, factor, column_step, code_block)


def by_blocks(
    weight: Tensor, factor: Tensor, column_step: Tensor, code_block: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the codes of all columns, which ``code_block`` codes block by block.

    ``code_block(work, factor, column_step, codes)`` overwrites work [B, columns, R], fills codes [B, columns, R] and
    returns the errors [B, columns, R] that the columns after the block compensate.
    """
    work = weight.transpose(1, 2).contiguous()
    columns = work.size(1)
    codes = torch.empty_like(work, dtype=torch.int16)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        within = factor[:, start:stop, start:stop].contiguous()
        errors = code_block(work[:, start:stop], within, column_step[:, start:stop], codes[:, start:stop])
        if stop < columns:
            work[:, stop:] -= factor[:, start:stop, stop:].transpose(1, 2) @ errors
    return codes.transpose(1, 2).contiguous()


def nearest_path(x: Tensor, states: int, path_length: int) -> Tensor:
    """Return the path of the trellis down the rows that is nearest to x [B, R] in squared distance: codes as float."""
    if states == 1:
        return torch.floor(x + 0.5)
    B, R = x.shape
    paths = -(-R // path_length)
    length = R if paths == 1 else path_length
    lanes, shortest = B * paths, R - (paths - 1) * length
    padded = torch.nn.functional.pad(x, (0, paths * length - R)).view(lanes, length).T
    table = torch.tensor(predecessors(states), device=x.device)
    before, label = table[:, ::2].reshape(-1), table[:, 1::2].reshape(-1)
    # The nearest code to each target of each residue modulo 4, and their squared distances.
    rests = torch.arange(4, device=x.device, dtype=x.dtype)
    codes = 4 * torch.floor((padded[..., None] - rests) * 0.25 + 0.5) + rests
    distances = (padded[..., None] - codes).square()[..., label].view(length, lanes, states, 2)
    cost = torch.full((lanes, states), 1e30, device=x.device)
    cost[:, 0] = 0
    second = torch.empty(length, lanes, states, dtype=torch.bool, device=x.device)
    whole = torch.arange(lanes, device=x.device) % paths != paths - 1  # the last path of a column may be shorter
    for row in range(length):
        first, other = (cost[:, before].view(lanes, states, 2) + distances[row]).unbind(-1)
        torch.lt(other, first, out=second[row])
        new = torch.minimum(first, other)
        cost = new if row < shortest else torch.where(whole[:, None], new, cost)
    state = cost.argmin(1)
    taken = torch.empty(length, lanes, dtype=torch.int64, device=x.device)
    offset = torch.arange(lanes, device=x.device) * states
    for row in range(length - 1, -1, -1):
        taken[row] = 2 * state + second[row].view(-1)[offset + state]
        earlier = before[taken[row]]
        state = earlier if row < shortest else torch.where(whole, earlier, state)
    u = codes.gather(2, label[taken][..., None])[..., 0]
    return u.T.reshape(B, paths * length)[:, :R]
