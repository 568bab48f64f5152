"""Score-first test-time training: documents are scored chunk by chunk, and learned from only after they are scored.

Every document has its own adapters (`pgolf.lora`), updated on a chunk once its loss is recorded. After fixed numbers
of documents the base weights are trained on documents that are scored as a whole (a phase ends); later ones are scored
with the result. Who scores what and when each phase ends is computed beforehand from document lengths alone, so that
every rank makes the same collective calls and the same inputs give the same score.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.bpb import ByteTable, bits_per_byte
from pgolf.config import RunConfig
from pgolf.evaluate import ROWS_OF_A_BATCH, Progress, check_stream, evaluation_mode, find_documents, to_device
from pgolf.loader import segment_boundaries
from pgolf.lora import LoraBank, LoraInit
from pgolf.model import BOS_ID, GPT, head_losses

BYTES_PIECE = 1 << 22  # targets whose bytes are counted at once


class TTTResult(NamedTuple):
    """What test-time training scored."""

    loss: float  # mean nats of a target
    bits_per_byte: float
    tokens: int  # targets
    bytes: int
    documents: int
    phases: list[dict[str, Any]]  # documents_scored, documents_trained, sgd_steps, seconds of each
    global_steps: int
    by_length: list[dict[str, Any]]  # low <= targets of a document < high: documents, tokens, bits_per_byte
    token_nats: Tensor | None  # float32 [N - 1] on the CPU, NaN where not scored; only if asked for


class Batch(NamedTuple):
    """Documents scored side by side."""

    number: int  # 0 has the shortest documents
    documents: np.ndarray  # indices, shortest first


class Phase(NamedTuple):
    """Batches in processing order, and the documents that the base weights are trained on when all are scored."""

    batches: list[Batch]
    trained: np.ndarray


class ChunkWindows(NamedTuple):
    """For every chunk and document of a batch, int64 [chunks, documents]; zeros where the document has ended."""

    start: np.ndarray  # first input of the window, from the document's start
    length: np.ndarray  # inputs in the window
    offset: np.ndarray  # where in the window the chunk begins
    scored: np.ndarray  # targets in the chunk
    goes_on: np.ndarray  # 1 where a later chunk follows


class ScoredLedger:
    """How many targets of every document are scored, from its start: the proof that scoring comes first.

    Only numbers of the host; `score` and `train` are called before what they record is done.
    """

    def __init__(self, predictions: np.ndarray) -> None:
        self.predictions = predictions
        self.scored = np.zeros_like(predictions)

    def score(self, documents: np.ndarray, first: np.ndarray | int, last: np.ndarray | int) -> None:
        """Targets [first, last) of each document are about to be scored. Raises RuntimeError if not the next ones."""
        if (self.scored[documents] != first).any() or (last > self.predictions[documents]).any():
            raise RuntimeError("test-time training would score a target twice, or leave one out")
        self.scored[documents] = last

    def train(self, documents: np.ndarray, last: np.ndarray | int) -> None:
        """Targets below ``last`` are about to be learned from. Raises RuntimeError where they are not scored yet."""
        if (self.scored[documents] < last).any():
            raise RuntimeError("test-time training would learn from a target that is not scored yet")

    def merge(self, world_size: int, device: torch.device) -> None:
        """Take over what the other ranks have scored; waits for them."""
        if world_size > 1:
            everywhere = torch.from_numpy(self.scored).to(device)
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
            self.scored = everywhere.cpu().numpy()


def evaluate(
    model: GPT,
    config: RunConfig,
    tokens: Tensor,
    byte_table: ByteTable,
    *,
    lora_init: LoraInit | None = None,
) -> tuple[float, float]:
    """Mean loss in nats and bits per byte of `test_time_training` on one process."""
    result = test_time_training(model, config, tokens, byte_table, lora_init=lora_init)
    return result.loss, result.bits_per_byte


def test_time_training(
    model: GPT,
    config: RunConfig,
    tokens: Tensor,
    byte_table: ByteTable,
    *,
    lora_init: LoraInit | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    keep_token_losses: bool = False,
) -> TTTResult:
    """Score a stream of documents with adapters that learn from each, and a base that learns from all.

    Args:
        model: scored with looping on. Its weights change on the way and are put back at the end, also after an error,
            with their requires_grad flags, the training flag and the loop state.
        tokens: 1-D token ids, any integer dtype, a stream of documents that each begin with BOS.
        byte_table: of the tokenizer they were made with.
        lora_init: lora_init(rank, in_features) gives the start of every adapter's A; None draws it from the seed.
        rank, world_size: this process among those that share the work; all must call with the same arguments.
        progress: wraps the iterable of steps, as `pgolf.progress.progress` does; None shows nothing.
        keep_token_losses: also return every target's loss.

    All sums are fp64. Raises ValueError for a stream that does not begin with BOS and for settings that do not fit.
    """
    tokens = check_stream(tokens, config, byte_table, world_size)
    _check_settings(config)
    if int(tokens[0]) != BOS_ID:
        raise ValueError(f"the stream must begin with a document's BOS ({BOS_ID}), and begins with {int(tokens[0])}")
    with evaluation_mode(model), _looping(model), _weights_restored(model), torch.enable_grad():
        run = _Run(model, config, tokens, lora_init, rank, world_size, keep_token_losses)
        phases = plan_phases(run.predictions, config)
        steps = run.steps(phases)
        if progress is not None:
            steps = progress(steps, total=run.count_steps(phases), description="test-time training", unit="chunks")
        for _ in steps:
            pass
        return run.result(phases, byte_table)


def plan_phases(predictions: np.ndarray, config: RunConfig) -> list[Phase]:
    """The whole schedule, from the number of targets of every document.

    Documents sorted by (length, index) are cut into batches of ttt_batch_size, and the longest are scored first.
    Phase k of phased_ttt_num_phases ends after the batch with which at least ⌊prefix k / phases⌋ documents are scored
    (prefix: phased_ttt_prefix_docs, at most all), and that many of them are trained on: by phased_ttt_documents the
    shortest (the public rule), the longest, or the first of the stream. Later batches make a last phase without
    training; a training nobody would use is left out.
    """
    order = np.argsort(predictions, kind="stable")
    size = config.ttt_batch_size
    batches = [Batch(i, order[low : low + size]) for i, low in enumerate(range(0, order.size, size))]
    batches = [batches[number] for number in reversed(_selected_batches(config.ttt_eval_batches, len(batches)))]
    documents = sum(batch.documents.size for batch in batches)
    prefix = min(config.phased_ttt_prefix_docs, documents) if config.phased_ttt_enabled else 0
    count = config.phased_ttt_num_phases
    boundaries = [boundary for k in range(count) if (boundary := prefix * (k + 1) // count)]
    phases, scored, first = [], 0, 0
    for position, batch in enumerate(batches[:-1]):
        scored += batch.documents.size
        if boundaries and scored >= boundaries[0]:
            chosen = _training_documents(batches[: position + 1], boundaries.pop(0), config.phased_ttt_documents)
            phases.append(Phase(batches[first : position + 1], chosen))
            first = position + 1
    return [*phases, Phase(batches[first:], order[:0])]


def _selected_batches(setting: str, count: int) -> list[int]:
    """Batch numbers, ascending. Raises ValueError for a list that is none, and for numbers out of range."""
    if not setting.strip():
        return list(range(count))
    try:
        numbers = sorted({int(part) for part in setting.split(",")})
    except ValueError:
        raise ValueError(f"ttt_eval_batches must be numbers with commas between, like 0,5,9: got {setting!r}") from None
    if numbers[0] < 0 or numbers[-1] >= count:
        raise ValueError(f"ttt_eval_batches {setting!r}: there are {count} batches, numbered 0 to {count - 1}")
    return numbers


def _training_documents(batches: list[Batch], count: int, choice: str) -> np.ndarray:
    """``count`` of the scored documents, in the order in which they are joined."""
    by_length = np.concatenate([batch.documents for batch in reversed(batches)])  # shortest first
    ordered = {"shortest": by_length, "longest": by_length[::-1], "stream": np.sort(by_length)}[choice]
    return ordered[:count]


def chunk_windows(predictions: np.ndarray, chunk: int, context: int) -> ChunkWindows:
    """Windows of all chunks: one ends with its chunk and is as long as document and ``context`` allow."""
    counts = -(-predictions // chunk)
    index = np.arange(counts.max())[:, None]
    first = index * chunk
    last = np.minimum(first + chunk, predictions)
    start = np.maximum(last - context, 0)
    fields = (start, last - start, first - start, last - first, index < counts - 1)
    return ChunkWindows(*(np.where(index < counts, field, 0).astype(np.int64) for field in fields))


def rows_in_use(documents: int, active: int) -> int:
    """Rows of a forward pass: the documents of the batch, halved while that leaves the active ones and two rows.

    Halving keeps the number of shapes small; a single row would be one more, as compilers treat size 1 apart.
    """
    while documents // 2 >= max(active, 2):
        documents //= 2
    return documents


def batch_cost(predictions: np.ndarray, config: RunConfig) -> int:
    """Tokens that go through the model for a batch with so many targets in each document."""
    windows = chunk_windows(predictions, config.ttt_chunk_size, config.ttt_eval_seq_len)
    rows = [rows_in_use(predictions.size, int(active)) for active in (windows.scored > 0).sum(1)]
    widths = np.minimum(np.arange(1, len(rows) + 1) * config.ttt_chunk_size, config.ttt_eval_seq_len)
    return int(widths @ rows)


def deal_batches(costs: list[int], world_size: int) -> list[int]:
    """Rank of every batch: the costliest first, each to the rank with the least work so far."""
    work, ranks = [0] * world_size, [0] * len(costs)
    for batch in sorted(range(len(costs)), key=lambda i: -costs[i]):
        ranks[batch] = work.index(min(work))
        work[ranks[batch]] += costs[batch]
    return ranks


def global_learning_rate(chunk: int, chunks: int, config: RunConfig) -> float:
    """Rate of the base weights' training at ``chunk`` of ``chunks``, of which the last is never trained on.

    A linear warm-up over global_ttt_warmup_chunks, then half a cosine from global_ttt_lr to 0.
    """
    warmup = min(config.global_ttt_warmup_chunks, chunks - 1)
    if chunk < warmup:
        start = config.global_ttt_warmup_start_lr
        return start + (config.global_ttt_lr - start) * chunk / max(warmup - 1, 1)
    done = (chunk - warmup) / max(chunks - 1 - warmup, 1)
    return config.global_ttt_lr * 0.5 * (1.0 + math.cos(math.pi * done))


def _check_settings(config: RunConfig) -> None:
    if config.ttt_chunk_size > config.ttt_eval_seq_len:
        raise ValueError(
            f"ttt_chunk_size {config.ttt_chunk_size} is longer than ttt_eval_seq_len {config.ttt_eval_seq_len}: "
            "a chunk must fit into its own context"
        )
    if config.phased_ttt_enabled and config.global_ttt_chunk_tokens < config.eval_seq_len:
        raise ValueError(
            f"global_ttt_chunk_tokens {config.global_ttt_chunk_tokens} must hold a sequence of eval_seq_len "
            f"{config.eval_seq_len} tokens, or nothing would be trained on"
        )


@contextmanager
def _looping(model: GPT) -> Iterator[None]:
    """The loop as all scoring has it: on, where the model has one."""
    was_looping = model.looping_active
    model.looping_active = model.config.num_loops > 0
    try:
        yield
    finally:
        model.looping_active = was_looping


@contextmanager
def _weights_restored(model: GPT) -> Iterator[None]:
    """Keeps the weights and their requires_grad flags; freezes them meanwhile."""
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


@dataclass
class _Run:
    """One pass over the documents."""

    model: GPT
    config: RunConfig
    stream: Tensor  # int32 on the CPU
    lora_init: LoraInit | None
    rank: int
    world_size: int
    keep_token_losses: bool

    def __post_init__(self) -> None:
        self.device = self.model.qo_bank.device
        self.tokens = self.stream.to(self.device)
        self.starts, self.lengths = find_documents(self.stream)
        self.predictions = self.lengths - 1
        self.ledger = ScoredLedger(self.predictions)
        self.nats = torch.zeros(self.starts.size, dtype=torch.float64, device=self.device)  # of each document
        entries = self.stream.numel()  # one more than targets: the last takes positions beyond a document's end
        self.token_nats = torch.full((entries,), math.nan, device=self.device) if self.keep_token_losses else None
        self.bank: LoraBank | None = None
        self.phase_log: list[dict[str, Any]] = []

    def steps(self, phases: list[Phase]) -> Iterator[None]:
        """Do everything, and yield after every chunk and every step of the base weights."""
        scored = 0
        for phase in phases:
            began = time.perf_counter()
            for batch in self._mine(phase):
                yield from self._score_batch(batch)
            self.bank = None  # the next base begins with fresh adapters
            self.ledger.merge(self.world_size, self.device)
            self.ledger.train(phase.trained, self.predictions[phase.trained])
            sgd_steps = self._sgd_schedule(phase.trained)
            if sgd_steps:
                yield from self._train_base(self._joined(phase.trained), sgd_steps)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            scored += sum(batch.documents.size for batch in phase.batches)
            counts = (scored, int(phase.trained.size), len(sgd_steps), time.perf_counter() - began)
            names = ("documents_scored", "documents_trained", "sgd_steps", "seconds")
            self.phase_log.append(dict(zip(names, counts, strict=True)))

    def count_steps(self, phases: list[Phase]) -> int:
        """How often `steps` yields."""
        chunks = sum(
            -(-int(self.predictions[batch.documents].max()) // self.config.ttt_chunk_size)
            for phase in phases
            for batch in self._mine(phase)
        )
        return chunks + sum(len(self._sgd_schedule(phase.trained)) for phase in phases)

    def _mine(self, phase: Phase) -> list[Batch]:
        costs = [batch_cost(self.predictions[batch.documents], self.config) for batch in phase.batches]
        ranks = deal_batches(costs, self.world_size)
        return [batch for batch, rank in zip(phase.batches, ranks, strict=True) if rank == self.rank]

    def _score_batch(self, batch: Batch) -> Iterator[None]:
        """Score the batch's documents chunk by chunk, and after each chunk train the adapters on it."""
        c, documents, size = self.config, batch.documents, batch.documents.size
        windows = chunk_windows(self.predictions[documents], c.ttt_chunk_size, c.ttt_eval_seq_len)
        places = np.stack(np.broadcast_arrays(*windows, self.starts[documents], documents))
        on_device = to_device(torch.from_numpy(places), self.device)  # [7, chunks, documents]
        bank = self._bank_for(size)
        bank.begin(batch.number)
        for chunk in range(len(windows.start)):
            active, learning = int((windows.scored[chunk] > 0).sum()), int(windows.goes_on[chunk].sum())
            rows, first = rows_in_use(size, active), chunk * c.ttt_chunk_size
            bank.narrow(rows)
            view = self._view(on_device[:, chunk, size - rows :], first)
            self.ledger.score(documents[size - active :], first, first + windows.scored[chunk, size - active :])
            losses = self._losses(view, bank)
            self._record(view, losses.detach())
            if learning:
                self.ledger.train(documents[size - learning :], first + c.ttt_chunk_size)
                for repeat in range(c.ttt_grad_steps):
                    losses = self._losses(view, bank) if repeat else losses
                    bank.update((losses.mean(1) * view.goes_on).sum(), learning)
            yield

    def _bank_for(self, slots: int) -> LoraBank:
        """The phase's adapters; a batch of another size gets its own."""
        if self.bank is None or self.bank.slots != slots:
            self.bank = None  # first the memory, then a new one
            passes = sum(len(part) for part in self.model.execution_lists())
            self.bank = LoraBank(self.config, slots, passes, self.device, self.lora_init)
        return self.bank

    def _view(self, places: Tensor, first: int) -> _View:
        """Gather the tokens of a chunk that begins at target ``first`` of its documents; ``places`` is [7, rows]."""
        start, length, offset, scored, goes_on, begin, document = places
        chunk, last = self.config.ttt_chunk_size, self.tokens.numel() - 1
        in_window = torch.arange(min(first + chunk, self.config.ttt_eval_seq_len), device=self.device)
        in_chunk = in_window[:chunk]
        inputs = self.tokens[((begin + start)[:, None] + in_window).clamp(max=last)].long()
        inputs = inputs * (in_window < length[:, None])  # 0 after a window's end: causal attention never looks there
        stream = begin[:, None] + first + in_chunk
        counted = in_chunk < scored[:, None]
        targets = self.tokens[(stream + 1).clamp(max=last)].long() * counted
        positions = (offset[:, None] + in_chunk).clamp(max=in_window.numel() - 1)
        return _View(inputs, targets, positions, counted, torch.where(counted, stream, last), goes_on.float(), document)

    def _losses(self, view: _View, bank: LoraBank) -> Tensor:
        """Nats [rows, chunk] of the chunk's targets; the head sees no other position."""
        adapters = bank.adapters()
        h = self.model.hidden(view.inputs, adapters=adapters)
        h = h.gather(1, view.positions[:, :, None].expand(-1, -1, h.size(-1)))
        table, cap = self.model.head_weight.to(h.dtype), self.config.logit_softcap
        return head_losses(h, table, view.targets, cap, adapters.head, adapters.scale, self.config.ttt_logits_fp32)

    def _record(self, view: _View, losses: Tensor) -> None:
        self.nats.index_add_(0, view.document, torch.where(view.counted, losses, 0).sum(1, dtype=torch.float64))
        if self.token_nats is not None:
            self.token_nats[view.stream] = losses

    def _kept_lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document in the text that the base is trained on."""
        ends = self.starts[documents] + self.lengths[documents]
        ends_with_bos = self.stream.numpy()[ends - 1] == BOS_ID
        return self.lengths[documents] - (ends_with_bos if self.config.phased_ttt_drop_next_bos else 0)

    def _joined(self, documents: np.ndarray) -> Tensor:
        """The documents one after another, int64 on the CPU."""
        spans = zip(self.starts[documents], self._kept_lengths(documents), strict=True)
        return torch.cat([self.stream[start : start + length] for start, length in spans]).long()

    def _sgd_schedule(self, documents: np.ndarray) -> list[_SgdStep]:
        """Steps over the joined documents: all chunks of global_ttt_chunk_tokens but the last.

        A chunk is cut into sequences of eval_seq_len, and these into rows of an eighth of the chunk (what a rank of
        the public run has), whatever the number of ranks. A rank takes global_ttt_batch_seqs sequences a step at most.
        """
        c, ranks = self.config, range(self.world_size)
        chunks = -(-(int(self._kept_lengths(documents).sum()) - 1) // c.global_ttt_chunk_tokens)
        sequences = c.global_ttt_chunk_tokens // c.eval_seq_len
        size = min(-(-sequences // ROWS_OF_A_BATCH), c.global_ttt_batch_seqs)
        cuts = [min(cut, sequences) * c.eval_seq_len for cut in range(0, sequences + size, size)]
        rows = list(pairwise(cuts))
        shares = [rows[len(rows) * r // self.world_size : len(rows) * (r + 1) // self.world_size] for r in ranks]
        at_once = c.global_ttt_batch_seqs // size
        rounds = range(0, max(map(len, shares)), at_once)
        steps = []
        for chunk in range(chunks - 1):
            rate, origin = global_learning_rate(chunk, chunks, c), chunk * c.global_ttt_chunk_tokens
            for first in [*rounds] * c.global_ttt_epochs:
                taken = [share[first : first + at_once] for share in shares]
                steps.append(_SgdStep(rate, [[(origin + low, origin + high) for low, high in part] for part in taken]))
        return steps

    def _train_base(self, text: Tensor, steps: list[_SgdStep]) -> Iterator[None]:
        """SGD with fresh momentum on the base weights, on text that is scored; yields after every step."""
        parameters = list(self.model.requires_grad_(True).parameters())
        optimizer = torch.optim.SGD(parameters, lr=self.config.global_ttt_lr, momentum=self.config.global_ttt_momentum)
        for step in steps:
            optimizer.param_groups[0]["lr"] = step.rate
            optimizer.zero_grad()
            total = sum(stop - start for rows in step.rows for start, stop in rows)
            for start, stop in step.rows[self.rank]:  # every token of the step weighs the same
                (self._base_loss(text[start : stop + 1]) / total).backward()
            if self.world_size > 1:
                _sum_gradients(parameters)
            if self.config.global_ttt_grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.global_ttt_grad_clip)
            optimizer.step()
            yield
        optimizer.zero_grad()
        self.model.requires_grad_(False)

    def _base_loss(self, span: Tensor) -> Tensor:
        """Summed nats of one row: ``span`` is its inputs and one target more."""
        c = self.config
        inputs, targets = (to_device(part.contiguous(), self.device)[None] for part in (span[:-1], span[1:]))
        if c.global_ttt_respect_doc_boundaries:
            cu_seqlens = to_device(segment_boundaries(span[:-1], c.eval_seq_len), self.device)
            rows = (inputs, targets, cu_seqlens, c.eval_seq_len)
        else:
            rows = (inputs.view(-1, c.eval_seq_len), targets.view(-1, c.eval_seq_len))
        return self.model.token_losses(*rows, logits_fp32=c.ttt_logits_fp32).sum()

    def result(self, phases: list[Phase], byte_table: ByteTable) -> TTTResult:
        """Sums over all ranks. Raises RuntimeError unless every target of the chosen documents was scored once."""
        documents = np.concatenate([batch.documents for phase in phases for batch in phase.batches])
        expected = np.zeros_like(self.predictions)
        expected[documents] = self.predictions[documents]
        if (self.ledger.scored != expected).any():
            raise RuntimeError("test-time training left targets unscored")
        if self.world_size > 1:
            dist.all_reduce(self.nats)
        token_nats = None if self.token_nats is None else _gathered(self.token_nats[:-1], self.world_size)
        nats, targets = self.nats.cpu().numpy()[documents], self.predictions[documents]
        byte_counts = _document_bytes(self.stream, self.starts, byte_table)[documents]
        total_nats, tokens, total_bytes = float(nats.sum()), int(targets.sum()), int(byte_counts.sum())
        return TTTResult(
            loss=total_nats / tokens,
            bits_per_byte=bits_per_byte(total_nats, total_bytes),
            tokens=tokens,
            bytes=total_bytes,
            documents=documents.size,
            phases=self.phase_log,
            global_steps=sum(phase["sgd_steps"] for phase in self.phase_log),
            by_length=_by_length(targets, nats, byte_counts),
            token_nats=token_nats,
        )


class _View(NamedTuple):
    """A chunk of the documents in use, on the device."""

    inputs: Tensor  # int64 [rows, width]
    targets: Tensor  # int64 [rows, chunk]
    positions: Tensor  # int64 [rows, chunk], of the chunk in the window
    counted: Tensor  # bool [rows, chunk]
    stream: Tensor  # int64 [rows, chunk], index of each target; the last token's where not counted
    goes_on: Tensor  # float32 [rows], 1 where the document has a later chunk
    document: Tensor  # int64 [rows]


class _SgdStep(NamedTuple):
    """One step of the base weights."""

    rate: float
    rows: list[list[tuple[int, int]]]  # tokens [start, stop) of each rank's rows


def _sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Add up all gradients over the ranks in one call; a rank without any contributes zeros."""
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.flatten().float() for piece in pieces])
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype)


def _gathered(token_nats: Tensor, world_size: int) -> Tensor:
    """Every target's loss on the CPU, from whichever rank scored it."""
    if world_size > 1:
        everywhere = torch.stack([token_nats.nan_to_num(0.0), (~token_nats.isnan()).float()])
        dist.all_reduce(everywhere)
        token_nats = everywhere[0].masked_fill(everywhere[1] == 0, math.nan)
    return token_nats.cpu()


def _document_bytes(stream: Tensor, starts: np.ndarray, byte_table: ByteTable) -> np.ndarray:
    """Bytes of every document's targets, int64."""
    table, last = byte_table.to("cpu"), stream.numel() - 1
    pieces = [slice(low, min(low + BYTES_PIECE, last)) for low in range(0, last, BYTES_PIECE)]
    counts = [table.count(stream[piece], stream[piece.start + 1 : piece.stop + 1]).int() for piece in pieces]
    return np.add.reduceat(torch.cat(counts).numpy(), starts, dtype=np.int64)


def _by_length(targets: np.ndarray, nats: np.ndarray, byte_counts: np.ndarray) -> list[dict[str, Any]]:
    """The score by powers of two of a document's targets; lengths without a single byte of text are left out."""
    powers = np.log2(targets).astype(np.int64)
    rows = []
    for power in np.unique(powers):
        chosen = powers == power
        if byte_counts[chosen].sum() > 0:
            score = bits_per_byte(float(nats[chosen].sum()), int(byte_counts[chosen].sum()))
            counts = (2 ** int(power), 2 ** int(power + 1), int(chosen.sum()), int(targets[chosen].sum()), score)
            rows.append(dict(zip(("low", "high", "documents", "tokens", "bits_per_byte"), counts, strict=True)))
    return rows
