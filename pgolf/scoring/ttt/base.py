"""The training of the base weights on documents that are scored as a whole: SGD on the training step's own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.common.tensors import to_device
from pgolf.config import RunConfig
from pgolf.data.loader import segment_boundaries
from pgolf.model.gpt import GPT
from pgolf.scoring.ttt.plan import SgdStep


def train_base(
    model: GPT, config: RunConfig, text: Tensor, steps: list[SgdStep], rank: int, world_size: int
) -> Iterator[None]:
    """SGD with fresh momentum on all weights of the base; yields after every step.

    text: int64 tokens of the scored documents, one after the other, on the CPU.
    """
    parameters = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.SGD(parameters, lr=config.global_ttt_lr, momentum=config.global_ttt_momentum)
    for step in steps:
        optimizer.param_groups[0]["lr"] = step.rate
        optimizer.zero_grad()
        total = sum(stop - start for rows in step.rows for start, stop in rows)
        if step.rows[rank]:  # every token of the step weighs the same
            (rows_loss(model, config, text, step.rows[rank]) / total).backward()
        if world_size > 1:
            _sum_gradients(parameters)
        if config.global_ttt_grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, config.global_ttt_grad_clip)
        optimizer.step()
        yield
    optimizer.zero_grad()
    model.requires_grad_(False)


def rows_loss(model: GPT, config: RunConfig, text: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """Summed nats of rows of ``text``, tokens [start, stop) and the target behind them, in one packed stream.

    A row is cut into attention segments as training's are, or every eval_seq_len tokens into rows of their own.
    """
    device = model.qo_bank.device
    inputs, targets = (torch.cat([text[start + s : stop + s] for start, stop in rows]) for s in (0, 1))
    starts = [0, *accumulate(stop - start for start, stop in rows)]
    if config.global_ttt_respect_doc_boundaries:
        own = [
            segment_boundaries(text[start:stop], config.eval_seq_len) + low
            for (start, stop), low in zip(rows, starts, strict=False)
        ]
        segments = torch.cat(own)
        sequences = torch.tensor(starts, dtype=torch.int32)
    else:
        segments = sequences = torch.arange(0, inputs.numel() + 1, config.eval_seq_len, dtype=torch.int32)
    inputs, targets, segments, sequences = (to_device(part, device) for part in (inputs, targets, segments, sequences))
    return model.token_losses(
        inputs[None], targets[None], segments, config.eval_seq_len, sequences=sequences, reduction="sum"
    )


def _sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Add up all gradients over the ranks in one call; a rank without any contributes zeros."""
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.flatten().float() for piece in pieces])
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)
