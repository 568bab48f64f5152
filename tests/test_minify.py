"""What is left out of the exported program, and that its shortened sources do the same."""

from __future__ import annotations

import ast
import dis
import io
import tokenize
import types
from pathlib import Path

import pytest

from pgolf.submission import minify
from pgolf.submission.minify import (
    EXCLUDED,
    ExportError,
    absent_modules,
    drop_unmentioned,
    package_files,
    package_sources,
    rename_locals,
    shortened,
    stripped,
    written,
)

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
    left_out = {name for name in files if name.removeprefix("pgolf/") in EXCLUDED}
    assert {name for name in sources if name.endswith(".py")} == files - left_out
    assert {name.replace(".", "/") + ".py" for name in absent_modules()} == left_out
    assert not EXCLUDED.keys() - {name.removeprefix("pgolf/") for name in package_files()}, "a file that is not there"
    tables = [name for name in sources if name.endswith(".json")]
    assert {"pgolf/kernels/tuned/h100.json", "pgolf/kernels/tuned/default.json"} <= {*tables}
    assert not any("meta" in sources[name] for name in tables)


def test_nothing_that_is_left_out_is_imported_at_the_start(sources: dict[str, str]) -> None:
    for name, source in sources.items():
        if name.endswith(".py"):
            for node in ast.parse(source).body:  # imports inside functions are made when they are needed
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert not {*absent_modules()} & {*imported}, name


def test_sources_are_short(sources: dict[str, str]) -> None:
    for name, source in sources.items():
        assert source.isascii()
        if name.endswith(".py"):
            kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(source).readline)]
            assert tokenize.COMMENT not in kinds and tokenize.NL not in kinds, name
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    assert ast.get_docstring(node) is None, name


# --- The same program -------------------------------------------------------------------------------------------------


def same_code(one: types.CodeType, other: types.CodeType, names: dict[str, str]) -> None:
    """Both do the same, up to the names of variables, which ``names`` says."""
    closures: tuple[list, list] = ([], [])
    instructions = []
    for code, closure in ((one, closures[0]), (other, closures[1])):
        kept = []
        for instruction in dis.get_instructions(code):  # cells are ordered by name
            cell = instruction.opname in ("MAKE_CELL", "LOAD_CLOSURE")
            (closure if cell else kept).append(instruction)
        instructions.append(kept)
    for a, b in zip(*instructions, strict=True):
        assert a.opname == b.opname
        if a.opcode in dis.haslocal or a.opcode in dis.hasfree:
            pairs = [(a.argval, b.argval)] if isinstance(a.argval, str) else zip(a.argval, b.argval, strict=True)
            for old, new in pairs:
                assert names.setdefault(old, new) == new
        elif isinstance(a.argval, types.CodeType):
            assert (a.argval.co_name, a.argval.co_flags) == (b.argval.co_name, b.argval.co_flags)
            arguments = [code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] for code in (a.argval, b.argval)]
            assert arguments[0] == arguments[1], "callers and Triton see the names of arguments"
            outer = one.co_name == "<module>" or one.co_flags & 2 == 0  # not inside a function
            inner: dict[str, str] = {} if outer else names
            same_code(a.argval, b.argval, inner)
            assert len(set(inner.values())) == len(inner), "two variables have become one"
        else:
            assert a.argval == b.argval
    assert sorted(names.get(i.argval, i.argval) for i in closures[0]) == sorted(i.argval for i in closures[1])


def test_renaming_leaves_the_code_as_it_is() -> None:
    files = {name: file for name, file in package_files().items() if name.endswith(".py")}
    trees = {name: stripped(ast.parse(file.read_text())) for name, file in files.items()}
    renamed = 0
    for name, tree in trees.items():
        one, other = (ast.unparse(version) for version in (tree, rename_locals(tree)))
        same_code(compile(one, name, "exec"), compile(other, name, "exec"), {})
        renamed += one != other
    assert renamed > 20


def test_what_renaming_leaves_alone() -> None:
    source = """
LIMIT = 3
class Holder:
    value = 1
    def method(self, given, *rest, option=LIMIT, **more):
        import json as reader
        result = [item for item in rest if item != given]
        def inner(value):
            nonlocal result
            counted = total = len(result) + value
            return total + counted
        try:
            outcome = inner(self.value)
        except ValueError as error:
            outcome = error
        return outcome, reader.dumps(more), lambda argument: argument + option
def uses_global():
    global count
    count = LIMIT
    a, long = 1, LIMIT
    return a + long
def looks():
    secret = 1
    return locals()
def shadow(default=len):
    sorted = default([1])
    return sorted
"""
    text = written(rename_locals(ast.parse(source)))
    for kept in (
        "def method(self,given,*rest,option=LIMIT,**more)",
        "import json as reader",
        "nonlocal result",
        "def inner(value)",
        "self.value",
        "lambda argument:argument+option",
        "global count\n count=LIMIT",
        "secret=1",
    ):
        assert kept in text, kept
    for name in ("item", "counted", "total", "outcome", "error", "long", "sorted"):
        assert name not in text.replace("ValueError", ""), name
    assert "a,b=(1,LIMIT)" in text, "a new name must not be one that is taken"
    before, after = {}, {}
    exec(source, before)
    exec(text, after)
    for names in (before, after):
        outcome, more, function = names["Holder"]().method(2, 2, 3, 4, key=5)
        assert (outcome, more, function(1)) == (6, '{"key": 5}', 4)
        assert names["uses_global"]() == 4 and names["looks"]() == {"secret": 1} and names["shadow"]() == 1


def test_match_statements_are_refused() -> None:
    with pytest.raises(ExportError, match="match statements"):
        rename_locals(ast.parse("def f(x):\n match x:\n  case [first, *_]: return first"))


def test_what_nothing_mentions_is_dropped() -> None:
    first = """
from __future__ import annotations
import os, sys
import os.path as paths
from typing import Any
from pgolf.second import helper, other as renamed, passed_on
__all__ = ["unused"]
UNUSED = 1
USED, PAIR = 1, 2
def unused(): return unused_too()
def unused_too(): return unused()
def main(): return used() + renamed() + sys.maxsize
def used(): return getattr(sys, "text_only") or PAIR
def text_only(): return helper()
print(UNKNOWN)
"""
    second = """
import json
from pgolf.third import passed_on, dropped
def helper(): return 1
def other(): return 2
def third(): return 3
"""
    third = """
from pgolf.second import third as last
def passed_on(): return 4
def dropped(): return last()
def user(): return passed_on
passed_on.mark = 1
"""
    trees = [ast.parse(text) for text in (first, second, third)]
    drop_unmentioned(trees)
    lines = [ast.unparse(tree).splitlines() for tree in trees]
    defined = [{line for line in text if not line.startswith(" ") and line} for text in lines]
    assert defined[0] == {
        "import sys",
        "from pgolf.second import helper, other as renamed",
        "USED, PAIR = (1, 2)",
        "def main():",
        "def used():",
        "def text_only():",
        "print(UNKNOWN)",
    }
    assert defined[1] == {"def helper():", "def other():"}
    assert defined[2] == {"def passed_on():", "passed_on.mark = 1"}


def test_imports_that_others_import_stay() -> None:
    trees = [
        ast.parse("from pgolf.b import value\ndef main(): return value"),
        ast.parse("from pgolf.c import value, other\nx = 1"),
        ast.parse("value = other = 1"),
    ]
    drop_unmentioned(trees)
    assert [ast.unparse(tree) for tree in trees[1:]] == ["from pgolf.c import value", "value = other = 1"]


# --- Stripping and writing --------------------------------------------------------------------------------------------


def test_annotations_go_from_functions_and_stay_in_classes() -> None:
    source = """
@dataclass
class Point:
    x: int = 0

    def moved(self, by: int, *rest: int) -> "Point":
        total: int = self.x + by
        kind: type
        return total
if TYPE_CHECKING:
    import never
"""
    text = written(stripped(ast.parse(source)))
    assert "x:int=0" in text and "def moved(self,by,*rest):" in text
    assert "total=self.x+by" in text and "kind" not in text and "never" not in text


def test_docstrings_comments_and_help_go() -> None:
    source = '''
"""module"""
from __future__ import annotations

@triton.jit
def kernel(x, BLOCK: tl.constexpr):  # comment
    """doc"""
    i = tl.arange(0, BLOCK)[:, None]
    tl.store(x + i, "# kept")

class Error(ValueError):
    """only a docstring"""

def nothing():
    """only a docstring"""
size: int = _field(3, "the help", low=1)
'''
    text = written(stripped(ast.parse(source)))
    assert "doc" not in text and "module" not in text and "# comment" not in text and "help" not in text
    assert "@triton.jit\ndef kernel(x,BLOCK:tl.constexpr):" in text and "'# kept'" in text
    assert "size:int=_field(3,'',low=1)" in text
    names: dict = {"triton": types.SimpleNamespace(jit=lambda f: f), "_field": lambda *_, **__: 0}
    exec(text, names)
    assert names["nothing"]() is None and issubclass(names["Error"], ValueError)
    assert written(stripped(ast.parse(text))) == text
    assert written(stripped(ast.parse('"""only a docstring"""'))) == ""


@pytest.mark.parametrize(
    "source",
    [
        "x = 1 if y else 2",
        "from . import a\nfrom .b import c",
        "x = not a or -b ** -c",
        "f'{x!r:>{width}} {y}'",
        "x = f'{a} {{}} it{b[0]}s  two'",
        "print(f'{d[\"key\"]} \\' {e}')",
        "x = 'a  b' in y",
        "x = b'\\0' if 1.5 else 2",
        "lambda *a, **k: (yield)",
        "return_ = [i for i in j if i is not None]",
        "x: int",
        "assert x, 'é → ᵀ'",
        "async def f():\n    await g()\n    async with h as i:\n        pass",
        "x = 1 .real + 0x1f.imag",
        "x = f'{a!r}' f\"{b}\" 'c'",
        "x = {**a, 'b': [*c]}[d:e, ...]",
        "def f(a, /, b, *, c): return a @ b",
    ],
)
def test_written_text_reads_the_same(source: str) -> None:
    text = written(ast.parse(source))
    assert text.isascii() and ast.dump(ast.parse(text)) == ast.dump(ast.parse(source))


def test_a_source_that_cannot_be_exported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="bad.py cannot be exported: invalid syntax"):
        shortened({"good.py": "main = 1", "bad.py": "x = = 1"})
    monkeypatch.setattr(minify.ast, "unparse", lambda tree: "x = 2")
    with pytest.raises(ExportError, match="x.py cannot be exported: the program reads differently"):
        shortened({"x.py": "main = 1"})
