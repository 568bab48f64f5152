"""Data that are not what manifest.json states, or not the files that a run has checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pgolf.common.files import FileError
from pgolf.data.dataset import build_dataset
from pgolf.data.loader import DocumentPackingLoader
from pgolf.data.manifest import check_dataset, check_unchanged, manifest_path
from pgolf.data.shards import ShardError, read_shard, shard_files, tokenizer_path, write_shard
from pgolf.data.tokenizer import CHALLENGE_SETTINGS, TokenizerError, train_tokenizer
from tests.test_dataset import VOCAB, texts


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    train_tokenizer(texts(200), VOCAB, tokenizer_path(folder, VOCAB))
    build_dataset(texts(200), tokenizer_path(folder, VOCAB), folder, val_docs=40, shard_tokens=1000)
    return folder


def change_manifest(data: Path, change: Callable[[dict], object]) -> None:
    path = manifest_path(data)
    manifest = json.loads(path.read_text())
    change(manifest["datasets"][0])
    path.write_text(json.dumps(manifest))


def cut(shard: Path) -> None:
    write_shard(shard, np.array(read_shard(shard))[:-7])


def change_one_token(shard: Path) -> None:
    tokens = np.array(read_shard(shard))
    tokens[-1] ^= 1
    write_shard(shard, tokens)


def another_tokenizer(data: Path) -> None:
    train_tokenizer(texts(200, seed=5), VOCAB, tokenizer_path(data, VOCAB))


def one_more(shard: Path) -> None:
    shutil.copyfile(shard, shard.with_name(shard.name[:-6] + "99.bin"))


def test_what_was_built_passes(built: Path) -> None:
    counts, files = check_dataset(built, VOCAB)
    entry = json.loads(manifest_path(built).read_text())["datasets"][0]["splits"]
    assert counts == {
        f"{split}_{what}": len(entry[split]["shards"]) if what == "shards" else entry[split][what]
        for split in ("train", "val")
        for what in ("shards", "tokens", "documents")
    }
    assert counts["val_shards"] > 1 and len(files) == 1 + counts["val_shards"] + counts["train_shards"]
    check_unchanged(built, VOCAB, files)


SHARD_FAULTS = [
    (cut, "sha256 of fineweb_val_000001.bin is .*, and should be "),
    (change_one_token, "sha256 of fineweb_val_000001.bin"),
    (Path.unlink, "sha256 of fineweb_val_000001.bin is missing, and should be "),
    (one_more, "val_shards is .*, and should be "),
]


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("fault, words", SHARD_FAULTS)
def test_other_shards_than_were_built(data: Path, split: str, fault: Callable, words: str) -> None:
    fault(shard_files(data, VOCAB, split)[1])
    with pytest.raises(ShardError, match=f"not what .*manifest.json states: {words.replace('val', split)}"):
        check_dataset(data, VOCAB)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda entry: entry["splits"]["val"].update(documents=7), "val_documents is 40, and should be 7"),
        (lambda entry: entry["splits"]["train"].update(tokens=7), "train_tokens is .*, and should be 7"),
        (lambda entry: entry.update(bos_id=2), "bos_id is 1, and should be 2"),
        (lambda entry: entry.update(splits=5), "manifest.json is damaged in fineweb10B_sp300"),
        (lambda entry: entry["splits"]["val"]["shards"][0].pop("sha256"), "manifest.json is damaged in .*sha256"),
        (lambda entry: entry["splits"]["val"].update(shards=[[]]), "manifest.json is damaged in "),
    ],
)
def test_a_record_that_does_not_fit(data: Path, change: Callable, words: str) -> None:
    change_manifest(data, change)
    with pytest.raises(ShardError, match=words):
        check_dataset(data, VOCAB)


def test_another_tokenizer_of_the_same_size(data: Path) -> None:
    another_tokenizer(data)
    with pytest.raises(ShardError, match="sha256 of fineweb_300_bpe.model is .*, and should be"):
        check_dataset(data, VOCAB)


def test_the_published_record(data: Path) -> None:
    """The challenge's own manifest states counts; a download may take only the first training shards."""
    counts, _ = check_dataset(data, VOCAB)
    stats = {
        f"{what}_{split}": counts[f"{split}_{long}"]
        for split in ("val", "train")
        for what, long in (("files", "shards"), ("tokens", "tokens"), ("docs", "documents"))
    }

    def state(**changed: int) -> None:
        change_manifest(data, lambda entry: entry.update(stats={**stats, **changed}))

    change_manifest(data, lambda entry: (entry.pop("splits"), entry.pop("tokenizer_sha256")))
    state()
    assert check_dataset(data, VOCAB)[0] == counts
    for name, words in (
        ("files_val", "val_shards"),
        ("tokens_val", "val_tokens"),
        ("docs_val", "val_documents"),
        ("tokens_train", "train_tokens"),
        ("docs_train", "train_documents"),
    ):
        state(**{name: stats[name] + 1})
        with pytest.raises(ShardError, match=f"{words} is {stats[name]}, and should be {stats[name] + 1}"):
            check_dataset(data, VOCAB)
    state()
    *_, last = shard_files(data, VOCAB, "train")
    last.unlink()
    assert check_dataset(data, VOCAB)[0]["train_shards"] == counts["train_shards"] - 1
    cut(shard_files(data, VOCAB, "val")[0])  # a score of such a shard has been published
    with pytest.raises(ShardError, match=f"val_tokens is {stats['tokens_val'] - 7}, and should be"):
        check_dataset(data, VOCAB)


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_split_without_its_start(data: Path, split: str) -> None:
    manifest_path(data).unlink()
    first = shard_files(data, VOCAB, split)[0]
    write_shard(first, np.array(read_shard(first))[1:])
    with pytest.raises(ShardError, match=f"{first.name} begins with token .*, expected 1 .BOS."):
        check_dataset(data, VOCAB)


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"datasets": {}}', b'{"datasets": [1]}', b"\xff"])
def test_a_damaged_manifest_is_known_before_the_work(data: Path, tmp_path: Path, content: bytes) -> None:
    manifest_path(data).write_bytes(content)
    with pytest.raises(FileError, match="manifest.json"):
        check_dataset(data, VOCAB)
    shutil.rmtree(data / "datasets")

    def no_documents():
        raise AssertionError("the documents are not read")
        yield

    with pytest.raises(FileError, match="manifest.json"):
        build_dataset(no_documents(), tokenizer_path(data, VOCAB), data, val_docs=2)
    assert not (data / "datasets").exists()


def test_a_build_that_is_killed_can_be_repeated(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its last two writes: the record is there, the folder of shards is not yet."""
    shutil.rmtree(data / "datasets")
    replace = os.replace

    def kill(source: Path, target: Path) -> None:
        if Path(target).is_dir() or Path(source).is_dir():
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    build = dict(val_docs=40, shard_tokens=900)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(texts(200), tokenizer_path(data, VOCAB), data, **build)
    monkeypatch.undo()
    build_dataset(texts(200), tokenizer_path(data, VOCAB), data, **build)
    check_dataset(data, VOCAB)
    assert not list(data.rglob("*.partial"))


def test_the_loader_takes_what_is_built(tmp_path: Path) -> None:
    """Also of a document that is longer than a shard: the shards inside it have no BOS, and are left out."""
    train_tokenizer(texts(200), VOCAB, tokenizer_path(tmp_path, VOCAB))
    long = " ".join(texts(60, seed=3))
    build_dataset(
        [*texts(40), long, *texts(40, seed=4)], tokenizer_path(tmp_path, VOCAB), tmp_path, val_docs=20, shard_tokens=300
    )
    check_dataset(tmp_path, VOCAB)
    files = shard_files(tmp_path, VOCAB, "train")
    first = [np.flatnonzero(np.array(read_shard(file)) == 1) for file in files]
    assert any(not places.size for places in first[1:-1])
    make = dict(micro_batch_tokens=63, max_segment=32, rank=0, world_size=1, device="cpu", vocab_size=VOCAB)
    loader = DocumentPackingLoader(files, **make)
    expected = [
        np.array(read_shard(file))[places[0] + 64 * piece :][:64]
        for file, places in zip(files, first, strict=True)
        if places.size
        for piece in range((read_shard(file).size - places[0]) // 64)
    ]
    for stream in expected:
        batch = loader.next_batch()
        assert batch.input_ids[0].tolist() + [batch.target_ids[0, -1].item()] == stream.tolist()
    loader.close()


def test_a_tokenizer_without_bytes_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHALLENGE_SETTINGS, "byte_fallback", False)
    with pytest.raises(TokenizerError, match="has no piece for every byte"):
        train_tokenizer(texts(200), 60, data / "plain.model")
    assert not (data / "plain.model").exists()


# --- Since the check --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize(
    "fault, words",
    [
        (Path.unlink, "fineweb_val_000001.bin is not as it was when"),
        (one_more, "fineweb_val_000099.bin is not as it was when"),
        (cut, "fineweb_val_000001.bin is not as it was when this run"),
        (change_one_token, "fineweb_val_000001.bin is not as it was when this run"),
    ],
)
def test_shards_that_change_after_the_check(data: Path, split: str, fault: Callable, words: str) -> None:
    _, files = check_dataset(data, VOCAB)
    fault(shard_files(data, VOCAB, split)[1])
    with pytest.raises(ShardError, match=words.replace("val", split)):
        check_unchanged(data, VOCAB, files)


def test_validation_is_hashed_whatever_its_time(data: Path) -> None:
    _, files = check_dataset(data, VOCAB)
    shard = shard_files(data, VOCAB, "val")[1]
    stat = shard.stat()
    change_one_token(shard)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ShardError, match="fineweb_val_000001.bin is not as it was"):
        check_unchanged(data, VOCAB, files)


def test_what_only_scores_needs_no_training_data(data: Path) -> None:
    _, files = check_dataset(data, VOCAB)
    for shard in shard_files(data, VOCAB, "train"):
        shard.unlink()
    check_unchanged(data, VOCAB, files, splits=("val",))
    change_one_token(shard_files(data, VOCAB, "val")[0])
    with pytest.raises(ShardError, match="fineweb_val_000000.bin is not as it was"):
        check_unchanged(data, VOCAB, files, splits=("val",))


def test_a_copy_of_the_data_is_the_same_data(data: Path, tmp_path: Path) -> None:
    _, files = check_dataset(data, VOCAB)
    copied = shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in copied.rglob("*.bin"):
        os.utime(path, ns=(5, 5))
    check_unchanged(copied, VOCAB, files)
    another_tokenizer(copied)
    with pytest.raises(ShardError, match="fineweb_300_bpe.model is not as it was"):
        check_unchanged(copied, VOCAB, files)
