"""Building a dataset: from documents to shards in the challenge's format, with a manifest.

The exported program lacks this module, because it trains on existing shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pgolf.common.files import remove_leftovers, write_aside
from pgolf.common.progress import Progress
from pgolf.data.bpb import ByteTable
from pgolf.data.corpus import embedded_documents, read_documents
from pgolf.data.manifest import manifest_path, read_manifest, sha256_of
from pgolf.data.shards import BOS_ID, ShardError, dataset_dir, dataset_name, tokenizer_path, write_shard
from pgolf.data.tokenizer import load_tokenizer, train_tokenizer

SHARD_TOKENS = 100_000_000  # as in the published shards
DOCUMENTS_PER_TASK = 64  # enough to hide the cost of a task, few enough to bound the memory of those in flight
EMBEDDED_VALIDATION_SHARE = 0.04  # of the documents


def build_embedded(data_dir: str | os.PathLike, vocab_size: int) -> dict[str, Any]:
    """Train a tokenizer on `embedded_documents` and build shards from them; return the manifest entry."""
    documents = embedded_documents()
    validation = round(len(documents) * EMBEDDED_VALIDATION_SHARE)
    model = tokenizer_path(data_dir, vocab_size)
    train_tokenizer(documents[validation:], vocab_size, model)
    return build_dataset(documents, model, data_dir, val_docs=validation)


def record_dataset(data_dir: str | os.PathLike, entry: dict[str, Any]) -> None:
    """Write ``entry`` to ``{data_dir}/manifest.json``, in place of an entry of the same name.

    Raises FileError if that file is damaged.
    """
    manifest = read_manifest(data_dir)
    others = [other for other in manifest["datasets"] if other["name"] != entry["name"]]
    manifest["datasets"] = sorted([*others, entry], key=lambda dataset: dataset["name"])
    remove_leftovers(manifest_path(data_dir))
    write_aside(manifest_path(data_dir), json.dumps(manifest, indent=1) + "\n")


def no_progress(items: Iterable, total: int | None, description: str) -> Iterable:
    """Return ``items``: a progress display that shows nothing."""
    return items


def build_dataset(
    documents: str | os.PathLike | Iterable[str],
    tokenizer: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    val_docs: int = 0,
    val_documents: str | os.PathLike | Iterable[str] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Tokenize documents into training and validation shards in the challenge's format, with a manifest.

    Leaves out empty documents, and training documents whose tokens equal those of a validation document.

    Args:
        documents: texts, or a file for `read_documents`. They are streamed.
        tokenizer: a SentencePiece model. It is copied to ``{out_dir}/tokenizers``.
        val_docs: the first ``val_docs`` documents are the validation split; 0 if ``val_documents`` is given.
        val_documents: the validation split, as texts or a file.
        shard_tokens: tokens of a full shard.
        workers: threads (None: all cores). The files do not depend on it.
        progress: called with (documents, None, name of the split).

    Returns the dataset's entry, which is also written to the manifest: for each split its documents, tokens, bytes of
    normalised text, duplicates, and shards with their SHA-256; and the number of documents in both splits.
    Raises ShardError if ``out_dir`` already holds a dataset of this vocabulary, or a split would be empty.
    """
    if (val_docs > 0) == (val_documents is not None):
        raise ShardError(f"say what to validate on: either val_docs > 0 (got {val_docs}) or val_documents")
    if shard_tokens < 1:
        raise ShardError(f"shard_tokens must be at least 1, got {shard_tokens}")
    if workers is not None and workers < 1:
        raise ShardError(f"workers must be at least 1, got {workers}")
    read_manifest(out_dir)  # fail now if it is damaged, not after the work
    encoder = _Encoder(tokenizer, workers or os.cpu_count() or 1)
    vocab_size = encoder.table.vocab_size
    folder = dataset_dir(out_dir, vocab_size)
    if folder.is_dir() and any(folder.iterdir()):
        raise ShardError(f"{folder} already holds a dataset: delete it, or build into another folder")
    # Build in another folder and rename it: an interrupted build must not look like a dataset.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    texts = _texts(documents)
    val_texts = islice(texts, val_docs) if val_documents is None else _texts(val_documents)
    val, train = _Split(partial, "val", shard_tokens), _Split(partial, "train", shard_tokens)
    for split, source, excluded in ((val, val_texts, frozenset()), (train, texts, val.digests)):
        for document in progress(encoder.encode(source), None, split.name):
            split.add(document, excluded)
        split.finish()

    entry = _manifest_entry(vocab_size, tokenizer, val, train)
    model = tokenizer_path(out_dir, vocab_size)
    model.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(model)
    if not (model.exists() and model.samefile(tokenizer)):
        write_aside(model, Path(tokenizer).read_bytes())
    record_dataset(out_dir, entry)  # before the rename: shards without their record could not be built again
    os.replace(partial, folder)
    return entry


class _Document(NamedTuple):
    tokens: np.ndarray  # uint16, BOS first
    text_bytes: int
    digest: bytes


class _Encoder:
    """Tokenizes texts on several threads; SentencePiece releases the interpreter's lock while it works."""

    def __init__(self, tokenizer: str | os.PathLike, workers: int) -> None:
        self.processor = load_tokenizer(tokenizer)
        self.table = ByteTable.from_sentencepiece(tokenizer)
        self.workers = workers
        if self.table.vocab_size > 2**16:
            raise ShardError(f"{tokenizer} has {self.table.vocab_size} tokens, and shards hold 16 bits a token")

    def encode(self, texts: Iterator[str]) -> Iterator[_Document]:
        """Yield documents in the order of ``texts``; at most 2 · workers tasks are read ahead."""
        with ThreadPoolExecutor(self.workers) as pool:
            tasks: deque = deque()
            while task := list(islice(texts, DOCUMENTS_PER_TASK)):
                tasks.append(pool.submit(self._encode_all, task))
                if len(tasks) > 2 * self.workers:
                    yield from tasks.popleft().result()
            while tasks:
                yield from tasks.popleft().result()

    def _encode_all(self, texts: list[str]) -> list[_Document]:
        return [self._document(ids) for ids in self.processor.encode(texts, out_type=int, num_threads=1)]

    def _document(self, ids: list[int]) -> _Document:
        tokens = np.array([BOS_ID, *ids], dtype=np.uint16)
        stream = torch.from_numpy(tokens.astype(np.int64))
        count = int(self.table.count(stream[:-1], stream[1:]).sum())
        return _Document(tokens, count, hashlib.blake2b(tokens.tobytes(), digest_size=16).digest())


class _Split:
    """Writes the shards of one split, and counts for the manifest."""

    def __init__(self, folder: Path, name: str, shard_tokens: int) -> None:
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.documents = self.tokens = self.bytes = self.duplicates = self.empty = self.excluded = 0
        self.digests: set[bytes] = set()
        self.shards: list[dict[str, Any]] = []
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    def add(self, document: _Document, excluded: set[bytes] | frozenset[bytes]) -> None:
        """Add a document, unless it is empty or its digest is in ``excluded``."""
        if document.tokens.size == 1:
            self.empty += 1
            return
        if document.digest in excluded:
            self.excluded += 1
            return
        self.duplicates += document.digest in self.digests
        self.digests.add(document.digest)
        self.documents += 1
        self.tokens += document.tokens.size
        self.bytes += document.text_bytes
        self._pending.append(document.tokens)
        self._pending_tokens += document.tokens.size
        while self._pending_tokens >= self.shard_tokens:
            self._write(self.shard_tokens)

    def finish(self) -> None:
        """Write the last, shorter shard. Raises ShardError if the split has no document."""
        if self._pending_tokens:
            self._write(self._pending_tokens)
        if not self.documents:
            raise ShardError(
                f"no document is left for the {self.name} split: give more documents or a smaller val_docs"
            )

    def _write(self, count: int) -> None:
        tokens = np.concatenate(self._pending)
        path = self.folder / f"fineweb_{self.name}_{len(self.shards):06d}.bin"
        write_shard(path, tokens[:count])
        self.shards.append({"file": path.name, "tokens": count, "sha256": sha256_of(path)})
        self._pending, self._pending_tokens = [tokens[count:].copy()], tokens.size - count


def _manifest_entry(vocab_size: int, tokenizer: str | os.PathLike, val: _Split, train: _Split) -> dict[str, Any]:
    fields = ("documents", "tokens", "bytes", "duplicates", "empty", "shards")
    return {
        "name": dataset_name(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer_sha256": sha256_of(Path(tokenizer)),
        "splits": {split.name: {field: getattr(split, field) for field in fields} for split in (val, train)},
        "disjoint": {
            "compared": "blake2b-128 of the tokens of every document, equal where the normalised texts are",
            "train_documents_left_out": train.excluded,
            "documents_in_both_splits": len(val.digests & train.digests),
        },
    }


def _texts(documents: str | os.PathLike | Iterable[str]) -> Iterator[str]:
    return read_documents(documents) if isinstance(documents, str | os.PathLike) else iter(documents)
