"""`pgolf inspect`: steps, bits and sensitivities of every matrix, the bytes of the cap, and the plot."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pgolf.artifact.container import load, save
from pgolf.artifact.inspection import Inspection, inspect_artifact
from pgolf.artifact.packed_format import HEAD
from pgolf.artifact.quantized import QuantizedModel
from pgolf.artifact.sizes import code_entropy
from pgolf.cli import main
from pgolf.common.tensors import TensorFileError
from pgolf.report.page import write_artifact_plot
from tests.test_packed_format import PUBLIC, model


def saved(folder: Path, quantized: QuantizedModel) -> Path:
    save(folder / "model.pgolf", quantized)
    return folder / "model.pgolf"


def two_matrices() -> QuantizedModel:
    """A matrix of the embedding, of more columns than coders, and one with escapes."""
    one, other = model(24, 600), model(64, 40)
    other.tensors["a.q"][0, 0] += 800
    names = {"tok_emb.weight": one, "blocks.0.mlp.fc.weight": other}
    tensors = {
        name + key: value.tensors["a" + key] for name, value in names.items() for key in (".q", ".row", ".column")
    }
    return QuantizedModel(tensors, {name: value.meta["a"] for name, value in names.items()})


def test_bits_that_are_spent_are_those_in_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, two_matrices())
    found = inspect_artifact(path)
    _, _, _, _, words, escapes, _ = HEAD.unpack_from(path.read_bytes())
    spent = sum(row.numbers * row.spent_bits for row in found.matrices) / 8
    # A coder begins and ends between two words; of 512 of them each keeps at most 16 bits in its state.
    assert escapes >= 2 and abs(words + escapes - spent) < 2 * 512
    assert [row.kind for row in found.matrices] == ["embedding", "mlp fc"]


def test_steps_are_those_of_the_weights(tmp_path: Path) -> None:
    quantized = model()
    (row,) = inspect_artifact(saved(tmp_path, quantized)).matrices
    for steps, key in ((row.row_steps, "a.row"), (row.column_steps, "a.column")):
        exponents = quantized.tensors[key]
        assert steps == pytest.approx([2.0 ** (int(e) / 16) for e in (exponents.min(), exponents.max())], rel=1e-6)
    assert (row.name, row.stored, row.numbers, row.sensitivity) == ("a", "trellis (8 states, 16 rows)", 960, None)


def test_a_public_artifact_has_scales_and_no_bytes_of_a_matrix() -> None:
    public = load(PUBLIC)
    for row in inspect_artifact(PUBLIC).matrices:
        scales, codes = public.tensors[row.name + ".scale"], public.tensors[row.name + ".q"]
        assert row.row_steps == (float(scales.min()), float(scales.max())) and row.column_steps is None
        assert row.spent_bits is None and row.entropy_bits == pytest.approx(code_entropy(codes))


def test_histograms_count_every_code_of_a_class(tmp_path: Path) -> None:
    quantized = two_matrices()
    found = inspect_artifact(saved(tmp_path, quantized))
    histograms = found.histograms()
    codes = quantized.tensors["blocks.0.mlp.fc.weight.q"]
    assert histograms["mlp fc"] == {int(value): int((codes == value).sum()) for value in codes.unique()}
    assert sum(histograms["embedding"].values()) == 24 * 600
    rows = {row["name"]: row["histogram"] for row in json.loads(found.as_json())["matrices"]}
    assert rows["blocks.0.mlp.fc.weight"] == {str(code): count for code, count in histograms["mlp fc"].items()}
    assert list(rows) == ["tok_emb.weight", "blocks.0.mlp.fc.weight"]


def test_histograms_of_a_class_are_the_sums_of_its_matrices(tmp_path: Path) -> None:
    found = inspect_artifact(saved(tmp_path, two_matrices()))
    first, second = found.matrices
    rows = [first._replace(kind="mlp fc", histogram={3: 1}), second._replace(histogram={-2: 4, 3: 2})]
    assert list(found._replace(matrices=rows).histograms()["mlp fc"].items()) == [(-2, 4), (3, 3)]


def test_sensitivities_and_code_are_of_the_run_s_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved(tmp_path, two_matrices())
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"without code: there is no train_gpt.py in {tmp_path}; --run-dir names another folder" in shown
    assert f"sensitivities: none in {tmp_path};" in shown
    rows = {"tok_emb.weight": torch.rand(24).double(), "blocks.0.mlp.fc.weight": torch.rand(64).double()}
    head = torch.rand(24).double()
    torch.save({"rows": rows, "head": head}, tmp_path / "sensitivities.pt")
    (tmp_path / "train_gpt.py").write_text("x" * 1000)
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = [
        float((rows["tok_emb.weight"] + head).mean()) / 600,
        float(rows["blocks.0.mlp.fc.weight"].mean()) / 40,
    ]
    assert [row["sensitivity"] for row in found["matrices"]] == pytest.approx(expected)
    assert found["bytes"] == path.stat().st_size
    assert (found["code_bytes"], found["total_bytes"]) == (1000, found["bytes"] + 1000)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"together: {found['total_bytes']:,} bytes" in shown
    elsewhere = path.rename(tmp_path.with_name(tmp_path.name + "-artifacts.pgolf"))  # as with artifact_dir
    assert main(["inspect", str(elsewhere), "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["inspect", str(elsewhere), "--run-dir", str(tmp_path / "none")]) == 2
    assert f"there is no run folder {tmp_path / 'none'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "it has no entry rows"),
        ({"rows": {}}, "tok_emb.weight is no plain tensor"),
        ({"rows": {"tok_emb.weight": torch.rand(23).double()}}, r"tok_emb.weight is \[23\]"),
        ({"rows": {"tok_emb.weight": torch.full((24,), torch.nan).double()}}, "numbers that are not finite"),
    ],
)
def test_sensitivities_of_another_model_are_an_error(tmp_path: Path, content: dict, words: str) -> None:
    path = saved(tmp_path, two_matrices())
    torch.save(content, tmp_path / "sensitivities.pt")
    with pytest.raises(TensorFileError, match=f"sensitivities.pt does not belong to the artifact.*{words}.*quantize"):
        inspect_artifact(path)


def drawn(found: Inspection, path: Path) -> str:
    write_artifact_plot(path, found.histograms(), [row._asdict() for row in found.matrices])
    return path.read_text()


def test_the_plot_is_an_svg_file_of_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    path = saved(tmp_path, two_matrices())
    found = inspect_artifact(path)
    plain = drawn(found, tmp_path / "plain.svg")
    assert plain == drawn(found, tmp_path / "again.svg") and "against their sensitivity" not in plain
    measured = found._replace(matrices=[row._replace(sensitivity=1e-3) for row in found.matrices])
    text = drawn(measured, tmp_path / "measured.svg")
    ElementTree.fromstring(text)
    assert "bits of 2 matrices against their sensitivity" in text and "--one: #2563c9" in text and "#040404" not in text
    assert main(["inspect", str(path), "--plot-file", str(tmp_path / "plot.svg")]) == 0
    assert (tmp_path / "plot.svg").read_text() == plain
    assert f"plot: {tmp_path / 'plot.svg'}\n" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json", "--plot"]) == 0
    assert (tmp_path / "model.svg").read_text() == plain
    shown = capsys.readouterr()
    assert json.loads(shown.out) and shown.err == f"plot: {tmp_path / 'model.svg'}\n"
    assert main(["inspect", str(path), "--plot-file", str(tmp_path / "plot.png")]) == 2
    assert "must end in .svg" in capsys.readouterr().err and not (tmp_path / "plot.png").exists()
