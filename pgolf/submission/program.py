"""The first code of an exported program, its ``__main__``: unpack the package, then call the command line.

`pgolf.submission.export` describes the program's file. The package is unpacked to disk because Triton and tracebacks
read sources from files and worker processes import them. Its folder comes first on Python's search path for modules, so
nobody else may write there, and it may hold nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import io
import json
import os
import stat
import sys
import tempfile
import zipfile
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_program() -> tuple[dict[str, str], bytes]:
    """Return the settings in the program's file and the archive behind them.

    Exits with a message if the archive differs from its digest.
    """
    _, settings, digest, archive = Path(__file__).parent.read_bytes().split(b"\n", 3)
    if hashlib.sha256(archive).hexdigest().encode() != digest:
        sys.exit("this program's file is damaged: take another copy of it")
    return json.loads(settings), archive


def unpack(archive: bytes, files: dict[str, str]) -> Path:
    """Write the package's files, and the archive as ``program``, where they are missing or changed.

    Processes that start at the same time wait for each other.

    Args:
        archive: the archive; a prefix of its SHA-256 digest names the folder.
        files: contents by path relative to the folder.

    Returns the folder, ``pgolf-<user id>-<digest>`` in the temporary directory. Exits with a message if the folder
    belongs to somebody else, is open to others, or holds a file that is not the program's.
    """
    root = Path(tempfile.gettempdir(), f"pgolf-{os.getuid()}-{hashlib.sha256(archive).hexdigest()[:16]}")
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    found = root.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        sys.exit(f"{root} is no folder of yours alone: delete it, or set TMPDIR to a folder of your own")
    contents = {root / "program": archive} | {root / name: text.encode() for name, text in files.items()}
    expected = {*contents, *(folder for path in contents for folder in path.parents)}
    lock = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path, content in contents.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for path in root.rglob("*"):
            if path not in expected and "__pycache__" not in (path.name, path.parent.name):
                sys.exit(f"{path} is not of this program: delete {root}")
    finally:
        os.close(lock)
    return root


def main() -> int:
    """Unpack the package and call its command line; without a command, ``run`` with the program's settings."""
    settings, archive = read_program()
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        package = json.loads(file.read("package.json"))
    if sys.version_info[:2] < tuple(package["python"]):
        sys.exit(f"this program needs Python {'.'.join(map(str, package['python']))} or newer")
    sys.path.insert(0, str(unpack(archive, package["files"])))
    # The import hook of an installed pgolf would supply the modules that are missing here.
    modules: MutableMapping[str, Any] = sys.modules
    modules.update(dict.fromkeys(package["absent"]))
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--preset" for argument in arguments):
        for name, value in settings.items():
            os.environ.setdefault(name, value)
    if not arguments or arguments[0].startswith("-"):
        arguments = ["run", *arguments]
    return importlib.import_module(package["entry"]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
