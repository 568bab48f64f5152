"""Quantisation by rate: every byte is spent where it lowers the loss most, and the artifact fits a number of bytes.

The loss grows with the square of a row's step, and the bytes fall with the step's logarithm. So at the best allocation
all rows lose equally per bit saved: step² times the row's sensitivity is the same for all (`allocate`). One number, the
level, moves all steps. `quantize_by_rate` searches for the level at which the coded bytes meet their target. Codes lie
on a trellis and are chosen as in GPTQ (`pgolf.kernels.trellis`).

An element's step is the product of its row's and its column's, each a whole power of 2^(1/16). Columns' steps are in
inverse proportion to their pivots, so that all columns of a row add the same to the loss.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.artifact.code_length import packed_size
from pgolf.artifact.container import content
from pgolf.artifact.gptq import inverse_factor
from pgolf.artifact.quantize import half, hessian_for, rule_for
from pgolf.artifact.quantized import CODES, COLUMN_STEP, PASSTHROUGH, ROW_STEP, QuantizedModel, QuantizeError
from pgolf.artifact.sensitivity import Sensitivities
from pgolf.artifact.steps import OCTAVE, step_sizes
from pgolf.config import RunConfig
from pgolf.kernels.trellis import trellis_gptq
from pgolf.model.second_moments import exact_float32_products, hessian_group

COARSEST = 1.0  # largest step in standard deviations of its row: half the states of a trellis have no code 0
FINEST = 2.0**-5  # smallest step in them: more than 7 bits a code gain nothing
SLACK_BYTES = 4000  # by which an artifact may stay below its target
ATTEMPTS = 12
FITS = 4  # attempts of `quantize_to_fit`
# GAUSSIAN_BITS = log2 √(2πe). A Gaussian code has that plus log2(standard deviation / step) bits if steps are small.
GAUSSIAN_BITS = 2.047


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

    Raises QuantizeError for a matrix without a Hessian or with numbers that are not finite.
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
        exponent = torch.round(OCTAVE * (logs.mean() - logs)).to(torch.int16)
        # A column's step over its pivot is the same for all columns: their loss has one common factor, 2^(2 mean).
        slope = sensitivities.rows[name].to(device) / weight.size(1) * torch.exp2(2 * logs.mean())
        if group == "tok_emb":
            head = sensitivities.head.to(device) / weight.size(1) * torch.exp2(2 * logs.mean())
            inputs = sensitivities.rows["tok_emb.weight"].to(device) / weight.size(1)
            slope = head + inputs if name == "tok_emb.weight" else head
        weight = weight[:, order]
        weight[:, dead] = 0
        if not (torch.isfinite(slope).all() and torch.isfinite(factor).all()):
            raise QuantizeError(f"{name}: its Hessian's factor or its sensitivities are not finite")
        matrices[name] = Matrix(weight, factor, order, slope, exponent)
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
    deviation = torch.log2((matrix.weight / step_sizes(matrix.column_exponent)).double().std(1).clamp_min(1e-12))
    wanted = level - 0.5 * torch.log2(matrix.slope.clamp_min(1e-30))
    wanted = torch.clamp(wanted, deviation + torch.tensor(FINEST).log2(), deviation + torch.tensor(COARSEST).log2())
    return torch.round(OCTAVE * wanted).to(torch.int16)


def code(matrices: Mapping[str, Matrix], level: float, config: RunConfig) -> QuantizedModel:
    """Quantise all matrices at a level; those of one shape go through the kernel together."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in matrices.items():
        shapes.setdefault(tuple(matrix.weight.shape), []).append(name)
    states, length = config.trellis_states, config.trellis_rows
    tensors: dict[str, Tensor] = {}
    meta: dict[str, str] = {}
    for names in shapes.values():
        exponents = [allocate(matrices[name], level) for name in names]
        with exact_float32_products():
            codes = trellis_gptq(
                torch.stack([matrices[name].weight for name in names]),
                torch.stack([matrices[name].factor for name in names]),
                torch.stack([step_sizes(exponent - (OCTAVE if states > 1 else 0)) for exponent in exponents]),
                torch.stack([step_sizes(matrices[name].column_exponent) for name in names]),
                states=states,
                path_length=length,
                shrink=torch.stack(
                    [_shrink(matrices[name], e, config) for name, e in zip(names, exponents, strict=True)]
                ),
            )
        for name, exponent, own in zip(names, exponents, codes, strict=True):
            if not own.any() and matrices[name].weight.any():  # steps up to `COARSEST` leave some codes
                raise QuantizeError(f"{name}: all of its codes are 0; its steps are {exponent.unique().tolist()[:8]}")
            order = matrices[name].order
            natural, columns = torch.empty_like(own), torch.empty_like(matrices[name].column_exponent)
            natural[:, order], columns[order] = own, matrices[name].column_exponent
            tensors |= {name + CODES: natural.cpu(), name + ROW_STEP: exponent.cpu(), name + COLUMN_STEP: columns.cpu()}
            meta[name] = f"trellis ({states} states, {length} rows)"
    return QuantizedModel(tensors, meta)


def _shrink(matrix: Matrix, exponent: Tensor, config: RunConfig) -> Tensor:
    """Return the factors of a matrix's targets, float32 [R]: 1 / (1 + ``trellis_shrink`` step² / (12 variance)).

    Where all rows lose equally per bit, a bit is worth (ln 4) step² / 12 of squared error, and a Gaussian code u costs
    u² / (2 ln 2 variance) bits: (x - u)² + the price of u is least at this share of x.
    """
    variance = (matrix.weight / step_sizes(matrix.column_exponent)).var(1).clamp_min(1e-24)
    return 1 / (1 + config.trellis_shrink * step_sizes(exponent).square() / (12 * variance))


def quantize_by_rate(
    tensors: Mapping[str, Tensor],
    matrices: Mapping[str, Matrix],
    config: RunConfig,
    device: torch.device,
    target: int,
) -> QuantizedModel:
    """Quantise a model so that its artifact takes ``target`` bytes or up to `SLACK_BYTES` fewer.

    A model that takes fewer bytes at its finest steps gets those. Bytes are those of `packed_size`.

    Args:
        tensors: float32 weights by per-layer name; those that are no matrices are kept in float16.
        matrices: of `prepare`.

    Raises QuantizeError if the coarsest steps give more bytes than ``target``.
    """
    kept = {name: half(name, tensor) for name, tensor in tensors.items() if name not in matrices}
    a_bit = sum(matrix.weight.numel() for matrix in matrices.values()) / 8  # bytes that a level higher by one saves
    level, aim = _first_level(matrices, target / a_bit), target - SLACK_BYTES / 2
    before: tuple[float, int] | None = None
    best: tuple[int, QuantizedModel] | None = None
    smallest, side = 1 << 60, None
    for _ in range(ATTEMPTS):
        quantized = _in_order(tensors, kept, code(matrices, level, config))
        computed = packed_size(quantized, device, side)
        side, size = computed.side, computed.total
        smallest = min(smallest, size)
        if size <= target and (best is None or size > best[0]):
            best = size, quantized
        settled = before is not None and before[1] == size  # all rows are at their finest or coarsest step
        if settled or abs(size - aim) < SLACK_BYTES / 4:
            break
        # Rows at their coarsest or finest step do not move: estimate the slope from the last two levels, within bounds.
        slope = a_bit
        if before is not None and before[0] != level:
            slope = min(max((before[1] - size) / (level - before[0]), 0.1 * a_bit), 1.2 * a_bit)
        before = level, size
        level += min(max((size - aim) / slope, -4), 4)
    if best is None:
        raise QuantizeError(
            f"the artifact does not fit {target:,} bytes: it takes {smallest:,} with steps of a standard deviation"
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


def _first_level(matrices: Mapping[str, Matrix], bits: float) -> float:
    """Return the level at which Gaussian codes have ``bits`` bits each in the mean."""
    total, numbers = 0.0, 0
    for matrix in matrices.values():
        deviation = (matrix.weight / step_sizes(matrix.column_exponent)).double().std(1).clamp_min(1e-12)
        ideal = torch.log2(deviation) + 0.5 * torch.log2(matrix.slope.clamp_min(1e-30)) + GAUSSIAN_BITS
        total += float(ideal.sum()) * matrix.weight.size(1)
        numbers += matrix.weight.numel()
    return total / max(numbers, 1) - bits
