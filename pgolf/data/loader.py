"""Batches from token shards: packed documents for training and calibration.

A micro-batch is one stream of L tokens with many documents; ``cu_seqlens`` gives attention the start of each.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.data.shards import BOS_ID, ShardError, read_shard

SEGMENT_ENTRIES = 256  # cu_seqlens has a multiple of this many entries, so that CUDA graphs are needed for few sizes
PREFETCHED = 4  # micro-batches read ahead, enough to hide reading and checking the next shard


class Batch(NamedTuple):
    """Inputs and targets (the next tokens): a packed stream with attention segments, or rows of one segment each.

    Attributes:
        input_ids, target_ids: int64 [1, L] for a packed stream, [rows, T] for rows.
        cu_seqlens: int32, starts of the segments, then L repeated up to a full number of entries; None for rows.
        max_seqlen: upper bound of the segments' lengths; 0 for rows.
    """

    input_ids: Tensor
    target_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to ``device``; from pinned memory the copy does not block."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        cu_seqlens = None if self.cu_seqlens is None else function(self.cu_seqlens)
        return Batch(function(self.input_ids), function(self.target_ids), cu_seqlens, self.max_seqlen)


def segment_boundaries(input_ids: Tensor, max_segment: int, bos_id: int = BOS_ID, pad_multiple: int = 64) -> Tensor:
    """Return the boundaries of a stream's attention segments (cu_seqlens), int32 on the stream's device.

    A segment begins at 0, at every BOS, and every ``max_segment`` tokens within a document. The result is the starts,
    then L repeated up to a multiple of ``pad_multiple`` entries; these empty segments keep the number of shapes small.

    Args:
        input_ids: integers [L].

    Raises ValueError unless ``input_ids`` is a vector of at least one token.
    """
    if input_ids.ndim != 1 or not input_ids.numel():
        raise ValueError(f"segments are cut in one stream of at least one token, got {tuple(input_ids.shape)}")
    length, device = input_ids.numel(), input_ids.device
    starts = torch.nonzero(input_ids == bos_id).flatten()
    if not starts.numel() or starts[0] != 0:
        starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), starts])
    lengths = torch.diff(starts, append=torch.full((1,), length, device=device))
    pieces = (lengths + max_segment - 1) // max_segment
    piece = torch.arange(int(pieces.sum()), device=device) - torch.repeat_interleave(pieces.cumsum(0) - pieces, pieces)
    cuts = torch.repeat_interleave(starts, pieces) + piece * max_segment
    entries = math.ceil((cuts.numel() + 1) / pad_multiple) * pad_multiple
    boundaries = torch.full((entries,), length, dtype=torch.int32, device=device)
    boundaries[: cuts.numel()] = cuts
    return boundaries


class DocumentPackingLoader:
    """The training stream: consecutive pieces of the shards, dealt in turn to the ranks, read ahead by a thread.

    Micro-batch g = 0, 1, 2, ... is the next L + 1 tokens of the walk. The walk begins at a shard's first BOS, ends with
    its last whole piece (a shorter tail is dropped), goes on with the next shard, and repeats after the last. A shard
    without BOS is left out. Rank r of R takes g = r, r + R, ..., so that all ranks together see the same micro-batches
    for every R.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike],
        *,
        micro_batch_tokens: int,
        max_segment: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        bos_id: int = BOS_ID,
        vocab_size: int | None = None,
    ) -> None:
        """Check the headers and sizes of all shards; their tokens are checked when the walk reaches them.

        Args:
            files: shards in the order of the walk.
            micro_batch_tokens: L.
            max_segment: longest attention segment, tokens; `limit_segments` may lower it.
            vocab_size: tokens must be less; None: unchecked.

        Raises ShardError for a bad shard, and if no shard holds a micro-batch after its first BOS.
        """
        _check_ranks(rank, world_size)
        self._files = [Path(file) for file in files]
        self._length = micro_batch_tokens
        self._max_segment = self._longest = max_segment
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        self._bos_id, self._vocab_size = bos_id, vocab_size
        shards = [read_shard(file) for file in self._files]
        self._stats = [_size_and_time(file) for file in self._files]
        self._tokens = sum(shard.size for shard in shards)
        self._first = [_first_bos(shard, bos_id) for shard in shards]
        counts = [
            (shard.size - first) // (micro_batch_tokens + 1) for shard, first in zip(shards, self._first, strict=True)
        ]
        self._ends = list(accumulate(counts))  # number of micro-batches up to the end of each shard
        if not any(counts):
            longest = max((shard.size for shard in shards), default=0)
            raise ShardError(
                f"no shard holds the {micro_batch_tokens + 1} tokens of a micro-batch after its first BOS (the longest "
                f"of {len(shards)} has {longest}): lower micro_batch_tokens, or make longer shards"
            )
        self._position = 0  # the first micro-batch that no rank has received
        self._open_shard: tuple[int, np.ndarray] | None = None
        self._pending: deque[Future[Batch]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def next_batch(self) -> Batch:
        """Return this rank's next micro-batch on the device: ids [1, L], cu_seqlens, max_seqlen (the longest allowed).

        Raises the reading thread's exceptions.
        """
        self._read_ahead(PREFETCHED + 1)
        batch = self._pending[0].result()
        self._pending.popleft()
        self._position += self._world_size
        return batch.to(self._device)

    def limit_segments(self, max_segment: int) -> None:
        """Cut segments of at most ``max_segment`` tokens from the next micro-batch on.

        Raises ValueError for more than what the loader was made with, which stays the bound of all batches.
        """
        if not 0 < max_segment <= self._longest:
            raise ValueError(f"segments of 1 to {self._longest} tokens can be cut, not of {max_segment}")
        if max_segment != self._max_segment:
            self.close()  # what has been read ahead is read again
            self._max_segment = max_segment

    def failure(self, count: int) -> BaseException | None:
        """Return what `next_batch` would raise within ``count`` calls; waits until these micro-batches are read."""
        self._read_ahead(max(count, PREFETCHED + 1))
        failures = (reading.exception() for reading in islice(self._pending, count))
        return next(filter(None, failures), None)

    def _read_ahead(self, count: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="pgolf-loader")
        while len(self._pending) < count:
            number = self._position + len(self._pending) * self._world_size + self._rank
            self._pending.append(self._thread.submit(self._read, number))

    def state_dict(self) -> dict[str, int]:
        """Return the position of the walk; it is the same on all ranks after the same number of batches."""
        return {"micro_batch": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from the position in ``state``, which any number of ranks may have saved.

        Raises ValueError if it belongs to other shards or another length of micro-batches.
        """
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise ValueError(f"the loader's state has {name} {state.get(name)}, but this loader has {expected}")
        self.close()
        self._position = int(state["micro_batch"])

    def close(self) -> None:
        """Stop the reading thread; `next_batch` starts it again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._pending.clear()

    def _identity(self) -> dict[str, int]:
        return {"micro_batch_tokens": self._length, "shards": len(self._files), "tokens": self._tokens}

    def _read(self, number: int) -> Batch:
        """Read micro-batch ``number`` of the walk, on the CPU."""
        number %= self._ends[-1]
        index = int(np.searchsorted(self._ends, number, side="right"))
        within = number - (self._ends[index - 1] if index else 0)
        start = self._first[index] + within * (self._length + 1)
        batch = packed(self._shard(index)[start : start + self._length + 1], self._max_segment, self._bos_id)
        batch = batch._replace(max_seqlen=min(self._longest, self._length))  # a change would be another graph
        return batch.pin_memory() if self._device.type == "cuda" else batch

    def _shard(self, index: int) -> np.ndarray:
        if self._open_shard is None or self._open_shard[0] != index:
            path, known = self._files[index], self._stats[index]
            if not path.exists() or _size_and_time(path) != known:
                raise ShardError(f"{path} has been changed or removed since this run began")
            self._open_shard = index, read_shard(path, self._vocab_size)
        return self._open_shard[1]


def calibration_batches(
    files: Sequence[str | os.PathLike],
    *,
    tokens: int,
    max_segment: int,
    count: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
    seed: int,
    documents: bool,
) -> Iterator[Batch]:
    """Yield ``count`` batches of training tokens for this rank's Hessians.

    With ``documents``, a batch is a stream of ``tokens`` tokens with its documents' segments, as in training. Streams
    are drawn by ``seed`` from all over the shards, none twice. ``count · world_size`` determines the streams that all
    ranks see together.

    Without ``documents``, a batch is ``tokens // max_segment`` rows of ``max_segment`` tokens, cut anywhere, as the
    public code draws them: rank r draws from files r, r + world_size, ... with seed r and ignores ``seed``. Ranks share
    files if there are fewer files than ranks.

    Raises ValueError if the shards hold too few tokens, and ShardError for a bad shard.
    """
    _check_ranks(rank, world_size)
    if documents:
        batches = _document_batches(files, tokens, max_segment, range(rank, count * world_size, world_size), seed)
    else:
        if tokens < max_segment:
            raise ValueError(f"a calibration batch of {tokens} tokens holds no row of {max_segment}: raise its tokens")
        rank_files = files[rank::world_size] or [files[rank % len(files)]]
        batches = _row_batches(rank_files, tokens // max_segment, max_segment, count, rank)
    return (batch.to(device) for batch in batches)


def _check_ranks(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is none of the {world_size} ranks 0 to {world_size - 1}")


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _first_bos(shard: np.ndarray, bos_id: int, block: int = 1 << 20) -> int:
    for start in range(0, shard.size, block):
        found = np.flatnonzero(shard[start : start + block] == bos_id)
        if found.size:
            return start + int(found[0])
    return shard.size


def packed(span: np.ndarray, max_segment: int, bos_id: int) -> Batch:
    """Return the batch of a span [L + 1]: inputs are all but the last token, targets all but the first."""
    stream = torch.from_numpy(span.astype(np.int64))
    boundaries = segment_boundaries(stream[:-1], max_segment, bos_id, SEGMENT_ENTRIES)
    return Batch(stream[None, :-1], stream[None, 1:], boundaries, min(max_segment, span.size - 1))


def _document_batches(
    files: Sequence[str | os.PathLike], tokens: int, max_segment: int, numbers: range, seed: int
) -> Iterator[Batch]:
    """Yield entries ``numbers`` of the shards' windows of ``tokens`` + 1 tokens, permuted by ``seed``."""
    shards = [read_shard(file) for file in files]
    places = [(shard, start) for shard in shards for start in range(0, shard.size - tokens, tokens)]
    if numbers.stop > len(places):
        raise ValueError(
            f"calibration wants {numbers.stop} batches of {tokens} tokens, and the training shards hold {len(places)}: "
            "lower gptq_calibration_batches or gptq_calibration_tokens"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(places))
    for number in numbers:
        shard, start = places[order[number]]
        yield packed(shard[start : start + tokens + 1], max_segment, BOS_ID)


def _row_batches(
    files: Sequence[str | os.PathLike], rows: int, row_tokens: int, count: int, seed: int
) -> Iterator[Batch]:
    """Yield batches of rows: each shard is cut from a random phase, and each row is drawn once, in random order."""
    shards = [read_shard(file) for file in files]
    generator = np.random.Generator(np.random.PCG64(seed))
    starts = [_shuffled_starts(shard.size, row_tokens, generator) for shard in shards]
    for _ in range(count):
        spans = []
        for _ in range(rows):
            left = np.array([len(shard_starts) for shard_starts in starts], dtype=np.float64)
            if not left.any():
                raise ValueError(
                    f"calibration wants {count} batches of {rows} rows of {row_tokens} tokens, more than the training "
                    "shards hold: lower gptq_calibration_batches or gptq_calibration_tokens"
                )
            index = int(generator.choice(len(shards), p=left / left.sum()))
            start = starts[index].pop()
            spans.append(shards[index][start : start + row_tokens + 1].astype(np.int64))
        window = torch.from_numpy(np.stack(spans))
        yield Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous(), None, 0)


def _shuffled_starts(size: int, row_tokens: int, generator: np.random.Generator) -> list[int]:
    highest = min(row_tokens - 1, size - row_tokens - 1)
    phase = int(generator.integers(highest + 1)) if highest > 0 else 0
    order = generator.permutation(max(0, (size - 1 - phase) // row_tokens))
    return (phase + order * row_tokens).tolist()
