"""Training of the base weights, by SGD, on documents that are completely scored."""

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
    """Train all base weights by SGD, with momentum from zero; yield after every step.

    Args:
        text: int64 tokens of the scored documents, joined, on the CPU.
        steps: the schedule of all ranks.
    """
    parameters = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.SGD(parameters, lr=config.global_ttt_lr, momentum=config.global_ttt_momentum)
    for step in steps:
        optimizer.param_groups[0]["lr"] = step.rate
        optimizer.zero_grad()
        total = sum(stop - start for rows in step.rows for start, stop in rows)
        if step.rows[rank]:  # each token of the step has the same weight
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
    """Return the summed nats of rows of ``text`` in one packed stream: inputs [start, stop), targets one later.

    A row has attention segments as in training if global_ttt_respect_doc_boundaries is set. Otherwise every
    eval_seq_len tokens are a segment and a sequence of their own.
    """
    device = model.qo_bank.device
    inputs, targets = (torch.cat([text[start + s : stop + s] for start, stop in rows]) for s in (0, 1))
    starts = [0, *accumulate(stop - start for start, stop in rows)]
    if config.global_ttt_respect_doc_boundaries:
        boundaries = [
            segment_boundaries(text[start:stop], config.eval_seq_len) + low
            for (start, stop), low in zip(rows, starts, strict=False)
        ]
        segments = torch.cat(boundaries)
        sequences = torch.tensor(starts, dtype=torch.int32)
    else:
        segments = sequences = torch.arange(0, inputs.numel() + 1, config.eval_seq_len, dtype=torch.int32)
    inputs, targets, segments, sequences = (to_device(part, device) for part in (inputs, targets, segments, sequences))
    return model.token_losses(
        inputs[None], targets[None], segments, config.eval_seq_len, sequences=sequences, reduction="sum"
    )


def _sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum all gradients over ranks in one collective; a rank without gradients adds zeros."""
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.flatten().float() for piece in pieces])
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)
