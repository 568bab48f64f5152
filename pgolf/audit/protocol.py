"""What a scorer tells the audit: every score before it is learned from, and every change of what predicts.

A scorer is given a stream of documents, each beginning with BOS, and scores token x_t at every place t > 0. It calls
``record`` with what it does, in the order in which it does it, and returns the bits per byte that it would report:

    class Mine:
        name = "mine"

        def score(self, stream, asked, record):
            ...
            record(Scored(start, stop, nats, {"model": fingerprint(weights)}, log_probs))
            record(Updated("model", fingerprint(weights), [(start, stop)]))
            ...
            return bits_per_byte

The audit runs it again and again on changed copies of the stream, so the same stream must give the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

Span = tuple[int, int]  # targets [first, last), as places in the stream


class Scored(NamedTuple):
    """Targets of one document, or of several that follow each other, whose losses are recorded."""

    start: int  # the targets are the tokens at places [start, stop) of the stream
    stop: int
    nats: np.ndarray  # [stop - start], the loss that is charged for each
    states: Mapping[str, str]  # the fingerprint of everything that predicted and may change, by name
    log_probs: Mapping[int, np.ndarray]  # for each of these targets that is asked for, float [V]: the distribution


class Updated(NamedTuple):
    """A state is not what it was: it has learned, or, without targets learned from, it begins anew."""

    state: str
    fingerprint: str  # from now on
    learned: Sequence[Span]  # targets that it learned from


Event = Scored | Updated
Record = Callable[[Event], None]


class Scorer(Protocol):
    """Scores streams of documents, and tells what it does."""

    name: str

    def score(self, stream: np.ndarray, asked: Collection[int], record: Record) -> float:
        """Score every target of ``stream``; return the bits per byte.

        Args:
            stream: int64 [N] token ids.
            asked: places of targets whose distributions are to be recorded.
            record: takes every event at once. It may raise an exception, which must pass.
        """
        ...


@dataclass(frozen=True)
class Documents:
    """The documents that are scored.

    Attributes:
        stream: int64 [N] token ids; every document begins with ``bos``.
        decode: returns the text of a document's ids, without BOS.
        bos: the id with which a document begins.
        sidecar: the bytes of the original text that each token stands for, [N]; None where the decoded text counts.
    """

    stream: np.ndarray
    decode: Callable[[list[int]], str]
    bos: int = 1
    sidecar: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.stream.ndim != 1 or self.stream.size < 2 or self.stream[0] != self.bos:
            raise ValueError(f"documents are one stream of ids that begins with BOS ({self.bos})")

    @cached_property
    def starts(self) -> np.ndarray:
        """The place of every document's BOS, int64, ascending."""
        return np.flatnonzero(self.stream == self.bos)

    @cached_property
    def owner(self) -> np.ndarray:
        """The document of every place as a target, int64 [N]: a BOS is the last target of the document before it."""
        return np.searchsorted(self.starts, np.arange(self.stream.size), side="left") - 1

    @cached_property
    def text_bytes(self) -> int:
        """The bytes by which a score divides: those of the decoded texts, or of the original text by the sidecar."""
        return self.decoded_bytes if self.sidecar is None else int(self.sidecar.sum(dtype=np.int64))

    @cached_property
    def decoded_bytes(self) -> int:
        """The UTF-8 bytes of all decoded texts."""
        pieces = np.split(self.stream, self.starts[1:])
        return sum(len(self.decode(piece[1:].tolist()).encode()) for piece in pieces)


def fingerprint(*arrays: np.ndarray) -> str:
    """Return 16 hexadecimal digits that stand for the arrays' contents."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
