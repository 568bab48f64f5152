"""The shard format with its checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pgolf.data.shards import MAGIC, VERSION, ShardError, read_shard, shard_files, write_shard


def raw_shard(magic: int = MAGIC, version: int = VERSION, count: int = 3, tokens: tuple[int, ...] = (1, 7, 9)) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


def test_the_format_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "shard.bin"
    write_shard(path, np.array([1, 7, 65535]))
    assert path.read_bytes() == raw_shard(tokens=(1, 7, 65535))
    tokens = read_shard(path, 65536)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [1, 7, 65535]
    assert [file.name for file in tmp_path.iterdir()] == ["shard.bin"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\0" * 1000, "has 1000 bytes, less than the 1024"),
        (raw_shard(magic=5), f"begins with 5, expected {MAGIC}"),
        (raw_shard(version=2), "version 2, expected 1"),
        (raw_shard(count=0, tokens=()), "holds 0 tokens"),
        (raw_shard(count=-3), "holds -3 tokens"),
        (raw_shard(count=4), "1032 bytes, but it has 1030"),
        (raw_shard() + b"\0", "1030 bytes, but it has 1031"),
        (raw_shard(tokens=(1, 300, 9)), "token 300, but the vocabulary has only 300"),
    ],
)
def test_broken_shards_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "shard.bin"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=f"shard.bin .*{message}"):
        read_shard(path, 300)


def test_missing_shards_say_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no shard"):
        read_shard(tmp_path / "none.bin")
    with pytest.raises(ShardError, match="pgolf data fineweb --variant sp8192.*pgolf data build"):
        shard_files(tmp_path, 8192, "train")


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [-1, 2], [65536]])
def test_what_fits_in_no_shard_is_not_written(tmp_path: Path, tokens: list) -> None:
    with pytest.raises(ShardError):
        write_shard(tmp_path / "shard.bin", np.array(tokens, dtype=np.int64))
    assert not list(tmp_path.iterdir())
