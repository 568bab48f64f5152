"""The exported program's compressor, and how a program, here one of three files, unpacks itself."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

from pgolf.config import RunConfig
from pgolf.submission import squeeze, unpack
from pgolf.submission.export import export_program
from pgolf.submission.squeeze import encode
from pgolf.submission.unpack import ALPHABET, DEPTHS, decode, leaves, state_tables

SMALL = {
    "pgolf/__init__.py": "",
    "pgolf/cli.py": "import sys\ndef main(arguments):\n print(arguments)\n return 3\n",
    "pgolf/kernels/tuned/h100.json": '{"cases":{}}',
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of three files, which unpacks at once, in a folder of its own."""
    monkeypatch.setattr(squeeze, "package_sources", lambda: SMALL)
    monkeypatch.setattr(squeeze, "absent_modules", lambda: ["pgolf.absent", "pgolf.kernels._absent"])
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


# --- The compressor ---------------------------------------------------------------------------------------------------


def test_every_character_of_a_source_has_a_leaf() -> None:
    assert set(ALPHABET) == {0, 10, *range(32, 127)} and len(ALPHABET) == len(DEPTHS) == 97
    assert sum(2.0 ** -int(depth, 16) for depth in DEPTHS) == 1, "the leaves fill the tree"
    assert sorted(leaves().values()) == sorted(ALPHABET)
    assert [leaf.bit_length() - 1 for leaf in leaves()] == [int(depth, 16) for depth in DEPTHS]
    assert [f"{leaf:b}"[1:] for leaf in leaves()] == sorted(f"{leaf:b}"[1:] for leaf in leaves())


def test_no_machine_rounds_a_table_otherwise() -> None:
    """Logarithms and exponentials may differ in their last bit from machine to machine; roundings must not."""
    values = [256 * math.log((p + 0.5) / (4095.5 - p)) for p in range(4096)]
    values += [65536 / (1 + math.exp(-x / 256)) for x in range(-2048, 2048)]
    assert min(abs(value % 1 - 0.5) for value in values) > 1e-6
    odds, following = state_tables()
    assert len(odds) == len(following[0]) == len(following[1]) == 1 << 15
    assert all(0 <= state < 1 << 15 for table in following for state in table)
    assert odds[unpack.NEW] == 0 and odds[following[1][unpack.NEW]] > 0 > odds[following[0][unpack.NEW]]


@pytest.mark.parametrize("text", [b"", b"x", b"\0" * 50, ALPHABET * 3, b"def f(x):\n return [x, 'a(b', (x)]\n" * 40])
@pytest.mark.parametrize("known", [b"", b"def g(y):\n return y\n"])
def test_what_is_packed_comes_back(text: bytes, known: bytes) -> None:
    packed = encode(text, known)
    assert decode(packed + b"PK and more", len(text), known) == text
    assert encode.__wrapped__(text, known) == packed
    if len(text) > 500:
        assert len(packed) < len(text) / 10


def test_foreign_characters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be packed: b'\\t\\xff'"):
        encode(b"a\tb\xff")


# --- Unpacking --------------------------------------------------------------------------------------------------------


def test_the_program_s_file(small: Path) -> None:
    shebang, settings, body = small.read_bytes().split(b"\n", 2)
    assert (shebang, settings) == (b"#!/usr/bin/env python3", b"{}")
    with zipfile.ZipFile(small) as archive:
        assert archive.namelist() == ["__main__.py"]
        main = archive.read("__main__.py").decode()
    assert str(Path(__file__).parent.parent) not in main and main.isascii()
    assert body[:2] != b"PK" and body.endswith(b"\0\0")
    assert [entry.name for entry in small.parent.iterdir()] == [small.name], "nothing is left aside"


def test_it_runs_and_says_what_it_does(small: Path, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    for call in range(2):
        done = subprocess.run(
            [sys.executable, small, "ttt"], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (3, "['ttt']\n"), done.stderr
        assert ("unpacking" in done.stderr) == (call == 0)


def test_an_installed_package_lends_nothing(small: Path, in_process) -> None:
    assert in_process(small) == ["run"]
    with pytest.raises(ModuleNotFoundError) as error:
        import pgolf.absent  # noqa: F401
    assert error.value.name == "pgolf.absent"


def test_processes_that_start_together_unpack_once(small: Path, tmp_path: Path) -> None:
    script = "import runpy, sys; print(runpy.run_path(sys.argv[1])['unpack']())"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, small],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    roots = {shown.strip() for shown, _ in outputs}
    assert all(process.returncode == 0 for process in started) and len(roots) == 1
    assert sum("unpacking" in errors for _, errors in outputs) == 1
    root = Path(roots.pop())
    found = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    assert found.pop("program") == small.read_bytes().split(b"\n", 2)[2]
    assert found.pop("sources").decode() == "\0".join(part for file in SMALL.items() for part in file)
    assert found == {name: source.encode() for name, source in SMALL.items()}
    assert root.stat().st_mode & 0o077 == 0, "no other user may change what will be run"


def test_damaged_copies_are_written_again(small: Path, in_process, tmp_path: Path, capsys) -> None:
    in_process(small)
    (root,) = tmp_path.glob("pgolf-*")
    (root / "pgolf" / "cli.py").write_text("raise SystemExit('changed')")
    (root / "pgolf" / "__init__.py").unlink()
    capsys.readouterr()
    in_process(small)
    assert "unpacking" not in capsys.readouterr().err, "what was unpacked is kept"
    (root / "sources").write_text("cut short")
    (root / "pgolf" / "__init__.py").write_text("changed")
    in_process(small)
    assert "unpacking" in capsys.readouterr().err
    assert {name: (root / name).read_text() for name in SMALL} == SMALL


@pytest.mark.parametrize("place", [0, 5, 20])
def test_a_damaged_file_is_told(small: Path, in_process, tmp_path: Path, place: int) -> None:
    program = bytearray(small.read_bytes())
    program[len(b"\n".join(small.read_bytes().split(b"\n", 2)[:2])) + 1 + place] ^= 0x55
    small.write_bytes(program)
    with pytest.raises(SystemExit, match="is damaged"):
        in_process(small)
    assert not list(tmp_path.rglob("cli.py"))


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


def test_an_old_python_is_told(small: Path, in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10))
    with pytest.raises(SystemExit, match="3.11"):
        in_process(small)


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
