"""The artifact's file: writing and reading a quantised model, in the format that the file's ending names.

.pgolf        entropy-coded, for every model (`packed_format`)
.int6.ptz     that of parameter-golf PR #1874, for models that `gptq` has quantised (`public_format`)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pgolf.artifact import packed_format, public_format
from pgolf.artifact.public_format import CAP_BYTES
from pgolf.artifact.quantized import (
    ASYMMETRIC_KEYS,
    CODES,
    COLUMN_STEP,
    GPTQ,
    GROUP_COLUMNS,
    PASSTHROUGH,
    ROW_STEP,
    SCALE,
    SYMMETRIC_KEYS,
    TRELLIS,
    ArtifactError,
    QuantizedModel,
    fine_groups,
    largest_code,
)
from pgolf.common.files import FileError, write_aside
from pgolf.common.tensors import check_tensor
from pgolf.kernels.dequant import MAX_RANK

COMPRESSOR = "brotli"  # of the public format
MOST_EXPONENT = 512  # of steps, in sixteenths: 2^32
PACKED, PUBLIC = ".pgolf", ".int6.ptz"

__all__ = ["CAP_BYTES", "ArtifactError", "content", "load", "save"]


def save(path: str | os.PathLike, quantized: QuantizedModel, compressor: str = COMPRESSOR) -> int:
    """Write the artifact atomically and return its size in bytes; see `content` for its formats and errors."""
    blob = content(path, quantized, compressor)
    write_aside(path, blob)
    return len(blob)


def content(path: str | os.PathLike, quantized: QuantizedModel, compressor: str = COMPRESSOR) -> bytes:
    """Return what the artifact ``path`` would hold, in the format of its ending.

    Args:
        compressor: of the public format, ``brotli`` or ``lzma``.

    Raises ArtifactError for another ending, a model that the format cannot hold, and one that `load` would refuse.
    """
    quantized = QuantizedModel(public_format.pooled(quantized.tensors), quantized.meta)
    _check(quantized)
    if str(path).endswith(PACKED):
        return packed_format.pack(quantized)
    if not str(path).endswith(PUBLIC):
        raise ArtifactError(f"an artifact ends in {PACKED} or {PUBLIC}, which says its format, and not as {path}")
    if any(TRELLIS.fullmatch(how) for how in quantized.meta.values()):
        raise ArtifactError(f"{path}: the format {PUBLIC} has no place for codes on a trellis; write a {PACKED} file")
    return public_format.serialize(quantized, compressor)


def load(path: str | os.PathLike) -> QuantizedModel:
    """Read an artifact of any format. No code in it is run.

    Whatever it claims, memory is bounded: by the limits of `packed_format`, or by what `public_format.deserialize`
    decompresses at most.

    Raises ArtifactError, naming the file and the tensor, if the file is cut short, damaged or no artifact;
    FileNotFoundError if there is none; ImportError if it needs brotli and that is not installed.
    """
    path = Path(path)
    blob = path.read_bytes()
    try:
        packed = blob.startswith(packed_format.MAGIC[:-1])
        quantized = packed_format.unpack(blob) if packed else public_format.deserialize(blob)
        _check(quantized)
        return quantized
    except FileError as error:
        raise ArtifactError(
            f"{path} ({len(blob):,} bytes) is no artifact, or is cut short or damaged: {error}. "
            "Copy it again, or write it again with `pgolf quantize`"
        ) from error


def _check(quantized: QuantizedModel) -> None:
    """Raise FileError if tensors disagree with the meta strings: missing, unlisted, of another dtype, out of range."""
    unlisted = set(quantized.tensors)
    for name, how in quantized.meta.items():
        keys = (name, *_keys(name, how))
        keys = keys[1:] or keys
        for key in keys:
            if key not in unlisted:
                raise ArtifactError(f"it lists {name} as {how!r} and lacks the tensor {key}")
        unlisted -= set(keys)
        if mark := GPTQ.fullmatch(how):
            _check_matrix(keys, quantized.tensors, int(mark[1]), fine_groups(mark), mark[3] == "+lqer_asym")
        elif how == PASSTHROUGH:
            check_tensor(name, quantized.tensors[name], None, torch.float16)
        else:
            _check_trellis(keys, quantized.tensors)
    if unlisted:
        raise ArtifactError(f"it does not list {min(map(str, unlisted))}")


def _keys(name: object, how: object) -> tuple[str, ...]:
    """Return the entries of a tensor that is no entry by itself. Raises ArtifactError for an unknown meta string."""
    if isinstance(name, str) and isinstance(how, str):
        if mark := GPTQ.fullmatch(how):
            correction = {"+lqer": SYMMETRIC_KEYS, "+lqer_asym": ASYMMETRIC_KEYS, None: ()}[mark[3]]
            return tuple(name + key for key in (CODES, SCALE, *correction))
        if TRELLIS.fullmatch(how):
            return tuple(name + key for key in (CODES, ROW_STEP, COLUMN_STEP))
        if how == PASSTHROUGH:
            return ()
    raise ArtifactError(f"it lists {name!r} as {how!r}, which is unknown")


def _check_trellis(keys: tuple[str, ...], tensors: Mapping[str, Tensor]) -> None:
    """Raise FileError if codes on a trellis and the exponents of their steps do not fit together."""
    codes, rows, columns = (check_tensor(key, tensors[key], None, torch.int16) for key in keys)
    if codes.ndim != 2 or not codes.numel() or (rows.shape, columns.shape) != (codes.shape[:1], codes.shape[1:]):
        raise ArtifactError(
            f"its shapes do not fit together: {', '.join(f'{k} {list(tensors[k].shape)}' for k in keys)}"
        )
    for key, exponents in zip(keys[1:], (rows, columns), strict=True):
        if exponents.abs().max() > MOST_EXPONENT:
            raise ArtifactError(f"{key} has exponents beyond {MOST_EXPONENT}")


def _check_matrix(
    keys: tuple[str, ...], tensors: Mapping[str, Tensor], bits: int, fine: list[int], asymmetric: bool
) -> None:
    """Raise FileError if the codes, scales and factors of a matrix do not fit together."""
    reach = largest_code(8 if fine else bits)
    ends = (-reach, reach), *(((-2, 1), (-8, 7)) if asymmetric else ((-127, 127),) * 2)
    codes = [_check_codes(key, tensors[key], *end) for key, end in zip(keys[::2], ends, strict=False)]
    scales = [check_tensor(key, tensors[key], None, torch.float16).shape for key in keys[1::2]]
    (rows, columns), fits = codes[0], scales[0] == codes[0][:1]
    if fine:
        groups = range(columns // GROUP_COLUMNS)
        if columns % GROUP_COLUMNS or fine != sorted(set(fine).intersection(groups)):
            raise ArtifactError(f"{keys[0]} has {columns} columns and no groups {fine} of {GROUP_COLUMNS}")
        others = tensors[keys[0]].unflatten(1, (-1, GROUP_COLUMNS))[:, [g for g in groups if g not in fine]]
        if others.numel():
            _check_codes(keys[0], others.flatten(1), -largest_code(bits), largest_code(bits))
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
