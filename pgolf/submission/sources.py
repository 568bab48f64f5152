"""What an exported program holds: the package's modules without comments, docstrings and annotations of functions."""

from __future__ import annotations

import ast
import importlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pgolf
from pgolf.submission import program

ENTRY = "pgolf.cli"  # the module whose `main` the program calls
# Files, and folders with a slash, that the program does without, by their path in the package.
EXCLUDED = {
    "data/corpus.py": "reads documents, from which data sets are built",
    "data/dataset.py": "builds data sets",
    "data/fineweb.py": "downloads the published shards, which the shipped program must not do",
    "data/commands.py": "the commands for all of that",
    "artifact/inspection.py": "shows what is in an artifact",
    "artifact/convert.py": "writes artifacts in other formats",
    "audit/": "audits a run from outside",
    "report/page.py": "writes the report's page; the program prints the table of results",
    "report/plots.py": "draws the report's plots",
    "report/seeds.py": "writes the texts of a submission",
    "optim.py": "steps other models; training has an optimizer of its own, for banks",
    "pack.py": "makes a submission of finished runs",
    "submission/sources.py": "collects the sources; the program exports its own archive as it is",
    "submission/program.py": "is the program's __main__ instead",
    "kernels/common/interpreter.py": "mends Triton's interpreter, for tests and debugging on a CPU",
    "kernels/dequant/triton.py": "dequantises in microseconds what the program dequantises a few times",
    "kernels/tuned/h200.json": "launch parameters of a chip that can take the H100's",
}


def package_files() -> dict[str, Path]:
    """Return the package's modules and tables of launch parameters by their path in it, sorted."""
    package = Path(pgolf.__file__).parent
    # A checkout has the kernels beside the package, a wheel inside it.
    kernels = Path(importlib.import_module("pgolf.kernels").__path__[0])
    files = {f"pgolf/{file.relative_to(package)}": file for file in package.rglob("*.py")}
    for pattern in ("**/*.py", "tuned/*.json"):
        files |= {f"pgolf/kernels/{file.relative_to(kernels)}": file for file in kernels.glob(pattern)}
    return dict(sorted(files.items()))


def package_sources() -> dict[str, str]:
    """Return the contents of the program's files by their path in the package. Modules are `stripped`."""
    files = {name: file for name, file in package_files().items() if not _excluded(name)}
    texts = {name: file.read_text("utf-8") for name, file in files.items()}
    return {name: stripped(text, name) if name.endswith(".py") else text for name, text in texts.items()}


def absent_modules() -> list[str]:
    """Return the names of the modules that the program lacks."""
    absent = [name for name in package_files() if _excluded(name) and name.endswith(".py")]
    return [name.removesuffix(".py").replace("/", ".") for name in absent]


def stripped(source: str, name: str = "<source>") -> str:
    """Return a module's source without comments, docstrings and the annotations of functions.

    Annotations of classes stay because they define the fields of dataclasses and named tuples. ``tl.constexpr`` and
    ``gl.constexpr`` stay because Triton reads them.

    Raises SyntaxError, which names the module ``name``.
    """
    tree = ast.parse(source, name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            node.body = node.body[documented:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg) and getattr(node.annotation, "attr", "") != "constexpr":
            node.annotation = None
    return ast.unparse(tree)


def packed_package() -> bytes:
    """Return the program's archive: ``__main__.py``, and all that it unpacks as ``package.json``.

    The same sources and the same version of Python give the same bytes. ``__main__.py`` is not `stripped`, so that
    older versions can read it and ask for a newer one.
    """
    package = {
        "python": sys.version_info[:2],  # older versions may not read what `ast.unparse` writes
        "entry": ENTRY,
        "absent": absent_modules(),
        "files": package_sources(),
    }
    main = Path(program.__file__).read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # an entry without a date has the year 1980
        file.writestr(zipfile.ZipInfo("__main__.py"), main, zipfile.ZIP_DEFLATED)
        file.writestr(zipfile.ZipInfo("package.json"), json.dumps(package), zipfile.ZIP_LZMA)
    return archive.getvalue()


def _excluded(name: str) -> bool:
    path = name.removeprefix("pgolf/")
    return any(path == left_out or left_out.endswith("/") and path.startswith(left_out) for left_out in EXCLUDED)
