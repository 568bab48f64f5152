"""The exported program: complete, without what does not run, the same bytes every time, and runnable anywhere."""

from __future__ import annotations

import ast
import io
import os
import runpy
import subprocess
import sys
import tokenize
import types
import zipfile
from pathlib import Path

import pytest

from pgolf.config import RunConfig
from pgolf.export import EXCLUDED, ExportError, export_program, package_sources, strip_source

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shipped") / "train_gpt.py"
    export_program(path)
    return path


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return package_sources()


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess:
    """Run Python in an empty folder that knows nothing of this checkout; what it unpacks goes there too."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TMPDIR": str(folder)}
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=work, env=environment, capture_output=True, text=True, timeout=120
    )


def test_every_module_is_there(sources):
    wanted = {f"pgolf/{file.name}" for file in (ROOT / "pgolf").glob("*.py")}
    wanted |= {f"pgolf/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    assert sources.keys() >= {name for name in wanted if Path(name).name not in EXCLUDED}
    assert not any(name.endswith(tuple(EXCLUDED)) for name in sources)


def test_nothing_that_is_left_out_is_imported_at_the_start(sources):
    left_out = {f"pgolf.{name.removesuffix('.py')}" for name in EXCLUDED}
    for name, source in sources.items():
        if name.endswith(".py"):
            for node in ast.parse(source).body:  # imports inside functions are made when they are needed
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    imported = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert not left_out & set(imported), name


def without_docstrings(source: str) -> ast.Module:
    """The syntax tree after the docstrings' lines were blanked: another way than the exporter's."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
            if len(node.body) == 1:
                lines[text.lineno - 1] = " " * text.col_offset + "pass"
    tree = ast.parse("\n".join(lines))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "_field"):
        call.args[1].value = ""  # a setting's help is a docstring in all but name
    return tree


def constant(node: ast.arg | ast.AnnAssign) -> bool:
    return node.annotation is not None and ast.unparse(node.annotation) == "tl.constexpr"


def without_function_annotations(tree: ast.Module) -> ast.Module:
    """The same tree with plain arguments and assignments in functions (none of which holds a class here)."""
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        function.returns = None
        for node in ast.walk(function):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.arg) and not constant(node):
                node.annotation = None
            for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
                for i, statement in enumerate(block if isinstance(block, list) else []):
                    if isinstance(statement, ast.AnnAssign) and not constant(statement):
                        block[i] = ast.Assign([statement.target], statement.value) if statement.value else ast.Pass()
    return tree


def test_sources_do_the_same_without_comments_and_docstrings(sources):
    for folder, prefix in ((ROOT / "pgolf", "pgolf/"), (ROOT / "kernels", "pgolf/kernels/")):
        for file in folder.glob("*.py"):
            if file.name in EXCLUDED:
                continue
            stripped, expected = sources[prefix + file.name], without_docstrings(file.read_text())
            expected = without_function_annotations(expected)
            assert ast.dump(ast.parse(stripped)) == ast.dump(expected), file
            kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(stripped).readline)]
            assert tokenize.COMMENT not in kinds, file


def test_annotations_go_from_functions_and_stay_in_classes():
    source = """
@dataclass
class Point:
    x: int = 0

    def moved(self, by: int, *rest: int) -> "Point":
        total: int = self.x + by
        kind: type
        return total
"""
    stripped = strip_source(source, annotations=False)
    assert "x: int = 0" in stripped and "def moved(self, by, *rest):" in stripped
    assert "total = self.x + by" in stripped and "kind" not in stripped
    assert strip_source(source) == ast.unparse(ast.parse(source)).replace(4 * " ", " ")


def test_strip_source():
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
'''
    stripped = strip_source(source)
    assert "doc" not in stripped and "module" not in stripped and "# comment" not in stripped
    assert "@triton.jit\ndef kernel(x, BLOCK: tl.constexpr):" in stripped and "'# kept'" in stripped
    names: dict = {"triton": types.SimpleNamespace(jit=lambda f: f)}
    exec(stripped, names)
    assert names["nothing"]() is None and issubclass(names["Error"], ValueError)
    assert strip_source(stripped) == stripped
    assert strip_source('"""only a docstring"""') == ""


def test_a_source_that_cannot_be_exported_is_an_error(monkeypatch):
    monkeypatch.setattr(ast, "unparse", lambda tree: "x = 2")
    with pytest.raises(ExportError, match="reads differently"):
        strip_source("x = 1")


def test_the_same_bytes_every_time_and_all_counted(program, tmp_path):
    again = tmp_path / "other_name.py"
    assert export_program(again) == again.stat().st_size
    assert again.read_bytes() == program.read_bytes()
    content = program.read_bytes()
    assert content.startswith(b"#!/usr/bin/env python3\n")
    assert len(content) < 100_000, "the code's share of the cap"
    with zipfile.ZipFile(program) as members:
        assert members.namelist() == ["__main__.py", "package.xz"]
        assert str(ROOT) not in members.read("__main__.py").decode()
    assert [entry.name for entry in tmp_path.iterdir()] == [again.name], "nothing is left aside"


def test_help_runs_from_an_empty_folder(program, tmp_path):
    shown = run(program, "--help", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "--preset" in shown.stdout and "pgolf run" in shown.stdout
    listed = run(program, "config", folder=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "ttt_lora_rank" in listed.stdout
    assert not any((tmp_path / "work").iterdir()), "nothing is written where it runs"


def test_every_module_imports_from_the_program_and_exports_itself_unchanged(program, sources, tmp_path):
    script = """
import importlib, pkgutil, runpy, sys
root = runpy.run_path(sys.argv[1])["unpack"]()
sys.path.insert(0, str(root))
import pgolf, pgolf.kernels
names = [f"pgolf.{m.name}" for m in pkgutil.iter_modules(pgolf.__path__) if m.name != "__main__"]
names += [f"pgolf.kernels.{m.name}" for m in pkgutil.iter_modules(pgolf.kernels.__path__)]
for name in names:
    assert importlib.import_module(name).__file__.startswith(str(root)), name
from pgolf.export import export_program
print(len(names), export_program(sys.argv[2]))
"""
    done = run("-c", script, program, tmp_path / "again.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    count, size = map(int, done.stdout.split())
    assert count == len([name for name in sources if name.endswith(".py")]) - 2  # __init__ and __main__
    assert size == program.stat().st_size
    assert (tmp_path / "again.py").read_bytes() == program.read_bytes()


def test_processes_that_start_together_unpack_the_same_sources(program, sources, tmp_path):
    script = "import runpy, sys; print(runpy.run_path(sys.argv[1])['unpack']())"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", script, program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    roots = {process.communicate(timeout=120)[0].strip() for process in started}
    assert all(process.returncode == 0 for process in started) and len(roots) == 1
    root = Path(roots.pop())
    found = {str(file.relative_to(root)): file.read_text() for file in root.rglob("*") if file.is_file()}
    assert found == sources
    assert root.stat().st_mode & 0o077 == 0, "no other user may change what will be run"


@pytest.fixture
def in_process(program, tmp_path, monkeypatch):
    """Run the program here, with a command line that only says what it was called with."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    calls: list[list[str]] = []
    stub = types.ModuleType("pgolf.cli")
    stub.main = lambda arguments: calls.append(arguments) or 0
    monkeypatch.setitem(sys.modules, "pgolf.cli", stub)

    def start(path: Path, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        assert runpy.run_path(str(path))["main"]() == 0
        return calls[-1]

    return start


def test_what_the_command_line_is_called_with(program, in_process):
    assert in_process(program) == ["run"]
    assert in_process(program, "--preset", "demo") == ["run", "--preset", "demo"]
    assert in_process(program, "ttt", "--run-dir", "x") == ["ttt", "--run-dir", "x"]


def test_a_damaged_copy_is_written_again(program, sources, in_process, tmp_path):
    in_process(program)
    (root,) = tmp_path.glob("pgolf-*")
    (root / "pgolf" / "config.py").write_text("raise SystemExit('changed')")
    (root / "pgolf" / "bpb.py").unlink()
    in_process(program)
    assert (root / "pgolf" / "config.py").read_text() == sources["pgolf/config.py"]
    assert (root / "pgolf" / "bpb.py").is_file()


def test_a_folder_of_another_user_is_refused(program, in_process, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(SystemExit, match="belongs to another user"):
        in_process(program)


def test_the_run_s_settings_are_its_defaults(tmp_path, in_process, monkeypatch):
    config = RunConfig().replace(ttt_lora_rank=96, smear_gate_bos_mask=False, run_id="mine", device="cpu", seed=42)
    path = tmp_path / "train_gpt.py"
    export_program(path, config)
    environment = {"SEED": "7"}
    monkeypatch.setattr(os, "environ", environment)
    in_process(path, "--preset=demo")
    assert environment == {"SEED": "7"}, "another preset has its own settings"
    in_process(path)
    assert environment == {"SEED": "7", "TTT_LORA_RANK": "96", "SMEAR_GATE_BOS_MASK": "False"}
    assert RunConfig.from_env(environment) == config.replace(run_id="", device="auto", seed=7)


def test_an_old_python_is_told(program, in_process, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10))
    with pytest.raises(SystemExit, match="3.11"):
        in_process(program)
