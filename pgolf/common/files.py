"""Files that are written atomically, and read with errors that name them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


class FileError(ValueError):
    """A file cannot be read or written, or its content is damaged. The message names the file."""


def write_aside(path: str | os.PathLike, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: write a temporary file in the same folder, then rename it to ``path``.

    If writing fails, the temporary file is removed and ``path`` is unchanged.

    Args:
        content: bytes, text to encode as UTF-8, or a function that writes to the open file.

    Raises FileError if the operating system refuses, for example because the disk is full.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):
            raise FileError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` that processes killed in `write_aside` have left.

    The caller must ensure that no other process is writing the file.
    """
    for aside in (*path.parent.glob(f".{path.name}.*"), path.with_name(path.name + ".partial")):
        if aside.suffix[1:].isdecimal() or aside.suffix == ".partial":
            aside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileError if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is no JSON object ({error})") from error
