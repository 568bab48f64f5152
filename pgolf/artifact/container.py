"""The artifact: the quantised model as one compressed file, and the bytes it and the code take of the cap.

The container is that of parameter-golf PR #1874, which both read alike:

    torch.save of {"w": tensors by entry name, "m": how each was made}
    → byte shuffle: b"BSHF", one byte with the stride 2, then the bytes at even places, then those at odd ones
    → brotli (quality 11) or xz (preset 6)

Codes take a byte each; the entropy coder does the packing. The same tensors give the same bytes.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact.quantized import (
    ASYMMETRIC_KEYS,
    CODES,
    PASSTHROUGH,
    SCALE,
    SYMMETRIC_KEYS,
    QuantizedModel,
    largest_code,
)
from pgolf.common.files import FileError, write_aside
from pgolf.common.tensors import check_tensor, read_tensors
from pgolf.kernels.dequant import MAX_RANK

CAP_BYTES = 16_000_000  # of the challenge: code and compressed weights together, decimal
# The decompressed bytes for one compressed byte at the cap: a code takes a byte, and compressed more than a bit.
MOST_EXPANSION = 8
XZ_MEMORY = 1 << 27  # bytes; a decoder of the largest preset takes half of it
SHUFFLE_MAGIC = b"BSHF"
SHUFFLE_STRIDE = 2
BROTLI_QUALITY, BROTLI_WINDOW = 11, 24
XZ_MAGIC, XZ_PRESET = b"\xfd7zXZ\x00", 6
ZIP_MAGIC = b"PK"  # torch.save writes a zip archive
MARK = re.compile(r"gptq \(int([2-8])\)(\+lqer(?:_asym)?)?")


class ArtifactError(FileError):
    """A file that is no artifact, or an artifact that is too large."""


def save(path: str | os.PathLike, quantized: QuantizedModel, compressor: str = "brotli") -> int:
    """Write the artifact, aside first and then renamed, and return its bytes.

    Brotli takes about a minute for the record model. Raises ArtifactError for another compressor than ``brotli`` and
    ``lzma`` and for a model that `load` would refuse, ImportError when brotli is not installed.
    """
    quantized = QuantizedModel(_pooled(quantized.tensors), quantized.meta)
    _check(quantized)
    data = byte_shuffle(_serialize(quantized))
    blob = _compress(data, compressor)
    if len(data) >= _most_bytes(blob):
        raise ArtifactError(f"{len(data):,} bytes are too many for an artifact")
    write_aside(path, blob)
    return len(blob)


def load(path: str | os.PathLike) -> QuantizedModel:
    """Read an artifact, whichever compressor wrote it. No code in it is run.

    Memory is bounded by what an artifact can hold: 8 bytes for each of the file's, or of the cap where that is more.
    Raises ArtifactError when the file is cut short, damaged or no artifact, naming it and the tensor; FileNotFoundError
    when there is none; ImportError when it needs brotli and that is not installed.
    """
    path = Path(path)
    blob = path.read_bytes()
    try:
        archive = byte_unshuffle(_decompress(blob))
        if not archive.startswith(ZIP_MAGIC):
            raise ArtifactError("it was not written by torch.save")
        return _checked(read_tensors(io.BytesIO(archive), len(archive)))
    except FileError as error:
        raise ArtifactError(
            f"{path} ({len(blob):,} bytes) is no artifact, or is cut short or damaged: {error}. "
            "Copy it again, or write it again with `pgolf quantize`"
        ) from error


def _serialize(quantized: QuantizedModel) -> bytes:
    # Pickle writes a string that it has seen before as a reference to that object: equal strings must be one object,
    # or the bytes would depend on how the model came about.
    tensors = {sys.intern(name): tensor for name, tensor in quantized.tensors.items()}
    meta = {sys.intern(name): sys.intern(how) for name, how in quantized.meta.items()}
    buffer = io.BytesIO()
    torch.save({"w": tensors, "m": meta}, buffer)
    return buffer.getvalue()


def _pooled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as views of one storage for each dtype: a storage costs about 50 compressed bytes."""
    pooled: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        members = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor.dtype == dtype}
        pool = torch.cat([tensor.reshape(-1) for tensor in members.values()])
        parts = pool.split([tensor.numel() for tensor in members.values()])
        pooled |= {name: part.view(members[name].shape) for name, part in zip(members, parts, strict=True)}
    return {name: pooled[name] for name in tensors}


def _checked(content: object) -> QuantizedModel:
    parts = [content.get(key) for key in ("w", "m")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ArtifactError('it lacks the dictionaries "w" and "m"')
    quantized = QuantizedModel(*parts)
    _check(quantized)
    return quantized


def _check(quantized: QuantizedModel) -> None:
    """Raise FileError for tensors that do not fit what their marks say: missing, of other dtypes, out of range."""
    foreign = set(quantized.tensors)
    for name, how in quantized.meta.items():
        mark = MARK.fullmatch(how) if isinstance(name, str) and isinstance(how, str) else None
        if mark is None and (how != PASSTHROUGH or not isinstance(name, str)):
            raise ArtifactError(f"it lists {name!r} as {how!r}, which is unknown")
        keys: tuple[str, ...] = (name,)
        if mark is not None:
            correction = {"+lqer": SYMMETRIC_KEYS, "+lqer_asym": ASYMMETRIC_KEYS, None: ()}[mark[2]]
            keys = tuple(name + key for key in (CODES, SCALE, *correction))
        for key in keys:
            if key not in foreign:
                raise ArtifactError(f"it lists {name} as {how!r} and lacks the tensor {key}")
        foreign -= set(keys)
        if mark is None:
            check_tensor(name, quantized.tensors[name], None, torch.float16)
        else:
            _check_matrix(keys, quantized.tensors, int(mark[1]), mark[2] == "+lqer_asym")
    if foreign:
        raise ArtifactError(f"it does not list {min(map(str, foreign))}")


def _check_matrix(keys: tuple[str, ...], tensors: Mapping[str, Tensor], bits: int, asymmetric: bool) -> None:
    """Raise FileError for codes, scales and factors of a matrix that do not fit together."""
    reach = largest_code(bits)
    ends = (-reach, reach), *(((-2, 1), (-8, 7)) if asymmetric else ((-127, 127),) * 2)
    codes = [_check_codes(key, tensors[key], *end) for key, end in zip(keys[::2], ends, strict=False)]
    scales = [check_tensor(key, tensors[key], None, torch.float16).shape for key in keys[1::2]]
    (rows, columns), fits = codes[0], scales[0] == codes[0][:1]
    if len(codes) > 1:
        rank = codes[1][1]
        fits = fits and codes[1:] == [(rows, rank), (rank, columns)] and rank <= MAX_RANK
        if asymmetric:
            fits = fits and scales[1] == () and len(scales[2]) == 1 and rank * columns % (scales[2][0] or 1e9) == 0
        else:
            fits = fits and scales[1:] == [(rows,), (rank,)]
    if not fits:
        shapes = ", ".join(f"{key} {list(tensors[key].shape)}" for key in keys)
        raise ArtifactError(f"its shapes do not fit together: {shapes}")


def _check_codes(key: str, codes: Tensor, low: int, high: int) -> tuple[int, ...]:
    """Shape of a matrix of codes. Raises FileError for one that is none, or has a code outside ``low`` to ``high``."""
    check_tensor(key, codes, None, torch.int8)
    if codes.ndim != 2 or not codes.numel() or codes.min() < low or codes.max() > high:
        raise ArtifactError(f"{key} is no matrix of codes from {low} to {high}")
    return tuple(codes.shape)


def byte_shuffle(data: bytes) -> bytes:
    """``data`` with the bytes at even places first, then those at odd ones, behind a header of five bytes.

    The two halves of 16-bit numbers are each more alike than the numbers, so an entropy coder does better on them.
    """
    array = np.frombuffer(data, np.uint8)
    planes = [array[plane::SHUFFLE_STRIDE] for plane in range(SHUFFLE_STRIDE)]
    return SHUFFLE_MAGIC + bytes([SHUFFLE_STRIDE]) + np.concatenate(planes).tobytes()


def byte_unshuffle(data: bytes) -> bytes:
    """The inverse of `byte_shuffle` for any stride; data without its header is returned as it is.

    Raises ArtifactError for a stride of 0 or a header without one.
    """
    if not data.startswith(SHUFFLE_MAGIC):
        return data
    stride = data[len(SHUFFLE_MAGIC)] if len(data) > len(SHUFFLE_MAGIC) else 0
    if stride == 0:
        raise ArtifactError("its byte shuffle has no stride")
    shuffled = np.frombuffer(data, np.uint8, offset=len(SHUFFLE_MAGIC) + 1)
    restored, start = np.empty_like(shuffled), 0
    for plane in range(stride):
        places = restored[plane::stride]
        places[:] = shuffled[start : start + places.size]
        start += places.size
    return restored.tobytes()


def _compress(data: bytes, compressor: str) -> bytes:
    if compressor == "brotli":
        return _brotli().compress(data, quality=BROTLI_QUALITY, lgwin=BROTLI_WINDOW)
    if compressor == "lzma":
        return lzma.compress(data, preset=XZ_PRESET)
    raise ArtifactError(f"compressor must be brotli or lzma, got {compressor!r}")


def _most_bytes(blob: bytes) -> int:
    """Bytes that a compressed file of this length may hold."""
    return MOST_EXPANSION * max(CAP_BYTES, len(blob))


def _decompress(blob: bytes) -> bytes:
    most = _most_bytes(blob)
    try:
        if blob.startswith(XZ_MAGIC):
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
            data = decoder.decompress(blob, max_length=most)
            whole = decoder.eof and not decoder.unused_data
        else:  # brotli data has no magic: what is not xz is taken for it
            decoder = _brotli().Decompressor()
            data = decoder.process(blob, output_buffer_limit=most)
            whole = decoder.is_finished()
    except ImportError:
        raise
    except Exception as error:  # each library has an exception of its own
        raise ArtifactError(f"it is neither xz nor brotli data ({error})") from error
    if not whole:
        raise ArtifactError(f"it ends too early, is followed by other data, or holds more than {most:,} bytes")
    return data


def _brotli():
    try:
        import brotli

        if tuple(map(int, brotli.__version__.split(".")[:2])) < (1, 2):
            raise ImportError("an older one cannot bound what it decompresses")
    except ImportError as error:
        advice = "`pip install 'brotli>=1.2'`, or set compressor=lzma to write without it"
        raise ImportError(f"the artifact needs the package brotli: {advice}") from error
    return brotli
