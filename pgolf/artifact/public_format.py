"""The artifact's file in the format of parameter-golf PR #1874, ``.int6.ptz``.

    torch.save of {"w": tensors by entry name, "m": how each was made}
    → byte shuffle: b"BSHF", one byte with the stride 2, then the bytes at even places, then those at odd ones
    → brotli (quality 11) or xz (preset 6)

A code takes one byte; the entropy coder packs it. The same tensors give the same bytes.
"""

from __future__ import annotations

import io
import lzma
import sys
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact.quantized import (
    ArtifactError,
    QuantizedModel,
)
from pgolf.common.tensors import read_tensors

CAP_BYTES = 16_000_000  # of the challenge, for code and compressed weights together
MOST_EXPANSION = 8  # decompressed bytes for each compressed one: a code is one byte, and takes at least a bit
XZ_MEMORY = 1 << 27  # bytes; a decoder of the largest preset takes half of it
SHUFFLE_MAGIC = b"BSHF"
SHUFFLE_STRIDE = 2
BROTLI_QUALITY, BROTLI_WINDOW = 11, 24
XZ_MAGIC, XZ_PRESET = b"\xfd7zXZ\x00", 6
ZIP_MAGIC = b"PK"  # torch.save writes a zip archive


def serialize(quantized: QuantizedModel, compressor: str = "brotli") -> bytes:
    """Return the file's content for a checked model of `pooled` tensors.

    Brotli takes about a minute for the record model. Raises ArtifactError if ``compressor`` is neither ``brotli`` nor
    ``lzma``, or there is too much to store; ImportError if brotli is not installed.
    """
    data = byte_shuffle(_serialize(quantized))
    blob = _compress(data, compressor)
    if len(data) >= _most_bytes(blob):
        raise ArtifactError(f"{len(data):,} bytes are too many for an artifact")
    return blob


def deserialize(blob: bytes) -> QuantizedModel:
    """Return the model of a file's content, whichever compressor wrote it, not yet checked. No code in it is run.

    Decompresses at most MOST_EXPANSION bytes for each byte of the file, or of the cap if that is more.
    Raises ArtifactError if it is cut short, damaged or no such file; ImportError if it needs brotli and has none.
    """
    archive = byte_unshuffle(_decompress(blob))
    if not archive.startswith(ZIP_MAGIC):
        raise ArtifactError("it was not written by torch.save")
    content = read_tensors(io.BytesIO(archive), len(archive))
    parts = [content.get(key) for key in ("w", "m")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ArtifactError('it lacks the dictionaries "w" and "m"')
    return QuantizedModel(*parts)


def _serialize(quantized: QuantizedModel) -> bytes:
    # Pickle writes a string object that it has written before as a reference. Interning makes equal strings one object,
    # so that the bytes depend on the content only.
    tensors = {sys.intern(name): tensor for name, tensor in quantized.tensors.items()}
    meta = {sys.intern(name): sys.intern(how) for name, how in quantized.meta.items()}
    buffer = io.BytesIO()
    torch.save({"w": tensors, "m": meta}, buffer)
    return buffer.getvalue()


def pooled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors into one storage for each dtype, because each storage costs about 50 compressed bytes."""
    pooled: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        members = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor.dtype == dtype}
        pool = torch.cat([tensor.reshape(-1) for tensor in members.values()])
        parts = pool.split([tensor.numel() for tensor in members.values()])
        pooled |= {name: part.view(members[name].shape) for name, part in zip(members, parts, strict=True)}
    return {name: pooled[name] for name in tensors}


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
