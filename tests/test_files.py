"""Writing whole or not at all, and reading JSON and tensors with their integrity checked."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from pgolf.common.files import FileError, read_json, remove_leftovers, write_aside
from pgolf.common.tensors import check_tensors, not_finite, read_tensors


def fails_after(part: bytes, error: BaseException):
    """A content that is half written when ``error`` comes."""

    def write(file) -> None:
        file.write(part)
        raise error

    return write


@pytest.mark.parametrize("content", [b"new", "new", lambda file: file.write(b"new")])
def test_files_are_replaced_whole(tmp_path: Path, content) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    write_aside(path, content)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileError, match="file cannot be written: No space left on device"):
        write_aside(path, fails_after(b"half", full))
    with pytest.raises(KeyboardInterrupt):
        write_aside(path, fails_after(b"half", KeyboardInterrupt()))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_torch_tells_of_a_full_disk(tmp_path: Path) -> None:
    """torch.save lets the system's error through, also when it comes in the midst of a tensor."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileError, match="cannot be written: .*No space left"):
        write_aside(tmp_path / "x.pt", lambda file: torch.save({"a": torch.ones(9)}, io.BufferedWriter(Full(), 16)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["missing/file", "plain/file", "."])
def test_places_that_take_no_file(tmp_path: Path, where: str) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        write_aside(tmp_path / where, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_leftovers(tmp_path: Path) -> None:
    for name in ("ema.pt", ".ema.pt.123", ".ema.pt.9", "ema.pt.partial", ".ema.pt.bak", ".other.pt.5", "ema.pt.7"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "ema.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"ema.pt", ".ema.pt.bak", ".other.pt.5", "ema.pt.7"}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is no JSON object"),
        (b"{", "is no JSON object"),
        (b'{"a": "\xff"}', "is no JSON object"),
        (b"[" * 100_000, "is no JSON object"),
        (b"[1]", "is no JSON object .it holds a list"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=f"summary.json .*{words}"):
        read_json(path)


# --- Tensors ----------------------------------------------------------------------------------------------------------

TENSORS = {"model": {"first": torch.arange(6.0), "second": torch.ones(2, 2)}, "ema": {"first": torch.zeros(3)}}


def saved(content: object = TENSORS) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read(data: bytes) -> object:
    return read_tensors(io.BytesIO(data), len(data))


def test_tensors_come_back() -> None:
    found = read(saved())
    assert torch.equal(found["model"]["first"], torch.arange(6.0)) and found["model"]["second"].shape == (2, 2)


@pytest.mark.parametrize("name, value", [("first", torch.arange(6.0)), ("second", torch.ones(2, 2))])
def test_one_wrong_bit_names_its_tensor(name: str, value: torch.Tensor) -> None:
    data = bytearray(saved())
    place = data.index(value.numpy().tobytes())
    data[place + 2] ^= 1
    torch.load(io.BytesIO(data), weights_only=True)  # which torch itself does not see
    with pytest.raises(FileError, match=f"the tensor {name} .*does not have its checksum"):
        read(bytes(data))


def test_a_part_marked_as_a_folder_is_read() -> None:
    """torch.load's own reader returns for such a part memory that it has not written."""
    data = bytearray(saved())
    place = data.index(b"archive/data/0", data.index(b"PK\x01\x02"))  # in the archive's directory
    data[place - 46 + 38] |= 0x10
    assert torch.equal(read(bytes(data))["model"]["first"], torch.arange(6.0))


def test_archives_that_torch_does_not_write() -> None:
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(FileError, match="not written by torch.save"):
        read(deflated.getvalue())
    twice = io.BytesIO(saved())
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(24))
    with pytest.raises(FileError, match="not written by torch.save"):
        read(twice.getvalue())
    for data in (b"", b"hello\n", b"PK\x03\x04", saved()[:-30], saved(Path("x"))):
        with pytest.raises(FileError, match="not written by torch.save, or is cut short"):
            read(data)


def test_what_fits_no_model() -> None:
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    assert check_tensors(like, like) is like

    def refused(words: str, **changed: object) -> None:
        with pytest.raises(FileError, match=words):
            check_tensors({**like, **changed}, like)

    refused("lacks nothing and has c besides", c=torch.zeros(1))
    refused(r"a is \[2, 4\] of torch.float32, expected \[2, 3\]", a=torch.zeros(2, 4))
    refused("b is .3. of torch.float16, expected .3. of torch.float32", b=torch.zeros(3).half())
    refused("b has numbers that are not finite", b=torch.tensor([0.0, float("inf"), 0.0]))
    refused("a is no plain tensor", a=torch.zeros(1).expand(2, 3))  # a bomb: it takes no room in a file
    refused("b is no plain tensor", b=[0.0] * 3)
    with pytest.raises(FileError, match="lacks b and has nothing besides"):
        check_tensors({"a": like["a"]}, like)
    with pytest.raises(FileError, match="holds a list in place of tensors"):
        check_tensors([], like)


def test_the_first_tensor_that_is_not_finite_has_a_path() -> None:
    state = {"model": {"a": torch.ones(2)}, "state": {0: {"step": 1, "mean": torch.tensor([float("nan")])}}, "n": None}
    assert not_finite(state) == "state.0.mean"
    assert not_finite({"model": state["model"], "ids": torch.ones(2, dtype=torch.int64)}) == ""
