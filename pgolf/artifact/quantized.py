"""What an artifact holds: codes, scales and corrections, and how each tensor's entries are called."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pgolf.kernels.dequant import LowRankFactors

SMALLEST_SCALE = 2.0**-24  # float16's smallest number: a row of zeros must not divide by zero
CODES, SCALE = ".q", ".scale"
ASYMMETRIC_KEYS = (".lqA_a", ".lqAs_a", ".lqB_a", ".lqBs_a")
SYMMETRIC_KEYS = (".lqA", ".lqAs", ".lqB", ".lqBs")
PASSTHROUGH = "passthrough (float16)"


class QuantizeError(ValueError):
    """Weights or Hessians that cannot be quantised, or an artifact that does not fit the model."""


@dataclass(frozen=True)
class QuantizedModel:
    """What an artifact holds, on the CPU.

    tensors: ``NAME.q`` int8 codes and ``NAME.scale`` float16 of every matrix, ``NAME`` float16 of every tensor kept,
        then the factors of the corrections (``NAME.lqA_a`` …).
    meta: by NAME, ``gptq (int6)``, ``gptq (int6)+lqer_asym``, ``gptq (int6)+lqer`` or ``passthrough (float16)``.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, str]

    def low_rank(self, name: str) -> LowRankFactors | None:
        """The correction of matrix ``name``, if it has one."""
        for keys in (ASYMMETRIC_KEYS, SYMMETRIC_KEYS):
            if name + keys[0] in self.tensors:
                return LowRankFactors(*(self.tensors[name + key] for key in keys))
        return None


def largest_code(bits: int) -> int:
    """The largest code R of a symmetric range of ``bits`` bits: 31 for 6. Raises ValueError outside 2 to 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes must have 2 to 8 bits, got {bits}")
    return 2 ** (bits - 1) - 1
