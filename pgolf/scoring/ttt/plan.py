"""The schedule of test-time training, from document lengths and settings alone.

Each rank computes the whole schedule, so that all make the same collective calls. Batches are dealt to a fixed number
of lanes, and lanes to ranks. Adapters keep their A from batch to batch within a lane, so that the score does not depend
on the number of ranks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pgolf.config import RunConfig
from pgolf.scoring.stream import PUBLIC_RANKS

UPDATE_TOKENS = 5000  # an update of a batch's adapters takes as long as about 5000 tokens (estimate, H200)


class Batch(NamedTuple):
    """Documents that are scored at the same time."""

    number: int  # 0 is scored last
    documents: np.ndarray  # indices, shortest or latest first


class Phase(NamedTuple):
    """Batches in processing order, and the documents on which the base weights are trained after all are scored."""

    batches: list[Batch]
    trained: np.ndarray


class ChunkWindows(NamedTuple):
    """The window of each chunk of a batch's documents, int64 [chunks, documents]; zeros after a document's end."""

    start: np.ndarray  # first input of the window, from the document's start
    length: np.ndarray  # inputs in the window, of which the chunk's are the last
    scored: np.ndarray  # targets in the chunk
    goes_on: np.ndarray  # 1 if the document has a later chunk


class SgdStep(NamedTuple):
    """One SGD step of the base weights."""

    rate: float
    rows: list[list[tuple[int, int]]]  # tokens [start, stop) of each rank's rows


def plan_phases(predictions: np.ndarray, config: RunConfig) -> list[Phase]:
    """Return the phases, from the number of targets of each document.

    Documents sorted by (length, index) are cut into batches of ttt_batch_size, and the longest are scored first. With
    ttt_order=stream they are not sorted, and a document is scored before anything is learned from a later one.
    Phase k of phased_ttt_num_phases ends after the batch with which at least n_k = ⌊prefix k / phases⌋ documents are
    scored, where prefix is phased_ttt_prefix_docs or the number of documents. The base is then trained on n_k of them:
    by phased_ttt_documents the shortest (the public rule), the longest, or the first of the stream. Later batches are a
    last phase without training. A training after the last batch is left out.
    """
    order = np.arange(predictions.size)[::-1]
    if config.ttt_order == "length":
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
            chosen = _training_documents(
                batches[: position + 1], predictions, boundaries.pop(0), config.phased_ttt_documents
            )
            phases.append(Phase(batches[first : position + 1], chosen))
            first = position + 1
    return [*phases, Phase(batches[first:], order[:0])]


def _selected_batches(setting: str, count: int) -> list[int]:
    """Return batch numbers in ascending order. Raises ValueError for a bad list and for numbers out of range."""
    if not setting.strip():
        return list(range(count))
    try:
        numbers = sorted({int(part) for part in setting.split(",")})
    except ValueError:
        raise ValueError(f"ttt_eval_batches must be numbers with commas between, like 0,5,9: got {setting!r}") from None
    if numbers[0] < 0 or numbers[-1] >= count:
        raise ValueError(f"ttt_eval_batches {setting!r}: there are {count} batches, numbered 0 to {count - 1}")
    return numbers


def _training_documents(batches: list[Batch], predictions: np.ndarray, count: int, choice: str) -> np.ndarray:
    """Return ``count`` of the scored documents, in the order in which they are joined."""
    scored = np.sort(np.concatenate([batch.documents for batch in batches]))
    by_length = scored[np.argsort(predictions[scored], kind="stable")]
    ordered = {"shortest": by_length, "longest": by_length[::-1], "stream": scored}[choice]
    return ordered[:count]


def chunk_sizes(predictions: np.ndarray, config: RunConfig) -> np.ndarray:
    """Return each document's targets in a chunk: ttt_chunk_size, or by its length from ttt_chunks_by_length."""
    sizes = np.full(predictions.shape, config.ttt_chunk_size)
    for below, size in reversed(config.chunks_by_length()):
        sizes[predictions < below] = size
    return sizes


def chunk_windows(predictions: np.ndarray, chunks: np.ndarray | int, context: int) -> ChunkWindows:
    """Return the windows of all chunks: a window ends with its chunk and has at most ``context`` inputs."""
    counts = -(-predictions // chunks)
    index = np.arange(counts.max())[:, None]
    first = index * chunks
    last = np.minimum(first + chunks, predictions)
    start = np.maximum(last - context, 0)
    fields = (start, last - start, last - first, index < counts - 1)
    return ChunkWindows(*(np.where(index < counts, field, 0).astype(np.int64) for field in fields))


def batch_windows(predictions: np.ndarray, config: RunConfig) -> ChunkWindows:
    """Return the windows of documents with ``predictions`` targets, by the settings."""
    return chunk_windows(predictions, chunk_sizes(predictions, config), config.ttt_eval_seq_len)


def lanes_of_phase(phase: Phase, predictions: np.ndarray, config: RunConfig) -> list[list[Batch]]:
    """Return the phase's batches for each lane, in processing order; see `deal`."""
    windows = [batch_windows(predictions[batch.documents], config) for batch in phase.batches]
    costs = [int(window.length.sum()) + UPDATE_TOKENS * len(window.length) for window in windows]
    lanes = deal(costs, config.ttt_lanes)
    return [
        [batch for batch, lane in zip(phase.batches, lanes, strict=True) if lane == i] for i in range(max(lanes) + 1)
    ]


def deal(costs: list[int], lanes: int) -> list[int]:
    """Return the lane of each batch: in order of decreasing cost, each goes to the lane with the least work so far."""
    work, dealt = [0] * lanes, [0] * len(costs)
    for batch in sorted(range(len(costs)), key=lambda i: -costs[i]):
        dealt[batch] = work.index(min(work))
        work[dealt[batch]] += costs[batch]
    return dealt


def sgd_schedule(tokens: int, config: RunConfig, world_size: int) -> list[SgdStep]:
    """Return the base's steps over ``tokens`` joined tokens: all chunks of global_ttt_chunk_tokens but the last.

    A chunk is cut into sequences of eval_seq_len tokens, and these are grouped in rows of an eighth of the chunk, as on
    a rank of the public run, for any number of ranks. A rank takes at most global_ttt_batch_seqs sequences in a step.
    """
    ranks, chunks = range(world_size), -(-(tokens - 1) // config.global_ttt_chunk_tokens)
    sequences = config.global_ttt_chunk_tokens // config.eval_seq_len
    size = min(-(-sequences // PUBLIC_RANKS), config.global_ttt_batch_seqs)
    cuts = [min(cut, sequences) * config.eval_seq_len for cut in range(0, sequences + size, size)]
    rows = list(pairwise(cuts))
    shares = [rows[len(rows) * r // world_size : len(rows) * (r + 1) // world_size] for r in ranks]
    at_once = config.global_ttt_batch_seqs // size
    rounds = range(0, max(map(len, shares)), at_once)
    steps = []
    for chunk in range(chunks - 1):
        rate, origin = global_learning_rate(chunk, chunks, config), chunk * config.global_ttt_chunk_tokens
        for first in [*rounds] * config.global_ttt_epochs:
            taken = [share[first : first + at_once] for share in shares]
            steps.append(SgdStep(rate, [[(origin + low, origin + high) for low, high in part] for part in taken]))
    return steps


def global_learning_rate(chunk: int, chunks: int, config: RunConfig) -> float:
    """Return the base's learning rate at ``chunk`` of ``chunks``, of which the last is not trained on.

    The rate rises linearly over global_ttt_warmup_chunks, then falls by half a cosine from global_ttt_lr to 0.
    """
    warmup = min(config.global_ttt_warmup_chunks, chunks - 1)
    if chunk < warmup:
        start = config.global_ttt_warmup_start_lr
        return start + (config.global_ttt_lr - start) * chunk / max(warmup - 1, 1)
    done = (chunk - warmup) / max(chunks - 1 - warmup, 1)
    return config.global_ttt_lr * 0.5 * (1.0 + math.cos(math.pi * done))
