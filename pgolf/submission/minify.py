"""What goes into the exported program, and how its sources are written: as briefly as they can be, to do the same.

Docstrings, comments, the settings' help and annotations go. So do imports and definitions that nothing in the program
mentions, such as a kernel's public functions that a run never calls. Local variables get names of one letter. Names
that are seen from outside a function (arguments, attributes, fields, globals) stay, as callers and Triton use them.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import itertools
import json
import keyword
import re
import string
import symtable
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pgolf

# By their path in the package.
EXCLUDED = {
    "data/corpus.py": "reads documents, from which data sets are built",
    "data/dataset.py": "builds data sets",
    "data/fineweb.py": "downloads the published shards, which the shipped program must not do",
    "data/commands.py": "the commands for all of that",
    "report/page.py": "writes the report's page; the program prints the table of results",
    "report/plots.py": "draws the report's plots",
    "submission/minify.py": "shortens sources; the program exports itself as it is",
    "submission/squeeze.py": "packs them",
    "submission/unpack.py": "unpacks them, and is the program's __main__",
    "kernels/dequant/triton.py": "dequantises in microseconds what the program dequantises a few times",
    "kernels/tuned/h200.json": "launch parameters of a chip that can take the H100's",
}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)


class ExportError(ValueError):
    """A source file that cannot be exported."""


def package_files() -> dict[str, Path]:
    """The package's modules and tables of launch parameters by their path in it, sorted."""
    package = Path(pgolf.__file__).parent
    # A checkout has the kernels beside the package, a wheel inside it.
    kernels = Path(importlib.import_module("pgolf.kernels").__path__[0])
    files = {f"pgolf/{name}": package / name for name in _modules(package) if not name.startswith("kernels/")}
    for pattern in ("**/*.py", "tuned/*.json"):
        files |= {f"pgolf/kernels/{file.relative_to(kernels)}": file for file in kernels.glob(pattern)}
    return dict(sorted(files.items()))


def _modules(folder: Path) -> list[str]:
    """Paths of the modules in a folder and those below."""
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*.py")]


def package_sources() -> dict[str, str]:
    """The files of the exported package by their path in it, shortened."""
    files = {name: file for name, file in package_files().items() if not _excluded(name)}
    modules = shortened({name: file.read_text("utf-8") for name, file in files.items() if file.suffix == ".py"})
    return {name: modules[name] if name in modules else _table(file) for name, file in files.items()}


def absent_modules() -> list[str]:
    """Names of the modules that are left out."""
    absent = [name for name in package_files() if _excluded(name) and name.endswith(".py")]
    return [name.removesuffix(".py").replace("/", ".") for name in absent]


def _excluded(name: str) -> bool:
    return name.removeprefix("pgolf/") in EXCLUDED


def _table(file: Path) -> str:
    """A chip's launch parameters, without how they were found."""
    return json.dumps({"cases": json.loads(file.read_text("utf-8"))["cases"]}, separators=(",", ":"))


def shortened(sources: dict[str, str]) -> dict[str, str]:
    """Modules by path, shortened together. Raises ExportError naming the one that cannot be."""
    trees, name = {}, ""
    try:
        for name, source in sources.items():
            trees[name] = stripped(ast.parse(source))
        drop_unmentioned(list(trees.values()))
        texts = {}
        for name, tree in trees.items():
            texts[name] = written(rename_locals(tree))
    except (SyntaxError, ExportError) as error:
        raise ExportError(f"{name} cannot be exported: {error}") from error
    return texts


# --- What a run does not need -----------------------------------------------------------------------------------------


def stripped(tree: ast.Module) -> ast.Module:
    """The tree without docstrings, the settings' help, the annotations of functions and what only type checkers read.

    Annotations of classes stay, as dataclasses and named tuples are made of them, and so does Triton's constexpr.
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body.append(ast.Pass())
    return ast.fix_missing_locations(_Stripper().visit(tree))


class _Stripper(ast.NodeTransformer):
    in_function = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._inside(node, True)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._inside(node, False)

    def _inside(self, node: ast.AST, in_function: bool) -> ast.AST:
        outside, self.in_function = self.in_function, in_function
        node = self.generic_visit(node)
        self.in_function = outside
        return node

    @staticmethod
    def _constant(node: ast.arg | ast.AnnAssign) -> bool:
        return isinstance(node.annotation, ast.Attribute) and node.annotation.attr == "constexpr"

    def visit_arg(self, node: ast.arg) -> ast.AST:
        if not self._constant(node):
            node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if not self.in_function or self._constant(node):
            return self.generic_visit(node)
        if node.value is None:
            return ast.Pass()
        return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "_field":
            node.args[1] = ast.Constant("")  # a setting's help is a docstring in all but name
        return self.generic_visit(node)


def drop_unmentioned(trees: list[ast.Module]) -> None:
    """Take from modules, in place, the top-level definitions and imports whose names no other part mentions.

    A part is a top-level statement of any module. Those that define nothing are kept, and then all that is mentioned
    in what is kept: as a name or an attribute, in an import, or as a string, whatever it stands for there. To define
    something, or to import it, must be all that such a statement does.
    """
    parts = [(part, _defined(part)) for tree in trees for part in tree.body if not isinstance(part, IMPORTS)]
    kept, mentioned, more = set(), {"main", "__version__"}, [ast.Pass()]
    imports = [part for tree in trees for part in tree.body if isinstance(part, IMPORTS)]
    renamed = {alias.asname: alias.name for part in imports for alias in part.names if alias.asname}
    while more:
        more = [part for part, names in parts if part not in kept and (names is None or names & mentioned)]
        kept.update(more)
        mentioned.update(*map(_mentioned, more))
        mentioned.update(name for other_name, name in renamed.items() if other_name in mentioned)
    # A module also needs the imports that others import from it.
    used = [(tree, set().union(*(_mentioned(part) for part in tree.body if part in kept))) for tree in trees]
    asked, before = set(), None
    while asked != before:
        before = set(asked)
        asked.update(name for tree, names in used for name in _asked_of_ours(tree, names | asked))
    for tree, names in used:
        annotated = any(getattr(node, "annotation", None) for part in tree.body for node in ast.walk(part))
        names |= asked | ({"annotations"} if annotated else set())  # of __future__
        tree.body = [part for part in tree.body if part in kept or (isinstance(part, IMPORTS) and _keep(part, names))]


def _asked_of_ours(tree: ast.Module, used: set[str]) -> set[str]:
    """What a module imports from modules of this package and uses."""
    ours = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "pgolf")
    ]
    return {alias.name for node in ours for alias in node.names if (alias.asname or alias.name) in used}


def _keep(part: ast.Import | ast.ImportFrom, names: set[str]) -> bool:
    """Take the unmentioned names out of an import; whether anything is left."""
    part.names = [alias for alias in part.names if (alias.asname or alias.name).split(".")[0] in names]
    return bool(part.names)


def _defined(part: ast.stmt) -> set[str] | None:
    """Names that a statement defines where that is all it does."""
    if isinstance(part, DEFINITIONS):
        return {part.name}
    targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", part)]
    names = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    if isinstance(part, ast.Assign | ast.AnnAssign) and all(isinstance(name, ast.Name) for name in names):
        return {name.id for name in names}
    return None


def _mentioned(part: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(part):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, IMPORTS):
            dotted = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names.update(name for path in dotted for name in path.split("."))
        elif isinstance(node, ast.Global | ast.Nonlocal):
            names.update(node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


# --- Names ------------------------------------------------------------------------------------------------------------


def rename_locals(tree: ast.Module) -> ast.Module:
    """The tree with its functions' variables called a, b, c … in the order in which they appear.

    A function is taken with those inside it. A variable keeps its name if it is an argument, imported, a function's or
    class's name, of a class's body, or declared global or nonlocal, and if the name stands for something global
    anywhere in the function. New names are those of no variable of the module or the function, and no builtin.
    """
    text = ast.unparse(tree)
    tree = _reread(text, tree)
    taken = {*symtable.symtable(text, "", "exec").get_identifiers(), *dir(builtins), *keyword.kwlist}

    def rename(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                _Renamer(node, taken).visit(node)
            else:
                for name in ("body", "orelse", "finalbody"):
                    rename(getattr(node, name, []))

    rename(tree.body)
    return tree


class _Renamer(ast.NodeTransformer):
    """Renames the variables of one function."""

    def __init__(self, function: ast.FunctionDef, taken: set[str]) -> None:
        variables, others = _variables(symtable.symtable(ast.unparse(function), "", "exec"))
        for node in ast.walk(function):
            if isinstance(node, DEFINITIONS):
                others.add(node.name)
            elif isinstance(node, ast.Global | ast.Nonlocal):
                others.update(node.names)
            elif isinstance(node, ast.MatchAs | ast.MatchStar | ast.MatchMapping):
                raise ExportError(f"line {node.lineno}: match statements are not provided for")
        seen = [node.id for node in ast.walk(function) if isinstance(node, ast.Name)]
        if {"locals", "vars", "eval", "exec", "dir"} & set(seen):
            variables = set()
        old = [name for name in dict.fromkeys(seen) if name in variables - others and len(name) > 1]
        letters = ("".join(name) for size in (1, 2) for name in itertools.product(string.ascii_lowercase, repeat=size))
        new = (name for name in letters if name not in taken | variables | others)
        self.names = dict(zip(old, new, strict=False))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)


def _variables(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """Names of a function's and its inner functions' own variables, and all names that stand for something else."""
    variables, others = set(), set()
    for symbol in table.get_symbols():
        own = symbol.is_local() and not (symbol.is_parameter() or symbol.is_imported() or symbol.is_namespace())
        if table.get_type() == "function" and (own or symbol.is_free()):
            variables.add(symbol.get_name())
        else:
            others.add(symbol.get_name())
    for inner in table.get_children():
        more, more_others = _variables(inner)
        variables, others = variables | more, others | more_others
    return variables, others


# --- Text -------------------------------------------------------------------------------------------------------------


def written(tree: ast.Module) -> str:
    """The tree as text: ASCII, one space a level, and none between tokens that are told apart without.

    Raises ExportError when Python would not read the same from it.
    """
    # A line inside a string would change with its margin, and is caught below.
    text = re.sub(r"^(?: {4})+", lambda margin: " " * (len(margin[0]) // 4), ast.unparse(tree), flags=re.MULTILINE)
    text = "".join(_closed_up(text)).encode("ascii", "backslashreplace").decode()
    _reread(text, tree)
    return text


def _reread(text: str, tree: ast.Module) -> ast.Module:
    """What Python reads from the text of a tree, which must be the same."""
    read = ast.parse(text)
    if ast.dump(read) != ast.dump(tree):
        raise ExportError("the program reads differently when it is written out again")
    return read


def _closed_up(text: str) -> Iterator[str]:
    """The tokens of a text with the margins and spaces that they need."""
    before, end = "\n", None
    for token, start, stop in _tokens(text):
        if before == "\n":
            yield " " * start[1]
        elif start != end and re.match(r"\w[\w'\".]", before[-1] + token[0]):
            yield " "
        yield token
        before, end = token, stop


def _tokens(text: str) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Tokens with the places where they begin and end; f-strings in one piece and such as Python 3.11 can read.

    From 3.12 on they come in parts, and the quotation marks around one may also be inside.
    """
    lines, opened = text.splitlines(), []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            opened.append(token.start)
        elif kind == "FSTRING_END":
            row, column = start = opened.pop()
            if not opened:
                whole = lines[row - 1][column : token.end[1]]
                nested = whole.startswith("f'") and "'" in whole[2:-1] and '"' not in whole
                yield f'f"{whole[2:-1]}"' if nested else whole, start, token.end
        elif kind == "NEWLINE":
            yield "\n", token.start, token.end
        elif not opened and kind not in ("INDENT", "DEDENT", "ENDMARKER", "NL"):
            yield token.string, token.start, token.end
