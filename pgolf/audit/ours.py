"""The stages that score, as scorers: evaluation in rows, with a sliding window, and test-time training.

Each runs the stage's own function. Distributions come from the operator that charges the losses, called with every
token of the alphabet as the target.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf.audit.protocol import Record, Scored, Span, Updated
from pgolf.common.progress import Progress
from pgolf.common.tensors import to_device
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter
from pgolf.data.loader import packed
from pgolf.data.shards import BOS_ID
from pgolf.kernels.linear_cross_entropy import linear_cross_entropy
from pgolf.model.gpt import GPT
from pgolf.scoring.evaluate import Row
from pgolf.scoring.ngram import NO_HINT
from pgolf.scoring.ttt.adapters import AdapterBank
from pgolf.scoring.ttt.engine import test_time_training
from pgolf.scoring.ttt.inputs import Chunk
from pgolf.scoring.ttt.ledger import ScoredLedger
from pgolf.scoring.ttt.scorer import ChunkScorer

MIXED = 1_000_003  # odd: sums of different tensors do not cancel


def model_fingerprint(model: GPT) -> str:
    """Return digits that stand for all weights, 16 hexadecimal ones."""
    total = torch.zeros((), dtype=torch.int64, device=model.qo_bank.device)
    for parameter in model.parameters():
        total = total * MIXED + _bits(parameter).sum(dtype=torch.int64)
    return _digits(int(total))


def adapter_fingerprints(bank: AdapterBank) -> list[str]:
    """Return digits that stand for the adapters of each slot, as the model reads them."""
    total = torch.zeros(bank.slots, dtype=torch.int64, device=bank.stacks[0].copy.device)
    for stack in bank.stacks:
        total = total * MIXED + _bits(stack.copy).flatten(1).sum(1, dtype=torch.int64)
    return [_digits(number) for number in total.tolist()]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _digits(number: int) -> str:
    return f"{number & (1 << 64) - 1:016x}"


@contextmanager
def distributions(model: GPT, rows: list[int]) -> Iterator[list[np.ndarray]]:
    """Inside the context, append the distribution of each of these rows to the list when losses are first computed.

    A row is a place in the flattened targets, a distribution the log-probabilities of the alphabet, float32 [V].
    """
    found: list[np.ndarray] = []

    def observed(
        h: Tensor, table: Tensor, targets: Tensor, *settings: Any, update: Tensor | None = None, **options: Any
    ) -> Tensor:
        alphabet = torch.arange(table.size(0), device=h.device)
        for row in rows[len(found) :]:
            same, added = (
                None if part is None else part.detach().flatten(0, -2)[row].expand(alphabet.numel(), -1).contiguous()
                for part in (h, update)
            )
            assert same is not None
            losses = linear_cross_entropy(same, table.detach(), alphabet, settings[0], "none", update=added)
            found.append(-losses.float().cpu().numpy())
        return linear_cross_entropy(h, table, targets, *settings, update=update, **options)

    model.cross_entropy = observed
    try:
        yield found
    finally:
        model.cross_entropy = linear_cross_entropy


class EvaluationScorer:
    """Evaluation by a fixed model: `evaluate_packed` or `evaluate_sliding`."""

    def __init__(
        self,
        name: str,
        evaluate: Callable[..., tuple[float, float]],
        model: GPT,
        config: RunConfig,
        counter: ByteCounter,
    ) -> None:
        self.name, self.evaluate, self.model, self.counter = name, evaluate, model, counter
        self.config = config.replace(cuda_graphs="off")  # launched one by one, kernels can be watched
        self.progress: Progress | None = None

    def score(self, stream: np.ndarray, asked: Collection[int], record: Record) -> float:
        """Score the stream as the stage does; see `protocol.Scorer`."""
        observe = partial(self._observe, frozenset(asked), record)
        tokens = torch.from_numpy(stream)
        return self.evaluate(self.model, self.config, tokens, self.counter, progress=self.progress, record=observe)[1]

    def _observe(self, asked: frozenset[int], record: Record, row: Row, losses: Tensor) -> None:
        targets, nats, counted = row.places + 1, losses.cpu().numpy(), row.counted.numpy()
        vectors = self._vectors(asked, row, targets)
        state = {"model": model_fingerprint(self.model)}
        for places, scored, values in zip(targets.numpy(), counted, nats, strict=True):
            places, values = places[scored], values[scored]
            if places.size:
                start, stop = int(places[0]), int(places[-1]) + 1
                record(
                    Scored(start, stop, values.copy(), state, {p: v for p, v in vectors.items() if start <= p < stop})
                )

    def _vectors(self, asked: frozenset[int], row: Row, targets: Tensor) -> dict[int, np.ndarray]:
        flat, scored = targets.flatten().tolist(), row.counted.flatten().tolist()
        rows = [i for i, place in enumerate(flat) if scored[i] and place in asked]
        if not rows:
            return {}
        device = self.model.qo_bank.device
        inputs, wanted = to_device(row.inputs, device), to_device(row.targets, device)
        segments = None if row.cu_seqlens is None else to_device(row.cu_seqlens, device)
        with distributions(self.model, rows) as found:
            self.model.token_losses(inputs, wanted, segments, self.config.eval_seq_len)
        return {flat[i]: vector for i, vector in zip(rows, found, strict=True)}


class TrainingForward:
    """The forward pass of training on micro-batches, whose losses are no score."""

    def __init__(self, model: GPT, config: RunConfig, looping: bool) -> None:
        self.name = f"training's forward{' with the loop' if looping else ''}"
        self.model, self.config, self.looping = model, config, looping

    @torch.no_grad()
    def score(self, stream: np.ndarray, asked: Collection[int], record: Record) -> float:
        """Compute the losses of the stream's micro-batches; return their mean in nats."""
        model, size, total = self.model, self.config.micro_batch_tokens, 0.0
        was, was_training = model.looping_active, model.training
        model.looping_active = self.looping
        model.train()
        try:
            for start in range(0, stream.size - 1, size):
                batch = packed(stream[start : start + size + 1], self.config.train_seq_len, BOS_ID).to(
                    model.qo_bank.device
                )
                rows = [i for i in range(batch.target_ids.numel()) if start + 1 + i in asked]
                with distributions(model, rows) as found:
                    losses = model.token_losses(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen)
                nats = losses[0].cpu().numpy()
                vectors = {start + 1 + i: vector for i, vector in zip(rows, found, strict=True)}
                record(Scored(start + 1, start + 1 + nats.size, nats, {"model": model_fingerprint(model)}, vectors))
                total += float(nats.sum(dtype=np.float64))
        finally:
            model.looping_active = was
            model.train(was_training)
        return total / (stream.size - 1)


class TTTScorer:
    """Test-time training; its states are the base's weights and each slot's adapters."""

    def __init__(self, name: str, model: GPT, config: RunConfig, counter: ByteCounter) -> None:
        self.name, self.model, self.counter = name, model, counter
        self.config = config.replace(cuda_graphs="off")
        self.progress: Progress | None = None
        self.compiled: list[object] = []  # the lengths of steps for which a run has compiled kernels

    def score(self, stream: np.ndarray, asked: Collection[int], record: Record) -> float:
        """Score the stream as the stage does; see `protocol.Scorer`."""
        witness = _Witness(self.model, frozenset(asked), record, self.compiled)
        return test_time_training(
            self.model,
            self.config,
            torch.from_numpy(stream),
            self.counter,
            progress=self.progress,
            scorer=partial(_WatchedScorer, witness),
            ledger=partial(_WatchedLedger, witness),
        ).bits_per_byte


class _Witness:
    """Records what test-time training does."""

    def __init__(self, model: GPT, asked: frozenset[int], record: Record, compiled: list[object]) -> None:
        self.model, self.asked, self.record, self.compiled = model, asked, record, compiled
        self.starts = np.empty(0)  # of the documents
        self.trained: list[Span] = []  # targets on which the base is being trained
        self.next: dict[int, int] = {}  # each slot's next target

    def step(self, scorer: ChunkScorer, chunk: Chunk, step: Callable[[Chunk], tuple[Tensor, Tensor]]) -> Any:
        """Take a step, and record its scores and updates."""
        base, before = model_fingerprint(self.model), adapter_fingerprints(scorer.bank)
        if self.trained:
            self.record(Updated("base", base, self.trained))
            self.trained = []
        active = np.flatnonzero(chunk.scored)
        stops = chunk.start + chunk.length + 1
        spans = {int(i): (int(stops[i] - chunk.scored[i]), int(stops[i])) for i in active}
        targets = [place for start, stop in spans.values() for place in range(start, stop)]
        rows = [row for row, place in enumerate(targets) if place in self.asked]
        with distributions(self.model, rows) as found:
            losses, places = step(chunk)
        # They are those of the state with which the step begins, whatever else it computes.
        given = zip((targets[row] for row in rows), found, strict=True)
        vectors = {target: self._tilted(scorer, target, vector) for target, vector in given}
        nats = losses.cpu().numpy()
        row = 0
        for slot, (start, stop) in spans.items():
            name = f"adapters {slot}"
            if chunk.skipped[slot] + chunk.length[slot] == chunk.scored[slot] and self.next.get(slot) != stop:
                self.record(Updated(name, before[slot], ()))  # a document begins
            values = nats[row : row + stop - start].copy()
            row += stop - start
            if self.next.get(slot) != stop:  # ttt_grad_steps learns from a chunk again, after its score
                states = {"base": base, name: before[slot]}
                self.record(
                    Scored(start, stop, values, states, {p: v for p, v in vectors.items() if start <= p < stop})
                )
            self.next[slot] = stop
        if chunk.learning.any():
            after = adapter_fingerprints(scorer.bank)
            for slot in np.flatnonzero(chunk.learning).tolist():
                self.record(Updated(f"adapters {slot}", after[slot], [spans[slot]]))
        return losses, places

    @staticmethod
    def _tilted(scorer: ChunkScorer, target: int, vector: np.ndarray) -> np.ndarray:
        """Return the tilted distribution, by its definition: a boost for the hint, then normalised."""
        hints = scorer.stream.hints
        if not hints.size or hints[target] == NO_HINT:
            return vector
        raised = vector.astype(np.float64)
        raised[hints[target]] += scorer.config.ngram_tilt_boost
        return (raised - np.logaddexp.reduce(raised)).astype(np.float32)


class _WatchedScorer(ChunkScorer):
    def __init__(self, witness: _Witness, *arguments: Any) -> None:
        self.witness = witness
        super().__init__(*arguments)

    def _compile(self, lengths: Mapping[bool, Sequence[int]]) -> None:
        """Compile in the first run only: in a later one the same steps would be launched for nothing."""
        if lengths not in self.witness.compiled:
            super()._compile(lengths)
            self.witness.compiled.append(lengths)

    def step(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        return self.witness.step(self, chunk, super().step)


class _WatchedLedger(ScoredLedger):
    def __init__(self, witness: _Witness, predictions: np.ndarray) -> None:
        super().__init__(predictions)
        self.witness, self.starts = witness, np.cumsum(predictions) - predictions

    def train_base(self, documents: np.ndarray) -> None:
        super().train_base(documents)
        first = self.starts[documents] + 1
        spans = zip(first.tolist(), (first + self.predictions[documents]).tolist(), strict=True)
        self.witness.trained = list(spans)
