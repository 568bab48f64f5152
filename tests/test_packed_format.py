"""The file format .pgolf: everything comes back, the same bytes every time, and damage is a message."""

from __future__ import annotations

import lzma
import struct
from pathlib import Path
from zlib import crc32

import pytest
import torch

from pgolf.artifact import packed_format
from pgolf.artifact.container import ArtifactError, load, save
from pgolf.artifact.quantized import QuantizedModel
from pgolf.kernels.trellis.reference import nearest_path

PUBLIC = Path(__file__).parent / "golden" / "pr1874_tiny.int6.ptz"
MARKS = {"a": "trellis (8 states, 16 rows)", "b": "passthrough (float16)"}


def model(rows: int = 40, columns: int = 24) -> QuantizedModel:
    codes = nearest_path(torch.randn(columns, rows) * 5, 8, 16).T.contiguous().to(torch.int16)
    tensors = {
        "a.q": codes,
        "a.row": torch.randint(-90, -60, (rows,), dtype=torch.int16),
        "a.column": torch.randint(-9, 9, (columns,), dtype=torch.int16),
        "b": torch.randn(7).half(),
    }
    return QuantizedModel(tensors, MARKS)


def same(one: QuantizedModel, other: QuantizedModel) -> bool:
    equal = (
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(one.tensors.values(), other.tensors.values(), strict=True)
    )
    return (
        list(one.tensors) == list(other.tensors) and list(one.meta.items()) == list(other.meta.items()) and all(equal)
    )


@pytest.fixture
def blob(tmp_path: Path) -> bytes:
    save(tmp_path / "model.pgolf", model())
    return (tmp_path / "model.pgolf").read_bytes()


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    given = model()
    paths = [tmp_path / f"{number}.pgolf" for number in range(2)]
    sizes = [save(path, given) for path in paths]
    assert same(load(paths[0]), given) and sizes[0] == paths[0].stat().st_size
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["0.pgolf", "1.pgolf"]


def test_a_public_artifact_goes_both_ways_in_fewer_bytes(tmp_path: Path) -> None:
    public = load(PUBLIC)
    assert save(tmp_path / "model.pgolf", public) < PUBLIC.stat().st_size
    again = load(tmp_path / "model.pgolf")
    assert same(again, public)
    save(tmp_path / "back.int6.ptz", again)
    assert same(load(tmp_path / "back.int6.ptz"), public)


def test_the_record_sized_artifact_shrinks(shared: Path, tmp_path: Path) -> None:
    public = load(shared / "golden" / "public_160steps.int6.ptz")
    assert save(tmp_path / "model.pgolf", public) <= 15_680_000  # brotli's file has 15,947,047
    assert same(load(tmp_path / "model.pgolf"), public)


def test_endings_name_the_formats(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no place for codes on a trellis; write a .pgolf file"):
        save(tmp_path / "model.int6.ptz", model())
    with pytest.raises(ArtifactError, match="ends in .pgolf or .int6.ptz"):
        save(tmp_path / "model.bin", model())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, "one byte"])
def test_a_file_cut_short_is_an_error_that_names_it(blob: bytes, tmp_path: Path, share: float | str) -> None:
    path = tmp_path / "short.pgolf"
    path.write_bytes(blob[: len(blob) - 1 if share == "one byte" else int(len(blob) * float(share))])
    with pytest.raises(ArtifactError, match=r"short\.pgolf.*is no artifact, or is cut short.*pgolf quantize"):
        load(path)


def test_every_changed_byte_is_noticed(blob: bytes) -> None:
    for place in range(0, len(blob), 7):
        damaged = bytearray(blob)
        damaged[place] ^= 1 + place % 255
        with pytest.raises(ArtifactError):
            packed_format.unpack(bytes(damaged))


def resealed(blob: bytes, side: bytes, claimed: int | None = None) -> bytes:
    """A file with another side block and a right checksum."""
    head = packed_format.HEAD
    magic, _, length, unpacked, words, escapes, digest = head.unpack_from(blob)
    block = lzma.compress(side, check=lzma.CHECK_NONE)
    rest = blob[head.size + length :]
    body = struct.pack("<IIII", len(block), len(side) if claimed is None else claimed, words, escapes) + digest
    body += block + rest
    return magic + struct.pack("<I", crc32(body)) + body


def side_of(blob: bytes) -> bytes:
    head = packed_format.HEAD
    return lzma.decompress(blob[head.size : head.size + head.unpack_from(blob)[2]])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'["a.q","int16",[40,24]]', b'["a.q","int16",[40,25]]', "codes do not decode|another digest"),
        (b'["a.q","int16",[40,24]]', b'["a.q","int64",[40,24]]', "a.q is int64"),
        (b'["a.q","int16",[40,24]]', b'["a.q","int16",[4024]]', "no matrix of codes"),
        (b'["a.q","int16",[40,24]]', b'["a.q","int16",[-1,-9]]', "a.q is int16"),
        (b'["a.q","int16",[40,24]]', b'["a.q","int16",[1,67108000]]', "at most 1,048,576 rows and 65,536 columns"),
        (b'["a.q","int16",[40,24]]', b'["a.q","int16",[67108000,1]]', "at most 1,048,576 rows and 65,536 columns"),
        (b'["a.row","int16",[40]]', b'["a.row","int16",[99999999999]]', "at most 67,108,864 numbers"),
        (b'["b","float16",[7]]', b'["b","float16",[0,%s]]' % (b"9" * 30), "at most 67,108,864 numbers"),
        (b'["a.row","int16",[40]]', b'["a.row","int16",[-40]]', r"a.row is int16 \[-40\]"),
        (b'["a.row",', b'["a.q",', "lists an entry twice"),
        (b"8 states", b"9 states", "no trellis of 9 states"),
        (b"8 states, 16 rows", b"4 states, 16 rows", "codes do not decode|another digest"),
        (b'"meta"', b'"mata"', "header is damaged"),
    ],
)
def test_headers_that_lie_are_refused(blob: bytes, old: bytes, new: bytes, message: str) -> None:
    side = side_of(blob)
    assert old in side
    changed = side.replace(old, new)
    size = struct.unpack_from("<I", side)[0] + len(changed) - len(side)
    with pytest.raises(ArtifactError, match=message):
        packed_format.unpack(resealed(blob, struct.pack("<I", size) + changed[4:]))


def test_lengths_are_refused_before_memory_is_taken(blob: bytes) -> None:
    with pytest.raises(ArtifactError, match="claims 4,294,967,295 bytes"):
        packed_format.unpack(resealed(blob, side_of(blob), 2**32 - 1))
    with pytest.raises(ArtifactError, match="another length than it claims"):
        packed_format.unpack(resealed(blob, bytes(10_000_000), 1000))


@pytest.mark.parametrize("shape", [(1, 67_108_000), (67_108_000, 1), (9000, 9000)])
def test_what_would_not_be_read_is_not_written(tmp_path: Path, shape: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(packed_format, "row_classes", None)  # not reached
    codes = torch.zeros(1, dtype=torch.int16).expand(shape)
    with pytest.raises(ArtifactError, match=r"a\.q.*at most (67,108,864 numbers|.*65,536 columns)"):
        packed_format.pack(QuantizedModel({"a.q": codes}, {"a": "trellis (8 states, 16 rows)"}))


@pytest.mark.parametrize(("limit", "named"), [("MOST_HEADER_BYTES", "header"), ("MOST_SIDE_BYTES", "side block")])
def test_long_headers_and_side_blocks_are_refused(blob: bytes, monkeypatch, limit: str, named: str) -> None:
    monkeypatch.setattr(packed_format, limit, 100)
    with pytest.raises(ArtifactError, match=f"its {named} claims [0-9]+ bytes, of at most 100"):
        packed_format.unpack(blob)
    with pytest.raises(ArtifactError, match=f"its {named} claims [0-9]+ bytes, of at most 100"):
        packed_format.pack(model())


def test_steps_beyond_reason_are_refused(tmp_path: Path) -> None:
    given = model()
    given.tensors["a.row"][3] = 513
    with pytest.raises(ArtifactError, match="a.row has exponents beyond 512"):
        save(tmp_path / "model.pgolf", given)
    given.tensors["a.row"] = given.tensors["a.row"][:-1]
    with pytest.raises(ArtifactError, match="do not fit together"):
        save(tmp_path / "model.pgolf", given)
