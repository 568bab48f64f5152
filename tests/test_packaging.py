"""The package as others meet it: fresh processes, other folders, the wheel, and the name ``kernels``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pgolf

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "pgolf").rglob("*.py"))
    if path.stem[0] != "_"
]
KERNELS = [
    ".".join(("pgolf", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted((ROOT / "kernels").rglob("*.py"))
    if path.stem != "__init__"
]
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized(), "importing must not start CUDA"
assert "triton.runtime.driver" not in sys.modules or not torch.cuda.is_available()
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules, "they take seconds, and are for who compiles"
import pgolf, pgolf.kernels
print(pgolf.__file__, *pgolf.kernels.__path__, sep="\\n")
"""


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """What a fresh Python that sees no GPU prints; ``path`` is its PYTHONPATH."""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(path or "")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def importable(names: list[str]) -> list[str]:
    """``names`` without the module that needs matplotlib, where that is not installed."""
    missing = importlib.util.find_spec("matplotlib") is None
    return [name for name in names if not (missing and name == "pgolf.report_plots")]


def test_every_module_imports_from_the_root() -> None:
    file, kernels = python("-c", IMPORT_ALL, *importable(MODULES + KERNELS), cwd=ROOT).splitlines()
    assert Path(file) == ROOT / "pgolf" / "__init__.py" and Path(kernels).resolve() == ROOT / "kernels"


def test_an_artifact_becomes_a_model_without_drawing_or_compiling(tmp_path: Path) -> None:
    script = """
import sys
import torch
from pgolf import artifact
from pgolf.config import RunConfig
from pgolf.folder import RunFolder
from pgolf.model import GPT, unbank
from pgolf.quantize import hessian_group, quantize_model
from pgolf.run import load_artifact
from pgolf.runtime import start_world
from pgolf.train import build_model
config, folder = RunConfig.preset("demo").replace(embed_fp32_master=False, device="cpu"), RunFolder(sys.argv[1])
tensors = unbank(GPT(config).state_dict(), config.num_layers)
hessians = {hessian_group(name): torch.eye(t.size(1)) for name, t in tensors.items() if t.ndim == 2}
artifact.save(folder.artifact(config), quantize_model(tensors, hessians, config, torch.device("cpu")), "lzma")
world = start_world(config)
given = load_artifact(config, folder, world)
model = build_model(config, world, {name: value.float() for name, value in given.items()})
assert all(map(torch.equal, model.state_dict().values(), given.values()))
assert {name: value.dtype for name, value in model.state_dict().items()} == {n: v.dtype for n, v in given.items()}
assert not {p.data_ptr() for p in model.parameters()} & {value.data_ptr() for value in given.values()}
assert torch.equal(model.ln_scales, GPT(config).ln_scales) and all(p.requires_grad for p in model.parameters())
assert not {"torch._dynamo", "sympy"} & set(sys.modules), "which takes seconds"
"""
    python("-c", script, str(tmp_path), cwd=ROOT)


def test_every_module_imports_from_elsewhere(tmp_path: Path) -> None:
    file, kernels = python("-c", IMPORT_ALL, *importable(MODULES + KERNELS), cwd=tmp_path, path=ROOT).splitlines()
    assert Path(file).parent == ROOT / "pgolf" and Path(kernels).resolve() == ROOT / "kernels"


def test_spawned_processes_find_kernels(tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "from pgolf.kernels.common.backend import backend\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(backend))\n"
    )
    assert python(str(script), cwd=tmp_path, path=ROOT) == "auto"


def test_a_second_copy_of_the_kernels_is_refused() -> None:
    """From the root, ``import kernels`` would register the operators of ``pgolf.kernels`` twice."""
    script = "try:\n    import kernels\nexcept ImportError as error:\n    print(error)"
    assert "import pgolf.kernels" in python("-c", script, cwd=ROOT)


def test_wheel_carries_kernels(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 64:
        pytest.skip("needs setuptools 64")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "pgolf", "kernels"):  # a copy: the build leaves things behind
        subprocess.run(["cp", "-RP", str(ROOT / name), str(source)], check=True)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    wheel = source / python("-c", build, cwd=source).splitlines()[-1]
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in files if name.endswith("entry_points.txt"))
        (metadata,) = (archive.read(name).decode() for name in files if name.endswith("METADATA"))
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pgolf").rglob("*.py")}
    expected |= {f"pgolf/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")} | {
        "pgolf/py.typed"
    }
    expected |= {f"pgolf/kernels/tuned/{path.name}" for path in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert "pgolf = pgolf.cli:main" in entry_points
    assert f"Version: {pgolf.__version__}" in metadata and "Requires-Python: >=3.11" in metadata
