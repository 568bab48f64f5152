"""Checking that data agree with ``manifest.json``, and that they have not changed since a run checked them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.common.files import read_json
from pgolf.data.case_coding import original_bytes
from pgolf.data.shards import (
    BOS_ID,
    ShardError,
    dataset_name,
    read_shard,
    read_sidecar,
    shard_files,
    sidecar_path,
    tokenizer_path,
)
from pgolf.data.tokenizer import load_tokenizer

SPLITS = ("train", "val")


def manifest_path(data_dir: str | os.PathLike) -> Path:
    """Return the path of a data folder's manifest."""
    return Path(data_dir) / "manifest.json"


def read_manifest(data_dir: str | os.PathLike) -> dict[str, Any]:
    """Read a data folder's manifest; without a file it lists no datasets. Raises FileError for a damaged file."""
    path = manifest_path(data_dir)
    manifest = read_json(path) if path.exists() else {}
    datasets = manifest.setdefault("datasets", [])
    if not isinstance(datasets, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in datasets
    ):
        raise ShardError(f"{path} is damaged: its datasets are no list of objects with names")
    return manifest


def recorded_dataset(data_dir: str | os.PathLike, vocab_size: int) -> dict[str, Any]:
    """Return the manifest's entry of the dataset with ``vocab_size`` tokens; empty if there is none."""
    name = dataset_name(vocab_size)
    return next((entry for entry in read_manifest(data_dir)["datasets"] if entry["name"] == name), {})


def operators_place(data_dir: str | os.PathLike, vocab_size: int) -> str:
    """Return in words where the operators of case-coded documents stand."""
    before = recorded_dataset(data_dir, vocab_size).get("case_operators_before_space", False)
    return "before the space of their word" if before else "after the space"


def data_files(data_dir: str | os.PathLike, vocab_size: int, splits: Sequence[str] = SPLITS) -> dict[str, Path]:
    """Return the paths of the tokenizer, the splits' shards and the byte sidecars that there are, by name.

    Raises ShardError for a split without shards.
    """
    shards = [path for split in splits for path in shard_files(data_dir, vocab_size, split)]
    sidecars = [path for path in map(sidecar_path, shards) if path not in shards and path.is_file()]
    return {path.name: path for path in (tokenizer_path(data_dir, vocab_size), *shards, *sidecars)}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_dataset(
    data_dir: str | os.PathLike,
    vocab_size: int,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
    *,
    case_coding: bool = False,
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Read the tokenizer, every shard and every byte sidecar strictly, and compare them with ``manifest.json``.

    Args:
        progress: wraps the iterable of files.
        case_coding: whether the documents must be case-coded, or must not.

    Returns counts (``train_shards``, ``train_tokens``, ``train_documents`` and the same of ``val``; with
    ``case_coding`` also ``val_sidecar_bytes`` and ``val_decoded_bytes`` of the text that the tokens decode to),
    and for each file by name the record that `check_unchanged` needs. Raises ShardError or TokenizerError, naming the
    file and the number that is wrong, also if a split does not begin with BOS.
    """
    tokenizer = tokenizer_path(data_dir, vocab_size)
    processor = load_tokenizer(tokenizer, vocab_size, case_coding=case_coding)
    counts: dict[str, int] = {}
    files: dict[str, dict[str, Any]] = {}
    validation: list[np.ndarray] = []
    for path in progress(list(data_files(data_dir, vocab_size).values())):
        stat = path.stat()
        files[path.name] = {"sha256": sha256_of(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if path == tokenizer or path.name.startswith("fineweb_val_bytes_"):
            continue
        tokens, split = read_shard(path, vocab_size), path.name.split("_")[1]
        if f"{split}_shards" not in counts and tokens[0] != BOS_ID:
            raise ShardError(f"{path} begins with token {tokens[0]}, expected {BOS_ID} (BOS)")
        for what, count in (("shards", 1), ("tokens", tokens.size), ("documents", int((tokens == BOS_ID).sum()))):
            counts[f"{split}_{what}"] = counts.get(f"{split}_{what}", 0) + count
        if case_coding and split == "val":
            counts["val_sidecar_bytes"] = counts.get("val_sidecar_bytes", 0) + int(
                read_sidecar(path, tokens).sum(dtype=np.int64)
            )
            validation.append(tokens)
    if case_coding:
        stream = np.concatenate(validation)
        documents = np.split(stream, np.flatnonzero(stream == BOS_ID)[1:])
        decoded = (original_bytes(processor.decode(document.tolist())) for document in documents)
        counts["val_decoded_bytes"] = sum(int(part.sum()) for part in decoded)
    entry, manifest = recorded_dataset(data_dir, vocab_size), manifest_path(data_dir)
    found = {
        **counts,
        "bos_id": BOS_ID,
        "case_coding": case_coding,
        **{f"sha256 of {name}": known["sha256"] for name, known in files.items()},
    }
    try:
        stated = _stated(entry, tokenizer.name, counts["train_shards"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ShardError(f"{manifest} is damaged in {entry['name']}: {error!r}") from error
    for name, value in stated.items():
        if value is not None and value != found.get(name):
            wrong = f"{name} is {found.get(name, 'missing')}, and should be {value}"
            raise ShardError(f"the data are not what {manifest} states: {wrong}")
    return counts, files


def _stated(entry: dict[str, Any], tokenizer: str, train_shards: int) -> dict[str, Any]:
    """Return what a manifest's entry states, under the names of `check_dataset`; None for what it does not state."""
    stated = {name: entry.get(name) for name in ("bos_id", "case_coding")}
    stated[f"sha256 of {tokenizer}"] = entry.get("tokenizer_sha256")
    counts: dict[str, Any] = {}
    for split in SPLITS:
        built, stats = entry.get("splits", {}).get(split, {}), entry.get("stats", {})
        if split == "train" and train_shards < (stats.get("files_train") or 0):  # only the first shards were downloaded
            stats = {}
        for ours, theirs in (("shards", "files"), ("tokens", "tokens"), ("documents", "docs")):
            counts[f"{split}_{ours}"] = built.get(ours, stats.get(f"{theirs}_{split}"))
        if "shards" in built:
            counts[f"{split}_shards"] = len(built["shards"])
            stated |= {f"sha256 of {shard['file']}": shard["sha256"] for shard in built["shards"]}
        if "sidecars" in built:
            counts |= {f"{split}_sidecar_bytes": built["bytes"], f"{split}_decoded_bytes": built.get("decoded_bytes")}
            stated |= {f"sha256 of {sidecar['file']}": sidecar["sha256"] for sidecar in built["sidecars"]}
    return stated | counts


def check_unchanged(
    data_dir: str | os.PathLike,
    vocab_size: int,
    files: Mapping[str, Any],
    copied: bool = False,
    splits: Sequence[str] = SPLITS,
) -> None:
    """Raise ShardError unless tokenizer and splits are exactly those of the ``files`` that `check_dataset` recorded.

    Validation shards, byte sidecars and the tokenizer are hashed. A training shard is hashed only if its size or
    modification time differs; for data ``copied`` from the host that checked them, only the size counts.
    """
    found = data_files(data_dir, vocab_size, splits)
    unread = tuple(f"fineweb_{split}_" for split in SPLITS if split not in splits)
    for name in sorted(found.keys() | {name for name in files if not name.startswith(unread)}):
        path, known = found.get(name), files.get(name)
        if path and isinstance(known, dict) and path.exists():
            stat = path.stat()
            same = stat.st_size == known.get("bytes") and (copied or stat.st_mtime_ns == known.get("mtime_ns"))
            if (same and "train" in name) or sha256_of(path) == known.get("sha256"):
                continue
        raise ShardError(f"{name} is not as it was when this run's data were checked: check anew with `pgolf data`")
