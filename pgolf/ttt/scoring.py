"""The device's work on one chunk of every document of a batch: losses first, then an update of the adapters.

The documents' windows lie one after the other in a packed stream, so nothing is computed of a document that has ended.
A step is several hundred launches, which take Python longer than the device: they are replayed from CUDA graphs. Graphs
are captured on made-up tokens for a few lengths of the stream, to which others are padded with tokens of no document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.evaluate import to_device
from pgolf.graphs import Graphs, uses_graphs
from pgolf.kernels._launch import compiling_ahead
from pgolf.model import GPT
from pgolf.ttt.adapters import AdapterBank, Stack

# Lengths of captured streams, in chunks of all slots: while none of a batch has ended its stream grows by one at each
# chunk. Steps without an update are one in a batch, and padded further.
LEARNING_LENGTHS = (*range(1, 13), 14, 16, 18, 20, 23, 26, 29, 32, 35, 38, 41)
SCORING_LENGTHS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36)
TOKENS_MULTIPLE = 128  # tiles of the stream are whole


class Chunk(NamedTuple):
    """One chunk of documents, int64 [slots] each; zeros where a document has ended."""

    start: np.ndarray  # first input of the window, in the stream of all documents
    length: np.ndarray  # inputs in the window, of which the chunk's are the last
    scored: np.ndarray  # targets in the chunk
    learning: np.ndarray  # bool, whether the adapters are updated on it


@dataclass
class _Fields:
    """What a step reads, parts of one int32 tensor, so that one copy brings it to the device."""

    whole: Tensor
    tokens: int
    rows: int
    slots: int

    @property
    def parts(self) -> list[Tensor]:
        """ids, targets, rows, weights, segments [slots + 2], row_offsets [slots + 1], learning [slots]."""
        sizes = (self.tokens, self.rows, self.rows, self.rows, self.slots + 2, self.slots + 1, self.slots)
        return list(self.whole.split(sizes))

    @staticmethod
    def size(tokens: int, rows: int, slots: int) -> int:
        """Numbers in ``whole``."""
        return tokens + 3 * rows + 3 * slots + 3


class ChunkScorer:
    """Scores chunks of a batch's documents with the adapters of a bank, and updates these."""

    def __init__(self, model: GPT, config: RunConfig, bank: AdapterBank, stream: np.ndarray) -> None:
        """stream: int32 token ids of all documents, on the host."""
        self.model, self.config, self.bank, self.stream = model, config, bank, stream
        self.device = model.qo_bank.device
        self._largest_chunk = max([config.ttt_chunk_size, *(size for _, size in config.chunks_by_length())])
        # Of lower priority than the stream that graphs are captured on, so that updates fill what the backward leaves.
        self._updates = torch.cuda.Stream(self.device, priority=0) if self.device.type == "cuda" else None
        self._lengths: dict[bool, list[int]] = {}  # of captured streams, by whether adapters are updated
        if uses_graphs(config, model):
            self._capture()

    def parts(self, chunk: Chunk) -> Iterator[Chunk]:
        """The chunk in parts of at most ttt_micro_batch_tokens window tokens and at least one document."""
        ends = chunk.length.cumsum()
        first = 0
        while first < ends.size:
            before = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, before + self.config.ttt_micro_batch_tokens, side="right")), first + 1)
            inside = (np.arange(ends.size) >= first) & (np.arange(ends.size) < last)
            if chunk.length[inside].any():
                yield Chunk(*(np.where(inside, field, 0) for field in chunk))
            first = last

    def step(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Score a chunk of the documents, then update their adapters where it says so.

        Returns float32 losses in nats, and int64 places in the stream of the tokens before their targets; both have
        room for more rows than there are targets, whose place is the stream's last.
        """
        learning = bool(chunk.learning.any())
        tokens, rows = int(chunk.length.sum()), int(chunk.scored.sum())
        if self._lengths:
            tokens = min(length for length in self._lengths[learning] if length >= tokens)
            rows = self._rows(tokens)
        fields, places = self._fields(chunk, tokens, rows)
        whole, places = (to_device(part, self.device) for part in (fields.whole, places))
        if self._lengths:
            return self._graphs.replay((tokens, learning), whole), places
        return self._compute(whole, tokens, rows, learning), places

    def _fields(self, chunk: Chunk, tokens: int, rows: int) -> tuple[_Fields, Tensor]:
        """The step's fields on the host, padded to so many tokens and rows, and the rows' places in the stream."""
        slots = chunk.length.size
        whole = torch.zeros(_Fields.size(tokens, rows, slots), dtype=torch.int32)
        fields = _Fields(whole, tokens, rows, slots)
        ids, targets, chosen, weights, segments, row_offsets, learning = (part.numpy() for part in fields.parts)
        segments[1:-1], segments[-1] = chunk.length.cumsum(), tokens
        row_offsets[1:] = chunk.scored.cumsum()
        used, count = segments[-2], row_offsets[-1]
        ids[:used] = self.stream[np.repeat(chunk.start - segments[:-2], chunk.length) + np.arange(used)]
        chosen[:] = tokens - 1
        chosen[:count] = np.repeat(segments[1:-1] - row_offsets[1:], chunk.scored) + np.arange(count)
        places = np.full(rows, self.stream.size - 1)
        ends = chunk.start + chunk.length
        places[:count] = np.repeat(ends - row_offsets[1:], chunk.scored) + np.arange(count)
        targets[:count] = self.stream[places[:count] + 1]
        shares = (chunk.learning / np.maximum(chunk.scored, 1)).astype(np.float32)
        weights[:count] = np.repeat(shares, chunk.scored).view(np.int32)
        learning[:] = chunk.learning
        return fields, torch.from_numpy(places)

    def _compute(self, whole: Tensor, tokens: int, rows: int, learning: bool) -> Tensor:
        fields = _Fields(whole, tokens, rows, self.bank.slots)
        ids, targets, chosen, weights, segments, row_offsets, learns = fields.parts
        leaves = self.bank.leaves(learning)
        updates = self.bank.updates(leaves, segments[:-1], row_offsets)
        first = segments.diff() - F.pad(row_offsets.diff(), (0, 1))  # in its window; what pads the stream has no chunk
        with torch.set_grad_enabled(learning):
            (losses,) = self.model.token_losses(
                ids[None].long(), targets[None].long(), segments, tokens, sequences=segments, updates=updates,
                rows=chosen.long(), first_queries=first,
            )  # fmt: skip
        if learning:
            learns = learns.bool()
            for stack, leaf in zip(self.bank.stacks, leaves, strict=True):
                leaf.register_hook(partial(self._update, stack, learns))
            # Of a scalar: with gradients given, autograd loads sympy, which takes a second.
            gradients = torch.autograd.grad((losses * weights.view(torch.float32)).sum(), leaves)
            if self._updates is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._updates)
            del gradients  # which updates have read now
        return losses.detach()

    def _update(self, stack: Stack, learning: Tensor, gradient: Tensor) -> None:
        """Update a stack beside the backward of earlier layers: one is bound by memory, the other by arithmetic."""
        if self._updates is None:
            self.bank.update(stack, gradient, learning)
            return
        self._updates.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._updates):
            self.bank.update(stack, gradient, learning)

    def _capture(self) -> None:
        """Capture a graph for each length, the longest first; the bank's adapters mean nothing after."""
        chunks = self.bank.slots * self._largest_chunk
        longest = min(self.bank.slots * self.config.ttt_eval_seq_len,
                      max(self.config.ttt_micro_batch_tokens, self.config.ttt_eval_seq_len))  # fmt: skip
        for learning, lengths in ((True, LEARNING_LENGTHS), (False, SCORING_LENGTHS)):
            found = {_whole(min(length * chunks, longest)) for length in lengths} | {_whole(longest)}
            self._lengths[learning] = sorted(found, reverse=True)
        with compiling_ahead():
            self._warm_up()
        self._warm_up()
        self._graphs = Graphs(self.device)
        for learning, lengths in self._lengths.items():
            for tokens in lengths:
                step = partial(self._compute, tokens=tokens, rows=self._rows(tokens), learning=learning)
                self._graphs.capture((tokens, learning), step, self._made_up(tokens), loaded=True)

    def _warm_up(self) -> None:
        """Launch what graphs will hold, of short and of long streams."""
        for learning, lengths in self._lengths.items():
            for tokens in (lengths[0], lengths[-1]):
                self._compute(self._made_up(tokens), tokens, self._rows(tokens), learning)

    def _rows(self, tokens: int) -> int:
        """The most rows of a stream of so many tokens."""
        return min(tokens, self.bank.slots * self._largest_chunk)

    def _made_up(self, tokens: int) -> Tensor:
        """The fields of so many random tokens, dealt evenly to all slots, on the device."""
        slots, count = self.bank.slots, self._rows(tokens)
        bounds = [tokens * slot // slots for slot in range(slots + 1)]
        scored = [min(self._largest_chunk, stop - start) for start, stop in pairwise(bounds)]
        row_offsets = [0, *accumulate(scored)]
        rows = torch.zeros(count, dtype=torch.int32)
        for stop, own, low in zip(bounds[1:], scored, row_offsets, strict=False):
            rows[low : low + own] = torch.arange(stop - own, stop)
        generator = torch.Generator().manual_seed(0)
        ids, targets = (
            torch.randint(0, self.config.vocab_size, (size,), generator=generator) for size in (tokens, count)
        )
        parts = (ids, targets, rows, torch.ones(count).view(torch.int32), torch.tensor([*bounds, tokens]),
                 torch.tensor(row_offsets), torch.ones(slots))  # fmt: skip
        return torch.cat([part.int() for part in parts]).to(self.device)


def _whole(tokens: int) -> int:
    """So many tokens or more, in whole tiles."""
    return -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
