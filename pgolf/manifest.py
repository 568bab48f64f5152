"""Whether data are what they should be: as ``manifest.json`` states, and unchanged since a run checked them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pgolf.files import read_json
from pgolf.shards import ShardError, dataset_name, read_shard, shard_files, tokenizer_path
from pgolf.tokenizer import BOS_ID, load_tokenizer

SPLITS = ("train", "val")


def manifest_path(data_dir: str | os.PathLike) -> Path:
    """Where the record of a data folder lies."""
    return Path(data_dir) / "manifest.json"


def read_manifest(data_dir: str | os.PathLike) -> dict[str, Any]:
    """Read a data folder's record; one without datasets where there is none. Raises FileError for a damaged one."""
    path = manifest_path(data_dir)
    manifest = read_json(path) if path.exists() else {}
    datasets = manifest.setdefault("datasets", [])
    if not isinstance(datasets, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in datasets
    ):
        raise ShardError(f"{path} is damaged: its datasets are no list of objects with names")
    return manifest


def recorded_dataset(data_dir: str | os.PathLike, vocab_size: int) -> dict[str, Any]:
    """What the record states about the dataset with so many tokens; empty where it states nothing."""
    name = dataset_name(vocab_size)
    return next((entry for entry in read_manifest(data_dir)["datasets"] if entry["name"] == name), {})


def data_files(data_dir: str | os.PathLike, vocab_size: int) -> dict[str, Path]:
    """The tokenizer and all shards by name. Raises ShardError for a split without shards."""
    shards = [path for split in SPLITS for path in shard_files(data_dir, vocab_size, split)]
    return {path.name: path for path in (tokenizer_path(data_dir, vocab_size), *shards)}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_dataset(
    data_dir: str | os.PathLike, vocab_size: int, progress: Callable[[Iterable[Path]], Iterable[Path]] = iter
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Read the tokenizer and every shard strictly, and hold them against all that ``manifest.json`` states of them.

    Args:
        progress: wraps the iterable of shards.

    Returns counts (``train_shards``, ``train_tokens``, ``train_documents`` and the same of ``val``), and by name what
    `check_unchanged` needs to know each file again. Raises ShardError or TokenizerError naming the file and the number
    that is wrong, also for a split that does not begin with BOS.
    """
    load_tokenizer(tokenizer_path(data_dir, vocab_size), vocab_size)
    paths = data_files(data_dir, vocab_size)
    counts: dict[str, int] = {f"{split}_{what}": 0 for split in SPLITS for what in ("shards", "tokens", "documents")}
    files: dict[str, dict[str, Any]] = {}
    for path in progress(list(paths.values())):
        stat = path.stat()
        files[path.name] = {"sha256": sha256_of(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if path.suffix != ".bin":
            continue
        tokens, split = read_shard(path, vocab_size), path.name.split("_")[1]
        if not counts[f"{split}_shards"] and tokens[0] != BOS_ID:
            raise ShardError(f"{path} begins with token {tokens[0]}, expected {BOS_ID} (BOS): the start is missing")
        files[path.name]["tokens"] = tokens.size
        for what, count in (("shards", 1), ("tokens", tokens.size), ("documents", int((tokens == BOS_ID).sum()))):
            counts[f"{split}_{what}"] += count
    entry = recorded_dataset(data_dir, vocab_size)
    try:
        _compare(entry, counts, files, tokenizer_path(data_dir, vocab_size).name)
    except ShardError as error:
        advice = "get the data again, or put back the files that belong to it"
        raise ShardError(f"the data are not what {manifest_path(data_dir)} states: {error}; {advice}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ShardError(f"{manifest_path(data_dir)} is damaged in {entry['name']}: {error!r}") from error
    return counts, files


def _compare(entry: dict, counts: dict[str, int], files: dict[str, dict[str, Any]], tokenizer: str) -> None:
    """Raise ShardError for the first number that ``entry`` states otherwise; what it does not state is not compared."""

    def expect(what: str, stated: Any, found: Any) -> None:
        if stated is not None and stated != found:
            raise ShardError(f"{what} is {found}, and should be {stated}")

    expect("the SHA-256 of the tokenizer", entry.get("tokenizer_sha256"), files[tokenizer]["sha256"])
    expect("BOS", entry.get("bos_id"), BOS_ID)
    stats = entry.get("stats", {})
    for split in SPLITS:
        names = [name for name in files if name.startswith(f"fineweb_{split}_")]
        published, shards = stats.get(f"files_{split}"), counts[f"{split}_shards"]
        if split == "train" and published is not None and 0 < shards < published:  # the first ones were downloaded
            expect("the last training shard", f"fineweb_train_{shards - 1:06d}.bin", names[-1])
        else:
            expect(f"the number of {split} shards", published, shards)
            expect(f"the number of {split} tokens", stats.get(f"tokens_{split}"), counts[f"{split}_tokens"])
            expect(f"the number of {split} documents", stats.get(f"docs_{split}"), counts[f"{split}_documents"])
        stated = entry.get("splits", {}).get(split, {})
        for shard in stated.get("shards", ()):
            if shard["file"] not in files:
                raise ShardError(f"{shard['file']} is missing")
            for what in ("tokens", "sha256"):
                expect(f"{what} of {shard['file']}", shard[what], files[shard["file"]][what])
        if "shards" in stated and (foreign := set(names) - {shard["file"] for shard in stated["shards"]}):
            raise ShardError(f"{min(foreign)} does not belong to it")
        for what in ("tokens", "documents"):
            expect(f"the number of {split} {what}", stated.get(what), counts[f"{split}_{what}"])


def check_unchanged(data_dir: str | os.PathLike, vocab_size: int, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ShardError unless the data are the ``files`` of `check_dataset`: none more, none less, none changed.

    Validation shards and the tokenizer are hashed. A training shard is where its size or time of change is another.
    """
    found = data_files(data_dir, vocab_size)
    for name in sorted(found.keys() ^ files.keys()):
        raise ShardError(f"{name} {'is missing' if name in files else 'has come'} since this run's data were checked")
    for name, path in found.items():
        stat, known = path.stat() if path.exists() else None, files[name]
        same = stat is not None and (stat.st_size, stat.st_mtime_ns) == (known["bytes"], known["mtime_ns"])
        if not same or "train" not in name:
            same = stat is not None and sha256_of(path) == known["sha256"]
        if not same:
            raise ShardError(
                f"{path} is not the file that this run has checked: put that back, or check anew with `pgolf data`"
            )
