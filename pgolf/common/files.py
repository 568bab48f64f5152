"""Files: written whole or not at all, and read with errors that name them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


class FileError(ValueError):
    """A file that cannot be read or written, or whose content is damaged. The message names the file."""


def write_aside(path: str | os.PathLike, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: aside first, then renamed. A file that cannot be finished is removed.

    content: the bytes, text for UTF-8, or a function that writes into the open file.
    Raises FileError where the system refuses, as a full disk or a read-only folder does.
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
    """Remove what processes that were killed in `write_aside` have left beside ``path``.

    The caller makes sure that no other process is writing that file.
    """
    for aside in (*path.parent.glob(f".{path.name}.*"), path.with_name(path.name + ".partial")):
        if aside.suffix[1:].isdecimal() or aside.suffix == ".partial":
            aside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileError where there is none, and for a file that holds something else."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is no JSON object ({error})") from error
