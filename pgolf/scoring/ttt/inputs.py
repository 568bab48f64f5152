"""The model's inputs in one step: the documents' windows, or their chunks after cached keys and values.

One int32 tensor holds all inputs of a step, so that one copy moves them to the device. A stream may be longer than its
windows; the padding belongs to no document.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.config import ConfigError, RunConfig
from pgolf.kernels.gated_attention import KVCache, flash_takes
from pgolf.model.gpt import GPT, Continuation, Updates
from pgolf.scoring.ttt.adapters import AdapterBank


class Chunk(NamedTuple):
    """One chunk of each slot's document, int64 [slots] each; zeros for a document that has ended."""

    start: np.ndarray  # first input of the window, in the stream of all documents
    skipped: np.ndarray  # the document's inputs before the window
    length: np.ndarray  # inputs in the window, of which the chunk's are the last
    scored: np.ndarray  # targets in the chunk
    learning: np.ndarray  # bool, whether the adapters are updated on it


class Stream(NamedTuple):
    """The text of all documents."""

    tokens: np.ndarray  # int32 [N]
    hints: np.ndarray  # int32 [N], the n-gram's for each token, or without a tilt [0]


class _Rows:
    """The place of each target of a chunk, in the stream and in the windows, for a step of ``rows`` rows."""

    def __init__(self, chunk: Chunk, stream: Stream, rows: int) -> None:
        self.offsets = np.append(0, chunk.scored.cumsum())  # each slot's first row
        self.count = self.offsets[-1]  # rows of documents; the others are padding
        self.bounds = np.append(0, chunk.length.cumsum())  # of the joined windows
        self.used = self.bounds[-1]
        self.inputs = np.full(rows, stream.tokens.size - 1)  # each row's input in the stream
        self.inputs[: self.count] = self._last(chunk, chunk.start + chunk.length)
        self.in_windows = self._last(chunk, self.bounds[1:])

    def _last(self, chunk: Chunk, ends: np.ndarray) -> np.ndarray:
        """Return the last ``scored`` numbers before each of the ``ends``, joined."""
        return np.repeat(ends - self.offsets[1:], chunk.scored) + np.arange(self.count)


class _Inputs(ABC):
    """A step's inputs as parts of one tensor, whose sizes the subclass defines."""

    def parts(self, whole: Tensor, tokens: int, rows: int) -> list[Tensor]:
        """Split a step's tensor into the parts that `_sizes` names."""
        return list(whole.split(self._sizes(tokens, rows)))

    @abstractmethod
    def _sizes(self, tokens: int, rows: int) -> tuple[int, ...]:
        """Return the sizes of the parts of a step's tensor."""


class Windows(_Inputs):
    """Computes the whole window of every chunk anew, as PR #1874 does."""

    capturable = True  # whether a CUDA graph can capture a step, if it can capture the model

    def __init__(self, model: GPT, config: RunConfig, slots: int) -> None:
        self.model, self.slots, self.hinted = model, slots, config.ngram_tilt_boost > 0
        self.limit = max(config.ttt_micro_batch_tokens, config.ttt_eval_seq_len)  # window tokens of one step
        self.longest = min(self.limit, slots * config.ttt_eval_seq_len)  # that a step can have

    def _sizes(self, tokens: int, rows: int) -> tuple[int, ...]:
        """Return the sizes of the parts of a step's tensor.

        They are learning [slots], row_offsets [slots + 1], weights [rows], targets [rows], hints [rows] or without a
        tilt [0], chosen [rows], segments [slots + 2] and ids [tokens].
        """
        return self.slots, self.slots + 1, rows, rows, rows * self.hinted, rows, self.slots + 2, tokens

    def fill(self, chunk: Chunk, stream: Stream, tokens: int, rows: int) -> tuple[Tensor, np.ndarray]:
        """Return a step's tensor, and the place of each row's input in ``stream`` (for padding the stream's last)."""
        whole, found = torch.zeros(sum(self._sizes(tokens, rows)), dtype=torch.int32), _Rows(chunk, stream, rows)
        *of_rows, chosen, segments, ids = (part.numpy() for part in self.parts(whole, tokens, rows))
        _fill_rows(chunk, stream, found, *of_rows)
        segments[:-1], segments[-1] = found.bounds, tokens
        ids[: found.used] = stream.tokens[
            np.repeat(chunk.start - found.bounds[:-1], chunk.length) + np.arange(found.used)
        ]
        chosen[:] = tokens - 1
        chosen[: found.count] = found.in_windows
        return whole, found.inputs

    def hidden(
        self, bank: AdapterBank, leaves: list[Tensor], whole: Tensor, tokens: int, rows: int
    ) -> tuple[Tensor, Updates]:
        """Compute the hidden states [1, rows, d] with the adapters in ``leaves``; return also the model's updates."""
        _, row_offsets, *_, chosen, segments, ids = self.parts(whole, tokens, rows)
        first = segments.diff() - F.pad(row_offsets.diff(), (0, 1))  # the chunk's start in its window; padding has none
        updates = bank.updates(leaves, segments[:-1], row_offsets)
        h = self.model.hidden(
            ids[None].long(),
            segments,
            tokens,
            sequences=segments,
            updates=updates,
            rows=chosen.long(),
            first_queries=first,
        )
        return h, updates


class CachedChunks(_Inputs):
    """Computes only the chunks, and keeps the keys and values of earlier tokens as they were when computed."""

    def __init__(self, model: GPT, config: RunConfig, slots: int) -> None:
        self.model, self.slots, self.hinted = model, slots, config.ngram_tilt_boost > 0
        self.capacity = config.ttt_eval_seq_len
        self.limit = self.longest = slots * self.capacity  # all windows fit, because only their chunks are computed
        passes = sum(len(part) for part in model.execution_lists(looping=config.num_loops > 0))
        places = slots * self.capacity + 1  # the last one is for padding
        shape = passes, 2, places, config.num_kv_heads, config.head_dim
        device, dtype = model.qo_bank.device, model.compute_dtype
        # Without FlashAttention the host reads the lengths of segments.
        self.capturable = config.attention_backend != "sdpa" and flash_takes(device, dtype, config.head_dim)
        if config.cuda_graphs == "on" and not self.capturable:
            raise ConfigError(f"cuda_graphs=on with ttt_kv_cache needs half precision, and this is {dtype}; use auto")
        self._kept = torch.zeros(shape, dtype=dtype, device=device)

    def _sizes(self, tokens: int, rows: int) -> tuple[int, ...]:
        """Return the sizes of the parts of a step's tensor.

        They are learning, row_offsets, weights, targets and hints as in `Windows`, then ids, previous, positions,
        places and stored [rows], bounds [slots + 2] and sources [tokens + rows].
        """
        # After the windows, the stream of keys has a place for each padding row, which attends to itself.
        of_rows = rows, rows, rows * self.hinted
        return self.slots, self.slots + 1, *of_rows, *[rows] * 5, self.slots + 2, tokens + rows

    def fill(self, chunk: Chunk, stream: Stream, tokens: int, rows: int) -> tuple[Tensor, np.ndarray]:
        """Return what `Windows.fill` returns."""
        whole, found = torch.zeros(sum(self._sizes(tokens, rows)), dtype=torch.int32), _Rows(chunk, stream, rows)
        *of_rows, ids, previous, positions, places, stored, bounds, sources = (
            part.numpy() for part in self.parts(whole, tokens, rows)
        )
        _fill_rows(chunk, stream, found, *of_rows)
        count, used, pad = found.count, found.used, rows - found.count
        in_document = np.repeat(chunk.skipped - found.bounds[:-1], chunk.length) + np.arange(used)
        slot = np.repeat(np.arange(self.slots), chunk.length)
        sources[:] = self.slots * self.capacity
        sources[:used] = slot * self.capacity + in_document % self.capacity  # a ring buffer for each slot
        bounds[:-1], bounds[-1] = found.bounds, used + pad
        places[:count], places[count:] = found.in_windows, used + np.arange(pad)
        stored[:] = sources[places]
        positions[:count] = in_document[found.in_windows]
        inputs = found.inputs[:count]
        ids[:count], previous[:count] = stream.tokens[inputs], stream.tokens[np.maximum(inputs - 1, 0)]
        return whole, found.inputs

    def hidden(
        self, bank: AdapterBank, leaves: list[Tensor], whole: Tensor, tokens: int, rows: int
    ) -> tuple[Tensor, Updates]:
        """Compute what `Windows.hidden` computes."""
        _, row_offsets, *_, ids, previous, positions, places, stored, bounds, sources = self.parts(whole, tokens, rows)
        longest = max(self.capacity, rows)
        where = sources, places.long(), stored.long(), bounds, longest
        continuation = Continuation(
            previous[None].long(), positions.long(), [KVCache(keys, values, *where) for keys, values in self._kept]
        )
        segments = F.pad(row_offsets, (0, 1), value=rows)
        updates = bank.updates(leaves, row_offsets, row_offsets)
        h = self.model.hidden(ids[None].long(), segments, rows, updates=updates, continuation=continuation)
        return h, updates


def _fill_rows(
    chunk: Chunk,
    stream: Stream,
    found: _Rows,
    learning: np.ndarray,
    row_offsets: np.ndarray,
    weights: np.ndarray,
    targets: np.ndarray,
    hints: np.ndarray,
) -> None:
    """Fill the parts that both classes have. A target's weight is 1 / targets of its chunk, or 0 without learning."""
    learning[:], row_offsets[:] = chunk.learning, found.offsets
    shares = (chunk.learning / np.maximum(chunk.scored, 1)).astype(np.float32)
    weights[: found.count] = np.repeat(shares, chunk.scored).view(np.int32)
    predicted = found.inputs[: found.count] + 1
    targets[: found.count] = stream.tokens[predicted]
    if hints.size:
        hints[: found.count] = stream.hints[predicted]
