"""Quantisation by rate: every byte is spent where it lowers the loss most, and the artifact fits a number of bytes.

The loss grows with the square of a row's step, and the bytes fall with the step's logarithm. So at the best allocation
all rows lose equally per bit saved: step² times the row's sensitivity is the same for all (`allocate`). One number, the
level, moves all steps. `quantize_by_rate` searches for the level at which the coded bytes meet their target: `Lengths`
predicts them, a try says by how much it is wrong. Codes lie on a trellis and are chosen as in GPTQ
(`pgolf.kernels.trellis`).

An element's step is the product of its row's and its column's, each a whole power of 2^(1/16). Columns' steps are in
inverse proportion to their pivots, so that all columns of a row add the same to the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.artifact.code_length import packed_size
from pgolf.artifact.container import MOST_EXPONENT, content
from pgolf.artifact.gptq import inverse_factor
from pgolf.artifact.quantize import half, hessian_for, rule_for
from pgolf.artifact.quantized import CODES, COLUMN_STEP, PASSTHROUGH, ROW_STEP, QuantizedModel, QuantizeError
from pgolf.artifact.sensitivity import Sensitivities
from pgolf.artifact.steps import OCTAVE, step_sizes
from pgolf.common.runtime import side_by_side
from pgolf.config import RunConfig
from pgolf.kernels.trellis import trellis_gptq
from pgolf.model.second_moments import exact_float32_products, hessian_group

COARSEST = 1.0  # largest step in standard deviations of its row: half the states of a trellis have no code 0
FINEST = 2.0**-5  # smallest step in them: more than 7 bits a code gain nothing
SLACK_BYTES = 4000  # by which an artifact may stay below its target
ATTEMPTS = 12
NARROWEST = 2e-3  # interval of levels below which no further one is tried
FITS = 4  # attempts of `quantize_to_fit`
HALVINGS = 60  # of the range in which a level is searched


class Matrix(NamedTuple):
    """A matrix on its way to codes, its columns in the order in which they are coded."""

    weight: Tensor  # float32 [R, C]
    factor: Tensor  # float32 [C, C], of the inverse second moments with trace C
    order: Tensor  # int64 [C]
    slope: Tensor  # float64 [R]: the loss's second derivative by a row's errors at a column step of 1, nats a token
    column_exponent: Tensor  # int16 [C]: log2 of the columns' steps, in sixteenths


class Fitted(NamedTuple):
    """A quantised model, its artifact's content, and the seconds that codes and contents took in all tries."""

    quantized: QuantizedModel
    blob: bytes
    code_seconds: float
    file_seconds: float


def prepare(
    tensors: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    sensitivities: Sensitivities,
    config: RunConfig,
    device: torch.device,
) -> dict[str, Matrix]:
    """Return what `allocate` and `code` need of every matrix that is quantised, by per-layer name.

    Raises QuantizeError for a matrix without a Hessian or with numbers that are not finite, and where there is none.
    """
    factors: dict[str | None, tuple[Tensor, Tensor, Tensor]] = {}
    matrices = {}
    for name, tensor in tensors.items():
        if rule_for(name, tensor, config) is None:
            continue
        if not torch.isfinite(tensor).all():
            raise QuantizeError(f"{name} has numbers that are not finite: training has diverged")
        if not torch.isfinite(sensitivities.rows[name]).all() or not torch.isfinite(sensitivities.head).all():
            raise QuantizeError(f"{name}: its sensitivities are not finite: gradients of the average's loss are not")
        weight = tensor.to(device, torch.float32)
        group = hessian_group(name, tied=config.tie_embeddings)
        if group not in factors:
            factors[group] = _factor(name, hessian_for(name, weight, hessians, config))
        factor, order, dead = factors[group]
        logs = -torch.log2(factor.diagonal().double())  # of the pivots
        if config.trellis_column_steps:
            # A column's step over its pivot is the same for all columns: their loss has one common factor.
            exponent, pivots = torch.round(OCTAVE * (logs.mean() - logs)).to(torch.int16), torch.exp2(2 * logs.mean())
        else:
            exponent, pivots = torch.zeros_like(order, dtype=torch.int16), torch.exp2(2 * logs).mean()
        slope = sensitivities.rows[name].to(device) / weight.size(1) * pivots
        if group == "tok_emb":
            head = sensitivities.head.to(device) / weight.size(1) * pivots
            # Of its errors as an input the plain size counts, taken to be step² / 12; GPTQ's are some 1.6 times that.
            inputs = sensitivities.rows["tok_emb.weight"].to(device) / weight.size(1)
            slope = head + inputs if name == "tok_emb.weight" else head
        if not config.trellis_row_steps:
            slope = slope.mean().expand_as(slope)
        weight = weight[:, order]
        weight[:, dead] = 0
        if not (torch.isfinite(slope).all() and torch.isfinite(factor).all()):
            raise QuantizeError(f"{name}: its Hessian's factor or its sensitivities are not finite")
        matrices[name] = Matrix(weight, factor, order, slope, exponent)
    if not matrices:
        raise QuantizeError("no tensor has enough numbers to be quantised: lower gptq_passthrough_numel")
    return matrices


def _factor(name: str, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `inverse_factor` of a Hessian scaled to a mean diagonal of 1."""
    if not torch.isfinite(hessian).all():
        raise QuantizeError(f"the Hessian of {name} has numbers that are not finite: calibration has failed")
    with exact_float32_products():
        return inverse_factor(hessian.float() * (len(hessian) / hessian.diagonal().sum().clamp_min(1e-30)), name)


def allocate(matrix: Matrix, level: float) -> Tensor:
    """Return each row's step exponent (1/16 octave), int16 [R], at which all rows lose equally per bit saved.

    A level higher by one doubles all steps, except where `FINEST` or `COARSEST` bounds them.
    """
    exponents = torch.round(OCTAVE * _bounded(_deviation(matrix), _best_step(matrix), level))
    return exponents.clamp(-MOST_EXPONENT, MOST_EXPONENT).to(torch.int16)  # rows of zeros have no deviation


def _deviation(matrix: Matrix) -> Tensor:
    """Return log2 of the rows' standard deviations in column steps, float64 [R]."""
    return torch.log2((matrix.weight / step_sizes(matrix.column_exponent)).double().std(1).clamp_min(1e-12))


def _best_step(matrix: Matrix) -> Tensor:
    """Return log2 of the rows' best steps at level 0, float64 [R]."""
    return -0.5 * torch.log2(matrix.slope.clamp_min(1e-30))


def _bounded(deviation: Tensor, best_step: Tensor, level: float) -> Tensor:
    """Return log2 of the rows' steps at a level."""
    return torch.clamp(best_step + level, deviation + math.log2(FINEST), deviation + math.log2(COARSEST))


class Lengths:
    """How many bits the codes of all matrices take at a level, if rows are Gaussian.

    A code of a row with standard deviation s and step d then has about ½ log2(2πe (s² / d² + 1/12)) bits.
    """

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self.deviation = torch.cat([_deviation(matrix) for matrix in matrices.values()]).cpu()
        self.best_step = torch.cat([_best_step(matrix) for matrix in matrices.values()]).cpu()
        self.columns = torch.cat([torch.full((len(m.weight),), m.weight.size(1)) for m in matrices.values()])

    def bits(self, level: float) -> float:
        """Return the bits of all codes at a level."""
        ratio = self.deviation - _bounded(self.deviation, self.best_step, level)
        return float((self.columns * 0.5 * torch.log2(2 * math.pi * math.e * (torch.exp2(2 * ratio) + 1 / 12))).sum())

    def level(self, bits: float) -> float:
        """Return the level at which the codes have so many bits, or the finest or coarsest of all rows."""
        low = float((self.deviation - self.best_step).min()) + math.log2(FINEST)
        high = float((self.deviation - self.best_step).max()) + math.log2(COARSEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(middle) > bits else (low, middle)
        return (low + high) / 2


def code(matrices: Mapping[str, Matrix], level: float, config: RunConfig) -> QuantizedModel:
    """Quantise all matrices at a level: of one shape by one call of the kernel, shapes beside one another."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in sorted(matrices.items(), key=lambda item: -item[1].weight.size(1)):  # the longest begin
        shapes.setdefault(tuple(matrix.weight.shape), []).append(name)
    exponents = {name: allocate(matrix, level) for name, matrix in matrices.items()}
    device = next(iter(matrices.values())).weight.device
    calls = [
        partial(_codes, [matrices[n] for n in names], [exponents[n] for n in names], config)
        for names in shapes.values()
    ]
    tensors: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for names, codes in zip(shapes.values(), side_by_side(calls, device), strict=True):
        for name, own in zip(names, codes, strict=True):
            matrix, exponent = matrices[name], exponents[name]
            if not own.any() and matrix.weight.any():  # steps up to `COARSEST` leave some codes
                raise QuantizeError(f"{name}: all of its codes are 0; its steps are {exponent.unique().tolist()[:8]}")
            natural, columns = torch.empty_like(own), torch.empty_like(matrix.column_exponent)
            natural[:, matrix.order], columns[matrix.order] = own, matrix.column_exponent
            tensors |= {name + CODES: natural.cpu(), name + ROW_STEP: exponent.cpu(), name + COLUMN_STEP: columns.cpu()}
            meta[name] = f"trellis ({config.trellis_states} states, {config.trellis_rows} rows)"
    return QuantizedModel(tensors, meta)


def _codes(matrices: Sequence[Matrix], exponents: Sequence[Tensor], config: RunConfig) -> Tensor:
    """Return the codes of matrices of one shape, int16 [matrices, R, C], in their order of columns."""
    states = config.trellis_states
    with exact_float32_products():
        return trellis_gptq(
            torch.stack([matrix.weight for matrix in matrices]),
            torch.stack([matrix.factor for matrix in matrices]),
            torch.stack([step_sizes(exponent - (OCTAVE if states > 1 else 0)) for exponent in exponents]),
            torch.stack([step_sizes(matrix.column_exponent) for matrix in matrices]),
            states=states,
            path_length=config.trellis_rows,
            shrink=_shrink(matrices, exponents, config.trellis_shrink),
        )


def _shrink(matrices: Sequence[Matrix], exponents: Sequence[Tensor], strength: float) -> Tensor | None:
    """Return the factors of matrices' targets, float32 [matrices, R]: 1 / (1 + strength step² / (12 variance)).

    Where all rows lose equally per bit, a bit is worth (ln 4) step² / 12 of squared error, and a Gaussian code u costs
    u² / (2 ln 2 variance) bits: (x - u)² + the price of u is least at this share of x.
    """
    if strength == 0:
        return None
    variances = [(m.weight / step_sizes(m.column_exponent)).var(1).clamp_min(1e-24) for m in matrices]
    steps = [step_sizes(exponent) for exponent in exponents]
    return torch.stack([1 / (1 + strength * d.square() / (12 * v)) for d, v in zip(steps, variances, strict=True)])


def quantize_by_rate(
    tensors: Mapping[str, Tensor],
    matrices: Mapping[str, Matrix],
    config: RunConfig,
    device: torch.device,
    target: int,
) -> QuantizedModel:
    """Quantise a model so that its artifact takes ``target`` bytes or up to `SLACK_BYTES` fewer.

    A model that takes fewer bytes at its finest steps gets those. Where many rows share a step, as without
    ``trellis_row_steps``, bytes fall in stairs, and it may be more fewer. Bytes are those of `packed_size`.

    Args:
        tensors: float32 weights by per-layer name; those that are no matrices are kept in float16.
        matrices: of `prepare`.

    Raises QuantizeError if the coarsest steps give more bytes than ``target``.
    """
    kept = {name: half(name, tensor) for name, tensor in tensors.items() if name not in matrices}
    lengths, aim = Lengths(matrices), target - SLACK_BYTES / 2
    best: tuple[int, QuantizedModel] | None = None
    smallest, side, more, level = 1 << 60, None, 0.0, math.nan
    below, above = -math.inf, math.inf  # the coarsest level that gave too many bytes, the finest that gave too few
    for _ in range(ATTEMPTS):
        before, level = level, lengths.level(8 * (aim - more))
        if level == before or above - below < NARROWEST:  # the steps cannot come nearer, as at their bounds
            break
        if not below < level < above:  # bytes fall in stairs where many rows share a step
            level = (below + above) / 2
        quantized = _in_order(tensors, kept, code(matrices, level, config))
        computed = packed_size(quantized, device, side)
        side, size = computed.side, computed.total
        smallest = min(smallest, size)
        if size <= target and (best is None or size > best[0]):
            best = size, quantized
        if abs(size - aim) < SLACK_BYTES / 4:
            break
        more = size - lengths.bits(level) / 8
        below, above = (level, above) if size > aim else (below, level)
    if best is None:
        raise QuantizeError(
            f"the artifact does not fit {target:,} bytes: at the coarsest steps tried it takes {smallest:,}"
        )
    return best[1]


def quantize_to_fit(
    tensors: Mapping[str, Tensor],
    matrices: Mapping[str, Matrix],
    config: RunConfig,
    device: torch.device,
    path: Path,
    target: int,
) -> Fitted:
    """Quantise a model by `quantize_by_rate`, so that the artifact's content has at most ``target`` bytes.

    If the content has more bytes than was computed, the model is quantised again with a lower target.

    Raises QuantizeError if it does not fit.
    """
    aim, code_seconds, file_seconds = target, 0.0, 0.0
    for _ in range(FITS):
        begun = time.perf_counter()
        quantized = quantize_by_rate(tensors, matrices, config, device, aim)
        solved = time.perf_counter()
        blob = content(path, quantized)
        code_seconds, file_seconds = code_seconds + solved - begun, file_seconds + time.perf_counter() - solved
        if len(blob) <= target:
            return Fitted(quantized, blob, code_seconds, file_seconds)
        aim -= len(blob) - target + SLACK_BYTES // 8
    raise QuantizeError(f"the artifact does not fit {target:,} bytes: it takes {len(blob):,}, more than computed")


def _in_order(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor], coded: QuantizedModel) -> QuantizedModel:
    """Return the whole model, with its entries in the order of ``tensors``."""
    entries: dict[str, Tensor] = {}
    for name in tensors:
        parts = {name: kept[name]} if name in kept else {name + key: coded.tensors[name + key] for key in _KEYS}
        entries |= parts
    return QuantizedModel(entries, {name: coded.meta.get(name, PASSTHROUGH) for name in tensors})


_KEYS = (CODES, ROW_STEP, COLUMN_STEP)
