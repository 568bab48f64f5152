"""The program that is shipped and counted: the whole package as one executable file, ``train_gpt.py``.

The file is a zip archive that Python runs (PEP 441, as the standard library's zipapp makes them): a small ``__main__``
and the sources of ``pgolf`` and its kernels, without comments and docstrings, as xz. When it is run it writes them to a
folder under the temporary folder (Triton reads a kernel's source from its file, so they cannot be run from memory) and
calls the command line. The same sources give the same bytes, and the program exports itself unchanged.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import io
import json
import lzma
import os
import re
import zipfile
from pathlib import Path

import pgolf
from pgolf.config import RunConfig

EXCLUDED = {
    "corpus.py": "reads documents, from which data sets are built",
    "fineweb.py": "downloads the published shards, which the shipped program must not do",
    "report.py": "writes the report's page; the program prints the table of results",
    "report_plots.py": "draws the report's plots",
    "_dequant_kernels.py": "dequantises in microseconds what the program dequantises a few times",
}
# Settings of one machine or one run folder, which the program does not take along.
LOCAL_SETTINGS = ("preset_name", "run_id", "artifact_dir", "device", "compile", "kernels")
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME, "pb": 0}]  # pb 0 suits text

PROGRAM = '''"""pgolf @VERSION@ in one file: train, quantise and score a language model of at most 16,000,000 bytes.

Without arguments, or with options only, this is `pgolf run`; `python train_gpt.py run --help` shows them. The member
package.xz holds the sources (JSON); running the file writes them to the folder that `unpack` names, to be read there.
"""
import hashlib
import json
import lzma
import os
import sys
import tempfile
import zipfile
from pathlib import Path

SETTINGS = @SETTINGS@


def unpack():
    with zipfile.ZipFile(Path(__file__).parent) as program:
        package = program.read("package.xz")
    content = hashlib.sha256(package).hexdigest()[:16]
    root = Path(tempfile.gettempdir(), f"pgolf-{os.getuid()}-{content}")
    root.mkdir(mode=0o700, exist_ok=True)
    if root.lstat().st_uid != os.getuid():
        sys.exit(f"{root} belongs to another user: delete it, or set TMPDIR to a folder of your own")
    for name, text in json.loads(lzma.decompress(package)).items():
        target, source = root / name, text.encode()
        if not target.is_file() or target.read_bytes() != source:
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f"{target.name}.{os.getpid()}")  # other processes may be at it
            aside.write_bytes(source)
            os.replace(aside, target)
    return root


def main():
    if sys.version_info < (3, 11):
        sys.exit("this program needs Python 3.11 or newer")
    sys.path.insert(0, str(unpack()))
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--preset" for argument in arguments):
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
    if not arguments or arguments[0].startswith("-"):
        arguments = ["run", *arguments]
    from pgolf.cli import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(main())
'''


class ExportError(ValueError):
    """A source file that cannot be exported."""


def export_program(path: str | os.PathLike, config: RunConfig | None = None) -> int:
    """Write the package as one program and return its bytes, which count against the cap.

    Args:
        path: the file, usually ``train_gpt.py``; written aside and renamed.
        config: settings the program runs with unless its own environment, ``--set`` or ``--preset`` says otherwise;
            None: the defaults.

    Raises ExportError naming a source file that cannot be exported.
    """
    files = json.dumps(package_sources(), ensure_ascii=False, separators=(",", ":"))
    packed = lzma.compress(files.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=XZ_FILTERS)
    main = PROGRAM.replace("@VERSION@", pgolf.__version__).replace("@SETTINGS@", repr(_settings(config)))
    program = _executable_zip({"__main__.py": main.encode(), "package.xz": packed})
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(program)
    os.replace(aside, path)
    return len(program)


def _executable_zip(members: dict[str, bytes]) -> bytes:
    """A zip archive that `python FILE` runs, the same bytes for the same members."""
    archive = io.BytesIO()
    archive.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, content in members.items():
            kind = zipfile.ZIP_STORED if name.endswith(".xz") else zipfile.ZIP_DEFLATED
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            file.writestr(member, content, compress_type=kind)
    return archive.getvalue()


def package_sources() -> dict[str, str]:
    """The files of the exported package by their path in it, Python without comments and docstrings, sorted."""
    package = Path(pgolf.__file__).parent
    # A checkout has the kernels beside the package, a wheel inside it.
    kernels = Path(importlib.import_module("pgolf.kernels").__path__[0])
    sources = {f"pgolf/{file.name}": file for file in package.glob("*.py") if file.name not in EXCLUDED}
    for pattern in ("*.py", "tuned/*.json"):
        files = (file for file in kernels.glob(pattern) if file.name not in EXCLUDED)
        sources |= {f"pgolf/kernels/{file.relative_to(kernels)}": file for file in files}
    return {name: _exported(sources[name]) for name in sorted(sources)}


def strip_source(source: str, annotations: bool = True) -> str:
    """Python ``source`` without comments, docstrings and the settings' help, laid out afresh; it does the same.

    ``annotations=False`` also leaves out those of functions and their variables, which nothing looks at when the
    package runs, but for the constexpr of Triton's.
    Raises ExportError when Python cannot write the program out so that it reads the same again.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body.append(ast.Pass())
    tree = _WithoutHelp().visit(tree)
    if not annotations:
        tree = ast.fix_missing_locations(_WithoutAnnotations().visit(tree))
    # One space a level instead of four; a line inside a string would change with it and is caught below.
    stripped = re.sub(r"^(?: {4})+", lambda margin: " " * (len(margin[0]) // 4), ast.unparse(tree), flags=re.MULTILINE)
    if ast.dump(ast.parse(stripped)) != ast.dump(tree):
        raise ExportError("the program reads differently when it is written out again")
    return stripped


class _WithoutHelp(ast.NodeTransformer):
    """Empties the help text of settings, which is a docstring in all but name."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "_field":
            node.args[1] = ast.Constant("")
        return node


class _WithoutAnnotations(ast.NodeTransformer):
    """Drops annotations in functions; those of classes stay, as dataclasses and named tuples are made of them."""

    in_function = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._inside(node, True)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._inside(node, False)

    @staticmethod
    def _constant(node: ast.arg | ast.AnnAssign) -> bool:
        return isinstance(node.annotation, ast.Attribute) and node.annotation.attr == "constexpr"

    def _inside(self, node: ast.AST, in_function: bool) -> ast.AST:
        outside, self.in_function = self.in_function, in_function
        node = self.generic_visit(node)
        self.in_function = outside
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        if not self._constant(node):
            node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if not self.in_function or self._constant(node):
            return node
        if node.value is None:
            return ast.Pass()
        return ast.Assign(targets=[node.target], value=node.value)


def _exported(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text
    try:
        return strip_source(text, annotations=False)
    except (SyntaxError, ExportError) as error:
        raise ExportError(f"{file} cannot be exported: {error}") from error


def _settings(config: RunConfig | None) -> dict[str, str]:
    """The settings that differ from the defaults, as environment variables."""
    if config is None:
        return {}
    defaults, chosen = (dataclasses.asdict(settings) for settings in (RunConfig(), config))
    return {
        name.upper(): str(value)
        for name, value in chosen.items()
        if value != defaults[name] and name not in LOCAL_SETTINGS
    }
