"""Downloading the published FineWeb shards and tokenizer from the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgolf.common.files import FileError
from pgolf.common.progress import Progress
from pgolf.data.dataset import no_progress, record_dataset
from pgolf.data.manifest import read_manifest, recorded_dataset, sha256_of
from pgolf.data.shards import dataset_dir, dataset_name, read_shard, read_sidecar, sidecar_path, tokenizer_path
from pgolf.data.tokenizer import load_tokenizer

REMOTE_ROOT = "datasets"  # the folder of an export in its repository
RECORD_TRAIN_SHARDS = 80
MISSING = "downloading needs huggingface_hub: pip install 'pgolf[data]'"


class DownloadError(RuntimeError):
    """A file cannot be downloaded, or arrived damaged."""


class Export(NamedTuple):
    """Where a published export lies, and how the names of its dataset and tokenizer end."""

    repository: str  # a dataset repository of the hub
    ending: str
    case_coding: bool


EXPORTS = {  # by what follows the vocabulary's size in a variant's name
    "": Export("kevclark/parameter-golf", "", False),
    "_caseops": Export("romeerp/parameter-golf-caseops-v1", "_lossless_caps_caseops_v1_reserved", True),
}


def download(
    out_dir: str | os.PathLike,
    variant: str = "sp8192",
    train_shards: int | None = RECORD_TRAIN_SHARDS,
    *,
    revision: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Download the tokenizer, all validation shards and the first ``train_shards`` (None: all) training shards.

    With case coding validation shards come with their byte sidecars. Names in ``out_dir`` are those of the plain
    variant. A second call resumes: it keeps files that pass the strict check.

    Args:
        out_dir: the data_dir to create or complete.
        variant: ``sp`` and the vocabulary's size, as published; ``_caseops`` behind it means the case-coded documents
            of parameter-golf #1729.
        revision: commit, branch or tag; None takes the commit of an earlier call for this folder, else the newest.
        progress: called with (files, their number, variant).

    Returns the dataset's entry of the published manifest with repository, commit, and the files' tokens and SHA-256;
    the entry is also written to ``{out_dir}/manifest.json``.
    Raises DownloadError if huggingface_hub is not installed, there is no network, the hub lacks the variant or has
    fewer shards, the folder's shards are of another commit, or a file arrives damaged twice; ValueError if ``variant``
    is none.
    """
    vocab_size, export = _export(variant)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = out_dir / ".download"  # the hub's client resumes incomplete files here
    before = recorded_dataset(out_dir, vocab_size)
    commit = _commit(export.repository, revision, before)
    fetch = _hub_fetcher(export.repository, commit, staging)

    published = dataset_name(vocab_size) + export.ending
    entry = {**_published_entry(fetch, published, export.repository), "name": dataset_name(vocab_size)}
    entry |= {"repository": export.repository, "revision": commit, "case_coding": export.case_coding}
    record_dataset(out_dir, {**before, **entry})  # before the files: a call that resumes must take the same commit
    folder = dataset_dir(out_dir, vocab_size)
    model = tokenizer_path(out_dir, vocab_size)
    names = _shard_names(entry, variant, train_shards)
    known = _known(before)
    remote_model = f"tokenizers/{model.stem}{export.ending}{model.suffix}"

    def read_tokenizer(path: Path) -> Any:
        return load_tokenizer(path, vocab_size, case_coding=export.case_coding)

    files: list[tuple[str, Path, Callable[[Path], Any]]] = [(remote_model, model, read_tokenizer)]
    for name in names:
        files.append((f"datasets/{published}/{name}", folder / name, lambda path: read_shard(path, vocab_size)))
        if export.case_coding and "_val_" in name:
            sidecar = sidecar_path(folder / name)
            files.append((f"datasets/{published}/{sidecar.name}", sidecar, read_shard))
    for remote, target, check in progress(files, len(files), variant):
        if not _is_sound(target, check) or sha256_of(target) != known.get(target.name, sha256_of(target)):
            _download_checked(fetch, remote, target, check)
    entry["tokenizer_sha256"] = sha256_of(model)
    entry["splits"] = {split: _shards(folder, split, names, known) for split in ("train", "val")}
    if export.case_coding:
        entry["splits"]["val"] |= _sidecars(folder, entry["splits"]["val"]["shards"])
    record_dataset(out_dir, entry)
    shutil.rmtree(staging, ignore_errors=True)
    return entry


def _export(variant: str) -> tuple[int, Export]:
    match = re.fullmatch(r"sp(\d+)(_\w+)?", variant)
    if not match or (match[2] or "") not in EXPORTS:
        raise ValueError(
            f"the variant is 'sp' and the size of a vocabulary, such as sp8192, or with case coding sp8192_caseops; "
            f"got {variant!r}"
        )
    return int(match[1]), EXPORTS[match[2] or ""]


def _commit(repository: str, revision: str | None, before: dict[str, Any]) -> str:
    """Return the commit to download. Raises DownloadError if the folder's shards are of another one."""
    pinned = before.get("revision") if before.get("repository") == repository else None
    if revision is None and pinned is not None:
        return pinned
    try:
        from huggingface_hub import HfApi

        commit = str(HfApi().dataset_info(repository, revision=revision).sha)
    except ImportError:
        raise DownloadError(MISSING) from None
    except Exception as error:  # versions of the hub's client raise different errors without a network
        shown = f"{type(error).__name__}: {error}"
        raise DownloadError(
            f"cannot look up the dataset {repository} of huggingface.co ({shown}). Is there a network? Without one: "
            "`pgolf data build`"
        ) from error
    if commit != pinned and (pinned or "splits" in before):  # entries of older versions record neither
        was = f"commit {pinned}" if pinned else "another origin"
        raise DownloadError(
            f"manifest.json records this dataset from {was}, and {revision or 'the newest'} is {commit}: delete the "
            "dataset and its entry there, or choose another folder"
        )
    return commit


def _known(before: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256, by name, of the shards and sidecars that an earlier call recorded."""
    try:
        splits = before.get("splits", {}).values()
        files = [file for split in splits for file in (*split["shards"], *split.get("sidecars", ()))]
        return {file["file"]: file["sha256"] for file in files}
    except (AttributeError, KeyError, TypeError) as error:
        raise DownloadError(f"manifest.json is damaged in {before['name']} ({error!r}): delete it") from error


def _shards(folder: Path, split: str, names: list[str], known: dict[str, str]) -> dict[str, Any]:
    """Return a split's entry of the manifest: the shards of this call, and those of earlier calls that still exist."""
    of_split = re.compile(rf"fineweb_{split}_\d+\.bin")
    ours = {name for name in {*names, *known} if of_split.fullmatch(name) and (folder / name).is_file()}
    return {
        "shards": [
            {"file": name, "tokens": read_shard(folder / name).size, "sha256": sha256_of(folder / name)}
            for name in sorted(ours)
        ]
    }


def _sidecars(folder: Path, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a manifest says of the shards' byte sidecars. Raises ShardError if one does not fit its shard."""
    paths = [folder / shard["file"] for shard in shards]
    counts = [read_sidecar(path, read_shard(path)) for path in paths]
    sidecars = [
        {"file": sidecar_path(path).name, "tokens": of_shard.size, "sha256": sha256_of(sidecar_path(path))}
        for path, of_shard in zip(paths, counts, strict=True)
    ]
    return {"bytes": sum(int(of_shard.sum(dtype=np.int64)) for of_shard in counts), "sidecars": sidecars}


def _hub_fetcher(repository: str, commit: str, staging: Path) -> Callable[..., Path]:
    """Return a function fetch(path below the export's root, again=False) that returns the downloaded file."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DownloadError(MISSING) from None

    def fetch(remote: str, again: bool = False) -> Path:
        filename = f"{REMOTE_ROOT}/{remote}"
        try:
            path = hf_hub_download(
                repo_id=repository,
                filename=filename,
                repo_type="dataset",
                revision=commit,
                local_dir=staging,
                force_download=again,
            )
        except Exception as error:  # versions of the hub's client raise different errors without a network
            raise DownloadError(
                f"cannot download {filename} from the dataset {repository} of huggingface.co "
                f"({type(error).__name__}: {error}). Is there a network, and room on the disk? What has arrived "
                "is kept: run the same command again to go on. Without a network: `pgolf data build`"
            ) from error
        return Path(path)

    return fetch


def _published_entry(fetch: Callable[..., Path], name: str, repository: str) -> dict[str, Any]:
    path = fetch("manifest.json")
    try:
        datasets = {entry["name"]: entry for entry in read_manifest(path.parent)["datasets"]}
    except FileError as error:
        raise DownloadError(f"the manifest of {repository} is damaged: {error}") from error
    if name not in datasets:
        raise DownloadError(f"{repository} has no dataset {name}; it has {', '.join(datasets) or 'none'}")
    stats = datasets[name].get("stats")
    if not isinstance(stats, dict) or not all(type(stats.get(f"files_{split}")) is int for split in ("train", "val")):
        raise DownloadError(f"the manifest of {repository} does not tell how many files {name} has")
    return datasets[name]


def _shard_names(entry: dict[str, Any], variant: str, train_shards: int | None) -> list[str]:
    """Return the names of all validation shards and the first training shards, validation first.

    A download that is interrupted then leaves a dataset that can be scored.
    """
    available = entry["stats"]["files_train"]
    count = available if train_shards is None else train_shards
    if not 0 <= count <= available:
        raise DownloadError(f"{variant} has {available} training shards, {count} cannot be downloaded")
    validation = [f"fineweb_val_{index:06d}.bin" for index in range(entry["stats"]["files_val"])]
    return validation + [f"fineweb_train_{index:06d}.bin" for index in range(count)]


def _is_sound(path: Path, check: Callable[[Path], Any]) -> bool:
    try:
        check(path)
    except ValueError:
        return False
    return True


def _download_checked(fetch: Callable[..., Path], remote: str, target: Path, check: Callable[[Path], Any]) -> None:
    """Download to ``target`` a file that passes its check; fetch a damaged one once more."""
    path = fetch(remote)
    if not _is_sound(path, check):
        path = fetch(remote, again=True)
        try:
            check(path)
        except ValueError as error:
            raise DownloadError(f"{remote} arrived broken twice: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
