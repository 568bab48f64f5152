"""How an exported program, here one of three files, unpacks itself and calls its command line."""

from __future__ import annotations

import hashlib
import io
import os
import runpy
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from pgolf.config import RunConfig
from pgolf.submission import program, sources
from pgolf.submission.export import export_program

SMALL = {
    "pgolf/__init__.py": "",
    "pgolf/cli.py": "def main(arguments):\n print(__file__, arguments, 'ᵀ')\n return 3\n",
    "pgolf/kernels/tuned/h100.json": '{"cases":{}}',
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of three files."""
    monkeypatch.setattr(sources, "package_sources", lambda: SMALL)
    monkeypatch.setattr(sources, "absent_modules", lambda: ["pgolf.absent", "pgolf.kernels._absent"])
    path = tmp_path / "program" / "train_gpt.py"
    path.parent.mkdir()
    export_program(path)
    return path


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a program here, with a command line that only says what it was called with."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    calls: list[list[str]] = []
    stub = types.ModuleType("pgolf.cli")
    stub.main = lambda arguments: calls.append(arguments) or 0
    monkeypatch.setitem(sys.modules, "pgolf.cli", stub)
    for name in ("pgolf.absent", "pgolf.kernels._absent"):
        monkeypatch.setitem(sys.modules, name, None)

    def start(path: Path, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        assert runpy.run_path(str(path))["main"]() == 0
        return calls[-1]

    return start


def test_the_program_s_file(small: Path) -> None:
    shebang, settings, digest, archive = small.read_bytes().split(b"\n", 3)
    assert (shebang, settings) == (b"#!/usr/bin/env python3", b"{}")
    assert digest.decode() == hashlib.sha256(archive).hexdigest()
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert file.read("__main__.py") == Path(program.__file__).read_bytes()
        assert [entry.date_time[0] for entry in file.infolist()] == [1980, 1980], "the same bytes at any time"
    assert [entry.name for entry in small.parent.iterdir()] == [small.name], "nothing is left aside"


def test_an_installed_package_lends_nothing(small: Path, in_process) -> None:
    assert in_process(small) == ["run"]
    with pytest.raises(ModuleNotFoundError) as error:
        import pgolf.absent  # noqa: F401
    assert error.value.name == "pgolf.absent"


def test_processes_that_start_together_run_from_one_folder(small: Path, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, small, "ttt"], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    outputs = {process.communicate(timeout=120)[0] for process in started}
    assert all(process.returncode == 3 for process in started)
    (root,) = tmp_path.glob("pgolf-*")
    assert outputs == {f"{root}/pgolf/cli.py ['ttt'] ᵀ\n"}
    found = {
        str(file.relative_to(root)): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert found.pop("program") == small.read_bytes().split(b"\n", 3)[3]
    assert found == {name: source.encode() for name, source in SMALL.items()}
    assert root.stat().st_mode & 0o077 == 0, "no other user may change what will be run"


def test_damaged_copies_are_written_again(small: Path, in_process, tmp_path: Path) -> None:
    in_process(small)
    (root,) = tmp_path.glob("pgolf-*")
    (root / "pgolf" / "cli.py").write_text("raise SystemExit('changed')")
    (root / "pgolf" / "__init__.py").unlink()
    (root / "program").write_text("cut short")
    in_process(small)
    assert {name: (root / name).read_text() for name in SMALL} == SMALL
    assert small.read_bytes().endswith(b"\n" + (root / "program").read_bytes())


@pytest.mark.parametrize("part", ["digest", "sources"])
def test_a_damaged_file_is_told(small: Path, in_process, tmp_path: Path, part: str) -> None:
    content = small.read_bytes()
    place = content.index(b"\nPK") - 1 if part == "digest" else content.index(b"package.json") + 50
    small.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
    with pytest.raises(SystemExit, match="is damaged"):
        in_process(small)
    assert not list(tmp_path.glob("pgolf-*"))


def test_a_folder_of_another_user_is_refused(small: Path, in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(SystemExit, match="is no folder of yours alone"):
        in_process(small)


@pytest.mark.parametrize("place", ["file", "link", "open to others"])
def test_a_folder_that_is_not_ours_alone_is_refused(small: Path, in_process, tmp_path: Path, place: str) -> None:
    in_process(small)
    (root,) = tmp_path.glob("pgolf-*")
    if place == "open to others":
        root.chmod(0o720)
    else:
        root.rename(tmp_path / "moved")
        root.write_text("") if place == "file" else root.symlink_to(tmp_path / "moved")
    with pytest.raises(SystemExit, match="is no folder of yours alone: delete it, or set TMPDIR"):
        in_process(small)


@pytest.mark.parametrize("name", ["json.py", "torch/__init__.py", "pgolf/json.py", "pgolf/kernels/x.so"])
def test_foreign_modules_are_refused(small: Path, in_process, tmp_path: Path, name: str) -> None:
    """They would come before the standard library's."""
    in_process(small)
    (root,) = tmp_path.glob("pgolf-*")
    (root / "pgolf" / "__pycache__").mkdir(exist_ok=True)
    (root / "pgolf" / "__pycache__" / "cli.cpython-311.pyc").write_bytes(b"")
    in_process(small)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("")
    with pytest.raises(SystemExit, match=f"{name.split('/__')[0]} is not of this program: delete "):
        in_process(small)


def test_an_old_python_is_told(small: Path, in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setattr(sys, "version_info", (3, 10))
    with pytest.raises(SystemExit, match=f"needs Python {needed} or newer"):
        in_process(small)
    assert not list(tmp_path.glob("pgolf-*"))


def test_what_the_command_line_is_called_with(small: Path, in_process) -> None:
    assert in_process(small) == ["run"]
    assert in_process(small, "--preset", "demo") == ["run", "--preset", "demo"]
    assert in_process(small, "ttt", "--run-dir", "x") == ["ttt", "--run-dir", "x"]


def test_the_run_s_settings_are_its_defaults(small: Path, in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig().replace(ttt_lora_rank=96, smear_gate_bos_mask=False, run_id="mine", device="cpu", seed=42)
    export_program(small, config)
    environment = {"SEED": "7"}
    monkeypatch.setattr(os, "environ", environment)
    in_process(small, "--preset=demo")
    assert environment == {"SEED": "7"}, "another preset has its own settings"
    in_process(small)
    assert environment == {"SEED": "7", "TTT_LORA_RANK": "96", "SMEAR_GATE_BOS_MASK": "False"}
    assert RunConfig.from_env(environment) == config.replace(run_id="", device="auto", seed=7)
