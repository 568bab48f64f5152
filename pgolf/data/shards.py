"""Token shards: the challenge's file format, and the paths of the files.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then the tokens as little-endian
uint16. Every document is BOS followed by its tokens. A document may continue in the next shard.

Beside each validation shard of case-coded documents lies its byte sidecar, a shard with the bytes of the original text
for each token.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pgolf.common.files import FileError, write_aside
from pgolf.data.case_coding import ESCAPE, FIRST_OPERATOR_ID, OPERATORS

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
BOS_ID = 1  # begins every document


class ShardError(FileError):
    """A shard is missing or damaged, or a dataset cannot be built."""


def read_shard(path: str | os.PathLike, vocab_size: int | None = None) -> np.ndarray:
    """Return the tokens of a shard, uint16 [N].

    With ``vocab_size`` they are read into memory, and each must be less; without it they are a read-only memory map.
    Raises ShardError, naming the file and what was found, for a wrong magic, version, size or token.
    """
    path = Path(path)
    if not path.is_file():
        raise ShardError(f"there is no shard {path}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ShardError(f"{path} has {size} bytes, less than the {HEADER_BYTES} of a shard's header")
    magic, version, count = (int(number) for number in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ShardError(f"{path} is no token shard: it begins with {magic}, expected {MAGIC}")
    if version != VERSION:
        raise ShardError(f"{path} is a shard of version {version}, expected {VERSION}")
    if count <= 0:
        raise ShardError(f"{path} says that it holds {count} tokens, expected at least one")
    if size != HEADER_BYTES + 2 * count:
        raise ShardError(
            f"{path} says that it holds {count} tokens, which makes {HEADER_BYTES + 2 * count} bytes, "
            f"but it has {size}: delete it and get it again"
        )
    if vocab_size is None:
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    # Read, not mapped: truncating a mapped file kills the process.
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_BYTES)
    if tokens.size < count:
        raise ShardError(f"{path} was cut short to {tokens.size} tokens while it was read")
    if (largest := int(tokens.max())) >= vocab_size:
        raise ShardError(f"{path} holds token {largest}, but the vocabulary has only {vocab_size}")
    return tokens


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write integers [N] as a shard, atomically. Raises ShardError if N is 0 or a token does not fit in 16 bits."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < tokens.size < 2**31:
        raise ShardError(f"a shard holds a vector of 1 to 2^31 - 1 tokens, got the shape {tokens.shape} for {path}")
    if tokens.dtype != np.uint16 and not 0 <= tokens.min() <= tokens.max() < 2**16:
        raise ShardError(f"tokens from {tokens.min()} to {tokens.max()} do not fit in the 16 bits of a shard ({path})")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    write_aside(path, lambda file: file.writelines([header.tobytes(), tokens.astype("<u2", copy=False).data]))


def dataset_name(vocab_size: int) -> str:
    """Return the name of the dataset with ``vocab_size`` tokens, which is also its folder's."""
    return f"fineweb10B_sp{vocab_size}"


def dataset_dir(data_dir: str | os.PathLike, vocab_size: int) -> Path:
    """Return the folder of the shards with ``vocab_size`` tokens in their vocabulary."""
    return Path(data_dir) / "datasets" / dataset_name(vocab_size)


def tokenizer_path(data_dir: str | os.PathLike, vocab_size: int) -> Path:
    """Return the path of the tokenizer with ``vocab_size`` tokens."""
    return Path(data_dir) / "tokenizers" / f"fineweb_{vocab_size}_bpe.model"


def shard_files(data_dir: str | os.PathLike, vocab_size: int, split: str) -> list[Path]:
    """Return the shards of ``split`` ("train" or "val"), sorted by name. Raises ShardError if there are none."""
    folder = dataset_dir(data_dir, vocab_size)
    files = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not files:
        raise ShardError(
            f"there are no {split} shards in {folder}: get the published ones with `pgolf data fineweb --variant "
            f"sp{vocab_size}`, build them from documents with `pgolf data build`, or set data_dir to where they are"
        )
    return files


def sidecar_path(shard: str | os.PathLike) -> Path:
    """Return the path of a validation shard's byte sidecar."""
    return Path(shard).with_name(Path(shard).name.replace("_val_", "_val_bytes_"))


def read_sidecar(shard: str | os.PathLike, tokens: np.ndarray) -> np.ndarray:
    """Return the original text's bytes of each of a validation shard's ``tokens``, uint16 [N], from its sidecar.

    Raises ShardError if the sidecar is missing or damaged, has another length, or gives bytes to a BOS or an operator.
    """
    path = sidecar_path(shard)
    if not path.is_file():
        raise ShardError(
            f"there is no byte sidecar {path}, without which the bytes of case-coded documents cannot be counted: "
            "get the published data (`pgolf data fineweb --variant sp8192_caseops`), or build them (`pgolf data build "
            "--case`)"
        )
    counts = np.array(read_shard(path))
    if counts.size != tokens.size:
        raise ShardError(
            f"{path} counts the bytes of {counts.size} tokens, and {shard} has {tokens.size}: get both again"
        )
    operators = (tokens >= FIRST_OPERATOR_ID) & (tokens < FIRST_OPERATOR_ID + len(OPERATORS))
    escaped = np.append(False, tokens[:-1] == FIRST_OPERATOR_ID + OPERATORS.index(ESCAPE))
    wrong = np.flatnonzero(((tokens == BOS_ID) | operators & ~escaped) & (counts > 0))
    if wrong.size:
        raise ShardError(
            f"{path} does not belong to {shard}: it gives {counts[wrong[0]]} bytes to token {wrong[0]}, which is "
            f"{tokens[wrong[0]]}, a BOS or an operator, and stands for none"
        )
    return counts
