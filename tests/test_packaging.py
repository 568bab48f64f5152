"""The package as others meet it: fresh processes, other folders, distributions, and the name ``kernels``."""

from __future__ import annotations

import ast
import importlib.util
import os
import pydoc
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pgolf
from pgolf import kernels
from tests.test_docs import python_blocks

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "pgolf").rglob("*.py"))
    if path.stem[0] != "_"
]
KERNELS = [
    ".".join(("pgolf", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted((ROOT / "kernels").rglob("*.py"))
]
FAMILIES = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/reference.py"))
# What the source distribution carries.
PACKED = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", ".ci", ".pre-commit-config.yaml"),
    *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("pgolf", "kernels", "tests", "bench", "docs"),
)
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


def python(*arguments: str, cwd: Path, path: Path | None = None, **environment: str) -> str:
    """Run a fresh Python that sees no GPU and return what it prints; ``path`` is its PYTHONPATH."""
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(path or ""), **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def importable(names: list[str]) -> list[str]:
    """``names`` without the module that needs matplotlib, where that is not installed."""
    missing = importlib.util.find_spec("matplotlib") is None
    return [name for name in names if not (missing and name == "pgolf.report.plots")]


def test_every_module_imports_from_the_root() -> None:
    file, kernels = python("-c", IMPORT_ALL, *importable(MODULES + KERNELS), cwd=ROOT).splitlines()
    assert Path(file) == ROOT / "pgolf" / "__init__.py" and Path(kernels).resolve() == ROOT / "kernels"


def test_an_artifact_becomes_a_model_without_drawing_or_compiling(tmp_path: Path) -> None:
    script = """
import sys
import torch
from pgolf.artifact import container
from pgolf.config import RunConfig
from pgolf.common.folder import RunFolder
from pgolf.model.gpt import GPT
from pgolf.model.weights import unbank
from pgolf.model.second_moments import hessian_group
from pgolf.artifact.quantize import quantize_model
from pgolf.artifact.weights import load_artifact
from pgolf.common.runtime import start_world
from pgolf.model.build import build_model
config, folder = RunConfig.preset("demo").replace(embed_fp32_master=False, device="cpu"), RunFolder(sys.argv[1])
tensors = unbank(GPT(config).state_dict(), config.num_layers)
hessians = {hessian_group(name): torch.eye(t.size(1)) for name, t in tensors.items() if t.ndim == 2}
container.save(folder.artifact(config), quantize_model(tensors, hessians, config, torch.device("cpu")), "lzma")
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


TYPED = """
import pgolf.kernels.common.launch
import pgolf.kernels.residual.triton
from pgolf.kernels import newton_schulz_banks
from pgolf.kernels import nothing  # type: ignore[attr-defined]
from pgolf.kernels.newton_schulz import newton_schulz
reveal_type(newton_schulz)
reveal_type(newton_schulz_banks)
"""


def test_mypy_finds_kernels(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    options = ["--config-file=", f"--cache-dir={os.devnull}", "--follow-imports=silent", "--warn-unused-ignores"]
    options += ["--no-site-packages", "--ignore-missing-imports"]  # spares it PyTorch's types
    shown = python("-m", "mypy", *options, "-c", TYPED, cwd=tmp_path, MYPYPATH=str(ROOT))
    assert "no issues" in shown and shown.count('Revealed type is "def (') == 2


WITHOUT_TRITON = """
import importlib, inspect, sys

class NoTriton:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton)
modules = [importlib.import_module(name) for name in sys.argv[2:]]
ran = set()
sys.setprofile(lambda frame, event, argument: ran.add(frame.f_code))
exec(sys.argv[1], {})
sys.setprofile(None)
functions = {function for module in modules for name, function in vars(module).items()
             if module.__name__.startswith("pgolf.kernels.") and hasattr(module, "__all__")
             and name in module.__all__ and inspect.isfunction(function)}
print(*sorted(function.__name__ for function in functions if inspect.unwrap(function).__code__ not in ran))
"""
MORE_CALLS = """
from pgolf.kernels import *
from pgolf.kernels.newton_schulz import newton_schulz_reference, polar_express_coefficients

a, b, c, d = torch.randn(4, 4, 8, requires_grad=True).unbind()
mix, scale, lanes = torch.ones(2, 8), torch.ones(1), (torch.ones(2, 2), torch.ones(2))
first = enter_lanes_norm(a, b, mix, scale)
second = mix_lanes_norm(first.lane0, first.lane1, c, d, *lanes, first.x0, mix, scale)
final = mix_lanes_final(*mix_lanes(second.lane0, second.lane1, c, d, *lanes), c, d, *lanes)
residual_linear(join_skip(final, a, torch.ones(8)), scaled_rms_norm(b), torch.randn(8, 8)).sum().backward()
newton_schulz_reference(torch.randn(4, 8), steps=2, coefficients=polar_express_coefficients(2))
dequantize_all([pack(torch.ones(64, 128, dtype=torch.int8), 6, torch.rand(64))], [torch.empty(64, 128)])
bounds, each, kept = torch.tensor([0, 2, 4], dtype=torch.int32), torch.arange(4), torch.zeros(4, 1, 8)
cached_gated_attention(
    a[None], torch.randn(32, 8), torch.ones(4, 2), torch.zeros(4, 2), torch.ones(2), bounds, 2,
    KVCache(kept, kept.clone(), each, each, each, bounds, 2), 2, 1, head_dim=8, exclude_own_value=True, gated=False,
    key_offset=True,
)
"""


def test_without_triton_every_module_imports_and_every_operation_runs() -> None:
    """The examples of docs/kernels.md, and the operations that they leave out."""
    calls = python_blocks(ROOT / "docs" / "kernels.md") + MORE_CALLS
    not_run = python("-c", WITHOUT_TRITON, calls, *importable(MODULES + KERNELS), cwd=ROOT)
    assert not_run.split() == ["attention_tiles", "flash_attention"], "which are for kernels, and for GPUs"


def test_names_of_the_kernels_package_are_those_of_the_families() -> None:
    families = {name: importlib.import_module(f"pgolf.kernels.{name}") for name in FAMILIES}
    assert kernels.__all__ and not set(kernels.__all__) & families.keys()
    assert all(module.__all__ for module in families.values())
    homes = {name: module for module in families.values() for name in module.__all__ if name in kernels.__all__}
    homes |= dict.fromkeys(("set_backend", "using"), importlib.import_module("pgolf.kernels.common.backend"))
    assert homes.keys() == set(kernels.__all__)
    assert all(getattr(kernels, name) is getattr(home, name) for name, home in homes.items())
    operations = {
        name
        for module in families.values()
        for name in module.__all__
        if f"{name}_reference" in module.__all__ or f"{name}reference_" in module.__all__
    }
    assert operations - set(kernels.__all__) == families.keys() & operations
    with pytest.raises(AttributeError, match="from pgolf.kernels.trellis import trellis"):
        kernels.__getattr__("trellis")
    with pytest.raises(AttributeError, match="module 'pgolf.kernels' has no attribute 'nothing'"):
        _ = kernels.nothing


def test_type_checkers_and_python_find_the_same_names() -> None:
    """What is imported for type checkers is what `__getattr__` finds."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    found = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert found == {name: (module, name) for name, module in kernels._HOMES.items()}


def test_importing_the_kernels_package_imports_neither_pytorch_nor_triton() -> None:
    script = "import sys, pgolf.kernels; print(*{'torch', 'triton', 'numpy'} & sys.modules.keys())"
    assert python("-c", script, cwd=ROOT) == ""


def test_help_on_the_kernels_package_shows_its_names() -> None:
    text = pydoc.plain(pydoc.render_doc(kernels))
    assert all(f"{name}(" in text for name in kernels.__all__)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked; built from a copy, because building leaves files behind."""
    pytest.importorskip("setuptools", minversion="64")
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    for place in (ROOT / name for name in PACKED):
        if place.is_dir():
            shutil.copytree(place, source / place.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, source)
    archive = source / build("sdist", source)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def build(kind: str, source: Path) -> str:
    """Build a distribution of ``source`` into it and return its name: an ``sdist``, a ``wheel`` or an ``editable``."""
    if kind != "sdist" and not any(map(importlib.util.find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
        pytest.skip("needs wheel, or setuptools 70.1")
    script = f"from setuptools.build_meta import build_{kind}; print(build_{kind}('.'))"
    return python("-c", script, cwd=source).splitlines()[-1]


def test_the_sdist_is_a_checkout(unpacked: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for name in PACKED
        for path in (ROOT / name, *(ROOT / name).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in files if not (unpacked / name).is_file()} == set()
    assert os.readlink(unpacked / "pgolf" / "kernels") == os.readlink(ROOT / "pgolf" / "kernels")
    python("-m", "pytest", "tests/test_architecture.py", cwd=unpacked)


def test_the_wheel_carries_kernels(unpacked: Path) -> None:
    with zipfile.ZipFile(unpacked / build("wheel", unpacked)) as archive:
        files = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in files if name.endswith("entry_points.txt"))
        (metadata,) = (archive.read(name).decode() for name in files if name.endswith("METADATA"))
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pgolf").rglob("*.py")} | {"pgolf/py.typed"}
    expected |= {f"pgolf/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    expected |= {f"pgolf/kernels/tuned/{path.name}" for path in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert "pgolf = pgolf.cli:main" in entry_points
    assert f"Version: {pgolf.__version__}" in metadata and "Requires-Python: >=3.11" in metadata


def test_an_editable_install_is_one_line_of_a_path_file(unpacked: Path) -> None:
    """An import hook in its place would hide the package from editors and type checkers."""
    with zipfile.ZipFile(unpacked / build("editable", unpacked)) as archive:
        (name,) = (name for name in archive.namelist() if ".dist-info/" not in name)
        line = archive.read(name).decode().strip()
    assert name.endswith(".pth") and Path(line) == unpacked
    script = "import importlib.util; print(importlib.util.find_spec('pgolf.kernels.common').origin)"
    origin = python("-c", script, cwd=unpacked.parent, path=Path(line))
    assert Path(origin) == unpacked / "pgolf" / "kernels" / "common" / "__init__.py"


def test_a_checkout_without_symbolic_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pgolf").mkdir()
    (tmp_path / "pgolf" / "kernels").write_text("../kernels")
    (tmp_path / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    done = subprocess.run([sys.executable, "setup.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "git clone -c core.symlinks=true" in done.stderr
