"""Choosing documents for a short audit."""

from __future__ import annotations

import numpy as np

from pgolf.audit.protocol import Documents
from pgolf.config import RunConfig
from pgolf.scoring.stream import PUBLIC_RANKS

COUNT, BATCH = 6, 3  # documents, and documents that are adapted side by side


def sample(documents: Documents, config: RunConfig) -> tuple[Documents, RunConfig]:
    """Choose a few documents, and settings with which test-time training has every part on them.

    One is the shortest that exceeds the context by a chunk, so that its window moves beside others; a long document
    takes most of the time, step after step. The others are drawn by the seed from the shorter half. Batches have BATCH
    documents, a phase trains the base before the last one, and evaluation has a few rows.
    """
    lengths = np.diff(documents.starts, append=documents.stream.size)
    order = np.argsort(lengths, kind="stable")
    beyond = config.ttt_eval_seq_len + config.ttt_chunk_size
    first = min(int(np.searchsorted(lengths[order], beyond)), order.size - 1)
    long = order[first : first + 1]
    pool = order[: max(order.size // 2, COUNT)]
    pool = np.setdiff1d(pool[lengths[pool] > 2], long)
    short = np.random.default_rng(config.seed).permutation(pool)[: COUNT - long.size]
    pieces = np.split(documents.stream, documents.starts[1:])
    chosen = np.sort([*long, *short])
    stream = np.concatenate([pieces[document] for document in chosen])
    sidecar = None
    if documents.sidecar is not None:
        counts = np.split(documents.sidecar, documents.starts[1:])
        sidecar = np.concatenate([counts[document] for document in chosen])
    rows = max(stream.size // 3 // config.eval_seq_len, 1)  # windows of a row of evaluation, of which there are a few
    settings = config.replace(
        val_batch_tokens=PUBLIC_RANKS * rows * config.eval_seq_len,
        ttt_batch_size=min(config.ttt_batch_size, BATCH),
        phased_ttt_prefix_docs=min(config.phased_ttt_prefix_docs, max(COUNT - BATCH, 1)),
        phased_ttt_num_phases=min(config.phased_ttt_num_phases, 1),
        global_ttt_chunk_tokens=config.eval_seq_len,
        ttt_eval_batches="",
        val_doc_fraction=1.0,
    )
    return Documents(stream, documents.decode, documents.bos, sidecar), settings
