"""Score one chunk of each document of a batch, then update the adapters.

The documents' windows are joined in a packed stream (see `inputs`), so that a document that has ended costs nothing. A
step is several hundred launches. Python issues them more slowly than the device executes them, so CUDA graphs replay
them. Graphs are captured with random tokens for a few lengths of the stream, and streams are padded to these lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pgolf.common.tensors import to_device
from pgolf.config import RunConfig
from pgolf.kernels.common.compiling import compiling_ahead
from pgolf.model.gpt import GPT
from pgolf.model.graphs import Graphs, uses_graphs
from pgolf.scoring.ngram import tilted
from pgolf.scoring.ttt.adapters import AdapterBank, Stack
from pgolf.scoring.ttt.inputs import CachedChunks, Chunk, Stream, Windows

# Arguments ``exact`` and ``factor`` of `stream_lengths`, for steps with an update and for steps without one.
LEARNING_LENGTHS, SCORING_LENGTHS = (12, 1.1), (4, 1.35)
TOKENS_MULTIPLE = 128  # of a stream's length, so that its tiles are full


class ChunkScorer:
    """Scores chunks of a batch's documents with the adapters of a bank, and updates the adapters."""

    def __init__(self, model: GPT, config: RunConfig, bank: AdapterBank, stream: Stream) -> None:
        """Compile kernels, and capture graphs if the model uses them. This overwrites the bank's adapters."""
        self.model, self.config, self.bank, self.stream = model, config, bank, stream
        self.device = model.qo_bank.device
        self._inputs = (CachedChunks if config.ttt_kv_cache else Windows)(model, config, bank.slots)
        self._chunk_sizes = sorted({config.ttt_chunk_size, *(size for _, size in config.chunks_by_length())})
        # Of lower priority than the graphs' stream: updates use only what the backward leaves idle.
        self._updates = torch.cuda.Stream(self.device, priority=0) if self.device.type == "cuda" else None
        self._lengths: dict[bool, list[int]] = {}  # of captured streams, with and without an update
        if uses_graphs(config, model) and self._inputs.capturable:
            self._capture()
        elif model.runs_kernels():
            unit = bank.slots * config.ttt_chunk_size
            # Streams are not padded, and Triton compiles separate kernels for lengths that are not multiples of 16.
            lengths = [self._inputs.longest, self._inputs.longest - 1, unit, max(unit - 1, 1)]
            self._compile({True: lengths, False: lengths})

    def parts(self, chunk: Chunk) -> Iterator[Chunk]:
        """Split the chunk by documents into parts that fit in one step, each of at least one document."""
        ends = chunk.length.cumsum()
        first = 0
        while first < ends.size:
            before = ends[first - 1] if first else 0
            last = max(int(np.searchsorted(ends, before + self._inputs.limit, side="right")), first + 1)
            inside = (np.arange(ends.size) >= first) & (np.arange(ends.size) < last)
            if chunk.length[inside].any():
                yield Chunk(*(np.where(inside, field, 0) for field in chunk))
            first = last

    def step(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Score a chunk of the documents, then update the adapters of those that learn from it.

        Returns float32 losses in nats, those of the tilted distributions where there is a tilt, and int64 places in the
        stream of the tokens before their targets. Both may have more rows than there are targets; the place of such a
        row is the last of the stream.
        """
        learning = bool(chunk.learning.any())
        tokens, rows = int(chunk.length.sum()), int(chunk.scored.sum())
        if self._lengths:
            tokens = min(length for length in self._lengths[learning] if length >= tokens)
            rows = self._rows(tokens)
        whole, inputs = self._inputs.fill(chunk, self.stream, tokens, rows)
        whole, places = to_device(whole, self.device), to_device(torch.from_numpy(inputs), self.device)
        if self._lengths:
            return self._graphs.replay((tokens, learning), whole), places
        return self._compute(whole, tokens, rows, learning), places

    def _compute(self, whole: Tensor, tokens: int, rows: int, learning: bool) -> Tensor:
        leaves = self.bank.leaves(learning)
        learns, row_offsets, weights, targets, hints, *_ = self._inputs.parts(whole, tokens, rows)
        with torch.set_grad_enabled(learning):
            h, updates = self._inputs.hidden(self.bank, leaves, whole, tokens, rows)
            (losses,) = self.model.head_losses(h, targets[None].long(), updates)
        scored = losses.detach()
        if hints.numel():
            with torch.no_grad():
                (of_hints,) = self.model.head_losses(h, hints[None].clamp(min=0).long(), updates)
                scored = tilted(scored, of_hints, targets, hints, self.config.ngram_tilt_boost)
        if learning:
            for stack, leaf in zip(self.bank.stacks, leaves, strict=True):
                leaf.register_hook(partial(self._update, stack, learns.bool()))
            shares = weights.view(torch.float32)
            if self.config.ttt_conf_weighted:
                shares = shares * self._proportions(losses.detach(), shares, row_offsets)
            # Differentiate a scalar: given output gradients, autograd imports sympy, which takes a second.
            gradients = torch.autograd.grad((losses * shares).sum(), leaves)
            if self._updates is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._updates)
            del gradients  # the updates have read them
        return scored

    def _proportions(self, losses: Tensor, shares: Tensor, row_offsets: Tensor) -> Tensor:
        """Return each row's weight by its loss over its chunk's mean loss (ConfTTT, parameter-golf #1879)."""
        rows = torch.arange(losses.numel(), device=losses.device)[:, None]
        mine = (row_offsets[:-1] <= rows) & (rows < row_offsets[1:])  # [rows, slots]: sums by index have no fixed order
        means = torch.where(mine, (losses * shares)[:, None], 0).sum(0)
        mean = torch.where(mine, means, 0).sum(1).clamp(min=1e-8)
        clip, alpha = self.config.ttt_conf_clip, self.config.ttt_conf_alpha
        return 1 - alpha + alpha * (losses / mean).clamp(1 / clip, clip)

    def _update(self, stack: Stack, learning: Tensor, gradient: Tensor) -> None:
        """Update a stack concurrently with the backward of earlier layers: memory limits one, arithmetic the other."""
        if self._updates is None:
            self.bank.update(stack, gradient, learning)
            return
        self._updates.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._updates):
            self.bank.update(stack, gradient, learning)

    def _capture(self) -> None:
        """Capture a graph for each length, the longest first."""
        units = [self.bank.slots * size for size in self._chunk_sizes]
        for learning, (exact, factor) in ((True, LEARNING_LENGTHS), (False, SCORING_LENGTHS)):
            self._lengths[learning] = stream_lengths(units, self._inputs.longest, exact, factor)[::-1]
        # Launch the kernels that graphs will contain, for short and for long streams.
        ends = {learning: [lengths[0], lengths[-1]] for learning, lengths in self._lengths.items()}
        self._compile(ends)
        self._launch(ends)
        self._graphs = Graphs(self.device)
        for learning, lengths in self._lengths.items():
            for tokens in lengths:
                step = partial(self._compute, tokens=tokens, rows=self._rows(tokens), learning=learning)
                self._graphs.capture((tokens, learning), step, self._random_step(tokens), loaded=True)

    def _compile(self, lengths: Mapping[bool, Sequence[int]]) -> None:
        with compiling_ahead():
            self._launch(lengths)

    def _launch(self, lengths: Mapping[bool, Sequence[int]]) -> None:
        """Compute steps of random tokens of these lengths, with and without an update."""
        for learning, of_these in lengths.items():
            for tokens in of_these:
                self._compute(self._random_step(tokens), tokens, self._rows(tokens), learning)

    def _rows(self, tokens: int) -> int:
        """Return the most rows that a stream of ``tokens`` tokens can have."""
        return min(tokens, self.bank.slots * self._chunk_sizes[-1])

    def _random_step(self, tokens: int) -> Tensor:
        """Return a step's inputs for ``tokens`` random tokens, dealt evenly to all slots, on the device."""
        bounds = np.arange(self.bank.slots + 1) * tokens // self.bank.slots
        length = np.diff(bounds)
        scored = np.minimum(length, self._chunk_sizes[-1])
        chunk = Chunk(bounds[:-1], np.zeros_like(length), length, scored, np.ones_like(length, dtype=bool))
        text = np.random.default_rng(0).integers(self.config.vocab_size, size=tokens + 1)
        return self._inputs.fill(chunk, Stream(text, text), tokens, self._rows(tokens))[0].to(self.device)


def stream_lengths(units: Sequence[int], longest: int, exact: int, factor: float) -> list[int]:
    """Return the ascending lengths of captured streams, multiples of TOKENS_MULTIPLE up to ``longest``.

    Args:
        units: ascending; each is the tokens of one chunk of all slots. Its lengths end at the next unit.
        exact: the first ``exact`` multiples of a unit are lengths.
        factor: later lengths grow by this factor.
    """
    lengths = []
    for unit, end in zip(units, [*units[1:], longest], strict=True):
        multiples = [count * unit for count in range(1, exact + 1)]
        while multiples[-1] < end:
            multiples.append(int(multiples[-1] * factor) + 1)
        lengths += [length for length in multiples if length < end]
    return sorted({-(-length // TOKENS_MULTIPLE) * TOKENS_MULTIPLE for length in (*lengths, longest)})
