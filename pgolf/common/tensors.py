"""Tensors in files, checked when they are read and written, and on their way to a device."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pgolf.common.files import FileError, write_aside
from pgolf.common.runtime import World


class TensorFileError(FileError):
    """A file of tensors that cannot be read, or that belongs to other settings."""


class DivergedError(RuntimeError):
    """Training produced a number that is not finite."""


def diverged(what: str) -> DivergedError:
    """Return the error for a number that is not finite; ``what`` names the number and the step."""
    return DivergedError(
        f"training has diverged: {what}. A checkpoint from before stays as it is; start anew with lower learning rates "
        "(matrix_lr, scalar_lr, tied_embed_lr)"
    )


def save_tensors(path: Path, payload: dict[str, Any] | None, world: World) -> None:
    """Write rank 0's ``payload`` with torch.save; call it on every rank.

    An entry ``step`` is the training step that the numbers are of, which the message of DivergedError names.

    The file is written atomically. Raises, on every rank, DivergedError for numbers that are not finite and FileError
    if the file cannot be written; the earlier file is then unchanged.
    """

    def save() -> None:
        assert payload is not None  # on rank 0
        if name := not_finite(payload):
            when = f" after step {payload['step']}" if "step" in payload else ""
            raise diverged(f"{name} has numbers that are not finite{when}")
        write_aside(path, lambda file: torch.save(payload, file))

    world.on_main(save)


def load_tensors(path: Path) -> dict:
    """Read a dictionary of tensors onto the CPU. No code in the file is run.

    Raises TensorFileError, naming the damaged tensor, or if the file holds no dictionary.
    """
    try:
        with path.open("rb") as file:
            content = read_tensors(file, path.stat().st_size)
        if not isinstance(content, dict):
            raise FileError(f"it holds a {type(content).__name__}")
        return content
    except (FileError, OSError) as error:
        raise TensorFileError(f"{path} cannot be read: {error}. Delete it and run again") from error


def read_tensors(file: BinaryIO, length: int) -> Any:
    """Read an open file of ``length`` bytes that torch.save wrote, onto the CPU. No code in the file is run.

    Verifies the CRC-32 of every member of the archive, which torch.load does not. Gives torch.load a new archive of the
    verified members, because its reader interprets headers differently from zipfile, and returns uninitialised memory
    for a member that is marked as a folder. Takes at most twice the file's length in memory.
    Raises FileError, naming the damaged tensor.
    """
    try:
        verified = io.BytesIO()
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(verified, "w") as copy:
            parts = archive.infolist()
            odd = len(set(archive.namelist())) < len(parts) or sum(part.file_size for part in parts) > length
            if odd or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise FileError("it was not written by torch.save")
            for part in parts:
                try:
                    copy.writestr(part.filename, archive.read(part))
                except zipfile.BadZipFile as error:
                    damaged = _tensor_in(archive, part.filename)
                    raise FileError(f"{damaged} does not have its checksum (CRC-32)") from error
        verified.seek(0)
        return torch.load(verified, map_location="cpu", weights_only=True)
    except FileError:
        raise
    except Exception as error:  # a damaged archive or pickle makes its parser raise almost anything
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise FileError(f"it was not written by torch.save, or is cut short ({reason})") from error


def _tensor_in(archive: zipfile.ZipFile, member: str) -> str:
    """Describe an archive's member by the tensor that it holds, or by the first of several."""
    folder, _, key = member.rpartition("data/")
    strings: list[str] = []
    memo: dict[Any, str] = {}
    with suppress(Exception):  # the pickle may be damaged too
        for code, value, _ in pickletools.genops(archive.read(folder + "data.pkl")):
            if "PUT" in code.name:
                memo[value] = strings[-1] if strings else ""
            elif "GET" in code.name or isinstance(value, str):
                strings.append(memo.get(value, "") if "GET" in code.name else str(value))
                # The pickle lists: name, torch._utils._rebuild_tensor_v2, "storage", the storage's class, its number.
                if strings[-1] == key and strings[-3:-2] == ["storage"]:
                    return f"the tensor {strings[-5]} (part {member})"
    return f"its part {member}"


def check_tensors(found: Any, like: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return ``found`` if it has the names and shapes of ``like``, its dtypes (or ``dtype``) and finite numbers only.

    Raises FileError, naming the tensor that is missing, unexpected or different.
    """
    if not isinstance(found, dict):
        raise FileError(f"it holds a {type(found).__name__} in place of tensors by name")
    if found.keys() != like.keys():
        missing, foreign = sorted(like.keys() - found.keys()), sorted(map(str, found.keys() - like.keys()))
        shown = f"it lacks {', '.join(missing) or 'nothing'} and has {', '.join(foreign) or 'nothing'} besides"
        raise FileError(f"it belongs to another model: {shown}")
    for name, expected in like.items():
        check_tensor(name, found[name], expected.shape, dtype or expected.dtype)
    return found


def check_tensor(name: str, tensor: Any, shape: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` if it is dense, contiguous, finite, and of this shape (None: any) and dtype.

    Raises FileError, naming the tensor, otherwise.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_contiguous():
        raise FileError(f"{name} is no plain tensor")
    if tensor.dtype != dtype or shape is not None and tensor.shape != shape:
        expected = f"{list(tensor.shape if shape is None else shape)} of {dtype}"
        raise FileError(f"{name} is {list(tensor.shape)} of {tensor.dtype}, expected {expected}")
    if not_finite({name: tensor}):
        raise FileError(f"{name} has numbers that are not finite")
    return tensor


def not_finite(content: Any, path: str = "") -> str:
    """Return the dotted path, in nested dictionaries, of the first floating tensor with a number that is not finite.

    Returns an empty string if all numbers are finite. Waits for the device of the tensors.
    """
    if isinstance(content, Mapping):
        return next(filter(None, (not_finite(value, f"{path}.{key}") for key, value in content.items())), "")
    floating = isinstance(content, Tensor) and content.is_floating_point()
    return path[1:] if floating and not torch.isfinite(content).all() else ""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device`` without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
