"""The artifact's file: the quantised model, serialised and compressed, in the format of parameter-golf PR #1874.

    torch.save of {"w": tensors by entry name, "m": how each was made}
    → byte shuffle: b"BSHF", one byte with the stride 2, then the bytes at even places, then those at odd ones
    → brotli (quality 11) or xz (preset 6)

A code takes one byte; the entropy coder packs it. The same tensors give the same bytes.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

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

CAP_BYTES = 16_000_000  # of the challenge, for code and compressed weights together
MOST_EXPANSION = 8  # decompressed bytes for each compressed one: a code is one byte, and takes at least a bit
XZ_MEMORY = 1 << 27  # bytes; a decoder of the largest preset takes half of it
SHUFFLE_MAGIC = b"BSHF"
SHUFFLE_STRIDE = 2
BROTLI_QUALITY, BROTLI_WINDOW = 11, 24
XZ_MAGIC, XZ_PRESET = b"\xfd7zXZ\x00", 6
ZIP_MAGIC = b"PK"  # torch.save writes a zip archive
MARK = re.compile(r"gptq \(int([2-8])\)(\+lqer(?:_asym)?)?")


class ArtifactError(FileError):
    """A file is no artifact, or an artifact is too large."""


def save(path: str | os.PathLike, quantized: QuantizedModel, compressor: str = "brotli") -> int:
    """Write the artifact atomically and return its size in bytes.

    Brotli takes about a minute for the record model. Raises ArtifactError if ``compressor`` is neither ``brotli`` nor
    ``lzma`` or `load` would refuse the model, and ImportError if brotli is not installed.
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
    """Read an artifact that either compressor wrote. No code in it is run.

    Decompresses at most MOST_EXPANSION bytes for each byte of the file, or of the cap if that is more.
    Raises ArtifactError, naming the file and the tensor, if the file is cut short, damaged or no artifact;
    FileNotFoundError if there is none; ImportError if it needs brotli and that is not installed.
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
    # Pickle writes a string object that it has written before as a reference. Interning makes equal strings one object,
    # so that the bytes depend on the content only.
    tensors = {sys.intern(name): tensor for name, tensor in quantized.tensors.items()}
    meta = {sys.intern(name): sys.intern(how) for name, how in quantized.meta.items()}
    buffer = io.BytesIO()
    torch.save({"w": tensors, "m": meta}, buffer)
    return buffer.getvalue()


def _pooled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors into one storage for each dtype, because each storage costs about 50 compressed bytes."""
    pooled: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        members = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor.dtype == dtype}
        pool = torch.cat([tensor.reshape(-1) for tensor in members.values()])
        parts = pool.split([tensor.numel() for tensor in members.values()])
        pooled |= {name: part.view(members[name].shape) for name, part in zip(members, parts, strict=True)}
    return {name: pooled[name] for name in tensors}


def _checked(content: object) -> QuantizedModel:
    tensors, meta = (content.get(key) for key in ("w", "m")) if isinstance(content, dict) else (None, None)
    if not (isinstance(tensors, dict) and isinstance(meta, dict)):
        raise ArtifactError('it lacks the dictionaries "w" and "m"')
    quantized = QuantizedModel(tensors, meta)
    _check(quantized)
    return quantized


def _check(quantized: QuantizedModel) -> None:
    """Raise FileError if tensors disagree with the meta strings: missing, unlisted, of another dtype, out of range."""
    unlisted = set(quantized.tensors)
    for name, how in quantized.meta.items():
        mark = MARK.fullmatch(how) if isinstance(name, str) and isinstance(how, str) else None
        if mark is None and (how != PASSTHROUGH or not isinstance(name, str)):
            raise ArtifactError(f"it lists {name!r} as {how!r}, which is unknown")
        keys: tuple[str, ...] = (name,)
        if mark is not None:
            correction = {"+lqer": SYMMETRIC_KEYS, "+lqer_asym": ASYMMETRIC_KEYS, None: ()}[mark[2]]
            keys = tuple(name + key for key in (CODES, SCALE, *correction))
        for key in keys:
            if key not in unlisted:
                raise ArtifactError(f"it lists {name} as {how!r} and lacks the tensor {key}")
        unlisted -= set(keys)
        if mark is None:
            check_tensor(name, quantized.tensors[name], None, torch.float16)
        else:
            _check_matrix(keys, quantized.tensors, int(mark[1]), mark[2] == "+lqer_asym")
    if unlisted:
        raise ArtifactError(f"it does not list {min(map(str, unlisted))}")


def _check_matrix(keys: tuple[str, ...], tensors: Mapping[str, Tensor], bits: int, asymmetric: bool) -> None:
    """Raise FileError if the codes, scales and factors of a matrix do not fit together."""
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
    """Return the shape of a matrix of codes from ``low`` to ``high``. Raises FileError for anything else."""
    check_tensor(key, codes, None, torch.int8)
    if codes.ndim != 2 or not codes.numel() or codes.min() < low or codes.max() > high:
        raise ArtifactError(f"{key} is no matrix of codes from {low} to {high}")
    return tuple(codes.shape)


def byte_shuffle(data: bytes) -> bytes:
    """Reorder ``data``: a header of five bytes, the bytes at even places, then those at odd places.

    This separates the two bytes of 16-bit numbers; each half compresses better alone.
    """
    array = np.frombuffer(data, np.uint8)
    planes = [array[plane::SHUFFLE_STRIDE] for plane in range(SHUFFLE_STRIDE)]
    return SHUFFLE_MAGIC + bytes([SHUFFLE_STRIDE]) + np.concatenate(planes).tobytes()


def byte_unshuffle(data: bytes) -> bytes:
    """Invert `byte_shuffle` for any stride; return data without its header unchanged.

    Raises ArtifactError for a stride of 0 or a header without a stride.
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
    """Return the most bytes that a compressed file of this length may hold."""
    return MOST_EXPANSION * max(CAP_BYTES, len(blob))


def _decompress(blob: bytes) -> bytes:
    most = _most_bytes(blob)
    try:
        if blob.startswith(XZ_MAGIC):
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
            data = decoder.decompress(blob, max_length=most)
            whole = decoder.eof and not decoder.unused_data
        else:  # brotli data has no magic
            decoder = _brotli().Decompressor()
            data = decoder.process(blob, output_buffer_limit=most)
            whole = decoder.is_finished()
    except ImportError:
        raise
    except Exception as error:  # each library raises its own
        raise ArtifactError(f"it is neither xz nor brotli data ({error})") from error
    if not whole:
        raise ArtifactError(f"it ends too early, is followed by other data, or holds more than {most:,} bytes")
    return data


def _brotli() -> ModuleType:
    try:
        import brotli

        if tuple(map(int, brotli.__version__.split(".")[:2])) < (1, 2):
            raise ImportError("an older one cannot bound what it decompresses")
    except ImportError as error:
        advice = "`pip install 'brotli>=1.2'`, or set compressor=lzma to write without it"
        raise ImportError(f"the artifact needs the package brotli: {advice}") from error
    return brotli
