"""The validation tokens, and what counts the bytes that each of them stands for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter, ByteSidecar, ByteTable
from pgolf.data.shards import BOS_ID, read_shard, read_sidecar, shard_files, tokenizer_path
from pgolf.data.tokenizer import load_tokenizer


def validation_data(config: RunConfig) -> tuple[torch.Tensor, ByteCounter]:
    """Return the configuration's validation tokens, int32 [N] on the CPU, and what counts their bytes.

    That is the byte table of the tokenizer, and with case_coding the byte sidecars of the shards. Raises ShardError or
    TokenizerError if the data are not coded as case_coding says.
    """
    files = shard_files(config.data_dir, config.vocab_size, "val")
    tokens = load_validation_tokens(files, vocab_size=config.vocab_size, doc_fraction=config.val_doc_fraction)
    tokenizer = tokenizer_path(config.data_dir, config.vocab_size)
    load_tokenizer(tokenizer, config.vocab_size, case_coding=config.case_coding)
    if not config.case_coding:
        return tokens, ByteTable.from_sentencepiece(tokenizer)
    counts = np.concatenate([read_sidecar(file, read_shard(file)).astype(np.int32) for file in files])
    return tokens, ByteSidecar(tokens, torch.from_numpy(counts[: tokens.numel()]), config.vocab_size)


def load_validation_tokens(files: Sequence[str | os.PathLike], *, vocab_size: int, doc_fraction: float = 1.0) -> Tensor:
    """Return the tokens of the validation shards as int32 [N] on the CPU (162 MB for the challenge's split).

    int32 is the smallest integer type that torch's comparisons, indexing and conversions all support.

    Args:
        doc_fraction: keep the first ceil(doc_fraction · documents) documents.

    Raises ShardError for a bad shard and ValueError for a fraction outside (0, 1].
    """
    if not 0 < doc_fraction <= 1:
        raise ValueError(f"the fraction of validation documents must be above 0 and at most 1, got {doc_fraction}")
    tokens = torch.from_numpy(np.concatenate([read_shard(file, vocab_size).astype(np.int32) for file in files]))
    if doc_fraction == 1:
        return tokens
    starts = torch.nonzero(tokens == BOS_ID).flatten()
    # Round first: 0.07 * 100 is slightly more than 7 in floating point, and must not give 8 documents.
    kept = math.ceil(round(doc_fraction * starts.numel(), 6))
    return tokens if kept >= starts.numel() else tokens[: starts[kept]].clone()
