"""The documents of a stream of tokens, and the checks before it is scored."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.data.bpb import ByteCounter
from pgolf.data.shards import BOS_ID

PUBLIC_RANKS = 8  # of the public run; one of its ranks takes an eighth of a batch


def find_documents(tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and lengths of the documents of a CPU stream, int64.

    A length includes the next document's BOS, which is the document's last target. Tokens before the first BOS are a
    document; a BOS that ends the stream, which has no targets, is not.
    """
    starts = np.union1d([0], np.flatnonzero(tokens.numpy() == BOS_ID))
    lengths = np.append(starts[1:] + 1, tokens.numel()) - starts
    return starts[lengths > 1], lengths[lengths > 1]


def check_stream(tokens: Tensor, config: RunConfig, byte_table: ByteCounter, world_size: int) -> Tensor:
    """Return ``tokens`` as an int32 vector on the CPU.

    Raises ValueError unless they are a vector of at least two ids below vocab_size, the byte table has the same
    vocabulary, and this process has joined a process group if ``world_size`` exceeds 1.
    """
    if tokens.ndim != 1 or tokens.numel() < 2:
        raise ValueError(f"scoring needs one stream of at least two tokens, got a tensor {tuple(tokens.shape)}")
    tokens = tokens.to(device="cpu", dtype=torch.int32)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token ids run from {low} to {high}, and vocab_size is {config.vocab_size}")
    if byte_table.vocab_size != config.vocab_size:
        raise ValueError(
            f"the byte table has {byte_table.vocab_size} tokens and the model {config.vocab_size}: "
            "use the tokenizer that the data were made with"
        )
    if world_size > 1 and not dist.is_initialized():
        raise ValueError(f"world_size is {world_size}, but this process has joined no group: start it with torchrun")
    return tokens
