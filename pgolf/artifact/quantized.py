"""The content of an artifact: codes, scales and corrections, and the names of its entries."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from pgolf.common.files import FileError
from pgolf.kernels.dequant import LowRankFactors

SMALLEST_SCALE = 2.0**-24  # float16's smallest positive number, so that a row of zeros does not divide by zero
CODES, SCALE, ROW_STEP, COLUMN_STEP = ".q", ".scale", ".row", ".column"
ASYMMETRIC_KEYS = (".lqA_a", ".lqAs_a", ".lqB_a", ".lqBs_a")
SYMMETRIC_KEYS = (".lqA", ".lqAs", ".lqB", ".lqBs")
PASSTHROUGH = "passthrough (float16)"
GPTQ = re.compile(r"gptq \(int([2-8])\)(?:\+awq\((\d{1,4}(?:,\d{1,4})*)\))?(\+lqer(?:_asym)?)?")
GROUP_COLUMNS = 64  # of a group with codes of 8 bits
TRELLIS = re.compile(r"trellis \((\d{1,3}) states, (\d{1,5}) rows\)")


def is_trellised(how: str) -> bool:
    """Return whether a mark of `QuantizedModel.meta` is that of codes on a trellis of more than one state."""
    mark = TRELLIS.fullmatch(how)
    return mark is not None and mark[1] != "1"


class ArtifactError(FileError):
    """A file is no artifact, or an artifact is too large."""


class QuantizeError(ValueError):
    """Weights cannot be quantised, or an artifact does not fit the model."""


@dataclass(frozen=True)
class QuantizedModel:
    """The content of an artifact, on the CPU.

    Attributes:
        tensors: for a quantised matrix NAME by PR #1874's rule its codes ``NAME.q``, int8, and scales ``NAME.scale``,
            float16, and the factors of its correction (``NAME.lqA_a`` …); on a trellis its codes ``NAME.q``, int16, and
            exponents of steps ``NAME.row`` and ``NAME.column``, int16; for any other tensor ``NAME``, float16.
        meta: for each NAME ``gptq (int6)``, ``gptq (int6)+lqer_asym``, ``gptq (int6)+lqer``, ``trellis (128 states, 512
            rows)`` or ``passthrough (float16)``. ``gptq (int6)+awq(0,5)`` has codes of 8 bits in the groups 0 and 5 of
            64 columns.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, str]

    def scales(self, name: str) -> Tensor:
        """Return the scales of matrix ``name`` by row, float16 [R], or by row and group, float32 [R, columns / 64]."""
        mark = GPTQ.fullmatch(self.meta[name])
        assert mark is not None
        columns = self.tensors[name + CODES].size(1)
        return scales_by_group(self.tensors[name + SCALE], int(mark[1]), fine_groups(mark), columns)

    def low_rank(self, name: str) -> LowRankFactors | None:
        """Return the correction of matrix ``name``; None if it has none."""
        for keys in (ASYMMETRIC_KEYS, SYMMETRIC_KEYS):
            if name + keys[0] in self.tensors:
                return LowRankFactors(*(self.tensors[name + key] for key in keys))
        return None


def fine_groups(mark: re.Match) -> list[int]:
    """Return the groups with codes of 8 bits that a match of GPTQ names."""
    return [int(number) for number in mark[2].split(",")] if mark[2] else []


def scales_by_group(scales: Tensor, bits: int, fine: list[int], columns: int) -> Tensor:
    """Return scales [R] as they are, or of every group [R, columns / 64], where ``fine`` ones reach as far with 127."""
    if not fine:
        return scales
    grouped = scales.float()[:, None].repeat(1, columns // GROUP_COLUMNS)
    grouped[:, fine] *= largest_code(bits) / 127
    return grouped


def largest_code(bits: int) -> int:
    """Return 2^(bits-1) - 1, the largest code of a symmetric range. Raises ValueError unless bits are from 2 to 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes must have 2 to 8 bits, got {bits}")
    return 2 ** (bits - 1) - 1
