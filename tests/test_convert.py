"""`pgolf convert`: the same codes in either format, and weights for others."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch

from pgolf.artifact.container import ArtifactError, load, save
from pgolf.artifact.convert import convert
from pgolf.artifact.quantize import dequantize_model
from pgolf.cli import main
from tests.test_packed_format import PUBLIC, model, same


def test_both_ways_between_the_formats(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    packed, public = tmp_path / "a.pgolf", tmp_path / "b.int6.ptz"
    assert main(["convert", str(PUBLIC), str(packed)]) == 0
    assert f"{packed.stat().st_size:,} bytes" in capsys.readouterr().out
    assert convert(packed, public, "lzma") == public.stat().st_size
    assert same(load(packed), load(PUBLIC)) and same(load(public), load(PUBLIC))


def test_weights_are_those_of_the_artifact(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    given = model()
    save(tmp_path / "a.pgolf", given)
    for source, quantized in ((tmp_path / "a.pgolf", given), (PUBLIC, load(PUBLIC))):
        target = tmp_path / f"{source.stem}.safetensors"
        convert(source, target)
        found = safetensors.load_file(target)
        expected = dequantize_model(quantized, found)
        assert found.keys() == quantized.meta.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in found.items())


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.pgolf", model())
    with pytest.raises(ArtifactError, match="a.pgolf is there already"):
        convert(PUBLIC, tmp_path / "a.pgolf")
    with pytest.raises(ArtifactError, match="no place for codes on a trellis"):
        convert(tmp_path / "a.pgolf", tmp_path / "b.int6.ptz")
    with pytest.raises(ArtifactError, match="must end in .pgolf, .int6.ptz or .safetensors"):
        convert(PUBLIC, tmp_path / "b.bin")
    with pytest.raises(ArtifactError, match="holds weights, which have no codes"):
        convert(tmp_path / "b.safetensors", tmp_path / "b.pgolf")
    with pytest.raises(ArtifactError, match="--compressor is of .int6.ptz files"):
        convert(PUBLIC, tmp_path / "b.pgolf", "lzma")
    imported = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install safetensors"):
        convert(PUBLIC, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pgolf"]


def test_inspect_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "a.pgolf", model())
    assert main(["inspect", str(tmp_path / "a.pgolf"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bytes"] == (tmp_path / "a.pgolf").stat().st_size and shown["cap_bytes"] == 16_000_000
    assert {row["stored"] for row in shown["classes"]} == {"trellis", "int16", "float16"}
