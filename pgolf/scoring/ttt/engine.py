"""Test-time training: the run through the plan, and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.common.progress import Progress
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter, bits_per_byte
from pgolf.data.shards import BOS_ID
from pgolf.model.gpt import GPT, evaluation_mode
from pgolf.scoring.ngram import ngram_hints
from pgolf.scoring.stream import check_stream, find_documents
from pgolf.scoring.ttt import plan
from pgolf.scoring.ttt.adapters import AdapterBank, AdapterInit
from pgolf.scoring.ttt.base import train_base
from pgolf.scoring.ttt.inputs import Chunk, Stream
from pgolf.scoring.ttt.ledger import ScoredLedger
from pgolf.scoring.ttt.scorer import ChunkScorer


class TTTResult(NamedTuple):
    """The result of test-time training."""

    loss: float  # mean nats of a target
    bits_per_byte: float
    tokens: int  # targets
    bytes: int
    documents: int
    phases: list[dict[str, Any]]  # for each phase documents_scored, documents_trained, sgd_steps, seconds
    global_steps: int
    by_length: list[dict[str, Any]]  # documents, tokens, bits_per_byte for low <= targets < high
    first_score_seconds: float  # from the call to the first loss
    token_nats: Tensor  # float32 [N - 1] on the CPU, NaN where not scored


def test_time_training(
    model: GPT,
    config: RunConfig,
    tokens: Tensor,
    byte_table: ByteCounter,
    *,
    adapter_init: AdapterInit | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    scorer: Callable[..., ChunkScorer] = ChunkScorer,
    ledger: Callable[..., ScoredLedger] = ScoredLedger,
) -> TTTResult:
    """Score a stream of documents with adapters that learn from each document and a base that learns from all.

    Args:
        model: is scored with the loop on. Its weights, requires_grad flags, training flag and loop state change, and
            are restored at the end, also after an error.
        tokens: 1-D token ids of any integer dtype: documents that each begin with BOS.
        byte_table: counts the bytes of the stream's targets.
        adapter_init: adapter_init(rank, in_features) returns the start of each adapter's A; None draws it by the seed.
        rank, world_size: this process, and the processes that share the work; their other arguments must be the same.
        progress: wraps the iterable of steps, as `pgolf.common.progress.progress` does; None shows nothing.
        scorer, ledger: make the `ChunkScorer` and the `ScoredLedger`; subclasses record what they are told.

    The losses depend on the number of processes only by the order in which the base's gradients are summed. Sums of
    losses are float64. Raises ValueError if the stream does not begin with BOS or settings are inconsistent.
    """
    tokens = check_stream(tokens, config, byte_table, world_size)
    _check_settings(config, world_size)
    if int(tokens[0]) != BOS_ID:
        raise ValueError(f"the stream must begin with a document's BOS ({BOS_ID}), and begins with {int(tokens[0])}")
    with evaluation_mode(model, looping=config.num_loops > 0), _weights_restored(model), torch.enable_grad():
        run = _Run(model, config, tokens, adapter_init, rank, world_size, scorer, ledger)
        steps: Iterable[None] = run.steps()
        if progress is not None:
            steps = progress(steps, total=run.count_steps(), description="test-time training", unit="chunks")
        for _ in steps:
            pass
        return run.result(byte_table)


def _check_settings(config: RunConfig, world_size: int) -> None:
    if config.ttt_lanes % world_size:
        raise ValueError(
            f"ttt_lanes {config.ttt_lanes} must be a multiple of the {world_size} processes, to which lanes are dealt; "
            "another number of lanes is another score"
        )


@contextmanager
def _weights_restored(model: GPT) -> Iterator[None]:
    """Freeze the weights inside the context; restore them and their requires_grad flags at the end."""
    parameters = list(model.parameters())
    saved = [(parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
    model.requires_grad_(False)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, (value, requires_grad) in zip(parameters, saved, strict=True):
                parameter.copy_(value)
                parameter.grad = None
                parameter.requires_grad_(requires_grad)


class _Run:
    """One run over the documents: its plan, its state on the device, and its results."""

    def __init__(
        self,
        model: GPT,
        config: RunConfig,
        stream: Tensor,
        adapter_init: AdapterInit | None,
        rank: int,
        world_size: int,
        scorer: Callable[..., ChunkScorer],
        ledger: Callable[..., ScoredLedger],
    ) -> None:
        self.began = time.perf_counter()
        self.model, self.config, self.rank, self.world_size = model, config, rank, world_size
        self.device = model.qo_bank.device
        self.bank = AdapterBank(model, config, config.ttt_batch_size, adapter_init)
        self.stream = stream
        self.starts, self.lengths = find_documents(stream)
        # Compiles and captures with random tokens, before anything is scored.
        self.scorer = scorer(model, config, self.bank, Stream(stream.numpy(), self._hints()))
        self.predictions = self.lengths - 1
        self.ledger = ledger(self.predictions)
        self.token_nats = torch.zeros(stream.numel(), device=self.device)  # the last place is for padding rows
        self.phases = plan.plan_phases(self.predictions, config)
        self.phase_log: list[dict[str, Any]] = []
        self.first_score = math.nan

    def _hints(self) -> np.ndarray:
        """Return the n-gram's hints for the stream's tokens, or an empty array without a tilt."""
        config = self.config
        if not config.ngram_tilt_boost:
            return np.empty(0, dtype=np.int32)
        starts = torch.from_numpy(self.starts) if config.ngram_tilt_scope == "document" else None
        tokens = self.stream.to(self.device)
        return ngram_hints(tokens, config.ngram_tilt_order, config.ngram_tilt_threshold, starts).cpu().numpy()

    def steps(self) -> Iterator[None]:
        """Score and learn; yield after every chunk and after every step of the base weights."""
        scored = 0
        for phase in self.phases:
            began = time.perf_counter()
            self.bank.load_scales()
            for lane in self._lanes_of_rank(phase):
                self.bank.forget()
                for batch in lane:
                    yield from self._score_batch(batch)
            self.ledger.merge(self.world_size, self.device)
            self.ledger.train_base(phase.trained)
            sgd_steps = self._sgd_schedule(phase)
            if sgd_steps:
                text = self._joined(phase.trained)
                yield from train_base(self.model, self.config, text, sgd_steps, self.rank, self.world_size)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            scored += sum(batch.documents.size for batch in phase.batches)
            counts = (scored, int(phase.trained.size), len(sgd_steps), time.perf_counter() - began)
            names = ("documents_scored", "documents_trained", "sgd_steps", "seconds")
            self.phase_log.append(dict(zip(names, counts, strict=True)))

    def count_steps(self) -> int:
        """Return how often `steps` yields."""
        batches = [batch for phase in self.phases for lane in self._lanes_of_rank(phase) for batch in lane]
        chunks = sum(len(plan.batch_windows(self.predictions[b.documents], self.config).start) for b in batches)
        return chunks + sum(len(self._sgd_schedule(phase)) for phase in self.phases)

    def _lanes_of_rank(self, phase: plan.Phase) -> list[list[plan.Batch]]:
        return plan.lanes_of_phase(phase, self.predictions, self.config)[self.rank :: self.world_size]

    def _sgd_schedule(self, phase: plan.Phase) -> list[plan.SgdStep]:
        tokens = int(self._kept_lengths(phase.trained).sum())
        return plan.sgd_schedule(tokens, self.config, self.world_size)

    def _score_batch(self, batch: plan.Batch) -> Iterator[None]:
        """Score the batch's documents chunk by chunk, and train the adapters on each chunk after it is scored."""
        documents, slots = batch.documents, self.bank.slots
        starts, windows = self.starts[documents], plan.batch_windows(self.predictions[documents], self.config)
        self.bank.begin(batch.number, documents.size)
        for fields in zip(*windows, strict=True):
            numbers = fields[0] + starts, *fields
            start, skipped, length, scored, goes_on = (np.pad(f, (0, slots - f.size)) for f in numbers)
            chunk = Chunk(start, skipped, length, scored, goes_on > 0)
            active, last = fields[2] > 0, fields[0] + fields[1]
            self.ledger.score(documents[active], (last - fields[2])[active], last[active])
            if chunk.learning.any():
                learned = fields[3] > 0
                self.ledger.train(documents[learned], last[learned])
            for repeat in range(self.config.ttt_grad_steps if chunk.learning.any() else 1):
                if chunk.learning.any():
                    self.bank.count_update(chunk.learning)
                for part in self.scorer.parts(chunk):
                    losses, places = self.scorer.step(part)
                    if not repeat:
                        self.token_nats.index_copy_(0, places, losses)
            if math.isnan(self.first_score):
                self.token_nats[:1].cpu()  # waits for the device
                self.first_score = time.perf_counter() - self.began
            yield

    def _kept_lengths(self, documents: np.ndarray) -> np.ndarray:
        """Return the tokens that each document has in the text on which the base is trained."""
        ends = self.starts[documents] + self.lengths[documents]
        ends_with_bos = self.stream.numpy()[ends - 1] == BOS_ID
        return self.lengths[documents] - (ends_with_bos if self.config.phased_ttt_drop_next_bos else 0)

    def _joined(self, documents: np.ndarray) -> Tensor:
        """Return the documents' tokens, joined, int64 on the CPU."""
        spans = zip(self.starts[documents], self._kept_lengths(documents), strict=True)
        return torch.cat([self.stream[start : start + length] for start, length in spans]).long()

    def result(self, byte_table: ByteCounter) -> TTTResult:
        """Sum over all ranks. Raises RuntimeError unless each target of the chosen documents was scored once."""
        documents = np.concatenate([batch.documents for phase in self.phases for batch in phase.batches])
        expected = np.zeros_like(self.predictions)
        expected[documents] = self.predictions[documents]
        if (self.ledger.scored != expected).any():
            raise RuntimeError("test-time training left targets unscored")
        if self.world_size > 1:
            dist.all_reduce(self.token_nats)  # nonzero only on the rank that scored
        token_nats = self.token_nats[:-1].cpu()
        targets, byte_counts = self.predictions[documents], byte_table.of_stream(self.stream).numpy()
        nats = np.add.reduceat(token_nats.double().numpy(), self.starts)[documents]
        byte_counts = np.add.reduceat(byte_counts, self.starts, dtype=np.int64)[documents]
        for start, length in zip(self.starts[expected == 0], self.predictions[expected == 0], strict=True):
            token_nats[start : start + length] = math.nan
        total_nats, count, total_bytes = float(nats.sum()), int(targets.sum()), int(byte_counts.sum())
        return TTTResult(
            loss=total_nats / count,
            bits_per_byte=bits_per_byte(total_nats, total_bytes),
            tokens=count,
            bytes=total_bytes,
            documents=documents.size,
            phases=self.phase_log,
            global_steps=sum(phase["sgd_steps"] for phase in self.phase_log),
            by_length=_by_length(targets, nats, byte_counts),
            first_score_seconds=self.first_score,
            token_nats=token_nats,
        )


def _by_length(targets: np.ndarray, nats: np.ndarray, byte_counts: np.ndarray) -> list[dict[str, Any]]:
    """Return the score for each power of two of a document's targets; leave out lengths without any byte of text."""
    powers = np.log2(targets).astype(np.int64)
    rows = []
    for power in np.unique(powers):
        chosen = powers == power
        if byte_counts[chosen].sum() > 0:
            score = bits_per_byte(float(nats[chosen].sum()), int(byte_counts[chosen].sum()))
            counts = (2 ** int(power), 2 ** int(power + 1), int(chosen.sum()), int(targets[chosen].sum()), score)
            rows.append(dict(zip(("low", "high", "documents", "tokens", "bits_per_byte"), counts, strict=True)))
    return rows
