"""Documents to train on: from files, and from the text that every Python installation contains."""

from __future__ import annotations

import ast
import hashlib
import html
import importlib
import json
import lzma
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

SHORTEST_DOCUMENT = 200  # characters
# Tests are repetitive, newer Pythons have no lib2to3, and installed packages differ from machine to machine.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


class CorpusError(ValueError):
    """A document file is missing, damaged or of another format."""


def embedded_documents() -> list[str]:
    """Return about 2 MB of English text that is installed with Python, as documents.

    Sources are the docstrings of the standard library (a document for each large class and one for the rest of a
    module), the help topics of pydoc, IDLE's news and help if they are installed, and Python's licence. Documents have
    at least SHORTEST_DOCUMENT characters, are unique, and are ordered by a hash of their text, so that any slice is a
    fair sample. One installation gives the same list every time.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = (_library_documents(library), _help_topics(), _text_files(library))
    # Drop lone surrogates, which a tokenizer cannot encode.
    documents = {text.strip().encode(errors="ignore").decode() for source in sources for text in source}
    return sorted((text for text in documents if len(text) >= SHORTEST_DOCUMENT), key=_order)


def read_documents(path: str | os.PathLike) -> Iterator[str]:
    """Yield the documents of a ``.jsonl``, ``.jsonl.xz`` or ``.jsonl.zst`` file, in order.

    Each line is a JSON object whose ``text`` is one document; blank lines are skipped. Raises CorpusError, naming the
    file and line, for a bad line, a truncated archive, and a ``.zst`` file if zstandard is not installed.
    """
    path = Path(path)
    number = 0
    try:
        for number, line in enumerate(_open_lines(path), start=1):
            if line.strip():
                yield _parse_document(line, path, number)
    except (EOFError, lzma.LZMAError) as error:
        raise CorpusError(f"{path} is a broken or truncated archive after line {number}: {error}") from error


def _parse_document(line: bytes, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
        text = record["text"] if isinstance(record, dict) else None
    except (ValueError, KeyError) as error:
        reason = 'it has no "text"' if isinstance(error, KeyError) else str(error)
        raise CorpusError(f'{path}, line {number}: expected {{"text": ...}}, but {reason}') from None
    if not isinstance(text, str):
        shown = line[:60].decode(errors="replace").strip()
        raise CorpusError(f'{path}, line {number}: expected {{"text": "..."}}, got {shown}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{path}, line {number}: the text is not valid Unicode: {error}") from None
    return text


def _open_lines(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise CorpusError(f"there is no document file {path}")
    if path.name.endswith(".jsonl"):
        return path.open("rb")
    if path.name.endswith(".jsonl.xz"):
        return lzma.open(path)
    if path.name.endswith(".jsonl.zst"):
        return _zstandard_lines(path)
    raise CorpusError(f"{path}: documents come as .jsonl, .jsonl.xz or .jsonl.zst")


def _zstandard_lines(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"reading {path} needs zstandard: pip install 'pgolf[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # for archives written with --long
    frame, rest = None, b""
    with path.open("rb") as file:
        while block := file.read(1 << 17):
            while block:
                frame = frame or decompressor.decompressobj()
                try:
                    lines = (rest + frame.decompress(block)).split(b"\n")
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                rest = lines.pop()
                yield from lines
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    # zstandard's own reader does not report a truncated file.
    if frame is not None:
        raise EOFError("the file ends inside a frame")
    if rest:
        yield rest


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _library_documents(library: Path) -> Iterator[str]:
    for path in sorted(library.rglob("*.py")):
        if EXCLUDED_FOLDERS.intersection(path.relative_to(library).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules contain invalid escape sequences
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # some distributions install templates that are no Python
        yield from _module_documents(tree)


def _module_documents(tree: ast.Module) -> Iterator[str]:
    rest = [ast.get_docstring(tree) or ""]
    for node in tree.body:
        text = _joined(_docstrings(node))
        if isinstance(node, ast.ClassDef) and len(text) >= SHORTEST_DOCUMENT:
            yield text
        else:
            rest.append(text)
    yield _joined(rest)


def _docstrings(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for inner in getattr(node, "body", ()):  # statements only: walking expressions is slow
        yield from _docstrings(inner)


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _help_topics() -> Iterator[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return  # a minimal installation
    yield from topics.values()


def _text_files(library: Path) -> Iterator[str]:
    """Yield Python's licence, IDLE's news (one document for each release) and help, if they are installed."""
    for name in ("LICENSE.txt", "idlelib/NEWS.txt", "idlelib/NEWS2x.txt", "idlelib/HISTORY.txt", "idlelib/help.html"):
        path = library / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if path.suffix == ".html":
                text = html.unescape(re.sub(r"<[^>]+>", "", text))
            yield from re.split(r"\n(?=What's New in)", text)
