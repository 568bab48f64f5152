"""The documents: what they link to is there, and what they show runs."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(path: Path) -> str:
    return _python_of(path.read_text(encoding="utf-8"))


def _python_of(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def python_by_section(path: Path) -> dict[str, str]:
    sections = path.read_text(encoding="utf-8").split("\n## ")[1:]
    return {section.partition("\n")[0]: _python_of(section) for section in sections}


EXAMPLES = python_by_section(ROOT / "docs" / "examples.md")


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not re.match(r"https?://", link) and not (path.parent / link).exists()] == []


def test_the_kernels_examples_run() -> None:
    exec(compile(python_blocks(ROOT / "docs" / "kernels.md"), "docs/kernels.md", "exec"), {})


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_agrees_with_plain_pytorch(device: torch.device, title: str) -> None:
    assert "torch.testing.assert_close(" in EXAMPLES[title]
    with device:
        exec(compile(EXAMPLES[title], f"docs/examples.md, {title}", "exec"), {})


def test_the_readme_s_imports_are_there() -> None:
    lines = [line for line in python_blocks(ROOT / "README.md").splitlines() if line.startswith("from ")]
    assert len(lines) > 10
    exec("\n".join(lines), {})


FAMILIES = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")} - {"common"}


def test_every_family_is_described() -> None:
    titles = re.findall(r"^## (\w+)$", (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(titles) == FAMILIES


def test_the_readme_calls_a_function_of_every_family() -> None:
    tree = ast.parse(python_blocks(ROOT / "README.md"))
    imported = {
        alias.name: node.module.rpartition(".")[2]
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert {imported.get(name) for name in called} >= FAMILIES


def test_the_three_ways_through_the_code_name_what_exists() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("## Three ways through the code\n")[2].partition("\n## ")[0]
    ways = [re.findall(r"^\d+\. (.*)$", way, re.MULTILINE) for way in section.split("\n**")[1:]]
    assert [len(way) for way in ways] == [12, 12, 12]
    for name in (name for way in ways for step in way for name in re.findall(r"`(.*?)`", step)):
        assert callable(pkgutil.resolve_name(f"pgolf.{name}")), name


def test_the_design_lists_every_folder() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "pgolf").rglob("__init__.py")} - {"pgolf/"}
    assert folders - set(re.findall(r"`(\w[\w/]*/)`", text)) == set()
