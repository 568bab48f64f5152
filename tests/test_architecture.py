"""The shape of the source: which module may import which, docstrings, and that every setting is used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pgolf.config import FIELDS

ROOT = Path(__file__).resolve().parent.parent
# A module may import those before it, in the order in which a run uses them.
ORDER = """
    config files progress folder runtime bpb corpus tokenizer shards manifest dataset fineweb loader model graphs
    gradient optim schedule tensors checkpoint evaluate train quantize artifact unpack minify squeeze export ttt.plan
    ttt.ledger ttt.adapters ttt.inputs ttt.scoring ttt.base ttt.engine ttt results report_plots report run
    data_commands cli __main__
""".split()  # noqa: SIM905
EXTRAS = {"matplotlib", "tqdm", "huggingface_hub", "zstandard"}  # not installed everywhere
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
    """``ttt.plan`` of pgolf/ttt/plan.py, ``ttt`` of pgolf/ttt/__init__.py, nothing of pgolf/__init__.py."""
    parts = path.relative_to(ROOT / "pgolf").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[str]:
    """Dotted names of what ``path`` imports, whole: ``from pgolf.files import x`` gives ``pgolf.files.x``."""
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


def test_order_lists_every_module() -> None:
    assert {module_name(path) for path in MODULES} - {""} == set(ORDER)


@each([path for path in MODULES if module_name(path)])
def test_modules_import_earlier_ones_only(path: Path) -> None:
    ours = [name for name in imports(path) if name.split(".")[0] == "pgolf" and not name.startswith("pgolf.kernels")]
    assert not {"tests", "bench", "kernels"} & {name.split(".")[0] for name in imports(path)}
    earlier = {f"pgolf.{name}" for name in ORDER[: ORDER.index(module_name(path))]}
    allowed = {*earlier, "pgolf", "pgolf.__version__"}
    assert [name for name in ours if not {name, name.rpartition(".")[0]} & allowed] == []


def test_config_needs_the_standard_library_only() -> None:
    assert [name for name in imports(ROOT / "pgolf" / "config.py") if not standard(name)] == []


@each(KERNELS)
def test_kernels_know_nothing_of_the_driver(path: Path) -> None:
    """A family imports what families share, itself, and those that it builds on; what they share imports no family."""
    family = path.relative_to(ROOT / "kernels").parts[0].removesuffix(".py")
    allowed = {family, "common", *BUILDS_ON.get(family, ())} if family != "common" else {"common"}
    foreign = [name for name in imports(path) if not standard(name) and name.split(".")[0] not in KERNEL_IMPORTS]
    assert [name for name in foreign if name.split(".")[:2] != ["pgolf", "kernels"]] == []
    assert {name.split(".")[2] for name in foreign} - allowed == set()


@each(LIBRARY)
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    if path.stem == "report_plots":
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
    """Public functions of a module and public methods of its public classes; Triton kernels are no Python."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for node in (node for body in bodies for node in body):
        compiled = any("jit" in ast.unparse(mark) for mark in getattr(node, "decorator_list", ()))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not compiled:
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
