"""Which code a result is of: git's hashes of the folders whose code is measured, computed from what is on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREES = ("kernels", "pgolf")


def tree_hash(folder: Path) -> str:
    """Compute git's hash of a folder, as it is on disk: of every file and symbolic link but caches."""
    return _tree(folder).hex()


def _tree(folder: Path) -> bytes:
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.name.startswith(".") or path.suffix == ".pyc":
            continue
        if path.is_symlink():
            entries.append((path.name, b"120000", _object(b"blob", os.fsencode(os.readlink(path)))))
        elif path.is_dir():
            if any(file.is_file() and "__pycache__" not in file.parts for file in path.rglob("*")):
                entries.append((path.name + "/", b"40000", _tree(path)))
        else:
            mode = b"100755" if path.stat().st_mode & 0o100 else b"100644"
            entries.append((path.name, mode, _object(b"blob", path.read_bytes())))
    entries.sort(key=lambda entry: os.fsencode(entry[0]))  # git sorts folders as if their names ended in a slash
    body = b"".join(mode + b" " + os.fsencode(name.rstrip("/")) + b"\0" + digest for name, mode, digest in entries)
    return _object(b"tree", body)


def _object(kind: bytes, body: bytes) -> bytes:
    return hashlib.sha1(b"%s %d\0%s" % (kind, len(body), body)).digest()


def tree_hashes(root: Path = ROOT) -> dict[str, str]:
    """Compute the hashes of `TREES`."""
    return {name: tree_hash(root / name) for name in TREES}
