"""Which files the exported program holds, and that stripping their sources leaves the code as it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pgolf.submission.sources import EXCLUDED, absent_modules, package_files, package_sources, stripped

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"pgolf/": ROOT / "pgolf", "pgolf/kernels/": ROOT / "kernels"}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return package_sources()


def test_every_module_is_there_or_left_out_for_a_reason(sources: dict[str, str]) -> None:
    files = {
        prefix + file.relative_to(folder).as_posix()
        for prefix, folder in FOLDERS.items()
        for file in folder.rglob("*.py")
    }
    paths = {name: name.removeprefix("pgolf/") for name in files}
    left_out = {name for name, path in paths.items() if path in EXCLUDED or path.startswith("audit/")}
    assert {name for name in sources if name.endswith(".py")} == files - left_out
    assert {name.replace(".", "/") + ".py" for name in absent_modules()} == left_out
    there = {name.removeprefix("pgolf/") for name in package_files()}
    assert not EXCLUDED.keys() - there - {path.partition("/")[0] + "/" for path in there}, "a file that is not there"
    tables = {name: source for name, source in sources.items() if name.endswith(".json")}
    assert tables == {
        f"pgolf/kernels/tuned/{name}.json": (ROOT / "kernels" / "tuned" / f"{name}.json").read_text()
        for name in ("default", "h100")
    }


def test_nothing_that_is_left_out_is_imported_at_the_start(sources: dict[str, str]) -> None:
    absent = {*absent_modules()}
    for name, source in sources.items():
        if name.endswith(".py"):
            for node in ast.parse(source).body:  # imports inside functions are made when they are needed
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert not absent & {*imported}, name


def test_comments_docstrings_and_annotations_of_functions_go() -> None:
    source = '''
"""module"""
from __future__ import annotations

@dataclass
class Point(Base):
    """class"""
    x: int = 0

    def moved(self, by: int, *rest: int, mark: str = "# kept", **more: int) -> "Point":
        """method"""
        return self.x + by  # comment

@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    i: tl.constexpr = BLOCK

class Error(ValueError):
    """only a docstring"""

async def nothing() -> None:
    """only a docstring"""
'''
    expected = """
from __future__ import annotations

@dataclass
class Point(Base):
    x: int = 0

    def moved(self, by, *rest, mark='# kept', **more):
        return self.x + by

@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    i: tl.constexpr = BLOCK

class Error(ValueError):
    pass

async def nothing():
    pass
"""
    assert stripped(source) == expected.strip()
    assert stripped(stripped(source)) == stripped(source)
    assert stripped('"""only a docstring"""') == stripped("") == "pass"


def test_a_source_that_cannot_be_read_is_named() -> None:
    with pytest.raises(SyntaxError) as error:
        stripped("x = = 1", "pgolf/bad.py")
    assert error.value.filename == "pgolf/bad.py"


def test_kernels_keep_what_triton_reads() -> None:
    """A parameter that is no ``constexpr`` any more is a number of the device, which no shape can be made of."""

    def constants(source: str) -> list[tuple[str, str]]:
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        arguments = [
            (function.name, a) for function in functions for a in function.args.args + function.args.kwonlyargs
        ]
        return [(name, a.arg) for name, a in arguments if a.annotation and "constexpr" in ast.unparse(a.annotation)]

    files = {name: file.read_text("utf-8") for name, file in package_files().items() if file.suffix == ".py"}
    kept = {name: constants(stripped(source)) for name, source in files.items()}
    assert kept == {name: constants(source) for name, source in files.items()}
    assert any("gl.constexpr" in source for source in files.values()) and sum(map(len, kept.values())) > 200
