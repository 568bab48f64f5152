"""Loss and bits per byte of a validation stream by a fixed model: in packed rows, or with a sliding window.

Each target is scored exactly once, with a context as in training: the earlier tokens of its document, at most
eval_seq_len. Sums are float64 on the device and read once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.common.progress import Progress
from pgolf.common.tensors import to_device
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter, bits_per_byte
from pgolf.data.loader import SEGMENT_ENTRIES, segment_boundaries
from pgolf.model.gpt import GPT, evaluation_mode
from pgolf.model.graphs import Graphs, uses_graphs
from pgolf.scoring.stream import PUBLIC_RANKS, check_stream, find_documents

WIDTH_MULTIPLE = 64  # the width of dense rows is that of the longest window, rounded up to a multiple


class Row(NamedTuple):
    """The model's input in one pass: one packed row, or dense rows."""

    inputs: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]
    counted: Tensor  # bool [B, T], targets to score
    byte_counts: Tensor  # int64 [B, T], bytes of the targets
    cu_seqlens: Tensor | None  # int32, a multiple of SEGMENT_ENTRIES; None: dense rows
    places: Tensor  # int64 [B, T], the inputs' places in the stream


Record = Callable[[Row, Tensor], None]  # called with a row, on the CPU, and the nats of its targets


@torch.no_grad()
def evaluate_packed(
    model: GPT,
    config: RunConfig,
    tokens: Tensor,
    byte_table: ByteCounter,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    record: Record | None = None,
) -> tuple[float, float]:
    """Score a stream in rows [1, val_batch_tokens / 8]; return the mean loss in nats and the bits per byte.

    Attention segments begin at every BOS and, within a document, every eval_seq_len tokens, as in training. Each rank
    takes a contiguous part of the rows. The last row is padded; padding is not scored.

    ``eval_public_truncation`` leaves out what the public evaluation leaves out: the tokens after the last whole window,
    and the windows of a rank that do not fill a row.

    Args:
        model: is scored in its present loop state (`looping_active`). Its training flag is restored.
        tokens: 1-D token ids of any integer dtype.
        byte_table: counts the bytes of the stream's targets.
        progress: wraps the iterable of rows, as `pgolf.common.progress.progress` does; None shows nothing.
        record: is called with every row and its losses, before the next row is scored.

    Raises ValueError if the stream has no targets, a row is shorter than a window, or `check_stream` refuses.
    """
    tokens = check_stream(tokens, config, byte_table, world_size)
    width = config.val_batch_tokens // PUBLIC_RANKS // config.eval_seq_len * config.eval_seq_len
    if width == 0:
        raise ValueError(
            f"an evaluation row (val_batch_tokens / {PUBLIC_RANKS} = {config.val_batch_tokens // PUBLIC_RANKS}) "
            f"must hold a window of eval_seq_len {config.eval_seq_len} tokens: raise val_batch_tokens"
        )
    spans = _row_spans(tokens.numel() - 1, width, config, rank, world_size)
    width = min(width, tokens.numel() - 1)  # a split shorter than a row needs no padding
    rows = (_packed_row(tokens, byte_table, start, stop, width, config.eval_seq_len) for start, stop in spans)
    return _score(model, config, rows, len(spans), world_size, progress, record)


@torch.no_grad()
def evaluate_sliding(
    model: GPT,
    config: RunConfig,
    tokens: Tensor,
    byte_table: ByteCounter,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    record: Record | None = None,
) -> tuple[float, float]:
    """Score with windows of eval_seq_len tokens that move by eval_stride; return loss and bits per byte.

    A window stays within one document. The first scores all its targets, each later one its last eval_stride. Every
    target after the first window therefore has a context of more than eval_seq_len - eval_stride tokens. Windows of
    similar length are batched as dense rows, as many as fit in a row of `evaluate_packed`, and batches are dealt to the
    ranks in turn.

    Arguments, results and errors are those of `evaluate_packed`.
    """
    tokens = check_stream(tokens, config, byte_table, world_size)
    if config.eval_stride > config.eval_seq_len:
        raise ValueError(
            f"eval_stride {config.eval_stride} is longer than the window, eval_seq_len {config.eval_seq_len}: "
            "targets between windows would not be scored"
        )
    windows = _sliding_windows(tokens, config.eval_seq_len, config.eval_stride)
    size = max(1, config.val_batch_tokens // PUBLIC_RANKS // config.eval_seq_len)
    mine = range(rank * size, windows.shape[1], size * world_size)
    batches = (_sliding_batch(tokens, byte_table, windows[:, low : low + size], config.eval_seq_len) for low in mine)
    return _score(model, config, batches, len(mine), world_size, progress, record)


def _deal(items: Sequence[tuple[int, int]], rank: int, world_size: int) -> Sequence[tuple[int, int]]:
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def _row_spans(targets: int, width: int, config: RunConfig, rank: int, world_size: int) -> Sequence[tuple[int, int]]:
    """Return [start, stop) of this rank's rows, in targets."""
    if not config.eval_public_truncation:
        spans = [(start, min(start + width, targets)) for start in range(0, targets, width)]
        return _deal(spans, rank, world_size)
    windows = targets // config.eval_seq_len
    low, high = windows * rank // world_size, windows * (rank + 1) // world_size
    first, rows = low * config.eval_seq_len, (high - low) * config.eval_seq_len // width
    if rows == 0:
        raise ValueError(
            f"eval_public_truncation keeps whole rows of {width} tokens, and rank {rank} of {world_size} has only "
            f"{(high - low) * config.eval_seq_len}: turn it off, or lower val_batch_tokens"
        )
    return [(first + row * width, first + (row + 1) * width) for row in range(rows)]


def _padded(row: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, width - row.numel()))


def _packed_row(tokens: Tensor, byte_table: ByteCounter, start: int, stop: int, width: int, max_segment: int) -> Row:
    span = tokens[start : stop + 1].long()
    inputs, targets = _padded(span[:-1], width), _padded(span[1:], width)
    counted = torch.arange(width) < stop - start
    byte_counts = _padded(byte_table.of_targets(tokens, torch.arange(start + 1, stop + 1)), width)
    boundaries = segment_boundaries(inputs, max_segment, pad_multiple=SEGMENT_ENTRIES)
    places = torch.arange(start, start + width)
    return Row(inputs[None], targets[None], counted[None], byte_counts[None], boundaries, places[None])


def _sliding_windows(tokens: Tensor, window: int, stride: int) -> Tensor:
    """Return for each window its first input, its inputs, and its inputs before the first that is scored.

    The result is [3, windows], with the shortest windows first.
    """
    starts, lengths = find_documents(tokens)
    predictions = lengths - 1
    counts = 1 + -(-np.maximum(predictions - window, 0) // stride)
    start, last = np.repeat(starts, counts), np.repeat(predictions, counts)
    number = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # within the document
    end = np.minimum(window + stride * number, last)
    begin = np.maximum(end - window, 0)
    scored_before = np.where(number > 0, window + stride * (number - 1), 0)
    windows = np.stack([start + begin, end - begin, scored_before - begin])
    return torch.from_numpy(windows[:, np.argsort(windows[1], kind="stable")])


def _sliding_batch(tokens: Tensor, byte_table: ByteCounter, windows: Tensor, longest: int) -> Row:
    start, length, context = windows[:, :, None]
    width = min(-(-int(length.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, longest)
    position = torch.arange(width)
    places = start + torch.arange(width + 1)
    inside = places.clamp(max=tokens.numel() - 1)
    span, byte_counts = tokens[inside].long(), byte_table.of_targets(tokens, inside[:, 1:])
    counted = (position >= context) & (position < length)
    return Row(span[:, :-1], span[:, 1:], counted, byte_counts, None, places[:, :-1])


def _score(
    model: GPT,
    config: RunConfig,
    rows: Iterable[Row],
    total: int,
    world_size: int,
    progress: Progress | None,
    record: Record | None,
) -> tuple[float, float]:
    device = model.qo_bank.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, bytes, targets
    if progress is not None:
        rows = progress(rows, total=total, description="evaluation", unit="rows")
    graphs = Graphs(device) if uses_graphs(config, model) else None
    with evaluation_mode(model):
        for row in rows:
            inputs, targets, counted, byte_counts = (to_device(part, device) for part in row[:4])
            cu_seqlens = None if row.cu_seqlens is None else to_device(row.cu_seqlens, device)
            losses = _losses(model, config, graphs, inputs, targets, cu_seqlens)
            sums[0] += (losses.double() * counted).sum()
            sums[1] += (byte_counts * counted).sum()
            sums[2] += counted.sum()
            if record is not None:
                record(row, losses)
    if world_size > 1:
        dist.all_reduce(sums)
    nats, total_bytes, targets_scored = sums.tolist()
    return nats / targets_scored, bits_per_byte(nats, total_bytes)


def _losses(
    model: GPT, config: RunConfig, graphs: Graphs | None, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Return the nats of a row. With ``graphs``, packed rows, which all have one width, are replayed from a graph."""

    def losses(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return model.token_losses(inputs, targets, cu_seqlens, config.eval_seq_len)

    if graphs is None or cu_seqlens is None:
        return losses(inputs, targets, cu_seqlens)
    key = inputs.shape, cu_seqlens.shape
    if key not in graphs:
        graphs.capture(key, losses, inputs, targets, cu_seqlens)
    return graphs.replay(key, inputs, targets, cu_seqlens)
