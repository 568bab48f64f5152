"""The exported program as a whole: small, the same bytes every time, and the package's results from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf.cli import main
from pgolf.config import RunConfig
from pgolf.submission.export import export_program
from pgolf.submission.sources import absent_modules, package_sources
from tests.corpus import embedded_documents
from tests.test_cli import settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the record's settings, in the folder that it unpacks to."""
    path = tmp_path_factory.mktemp("shipped") / "train_gpt.py"
    export_program(path, RunConfig.preset("record"))
    return path


def run(program: Path, *command: str | Path, folder: Path, fails: bool = False) -> subprocess.CompletedProcess:
    """Run Python in ``folder``, without this checkout's path; all tests unpack the program to one folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"TMPDIR": str(program.parent), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr
    return done


@pytest.fixture(scope="module")
def root(program: Path) -> Path:
    """The folder with the program's sources."""
    assert "--preset" in run(program, program, "--help", folder=program.parent).stdout
    (found,) = program.parent.glob("pgolf-*")
    return found


def test_the_same_bytes_every_time_and_all_counted(program: Path, tmp_path: Path) -> None:
    again = tmp_path / "other_name.py"
    assert export_program(again) == again.stat().st_size
    assert again.read_bytes() == program.read_bytes(), "the record's settings are the defaults"
    assert len(program.read_bytes()) < 142_000, "the code's share of the cap"
    assert str(ROOT).encode() not in program.read_bytes()


@pytest.mark.parametrize(
    "command, module",
    [
        (["data", "fineweb"], "data.commands"),
        (["run", "--preset", "demo", "--set", "device=cpu"], "data.dataset"),
    ],
)
def test_commands_of_the_whole_package_only_say_so(program: Path, tmp_path: Path, command: list, module: str) -> None:
    shown = run(program, program, *command, folder=tmp_path, fails=True).stderr
    assert shown.strip().endswith(f"this program was exported without pgolf.{module}; install the package pgolf for it")


def test_one_command_starts_and_goes_on_with_the_settings_in_it(program: Path, tmp_path: Path) -> None:
    command = [program, "--resume", "--set", "device=cpu", "--set", "data_dir=nothing", "--run-dir"]
    for _ in range(2):
        assert "there is no tokenizer" in run(program, *command, "run", folder=tmp_path, fails=True).stderr
    started = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (started["preset_name"], started["seed"]) == ("record", 1337)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"], "nothing else is written where it runs"


def test_it_has_the_sources_and_nothing_else(root: Path) -> None:
    files = {str(file.relative_to(root)): file for file in root.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    sources = package_sources()
    assert files.keys() - {"program"} == sources.keys()
    assert all(files[name].read_text() == source for name, source in sources.items())


IMPORTS = """
import importlib, inspect, sys
root, absent, *names = sys.argv[1:]
sys.path.insert(0, root)
sys.modules.update(dict.fromkeys(absent.split()))
for name in names:
    assert importlib.import_module(name).__file__.startswith(root), name
import torch
from pgolf.kernels import newton_schulz, smear_gate
from pgolf.kernels.common import backend, launch
print(launch.launch_parameters("smear_gate", "forward", torch.device("cpu")))
kernel = smear_gate.triton._forward_kernel
print(kernel.src.splitlines()[0] if backend.triton else "def _forward_kernel(")
print(inspect.getsource(newton_schulz.newton_schulz_banks).splitlines()[0])
newton_schulz.newton_schulz_banks([torch.zeros(3)])
"""


def test_every_module_imports_and_shows_its_source(program: Path, root: Path, tmp_path: Path) -> None:
    names = [name.removesuffix(".py").replace("/", ".") for name in package_sources() if name.endswith(".py")]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    done = run(program, "-c", IMPORTS, root, " ".join(absent_modules()), *names, folder=tmp_path, fails=True)
    found, kernel, function = done.stdout.splitlines()
    table = json.loads((ROOT / "kernels" / "tuned" / "h100.json").read_text())["cases"]["smear_gate"]
    assert found == str(table["forward"])
    assert kernel.startswith("def _forward_kernel(") and function.startswith("def newton_schulz_banks(banks,")
    assert "\n    raise ValueError(f'G must be [m, n] or [N, m, n]" in done.stderr, "the traceback shows the line"


INTERPRETED = """
import sys
root, package = sys.argv[1:]
sys.path.insert(0, root)
import torch
import pgolf.kernels.common
assert pgolf.__file__.startswith(root)
pgolf.kernels.common.__path__.append(package)  # has the interpreter's mends, which the program lacks
from pgolf.kernels.smear_gate import smear_gate, smear_gate_reference
x, ids = torch.randn(1, 5, 16), torch.tensor([[1, 4, 5, 1, 6]])
weight, lam = torch.randn(1, 4), torch.ones(1)
compiled = torch.compile(smear_gate, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x, ids, weight, lam), smear_gate_reference(x, ids, weight, lam))
"""


def test_kernels_run_interpreted(program: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PGOLF_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run(program, "-c", INTERPRETED, root, ROOT / "kernels" / "common", folder=tmp_path)
    shown = run(program, program, "eval", "--run-dir", "run", folder=tmp_path, fails=True).stderr
    assert "exported without pgolf.kernels.common.interpreter; install the package pgolf for it" in shown


SPAWNS = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
from pgolf.common.progress import format_bytes
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(format_bytes, (2000,)))
"""


def test_a_spawned_worker_imports_it(program: Path, root: Path, tmp_path: Path) -> None:
    script = tmp_path / "spawns.py"
    script.write_text(SPAWNS)
    assert run(program, script, root, folder=tmp_path).stdout == "2.00 kB\n"


def test_a_run_has_the_package_s_results_and_exports_the_same_program(program: Path, tmp_path: Path) -> None:
    documents, data = tmp_path / "docs.jsonl", tmp_path / "data"
    texts = [document[:800] for document in embedded_documents()[:40]]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = data / "my.model"
    assert main(["data", "tokenizer", "--docs", str(documents), "--vocab-size", "400", "--out", str(model)]) == 0
    build = ["data", "build", "--docs", str(documents), "--tokenizer", str(model), "--out", str(data)]
    assert main([*build, "--val-docs", "3"]) == 0
    command = ["run", "--preset", "demo", *settings(data), "--run-dir"]
    assert main([*command, str(tmp_path / "package")]) == 0
    assert "After test-time training, bpb" in run(program, program, *command, "program", folder=tmp_path).stdout
    package, shipped = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("package", "program"))
    assert package["train"]["final_loss"] == shipped["train"]["final_loss"]
    for stage in ("before", "quantized", "sliding"):
        assert package["eval"][stage]["bits_per_byte"] == shipped["eval"][stage]["bits_per_byte"]
    assert package["ttt"]["bits_per_byte"] == shipped["ttt"]["bits_per_byte"]
    files = [
        [(tmp_path / name / file).read_bytes() for name in ("package", "program")]
        for file in ("model.pgolf", "train_gpt.py")
    ]
    assert all(one == other for one, other in files), "the same weights and the same program"
    assert (tmp_path / "package" / "report.html").is_file() and not (tmp_path / "program" / "report.html").exists()
    exported = tmp_path / "program" / "train_gpt.py"
    lines = [path.read_bytes().split(b"\n", 2) for path in (program, exported)]
    assert lines[0][2] == lines[1][2] and json.loads(lines[1][1])["MODEL_DIM"] == "32"
    assert "\nmodel_dim                          32 " in run(program, exported, "config", folder=tmp_path).stdout
