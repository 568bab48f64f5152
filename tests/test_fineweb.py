"""The download against a made-up hub: paths, resuming, broken files, and clear errors. No network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from pgolf.data.dataset import build_dataset
from pgolf.data.fineweb import EXPORTS, DownloadError, download
from pgolf.data.manifest import check_dataset
from pgolf.data.shards import ShardError, read_shard, shard_files, tokenizer_path, write_shard
from pgolf.data.tokenizer import load_tokenizer, train_tokenizer

VOCAB, CASED = 300, 330
WORDS = ["cat", "river", "mountain", "telescope", "fountain", "winter", "umbrella", "garden"]


class Hub:
    """Stands in for huggingface_hub: serves a folder, remembers what was asked, breaks what it is told to."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.broken = root, [], {}
        self.newest, self.revisions, self.repositories = "a" * 40, set(), set()

    def dataset_info(self, repository: str, revision: str | None):
        self.repositories.add(repository)
        return SimpleNamespace(sha=revision or self.newest)

    def hf_hub_download(
        self, *, repo_id: str, filename: str, repo_type: str, revision: str, local_dir: Path, force_download: bool
    ):
        assert repo_type == "dataset"
        self.repositories.add(repo_id)
        self.revisions.add(revision)
        self.asked.append(filename)
        content = (self.root / filename).read_bytes()
        if self.broken.get(Path(filename).name, 0) > 0:
            self.broken[Path(filename).name] -= 1
            content = content[:-1]
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return str(target)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    folder = root / "datasets" / "datasets" / f"fineweb10B_sp{VOCAB}"
    folder.mkdir(parents=True)
    for index, name in enumerate(("val_000000", "train_000000", "train_000001", "train_000002")):
        write_shard(folder / f"fineweb_{name}.bin", np.arange(1, 200 + index))
    train_tokenizer(
        [" ".join(f"{name}s and other {name}" for name in WORDS * 9)],
        VOCAB,
        root / f"datasets/tokenizers/fineweb_{VOCAB}_bpe.model",
    )
    entry = {"name": f"fineweb10B_sp{VOCAB}", "stats": {"files_train": 3, "files_val": 1}}
    (root / "datasets" / "manifest.json").write_text(json.dumps({"datasets": [{"name": "other"}, entry]}))
    return root


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub, module = Hub(published), ModuleType("huggingface_hub")
    module.hf_hub_download, module.HfApi = hub.hf_hub_download, lambda: hub
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return hub


def names(hub: Hub) -> list[str]:
    return [Path(asked).name for asked in hub.asked if not asked.endswith("manifest.json")]


def test_download(hub: Hub, tmp_path: Path) -> None:
    entry = download(tmp_path, f"sp{VOCAB}", train_shards=2)
    assert entry["stats"]["files_train"] == 3
    assert [file.name for file in shard_files(tmp_path, VOCAB, "val")] == ["fineweb_val_000000.bin"]
    assert [read_shard(file, VOCAB).size for file in shard_files(tmp_path, VOCAB, "train")] == [200, 201]
    load_tokenizer(tokenizer_path(tmp_path, VOCAB), VOCAB)
    assert json.loads((tmp_path / "manifest.json").read_text())["datasets"] == [entry]
    assert not (tmp_path / ".download").exists() and hub.repositories == {EXPORTS[""].repository}


def test_case_coded_documents_come_with_their_sidecars(hub: Hub, tmp_path: Path) -> None:
    """The published names are longer, and the files here are named as those of the plain variant."""
    built, root = tmp_path / "built", tmp_path / "hub" / "datasets"
    documents = [" ".join(f"{word.title()} and {word.upper()} {number}" for word in WORDS) for number in range(6)]
    train_tokenizer(documents, CASED, tokenizer_path(built, CASED), case_coding=True)
    entry = build_dataset(documents, tokenizer_path(built, CASED), built, val_docs=2, case_coding=True)
    ending = EXPORTS["_caseops"].ending
    (root / "tokenizers").mkdir(parents=True)
    shutil.copy(tokenizer_path(built, CASED), root / f"tokenizers/fineweb_{CASED}_bpe{ending}.model")
    name = f"fineweb10B_sp{CASED}"
    shutil.copytree(built / "datasets" / name, root / "datasets" / (name + ending))
    manifest = {"datasets": [{"name": name + ending, "stats": {"files_train": 1, "files_val": 1}}]}
    (root / "manifest.json").write_text(json.dumps(manifest))
    hub.root = root.parent

    out = tmp_path / "out"
    found = download(out, f"sp{CASED}_caseops", train_shards=1)
    assert hub.repositories == {EXPORTS["_caseops"].repository}
    assert found["splits"]["val"]["bytes"] == entry["splits"]["val"]["bytes"] == sum(map(len, documents[:2]))
    counts, _ = check_dataset(out, CASED, case_coding=True)
    assert counts["val_sidecar_bytes"] == found["splits"]["val"]["bytes"]

    sidecar = out / "datasets" / name / "fineweb_val_bytes_000000.bin"
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole[:-2] + b"\x09\x00")
    with pytest.raises(ShardError, match="val_sidecar_bytes|sha256 of fineweb_val_bytes"):
        check_dataset(out, CASED, case_coding=True)
    hub.asked.clear()
    download(out, f"sp{CASED}_caseops", train_shards=1)
    assert names(hub) == [sidecar.name] and sidecar.read_bytes() == whole
    with pytest.raises(DownloadError, match="has no dataset fineweb10B_sp330; it has"):
        download(tmp_path / "plain", f"sp{CASED}", train_shards=1)


def test_a_second_call_fetches_only_what_is_missing_or_broken(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, f"sp{VOCAB}", train_shards=2)
    shard = shard_files(tmp_path, VOCAB, "train")[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    hub.asked.clear()
    download(tmp_path, f"sp{VOCAB}", train_shards=None)
    assert names(hub) == ["fineweb_train_000000.bin", "fineweb_train_000002.bin"]
    assert shard.read_bytes() == whole


def test_a_file_broken_on_the_way_is_fetched_once_more(hub: Hub, tmp_path: Path) -> None:
    hub.broken = {"fineweb_train_000000.bin": 1}
    download(tmp_path, f"sp{VOCAB}", train_shards=1)
    assert names(hub).count("fineweb_train_000000.bin") == 2
    hub.broken = {"fineweb_train_000001.bin": 2}
    with pytest.raises(DownloadError, match="fineweb_train_000001.bin arrived broken twice: .*bytes"):
        download(tmp_path, f"sp{VOCAB}", train_shards=2)
    assert len(shard_files(tmp_path, VOCAB, "train")) == 1  # what is in place has passed its check


def test_what_the_hub_has_not(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="has no dataset fineweb10B_sp512; it has other, fineweb10B_sp300"):
        download(tmp_path, "sp512")
    with pytest.raises(DownloadError, match="sp300 has 3 training shards, 80 cannot"):
        download(tmp_path, f"sp{VOCAB}")
    for variant in ("byte260", "sp300_other"):
        with pytest.raises(ValueError, match=f"sp8192_caseops; got '{variant}'"):
            download(tmp_path, variant)


def test_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", fail)
    with pytest.raises(DownloadError, match="manifest.json .*name resolution failed.*Is there a network"):
        download(tmp_path)
    monkeypatch.setattr(hub, "dataset_info", fail)
    with pytest.raises(DownloadError, match="look up the dataset .*name resolution failed.*Is there a network"):
        download(tmp_path)


def test_the_revision_is_pinned_and_told(hub: Hub, tmp_path: Path) -> None:
    entry = download(tmp_path, f"sp{VOCAB}", train_shards=1)
    assert (entry["repository"], entry["revision"]) == (EXPORTS[""].repository, "a" * 40)
    hub.newest = "b" * 40  # the hub's files change; the folder goes on with those it has begun with
    entry = download(tmp_path, f"sp{VOCAB}", train_shards=2)
    assert hub.revisions == {"a" * 40} and entry["revision"] == "a" * 40
    assert [shard["file"] for shard in entry["splits"]["train"]["shards"]] == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]
    with pytest.raises(DownloadError, match=f"from commit {'a' * 40}, and {'c' * 40} is"):
        download(tmp_path, f"sp{VOCAB}", train_shards=2, revision="c" * 40)
    assert download(tmp_path / "other", f"sp{VOCAB}", 1, revision="c" * 40)["revision"] == "c" * 40


def test_an_interrupted_download_goes_on_with_its_revision(hub: Hub, tmp_path: Path) -> None:
    hub.broken = {"fineweb_train_000001.bin": 2}
    with pytest.raises(DownloadError, match="broken twice"):
        download(tmp_path, f"sp{VOCAB}", train_shards=2)
    hub.newest = "b" * 40
    assert download(tmp_path, f"sp{VOCAB}", train_shards=2)["revision"] == "a" * 40


def test_a_shard_that_has_changed_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    download(tmp_path, f"sp{VOCAB}", train_shards=1)
    assert check_dataset(tmp_path, VOCAB)[0]["val_tokens"] == 199
    (shard,) = shard_files(tmp_path, VOCAB, "val")
    whole = bytearray(shard.read_bytes())
    whole[-2:] = b"\x05\x00"  # another token that the vocabulary has
    shard.write_bytes(whole)
    with pytest.raises(ShardError, match="sha256 of fineweb_val_000000.bin"):
        check_dataset(tmp_path, VOCAB)
    hub.asked.clear()
    download(tmp_path, f"sp{VOCAB}", train_shards=1)
    assert names(hub) == ["fineweb_val_000000.bin"]
    check_dataset(tmp_path, VOCAB)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<html>sign in</html>", "is damaged: .*manifest.json is damaged: it is no JSON object"),
        (b'{"datasets": 5}', "no list of objects with names"),
        (b'{"datasets": [{"name": "fineweb10B_sp300"}]}', "does not tell how many files fineweb10B_sp300 has"),
    ],
)
def test_a_manifest_that_is_none(hub: Hub, tmp_path: Path, published: Path, content: bytes, words: str) -> None:
    shutil.copytree(published, tmp_path / "hub")
    (tmp_path / "hub" / "datasets" / "manifest.json").write_bytes(content)
    hub.root = tmp_path / "hub"
    with pytest.raises(DownloadError, match=words):
        download(tmp_path / "out", f"sp{VOCAB}", 1)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"pip install 'pgolf\[data\]'"):
        download(tmp_path)
