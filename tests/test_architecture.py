"""The shape of the source: which module may import which, docstrings, and that every setting is used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pgolf.config import FIELDS

ROOT = Path(__file__).resolve().parent.parent
# Folders and single modules of pgolf/, each with those that it may import, besides its own and the kernels.
# The program is exported by the stage that writes the artifact, as both count against the cap.
MAY_IMPORT = {
    "config": set(),
    "optim": set(),
    "common": {"config"},
    "data": {"config", "common"},
    "model": {"config", "common", "data"},
    "submission": {"config", "common"},
    "artifact": {"config", "common", "data", "model", "submission"},
    "scoring": {"config", "common", "data", "model", "artifact"},
    "training": {"config", "common", "data", "model", "scoring"},
    "report": {"config", "common"},
    "audit": {"config", "common", "data", "model", "artifact", "scoring", "report"},
    "run": {"config", "common", "data", "artifact", "scoring", "training", "report"},
    "pack": {"config", "common", "artifact", "submission", "report", "run"},
    "cli": {"config", "common", "data", "model", "artifact", "submission", "report", "run", "pack", "audit"},
    "__main__": {"cli"},
}
EXTRAS = {"matplotlib", "tqdm", "huggingface_hub", "zstandard", "safetensors"}  # not installed everywhere
KERNEL_IMPORTS = {"torch", "triton", "numpy"}
BUILDS_ON = {"gated_attention": {"varlen_attention"}}  # one family on another

MODULES = sorted((ROOT / "pgolf").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
LIBRARY = [*MODULES, *KERNELS]


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """``pgolf.data.loader`` of pgolf/data/loader.py, ``pgolf.data`` of pgolf/data/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[str]:
    """Dotted names of what ``path`` imports, whole: ``from pgolf.a import x`` gives ``pgolf.a.x``."""
    package = path.relative_to(ROOT).parts[:-1]
    package = ("pgolf", *package) if package[0] == "kernels" else package
    for node in ast.walk(tree or parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            yield from (".".join((*base, *filter(None, (node.module, alias.name)))) for alias in node.names)


def standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def imported_modules(path: Path) -> set[str]:
    """Modules of the driver that ``path`` imports anywhere, also inside functions."""
    names = {part for name in imports(path) for part in (name, name.rpartition(".")[0])}
    return names & {module_name(module) for module in MODULES} - {"pgolf"}


def test_the_table_lists_every_folder() -> None:
    assert {module_name(path).split(".")[1] for path in MODULES if module_name(path) != "pgolf"} == set(MAY_IMPORT)


def test_the_allowed_imports_point_one_way() -> None:
    tuple(TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError


@each([path for path in MODULES if module_name(path) != "pgolf"])
def test_modules_import_what_their_folder_may(path: Path) -> None:
    assert not {"tests", "bench", "kernels"} & {name.split(".")[0] for name in imports(path)}
    folder = module_name(path).split(".")[1]
    assert {name.split(".")[1] for name in imported_modules(path)} <= {folder, *MAY_IMPORT[folder]}


def test_no_modules_import_each_other_in_a_circle() -> None:
    tuple(TopologicalSorter({module_name(path): imported_modules(path) for path in MODULES}).static_order())


def test_config_needs_the_standard_library_only() -> None:
    assert [name for name in imports(ROOT / "pgolf" / "config.py") if not standard(name)] == []


@each(KERNELS)
def test_kernels_know_nothing_of_the_driver(path: Path) -> None:
    """A family imports what families share, itself, and those that it builds on; what they share imports no family."""
    family = path.relative_to(ROOT / "kernels").parts[0]
    allowed = {family, "common", *BUILDS_ON.get(family, ())} if family != "common" else {"common"}
    if family == "__init__.py":  # hands out the names of all
        allowed = {path.parent.name for path in KERNELS}
    foreign = [name for name in imports(path) if not standard(name) and name.split(".")[0] not in KERNEL_IMPORTS]
    assert [name for name in foreign if name.split(".")[:2] != ["pgolf", "kernels"]] == []
    assert {name.split(".")[2] for name in foreign} - allowed == set()


@each(LIBRARY)
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    if path.name == "plots.py":
        pytest.skip("imported only where matplotlib is installed")
    guarded = {
        id(node)
        for outer in ast.walk(parse(path))
        if isinstance(outer, ast.FunctionDef | ast.Try)
        for node in ast.walk(outer)
    }
    at_top = [
        node
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded
    ]
    names = {name.split(".")[0] for node in at_top for name in imports(path, node)}
    assert not names & EXTRAS


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Public functions of a module and public methods of its public classes.

    Triton kernels are no Python, and overloads only types of a function that follows.
    """
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for node in (node for body in bodies for node in body):
        marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
        other = any("jit" in mark or mark == "overload" for mark in marks)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not other:
            yield node


@each(LIBRARY)
def test_public_functions_are_documented_and_annotated(path: Path) -> None:
    tree = parse(path)
    wanting = [] if ast.get_docstring(tree) else ["module docstring"]
    wanting += [
        f"class {node.name}: docstring"
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name[0] != "_" and not ast.get_docstring(node)
    ]
    for function in public_functions(tree):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [item.arg for item in arguments if item.annotation is None and item.arg not in ("self", "cls")]
        wanting += [f"{function.name}: type of {name}" for name in bare]
        if function.returns is None:
            wanting.append(f"{function.name}: type of the result")
        if not ast.get_docstring(function):
            wanting.append(f"{function.name}: docstring")
    assert wanting == []


def last_name(node: ast.AST | None) -> str:
    """``config`` of ``config`` and of ``self.config``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def config_reads(tree: ast.AST, owner: str = "config") -> set[str]:
    """Attributes read from what is called ``owner``, from its aliases and from parameters of type RunConfig."""
    owners = {owner}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and last_name(node.value) == owner:
            owners |= {last_name(target) for target in node.targets}
        elif isinstance(node, ast.arg) and last_name(node.annotation) == "RunConfig":
            owners.add(node.arg)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    return {node.attr for node in attributes if last_name(node.value).lstrip("_") in owners}


def test_every_setting_is_read() -> None:
    others = [path for path in LIBRARY if path.name != "config.py"]
    used = set().union(*(config_reads(parse(path)) for path in others))
    (settings,) = (
        node
        for node in parse(ROOT / "pgolf" / "config.py").body
        if isinstance(node, ast.ClassDef) and node.name == "RunConfig"
    )
    for method in (node for node in settings.body if isinstance(node, ast.FunctionDef)):
        if method.name in used:  # a property or method stands for the fields it reads
            used |= config_reads(method, "self")
    unread = sorted(set(FIELDS) - used)
    assert not unread, f"no code reads the settings {', '.join(unread)}"
