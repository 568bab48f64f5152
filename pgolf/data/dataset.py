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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pgolf.common.files import remove_leftovers, write_aside
from pgolf.common.progress import Progress
from pgolf.data.bpb import ByteTable
from pgolf.data.case_coding import FIRST_OPERATOR_ID, OPERATORS, original_bytes
from pgolf.data.case_coding import encode as encode_case
from pgolf.data.corpus import embedded_documents, read_documents
from pgolf.data.manifest import manifest_path, read_manifest, sha256_of
from pgolf.data.shards import BOS_ID, ShardError, dataset_dir, dataset_name, sidecar_path, tokenizer_path, write_shard
from pgolf.data.tokenizer import TokenizerError, load_tokenizer, train_tokenizer

SHARD_TOKENS = 100_000_000  # as in the published shards
DOCUMENTS_PER_TASK = 64  # enough to hide the cost of a task, few enough to bound the memory of those in flight
EMBEDDED_VALIDATION_SHARE = 0.04  # of the documents


def build_embedded(data_dir: str | os.PathLike, vocab_size: int, case_coding: bool = False) -> dict[str, Any]:
    """Train a tokenizer on `embedded_documents` and build shards from them; return the manifest entry."""
    documents = embedded_documents()
    validation = round(len(documents) * EMBEDDED_VALIDATION_SHARE)
    model = tokenizer_path(data_dir, vocab_size)
    train_tokenizer(documents[validation:], vocab_size, model, case_coding=case_coding)
    return build_dataset(documents, model, data_dir, val_docs=validation, case_coding=case_coding)


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
    case_coding: bool = False,
    before_space: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Tokenize documents into training and validation shards in the challenge's format, with a manifest.

    Leaves out empty documents, and training documents whose normalised text equals that of a validation document.

    Args:
        documents: texts, or a file for `read_documents`. They are streamed.
        tokenizer: a SentencePiece model. It is copied to ``{out_dir}/tokenizers``.
        val_docs: the first ``val_docs`` documents are the validation split; 0 if ``val_documents`` is given.
        val_documents: the validation split, as texts or a file.
        shard_tokens: tokens of a full shard.
        workers: threads (None: all cores). The files do not depend on it.
        case_coding: tokenize the documents' case codes, and write a byte sidecar beside each validation shard.
        before_space: that of `case_coding.encode`.
        progress: called with (documents, None, name of the split).

    Returns the dataset's entry, which is also written to the manifest: for each split its documents, tokens, bytes of
    normalised text, duplicates, and shards with their SHA-256; and the number of documents in both splits. With
    ``case_coding`` bytes are those of the original text, ``decoded_bytes`` are those of the text that the validation
    tokens decode to, and ``sidecars`` are listed like shards.
    Raises ShardError if ``out_dir`` already holds a dataset of this vocabulary, or a split would be empty, and
    TokenizerError if the tokenizer is for the other ``case_coding``.
    """
    if (val_docs > 0) == (val_documents is not None):
        raise ShardError(f"say what to validate on: either val_docs > 0 (got {val_docs}) or val_documents")
    if shard_tokens < 1:
        raise ShardError(f"shard_tokens must be at least 1, got {shard_tokens}")
    if workers is not None and workers < 1:
        raise ShardError(f"workers must be at least 1, got {workers}")
    read_manifest(out_dir)  # fail now if it is damaged, not after the work
    encoder = _Encoder(tokenizer, workers or os.cpu_count() or 1, case_coding, before_space)
    vocab_size = encoder.processor.vocab_size()
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
        for document in progress(encoder.encode(source, counted=split is val), None, split.name):
            split.add(document, excluded)
        split.finish()

    entry = _manifest_entry(vocab_size, tokenizer, case_coding, val, train)
    if case_coding:
        entry["case_operators_before_space"] = before_space
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
    digest: bytes  # of the normalised text
    byte_counts: np.ndarray | None = None  # uint16, bytes of the original text for each token
    decoded_bytes: int = 0  # of the text that the tokens decode to


class _Encoder:
    """Tokenizes texts on several threads; SentencePiece releases the interpreter's lock while it works."""

    def __init__(self, tokenizer: str | os.PathLike, workers: int, case_coding: bool, before_space: bool) -> None:
        self.processor = load_tokenizer(tokenizer, case_coding=case_coding)
        self.table = None if case_coding else ByteTable.from_sentencepiece(tokenizer)
        self.workers, self.before_space = workers, before_space
        if self.processor.vocab_size() > 2**16:
            raise ShardError(f"{tokenizer} has {self.processor.vocab_size()} tokens, and shards hold 16 bits a token")
        if case_coding and not hasattr(self.processor, "encode_as_offset_mapping"):
            raise TokenizerError(
                "case coding needs sentencepiece of at least 0.2.3: pip install --upgrade sentencepiece"
            )
        self.is_byte = np.array([self.processor.is_byte(token) for token in range(self.processor.vocab_size())])

    def encode(self, texts: Iterator[str], counted: bool) -> Iterator[_Document]:
        """Yield documents in the order of ``texts``; at most 2 · workers tasks are read ahead.

        Case-coded documents have the bytes of each token if they are ``counted``.
        """
        coded = self._encode_counted if counted else self._encode_coded
        encode_all = partial(self._encode_plain, self.table) if self.table else coded
        with ThreadPoolExecutor(self.workers) as pool:
            tasks: deque = deque()
            while task := list(islice(texts, DOCUMENTS_PER_TASK)):
                tasks.append(pool.submit(encode_all, task))
                if len(tasks) > 2 * self.workers:
                    yield from tasks.popleft().result()
            while tasks:
                yield from tasks.popleft().result()

    def _encode_plain(self, table: ByteTable, texts: list[str]) -> list[_Document]:
        documents = []
        for text, tokens in zip(texts, self._tokens(texts), strict=True):
            stream = torch.from_numpy(tokens.astype(np.int64))
            count = int(table.count(stream[:-1], stream[1:]).sum())
            documents.append(_Document(tokens, count, self._digest(text)))
        return documents

    def _encode_coded(self, texts: list[str]) -> list[_Document]:
        pairs = zip(texts, self._tokens([encode_case(text, self.before_space) for text in texts]), strict=True)
        return [_Document(tokens, len(text.encode()), self._digest(text)) for text, tokens in pairs]

    def _encode_counted(self, texts: list[str]) -> list[_Document]:
        documents = []
        for text in texts:
            code = encode_case(text, self.before_space)
            mapping = self.processor.encode(code, out_type="offset_mapping")
            ids = np.array(mapping["ids"], dtype=np.uint16)
            offsets = np.array(mapping["offsets"], dtype=np.int64).reshape(-1, 2)
            counts = np.append(np.uint16(0), token_bytes(code, ids, offsets, self.is_byte))
            decoded = int(original_bytes(self.processor.decode(mapping["ids"])).sum())
            tokens = np.append(np.uint16(BOS_ID), ids)
            documents.append(_Document(tokens, len(text.encode()), self._digest(text), counts, decoded))
        return documents

    def _tokens(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.processor.encode(texts, out_type=int, num_threads=1)
        return [np.array([BOS_ID, *ids], dtype=np.uint16) for ids in encoded]

    def _digest(self, text: str) -> bytes:
        # Not of the tokens: two texts that are equal once they are normalised can have different case codes.
        return hashlib.blake2b(self.processor.normalize(text).encode(), digest_size=16).digest()


def token_bytes(code: str, ids: np.ndarray, offsets: np.ndarray, is_byte: np.ndarray) -> np.ndarray:
    """Return the bytes of the original text that each token of a case code stands for, uint16 [tokens].

    A token gets the bytes of the characters that it completes, and of those before them that the tokenizer drops. The
    last token also gets those dropped after it. Operators get none. The byte tokens of one character get a byte each;
    if normalisation has changed their number, the first one gets what is over, or the first ones get none. The sum is
    the number of bytes of the original text.

    Args:
        ids: the tokens, without BOS.
        offsets: [tokens, 2], begin and end of each token in the characters of ``code``.
        is_byte: bool [V], the byte tokens.

    Raises ShardError if a token stands for more bytes than 16 bits hold.
    """
    if not ids.size:
        return np.zeros(0, dtype=np.uint16)
    weights = original_bytes(code)
    ends = offsets[:, 1].copy()
    ends[-1] = len(code)
    through = np.append(0, weights.cumsum())[ends]  # bytes up to the end of each token
    operators = (ids >= FIRST_OPERATOR_ID) & (ids < FIRST_OPERATOR_ID + len(OPERATORS)) & (weights[ends - 1] == 0)
    through[operators] = 0
    through = np.maximum.accumulate(through)
    unfinished = np.flatnonzero(is_byte[ids[:-1]] & is_byte[ids[1:]] & (offsets[:-1, 0] == offsets[:-1, 1]))
    for place in unfinished[::-1]:
        through[place] = max(through[place], through[place + 1] - 1)
    counts = np.diff(through, prepend=0)
    if counts.max() >= 2**16:
        raise ShardError(
            f"a token stands for {counts.max()} bytes, most of which the tokenizer drops, and a byte sidecar holds 16 "
            f"bits a token: leave out the validation document whose case code begins with {code[:60]!r}"
        )
    return counts.astype(np.uint16)


class _Split:
    """Writes the shards of one split, and counts for the manifest."""

    def __init__(self, folder: Path, name: str, shard_tokens: int) -> None:
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.documents = self.tokens = self.bytes = self.decoded_bytes = self.duplicates = self.empty = (
            self.excluded
        ) = 0
        self.digests: set[bytes] = set()
        self.shards: list[dict[str, Any]] = []
        self.sidecars: list[dict[str, Any]] = []
        self._pending: list[np.ndarray] = []
        self._pending_counts: list[np.ndarray] = []
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
        self.decoded_bytes += document.decoded_bytes
        self._pending.append(document.tokens)
        if document.byte_counts is not None:
            self._pending_counts.append(document.byte_counts)
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
        path = self.folder / f"fineweb_{self.name}_{len(self.shards):06d}.bin"
        self._pending = self._write_first(count, path, self._pending, self.shards)
        if self._pending_counts:
            self._pending_counts = self._write_first(count, sidecar_path(path), self._pending_counts, self.sidecars)
        self._pending_tokens -= count

    def _write_first(
        self, count: int, path: Path, pending: list[np.ndarray], written: list[dict[str, Any]]
    ) -> list[np.ndarray]:
        """Write the first ``count`` of the pending numbers as a shard, record it, and return the others."""
        joined = np.concatenate(pending)
        write_shard(path, joined[:count])
        written.append({"file": path.name, "tokens": count, "sha256": sha256_of(path)})
        return [joined[count:].copy()]


def _manifest_entry(
    vocab_size: int, tokenizer: str | os.PathLike, case_coding: bool, val: _Split, train: _Split
) -> dict[str, Any]:
    fields = ("documents", "tokens", "bytes", "duplicates", "empty", "shards")
    splits = {split.name: {field: getattr(split, field) for field in fields} for split in (val, train)}
    if case_coding:
        splits["val"] |= {"decoded_bytes": val.decoded_bytes, "sidecars": val.sidecars}
    return {
        "name": dataset_name(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer_sha256": sha256_of(Path(tokenizer)),
        "case_coding": case_coding,
        "splits": splits,
        "disjoint": {
            "compared": "blake2b-128 of the normalised text of every document",
            "train_documents_left_out": train.excluded,
            "documents_in_both_splits": len(val.digests & train.digests),
        },
    }


def _texts(documents: str | os.PathLike | Iterable[str]) -> Iterator[str]:
    return read_documents(documents) if isinstance(documents, str | os.PathLike) else iter(documents)
