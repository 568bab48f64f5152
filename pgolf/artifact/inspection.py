"""What is in an artifact: classes of tensors, every matrix with its steps, bits and sensitivity, and bytes of the cap.

Sensitivities and the program are read from the run's folder, where they are there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.artifact.code_length import code_bits
from pgolf.artifact.container import load
from pgolf.artifact.packed_format import MAGIC, coded
from pgolf.artifact.quantized import CODES, COLUMN_STEP, ROW_STEP, SCALE, QuantizedModel, is_trellised
from pgolf.artifact.sizes import ArtifactSize, ClassSize, class_of, class_sizes, matrix_entropy
from pgolf.artifact.steps import step_sizes
from pgolf.common.files import FileError
from pgolf.common.folder import RunFolder, RunFolderError
from pgolf.common.progress import format_table
from pgolf.common.tensors import TensorFileError, check_tensor, load_tensors

Range = tuple[float, float]


class MatrixRow(NamedTuple):
    """One row of an artifact's table of matrices.

    Attributes:
        name, stored: the matrix, and how its codes were made, as `QuantizedModel.meta` says.
        kind: its class, as `ClassSize` names it.
        numbers: how many weights it has.
        row_steps: the smallest and the largest step of a row; scales are steps, too.
        column_steps: the same of the columns, by which rows' steps are multiplied; None for scales.
        entropy_bits: order-0 entropy of its codes, bits a weight.
        spent_bits: what the file spends on its codes, bits a weight; None in the public format, which compresses all
            tensors together.
        sensitivity: the loss's second derivative by an error of a weight, mean over its weights, nats a token; None
            where the run's folder has none.
        histogram: how often each code occurs.
    """

    name: str
    kind: str
    stored: str
    numbers: int
    row_steps: Range
    column_steps: Range | None
    entropy_bits: float
    spent_bits: float | None
    sensitivity: float | None
    histogram: dict[int, int]


class Inspection(NamedTuple):
    """What `inspect_artifact` found.

    Attributes:
        weight_bytes: of the artifact's file.
        run_dir: the run's folder, of the program and the sensitivities.
        code_bytes: of the program; None if there is none.
        classes, matrices: the tables' rows.
    """

    weight_bytes: int
    run_dir: Path
    code_bytes: int | None
    classes: list[ClassSize]
    matrices: list[MatrixRow]

    def histograms(self) -> dict[str, dict[int, int]]:
        """Return by class of matrix how often each code occurs."""
        counts: dict[str, Counter[int]] = {}
        for row in self.matrices:
            counts.setdefault(row.kind, Counter()).update(row.histogram)
        return {kind: dict(sorted(count.items())) for kind, count in counts.items()}

    def as_json(self) -> str:
        """Return all but the folder as a JSON object."""
        size = ArtifactSize(self.weight_bytes, self.code_bytes or 0)
        content: dict[str, Any] = {
            "bytes": self.weight_bytes,
            "code_bytes": self.code_bytes,
            "total_bytes": None if self.code_bytes is None else size.total_bytes,
            "cap_bytes": size.cap_bytes,
            "classes": [row._asdict() for row in self.classes],
            "matrices": [row._asdict() for row in self.matrices],
        }
        return json.dumps(content, indent=1)

    def as_text(self) -> str:
        """Return the tables and the bytes of the cap as aligned text."""
        matrices = [
            (
                row.name,
                _span(row.row_steps),
                _span(row.column_steps),
                f"{row.entropy_bits:.3f}",
                _shown(row.spent_bits, ".3f"),
                "" if row.spent_bits is None else f"{row.numbers * row.spent_bits / 8:,.0f}",
                _shown(row.sensitivity, ".2e"),
            )
            for row in self.matrices
        ]
        heads = ("matrix", "row steps", "column steps", "entropy", "bits/weight", "bytes", "sensitivity")
        classes = [
            (r.name, r.stored, r.tensors, f"{r.numbers:,}", f"{r.bits_per_number:.3f}", f"{r.bytes:,}")
            for r in self.classes
        ]
        lines = [
            format_table(matrices, heads),
            "",
            format_table(classes, ("class", "stored as", "tensors", "numbers", "bits/number", "bytes at these")),
            "",
            *self._sums(),
        ]
        return "\n".join(lines)

    def _sums(self) -> Iterator[str]:
        spent = [row.numbers * row.spent_bits / 8 for row in self.matrices if row.spent_bits is not None]
        of_which = f": codes {sum(spent):,.0f}, all else {self.weight_bytes - sum(spent):,.0f}" if spent else ""
        yield f"file: {self.weight_bytes:,} bytes{of_which}"
        size = ArtifactSize(self.weight_bytes, self.code_bytes or 0)
        other = "; --run-dir names another folder"
        if self.code_bytes is None:
            yield f"{size.share:.2%} of the cap, without code: there is no train_gpt.py in {self.run_dir}{other}"
        else:
            yield f"code: {self.code_bytes:,} bytes"
            left = f"{abs(size.margin_bytes):,} {'left' if size.margin_bytes >= 0 else 'too many'}"
            yield f"together: {size.total_bytes:,} bytes, {size.share:.2%} of the cap, {left}"
        if not any(row.sensitivity is not None for row in self.matrices):
            yield f"sensitivities: none in {self.run_dir}; `pgolf quantize` leaves them with quantizer=trellis{other}"


def inspect_artifact(path: str | os.PathLike, run_dir: str | Path | None = None) -> Inspection:
    """Read an artifact's file, and the program and the sensitivities of the run's folder (default: the artifact's).

    Raises ArtifactError as `load` does, RunFolderError if there is no such folder, and TensorFileError for
    sensitivities that are damaged or of another model.
    """
    path = Path(path)
    quantized, folder = load(path), RunFolder(path.parent if run_dir is None else run_dir)
    if not folder.path.is_dir():
        raise RunFolderError(f"there is no run folder {folder.path}")
    sensitivities: dict[str, float] = {}
    if folder.sensitivities.is_file():
        sensitivities = _sensitivities(folder.sensitivities, quantized)
    with path.open("rb") as file:
        packed = file.read(len(MAGIC)) == MAGIC
    matrices = [
        _row(name, how, quantized, packed)._replace(sensitivity=sensitivities.get(name))
        for name, how in quantized.meta.items()
        if name + CODES in quantized.tensors
    ]
    return Inspection(
        path.stat().st_size,
        folder.path,
        folder.program.stat().st_size if folder.program.is_file() else None,
        class_sizes(quantized),
        matrices,
    )


def _row(name: str, how: str, quantized: QuantizedModel, packed: bool) -> MatrixRow:
    codes = quantized.tensors[name + CODES]
    columns = None
    if name + SCALE in quantized.tensors:
        rows = quantized.scales(name)
    else:
        rows = step_sizes(quantized.tensors[name + ROW_STEP])
        columns = _range(step_sizes(quantized.tensors[name + COLUMN_STEP]))
    spent = None
    if packed:
        residuals = torch.from_numpy(coded(name + CODES, quantized))
        spent = code_bits(residuals, trellised=is_trellised(how))[0] / codes.numel()
    entropy = matrix_entropy(codes, how)
    values, counts = codes.int().unique(return_counts=True)
    histogram = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return MatrixRow(name, class_of(name), how, codes.numel(), _range(rows), columns, entropy, spent, None, histogram)


def _sensitivities(path: Path, quantized: QuantizedModel) -> dict[str, float]:
    """Read the stage's `Sensitivities`; return the mean over the weights of each matrix of codes."""
    content = load_tensors(path)
    head = "lm_head.weight" if "lm_head.weight" in quantized.meta else "tok_emb.weight"
    means = {}
    try:
        rows = content.get("rows")
        if not isinstance(rows, Mapping):
            raise FileError("it has no entry rows")
        for name in quantized.meta:
            if name + CODES in quantized.tensors:
                count, columns = quantized.tensors[name + CODES].shape
                total = check_tensor(name, rows.get(name), (count,), torch.float64)
                if name == head:
                    total = total + check_tensor("head", content.get("head"), (count,), torch.float64)
                means[name] = float(total.mean()) / columns
    except FileError as error:
        raise TensorFileError(
            f"{path} does not belong to the artifact: {error}. Delete it, or run `pgolf quantize` again"
        ) from error
    return means


def _range(steps: Tensor) -> Range:
    return float(steps.min()), float(steps.max())


def _span(steps: Range | None) -> str:
    return "" if steps is None else f"{steps[0]:.2e} to {steps[1]:.2e}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
