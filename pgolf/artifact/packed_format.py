"""The artifact's file with entropy-coded codes, ``.pgolf``: any quantised model, in the fewest bytes.

    6 bytes    the magic b"pgolf" and the version 1
    4          CRC-32 of all that follows
    16         lengths in bytes, uint32: side block, the same unpacked, words, escapes
    32         SHA-256 of all codes, in the order of the entries, int16, row by row
    ...        side block: xz data of a JSON header, the rows' classes, and all tensors that are no codes
    ...        states of the coders, words and escapes of `pgolf.artifact.entropy`

Numbers are little-endian. The header has the marks of `QuantizedModel.meta` and names, dtypes and shapes of all entries
in their order, and tells for which of them residuals are coded (`pgolf.artifact.decorrelation`). Nothing in a file is
run, a length that does not fit is refused before memory is taken for it, and the same model gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import struct
from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact.decorrelation import decorrelate, has_enough_rows, restore
from pgolf.artifact.entropy import LANES, EntropyError, Layout, Stream, decode, encode, row_classes
from pgolf.artifact.quantized import CODES, TRELLIS, ArtifactError, QuantizedModel, is_trellised

MAGIC = b"pgolf\x01"
HEAD = struct.Struct("<6sIIIII32s")
# Limits of what a file of a few bytes can make a reader allocate. No model that fits the cap comes near them.
MOST_NUMBERS = 1 << 26  # of all entries together
MOST_ROWS = 1 << 20  # of a matrix of codes: a row takes a step of the decoders; vocabularies have at most 2^16
MOST_COLUMNS = 1 << 16  # of a matrix of codes: a column takes dozens of bytes of the decoders, however few its codes
MOST_SIDE_BYTES = 1 << 26
MOST_HEADER_BYTES = 1 << 20  # as JSON, whose objects take 30 times as much
DTYPES = {name: getattr(torch, name) for name in ("float16", "float32", "int8", "int16")}
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def pack(quantized: QuantizedModel) -> bytes:
    """Return the file's content.

    Raises ArtifactError for codes that are on no path of their trellis, and for a model beyond the limits of `unpack`.
    """
    _check_entries(_listed(quantized))
    digest = hashlib.sha256()
    codes = {name: coded(name, quantized) for name in quantized.tensors if name.endswith(CODES)}
    for name in codes:
        digest.update(quantized.tensors[name].numpy().astype("<i2").tobytes())
    classes = {name: row_classes(array) for name, array in codes.items()}
    block, unpacked = side_block(quantized, classes)
    try:
        stream = encode(
            [(array, _layout(name, array.shape, classes[name], quantized.meta)) for name, array in codes.items()]
        )
    except EntropyError as error:
        raise ArtifactError(f"its codes cannot be packed: {error}") from error
    tail = [part.astype(kind).tobytes() for part, kind in zip(stream, ("<u2", "<u4", "<i2"), strict=True)]
    words, states, escapes = tail
    body = struct.pack("<IIII", len(block), unpacked, len(words), len(escapes)) + digest.digest()
    body += block + states + words + escapes
    return MAGIC + struct.pack("<I", crc32(body)) + body


def side_block(quantized: QuantizedModel, classes: Mapping[str, np.ndarray]) -> tuple[bytes, int]:
    """Return the side block of a model whose codes have rows of these classes, and its length unpacked.

    Raises ArtifactError for one that `unpack` would refuse for its length.
    """
    residuals = [name for name in classes if has_residuals(name, quantized)]
    named = {"residuals": residuals} if residuals else {}
    text = json.dumps({"meta": quantized.meta, "entries": _listed(quantized), **named}, separators=(",", ":")).encode()
    parts = [
        classes[name].tobytes() if name in classes else _planes(x.numpy()) for name, x in quantized.tensors.items()
    ]
    unpacked = struct.pack("<I", len(text)) + text + b"".join(parts)
    _check_lengths(len(text), len(unpacked))
    return lzma.compress(unpacked, check=lzma.CHECK_NONE, preset=9 | lzma.PRESET_EXTREME), len(unpacked)


def unpack(blob: bytes) -> QuantizedModel:
    """Return the model of a file's content. Raises ArtifactError if it is cut short, damaged or no such file."""
    if len(blob) < HEAD.size or not blob.startswith(MAGIC):
        raise ArtifactError("it does not begin as a .pgolf file of version 1 does")
    _, crc, length, unpacked, words, escapes, digest = HEAD.unpack_from(blob)
    states = 4 * LANES
    if HEAD.size + length + states + words + escapes != len(blob) or words % 2 or escapes % 2:
        raise ArtifactError("its lengths do not add up: it is cut short, or followed by other data")
    if crc32(memoryview(blob)[10:]) != crc:
        raise ArtifactError("its checksum is wrong")
    _check_lengths(0, unpacked)
    places = np.cumsum([HEAD.size, length, states, words, escapes])
    block, states_bytes, words_bytes, escapes_bytes = (blob[a:b] for a, b in zip(places[:-1], places[1:], strict=True))
    meta, entries, residuals, rest = _side(block, unpacked)
    tensors, layouts = _entries(meta, entries, rest)
    stream = Stream(
        *(
            np.frombuffer(part, kind)
            for part, kind in ((words_bytes, "<u2"), (states_bytes, "<u4"), (escapes_bytes, "<i2"))
        )
    )
    try:
        decoded = decode(stream, list(layouts.values()))
    except EntropyError as error:
        raise ArtifactError(f"its codes do not decode: {error}") from error
    codes = dict(zip(layouts, decoded, strict=True))
    for name in residuals:
        if name not in codes or not has_enough_rows(*codes[name].shape):
            raise ArtifactError(f"{name} has no residuals")
        try:
            codes[name] = restore(codes[name]).astype(np.int16)
        except ValueError as error:
            raise ArtifactError(f"{name}: {error}") from error
    if hashlib.sha256(b"".join(array.astype("<i2").tobytes() for array in codes.values())).digest() != digest:
        raise ArtifactError("its codes have another digest")
    tensors |= {name: torch.from_numpy(array) for name, array in codes.items()}
    ordered = {}
    for name, dtype, _ in entries:
        value = tensors[name].to(DTYPES[dtype])
        if name in layouts and not torch.equal(value.to(torch.int16), tensors[name]):
            raise ArtifactError(f"{name} has codes that are no {dtype}")
        ordered[name] = value
    return QuantizedModel(ordered, meta)


def has_residuals(name: str, quantized: QuantizedModel) -> bool:
    """Return whether residuals are coded for the entry ``name``: codes of 8 bits, on no trellis, with rows enough."""
    codes = quantized.tensors[name]
    trellised = is_trellised(quantized.meta[name.removesuffix(CODES)])
    return codes.dtype == torch.int8 and not trellised and has_enough_rows(*codes.shape)


def coded(name: str, quantized: QuantizedModel) -> np.ndarray:
    """Return what is coded for the entry ``name``, int16 [R, C]: its residuals, or the codes themselves."""
    codes = quantized.tensors[name].numpy()
    return decorrelate(codes) if has_residuals(name, quantized) else codes.astype("<i2")


def _layout(name: str, shape: tuple[int, ...] | torch.Size, classes: np.ndarray, meta: dict[str, str]) -> Layout:
    """Return the layout of the codes that are the entry ``name``, whose rows have these classes."""
    mark = TRELLIS.fullmatch(meta.get(name.removesuffix(CODES), ""))
    states, length = (int(mark[1]), int(mark[2])) if mark else (1, 1)
    return Layout(shape[0], shape[1], classes, states, length)


def _listed(quantized: QuantizedModel) -> list[Entry]:
    """Return the entries of a model as its header lists them."""
    return [(name, str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in quantized.tensors.items()]


def _check_lengths(header: int, side: int) -> None:
    """Raise ArtifactError for so many bytes of the header, or of the whole side block, that no file has them."""
    for name, claimed, most in (("header", header, MOST_HEADER_BYTES), ("side block", side, MOST_SIDE_BYTES)):
        if claimed > most:
            raise ArtifactError(f"its {name} claims {claimed:,} bytes, of at most {most:,}")


def _check_entries(entries: Sequence[Entry]) -> None:
    """Raise ArtifactError for entries of an unknown dtype or beyond the limits, and for codes that are no matrix."""
    numbers = 0
    for name, dtype, shape in entries:
        numbers += math.prod(max(n, 1) for n in shape)  # so that a 0 hides no dimension that is too large
        if dtype not in DTYPES or min(shape, default=1) < 0:
            raise ArtifactError(f"{name} is {dtype} {list(shape)}")
        if numbers > MOST_NUMBERS:
            most = f"{MOST_NUMBERS:,} numbers"
            raise ArtifactError(f"{name} is {dtype} {list(shape)}: all entries together have at most {most}")
        if name.endswith(CODES):
            if len(shape) != 2 or not all(shape) or dtype not in ("int8", "int16"):
                raise ArtifactError(f"{name} is no matrix of codes: {dtype} {list(shape)}")
            if shape[0] > MOST_ROWS or shape[1] > MOST_COLUMNS:
                most = f"{MOST_ROWS:,} rows and {MOST_COLUMNS:,} columns"
                raise ArtifactError(f"{name} is {list(shape)}: a matrix of codes has at most {most}")


def _planes(array: np.ndarray) -> bytes:
    """An array's bytes, the low ones of all numbers first: each plane is more alike than the numbers."""
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    return flat.view(np.uint8).reshape(-1, flat.itemsize).T.tobytes()


def _side(block: bytes, length: int) -> tuple[dict[str, str], list[Entry], list[str], bytes]:
    """Return marks, entries, the names of those whose residuals are coded, and the bytes behind them.

    Raises ArtifactError for a block that is damaged.
    """
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    try:
        data = decoder.decompress(block, max_length=length + 1)
    except lzma.LZMAError as error:
        raise ArtifactError(f"its side block is no xz data ({error})") from error
    if len(data) != length or not decoder.eof or decoder.unused_data or length < 4:
        raise ArtifactError("its side block has another length than it claims")
    (size,) = struct.unpack_from("<I", data)
    _check_lengths(size, length)
    try:
        header = json.loads(data[4 : 4 + size])
        meta, listed, residuals = header["meta"], header["entries"], [*header.get("residuals", ())]
        entries = [(str(name), str(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in listed]
        if not all(isinstance(text, str) for text in (*residuals, *meta, *meta.values())):
            raise ValueError("marks are text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"its header is damaged ({error})") from error
    if len({name for name, _, _ in entries}) != len(entries):
        raise ArtifactError("its header lists an entry twice")
    return meta, entries, residuals, data[4 + size :]


def _entries(meta: dict[str, str], entries: list[Entry], data: bytes) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """The tensors that are no codes, and the layouts of those that are, by name."""
    _check_entries(entries)
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Layout] = {}
    place = 0
    for name, dtype, shape in entries:
        is_codes = name.endswith(CODES)
        size = shape[0] if is_codes else math.prod(shape) * DTYPES[dtype].itemsize
        part = data[place : place + size]
        place += size
        if len(part) != size:
            raise ArtifactError(f"its side block ends in {name}")
        if is_codes:
            try:
                layouts[name] = _layout(name, shape, np.frombuffer(part, np.int8), meta)
                layouts[name].check()
            except EntropyError as error:
                raise ArtifactError(f"{name}: {error}") from error
        else:
            plane = np.frombuffer(part, np.uint8).reshape(DTYPES[dtype].itemsize, -1)
            array = np.ascontiguousarray(plane.T).reshape(-1).view(f"<{dtype[0]}{DTYPES[dtype].itemsize}")
            tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).view(shape)
    if place != len(data):
        raise ArtifactError("its side block goes on behind the last entry")
    return tensors, layouts
