"""Building datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pgolf.data.dataset import build_dataset, record_dataset
from pgolf.data.shards import ShardError, dataset_dir, read_shard, shard_files, tokenizer_path
from pgolf.data.tokenizer import load_tokenizer, train_tokenizer

WORDS = ["the", "cat", "sat", "on", "mats", "while", "some", "dogs", "lay", "under", "logs", "and", "birds", "sang"]
VOCAB = 300


def texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(5, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "small.model"
    train_tokenizer(texts(200), VOCAB, path)
    return path


def tokens_of(out: Path, split: str) -> list[int]:
    return np.concatenate([read_shard(file, VOCAB) for file in shard_files(out, VOCAB, split)]).tolist()


def test_build_dataset(tokenizer: Path, tmp_path: Path) -> None:
    documents = texts(150)
    entry = build_dataset(iter(documents), tokenizer, tmp_path, val_docs=10, shard_tokens=1000)
    processor = load_tokenizer(tokenizer)
    for split, part in (("val", documents[:10]), ("train", documents[10:])):
        expected = [token for text in part for token in (1, *processor.encode(text))]
        assert tokens_of(tmp_path, split) == expected
        found = entry["splits"][split]
        assert (found["documents"], found["tokens"]) == (len(part), len(expected))
        assert found["bytes"] == sum(len(text.encode()) for text in part)
        sizes = [shard["tokens"] for shard in found["shards"]]
        assert sum(sizes) == len(expected) and set(sizes[:-1]) <= {1000} and sizes[-1] <= 1000
        for shard, file in zip(found["shards"], shard_files(tmp_path, VOCAB, split), strict=True):
            assert shard["file"] == file.name and shard["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert tokenizer_path(tmp_path, VOCAB).read_bytes() == tokenizer.read_bytes()
    assert json.loads((tmp_path / "manifest.json").read_text())["datasets"] == [entry]
    assert entry["tokenizer_sha256"] == hashlib.sha256(tokenizer.read_bytes()).hexdigest()


def test_the_bytes_do_not_depend_on_the_workers(tokenizer: Path, tmp_path: Path) -> None:
    documents = texts(700)
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for workers, given in ((1, documents), (3, source)):
        build_dataset(given, tokenizer, tmp_path / str(workers), val_docs=70, shard_tokens=5000, workers=workers)
    one, three = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in "13")
    assert len(one) == len(three) > 4
    assert all(a.name == b.name and a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))


def test_no_document_is_in_both_splits(tokenizer: Path, tmp_path: Path) -> None:
    val, train = texts(5, seed=1), texts(20, seed=2)
    folded = val[1].replace(" ", " \n ")  # the same text once it is normalised
    mixed = [*train[:10], val[0], "", folded, *train[10:], train[3], "  "]
    entry = build_dataset(mixed, tokenizer, tmp_path, val_documents=val)
    counts = entry["splits"]["train"]
    assert (counts["documents"], counts["duplicates"], counts["empty"]) == (21, 1, 2)
    assert entry["disjoint"]["train_documents_left_out"] == 2
    assert entry["disjoint"]["documents_in_both_splits"] == 0
    processor = load_tokenizer(tokenizer)
    assert tokens_of(tmp_path, "train") == [t for text in [*train, train[3]] for t in (1, *processor.encode(text))]


def test_progress_sees_every_document(tokenizer: Path, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def progress(items: Iterable, total: int | None, description: str) -> Iterator:
        for item in items:
            seen[description] = seen.get(description, 0) + 1
            yield item

    build_dataset(texts(100), tokenizer, tmp_path, val_docs=10, progress=progress)
    assert seen == {"val": 10, "train": 90}


def test_what_cannot_be_built_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="validate on"):
        build_dataset(texts(5), tokenizer, tmp_path)
    with pytest.raises(ShardError, match="validate on"):
        build_dataset(texts(5), tokenizer, tmp_path, val_docs=2, val_documents=texts(2))
    with pytest.raises(ShardError, match="train split"):
        build_dataset(texts(5), tokenizer, tmp_path, val_docs=5)
    assert not dataset_dir(tmp_path, VOCAB).exists() and not (tmp_path / "manifest.json").exists()
    build_dataset(texts(5), tokenizer, tmp_path, val_docs=2)
    before = tokens_of(tmp_path, "train")
    with pytest.raises(ShardError, match="already holds a dataset"):
        build_dataset(texts(9), tokenizer, tmp_path, val_docs=2)
    assert tokens_of(tmp_path, "train") == before


def test_the_manifest_keeps_other_datasets(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizers": [5], "datasets": [{"name": "b"}, {"name": "c"}]}))
    record_dataset(tmp_path, {"name": "a"})
    record_dataset(tmp_path, {"name": "b", "new": 1})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {"tokenizers": [5], "datasets": [{"name": "a"}, {"name": "b", "new": 1}, {"name": "c"}]}
