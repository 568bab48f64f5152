"""The stage ``data``: check the shards and the tokenizer, and build them where the settings say so."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from pgolf.common.files import write_aside
from pgolf.common.folder import RunFolder
from pgolf.common.progress import progress
from pgolf.common.runtime import World
from pgolf.config import RunConfig
from pgolf.data.manifest import check_dataset
from pgolf.data.shards import dataset_dir, tokenizer_path
from pgolf.data.validation import validation_data


def run_data(config: RunConfig, folder: RunFolder, world: World, resume: bool) -> None:
    """Check every shard and the tokenizer; build them first from the embedded corpus if ``data_source`` says so.

    The summary keeps a record of each file, by which later stages detect changes.
    """
    begun = time.perf_counter()
    if world.is_main:
        if config.data_source == "embedded" and not dataset_dir(config.data_dir, config.vocab_size).is_dir():
            from pgolf.data.dataset import build_embedded  # the exported program lacks this module

            build_embedded(config.data_dir, config.vocab_size, config.case_coding)
        results, files = check_data(config)
        write_aside(folder.tokenizer, tokenizer_path(config.data_dir, config.vocab_size).read_bytes())
        folder.record("data", {**results, "seconds": time.perf_counter() - begun, "files": files})
        world.log(f"{results['train_tokens']:,} training and {results['val_tokens']:,} validation tokens")
    world.barrier()


def check_data(config: RunConfig) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Check the data set as `check_dataset` does, and count the tokens and bytes of the documents that are scored."""
    show = partial(progress, description="checking")
    counts, files = check_dataset(config.data_dir, config.vocab_size, show, case_coding=config.case_coding)
    tokens, byte_table = validation_data(config)
    return {**counts, "val_tokens": tokens.numel(), "val_bytes": int(byte_table.of_stream(tokens).sum())}, files
