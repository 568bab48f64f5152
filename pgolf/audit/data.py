"""The conditions of the data: the whole split, its bytes, and no training document in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pgolf.audit.checks import FAILED, NOT_CHECKED, PASSED, Finding
from pgolf.audit.protocol import Documents

CHALLENGE_DOCUMENTS = 50_000  # the first of the challenge's file are its validation split
CHALLENGE_BYTES = 150_900_000, 151_300_000  # of normalised text: about 151.08 million, by any tokenizer
BLOCK = 1 << 22  # tokens hashed at once, which bounds memory
NORMALISED = 1e-4  # of a text's bytes, by which normalisation may change them
SHARE = 1e-3  # of the validation documents that may be in the training data: published text repeats itself a little


def complete(documents: Documents, stated: Mapping[str, int | None], fineweb: bool) -> Finding:
    """Compare the split with what its manifest states (documents, tokens, bytes), and FineWeb's with the challenge's.

    Args:
        stated: the counts that the manifest states; None, or no entry, for those that it does not.
        fineweb: the data are the challenge's.
    """
    found = {"documents": documents.starts.size, "tokens": documents.stream.size, "bytes": documents.text_bytes}
    known = {name: value for name in found if (value := stated.get(name)) is not None}
    counts = ", ".join(f"{value:,} {name}" for name, value in found.items())

    def finding(verdict: str, evidence: str) -> Finding:
        return Finding("complete", "C4 once each", "validation split", verdict, evidence)

    for name, value in known.items():
        if value != found[name]:
            return finding(FAILED, f"{counts}; the manifest states {value:,} {name}")
    if fineweb and found["documents"] != CHALLENGE_DOCUMENTS:
        return finding(FAILED, f"{counts}; the challenge's split has {CHALLENGE_DOCUMENTS:,} documents")
    if fineweb and not CHALLENGE_BYTES[0] <= found["bytes"] <= CHALLENGE_BYTES[1]:
        return finding(FAILED, f"{counts}; the challenge's split has about 151.08 million bytes")
    if not known and not fineweb:
        return finding(NOT_CHECKED, f"{counts}; no manifest states what the split should have")
    return finding(PASSED, f"{counts}: as the manifest states{' and the challenge has' if fineweb else ''}")


def denominators(
    documents: Documents, counted: int, reported: Mapping[str, tuple[float, float]], fineweb: bool = False
) -> Finding:
    """Compare the bytes of the table, and those that a run's scores imply, with the decoded text's.

    With a sidecar they are compared with its bytes, and these with the decoded text's, from which the original text's
    differ by normalisation only.

    Args:
        counted: bytes by which the run's stages count.
        reported: for each score its mean loss in nats and its bits per byte.
        fineweb: the data are the challenge's, whose text normalisation hardly changes.
    """
    text, targets = documents.text_bytes, documents.stream.size - 1

    def finding(verdict: str, evidence: str) -> Finding:
        return Finding("denominators", "C4 once each", "validation split", verdict, evidence)

    by, of = "the byte table", "the decoded text"
    if documents.sidecar is not None:
        by, of, decoded = "the run", "the byte sidecar", documents.decoded_bytes
        if not abs(text - decoded) <= NORMALISED * decoded:
            differ = f"the byte sidecar has {text:,}, and the decoded text {decoded:,}"
            if fineweb:
                return finding(FAILED, differ)
            return finding(NOT_CHECKED, f"{differ}: normalisation, or not; the original text is not at hand")
    if counted != text:
        return finding(FAILED, f"{by} counts {counted:,}, and {of} has {text:,}")
    for name, (loss, bits) in reported.items():
        implied = loss * targets / math.log(2) / bits if bits else math.inf
        if not abs(implied - text) <= 1e-6 * text:
            return finding(FAILED, f"{name} divides by {implied:,.1f} bytes, and {of} has {text:,}")
    scores = f", and so do {', '.join(reported)}" if reported else ""
    if documents.sidecar is not None:
        scores += f"; the text that the tokens decode to has {documents.decoded_bytes:,}"
    return finding(PASSED, f"{by} counts {text:,}, as {of} has{scores}")


def disjoint(validation: Documents, shards: Iterable[np.ndarray], tokens: int, most: int | None = None) -> Finding:
    """Compare hashes of all validation documents with those of the training documents.

    Args:
        shards: the tokens of the training shards, in order; a document may go on in the next one.
        tokens: in all shards.
        most: training tokens to compare; None: all.
    """
    known = dict(zip(_hashes(validation.stream, validation.starts).tolist(), validation.starts.tolist(), strict=True))
    both: set[int] = set()
    read = documents = 0
    for hashes, size in _document_hashes(shards, validation.bos):
        both.update(known[number] for number in hashes.tolist() if number in known)
        read, documents = read + size, documents + hashes.size
        if most is not None and read >= most:
            break
    share = len(both) / len(known)
    evidence = f"{len(both):,} of {len(known):,} validation documents are among {documents:,} training documents"
    verdict = FAILED if share > SHARE else PASSED
    if verdict == PASSED and read < tokens:
        verdict = NOT_CHECKED
        evidence += f", the first {read:,} of {tokens:,} tokens; --full compares all"
    elif both and verdict == PASSED:
        evidence += f"; up to {SHARE:.1%} are taken for text that repeats itself"
    return Finding("disjoint", "data", "training and validation", verdict, evidence)


def _document_hashes(shards: Iterable[np.ndarray], bos: int) -> Iterable[tuple[np.ndarray, int]]:
    """Yield the hashes of whole documents and their tokens, block by block."""
    rest = np.empty(0, dtype=np.int64)
    for shard in shards:
        for low in range(0, shard.size, BLOCK):
            stream = np.concatenate([rest, shard[low : low + BLOCK].astype(np.int64)])
            starts = np.flatnonzero(stream == bos)
            if starts.size > 1:
                yield _hashes(stream[: starts[-1]], starts[:-1]), int(starts[-1] - starts[0])
            rest = stream[starts[-1] :] if starts.size else stream
    starts = np.flatnonzero(rest == bos)
    if starts.size:
        yield _hashes(rest, starts), rest.size


def _hashes(stream: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each document: sums of random numbers by token, times odd numbers by position."""
    table = np.random.default_rng(0).integers(0, 2**64, 1 << 16, dtype=np.uint64)
    position = np.arange(stream.size) - np.repeat(starts, np.diff(starts, append=stream.size))
    weights = position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    return np.add.reduceat(table[stream] * weights, starts)


def stated_counts(entry: Mapping[str, Any]) -> dict[str, int | None]:
    """Return documents, tokens and bytes of the validation split by a manifest's entry."""
    built, stats = entry.get("splits", {}).get("val", {}), entry.get("stats", {})
    return {
        "documents": built.get("documents", stats.get("docs_val")),
        "tokens": built.get("tokens", stats.get("tokens_val")),
        "bytes": built.get("bytes"),
    }
