"""Download of the published FineWeb shards and tokenizer from the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgolf.dataset import Progress, no_progress, record_dataset
from pgolf.shards import dataset_dir, dataset_name, read_shard, tokenizer_path
from pgolf.tokenizer import load_tokenizer

REPOSITORY = "kevclark/parameter-golf"  # the dataset repository with the 8192-token export
REMOTE_ROOT = "datasets"  # folder of the export inside it
RECORD_TRAIN_SHARDS = 80


class DownloadError(RuntimeError):
    """Something that cannot be downloaded, or arrives broken."""


def download(
    out_dir: str | os.PathLike,
    variant: str = "sp8192",
    train_shards: int | None = RECORD_TRAIN_SHARDS,
    *,
    repository: str = REPOSITORY,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Download tokenizer, all validation shards and the first ``train_shards`` (None: all) training shards.

    out_dir: becomes a data_dir; files that are there and pass the strict check are kept, so a second call resumes.
    variant: ``sp`` and the vocabulary's size, as published. progress: called with (files, their number, variant).
    Returns the dataset's entry of the published manifest, which is also put into ``{out_dir}/manifest.json``.

    Raises DownloadError where huggingface_hub is not installed, there is no network, the hub has no such variant or not
    so many shards, or a file arrives broken twice; ValueError for a variant that is none.
    """
    vocab_size = _vocab_size(variant)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = out_dir / ".download"  # the hub's client keeps its half-done files here, and goes on from them
    fetch = _hub_fetcher(repository, staging)

    entry = _published_entry(fetch, vocab_size, repository)
    folder = dataset_dir(out_dir, vocab_size)
    model = tokenizer_path(out_dir, vocab_size)
    files = [(f"tokenizers/{model.name}", model, lambda path: load_tokenizer(path, vocab_size))]
    for name in _shard_names(entry, variant, train_shards):
        files.append((f"datasets/{folder.name}/{name}", folder / name, lambda path: read_shard(path, vocab_size)))
    for remote, target, check in progress(files, len(files), variant):
        if not _is_sound(target, check):
            _download_checked(fetch, remote, target, check)
    record_dataset(out_dir, entry)
    shutil.rmtree(staging, ignore_errors=True)
    return entry


def _vocab_size(variant: str) -> int:
    match = re.fullmatch(r"sp(\d+)", variant)
    if not match:
        raise ValueError(f"the variant is 'sp' and the size of a vocabulary, such as sp8192; got {variant!r}")
    return int(match[1])


def _hub_fetcher(repository: str, staging: Path) -> Callable[..., Path]:
    """fetch(remote path below the export's root, again=False) -> the downloaded file."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DownloadError("downloading needs huggingface_hub: pip install 'pgolf[data]'") from None

    def fetch(remote: str, again: bool = False) -> Path:
        filename = f"{REMOTE_ROOT}/{remote}"
        try:
            path = hf_hub_download(
                repo_id=repository, filename=filename, repo_type="dataset", local_dir=staging, force_download=again
            )
        except Exception as error:  # versions of the hub's client differ in what they raise without a network
            raise DownloadError(
                f"cannot download {filename} from the dataset {repository} of huggingface.co "
                f"({type(error).__name__}: {error}). Is there a network, and room on the disk? What has arrived "
                "is kept: run the same command again to go on. Without a network: `pgolf data build`"
            ) from error
        return Path(path)

    return fetch


def _published_entry(fetch: Callable[..., Path], vocab_size: int, repository: str) -> dict[str, Any]:
    manifest = json.loads(fetch("manifest.json").read_text(encoding="utf-8"))
    datasets = {dataset.get("name"): dataset for dataset in manifest.get("datasets", [])}
    name = dataset_name(vocab_size)
    if name not in datasets:
        raise DownloadError(f"{repository} has no dataset {name}; it has {', '.join(map(str, datasets)) or 'none'}")
    return datasets[name]


def _shard_names(entry: dict[str, Any], variant: str, train_shards: int | None) -> list[str]:
    """Names of all validation shards and the first training shards: an early end leaves a dataset one can score on."""
    available = int(entry["stats"]["files_train"])
    wanted = available if train_shards is None else train_shards
    if not 0 <= wanted <= available:
        raise DownloadError(f"{variant} has {available} training shards, {wanted} cannot be downloaded")
    validation = [f"fineweb_val_{index:06d}.bin" for index in range(int(entry["stats"]["files_val"]))]
    return validation + [f"fineweb_train_{index:06d}.bin" for index in range(wanted)]


def _is_sound(path: Path, check: Callable[[Path], Any]) -> bool:
    try:
        check(path)
    except ValueError:
        return False
    return True


def _download_checked(fetch: Callable[..., Path], remote: str, target: Path, check: Callable[[Path], Any]) -> None:
    """Download to ``target``, which only ever holds a file that passed its check; a broken one is fetched once more."""
    path = fetch(remote)
    if not _is_sound(path, check):
        path = fetch(remote, again=True)
        try:
            check(path)
        except ValueError as error:
            raise DownloadError(f"{remote} arrived broken twice: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
